"""The app without its screens: the draft, the runs and the log, on which the screens act."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal, Protocol

from msgspec import structs

from attention.core.errors import UsageError
from attention.core.plan import AnyPlan, Assignment, KnownTimes, ModelPlan, Plan
from attention.core.results import Environment, Peaks, Report
from attention.measure.device import computes_on_cpu
from fatui import fitting
from fatui.draft import Draft, draft_of
from fatui.engine_process import Engine, Listener
from fatui.storage import settings
from fatui.telemetry import Reading
from fatui.tui import actions
from fatui.tui.advisor import Advice
from fatui.tui.input_order import OrderedInput
from fatui.tui.painting import RepaintBudget
from fatui.tui.view_models import cost
from fatui.tui.view_models.availability import names_for
from fatui.tui.view_models.cost import Timing, costliest_kinds, is_known
from fatui.tui.view_models.journal import Level, Log
from fatui.tui.view_models.session import AnySession, MakeEngine, ModelSession, Session
from fatui.untrusted_text import escape_controls

if TYPE_CHECKING:
    from fatui.remote import Remote
    from fatui.storage.presets import Preset
    from fatui.tui.view_models.home import Past

Severity = Literal["information", "warning", "error"]
SEVERITY: Final[dict[Level, Severity]] = {"info": "information", "warning": "warning", "error": "error"}

SETTLED_S: Final = 0.8
"""Seconds without a change after which calls of a set-up are timed."""
MAX_TIMING_S: Final = 60.0
"""Maximum seconds of timing calls of a set-up."""
TABLE_TICKS: Final = 4
"""Tables, and what else changes slowly, are repainted at every so many repaints of the trends of rates."""
LONGER_S: Final = 10.0
"""Seconds that each case is measured longer."""
MAX_NOTICE: Final = 400
"""Maximum characters of a notification; the log has the whole text."""


def command_of(plan: Plan, preset: "Preset | None") -> str:
    """Return the command that repeats a run, or a comment that says why there is none."""
    from fatui.reproduce import command_for

    try:
        return command_for(plan, preset)
    except UsageError as error:
        return f"# {error}"


class MainView(Protocol):
    """The interface of the main screen that the app uses."""

    @property
    def is_mounted(self) -> bool:
        """Whether it is on the screen stack and composed."""
        ...

    @property
    def tab(self) -> str:
        """The open tab."""
        ...

    @property
    def hidden(self) -> list[str]:
        """The names of the hidden panes."""
        ...

    def open_tab(self, tab: str) -> None:
        """Open a tab."""

    def over_reference(self, report: Report) -> Report:
        """Return a report as the comparison shows it."""
        ...

    def show_draft(self) -> None:
        """Draw the draft."""

    def show_run(self) -> None:
        """Draw the run."""

    def show_reading(self, reading: Reading) -> None:
        """Draw a reading of the machine."""

    def show_past(self) -> None:
        """Draw the last run on this machine."""


class Lab(OrderedInput):
    """The state of the app, and what its screens do with it.

    Attributes:
        draft: what is set up to run.
        preset: the preset that the draft was made from, or None.
        runs: the current run and its results.
        journal: the log.
        settings: the config file's settings.
        remembered: the state kept from start to start.
        keys: the key of every action, for display.
        advice: the routes of the draft's workload.
        past: the last run on this machine, once it was read.
        costs: what single calls of the set-up take.
        repaints: the budget of those that can be left out.
        remote: the machine that the engine runs on; None for this one.
    """

    REPAINT_S = 0.25
    """Seconds between repaints of a run's trends, if the budget allows them; its table is repainted once a second."""

    def __init__(
        self,
        *,
        make_engine: MakeEngine | None,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        remote: "Remote | None" = None,
    ) -> None:
        super().__init__()
        self.remote = remote
        self.journal = Log(now)
        self.settings = settings.read_settings(actions.SCOPES, tuple(self.available_themes))
        self.remembered, self.state_problem = settings.read_state()
        self.draft: Draft = self.remembered.draft
        self.preset: Preset | None = None
        self.runs = RunController(self, make_engine or self.new_engine, clock, now)
        self.costs = CostMeter(self)
        self.repaints = RepaintBudget()
        self.keys = actions.shown_keys(self.settings.keys)
        self.advice = Advice(self._advised, remote)
        self.past: Past | None = None
        self._sought = ""

    def new_engine(self, plan: AnyPlan, listener: Listener, *, cost_only: bool = False) -> Engine:
        """Make an engine that knows the times of earlier runs; `cost_only`: it times single calls only."""
        known = KnownTimes()
        if isinstance(plan, Plan):
            known = cost.known_times(self.remembered.pace, self.device_name)
        assignment = Assignment(plan=plan, known=known, cost_only=cost_only)
        return Engine(plan, listener, remote=self.remote, assignment=assignment)

    @property
    def main(self) -> MainView:
        """The main screen, even when another is on top."""
        raise NotImplementedError

    @property
    def session(self) -> Session | None:
        """The current or last run."""
        return self.runs.session

    @property
    def report(self) -> Report | None:
        """The report of the run shown, as it was measured."""
        return self.runs.report

    @property
    def shown_report(self) -> Report | None:
        """The report that export, copy and the other screens use: over the reference that the comparison shows."""
        return self.report and self.main.over_reference(self.report)

    @property
    def peaks(self) -> Peaks:
        """The rates of this machine: those of the run shown, else those of an earlier run on the same device."""
        session, report, kept = self.session, self.report, self.remembered
        if session is not None and session.record.peaks.flops_per_s:
            return session.record.peaks
        if report is not None and report.peaks.flops_per_s:
            return report.peaks
        return kept.peaks if kept.peaks_of == self.device_name else Peaks()

    @property
    def device_name(self) -> str:
        """The device's name, with its host if that is another, or an empty string until the advisor has reported it."""
        if self.advice.device is None:
            return ""
        return Environment(device=self.advice.device.name, host=self.remote.name if self.remote else None).machine or ""

    @property
    def where(self) -> str:
        """The machine that the engine runs on, in words."""
        return self.remote.name if self.remote else "this machine"

    @property
    def computes_on_cpu(self) -> bool:
        """Whether MLX's default device is the CPU where the engine runs."""
        return self.remote.computes_on_cpu if self.remote else computes_on_cpu()

    def command(self, command: str) -> str:
        """Return a command of fatui as it is run where the engine runs."""
        return self.remote.prefixed(command) if self.remote and command.startswith("fatui ") else command

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

    def load_preset(self, name: str) -> bool:
        """Load a preset into the draft; show its problems and return False if it cannot be used."""
        from fatui.storage.presets import load

        try:
            preset = load(name)
        except UsageError as error:
            for problem in error.problems:
                self.tell(problem, "error")
            return False
        self.preset = preset
        self.set_draft(draft_of(preset.plan(), preset.name))
        return True

    def follow_preset(self, name: str | None) -> None:
        """Reload the preset that the draft was made from, under a name; without effect on a draft without one."""
        from fatui.storage.presets import load

        self.preset = None
        if name is not None:
            with contextlib.suppress(UsageError):
                self.preset = load(name)
        self.set_draft(structs.replace(self.draft, preset=self.preset and self.preset.name))

    def ask_advice(self) -> None:
        """Request the routes for the workload on the sliders, and the memory of all cases."""
        with contextlib.suppress(UsageError):
            first, *others = self.draft.workloads()
            elsewhere = bool(self.draft.hosts or self.draft.hostfile)
            self.advice.ask(first, names_for(self.draft), tuple(others), elsewhere=elsewhere)
        self.ask_cost()

    def ask_cost(self) -> None:
        """Time calls of the draft once it has settled, unless they are known or it runs on other hosts."""
        if self.device_name and not (self.draft.hosts or self.draft.hostfile):
            with contextlib.suppress(UsageError):
                self.costs.ask(self.draft.plan(), self._show_draft)

    def _show_draft(self) -> None:
        if self.is_running and self.main.is_mounted:
            self.main.show_draft()

    def open_report(self, report: Report) -> None:
        """Show a past run instead of the latest, on the screen of its kind."""
        raise NotImplementedError

    async def find_past(self, device: str) -> None:
        """Read the last run on a device, for the first screen."""
        from fatui.tui.view_models.home import find_past

        self.past = await asyncio.to_thread(find_past, device, cores=self._cores)
        if self.is_running and self.main.is_mounted:
            self.main.show_past()

    def run_again(self) -> None:
        """Set up what is shown, or else the last run on this machine, and run it."""
        report = self.report or (self.past.report if self.past else None)
        if self.session is not None:
            self.set_draft(draft_of(self.session.plan, self.session.preset))
        elif report is not None and report.cases:
            names = tuple(dict.fromkeys(row.implementation for case in report.cases for row in case.rows))
            plan = Plan(cases=tuple(case.workload for case in report.cases), implementations=names)
            self.set_draft(draft_of(plan, None))
        else:
            self.tell(f"nothing was run yet; {self.keys['run']} runs what is set up")
            return
        self.runs.start()

    def _advised(self) -> None:
        if self.device_name and self.device_name != self._sought:
            self._sought = self.device_name
            self._keep_cores()
            self.run_worker(self.find_past(self.device_name), name="past", exit_on_error=False)
            self.ask_cost()
        self._show_draft()

    def _keep_cores(self) -> None:
        """Note how many cores of a CPU can be used; forget rates and times of another number of them."""
        kept = self.remembered
        if self._cores and kept.cores not in (0, self._cores):
            kept.peaks, kept.peaks_of, kept.pace = Peaks(), "", settings.RunSpeed()
        kept.cores = self._cores or kept.cores

    @property
    def _cores(self) -> int | None:
        """Cores of the CPU that computes which the engine may use; None if that is not known, or a GPU computes."""
        device = self.advice.device
        return device.cores if device is not None and device.backend == "cpu" else None


