"""The terminal app: the draft, the run and the log, which its screens draw."""

import asyncio
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, runtime_checkable

from msgspec import structs
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.filter import LineFilter
from textual.screen import Screen

from attention.core.errors import UsageError
from attention.core.plan import AnyPlan, FineTuningPlan, GenerationPlan, Plan
from attention.core.results import Report
from fatui.draft import Draft, draft_of
from fatui.storage import settings
from fatui.tui import actions
from fatui.tui.advisor import Advice
from fatui.tui.terminal import ControlFilter, watch_terminal
from fatui.tui.view_models import estimate
from fatui.tui.view_models.journal import Level, Log
from fatui.tui.view_models.session import AnySession, Drives, Listener, MakeEngine, ModelSession, Session
from fatui.tui.view_models.telemetry import Reading, Telemetry
from fatui.untrusted_text import escape_controls

if TYPE_CHECKING:
    from textual.dom import DOMNode

    from fatui.storage.presets import Preset


def real_engine(plan: AnyPlan, listener: Listener) -> Drives:
    """Create the engine that runs a plan in a worker process."""
    from fatui.engine_process import Engine

    return Engine(plan, listener)


def command_of(plan: Plan, preset: "Preset | None") -> str:
    """Return the command that repeats a run, or a comment that says why there is none."""
    from fatui.reproduce import command_for

    try:
        return command_for(plan, preset)
    except UsageError as error:
        return f"# {error}"


class RunController:
    """The runs of an app, one at a time.

    Attributes:
        session: the current or last run over attention shapes, or None.
        report: the report that export, copy and the other screens use, or None.
        models: the current or last run of each models screen, by the screen's name.
        model_reports: the reports that those screens show, by screen name.
        chosen: the values chosen on them, by screen name and choice.
    """

    def __init__(self, app: "FatuiApp") -> None:
        self.session: Session | None = None
        self.report: Report | None = None
        self.models: dict[str, ModelSession] = {}
        self.model_reports: dict[str, Report] = {}
        self.chosen: dict[str, dict[str, tuple[str, ...]]] = {}
        self._going: AnySession | None = None
        self._app = app
        self._told_silence = False
        self._ended: asyncio.Event | None = None

    @property
    def going(self) -> AnySession | None:
        """The active run, of any kind, or None."""
        return self._going if self.active else None

    @property
    def active(self) -> bool:
        """Whether a run of any kind is active."""
        return self._going is not None and self._going.active

    def start(self) -> None:
        """Run the draft, unless a run is active or the draft cannot run."""
        app = self._app
        if self._refused():
            return
        try:
            plan = app.draft.plan()
        except UsageError as error:
            app.tell(f"cannot run: {'; '.join(error.problems)}", "warning")
            return
        self._told_silence = False
        self.report = None
        name = app.draft.preset if not app.draft.changed else None
        self.session = Session(
            plan,
            app.journal,
            app.make_engine or real_engine,
            command=command_of(plan, app.preset if name else None),
            preset=name,
            expected_s=estimate.estimate_s(plan, app.remembered.pace, app.device_name),
            clock=app.clock,
            now=app.now,
        )
        app.journal.write(f"run of {app.draft.title()}: {self.session.command}")
        self._go(self.session)
        app.main.open_tab("live")
        app.main.show_run()

    def start_model(self, screen: str, plan: GenerationPlan | FineTuningPlan, command: str) -> None:
        """Run a plan of a models screen, unless a run is active."""
        app = self._app
        if self._refused():
            return
        self._told_silence = False
        self.model_reports.pop(screen, None)
        session = ModelSession(
            plan, app.journal, app.make_engine or real_engine, command=command, clock=app.clock, now=app.now
        )
        self.models[screen] = session
        app.journal.write(f"run of {plan.cases[0].model}: {command}")
        self._go(session, screen)

    def _refused(self) -> bool:
        """Whether a run is active; if so, say so."""
        if self.active:
            self._app.tell(f"a run is in progress; {self._app.keys['stop']} stops it", "warning")
        return self.active

    def _go(self, session: AnySession, screen: str | None = None) -> None:
        self._going, self._ended = session, asyncio.Event()
        self._app.run_worker(self._run(session, self._ended, screen), name="run", exit_on_error=False)

    async def _run(self, session: AnySession, ended: asyncio.Event, screen: str | None) -> None:
        try:
            await session.run()
            await self._keep_what_came_out(session, screen)
        finally:
            ended.set()
        if self._app.is_running and screen is None:
            self._app.main.open_tab("results")
            self._app.main.show_draft()
            self._app.main.show_run()

    async def _keep_what_came_out(self, session: AnySession, screen: str | None) -> None:
        if self._going is session and session.any_rows:
            report = await asyncio.to_thread(session.report)
            if screen is None:
                self.report = report
            else:
                self.model_reports[screen] = report
            await self.keep(report)
            if session.phase == "done" and screen is None:
                remembered = self._app.remembered
                remembered.pace = estimate.learn(remembered.pace, report, session.rounds_s + session.once_s)
        self._app.journal.write(session.finding or f"the run {session.phase}")

    async def keep(self, report: Report) -> None:
        """Store a report in the history; errors are shown, and the report stays on the screen."""
        from fatui.storage.history import HistoryError, RunHistory

        history = RunHistory()
        try:
            await asyncio.to_thread(history.add, report)
        except HistoryError as error:
            self._app.tell(f"not stored: {error}; {self._app.keys['export']} writes it to files", "error")
        if history.notice:
            self._app.tell(history.notice, "warning")

    def stop(self) -> None:
        """Stop the run."""
        if self._going is None or not self.active:
            self._app.tell("nothing runs")
            return
        self._going.stop()
        self._app.main.show_run()

    def watch_silence(self) -> None:
        """Warn once if the engine has been silent for long."""
        session = self._going
        if session is None or not session.silent:
            self._told_silence = False
        elif not self._told_silence:
            self._told_silence = True
            stop = self._app.keys["stop"]
            text = f"the engine has been silent for {session.silent_s:.0f} s; {stop} stops it and keeps the results"
            self._app.tell(text, "warning")

    async def end(self) -> None:
        """Stop the run, and wait until it has ended and is stored."""
        if self._going is not None and self.active:
            self._going.stop()
        if self._ended is not None:
            await self._ended.wait()

    def kill(self) -> None:
        """Kill the worker process and its children at once."""
        if self._going is not None:
            self._going.kill()

    def open_report(self, report: Report) -> None:
        """Show a past run instead of the latest, on the screen of its kind."""
        screen = "models" if report.models else "finetuning" if report.fine_tunings else None
        if screen is not None:
            self.models.pop(screen, None)
            self.model_reports[screen] = report
            self._app.call_after_refresh(self._app.action_open, screen)
            return
        self.session, self.report = None, report
        self._app.main.open_tab("results")
        self._app.main.show_run()


