"""The layout shared by the model screens: the setup at the top, the run below it, the table at the bottom."""

from abc import abstractmethod
from typing import ClassVar, Final

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.events import Mount
from textual.widget import Widget
from textual.widgets import Input

from attention.core.errors import NoBackendError, UsageError
from attention.core.plan import MODEL_IMPLEMENTATIONS, FineTuningPlan, GenerationPlan, ModelPlan
from attention.core.results import Report
from attention.core.workload import FineTuning, generations
from attention.mlx_lm.configuration import bundled_names, check_mlx_lm, find_model
from fatui import formatting
from fatui.reproduce import finetune_command, model_command
from fatui.tui import actions
from fatui.tui.lab import TABLE_TICKS, Lab
from fatui.tui.painting import SparingScreen, TextLines, set_title
from fatui.tui.screens.base import AppScreen
from fatui.tui.screens.tables import HasTable
from fatui.tui.view_models import cost, kv_format, model_lines, table_lines
from fatui.tui.view_models.session import ModelSession
from fatui.tui.view_models.table_lines import TableColumn
from fatui.tui.view_models.trends import (
    Scale,
    Trend,
    ceiling,
    from_zero,
    latest,
    progress_line,
    rate_chart,
    rate_trends,
)
from fatui.tui.widgets.bars import SPINNER, KeyBar, StatusLine
from fatui.tui.widgets.charts import TrendChart
from fatui.tui.widgets.choice import Choice, Toggles
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.table_pane import TablePane
from fatui.tui.widgets.text_panes import CostBlock, VerdictCard

IDLE: Final = "{run} runs what is set up; speed, memory and progress are shown here during the run."
ROOMY: Final = 34
"""Minimum terminal rows at which the charts of a finished run stay visible above its table."""
MODEL_DTYPES: Final = ("bfloat16", "float16", "float32")
FOLDER: Final = "a folder with config.json and weights; enter adds it"

NOTHING_YET: Final = "Nothing measured yet; rows appear here as they are measured."
MIN_WIDTH: Final = 40
"""Columns of text for the notes before the pane has a size."""
FIRST_COLUMN: Final = (TableColumn(name=model_lines.NAME, title="", right=False),)


class ModelTable(TablePane):
    """Pane with the rows of the current run of a models screen, or of a past one."""

    def __init__(self, *, id: str) -> None:
        super().__init__(FIRST_COLUMN, empty=NOTHING_YET, table="model-rows", id=id)
        self.border_title = "Comparison"

    def compose(self) -> ComposeResult:
        """Yield the table, its legend, and the verdict below it."""
        yield from super().compose()
        yield VerdictCard()

    def refer_to(self, name: str) -> None:
        """Show speedups over an implementation; over each case's own reference again if it was that already."""
        self.reference = None if name == self.reference else name

    def show_run(self, report: Report, session: ModelSession | None, keys: dict[str, str], *, curves: bool) -> None:
        """Draw a report, complete or so far.

        Args:
            report: the run.
            session: the run that made it, if it is this app's.
            keys: the key of each action.
            curves: whether the curves of a stream are drawn below its rows.
        """
        lines = model_lines.lines_of(
            report, self.reference, max(MIN_WIDTH, self.table.content_size.width), curves=curves
        )
        cases = model_lines.cases_of(report, None)
        number = session.case_number if session is not None and session.active else None
        if session is not None and number is not None:
            there = {line.key for line in lines}
            waiting = [
                (name, row.step or "")
                for name, row in session.record.cases[number].rows.items()
                if table_lines.row_key(number, name) not in there
            ]
            lines += table_lines.waiting_lines(number, waiting)
        self.show_lines(lines, model_lines.columns_of(cases) if cases else None)
        only = f" · {cases[0].workload.label}{table_lines.notes(cases[0])}" if len(cases) == 1 else ""
        set_title(self, f"Comparison{only}")
        card = self.query_one(VerdictCard)
        if session is not None and session.active:
            card.clear()
        elif session is not None and session.phase in ("refused", "failed"):
            card.say(session.finding, bad=True)
        else:
            card.show(self.over_reference_of(report), self.content_size.height, self.table.last_row, keys)

    def _hints(self) -> list[str]:
        over = [f"over {self.reference}"] if self.reference else []
        return [*super()._hints(), *([*over, "o sort", "enter a row"] if self.table.lines else [])]


