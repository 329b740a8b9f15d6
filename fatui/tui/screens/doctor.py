"""The doctor screen: what is installed and what is missing, diagnosed in a separate process."""

import asyncio
import contextlib
import sys
import textwrap
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from fatui.diagnosis import DiagnosisItem
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.screens.base import AppScreen
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.untrusted_text import MAX_SHOWN, escape_all

if TYPE_CHECKING:
    from fatui.remote import Remote

TOPIC_WIDTH: Final = 16
LINE_LIMIT: Final = 2**20
LOOKING: Final = "Checking; the last lines take a second or two, because they are measured."


class Doctor(AppScreen, Screen[None]):
    """Screen of the doctor's findings, shown as they come in."""

    CSS_PATH: ClassVar = ["list.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.DOCTOR), actions.closing("doctor")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._findings: list[DiagnosisItem] = []

    def compose(self) -> ComposeResult:
        """Yield the findings."""
        yield StatusLine()
        with VerticalScroll(classes="pane half") as pane:
            pane.border_title = "Doctor"
            yield Static(LOOKING, id="findings", markup=False)
        yield KeyBar(keys=actions.bar(actions.DOCTOR, self.app.keys))

    def on_mount(self) -> None:
        """Start the diagnosis."""
        self.action_again()

    def action_again(self) -> None:
        """Repeat the diagnosis."""
        self._findings.clear()
        self.run_worker(self._look(), exclusive=True, exit_on_error=False)

    async def _look(self) -> None:
        status = self.query_one(StatusLine)
        status.show(self._title, "looking …")
        if self.app.remote is not None:
            await self._look_there(self.app.remote)
            return
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fatui.tui.advisor", "diagnose"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=LINE_LIMIT,
        )
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                self._findings.append(msgspec.json.decode(line, type=DiagnosisItem))
                self._show()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
        self._conclude(f"it ended early with code {code}" if code not in (0, -9) else "")

    async def _look_there(self, remote: "Remote") -> None:
        """Diagnose another machine."""
        from fatui.remote import RemoteError, RemoteWorker

        def take(line: bytes) -> None:
            self._findings.append(escape_all(msgspec.json.decode(line, type=DiagnosisItem), MAX_SHOWN))
            self._show()

        try:
            worker = await RemoteWorker.start_service(remote, "diagnose")
            try:
                await worker.converse(take)
            finally:
                await worker.end()
        except (RemoteError, msgspec.DecodeError) as error:
            self._conclude(str(error))
            return
        self._conclude(worker.failure() if worker.process.returncode else "")

    @property
    def _title(self) -> str:
        return f"Doctor of {self.app.remote.name}" if self.app.remote else "Doctor"

    def _conclude(self, ended: str) -> None:
        """Say how many findings need something done, and why there are no more."""
        advised = sum(finding.advice is not None for finding in self._findings)
        words = [f"{advised} to look at" if advised else "all well" if self._findings or not ended else "", ended]
        self.query_one(StatusLine).show(self._title, "; ".join(filter(None, words)), alarm=bool(ended))

    def _show(self) -> None:
        lines: list[str] = []
        topic = ""
        for finding in self._findings:
            name = finding.topic if finding.topic != topic else ""
            topic = finding.topic
            mark = "!" if finding.advice else "✓"
            lines += self._hanging(f"{mark} {name:<{TOPIC_WIDTH}} ", finding.text)
            if finding.advice:
                lines += self._hanging(" " * (TOPIC_WIDTH + 3), f"→ {finding.advice}")
        self.query_one("#findings", Static).update("\n".join(lines))

    def _hanging(self, head: str, text: str) -> list[str]:
        width = max(40, self.query_one("#findings").size.width)
        return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head)) or [head]

    def on_resize(self) -> None:
        """Wrap the findings to the new width."""
        if self._findings:
            self.call_after_refresh(self._show)

    def action_back(self) -> None:
        """Close the screen."""
        self.dismiss()