def load_preset(app: "FatuiApp", name: str) -> bool:
    """Load a preset into the draft; show its problems and return False if it cannot be used."""
    from fatui.storage.presets import load

    try:
        preset = load(name)
    except UsageError as error:
        for problem in error.problems:
            app.tell(problem, "error")
        return False
    app.preset = preset
    app.set_draft(draft_of(preset.plan(), preset.name))
    return True


def save_state(app: "FatuiApp") -> None:
    """Save the app's state for the next start."""
    kept = app.remembered
    kept.theme, kept.draft, kept.tab, kept.hidden = app.theme, app.draft, app.main.tab, app.main.hidden
    try:
        settings.write_state(kept)
    except OSError as error:
        app.farewell = f"fatui: the layout was not saved: {settings.state_path()}: {error.strerror or error}"


NOT_OURS: Final = ("Page Left", "Page Right")
"""Textual's own bindings, which have no effect here."""
SCREENS: Final = {
    "main": "main:MainScreen",
    "presets": "presets:Presets",
    "history": "history:History",
    "scaling": "scaling:Scaling",
    "models": "models:Models",
    "finetuning": "models:FineTunings",
    "doctor": "doctor:Doctor",
}


class MainView(Screen[None]):
    """What the app asks of its main screen, which it opens by name."""

    @property
    def tab(self) -> str:
        """The open tab."""
        raise NotImplementedError

    @property
    def hidden(self) -> list[str]:
        """The names of the hidden panes."""
        raise NotImplementedError

    def open_tab(self, tab: str) -> None:
        """Open a tab."""
        raise NotImplementedError

    def show_draft(self) -> None:
        """Draw the draft."""
        raise NotImplementedError

    def show_run(self) -> None:
        """Draw the run."""
        raise NotImplementedError

    def show_reading(self, reading: Reading) -> None:
        """Draw a reading of the machine."""
        raise NotImplementedError


@runtime_checkable
class ShowsReport(Protocol):
    """A screen with a report of its own."""

    @property
    def report(self) -> Report | None:
        """The report on the screen."""
        ...


