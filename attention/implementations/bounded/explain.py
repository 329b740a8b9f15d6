"""What `practical` chose for a workload, and why, for people to read."""

from collections.abc import Iterator

from msgspec import Struct, structs

from attention.core.route import PLAIN
from attention.core.workload import Workload
from attention.implementations.bounded.blocks import Blocks, Shape, tile_bytes
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.memory import AT_ONCE
from attention.implementations.bounded.policy import (
    GPU_SHARE,
    Choice,
    comfort,
    mib,
    shape_of,
    skipped_share,
    slices_bytes,
    surely,
)
from attention.measure.device import Device


class Fact(Struct, frozen=True):
    """One thing that was chosen."""

    what: str
    value: str
    why: str


def facts(practical: Practical, workload: Workload, device: Device) -> Iterator[Fact]:
    """What is chosen for a workload on a device, one thing after the other."""
    choice, budget = practical.choice(workload, device), practical.budget(device)
    yield Fact("budget", mib(budget), _why_budget(practical, device))
    forward, training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
    yield Fact("unfused", mib(surely(forward, device.backend)), "what scores and all beside them may take, forward")
    yield Fact("", mib(surely(training, device.backend)), "and in training: what is chosen has to hold for both")
    yield Fact("way", choice.way, choice.reason)
    if choice.cuts_forward:
        yield from _of_parts(choice, workload, device, budget)
    elif choice.way not in ("fused", "whole"):
        yield Fact("behind", "", "what is cut is the backward pass alone")
        yield from _of_parts(choice, training, device, budget)


def _of_parts(choice: Choice, workload: Workload, device: Device, budget: int) -> Iterator[Fact]:
    is_training = workload.pass_ == "training"
    slices = choice.backward_slices if is_training else choice.slices
    if slices is not None:
        yield from _of_slices(slices, choice, workload, device)
    else:
        yield from _of_tiles(choice.backward if is_training else choice.blocks, workload, device, budget)


def _of_slices(slices: Blocks, choice: Choice, workload: Workload, device: Device) -> Iterator[Fact]:
    size = slices_bytes(workload, slices, device.backend, PLAIN)
    how = "they wait for each other" if choice.waits else "none need wait: all of them fit"
    yield Fact("slice", mib(size), f"what as many take as are in memory at once; {how}")
    yield from _of_lengths(slices, workload)
    yield Fact("keys", "all", "that its rows see")
    yield _skipped(slices, workload)


def _of_tiles(blocks: Blocks, workload: Workload, device: Device, budget: int) -> Iterator[Fact]:
    shape, limit = shape_of(workload), comfort(device.backend)
    size = tile_bytes(shape, blocks)
    if AT_ONCE[device.backend] * size > budget:
        room = "more than the budget: tiles within it would be too many for a graph"
    elif limit is None:
        room = "as large as the budget lets it be"
    elif size > limit:
        room = f"one key head's; more than {mib(limit)} would gain nothing, for the caches' sake"
    else:
        room = f"takes in more heads and rows up to {mib(limit)}, for the caches' sake"
    yield Fact("tile", mib(size), room)
    yield from _of_lengths(blocks, workload)
    yield Fact("keys", f"{blocks.keys:,}", f"of {workload.kv_seq:,}: {_why_keys(shape, blocks)}")
    yield _skipped(blocks, workload)


def _of_lengths(blocks: Blocks, workload: Workload) -> Iterator[Fact]:
    heads = f"{blocks.batches} x {blocks.kv_heads * (workload.heads // workload.kv_heads)}"
    sequences = "1 sequence" if workload.batch == 1 else f"{workload.batch} sequences"
    yield Fact("heads", heads, f"of {sequences} x {workload.heads} query heads")
    yield Fact("rows", f"{blocks.rows:,}", f"of {workload.seq:,}")


def _skipped(blocks: Blocks, workload: Workload) -> Fact:
    share = skipped_share(workload, blocks)
    return Fact("skipped", f"{share:.0%}", "of the scores: what the mask rules out for a whole tile is never computed")


def _why_budget(practical: Practical, device: Device) -> str:
    if practical.budget_bytes:
        return "as given; above inputs and outputs"
    where = "the default on a CPU" if device.backend == "cpu" else f"1/{GPU_SHARE} of the GPU's memory"
    return f"{where}; above inputs and outputs"


def _why_keys(shape: Shape, blocks: Blocks) -> str:
    if blocks.keys >= shape.kv_seq:
        return "no row needs a second look"
    if not shape.training:
        return "more does not fit"
    return "dQ is summed on the way" if blocks.sums_queries else "dQ takes a second pass over the tiles"
