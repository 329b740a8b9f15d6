"""One launch: arrays in, arrays and counts out, or a Finding with all errors."""

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from tests.support.metal.verifier.building import build, kernel_line, runtime
from tests.support.metal.verifier.source import generated_text

MAX_BUFFERS: Final = 31
FINDINGS_BYTES: Final = 1 << 16
LINES: Final = re.compile(r"\blines? (\d+)(?: and (\d+))?")


class Finding(AssertionError):
    """The errors found: for each a kind, a description, the kernel's line, and the thread."""

    def __init__(self, *items: str) -> None:
        super().__init__("\n".join(items))
        self.items = items


class Buffer(NamedTuple):
    """Memory of one parameter."""

    data: np.ndarray[Any, Any]
    is_output: bool = False
    is_initialised: bool = True


class Counts(NamedTuple):
    """The counts of one launch."""

    reads: dict[str, int]
    """Elements, per buffer."""
    writes: dict[str, int]
    products: int
    """Products of two 8 x 8 matrices, per simdgroup."""
    barriers: int
    """Barriers of a threadgroup, counted for each threadgroup that passed one."""
    threadgroup_bytes: int
    """Bytes of threadgroup memory of the kernel's arrays."""


class Launched(NamedTuple):
    """The result of one launch."""

    outputs: list[mx.array]
    text: str
    counts: Counts


class _Buffer(ctypes.Structure):
    """The struct BufferOfLaunch in runtime/launch.cpp."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element_bytes", ctypes.c_uint64),
        ("is_output", ctypes.c_uint32),
        ("is_initialised", ctypes.c_uint32),
        ("reads", ctypes.c_uint64),
        ("writes", ctypes.c_uint64),
    )


class _Launch(ctypes.Structure):
    """The struct Launch in runtime/launch.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("is_reversed", ctypes.c_uint32),
        ("is_misaligned", ctypes.c_uint32),
        ("findings", ctypes.c_char_p),
        ("findings_bytes", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("products", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
    )


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
    is_reversed: bool = False,
    is_misaligned: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Launched:
    """Run a kernel made by mx.fast.metal_kernel, as MLX would launch it.

    Args:
        kernel: an object made by mx.fast.metal_kernel.
        names, inputs: the inputs, with any strides.
        output_names, output_shapes, output_dtypes, grid, threadgroup, template, init_value: as accepted by MLX.
        is_reversed: the schedule: threads in order, or in reverse order.
        is_misaligned: whether each buffer starts one element past a page.
        edit: edits the generated source before compilation.

    Raises:
        Finding: with all errors found.
        CompileError: the source does not compile.
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
    counts = launch(library, used, grid, threadgroup, is_reversed=is_reversed, is_misaligned=is_misaligned, text=text)
    made = zip(results.values(), output_dtypes, strict=True)
    outputs = [mx.array(held.data).view(dtype) if dtype == mx.bfloat16 else mx.array(held.data) for held, dtype in made]
    return Launched(outputs, text, counts)


def _results(
    names: Sequence[str], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype], init_value: float | None
) -> dict[str, Buffer]:
    """Allocate the outputs; their contents before the launch are undefined unless a value is given."""
    made = {}
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        value = mx.zeros(shape, dtype) if init_value is None else mx.full(shape, init_value, dtype=dtype)
        bits = np.array(value.view(mx.uint16) if dtype == mx.bfloat16 else value)
        made[name] = Buffer(bits, is_output=True, is_initialised=init_value is not None)
    return made


def _inputs(names: Sequence[str], arrays: Sequence[mx.array]) -> dict[str, Buffer]:
    """Return each input as stored in memory with its real strides, and the arguments that MLX passes with it."""
    made = {}
    for name, array in zip(names, arrays, strict=True):
        mx.eval(array)
        held = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
        strides = [stride // held.itemsize for stride in held.strides]
        span = 1 + sum((size - 1) * stride for size, stride in zip(held.shape, strides, strict=True))
        flat = np.lib.stride_tricks.as_strided(held, (span,), (held.itemsize,)).copy()
        made[name] = Buffer(flat)
        made[f"{name}_shape"] = Buffer(np.array(held.shape, np.int32))
        made[f"{name}_ndim"] = Buffer(np.array([held.ndim], np.int32))
        made[f"{name}_strides"] = Buffer(np.array(strides, np.int64))
    return made


def launch(
    library: Path,
    buffers: Mapping[str, Buffer],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    *,
    is_reversed: bool = False,
    is_misaligned: bool = False,
    text: str = "",
) -> Counts:
    """Run a kernel's library; its results are in the buffers afterwards.

    Args:
        library: the kernel's library.
        buffers: in the order of its parameters.
        grid, threadgroup: numbers of threads.
        is_reversed, is_misaligned: as in `verify`.
        text: the kernel's source, for the lines in findings.

    Raises:
        Finding: with all errors found.
    """
    if len(buffers) > MAX_BUFFERS:
        raise Finding(f"limit: {len(buffers)} buffers, Metal takes {MAX_BUFFERS}")
    places, findings = _described(buffers), ctypes.create_string_buffer(FINDINGS_BYTES)
    whole = _Launch(
        kernel=ctypes.cast(ctypes.PyDLL(str(library)).entry, ctypes.c_void_p).value,
        buffers=places,
        buffer_count=len(buffers),
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*threadgroup),
        is_reversed=is_reversed,
        is_misaligned=is_misaligned,
        findings=ctypes.cast(findings, ctypes.c_char_p),
        findings_bytes=FINDINGS_BYTES,
    )
    # PyDLL, unlike CDLL, lets no other thread of Python in: there is one emulated GPU.
    if ctypes.PyDLL(str(runtime())).run_launch(ctypes.byref(whole)):
        lines = text.splitlines()
        raise Finding(*(_item(item, library, lines) for item in findings.value.decode().splitlines()))
    reads = {name: place.reads for name, place in zip(buffers, places, strict=True)}
    writes = {name: place.writes for name, place in zip(buffers, places, strict=True)}
    return Counts(reads, writes, whole.products, whole.barriers, whole.threadgroup_bytes)


def _described(buffers: Mapping[str, Buffer]) -> "ctypes.Array[_Buffer]":
    """Return the buffers in the runtime's format."""
    places = (_Buffer * len(buffers))()
    for place, (name, held) in zip(places, buffers.items(), strict=True):
        place.name, place.data = name.encode(), held.data.ctypes.data
        place.bytes, place.element_bytes = held.data.nbytes, held.data.itemsize
        place.is_output, place.is_initialised = held.is_output, held.is_initialised
    return places


def _item(item: str, library: Path, lines: Sequence[str]) -> str:
    """Return a finding with the kernel's line: of the access, or of the operations that its text names by number."""
    kind, offset, what, *where = item.split("|")
    number = kernel_line(library, offset) if offset != "0" else None
    at = f" at {_line(number, lines)}" if number else ""
    if kind == "divergence":
        what = LINES.sub(lambda found: " and ".join(_line(int(each), lines) for each in found.groups() if each), what)
    return f"{kind}: {what}{at} {' '.join(where)}".rstrip()


def _line(number: int, lines: Sequence[str]) -> str:
    """Format a line of source: "line 7: `x = 1;`", with its text if there is one."""
    return f"line {number}: `{lines[number - 1].strip()}`" if 0 < number <= len(lines) else f"line {number}"
