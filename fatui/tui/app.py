"""The terminal app: its start and its end, the screens and dialogs that it opens, exports and the clipboard."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, runtime_checkable

from textual.app import SystemCommand
from textual.binding import BindingType
from textual.filter import LineFilter
from textual.screen import Screen
from textual.theme import ThemeProvider
from textual.timer import Timer, TimerCallback
from textual.widget import AwaitMount

from attention.core.errors import UsageError
from attention.core.results import Report
from fatui.draft import Draft
from fatui.storage import settings
from fatui.telemetry import Reading, Telemetry
from fatui.tui import actions, terminal
from fatui.tui.contrast import legible
from fatui.tui.lab import MAX_NOTICE, Lab
from fatui.tui.screens.base import Palette
from fatui.tui.screens.main import MainScreen
from fatui.tui.view_models.session import MakeEngine
from fatui.untrusted_text import escape_controls

if TYPE_CHECKING:
    from textual.dom import DOMNode

    from fatui.remote import Remote
    from fatui.storage.presets import Preset

NOT_OURS: Final = ("Page Left", "Page Right", "Focus Next", "Focus Previous", "Copy selected text")
"""Textual's own bindings, which have no effect here, or of which the last line of the help speaks."""

SWITCH_S: Final = 0.0005
"""Python's thread switch interval, short so that threads that compute final rows do not delay repaints."""


@runtime_checkable
class ShowsReport(Protocol):
    """A screen with a report of its own."""

    @property
    def report(self) -> Report | None:
        """The report on the screen, as it was measured."""
        ...

    @property
    def shown_report(self) -> Report | None:
        """The report as the screen shows it: over the row that was made the reference."""
        ...


def make_screen(name: str) -> Screen[Any]:
    """Create one of the screens besides the main one; its module is imported when it is first opened.

    Raises:
        KeyError: there is no such screen.
    """
    match name:
        case "presets":
            from fatui.tui.screens.presets import Presets

            return Presets()
        case "history":
            from fatui.tui.screens.history import History

            return History()
        case "scaling":
            from fatui.tui.screens.scaling import Scaling

            return Scaling()
        case "chips":
            from fatui.tui.screens.chips import Chips

            return Chips()
        case "models":
            from fatui.tui.screens.models import Models

            return Models()
        case "finetuning":
            from fatui.tui.screens.models import FineTunings

            return FineTunings()
        case "streaming":
            from fatui.tui.screens.streaming import Streaming

            return Streaming()
        case "doctor":
            from fatui.tui.screens.doctor import Doctor

            return Doctor()
    raise KeyError(name)