class ModelScreen(HasTable, AppScreen, SparingScreen[None]):
    """Screen that sets up, runs and shows a model; the choices and the last run survive when it is closed."""

    CSS_PATH: ClassVar = ["list.tcss", "model_screen.tcss"]
    TITLE_TEXT: ClassVar[str]
    NAME: ClassVar[str]
    """The screen's name in the app's actions."""
    ROWS: ClassVar[tuple[str, ...]] = MODEL_IMPLEMENTATIONS
    """What can be selected to be measured."""
    IDLE_TEXT: ClassVar[str] = IDLE
    """Shown before the first run."""
    DRAWS_OFTEN: ClassVar[bool] = True
    """Whether the charts are drawn at each tick, not only with the table."""
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._cost_of: ModelPlan | None = None
        self._drawn: object = None
        """The run on the screen, its phase and its report, when it was drawn last."""
        self._ticks = 0
        self._hint = ""

    def compose(self) -> ComposeResult:
        """Yield the choices, the run and the table."""
        chosen = self.app.runs.chosen.get(self.NAME, {})
        yield StatusLine()
        with Vertical(classes="pane", id="setup-pane") as pane:
            pane.border_title = self.TITLE_TEXT
            with Widget(id="choices"):
                yield from (self._restored(choice, chosen) for choice in (self._model_choice(chosen), *self.choices()))
            yield Toggles(self.ROWS, chosen.get("implementations", self.ROWS), id="implementations")
            yield Input(placeholder=FOLDER, id="folder")
            yield CostBlock()
        with Vertical(classes="pane", id="live-pane") as pane:
            pane.border_title = "Live"
            yield TextLines(id="progress")
            with Widget(id="charts"):
                yield from self.charts()
        yield ModelTable(id="table-pane")
        yield KeyBar(keys=actions.bar(actions.FURTHER[self.NAME], self.app.keys))

    @abstractmethod
    def choices(self) -> list[Choice]:
        """Return the choices besides the model and the implementations."""

    @abstractmethod
    def charts(self) -> list[Widget]:
        """Return the charts of a run."""

    @abstractmethod
    def plan(self) -> ModelPlan:
        """Build the plan from the choices; raise UsageError if it cannot run."""

    @abstractmethod
    def command(self, plan: ModelPlan) -> str:
        """Return the command that runs a plan."""

    @abstractmethod
    def draw(self, session: ModelSession) -> None:
        """Draw the charts of a run."""

    def dtypes(self) -> tuple[str, ...]:
        """Return the types of a model's weights, the default first."""
        return MODEL_DTYPES[::-1] if self.app.computes_on_cpu else MODEL_DTYPES

    def _model_choice(self, chosen: dict[str, tuple[str, ...]]) -> Choice:
        known = tuple(dict.fromkeys((*bundled_names(), *chosen.get("model", ()))))
        return Choice("model", known, id="model")

    def _restored(self, choice: Choice, chosen: dict[str, tuple[str, ...]]) -> Choice:
        if choice.id in chosen:
            choice.show(chosen[choice.id])
        return choice

    def on_mount(self) -> None:
        """Draw the initial state, and start the repaint timer."""
        self.query_one("#folder").display = False
        self.query_one(RowTable if self.report else "#model").focus()
        self._ask_cost()
        self._show()
        self.set_interval(self.app.REPAINT_S, self._tick)

    def _tick(self) -> None:
        """Draw the run as long as it goes on, and once what it has ended with."""
        session = self.session
        active = session is not None and session.active
        state = (session, session.phase if session else "", self.report)
        self._ticks += 1
        affordable = self.app.repaints.allows()
        if state != self._drawn or (active and self._ticks % TABLE_TICKS == 0):
            if self._drawn is not None and not active:
                self._ask_cost()  # the run ended the timing of calls
            self._show()
            self._drawn = state
        elif session is not None and active and affordable:
            self._show_progress()
            if self.DRAWS_OFTEN:
                self.draw(session)

    @property
    def session(self) -> ModelSession | None:
        """The current or last run of this screen."""
        return self.app.runs.models.get(self.NAME)

    @property
    def report(self) -> Report | None:
        """The report of a finished run."""
        return self.app.runs.model_reports.get(self.NAME)

    @property
    def shown_report(self) -> Report | None:
        """The report that export and copy use: as the table shows it."""
        return self.report and self.query_one(ModelTable).over_reference_of(self.report)

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
        return find_model(self.chosen("model")).layers

    def action_run(self) -> None:
        """Run the plan that is set up."""
        try:
            self.check_available()
            plan = self.plan()
        except (UsageError, NoBackendError) as error:
            self.app.tell(f"{cost.CANNOT}{_reason(error)}", "warning")
            return
        self.app.runs.start_model(self.NAME, plan, self.command(plan))
        self.query_one(RowTable).focus()
        self._show()

    def check_available(self) -> None:
        """Raise NoBackendError if what is set up needs something that is not installed."""
        if self.app.remote is None:
            check_mlx_lm()

    def action_folder(self) -> None:
        """Show the input for a model folder."""
        box = self.query_one("#folder", Input)
        box.display = True
        box.focus()

    def action_other_pane(self) -> None:
        """Go to the table, or from there to the setup."""
        self.query_one("#setup-pane").remove_class("-away")  # so that it can take the focus
        self.query_one("#model" if self.query_one(RowTable).has_focus else RowTable).focus()
        self.call_after_refresh(self._show)

    @on(TablePane.ReferenceRequested)
    def _take_reference(self, event: TablePane.ReferenceRequested) -> None:
        """Show speedups over the row under the cursor, or as before."""
        _, name = table_lines.split_key(event.key)
        self.query_one(ModelTable).refer_to(name)
        self._show()

    @on(RowTable.Chosen)
    def _open_row(self, event: RowTable.Chosen) -> None:
        """Show the details of a row."""
        report, pane = self._shown_report, self.query_one(ModelTable)
        index, name = table_lines.split_key(event.key or "0:")
        cases = model_lines.cases_of(report, pane.reference) if report is not None else []
        case = cases[index] if index < len(cases) else None
        row = next((row for row in case.rows if row.implementation == name), None) if case is not None else None
        if report is None or case is None or row is None:
            self.app.tell(f"{name} has no figures yet")
            return
        from fatui.tui.screens.dialogs import RowDetails

        command = self.session.command if self.session is not None else report.run.command
        self.app.push_screen(RowDetails(case, row, command))

    @on(Input.Submitted, "#folder")
    def _add_folder(self, event: Input.Submitted) -> None:
        """Add the folder to the models, and choose it."""
        choice = self.query_one("#model", Choice)
        try:
            find_model(event.value)
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

    def on_choice_refused(self, event: Choice.Refused) -> None:
        """Say why typed digits make no option."""
        self.app.tell(event.reason, "warning")

    def on_toggles_changed(self) -> None:
        """Remember the choices."""
        self._keep()

    def _keep(self) -> None:
        values = {choice.id or "": choice.values for choice in self.query(Choice)}
        self.app.runs.chosen[self.NAME] = {**values, "implementations": self.implementations}
        self._ask_cost()

    def _ask_cost(self) -> None:
        """Estimate what the choices would take, once they have settled."""
        try:
            self.check_available()
            self._cost_of = self.plan()
        except (UsageError, NoBackendError, ValueError) as error:
            self._cost_of = None
            self.query_one(CostBlock).show([f"{cost.CANNOT}{_reason(error)}"])
            return
        self.app.costs.ask(self._cost_of, self._show_cost)
        self._show_cost()

    def _show_cost(self) -> None:
        """Draw what a run would take, before it."""
        if self.is_mounted and self._cost_of is not None:
            shown = not (self.session is not None and self.session.active)
            lines = cost.model_lines(self._cost_of, self.app.costs.of(self._cost_of)) if shown else []
            self.query_one(CostBlock).show([*lines, *self.notes()] if shown else [])

    def notes(self) -> list[str]:
        """Return what else is to be known of the set-up, in lines."""
        return []

    def action_back(self) -> None:
        """Close the filter, hide the folder input, or close the screen; a run continues."""
        box = self.query_one("#folder", Input)
        if self.query_one(ModelTable).clear_filter():
            return
        if box.display:
            box.display = False
            self.query_one("#model").focus()
        else:
            self.dismiss()

    def on_resize(self) -> None:
        """Fit the table to the new width."""
        self.call_after_refresh(self._show)

    def _show_progress(self) -> None:
        """Draw what changes with each tick of a run."""
        session = self.session
        if session is not None:
            message = session.message if session.active else ""
            self.query_one(TextLines).show("\n".join(filter(None, (progress_line(session), message))))
            number = session.case_number
            label = session.plan.cases[number].label if number is not None else ""
            set_title(self.query_one("#live-pane"), f"Live · {label}" if label else "Live")
        else:
            run = self.app.keys[f"{self.NAME}_run"]
            self.query_one(TextLines).show(self.IDLE_TEXT.format(run=run))
        self.query_one(StatusLine).show(f"{self.TITLE_TEXT}{self._hint}", _phase(session))

    def _show(self) -> None:
        session, report = self.session, self._shown_report
        self._show_cost()
        short = self.app.size.height < ROOMY
        over = session is None or (not session.active and short)
        self.query_one("#live-pane").set_class(over, "-idle")
        self.query_one("#live-pane").set_class(report is not None and over and short, "-away")
        folded = short and report is not None and self.query_one(ModelTable).has_pseudo_class("focus-within")
        self.query_one("#setup-pane").set_class(folded, "-away")
        self._hint = f" · {self.app.keys[f'{self.NAME}_pane']} shows what is set up" if folded else ""
        self._show_progress()
        if session is not None:
            self.draw(session)
        if report is not None:
            self.query_one(ModelTable).show_run(report, session, self.app.keys, curves=self.draws_curves)

    @property
    def _shown_report(self) -> Report | None:
        """The finished run, or the current one so far."""
        return self.report or (self.session.report() if self.session is not None else None)

    @property
    def draws_curves(self) -> bool:
        """Whether curves are drawn below the rows of a stream, as there is no room for its charts."""
        return False


