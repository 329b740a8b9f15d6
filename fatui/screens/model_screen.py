"""The layout shared by the model screens: the setup at the top, the run below it, the table at the bottom."""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input, Static

from attention.errors import NoBackendError, UsageError
from attention.models.configuration import check_mlx_lm, find, names
from attention.models.workloads import COMPARED
from attention.plan import FineTuningPlan, GenerationPlan
from attention.report import Report
from fatui import actions
from fatui.ascii import literal
from fatui.model_session import ModelSession
from fatui.status import SPINNER
from fatui.table import report_table
from fatui.widgets.choice import Choice
from fatui.widgets.key_bar import KeyBar
from fatui.widgets.live_pane import progress_line
from fatui.widgets.status_line import StatusLine
from fatui.widgets.toggles import Toggles

if TYPE_CHECKING:
    from fatui.app import FatuiApp

IDLE: Final = "{run} runs the setup above; a timed call then estimates the total, before the rounds start."
ROOMY: Final = 34
"""Minimum terminal rows at which the charts of a finished run stay visible above its table."""
FOLDER: Final = "a folder with config.json and weights; enter adds it"


class ModelScreen(Screen[None]):
    """Screen that sets up, runs and shows a model; the choices and the last run survive when it is closed."""

    CSS_PATH: ClassVar = ["list.tcss", "model_screen.tcss"]
    TITLE_TEXT: ClassVar[str]
    NAME: ClassVar[str]
    """The screen's name in the app's actions."""
    app: "FatuiApp"

    def __init__(self) -> None:
        super().__init__(classes="list-screen")

    def compose(self) -> ComposeResult:
        """Yield the choices, the run and the table."""
        chosen = self.app.runs.chosen.get(self.NAME, {})
        yield StatusLine()
        with Vertical(classes="pane", id="setup-pane") as pane:
            pane.border_title = self.TITLE_TEXT
            with Widget(id="choices"):
                yield from (self._restored(choice, chosen) for choice in (self._model_choice(chosen), *self.choices()))
            yield Toggles(COMPARED, chosen.get("implementations", COMPARED), id="implementations")
            yield Input(placeholder=FOLDER, id="folder")
        with Vertical(classes="pane", id="live-pane") as pane:
            pane.border_title = "Live"
            yield Static(id="progress", markup=False)
            with Widget(id="charts"):
                yield from self.charts()
        with VerticalScroll(classes="pane", id="table-pane") as pane:
            pane.border_title = "Comparison"
            yield Static(id="model-table", markup=False)
        yield KeyBar(keys=actions.bar(actions.FURTHER[self.NAME], self.app.keys))

    @abstractmethod
    def choices(self) -> list[Choice]:
        """Return the choices besides the model and the implementations."""

    @abstractmethod
    def charts(self) -> list[Widget]:
        """Return the charts of a run."""

    @abstractmethod
    def plan(self) -> GenerationPlan | FineTuningPlan:
        """Build the plan from the choices; raise UsageError if it cannot run."""

    @abstractmethod
    def command(self, plan: GenerationPlan | FineTuningPlan) -> str:
        """Return the command that runs a plan."""

    @abstractmethod
    def draw(self, session: ModelSession) -> None:
        """Draw the charts of a run."""

    def _model_choice(self, chosen: dict[str, tuple[str, ...]]) -> Choice:
        known = tuple(dict.fromkeys((*names(), *chosen.get("model", ()))))
        return Choice("model", known, id="model")

    def _restored(self, choice: Choice, chosen: dict[str, tuple[str, ...]]) -> Choice:
        if choice.id in chosen:
            choice.show(chosen[choice.id])
        return choice

    def on_mount(self) -> None:
        """Draw the initial state, and start the repaint timer."""
        self.query_one("#folder").display = False
        self.query_one("#model").focus()
        self._show()
        self.set_interval(self.app.REPAINT_S, self._show)

    @property
    def session(self) -> ModelSession | None:
        """The current or last run of this screen."""
        return self.app.runs.models.get(self.NAME)

    @property
    def report(self) -> Report | None:
        """The report that export and copy use, of a finished run."""
        return self.app.runs.model_reports.get(self.NAME)

    def chosen(self, name: str) -> str:
        """Return the value of a choice."""
        return self.query_one(f"#{name}", Choice).value

    def numbers(self, name: str) -> list[int]:
        """Return the comma-separated whole numbers of a choice."""
        return [int(part) for part in self.chosen(name).split(",")]

    @property
    def implementations(self) -> tuple[str, ...]:
        """The selected implementations."""
        return self.query_one(Toggles).chosen

    def model_layers(self) -> int:
        """Return the number of layers of the chosen model."""
        return find(self.chosen("model")).layers

    def action_run(self) -> None:
        """Run the plan that is set up."""
        try:
            check_mlx_lm()
            plan = self.plan()
        except (UsageError, NoBackendError) as error:
            self.app.tell(f"cannot run: {'; '.join(str(error).splitlines())}", "warning")
            return
        self.app.runs.start_model(self.NAME, plan, self.command(plan))
        self._show()

    def action_folder(self) -> None:
        """Show the input for a model folder."""
        box = self.query_one("#folder", Input)
        box.display = True
        box.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Add the folder to the models, and choose it."""
        choice = self.query_one("#model", Choice)
        try:
            find(event.value)
        except UsageError as error:
            self.app.tell(str(error), "warning")
            return
        choice.options = tuple(dict.fromkeys((*choice.options, event.value)))
        choice.show((event.value,))
        event.input.display = False
        choice.focus()
        self._keep()

    def on_choice_changed(self) -> None:
        """Remember the choices."""
        self._keep()

    def on_toggles_changed(self) -> None:
        """Remember the choices."""
        self._keep()

    def _keep(self) -> None:
        values = {choice.id or "": choice.values for choice in self.query(Choice)}
        self.app.runs.chosen[self.NAME] = {**values, "implementations": self.implementations}

    def action_back(self) -> None:
        """Hide the folder input, or close the screen; a run continues."""
        box = self.query_one("#folder", Input)
        if box.display:
            box.display = False
            self.query_one("#model").focus()
        else:
            self.dismiss()

    def on_resize(self) -> None:
        """Fit the table to the new width."""
        self.call_after_refresh(self._show)

    def _show(self) -> None:
        session, report = self.session, self.report
        if session is not None:
            said = session.said if session.active else ""
            self.query_one("#progress", Static).update("\n".join(filter(None, (progress_line(session), said))))
            self.draw(session)
            report = report or session.report()
            number = session.case_number
            label = session.plan.cases[number].label if number is not None else ""
            self.query_one("#live-pane").border_title = literal(f"Live · {label}" if label else "Live")
        else:
            run = self.app.keys[f"{self.NAME}_run"]
            self.query_one("#progress", Static).update(IDLE.format(run=run))
        over = session is None or (not session.active and self.app.size.height < ROOMY)
        self.query_one("#live-pane").set_class(over, "-idle")
        self.query_one(StatusLine).show(self.TITLE_TEXT, _phase(session))
        pane = self.query_one("#table-pane")
        width = max(40, pane.content_size.width - 2)  # a scroll bar may come
        shown = report_table(report, width=width) if report and report.all_cases else "Nothing measured yet."
        self.query_one("#model-table", Static).update(shown)


def _phase(session: ModelSession | None) -> str:
    if session is None:
        return "ready"
    turn = f" {SPINNER[int(session.elapsed_s * 2) % len(SPINNER)]}" if session.active else ""
    return f"{session.phase}{turn}"
