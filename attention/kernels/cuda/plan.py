"""Several launches as one MLX primitive (launcher.cpp), their arrays told apart by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

import mlx.core as mx

from attention.kernels.cuda import launcher
from attention.kernels.cuda.launch import Launch

READ, WRITE, UPDATE, NUMBER = range(4)

Run = Callable[[list[mx.array]], list[mx.array]]


@dataclass(frozen=True)
class Stage:
    """A launch, the arrays it reads and writes, and those of the first that it changes in place."""

    launch: Launch
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: frozenset[str] = frozenset()


def make_plan(inputs: Sequence[str], outputs: Sequence[str], stages: Sequence[Stage], label: str = "") -> Run:
    """The launches one after the other.

    Args:
        inputs: names of the arrays it is called with.
        outputs: names of those that are wanted; it returns them first, and after them what else the stages write.
        stages: the launches.
        label: what the gradient's function is told; empty if there is no gradient.

    Raises:
        KernelUnavailable: the launcher cannot be compiled here.
    """
    described = {name: kind for stage in stages for name, kind in zip(stage.writes, _written(stage), strict=True)}
    made = [*outputs, *(name for name in described if name not in outputs)]
    constants = [array for stage in stages for array in stage.launch.constants]
    first_output = len(inputs) + len(constants)
    place = {name: i for i, name in enumerate(inputs)} | {name: first_output + i for i, name in enumerate(made)}
    steps, constant = [], len(inputs)
    for stage in stages:
        own = range(constant, constant + len(stage.launch.constants))
        constant += len(own)
        arguments = [(UPDATE if name in stage.updates else READ, place[name]) for name in stage.reads]
        arguments += [(READ, i) for i in own] + [(WRITE, place[name]) for name in stage.writes]
        keywords = stage.launch.keywords
        arguments += [(NUMBER, number) for number in keywords["scalars"]]
        threads = keywords["threadgroup"][0]
        blocks = keywords["grid"][0] // threads
        code = keywords["compiled_source"]
        steps.append((keywords["name"], code, blocks, threads, keywords["shared_memory"], arguments))
    shapes = [list(described[name][0]) for name in made]
    types = [described[name][1] for name in made]
    return cast("Run", launcher.module().make_plan(steps, shapes, types, constants, label))


def _written(stage: Stage) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    keywords = stage.launch.keywords
    return list(zip(keywords["output_shapes"], keywords["output_dtypes"], strict=True))


INPUTS: Final = ("q", "k", "v")
OUTPUTS: Final = ("output", "logsumexp")