def _reason(error: Exception) -> str:
    """Format why what is set up cannot run, in one line."""
    text = formatting.problem_text(error) if isinstance(error, NoBackendError) else str(error)
    return "; ".join(text.splitlines())


def _phase(session: ModelSession | None) -> str:
    if session is None:
        return "ready"
    turn = f" {SPINNER[int(session.elapsed_s * 2) % len(SPINNER)]}" if session.active else ""
    return f"{session.phase_text}{turn}"


WHOLE: Final = "all"
ONE_DEVICE: Final = ("1",)


class Models(ModelScreen):
    """Screen that measures prefill and decode of a model with each implementation."""

    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.MODELS), actions.closing("models")]
    TITLE_TEXT = "Models"
    NAME = "models"

    def choices(self) -> list[Choice]:
        """Return the choices of prompt lengths, tokens, layers, batch, dtype, K/V and devices; others can be typed."""
        return [
            Choice("prompt", ("512", "128", "2048", "8192", "512,2048", "2048,8192"), id="prompt", typed_option=str),
            Choice("generate", ("64", "8", "16", "256"), id="generate", typed_option=str),
            Choice("layers", (WHOLE, "2", "4", "8"), id="layers", typed_option=str),
            Choice("batch", ("1", "4", "16"), id="batch", typed_option=str),
            Choice("type", self.dtypes(), id="dtype"),
            Choice("K/V bits", kv_format.options(()), id="kv_format", typing=kv_format, say=self._say_format),
            Choice("devices", ONE_DEVICE, id="ranks"),
        ]

    @on(Mount)
    @on(Choice.Changed)
    def _offer_formats(self) -> None:
        """Offer formats of keys and values whose groups divide the heads of the model."""
        choice = self.query_one("#kv_format", Choice)
        try:
            offered = kv_format.options((find_model(self.chosen("model")).head_dim,))
        except UsageError:  # its folder is gone: reported when it is run
            return
        same = dict(zip(choice.options, offered, strict=True))
        choice.show(tuple(same.get(value, value) for value in choice.values), options=offered)

    def _offer_devices(self) -> None:
        """Offer as many devices as this machine has, or the remote one, once that is known."""
        choice, device = self.query_one("#ranks", Choice), self.app.advice.device
        offered = tuple(map(str, range(1, (device.max_ranks if device else 1) + 1)))
        if choice.options != offered:
            choice.show(choice.values, options=offered)
        choice.display = offered != ONE_DEVICE or choice.values != ONE_DEVICE  # of one there is nothing to choose

    def _show(self) -> None:
        self._offer_devices()
        super()._show()

    def _say_format(self, text: str) -> str:
        return kv_format.say(text, self.query_one("#dtype", Choice).value)  # type: ignore[arg-type]  # one of its options

    def charts(self) -> list[Widget]:
        """Return the chart of the current phase's tokens/s."""
        return [TrendChart(Scale("tokens/s"), id="model-rates")]

    def plan(self) -> GenerationPlan:
        """Build the plan from the choices."""
        layers, configuration = self.chosen("layers"), find_model(self.chosen("model"))
        configuration.check_kv_format(self.chosen("kv_format"))
        cases = generations(
            configuration.layers,
            model=self.chosen("model"),
            kv_formats=(self.chosen("kv_format"),),
            prompts=self.numbers("prompt"),
            batches=self.numbers("batch"),
            generate=self.numbers("generate")[0],
            measured_layers=None if layers == WHOLE else int(layers),
            dtype=self.chosen("dtype"),
            ranks=int(self.chosen("ranks")),
        )
        return GenerationPlan(cases=cases, implementations=self.implementations)

    def command(self, plan: ModelPlan) -> str:
        """Return the command that runs a plan."""
        assert isinstance(plan, GenerationPlan)
        return model_command(plan)

    def draw(self, session: ModelSession) -> None:
        """Draw tokens/s."""
        self.query_one("#model-rates", TrendChart).show(*rate_chart(session))


