"""Runs a plan headless, and stops within a second when it is told to."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from attention.plan import AnyPlan
from attention.record import AnyRecord
from fatui.commands.progress import Narrator
from fatui.engine import Engine

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def execute(plan: AnyPlan) -> tuple[AnyRecord, bool]:
    """Runs a plan to its end or until a signal stops it.

    Returns:
        What was measured, and whether it was interrupted.
    """
    with Narrator(plan) as narrator:
        engine = Engine(plan, narrator.listen)
        asyncio.run(_run(engine))
    return engine.record, engine.stopped


async def _run(engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, engine.stop)
    await engine.run()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Lets no signal break in, for the moment that writing the results takes."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
