"""Translation of the source that MLX would pass to Metal's compiler for the CPU's compiler."""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import mlx.core as mx

KERNEL: Final = re.compile(r"\[\[kernel\]\] void (\w+)\(\n((?:.*\n)*?.*\) \{)\n")
PARAMETER: Final = re.compile(r"^\s*(.*?)\s+(\w+) \[\[(\w+)(?:\((\d+)\))?\]\],?(?:\) \{)?$")
COMMENT: Final = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ARRAY: Final = re.compile(
    r"^([ \t]*)threadgroup[ \t]+([\w:][\w:<>, \t]*?)[ \t]+(\w+)[ \t]*((?:\[[^\]]*\])*)[ \t]*;", re.MULTILINE
)
UNPLACED: Final = re.compile(r"\bthreadgroup\b(?!\s*[\w:<>, \t]*[*&])(?!_)(.*)")


class Parameter(NamedTuple):
    """One parameter of a kernel: a buffer with its index, or an attribute such as a thread's position."""

    type: str
    name: str
    attribute: str
    index: str | None


class Parsed(NamedTuple):
    """A kernel's function with its template arguments, its parameters, and the source without the instantiation."""

    function: str
    parameters: list[Parameter]
    text: str


def generated_text(kernel: Any, arrays: Sequence[mx.array], **call: Any) -> str:
    """Return the code that MLX generates around a kernel's source, also on a machine without Metal.

    Exporting traces the kernel without running it, and verbose=True prints the source.
    """
    with tempfile.TemporaryFile() as taken, tempfile.NamedTemporaryFile(suffix=".mlxfn") as file:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(taken.fileno(), 1)
        try:
            mx.export_function(file.name, lambda *a: kernel(inputs=list(a), verbose=True, **call), *arrays)
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        taken.seek(0)
        text = taken.read().decode()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def parse(text: str) -> Parsed:
    """Find the kernel, its parameters, and the explicit instantiation of a template."""
    found = KERNEL.search(text)
    assert found, "no kernel in the text"
    matches = [PARAMETER.match(line) for line in found[2].splitlines()]
    assert all(matches), found[2]
    parameters = [Parameter(*match.groups()) for match in matches if match]
    made = re.search(r'\ntemplate \[\[host_name\("[^"]*"\)\]\] \[\[kernel\]\] decltype\((.*)\) \1;\n', text)
    return Parsed(made[1] if made else found[1], parameters, text[: made.start()] + "\n" if made else text)


def place_threadgroup_arrays(text: str) -> str:
    """Replace `threadgroup T x[N];` by a reference into the group's checked memory, on the same line.

    Raises:
        ValueError: a declaration of another form.
    """
    text = COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    placed = ARRAY.sub(_reference, text)
    for found in UNPLACED.finditer(placed):
        if not found[0].startswith("threadgroup_"):
            raise ValueError(f"cannot place: {found[0]}")
    return placed


def _reference(found: re.Match[str]) -> str:
    indent, kind, name, bounds = found.groups()
    own = f"msl_t_{name}"
    place = f'metal::threadgroup_array<{own}>("{name}", __LINE__)'
    return f"{indent}using {own} = {kind}{bounds}; {own}& {name} = {place};"
