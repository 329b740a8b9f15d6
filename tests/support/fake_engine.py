"""An engine that emits a scripted run; as a script, fatui's command line on top of it."""

import asyncio
import os
import sys
from collections.abc import Callable

from attention.core import events as on
from attention.core.errors import Remedy
from attention.core.plan import Plan
from attention.engine.record import Record
from tests.support.sample_runs import events_of

ENDINGS = {
    "failed": on.RowEnded(case=0, implementation="poc", status="failed", reason="killed by signal 9 (SIGKILL)"),
    "refused": on.RowEnded(case=0, implementation="poc", status="refused", reason="needs 41 GiB of 22"),
    "inaccurate": on.AccuracyChecked(
        case=0, implementation="poc", max_error=0.03, rms_error=0.01, accurate=False, detail="output: 3e-2 of 1e-3"
    ),
    "no backend": on.RunRefused(kind="no backend", reason="MLX has no backend here", remedy=Remedy.INSTALL_BACKEND),
}


class FakeEngine:
    """An engine that emits events_of(); FAKE_ENDING adds an event, FAKE_HOLD is a case in whose rounds it waits for
    being stopped, which it heeds there only."""

    def __init__(
        self, plan: Plan, listener: Callable[[on.AnyEvent], None] = lambda event: None, *, remote: None = None
    ) -> None:
        self.record, self.stopped, self._listener = Record(plan), False, listener

    async def run(self) -> None:
        ending, hold = ENDINGS.get(os.environ.get("FAKE_ENDING", "")), os.environ.get("FAKE_HOLD")
        if isinstance(ending, on.RunRefused):
            self._tell(ending)
            return
        for event in events_of(self.record.plan):
            if isinstance(event, on.RunDone) and ending:
                self._tell(ending)
            self._tell(event)
            await asyncio.sleep(0)
            held = isinstance(event, on.RoundsDone) and str(event.case) == hold
            while held and not self.stopped:
                await asyncio.sleep(0.01)
            if self.stopped and (held or hold is None):
                return

    def stop(self) -> None:
        self.stopped = True

    def _tell(self, event: on.AnyEvent) -> None:
        self.record.apply(event)
        self._listener(event)


if __name__ == "__main__":
    from fatui.cli import run as cli_run
    from fatui.cli.main import main

    cli_run.Engine = FakeEngine  # type: ignore[assignment,misc]
    sys.exit(main())
