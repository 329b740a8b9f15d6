"""What a plan costs: one timed call of each implementation, on its costliest case or on a smaller one like it."""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import structs

from attention import implementations
from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.workload import Workload
from attention.engine.progress import Progress
from attention.implementations.calls import make_inputs, runner_for
from attention.implementations.protocol import TunesItself
from attention.measure.device import probe
from attention.measure.rounds import take_sample

FIRST_FLOPS: Final = 2e8
"""FLOPs of the first, smaller call: a few milliseconds of the slowest implementation here."""
MAX_CALL_S: Final = 0.5
"""A call that is expected to take longer is not made; the smaller one stands for it."""
MIN_LENGTH: Final = 64
"""Lengths are not made smaller than this."""


def time_calls(names: Sequence[str], workload: Workload, seed: int, progress: Progress) -> None:
    """Time a call of each implementation, and emit it; what fails is left out, since the run will report why.

    Args:
        names: implementations that run on the workload and need no compilation.
        workload: the case.
        seed: seed of the inputs.
        progress: takes the events.
    """
    small = smaller(workload, FIRST_FLOPS)
    for name in names:
        progress.mark_running(name)
        try:
            call_s = time_call(name, small, seed)
            timed = small
            if small != workload and (call_s is None or call_s * workload.flops / max(1, small.flops) <= MAX_CALL_S):
                whole_s = time_call(name, workload, seed)
                call_s, timed = (whole_s, workload) if whole_s is not None else (call_s, small)
            if call_s is not None:
                made = on.CallTimed(case=progress.case, implementation=name, flops=timed.flops, seconds=call_s)
                progress.emit(made)
        except Exception as error:
            progress.log(f"{name}: no call could be timed: {error}")
    progress.mark_idle()


def smaller(workload: Workload, flops: float) -> Workload:
    """Return a workload of the same kind with about as many FLOPs at most: fewer batches and heads, then shorter."""
    shared = workload.heads // workload.kv_heads
    made = workload
    for change in ({"batch": 1}, {"heads": shared, "kv_heads": 1}):
        if made.flops > flops:
            made = structs.replace(made, **change)
    while made.flops > flops and min(made.seq, made.kv_seq) >= 2 * MIN_LENGTH:
        share = 2 ** max(1, math.floor(math.log2(made.flops / flops) / 2))
        lengths = {
            "kv_seq": max(MIN_LENGTH, made.kv_seq // share),
            "seq": made.seq if made.pass_ == "decode" else max(MIN_LENGTH, made.seq // share),
        }
        try:
            made = structs.replace(made, **lengths)
        except UsageError:  # a mask that needs the length
            break
    return made


def time_call(name: str, workload: Workload, seed: int, calls: int = 1) -> float | None:
    """Return the seconds of the fastest of some calls after the first, which may compile; None if it tunes itself."""
    implementation = implementations.load_implementation(name)
    if isinstance(implementation, TunesItself) and not implementation.is_tuned(workload, probe()):
        return None
    runner = runner_for(implementation, workload, make_inputs(workload, seed), workload.scale)
    take_sample(runner, 1)
    return min(take_sample(runner, 1) for _ in range(calls))
