"""Launch parameters of the Hopper forward and split-K kernels, and kernel launches through MLX."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention.core.bounded_dict import BoundedDict
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.call import LOG2_E, CallParams, CallShape, float_bits
from attention.kernels.cuda.runtime.program import Program, machine_code
from attention.masks import Pattern


@dataclass(frozen=True)
class Launch:
    """Everything of a launch except the input arrays, computed once per shape."""

    constants: tuple[mx.array, ...]
    """Constant inputs, appended to the caller's."""
    keywords: dict[str, Any]

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        """Queue the kernel and return its outputs."""
        made: list[mx.array] = mx.fast.precompiled_cuda_kernel(inputs=[*inputs, *self.constants], **self.keywords)
        return made


def prepare(
    program: Program,
    blocks: int,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    scalars: list[int],
    constants: tuple[mx.array, ...] = (),
) -> Launch:
    """Return a launch of `blocks` blocks with outputs of these shapes and dtypes; compiles the program if needed."""
    return Launch(
        constants,
        {
            "name": program.entry,
            "compiled_source": machine_code(program),
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
            "scalars": scalars,
            "grid": (blocks * program.threads, 1, 1),
            "threadgroup": (program.threads, 1, 1),
            "shared_memory": program.shared_memory,
            "ensure_row_contiguous": True,
        },
    )


def scalars_of(call: CallParams) -> tuple[int, ...]:
    """Return the score factor and `into_cap` of the kernels' Problem and, with ALiBi, the factor of Slopes, as bits.

    With a softcap, it replaces the scale. The score factor includes log2(e), so that scores are exponents of 2, unless
    a mask is added to the product. Slopes are in the units of what the score factor multiplies.
    """
    units = 1.0 if call.adds_mask else LOG2_E
    scale, into_cap = call.scale, 0
    if call.softcap is not None:
        scale, into_cap = call.softcap, float_bits(call.scale / call.softcap)
    of_slopes = (float_bits(1.0 if call.adds_mask else 1 / scale),) if call.alibi else ()
    return float_bits(scale * units), into_cap, *of_slopes


def extra_inputs(call: CallParams) -> tuple[str, ...]:
    """Return the names of a call's inputs besides q, k and v."""
    return ("mask",) * (call.mask is not None) + ("slopes",) * call.alibi


def exponent_factor(call: CallParams) -> int:
    """Return the factor that turns a row maximum into an exponent of 2, as bits."""
    return float_bits(LOG2_E) if call.adds_mask else scalars_of(call)[0]


def dtype_of(shape: CallShape) -> mx.Dtype:
    """Return the MLX dtype of the inputs."""
    return mx.bfloat16 if shape.element == "bf16" else mx.float16


def list_planes(shape: CallShape, batches: int, heads: int) -> NDArray[np.int64]:
    """Return the plane of the lists for each plane of queries; lists have 1 or all batches and heads."""
    batch, head = np.divmod(np.arange(shape.batch * shape.heads), shape.heads)
    return np.asarray(batch * heads * (batches > 1) + head * (heads > 1))


def on_device(*tables: object) -> tuple[mx.array, ...]:
    """Return int32 tables in device memory; arrays built from Python lists are in managed memory."""
    copies = tuple(mx.array(_as_int32(table), dtype=mx.int32) + 0 for table in tables)
    mx.eval(copies)
    return copies


def _as_int32(table: object) -> Any:
    if not isinstance(table, np.ndarray):
        return table
    return table.view(np.int32) if table.size else np.zeros((1, *table.shape[1:]), np.int32)  # never a null pointer


POINTER, MAP, STRIDE, NUMBER, SERIAL, NOTHING, PASSED, SCRATCH, LENGTH = range(9)
"""Argument kinds, numbered as in launcher.cpp."""

PlanKind = Literal["forward", "fp8", "own gradient", "general gradient", "packed"]
"""Computation of a plan; "packed" is a forward pass with quantized keys and values."""
Run = Callable[..., list[mx.array]]
"""A prepared operation, called with arrays or with one list of them."""


@dataclass(frozen=True)
class TensorBox:
    """TMA box of an array (batch, heads, rows, columns): the rows and columns of one head per copy."""

    rows: int
    columns: int = 64
    swizzle: int = 128
    """Swizzle mode in bytes, or 0 for none."""