TUNED_LAYERS: Final = 16


class FineTunings(ModelScreen):
    """Screen that fine-tunes one model with each implementation."""

    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.FINETUNING), actions.closing("finetuning")]
    TITLE_TEXT = "Fine-tuning"
    NAME = "finetuning"

    def choices(self) -> list[Choice]:
        """Return the choices of iterations, sequence length, batch, rank and dtype; other values can be typed."""
        return [
            Choice("iters", ("100", "20", "50", "500"), id="iters", typed_option=str),
            Choice("seq", ("512", "128", "1024", "2048"), id="seq", typed_option=str),
            Choice("batch", ("4", "1", "2", "8"), id="batch", typed_option=str),
            Choice("rank", ("8", "4", "16", "64"), id="rank", typed_option=str),
            Choice("type", self.dtypes(), id="dtype"),
        ]

    def charts(self) -> list[Widget]:
        """Return the charts of losses and iterations/s."""
        return [TrendChart(Scale("loss"), id="losses"), TrendChart(Scale("it/s"), id="tuning-rates")]

    def plan(self) -> FineTuningPlan:
        """Build the plan from the choices."""
        layers = self.model_layers()
        iters, seq, batch, rank = (self.numbers(name)[0] for name in ("iters", "seq", "batch", "rank"))
        case = FineTuning(
            model=self.chosen("model"),
            layers=layers,
            tuned_layers=min(TUNED_LAYERS, layers),
            dtype=self.chosen("dtype"),  # type: ignore[arg-type]  # checked as it is made
            iters=iters,
            seq=seq,
            batch=batch,
            rank=rank,
        )
        return FineTuningPlan(cases=(case,), implementations=self.implementations)

    def command(self, plan: ModelPlan) -> str:
        """Return the command that runs a plan."""
        assert isinstance(plan, FineTuningPlan)
        return finetune_command(plan)

    def draw(self, session: ModelSession) -> None:
        """Draw losses and iterations/s."""
        tokens = session.plan.cases[0].tokens
        top = ceiling(max((series.highest or 0.0 for series in session.rates.values()), default=0.0) / tokens)
        rates = tuple(_per_iteration(trend, tokens, session) for trend in rate_trends(session))
        self.query_one("#tuning-rates", TrendChart).show(from_zero("it/s", top, session), rates)
        highest = max((series.highest or 0.0 for series in session.losses.values()), default=0.0)
        scale = Scale("loss", highest, f"0 to {highest:.2f}" if highest else "", columns=(latest(session), "first"))
        self.query_one("#losses", TrendChart).show(scale, tuple(_loss(name, session) for name in session.plan.ordered))


def _per_iteration(trend: Trend, tokens: int, session: ModelSession) -> Trend:
    """Convert a trend of tokens/s to iterations/s."""
    series = session.rates.get(trend.label)
    if series is None or not trend.points:
        return trend
    points = tuple(point / tokens for point in trend.points)
    now, best = ((value or 0.0) / tokens for value in (series.last, series.highest))
    return Trend(trend.label, points, now=formatting.rate(now), best=formatting.rate(best))


def _loss(name: str, session: ModelSession) -> Trend:
    series = session.losses.get(name)
    if series is None or not series.points:
        return Trend(name, note="waiting" if session.active else "no losses")
    return Trend(name, tuple(series.points), now=f"{series.last:.3f}", best=f"{series.points[0]:.3f}")
