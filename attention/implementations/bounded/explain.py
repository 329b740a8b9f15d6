"""Explanations of what `practical` chooses for a workload, and why."""

from collections.abc import Iterator

from msgspec import Struct, structs

from attention.core.route import NO_NEEDS
from attention.core.workload import Workload
from attention.implementations.bounded.blocks import Blocks, ProblemSize, tile_bytes
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.memory import RESIDENT_TILES
from attention.implementations.bounded.policy import (
    GPU_SHARE,
    Strategy,
    problem_size,
    safe_unfused_bytes,
    size_text,
    skipped_share,
    slices_bytes,
    tile_target_bytes,
)
from attention.measure.device import Device


class Explanation(Struct, frozen=True):
    """One choice, its value and its reason."""

    what: str
    value: str
    why: str


def explain(practical: Practical, workload: Workload, device: Device) -> Iterator[Explanation]:
    """Yield the choices for a workload on a device."""
    choice, budget = practical.strategy(workload, device), practical.budget(device)
    yield Explanation("budget", size_text(budget), _why_budget(practical, device))
    if workload.quantized:  # forward only, and MLX's SDPA has no part in it
        yield Explanation("way", choice.forward.value if choice.forward.is_cut else "packed", choice.reason)
        if choice.forward.is_cut:
            yield from _of_parts(choice, workload, device, budget)
        return
    forward, training = (structs.replace(workload, pass_=pass_) for pass_ in ("forward", "training"))
    yield Explanation(
        "unfused",
        size_text(safe_unfused_bytes(forward, device.backend)),
        "what scores and all beside them may take, forward",
    )
    yield Explanation(
        "",
        size_text(safe_unfused_bytes(training, device.backend)),
        "and in training: what is chosen has to hold for both",
    )
    yield Explanation("way", strategy_text(choice), choice.reason)
    if choice.forward.is_cut:
        yield from _of_parts(choice, workload, device, budget)
    elif choice.backward.is_cut:
        yield Explanation("behind", "", "what is cut is the backward pass alone")
        yield from _of_parts(choice, training, device, budget)


def strategy_text(choice: Strategy) -> str:
    """Return the methods of a strategy in words; a backward method is named if it differs and is not MLX's."""
    forward, backward = choice.forward, choice.backward
    return f"{forward.value}, {backward.value} behind" if backward.is_cut and backward is not forward else forward.value


def _of_parts(choice: Strategy, workload: Workload, device: Device, budget: int) -> Iterator[Explanation]:
    is_training = workload.pass_ == "training"
    slices = choice.backward_slices if is_training else choice.slices
    if slices is not None:
        yield from _of_slices(slices, choice, workload, device)
    else:
        yield from _of_tiles(choice.backward_blocks if is_training else choice.blocks, workload, device, budget)


def _of_slices(slices: Blocks, choice: Strategy, workload: Workload, device: Device) -> Iterator[Explanation]:
    size = slices_bytes(workload, slices, device.backend, NO_NEEDS)
    how = "they wait for each other" if choice.waits else "none need wait: all of them fit"
    yield Explanation("slice", size_text(size), f"what as many take as are in memory at once; {how}")
    yield from _of_lengths(slices, workload)
    yield Explanation("keys", "all", "that its rows see")
    yield _skipped(slices, workload)


def _of_tiles(blocks: Blocks, workload: Workload, device: Device, budget: int) -> Iterator[Explanation]:
    shape, limit = problem_size(workload, device.backend), tile_target_bytes(device.backend)
    size = tile_bytes(shape, blocks)
    if RESIDENT_TILES[device.backend] * size > budget:
        room = "more than the budget: tiles within it would be too many for a graph"
    elif limit is None:
        room = "as large as the budget lets it be"
    elif size > limit:
        room = f"one key head's; more than {size_text(limit)} would gain nothing, for the caches' sake"
    else:
        room = f"takes in more heads and rows up to {size_text(limit)}, for the caches' sake"
    yield Explanation("tile", size_text(size), room)
    yield from _of_lengths(blocks, workload)
    yield Explanation("keys", f"{blocks.keys:,}", f"of {workload.kv_seq:,}: {_why_keys(shape, blocks, workload)}")
    yield _skipped(blocks, workload)


def _of_lengths(blocks: Blocks, workload: Workload) -> Iterator[Explanation]:
    heads = f"{blocks.batches} x {blocks.kv_heads * (workload.heads // workload.kv_heads)}"
    sequences = "1 sequence" if workload.batch == 1 else f"{workload.batch} sequences"
    yield Explanation("heads", heads, f"of {sequences} x {workload.heads} query heads")
    yield Explanation("rows", f"{blocks.rows:,}", f"of {workload.seq:,}")


def _skipped(blocks: Blocks, workload: Workload) -> Explanation:
    share = skipped_share(workload, blocks)
    return Explanation(
        "skipped", f"{share:.0%}", "of the scores: what the mask rules out for a whole tile is never computed"
    )


def _why_budget(practical: Practical, device: Device) -> str:
    if practical.budget_bytes:
        return "as given; above inputs and outputs"
    where = "the default on a CPU" if device.backend == "cpu" else f"1/{GPU_SHARE} of the GPU's memory"
    return f"{where}; above inputs and outputs"


def _why_keys(shape: ProblemSize, blocks: Blocks, workload: Workload) -> str:
    if workload.structured:
        return "smaller tiles skip more, larger ones are fewer"
    if blocks.keys >= shape.kv_seq:
        return "no row needs a second look"
    if not shape.training:
        return "more does not fit"
    return "dQ is summed on the way" if blocks.sums_queries else "dQ takes a second pass over the tiles"