class CostMeter:
    """Times single calls of what is set up, once it has settled; one plan at a time, never beside a run.

    Attributes:
        timing: what is known of the latest plan.
        models: what was timed of plans of models and streams; the times of other plans are in the remembered state.
        enabled: whether anything is timed.
    """

    def __init__(self, app: Lab) -> None:
        self.timing = Timing()
        self.models: dict[ModelPlan, Timing] = {}
        self.enabled = False
        self._app = app
        self._plan: Plan | ModelPlan | None = None
        self._untimed: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._fitted: Draft | None = None
        """The draft that is about to get a size that fits this machine."""

    def of(self, plan: Plan | ModelPlan) -> Timing:
        """Return what is known of a plan."""
        if isinstance(plan, Plan) or plan not in self.models:
            return self.timing if plan == self._plan else Timing()
        return self.models[plan]

    def ask(self, plan: Plan | ModelPlan, changed: Callable[[], None]) -> None:
        """Time calls of a plan after a while, instead of those of an earlier one; `changed` is called at news."""
        if plan == self._plan or not self.enabled or self._app.runs.active:
            return
        if self._fitted is self._app.draft:
            return  # it may be another soon
        self.cancel()
        self._plan, self.timing = plan, self.of(plan)
        app = self._app
        if not isinstance(plan, Plan) and plan in self.models:
            return
        known = cost.known_times(app.remembered.pace, app.device_name)
        if isinstance(plan, Plan) and is_known(plan, known, self._untimed):
            return
        self._task = asyncio.create_task(self._measure(plan, self.timing, changed))

    def fit(self) -> None:
        """Time a call, and set the draft to a size that fits this machine, unless it is changed meanwhile."""
        self.cancel()
        self._fitted = self._app.draft
        self._task = asyncio.create_task(self._fit(self._app.draft))

    async def _fit(self, draft: Draft) -> None:
        app = self._app
        found = await fitting.find(lambda plan, on: app.new_engine(plan, on, cost_only=True))
        self._fitted = self._task = None
        if app.draft is not draft or not app.is_running:
            return
        if found is not None:
            size = found.workload
            app.journal.write(f"batch {size.batch}, length {size.seq} fit this machine, by a timed call")
            draft = draft.set_axis("batch", (size.batch,)).set_axis("seq", (size.seq,)).set_seconds(fitting.SECONDS)
        app.set_draft(structs.replace(draft, changed=False))

    def cancel(self) -> None:
        """End what is being timed."""
        self._fitted = None
        if self._task is not None:
            self._task.cancel()
            self._task = None
            self.timing.running = False
        self._plan = None

    async def _measure(self, plan: Plan | ModelPlan, timing: Timing, changed: Callable[[], None]) -> None:
        await asyncio.sleep(SETTLED_S)
        timing.running = True
        changed()
        engine = self._app.new_engine(plan, lambda event: timing.take(event, plan), cost_only=True)
        try:
            async with asyncio.timeout(MAX_TIMING_S):
                await engine.run()
        except TimeoutError:
            timing.problem = f"compiling and timing a call takes longer than {MAX_TIMING_S:.0f} s"
        finally:
            engine.kill()
            timing.running = False
        if isinstance(plan, Plan):
            self._untimed |= {kind for _, kind in costliest_kinds(plan)} - {kind for kind, *_ in timing.calls}
        else:
            self.models[plan] = timing
        if timing.calls and timing.device:
            remembered = self._app.remembered
            remembered.pace = cost.learn_calls(remembered.pace, timing.device, timing.calls)
        if self._app.is_running:
            changed()