@dataclass(frozen=True)
class Stage:
    """A launch, the arrays it reads and writes, and how they are passed to the kernel.

    The kernel parameters are, in order: arrays read, constants of the launch, arrays written, scalars of the launch,
    strides (batch, head, row; 64 bits, in elements) of each `strided` array, strides of masks, the serial number, and
    the numbers that each call passes.
    """

    launch: Launch
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: frozenset[str] = frozenset()
    """Arrays of `reads` that are updated in place."""
    after: tuple[str, ...] = ()
    """Arrays that the kernel does not take, but which are computed before it: it overwrites what that read."""
    maps: Mapping[str, TensorBox] = field(default_factory=dict)
    """Arrays passed as a tensor map (`const __grid_constant__`, 128 bytes) instead of an address."""
    strided: tuple[str, ...] = ()
    """Arrays passed with their strides. Mapped and strided arrays are not made contiguous."""
    alignments: Mapping[str, int] = field(default_factory=dict)
    """Bytes to which the rows of a strided array are aligned, if fewer than 16."""
    masks: tuple[str, ...] = ()
    """Arrays of any layout, passed with the strides of all four axes, after those of `strided`."""
    omitted: frozenset[str] = frozenset()
    """Arrays that do not exist or are not requested; passed as null pointers."""
    serial: bool = False
    """Whether the kernel takes a 64-bit serial number, unique per launch."""
    lengths: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    """Scalars, by their index, that are the length of an array along an axis, whatever it is in a call of the plan."""
    passed: tuple[int, ...] = ()
    """Which of the numbers that a call of the plan passes the kernel takes."""
    first: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Batch entry and head at which an array begins for the kernel, of slopes the head, if not at the first ones."""
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of arrays of which the launch writes a part."""
    scratch: frozenset[str] = frozenset()
    """Arrays of `writes` whose contents no other launch reads: memory of the launcher, not arrays of a call."""

    @functools.cached_property
    def outputs(self) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and dtype of the arrays that the launch creates, by name."""
        keywords = self.launch.keywords
        described = zip(self.writes, keywords["output_shapes"], keywords["output_dtypes"], strict=True)
        return {
            name: (self.whole.get(name, shape), dtype) for name, shape, dtype in described if name not in self.omitted
        }


def make_plan(
    inputs: Sequence[str], outputs: Sequence[str], stages: Sequence[Stage], label: str = "", untraced: Run | None = None
) -> Run:
    """Return a primitive that runs the launches in sequence.

    Args:
        inputs: names of the input arrays.
        outputs: names of the requested outputs; they are returned first, followed by the other arrays written.
        stages: the launches.
        label: result of `plan_label`, or empty if the plan is never transformed.
        untraced: plan used instead outside MLX's transformations, where no gradient can be requested.

    Raises:
        KernelUnavailable: the launcher cannot be compiled here.
    """
    described = {name: made for stage in stages for name, made in stage.outputs.items() if name not in stage.scratch}
    made = [*outputs, *(name for name in described if name not in outputs)]
    constants = [array for stage in stages for array in stage.launch.constants]
    first_output = len(inputs) + len(constants)
    place = {name: i for i, name in enumerate(inputs)} | {name: first_output + i for i, name in enumerate(made)}
    steps, constant = [], len(inputs)
    for stage in stages:
        steps.append(_step(stage, place, constant))
        constant += len(stage.launch.constants)
    shapes = [list(described[name][0]) for name in made]
    types = [described[name][1] for name in made]
    planned = launcher.module().make_plan(steps, len(inputs), shapes, types, constants, label, untraced)
    return cast("Run", planned)


def plan_label(
    kind: PlanKind, shape: CallShape, call: CallParams, with_logsumexp: bool, formats: Sequence[str] = ()
) -> str:
    """Encode what the transformations of a plan need to rebuild it for another batch size, or to differentiate it.

    `formats` are those of quantized keys and values.
    """
    fields = {**vars(call), "pattern": None if call.pattern is None else _keep(call.pattern)}
    return json.dumps([kind, vars(shape), fields, with_logsumexp, list(formats)])


_MAX_PATTERNS: Final = 256
_patterns: BoundedDict[int, Pattern] = BoundedDict(_MAX_PATTERNS)
"""Patterns of the latest labels, by number."""


def _keep(pattern: Pattern) -> int:
    """Return the number of a pattern for a label."""
    number = next((n for n, known in _patterns.items() if known == pattern), None)
    if number is None:
        number = max(_patterns, default=0) + 1
        _patterns[number] = pattern
    return number


def parse_label(label: str) -> tuple[PlanKind, CallShape, CallParams, bool]:
    """Decode the arguments of `plan_label`."""
    kind, shape, call, with_logsumexp, _ = json.loads(label)
    if call["pattern"] is not None:
        if call["pattern"] not in _patterns:
            raise ValueError(f"[flash_attention] A gradient comes after {_MAX_PATTERNS} calls with other patterns.")
        call["pattern"] = _patterns[call["pattern"]]
    return kind, CallShape(**shape), CallParams(**call), with_logsumexp


def formats_of(label: str) -> list[str]:
    """Decode the formats of quantized keys and values from a label."""
    return list(json.loads(label)[4])


def _step(stage: Stage, place: Mapping[str, int], constant: int) -> tuple[object, ...]:
    """Return a launch in the format of launcher.cpp; `constant` is the index of its first constant."""
    keywords = stage.launch.keywords
    taken = [_argument(stage, name, place) for name in stage.reads]
    taken += [[POINTER, constant + i] for i in range(len(stage.launch.constants))]
    taken += [_argument(stage, name, place) for name in stage.writes]
    for i, number in enumerate(keywords["scalars"]):
        name, axis = stage.lengths.get(i, (None, 0))
        taken.append([NUMBER, number] if name is None else [LENGTH, place[name], axis])
    for name in stage.strided:
        alignment = [stage.alignments[name]] if name in stage.alignments else []
        strides = ([STRIDE, place[name], axis, *alignment] for axis in range(3) if name not in stage.omitted)
        taken += list(strides) or [[NUMBER, 0]] * 3
    taken += [[STRIDE, place[name], axis] for name in stage.masks for axis in range(4)]
    if stage.serial:
        taken.append([SERIAL])
    taken += [[PASSED, number] for number in stage.passed]
    reads = [place[name] for name in (*stage.reads, *stage.after) if name not in stage.updates | stage.omitted]
    writes = [place[name] for name in (*stage.updates, *stage.outputs) if name not in stage.scratch]
    threads = keywords["threadgroup"][0]
    blocks = keywords["grid"][0] // threads
    code, shared = keywords["compiled_source"], keywords["shared_memory"]
    return keywords["name"], code, blocks, threads, shared, reads, writes, taken


def _argument(stage: Stage, name: str, place: Mapping[str, int]) -> list[int]:
    """Return the argument descriptor of an array of a stage."""
    if name in stage.omitted:
        return [NOTHING]
    if name in stage.scratch:
        size, dtype = stage.outputs[name]
        return [SCRATCH, math.prod(size) * dtype.size]
    first = stage.first.get(name, ())
    if name not in stage.maps:
        return [POINTER, place[name], *first]
    box = stage.maps[name]
    return [MAP, place[name], box.rows, box.columns, box.swizzle, *first]


INPUTS: Final = ("q", "k", "v")
OUTPUTS: Final = ("output", "logsumexp", "stats")
"""`stats` (batch, heads, queries, 2) is input of the backward pass: row maximum, and log2 of the row sum."""


def run_of(inputs: Sequence[str], outputs: Sequence[str], stages: Sequence[Stage], label: str = "") -> Run:
    """Return an operation that runs the launches in sequence; not differentiable without a label.

    Args:
        inputs: names of the input arrays.
        outputs: names of the arrays returned first; others may follow.
        stages: the launches.
        label: label of the plan, see `plan_label`.
    """
    if launcher.unavailable_reason() is None:
        return make_plan(inputs, outputs, stages, label)

    def one_by_one(arrays: list[mx.array]) -> list[mx.array]:
        known = dict(zip(inputs, arrays, strict=True))
        for stage in stages:
            known |= zip(stage.writes, stage.launch(*(known[name] for name in stage.reads)), strict=True)
        return [known[name] for name in outputs]

    return one_by_one
