"""The terminal app: the draft, the run and the log, which its screens draw."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from msgspec import structs
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.filter import LineFilter
from textual.screen import Screen

from attention.report import Report
from fatui import actions, dialogs, settings
from fatui.advice import Advice
from fatui.ascii import ControlFilter
from fatui.draft import Draft
from fatui.foreign_text import clean
from fatui.hangup import watch_terminal
from fatui.journal import Journal, Level
from fatui.running import Runs, load_preset, remember
from fatui.screens.main import MainScreen
from fatui.session import MakeEngine, Session
from fatui.telemetry import Reading, Telemetry
from fatui.widgets.live_pane import LivePane

if TYPE_CHECKING:
    from fatui.preset_format import Preset

Severity = Literal["information", "warning", "error"]
SEVERITY: dict[Level, Severity] = {"info": "information", "warning": "warning", "error": "error"}

SWITCH_S: Final = 0.0005
"""Python's thread switch interval, short so that threads that compute final rows do not delay repaints."""

MAX_NOTICE: Final = 400
"""Maximum characters of a notification; the log has the whole text."""


class FatuiApp(App[int]):
    """fatui's terminal app.

    Attributes:
        draft: what is set up to run.
        preset: the preset that the draft was made from, or None.
        runs: the current run and its results.
        journal: the log.
        keys: the key of every action, for display.
        farewell: a message printed on stderr when the app has closed.
    """

    TITLE = "fatui"
    CSS_PATH: ClassVar = ["app.tcss", "screens/main.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.ANYWHERE)]
    REPAINT_S: ClassVar = 0.5
    TELEMETRY_S: ClassVar = 2.0

    def __init__(
        self,
        *,
        preset: str | None = None,
        run: bool = False,
        ascii: bool = False,
        make_engine: MakeEngine | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
        advise: bool = True,
    ) -> None:
        super().__init__()
        self.journal = Journal(now)
        self.settings = settings.read_settings(actions.SCOPES, tuple(self.available_themes))
        self.remembered, self._complaint = settings.read_remembered()
        self.draft: Draft = self.remembered.draft
        self.preset: Preset | None = None
        self.runs = Runs(self)
        self.farewell = ""
        self.keys = actions.shown_keys(self.settings.keys)
        self.advice = Advice(self._advised)
        self.clock, self.now = clock, now
        self.make_engine = make_engine
        self._begin_with = preset, run
        self._advise = advise
        self._telemetry: Telemetry | None = None
        self._reading = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._line_filters: list[LineFilter] = []
        self._take_settings(ascii)

    def _take_settings(self, ascii: bool) -> None:
        """Apply the config file, the command line and the remembered state, and log their problems."""
        for problem in [*self.settings.problems, *([self._complaint] if self._complaint else [])]:
            self.journal.write(problem, "warning")
        if ascii or self.settings.ascii:
            from fatui.ascii import AsciiFilter

            self._line_filters.append(AsciiFilter())
        theme = self.settings.theme or self.remembered.theme
        self.theme = theme if theme in self.available_themes else settings.DEFAULT_THEME
        self.set_keymap(self.settings.keys)

    def get_default_screen(self) -> Screen[object]:
        """Return the main screen."""
        return MainScreen()  # type: ignore[return-value]

    def get_line_filters(self) -> list[LineFilter]:
        """Return Textual's filters, the one for control characters, and the one for ASCII if chosen."""
        return [*super().get_line_filters(), ControlFilter(), *self._line_filters]

    @property
    def main(self) -> MainScreen:
        """The main screen, even when another is on top."""
        screen = self.screen_stack[0]
        assert isinstance(screen, MainScreen)
        return screen

    def on_mount(self) -> None:
        """Defer everything slow until after the first paint."""
        self._event_loop = asyncio.get_running_loop()
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        for problem in self.settings.problems:
            self.notify(clean(problem, MAX_NOTICE), severity="warning", timeout=10, markup=False)
        if self._advise:
            self.run_worker(self.advice.run(), name="advice", exit_on_error=False)
            self.set_interval(self.TELEMETRY_S, self._look_at_machine)
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for number in (signal.SIGHUP, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._hang_up, number)
        preset, run = self._begin_with
        if preset is not None:
            run = load_preset(self, preset) and run
        elif self.draft.preset is not None:
            self.follow_preset(self.draft.preset)
        self.ask_advice()
        if run:
            self.runs.start()

    def follow_preset(self, name: str | None) -> None:
        """Reload the preset that the draft was made from, under a name; without effect on a draft without one."""
        from attention.errors import UsageError
        from fatui.presets import load

        self.preset = None
        if name is not None:
            with contextlib.suppress(UsageError):
                self.preset = load(name)
        self.set_draft(structs.replace(self.draft, preset=self.preset and self.preset.name))

    def _hang_up(self, number: int) -> None:
        """End the engine, keep what was measured, and exit: the terminal was closed, or the system sent a signal."""
        self.run_worker(self.leave(128 + number, gone=number == signal.SIGHUP), name="leave")

    def terminal_gone(self) -> None:
        """Shut down in order, from another thread; without effect before the event loop runs."""
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._hang_up, signal.SIGHUP)

    async def leave(self, code: int = 0, *, gone: bool = False) -> None:
        """End an active run, store it, and exit; if the terminal is gone, without restoring it."""
        await self.runs.end()
        remember(self)
        if gone:
            os._exit(code)  # Textual would wait for a terminal that no longer accepts output
        self.exit(code, return_code=code)

    @property
    def session(self) -> Session | None:
        """The current or last run."""
        return self.runs.session

    @property
    def report(self) -> Report | None:
        """The report that export, copy and the other screens use."""
        return self.runs.report

    @property
    def device_name(self) -> str:
        """The device's name, or an empty string until the advisor has reported it."""
        return self.advice.device.name if self.advice.device else ""

    def action_start_run(self) -> None:
        """Run the draft."""
        self.runs.start()

    def action_stop_run(self) -> None:
        """Stop the run."""
        self.runs.stop()

    def action_sweep(self) -> None:
        """Begin or end a sweep."""
        self.set_draft(self.draft.toggle_sweep())

    def action_open(self, name: str) -> None:
        """Open one of the other screens."""
        dialogs.open_screen(self, name)

    def action_save_as(self) -> None:
        """Save the draft as a preset."""
        dialogs.save_as(self)

    def action_export(self) -> None:
        """Export the run to files."""
        dialogs.export(self)

    async def action_copy_table(self) -> None:
        """Copy the table."""
        await dialogs.copy_table(self)

    def action_explain_keys(self) -> None:
        """Open the key help."""
        dialogs.explain_keys(self)

    async def action_leave(self) -> None:
        """Exit; ask first if a run is active."""
        if not self.runs.active:
            await self.leave()
            return
        from fatui.screens.question import Question

        text = "A run is in progress. Stop it, keep its results, and leave?"
        self.push_screen(Question(text, yes="Leave", no="Stay"), self._leave_if)

    def _leave_if(self, yes: bool | None) -> None:
        if yes:
            self.run_worker(self.leave(), name="leave")

    async def action_quit(self) -> None:
        """Exit as q does, also for Textual's own key."""
        await self.action_leave()

    def tell(self, text: str, level: Level = "info") -> None:
        """Write a message to the log, and show it as a notification."""
        self.journal.write(text, level)
        shown = clean(text, MAX_NOTICE)
        self.notify(shown, severity=SEVERITY[level], timeout=6 if level == "info" else 12, markup=False)

    def set_draft(self, draft: Draft) -> None:
        """Set the draft, and request the routes of its workload.

        The draft keeps its preset's name as long as it runs the same, even after changes that were reverted.
        """
        if self.preset is not None and draft.preset == self.preset.name:
            draft = structs.replace(draft, changed=not draft.runs_as(self.preset.plan()))
        self.draft = draft
        self.ask_advice()
        self.main.show_draft()

    def ask_advice(self) -> None:
        """Request the routes for the workload on the sliders, and the memory of all cases."""
        from attention.errors import UsageError
        from fatui.offers import names_for

        with contextlib.suppress(UsageError):
            first, *others = self.draft.workloads()
            self.advice.ask(first, names_for(self.draft), tuple(others))

    def _advised(self) -> None:
        if self.is_running and self.main.is_mounted:
            self.main.show_draft()

    async def _look_at_machine(self) -> None:
        if self._reading or (self.session is None or not self.session.active):
            return
        self._reading = True
        try:
            reading = await asyncio.to_thread(self._read_machine)
        finally:
            self._reading = False
        self._show_reading(reading)

    def _read_machine(self) -> Reading:
        if self._telemetry is None:
            self._telemetry = Telemetry()
        return self._telemetry.read(self.session.engine.process_id if self.session else None)

    def _show_reading(self, reading: Reading) -> None:
        if self.session is not None:
            self.session.note_memory("process", reading.process_bytes)
            self.session.note_memory("device", reading.gpu.used_bytes if reading.gpu else None)
        self.main.query_one(LivePane).show_reading(reading)

    def action_change_theme(self) -> None:
        """Open the theme picker."""
        self.search_themes()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Yield every action for the command palette."""
        for action in actions.ACTIONS if screen is self.main else actions.ANYWHERE:
            yield SystemCommand(
                f"{action.label} ({self.keys[action.name]})",
                action.words,
                lambda does=action.does: self.run_worker(self.run_action(does, default_namespace=screen)),
            )


def run_app(preset: str | None = None, run: bool = False, ascii: bool = False) -> int:
    """Run the app and return its exit code.

    Args:
        preset: name or file of a preset to load.
        run: whether to run it at once.
        ascii: whether to draw with ASCII characters only.
    """
    sys.setswitchinterval(SWITCH_S)
    app = FatuiApp(preset=preset, run=run, ascii=ascii)
    watch_terminal(app.terminal_gone, app.runs.kill)
    result = app.run()
    if app.farewell:
        print(clean(app.farewell), file=sys.stderr)
    return result if isinstance(result, int) else app.return_code or 0