class RunController:
    """The runs of the app, one at a time.

    Attributes:
        session: the current or last run over attention shapes, or None.
        report: the report of the run shown, or None.
        models: the current or last run of each models screen, by the screen's name.
        model_reports: the reports that those screens show, by screen name.
        chosen: the values chosen on them, by screen name and choice.
    """

    def __init__(
        self, app: Lab, make_engine: MakeEngine, clock: Callable[[], float], now: Callable[[], datetime]
    ) -> None:
        self.session: Session | None = None
        self.report: Report | None = None
        self.models: dict[str, ModelSession] = {}
        self.model_reports: dict[str, Report] = {}
        self.chosen: dict[str, dict[str, tuple[str, ...]]] = {}
        self._app = app
        self._make_engine, self._clock, self._now = make_engine, clock, now
        self._latest: Session | None = None
        """The latest run over attention shapes, which goes on if it is opened again."""
        self._current: AnySession | None = None
        self._silence_reported = False
        self._ended: asyncio.Event | None = None

    @property
    def active_session(self) -> AnySession | None:
        """The active run, of any kind, or None."""
        return self._current if self.active else None

    @property
    def active(self) -> bool:
        """Whether a run of any kind is active."""
        return self._current is not None and self._current.active

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
        self.report = None
        self.session = Session(
            plan,
            app.journal,
            self._make_engine,
            command=app.command(command_of(plan, None if app.draft.changed else app.preset)),
            preset=app.draft.name,
            expected_s=cost.estimate_s(plan, app.remembered.pace, app.device_name),
            clock=self._clock,
            now=self._now,
        )
        self._latest = self.session
        app.journal.write(f"run of {app.draft.title()}: {self.session.command}")
        self._go(self.session)
        app.main.open_tab("live")
        app.main.show_draft()  # no call is timed any more
        app.main.show_run()

    @property
    def can_go_on(self) -> bool:
        """Whether the run shown can be measured longer: a past one has no engine's record to go on from."""
        return self.session is not None and self.session.any_rows

    def run_longer(self) -> None:
        """Measure the cases of the last run for LONGER_S more each, together with their rounds so far."""
        app, last = self._app, self.session
        if self._refused():
            return
        if last is None or not self.can_go_on:
            why = "only the latest run can go on" if self.report else "nothing was measured yet"
            app.tell(f"cannot measure longer: {why}; {app.keys['run']} runs what is set up", "warning")
            return
        whole = structs.replace(last.plan, seconds=last.plan.seconds + LONGER_S)
        self.report = None
        self.session = Session(
            structs.replace(last.plan, seconds=LONGER_S, precision=0),
            app.journal,
            self._make_engine,
            command=app.command(command_of(whole, None)),
            preset=app.draft.name if app.draft.runs_as(last.plan) else last.preset,
            clock=self._clock,
            now=self._now,
        )
        self._latest = self.session
        self.session.extend(last)
        app.journal.write(f"{LONGER_S:g} s more a case: {self.session.command}")
        self._go(self.session)
        app.main.show_run()

    def start_model(self, screen: str, plan: ModelPlan, command: str) -> None:
        """Run a plan of a models screen, unless a run is active."""
        if self._refused():
            return
        self.model_reports.pop(screen, None)
        command = self._app.command(command)
        session = ModelSession(
            plan, self._app.journal, self._make_engine, command=command, clock=self._clock, now=self._now
        )
        self.models[screen] = session
        self._app.journal.write(f"run of {plan.cases[0].model or 'a stream'}: {command}")
        self._go(session, screen)

    def _refused(self) -> bool:
        """Whether a run is active; if so, say so."""
        if self.active:
            self._app.tell(f"a run is in progress; {self._app.keys['stop']} stops it", "warning")
        return self.active

    def _go(self, session: AnySession, screen: str | None = None) -> None:
        self._app.costs.cancel()
        self._silence_reported = False
        self._current, self._ended = session, asyncio.Event()
        self._app.run_worker(self._run(session, self._ended, screen), name="run", exit_on_error=False)

    async def _run(self, session: AnySession, ended: asyncio.Event, screen: str | None) -> None:
        try:
            await session.run()
            await self._keep_results(session, screen)
        finally:
            ended.set()
        if any(route.at_most for route in self._app.advice.answer.routes.values()):
            self._app.ask_advice()  # bounds of a kernel that was not compiled, as it may be now
        else:
            self._app.ask_cost()
        if self._app.is_running and screen is None and self.session is session:
            self._app.main.open_tab("results")
            self._app.main.show_draft()
            self._app.main.show_run()

    async def _keep_results(self, session: AnySession, screen: str | None) -> None:
        if self._current is session and session.any_rows:
            report = await asyncio.to_thread(session.report)
            if screen is None and self.session is session:  # no other was begun or opened meanwhile
                self.report = report
            elif screen is not None and self.models.get(screen) is session:
                self.model_reports[screen] = report
            await self._store(report)
            if report.peaks.flops_per_s and report.environment.machine:
                self._app.remembered.peaks, self._app.remembered.peaks_of = report.peaks, report.environment.machine
            if session.phase == "done" and screen is None:
                remembered = self._app.remembered
                remembered.pace = cost.learn(remembered.pace, report, session.rounds_s + session.once_s)
        self._app.journal.write(session.finding or f"the run {session.phase}")

    async def _store(self, report: Report) -> None:
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
        if self._current is None or not self.active:
            self._app.tell("nothing runs")
            return
        self._current.stop()
        self._app.main.show_run()

    def watch_silence(self) -> None:
        """Warn once if the engine has been silent for long."""
        session = self._current
        if session is None or not session.silent:
            self._silence_reported = False
        elif not self._silence_reported:
            self._silence_reported = True
            stop = self._app.keys["stop"]
            text = f"the engine has been silent for {session.silent_s:.0f} s; {stop} stops it and keeps the results"
            self._app.tell(text, "warning")

    async def end(self) -> None:
        """Stop the run, and wait until it has ended and is stored."""
        if self._current is not None and self.active:
            self._current.stop()
        if self._ended is not None:
            await self._ended.wait()

    def kill(self) -> None:
        """Kill the worker process and its children at once."""
        if self._current is not None:
            self._current.kill()

    def show_past(self, report: Report) -> str:
        """Show a past run, which may be the latest again; return its screen, "main" for attention shapes."""
        kinds = {"models": report.models, "finetuning": report.fine_tunings, "streaming": report.streams}
        screen = next((name for name, cases in kinds.items() if cases), "main")
        if screen == "main":
            latest = self._latest
            self.session = latest if latest is not None and latest.id == report.run.id else None
            self.report = report
        else:
            self.models.pop(screen, None)
            self.model_reports[screen] = report
        return screen