class FatuiApp(Lab):
    """fatui's terminal app.

    Attributes:
        farewell: a message printed on stderr when the app has closed.
        after_first_paint: called once the first screen is on the terminal.
    """

    TITLE = "fatui"
    CSS_PATH: ClassVar = ["app.tcss", "screens/main.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.ANYWHERE)]
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
        remote: "Remote | None" = None,
    ) -> None:
        super().__init__(make_engine=make_engine, clock=clock, now=now, remote=remote)
        self.farewell = ""
        self.after_first_paint: Callable[[], object] | None = None
        self._begin_with = preset, run
        self._advise = advise
        self._telemetry: Telemetry | None = None
        self._reading = False
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._line_filters: list[LineFilter] = [terminal.ControlFilter()]
        self._take_settings(ascii)

    def _take_settings(self, ascii: bool) -> None:
        """Apply the config file, the command line and the remembered state, and log their problems."""
        notes = self.remote.notes if self.remote else ()
        for problem in [*self.settings.problems, *([self.state_problem] if self.state_problem else []), *notes]:
            self.journal.write(problem, "warning")
        if ascii or self.settings.ascii:
            self._line_filters.append(terminal.AsciiFilter())
        theme = self.settings.theme or self.remembered.theme
        self.theme = theme if theme in self.available_themes else settings.DEFAULT_THEME
        self.set_keymap(self.settings.keys)

    def get_default_screen(self) -> Screen[Any]:
        """Return the main screen."""
        return MainScreen()

    def get_css_variables(self) -> dict[str, str]:
        """Return the theme's colours, legible."""
        return legible(super().get_css_variables())

    def get_line_filters(self) -> list[LineFilter]:
        """Return Textual's filters, the one for control characters, and the one for ASCII if chosen."""
        return [*super().get_line_filters(), *self._line_filters]

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
            self.notify(escape_controls(problem, MAX_NOTICE), severity="warning", timeout=10, markup=False)
        self.costs.enabled = self._advise
        if self._advise:
            self.run_worker(self.advice.run(), name="advice", exit_on_error=False)
            self.set_interval(self.TELEMETRY_S, self._look_at_machine)
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for number in (signal.SIGHUP, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._hang_up, number)
        preset, run = self._begin_with
        if preset is not None:
            run = self.load_preset(preset) and run
        elif self.draft.preset is not None:
            self.follow_preset(self.draft.preset)
        elif self._advise and not run and self.draft == Draft():
            self.costs.fit()
        self.ask_advice()
        if run:
            self.runs.start()
        if self.after_first_paint is not None:
            self.after_first_paint()

    def _hang_up(self, number: int) -> None:
        """End the engine, keep what was measured, and exit: the terminal was closed, or the system sent a signal."""
        self.run_worker(self.leave(128 + number, gone=number == signal.SIGHUP), name="leave")

    def terminal_gone(self) -> None:
        """Shut down in order, from another thread; without effect before the event loop runs."""
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._hang_up, signal.SIGHUP)

    async def leave(self, code: int = 0, *, gone: bool = False) -> None:
        """End an active run, store it, and exit; if the terminal is gone, without restoring it."""
        self.costs.cancel()
        await self.runs.end()
        self._save_state()
        if gone:
            os._exit(code)  # Textual would wait for a terminal that no longer accepts output
        self.exit(code, return_code=code)

    def _save_state(self) -> None:
        kept = self.remembered
        kept.theme, kept.draft, kept.tab, kept.hidden = self.theme, self.draft, self.main.tab, self.main.hidden
        try:
            settings.write_state(kept)
        except OSError as error:
            self.farewell = f"fatui: the layout was not saved: {settings.state_path()}: {error.strerror or error}"

    async def _look_at_machine(self) -> None:
        if self._reading or (self.session is None or not self.session.active):
            return
        if self.remote is not None:
            theirs: Reading | None = getattr(self.session.engine, "reading", None)
            if theirs is not None:
                self._show_reading(theirs)
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
            self.session.record_memory("process", reading.process_bytes)
            self.session.record_memory("device", reading.gpu.used_bytes if reading.gpu else None)
        self.main.show_reading(reading)

    def action_start_run(self) -> None:
        """Run the draft, unless a number of it is still being typed."""
        pending = self.main.pending()
        if pending:
            self.tell(pending, "warning")
        else:
            self.runs.start()
            if self.runs.active:
                self.main.leave_sliders()

    def action_help_quit(self) -> None:
        """Say which key quits: ctrl+c does not, so that a run does not end by a habit."""
        self.tell(f"{self.keys['quit']} quits the app")

    def action_run_again(self) -> None:
        """Run again what is shown, or the last run on this machine."""
        self.run_again()

    def action_stop_run(self) -> None:
        """Stop the run."""
        self.runs.stop()

    def action_sweep(self) -> None:
        """Begin or end a sweep."""
        self.set_draft(self.draft.toggle_sweep())

    def push_screen(self, screen: Any, *arguments: Any, **options: Any) -> Any:
        """Open a screen, unless one of its kind is open on top: clicks that are read at once open it once."""
        if self.screen_stack and type(self.screen) is type(screen):
            return AwaitMount(screen, ())
        return super().push_screen(screen, *arguments, **options)

    def action_open(self, name: str) -> None:
        """Open one of the other screens, unless one is open."""
        if len(self.screen_stack) == 1:
            self.push_screen(make_screen(name), partial(self._screen_closed, name))

    def _screen_closed(self, name: str, result: object) -> None:
        """Load the preset or open the run that was chosen on a screen."""
        self.ask_cost()  # a screen of models times calls of its own
        if name == "presets" and isinstance(result, str) and self.load_preset(result):
            self.journal.write(f"preset {result} is loaded")
            self.main.open_tab("setup")
        elif isinstance(result, Report):
            self.open_report(result)
            self.journal.write(f"run {result.run.id} is opened; it was made by: {result.run.command}")

    def open_report(self, report: Report) -> None:
        """Show a past run instead of the latest, on the screen of its kind."""
        screen = self.runs.show_past(report)
        if screen == "main":
            self.main.open_tab("results")
            self.main.show_run()
        else:
            self.call_after_refresh(self.action_open, screen)

    def action_save_as(self) -> None:
        """Ask for a name, and save the draft as a preset."""
        from fatui.tui.screens.dialogs import SaveAs

        try:
            plan = self.draft.plan()
        except UsageError as error:
            self.tell(f"nothing to save: {'; '.join(error.problems)}", "warning")
            return
        self.push_screen(SaveAs(plan, self.preset), self._saved)

    def _saved(self, preset: "Preset | None") -> None:
        if preset is not None:
            self.load_preset(preset.name)
            self.tell(f"saved as {preset.source}; without the app: fatui bench {preset.name}")

    def action_own_file(self) -> None:
        """Ask for a file with an implementation, and select it."""
        from fatui.tui.screens.dialogs import OwnFile

        self.push_screen(OwnFile(), self._add_own)

    def _add_own(self, name: str | None) -> None:
        if name is not None and name not in self.draft.implementations:
            self.set_draft(self.draft.toggle(name))
        if name is not None:
            self.main.go_to_implementation(name)

    def set_timer(
        self, delay: float, callback: TimerCallback | None = None, *, name: str | None = None, pause: bool = False
    ) -> Timer:
        """Set a timer that fires once, on a busy machine too.

        One of Textual's never does if its delay has passed before it waits: without the timer of 8 ms that it sets at a
        change of the terminal's size, the screen would keep the size before.
        """
        timer = super().set_timer(delay, callback, name=name, pause=pause)
        timer._skip = False
        return timer

    @property
    def shown_report(self) -> Report | None:
        """The report that the current screen shows: a model's, or the one over attention shapes."""
        screen: Screen[Any] = self.screen
        return screen.shown_report if isinstance(screen, ShowsReport) else super().shown_report

    def action_export(self) -> None:
        """Ask for a path, and export the report of the current screen."""
        report = self.shown_report
        if report is None:
            why = "the run has to end first" if self.runs.active else "nothing was run yet"
            self.tell(f"nothing to export: {why}", "warning")
            return
        from fatui.report.scaling import references_text
        from fatui.tui.screens.dialogs import Export

        screen: Screen[Any] = self.screen
        measured = (screen.report if isinstance(screen, ShowsReport) else self.report) or report
        note = ""
        if measured is not report:
            over = references_text(report), references_text(measured)
            note = "speedups over {}; the JSON is the run as it was measured, over {}".format(*over)
        folder = self.remembered.export_folder or str(Path.cwd())
        name = f"fatui-{(report.run.preset or 'run').replace(', ', '-')}-{report.run.id}"
        self.push_screen(Export(folder, name, note), partial(self._export_chosen, report, measured))

    def _export_chosen(self, report: Report, measured: Report, target: tuple[Path, tuple[str, ...]] | None) -> None:
        if target is not None:
            # Written once the dialog has closed, so that it is not in the picture.
            self.call_after_refresh(self._export, report, measured, *target)

    async def _export(self, report: Report, measured: Report, stem: Path, endings: tuple[str, ...]) -> None:
        from fatui.report import export as formats
        from fatui.report.compose import compose
        from fatui.report.document import to_html
        from fatui.tui.screens.dialogs import write_all

        picture = self.export_screenshot(title="fatui") if "svg" in endings else ""
        writers = {
            "md": lambda: formats.to_markdown(report),
            "csv": lambda: formats.to_csv(report),
            "json": lambda: formats.to_json(measured),
            "html": lambda: to_html(compose([report])),
            "svg": lambda: picture,
            "log": self.journal.text,
        }
        if "html" in endings:  # whose charts take seconds
            self.notify(f"writing {stem.name}", timeout=2, markup=False)
        written, problems = await asyncio.to_thread(write_all, stem, {ending: writers[ending] for ending in endings})
        for problem in problems:
            self.tell(problem, "error")
        if written:
            self.remembered.export_folder = str(stem.parent)
            names = ", ".join(path.name for path in written)
            self.tell(f"wrote {names} to {stem.parent.resolve()}")

    async def action_copy_table(self) -> None:
        """Copy the table as Markdown."""
        from fatui.report import export as formats

        report = self.shown_report
        if report is None:
            self.tell("nothing to copy: there is no table yet", "warning")
        else:
            await self._copy(formats.to_markdown(report), "the table", ", as Markdown")

    async def action_copy_verdict(self) -> None:
        """Copy the verdict as Markdown."""
        from fatui.report.export import verdict_markdown

        report = self.shown_report
        if report is None:
            self.tell("nothing to copy: a verdict comes with the end of a run", "warning")
        else:
            await self._copy(verdict_markdown(report) + "\n", "the verdict", ", as Markdown")

    async def action_copy_command(self) -> None:
        """Copy the command that reproduces the run."""
        report = self.shown_report
        if report is None:
            self.tell("nothing to copy: nothing was run yet", "warning")
        else:
            await self._copy(report.run.command + "\n", "the command")

    async def _copy(self, text: str, what: str, form: str = "") -> None:
        """Copy a text; report success only if a system program accepted it."""
        program = await asyncio.to_thread(terminal.copy, text)
        if program is not None:
            self.tell(f"{what} is on the clipboard{form} ({program})")
            return
        self.copy_to_clipboard(text)
        key = self.keys["export"]
        self.tell(
            f"{what} was sent to the terminal, which may or may not put it on the clipboard; {key} writes a file",
            "warning",
        )

    def action_explain_trust(self) -> None:
        """Show what the figures of the report on the screen depend on."""
        from fatui.tui.screens.dialogs import TrustDetails

        report = self.shown_report
        if report is None:
            self.tell("the figures are explained at the end of a run", "warning")
        else:
            self.push_screen(TrustDetails(report))

    def action_run_longer(self) -> None:
        """Measure ten seconds more, together with what was measured."""
        self.runs.run_longer()

    def action_jump(self) -> None:
        """Label everything on the screen that can be reached, and go to what is chosen."""
        from textual.screen import ModalScreen

        from fatui.tui.screens.jump import Jump, Spot, spots_of

        if isinstance(self.screen, ModalScreen):
            return

        def go(spot: Spot | None) -> None:
            if spot is not None:
                spot.go()

        self.push_screen(Jump(spots_of(self.screen)), go)

    def action_explain_keys(self) -> None:
        """Show the keys of the current screen, as configured."""
        from fatui.tui.screens.dialogs import Help

        screen, groups = self.screen, []
        if screen is self.main:
            groups.append(("This screen", [(self.keys[action.name], action.words) for action in actions.MAIN]))
        else:
            groups.append(("This screen", self._keys_of(screen)))
        here = self._keys_of(screen.focused) if screen.focused is not None else []
        if screen.focused is not None and here:
            name = (screen.focused.id or type(screen.focused).__name__).replace("-", " ")
            name = name.removeprefix("axis ").removeprefix("choice ").rstrip("_")
            groups.append((f"Where you are: {name}", here))
        anywhere = [(self.keys[action.name], action.words) for action in actions.ANYWHERE]
        groups.append(("Anywhere", [*anywhere, ("ctrl+p", "Everything by name, in the palette")]))
        self.push_screen(Help(groups, str(settings.config_path())))

    def _keys_of(self, node: "DOMNode") -> list[tuple[str, str]]:
        """Return the bindings of a screen or widget as configured, merging those with the same meaning."""
        merged: dict[str, dict[str, None]] = {}
        for _, binding in node._bindings:
            words = binding.tooltip or binding.description
            keys = self.settings.keys.get(binding.id or "", binding.key).split(",")
            merged.setdefault(words, {}).update(dict.fromkeys(map(actions.shown, keys)))
        return [(", ".join(keys), words) for words, keys in merged.items() if words and words not in NOT_OURS]

    async def action_leave(self) -> None:
        """Exit; ask first if a run is active."""
        if not self.runs.active:
            await self.leave()
            return
        from fatui.tui.screens.dialogs import Question

        text = "A run is in progress. Stop it, keep its results, and leave?"
        self.push_screen(Question(text, yes="Leave", no="Stay"), self._leave_if)

    def _leave_if(self, yes: bool | None) -> None:
        if yes:
            self.run_worker(self.leave(), name="leave")

    async def action_quit(self) -> None:
        """Exit as q does, also for Textual's own key."""
        await self.action_leave()

    def action_change_theme(self) -> None:
        """Open the theme picker."""
        self.push_screen(Palette([ThemeProvider], placeholder="Search for themes…"))

    def action_command_palette(self) -> None:
        """Open the palette of actions."""
        self.push_screen(Palette())

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Yield every action for the command palette."""
        for action in actions.ACTIONS if screen is self.main else actions.ANYWHERE:
            yield SystemCommand(
                f"{action.label} ({self.keys[action.name]})",
                action.words,
                lambda does=action.does: self.run_worker(self.run_action(does, default_namespace=screen)),
            )


def run_app(preset: str | None = None, run: bool = False, ascii: bool = False, remote: "Remote | None" = None) -> int:
    """Run the app and return its exit code.

    Args:
        preset: name or file of a preset to load.
        run: whether to run it at once.
        ascii: whether to draw with ASCII characters only.
        remote: the machine that the engine runs on; None for this one.
    """
    sys.setswitchinterval(SWITCH_S)
    # The collector walks neither modules nor widgets, which stay: that took 0.2 s beside a busy engine.
    gc.freeze()
    app = FatuiApp(preset=preset, run=run, ascii=ascii, remote=remote)
    app.after_first_paint = gc.freeze
    terminal.watch_terminal(app.terminal_gone, app.runs.kill)
    result = app.run()
    if app.farewell:
        print(escape_controls(app.farewell), file=sys.stderr)
    return result if isinstance(result, int) else app.return_code or 0
