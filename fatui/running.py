"""What the app does about runs: start one, stop it, keep it, and leave."""

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
    """The engine that runs in a process of its own."""
    from fatui.engine import Engine

    return Engine(plan, listener)


def command_of(plan: Plan, preset: "Preset | None") -> str:
    """The command that makes a run again, or a word on why there is none."""
    from fatui.reproduce import command_for

    try:
        return command_for(plan, preset)
    except UsageError as error:
        return f"# {error}"


class Runs:
    """The runs of an app, one after the other.

    Attributes:
        session: the run over attention shapes that goes on or was made last, or None.
        report: what export, copy and the further screens are about, or None.
        models: the run of each screen of models that goes on or was made last, by the screen's name.
        model_reports: what those screens show, by their names.
        chosen: what was chosen on them, by the names of screen and choice.
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
        """The run that goes on, of whatever kind."""
        return self._going if self.active else None

    @property
    def active(self) -> bool:
        """Whether a run goes on, of whatever kind."""
        return self._going is not None and self._going.active

    def start(self) -> None:
        """Run what is set up, unless a run goes on or it cannot run."""
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
        """Run what is set up on a screen of models, unless a run goes on."""
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
        """Whether a run goes on, which is told."""
        if self.active:
            self._app.tell(f"a run goes on; {self._app.keys['stop']} stops it", "warning")
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
        """Put a report into the history; what goes wrong is told, and the report stays on the screen."""
        from fatui.history import History, HistoryError

        history = History()
        try:
            await asyncio.to_thread(history.add, report)
        except HistoryError as error:
            self._app.tell(f"not kept: {error}; {self._app.keys['export']} writes it to files", "error")
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
        """Tell once when the engine has said nothing for long."""
        session = self._going
        if session is None or not session.silent:
            self._told_silence = False
        elif not self._told_silence:
            self._told_silence = True
            stop = self._app.keys["stop"]
            text = f"the engine has been silent for {session.silent_s:.0f} s; {stop} stops it, what was measured stays"
            self._app.tell(text, "warning")

    async def end(self) -> None:
        """Stop the run, and wait until it is ended and kept."""
        if self._going is not None and self.active:
            self._going.stop()
        if self._ended is not None:
            await self._ended.wait()

    def kill(self) -> None:
        """Kill the worker's process at once, and all that it started."""
        if self._going is not None:
            self._going.kill()

    def open_report(self, report: Report) -> None:
        """Show a run of the past in the place of the latest, on the screen of its kind."""
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
    """Put a preset on the sliders; say what is wrong with it if it cannot be used."""
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
    """Keep for the next start how the app was left."""
    kept = app.remembered
    kept.theme, kept.draft, kept.tab, kept.hidden = app.theme, app.draft, app.main.tab, app.main.hidden
    try:
        settings.write_remembered(kept)
    except OSError as error:
        app.farewell = f"fatui: the layout was not kept: {settings.state_path()}: {error.strerror or error}"
