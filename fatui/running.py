"""Run control of the app: start, stop, save to history, quit."""

import asyncio
from typing import TYPE_CHECKING

from attention.errors import UsageError
from attention.plan import AnyPlan, FineTuningPlan, GenerationPlan, Plan
from attention.report import Report
from fatui import estimate, settings
from fatui.draft import draft_of
from fatui.model_session import ModelSession
from fatui.session import AnySession, Drives, Listener, Session

if TYPE_CHECKING:
    from fatui.app import FatuiApp
    from fatui.preset_format import Preset


def real_engine(plan: AnyPlan, listener: Listener) -> Drives:
    """Create the engine that runs a plan in a worker process."""
    from fatui.engine import Engine

    return Engine(plan, listener)


def command_of(plan: Plan, preset: "Preset | None") -> str:
    """Return the command that repeats a run, or a comment that says why there is none."""
    from fatui.reproduce import command_for

    try:
        return command_for(plan, preset)
    except UsageError as error:
        return f"# {error}"


class Runs:
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
        from fatui.history import History, HistoryError

        history = History()
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
    from fatui.presets import load

    try:
        preset = load(name)
    except UsageError as error:
        for problem in error.problems:
            app.tell(problem, "error")
        return False
    app.preset = preset
    app.set_draft(draft_of(preset.plan(), preset.name))
    return True


def remember(app: "FatuiApp") -> None:
    """Save the app's state for the next start."""
    kept = app.remembered
    kept.theme, kept.draft, kept.tab, kept.hidden = app.theme, app.draft, app.main.tab, app.main.hidden
    try:
        settings.write_remembered(kept)
    except OSError as error:
        app.farewell = f"fatui: the layout was not saved: {settings.state_path()}: {error.strerror or error}"