def screen_named(name: str) -> Screen[Any]:
    """Create a screen; its module is imported when it is first opened."""
    module, _, kind = SCREENS[name].partition(":")
    made: Screen[Any] = getattr(importlib.import_module(f"fatui.tui.screens.{module}"), kind)()
    return made


def open_screen(app: "FatuiApp", name: str) -> None:
    """Open one of the other screens, unless one is open."""
    if len(app.screen_stack) > 1:
        return
    made = screen_named(name)
    app.push_screen(made, partial(_apply_result, app, name))


def _apply_result(app: "FatuiApp", name: str, result: object) -> None:

    if name == "presets" and isinstance(result, str) and load_preset(app, result):
        app.journal.write(f"preset {result} is loaded")
        app.main.open_tab("setup")
    elif isinstance(result, Report):
        app.runs.open_report(result)
        app.journal.write(f"run {result.run.id} is opened; it was made by: {result.run.command}")


def save_as(app: "FatuiApp") -> None:
    """Ask for a name, and save the draft as a preset."""
    from fatui.tui.screens.dialogs import SaveAs

    try:
        plan = app.draft.plan()
    except UsageError as error:
        app.tell(f"nothing to save: {'; '.join(error.problems)}", "warning")
        return
    app.push_screen(SaveAs(plan, app.preset), partial(_saved, app))


def _saved(app: "FatuiApp", preset: "Preset | None") -> None:
    if preset is not None:
        load_preset(app, preset.name)
        app.tell(f"saved as {preset.source}")


def shown_report(app: "FatuiApp") -> Report | None:
    """Return the report of the current screen: a model's, or the one over attention shapes."""
    screen: Screen[Any] = app.screen
    return screen.report if isinstance(screen, ShowsReport) else app.report


def export(app: "FatuiApp") -> None:
    """Ask for a path, and export the report of the current screen."""
    report = shown_report(app)
    if report is None:
        why = "the run has to end first" if app.runs.active else "nothing was run yet"
        app.tell(f"nothing to export: {why}", "warning")
        return
    from fatui.tui.screens.dialogs import Export

    folder = app.remembered.export_folder or str(Path.cwd())
    name = f"fatui-{report.run.preset or 'run'}-{report.run.id}"
    app.push_screen(Export(folder, name), partial(_exported, app, report))


def _exported(app: "FatuiApp", report: Report, target: tuple[Path, tuple[str, ...]] | None) -> None:
    if target is not None:
        # Written once the dialog has closed, so that it is not in the picture.
        app.call_after_refresh(_write, app, report, *target)


async def _write(app: "FatuiApp", report: Report, stem: Path, endings: tuple[str, ...]) -> None:
    from fatui.report import export as formats
    from fatui.report.compose import compose
    from fatui.report.document import to_html
    from fatui.tui.screens.dialogs import write_all

    picture = app.export_screenshot(title="fatui") if "svg" in endings else ""
    writers = {
        "md": lambda: formats.to_markdown(report),
        "csv": lambda: formats.to_csv(report),
        "json": lambda: formats.to_json(report),
        "html": lambda: to_html(compose([report])),
        "svg": lambda: picture,
        "log": app.journal.text,
    }
    written, problems = await asyncio.to_thread(write_all, stem, {ending: writers[ending] for ending in endings})
    for problem in problems:
        app.tell(problem, "error")
    if written:
        app.remembered.export_folder = str(stem.parent)
        names = ", ".join(path.name for path in written)
        app.tell(f"wrote {names} to {stem.parent.resolve()}")


async def copy_table(app: "FatuiApp") -> None:
    """Copy the table as Markdown; report success only if a system program accepted it."""
    from fatui.report import export as formats
    from fatui.tui import terminal

    report = shown_report(app)
    if report is None:
        app.tell("nothing to copy: there is no table yet", "warning")
        return
    text = formats.to_markdown(report)
    program = await asyncio.to_thread(terminal.copy, text)
    if program is not None:
        app.tell(f"the table is on the clipboard, as Markdown ({program})")
        return
    app.copy_to_clipboard(text)
    key = app.keys["export"]
    text = f"the table was sent to the terminal, which may or may not put it on the clipboard; {key} writes a file"
    app.tell(text, "warning")


