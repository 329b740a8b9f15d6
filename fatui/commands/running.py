"""Headless run of a plan; a signal stops it within a second."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Final

from attention.plan import AnyPlan
from attention.record import AnyRecord
from fatui.commands.progress import Narrator
from fatui.engine import Engine

WATCH_S: Final = 1.0
STOPPING: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def execute(plan: AnyPlan) -> tuple[AnyRecord, bool]:
    """Run a plan to its end or until a signal stops it.

    Returns:
        What was measured, and whether it was interrupted.
    """
    with Narrator(plan) as narrator:
        return asyncio.run(_run(plan, narrator))


async def _run(plan: AnyPlan, narrator: Narrator) -> tuple[AnyRecord, bool]:
    engine = Engine(plan, narrator.listen)
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, lambda: engine.kill() if engine.stopped else engine.stop())
    watching = asyncio.create_task(_watch(engine, narrator))
    try:
        await engine.run()
    finally:
        watching.cancel()
    return engine.record, engine.stopped


async def _watch(engine: Engine, narrator: Narrator) -> None:
    """Pass the time and the engine's silence to the narrator, once a second."""
    while True:
        await asyncio.sleep(WATCH_S)
        narrator.tick(engine.silence)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore stop signals while the results are written."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
