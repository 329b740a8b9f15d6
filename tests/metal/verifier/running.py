"""One launch: arrays in, arrays and counts out, or a Finding with everything that was wrong."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from verifier.building import build, kernel_line
from verifier.source import generated_text

MOST_BUFFERS: Final = 31
OUTPUT, INITIALISED = 1, 2
FIRST_COUNT: Final = 4
"""Where the counts of the buffers begin, two each, behind accesses, switches, threadgroup bytes and products."""
MISALIGNED: Final = 256


class Finding(AssertionError):
    """What was found: each item a kind, what happened, the kernel's line, and the thread."""

    def __init__(self, *items: str) -> None:
        super().__init__("\n".join(items))
        self.items = items


class Buffer(NamedTuple):
    """Memory of one parameter."""

    data: np.ndarray[Any, Any]
    flags: int


class Launch(NamedTuple):
    """What one launch did."""

    outputs: list[mx.array]
    counts: dict[str, Any]
    """text; reads and writes (elements by buffer); products (8 x 8 matrices, by simdgroup); tg (threadgroup bytes)."""


def verify(
    kernel: Any,
    names: Sequence[str],
    inputs: Sequence[mx.array],
    *,
    output_names: Sequence[str],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Any = None,
    init_value: float | None = None,
    order: int = 0,
    misalign: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Launch:
    """Runs what mx.fast.metal_kernel made, as MLX would launch it.

    Args:
        kernel: what mx.fast.metal_kernel made.
        names, inputs: the inputs, of any strides.
        output_names, output_shapes, output_dtypes, grid, threadgroup, template, init_value: as MLX takes them.
        order: 0 or 1, the schedule: threads in order, or reversed.
        misalign: whether each buffer starts one element past a page.
        edit: changes the generated text before it is compiled.

    Raises:
        Finding: with everything that was found.
        CompileError: the text does not compile.
    """
    call = {"output_shapes": output_shapes, "output_dtypes": output_dtypes, "grid": grid, "threadgroup": threadgroup}
    text = generated_text(kernel, inputs, **call, **({"template": template} if template else {}))
    if not text.isascii():
        raise Finding("limit: the text is not ASCII, as MLX needs it")
    text = edit(text) if edit else text
    library, parameters = build(text)
    results = _results(output_names, output_shapes, output_dtypes, init_value)
    known = _inputs(names, inputs) | results
    used = {each.name: known[each.name] for each in parameters if each.attribute == "buffer"}
    stats = launch(library, used, grid, threadgroup, order | (MISALIGNED if misalign else 0), text)
    made = zip(results.values(), output_dtypes, strict=True)
    outputs = [mx.array(h.data).view(d) if d == mx.bfloat16 else mx.array(h.data) for h, d in made]
    return Launch(outputs, {"text": text, **_counts(stats, used)})


def _counts(stats: Sequence[int], used: Iterable[str]) -> dict[str, Any]:
    """The runtime's counts by name; those of a buffer are its reads and its writes."""
    by_buffer = stats[FIRST_COUNT:]
    counts: dict[str, Any] = {"tg": stats[2], "products": stats[3]}
    for offset, what in enumerate(("reads", "writes")):
        counts[what] = {name: by_buffer[2 * place + offset] for place, name in enumerate(used)}
    return counts


def _results(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype], init_value: float | None
) -> dict[str, Buffer]:
    """Room for the outputs; what they hold before the launch is undefined unless a value is given."""
    made = {}
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        value = mx.zeros(shape, dtype) if init_value is None else mx.full(shape, init_value, dtype=dtype)
        made[name] = Buffer(_bits(value), OUTPUT if init_value is None else OUTPUT | INITIALISED)
    return made


def _bits(array: mx.array) -> np.ndarray[Any, Any]:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _inputs(names: Sequence[str], arrays: Sequence[mx.array]) -> dict[str, Buffer]:
    """Each input as it lies in memory with its real strides, and what MLX passes beside it."""
    made = {}
    for name, array in zip(names, arrays, strict=True):
        mx.eval(array)
        held = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
        strides = [stride // held.itemsize for stride in held.strides]
        span = 1 + sum((size - 1) * stride for size, stride in zip(held.shape, strides, strict=True))
        flat = np.lib.stride_tricks.as_strided(held, (span,), (held.itemsize,)).copy()
        made[name] = Buffer(flat, INITIALISED)
        made[f"{name}_shape"] = Buffer(np.array(held.shape, np.int32), INITIALISED)
        made[f"{name}_ndim"] = Buffer(np.array([held.ndim], np.int32), INITIALISED)
        made[f"{name}_strides"] = Buffer(np.array(strides, np.int64), INITIALISED)
    return made


def launch(
    library: Path, buffers: dict[str, Buffer], grid: Sequence[int], threadgroup: Sequence[int], options: int, text: str
) -> list[int]:
    """Calls the runtime, and returns its counts.

    Raises:
        Finding: with everything that was found.
    """
    loaded, n = ctypes.CDLL(str(library)), len(buffers)
    if n > MOST_BUFFERS:
        raise Finding(f"limit: {n} buffers, Metal takes {MOST_BUFFERS}")
    held = list(buffers.values())
    said = ctypes.create_string_buffer(1 << 16)
    stats = (ctypes.c_uint64 * (FIRST_COUNT + 2 * MOST_BUFFERS))()
    found = loaded.msl_run(
        loaded.msl_entry,
        n,
        (ctypes.c_void_p * n)(*[each.data.ctypes.data for each in held]),
        (ctypes.c_uint64 * n)(*[each.data.nbytes for each in held]),
        (ctypes.c_uint32 * n)(*[each.data.itemsize for each in held]),
        (ctypes.c_uint32 * n)(*[each.flags for each in held]),
        (ctypes.c_char_p * n)(*[name.encode() for name in buffers]),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        options,
        said,
        len(said),
        stats,
    )
    if found:
        lines = text.splitlines()
        raise Finding(*(_item(line, library, lines) for line in said.value.decode().splitlines()))
    return list(stats)


def _item(line: str, library: Path, lines: Sequence[str]) -> str:
    """A finding with the kernel's own line, where it has one."""
    kind, offset, what, *where = line.split("|")
    number = kernel_line(library, offset) if offset != "0" else None
    at = f" at line {number}: `{lines[number - 1].strip()}`" if number and number <= len(lines) else ""
    return f"{kind}: {what}{at} {' '.join(where)}".rstrip()