def open_row(app: "FatuiApp", index: int, name: str) -> None:
    """Show the details of a row."""

    session, report = app.session, app.report
    if session is not None:
        case = session.case(index)
        command = command_of(structs.replace(session.plan, cases=(case.workload,)), None)
    elif report is not None and index < len(report.cases):
        case = report.cases[index]
        command = report.run.command  # its plan is not kept, so the command is the whole run's
    else:
        return
    row = next((row for row in case.rows if row.implementation == name), None)
    if row is None:
        app.tell(f"{name} has no figures yet")
        return
    from fatui.tui.screens.dialogs import RowDetails

    app.push_screen(RowDetails(case, row, command))


def explain_keys(app: "FatuiApp") -> None:
    """Show the keys of the current screen, as configured."""
    from fatui.tui.screens.dialogs import Help

    screen, groups = app.screen, []
    if screen is app.main:
        groups.append(("This screen", [(app.keys[action.name], action.words) for action in actions.MAIN]))
    else:
        groups.append(("This screen", _keys_of(app, screen)))
    here = _keys_of(app, screen.focused) if screen.focused is not None else []
    if screen.focused is not None and here:
        name = (screen.focused.id or type(screen.focused).__name__).replace("-", " ")
        name = name.removeprefix("axis ").removeprefix("choice ").rstrip("_")
        groups.append((f"Where you are: {name}", here))
    anywhere = [(app.keys[action.name], action.words) for action in actions.ANYWHERE]
    groups.append(("Anywhere", [*anywhere, ("ctrl+p", "Everything by name, in the palette")]))
    app.push_screen(Help(groups, str(settings.config_path())))


def _keys_of(app: "FatuiApp", node: "DOMNode") -> list[tuple[str, str]]:
    """Return the bindings of a screen or widget as configured, merging those with the same meaning."""
    merged: dict[str, dict[str, None]] = {}
    for _, binding in node._bindings:
        words = binding.tooltip or binding.description
        keys = app.settings.keys.get(binding.id or "", binding.key).split(",")
        merged.setdefault(words, {}).update(dict.fromkeys(map(actions.shown, keys)))
    return [(", ".join(keys), words) for words, keys in merged.items() if words and words not in NOT_OURS]


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
        self.journal = Log(now)
        self.settings = settings.read_settings(actions.SCOPES, tuple(self.available_themes))
        self.remembered, self._complaint = settings.read_state()
        self.draft: Draft = self.remembered.draft
        self.preset: Preset | None = None
        self.runs = RunController(self)
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
            from fatui.tui.terminal import AsciiFilter

            self._line_filters.append(AsciiFilter())
        theme = self.settings.theme or self.remembered.theme
        self.theme = theme if theme in self.available_themes else settings.DEFAULT_THEME
        self.set_keymap(self.settings.keys)

    def get_default_screen(self) -> Screen[object]:
        """Return the main screen."""
        return screen_named("main")

    def get_line_filters(self) -> list[LineFilter]:
        """Return Textual's filters, the one for control characters, and the one for ASCII if chosen."""
        return [*super().get_line_filters(), ControlFilter(), *self._line_filters]

    @property
    def main(self) -> MainView:
        """The main screen, even when another is on top."""
        screen = self.screen_stack[0]
        assert isinstance(screen, MainView)
        return screen

    def on_mount(self) -> None:
        """Defer everything slow until after the first paint."""
        self._event_loop = asyncio.get_running_loop()
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        for problem in self.settings.problems:
            self.notify(escape_controls(problem, MAX_NOTICE), severity="warning", timeout=10, markup=False)
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
        from fatui.storage.presets import load

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
        save_state(self)
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
        open_screen(self, name)

    def action_save_as(self) -> None:
        """Save the draft as a preset."""
        save_as(self)

    def action_export(self) -> None:
        """Export the run to files."""
        export(self)

    async def action_copy_table(self) -> None:
        """Copy the table."""
        await copy_table(self)

    def action_explain_keys(self) -> None:
        """Open the key help."""
        explain_keys(self)

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

    def tell(self, text: str, level: Level = "info") -> None:
        """Write a message to the log, and show it as a notification."""
        self.journal.write(text, level)
        shown = escape_controls(text, MAX_NOTICE)
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
        from fatui.tui.view_models.availability import names_for

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
            self.session.record_memory("process", reading.process_bytes)
            self.session.record_memory("device", reading.gpu.used_bytes if reading.gpu else None)
        self.main.show_reading(reading)

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
        print(escape_controls(app.farewell), file=sys.stderr)
    return result if isinstance(result, int) else app.return_code or 0
