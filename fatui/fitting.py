"""The workload that opens first: as large as gives this machine a trustworthy table within ten seconds.

One call of the reference is timed, in a worker of its own, and the number of sequences and their length follow from it.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from msgspec import Struct, structs

from attention.core import events as on
from attention.core.plan import Plan
from attention.core.workload import Workload

CALL_S: Final = 0.03
"""Desired seconds of a call of the reference: dozens of rounds in some seconds, and not mostly dispatch."""
SECONDS: Final = 3.0
"""Time limit of the rounds of what opens first, as of the preset `quick`."""
LIMIT_S: Final = 8.0
"""Seconds after which a machine counts as too slow to be timed."""
SHAPES: Final = (
    *((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 2048)),
    *((1, 4096), (4, 4096), (16, 4096)),
)
"""Sequences and their length, from small to large; heads and their width stay as they are."""
TIMED: Final = Workload(batch=1, seq=4096)
"""The workload whose call is timed, or one like it with fewer heads and a shorter sequence where it takes too long."""
REFERENCE: Final = "baseline"
SHARE_OF_MEMORY: Final = 0.25
MEMORY: Final = 8 << 30
"""Bytes of memory assumed where they are unknown."""


class Timer(Protocol):
    """An engine as far as it is needed here."""

    async def run(self) -> None:
        """Run the plan."""
        ...

    def kill(self) -> None:
        """Leave no process running."""
        ...


MakeEngine = Callable[[Plan, Callable[[on.AnyEvent], None]], Timer]


class Fit(Struct, frozen=True):
    """A workload, and the seconds that a call of the reference is expected to take."""

    workload: Workload
    call_s: float


def fitting(flops: float, seconds: float, memory: int = 0) -> Fit:
    """Return the largest workload whose call of the reference takes `CALL_S` at most, or the smallest one.

    Args:
        flops: of a timed call.
        seconds: that it took.
        memory: the device's, in bytes; 0 if unknown. Scores take no more than `SHARE_OF_MEMORY` of it.
    """
    sizes = [structs.replace(TIMED, batch=batch, seq=seq, kv_seq=seq) for batch, seq in SHAPES]
    made = [Fit(one, seconds * one.flops / flops) for one in sizes]
    return max(
        (one for one in made if one.call_s <= CALL_S and _scores(one.workload) <= SHARE_OF_MEMORY * (memory or MEMORY)),
        key=lambda one: one.workload.flops,
        default=made[0],
    )


def _scores(workload: Workload) -> int:
    """Return the bytes of a call's scores and of what is computed from them, in float32."""
    return 3 * 4 * workload.batch * workload.heads * workload.seq * workload.kv_seq


async def find(make_engine: MakeEngine) -> Fit | None:
    """Time a call; return the workload that fits, or None if no call could be timed.

    Args:
        make_engine: makes the engine that only times a call of its plan.
    """
    timed: list[on.CallTimed] = []
    memory = 0

    def listen(event: on.AnyEvent) -> None:
        nonlocal memory
        if isinstance(event, on.CallTimed):
            timed.append(event)
        elif isinstance(event, on.RunStarted):
            memory = event.environment.memory_bytes or 0

    engine = make_engine(Plan(cases=(TIMED,), implementations=(REFERENCE,)), listen)
    try:
        async with asyncio.timeout(LIMIT_S):
            await engine.run()
    except TimeoutError:
        pass
    finally:
        engine.kill()
    return fitting(timed[-1].flops, timed[-1].seconds, memory) if timed else None
