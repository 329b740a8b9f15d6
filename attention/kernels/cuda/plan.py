"""Several launches as one MLX primitive (launcher.cpp), their arrays told apart by name."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, cast

import mlx.core as mx

from attention.kernels.cuda import launcher
from attention.kernels.cuda.call import Call, Shape
from attention.kernels.cuda.launch import Launch

POINTER, MAP, STRIDE, NUMBER, SERIAL, NOTHING = range(6)
"""Kinds of arguments, as launcher.cpp numbers them."""

PlanKind = Literal["forward", "own gradient", "general gradient"]
"""What a plan computes."""
Run = Callable[..., list[mx.array]]
"""What is called with arrays, or with one list of them."""


@dataclass(frozen=True)
class Box:
    """What the copy engine moves at once of an array (batch, heads, rows, columns): so much of one head."""

    rows: int
    columns: int = 64
    swizzle: int = 128
    """Bytes, or 0 for none."""


@dataclass(frozen=True)
class Stage:
    """A launch, the arrays it reads and writes, and how its kernel takes them.

    The kernel's parameters are what is read, the launch's constants, what is written, the launch's scalars, the strides
    (batch, head, row; 64 bits, in elements) of each `strided` name, and the serial number.
    """

    launch: Launch
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: frozenset[str] = frozenset()
    """Those of `reads` that it changes in place."""
    maps: Mapping[str, Box] = field(default_factory=dict)
    """Arrays that it takes as a tensor map (`const __grid_constant__`, 128 bytes) instead of an address."""
    strided: tuple[str, ...] = ()
    """Arrays whose strides it takes as numbers. Mapped and strided arrays are not copied to be dense."""
    masks: tuple[str, ...] = ()
    """Arrays that it takes however they lie, and their strides on all four axes, after those of the strided."""
    omitted: frozenset[str] = frozenset()
    """Names that are not there or not wanted: it gets null pointers."""
    serial: bool = False
    """Whether it takes a 64-bit number that no two launches share."""

    @property
    def written(self) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and type of the arrays that it makes."""
        keywords = self.launch.keywords
        described = zip(self.writes, keywords["output_shapes"], keywords["output_dtypes"], strict=True)
        return {name: (shape, dtype) for name, shape, dtype in described if name not in self.omitted}


def make_plan(
    inputs: Sequence[str], outputs: Sequence[str], stages: Sequence[Stage], label: str = "", untraced: Run | None = None
) -> Run:
    """The launches one after the other.

    Args:
        inputs: names of the arrays it is called with.
        outputs: names of those that are wanted; it returns them first, and after them what else the stages write.
        stages: the launches.
        label: of `plan_label`; empty if nothing ever transforms it.
        untraced: a plan that takes its place where no transformation of MLX's is at work, so that no gradient can be
            asked for.

    Raises:
        KernelUnavailable: the launcher cannot be compiled here.
    """
    described = {name: made for stage in stages for name, made in stage.written.items()}
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


def plan_label(kind: PlanKind, shape: Shape, call: Call, with_logsumexp: bool) -> str:
    """What the transformations of a plan are found by: enough to make the plan for another batch, or its gradient."""
    return json.dumps([kind, asdict(shape), asdict(call), with_logsumexp])


def read_label(label: str) -> tuple[PlanKind, Shape, Call, bool]:
    """The arguments of `plan_label`."""
    kind, shape, call, with_logsumexp = json.loads(label)
    return kind, Shape(**shape), Call(**call), with_logsumexp


def _step(stage: Stage, place: Mapping[str, int], constant: int) -> tuple[object, ...]:
    """A launch as launcher.cpp wants it; `constant` is the place of its first constant."""
    keywords = stage.launch.keywords
    taken = [_argument(stage, name, place) for name in stage.reads]
    taken += [[POINTER, constant + i] for i in range(len(stage.launch.constants))]
    taken += [_argument(stage, name, place) for name in stage.writes]
    taken += [[NUMBER, number] for number in keywords["scalars"]]
    taken += [[STRIDE, place[name], axis] for name in stage.strided for axis in range(3)]
    taken += [[STRIDE, place[name], axis] for name in stage.masks for axis in range(4)]
    if stage.serial:
        taken.append([SERIAL])
    reads = [place[name] for name in stage.reads if name not in stage.updates | stage.omitted]
    writes = [place[name] for name in (*stage.updates, *stage.written)]
    threads = keywords["threadgroup"][0]
    blocks = keywords["grid"][0] // threads
    code, shared = keywords["compiled_source"], keywords["shared_memory"]
    return keywords["name"], code, blocks, threads, shared, reads, writes, taken


def _argument(stage: Stage, name: str, place: Mapping[str, int]) -> list[int]:
    """How a kernel takes an array."""
    if name in stage.omitted:
        return [NOTHING]
    if name not in stage.maps:
        return [POINTER, place[name]]
    box = stage.maps[name]
    return [MAP, place[name], box.rows, box.columns, box.swizzle]


INPUTS: Final = ("q", "k", "v")
OUTPUTS: Final = ("output", "logsumexp", "stats")
"""Stats, (batch, heads, queries, 2), are what the gradient takes: each row's maximum, and log2 of its sum."""
