"""The fine-tuning screen: setup, loss curves and rates during the run, and the table."""

from typing import ClassVar, Final

from textual.binding import BindingType
from textual.widget import Widget

from attention.models.workloads import FineTuning
from attention.plan import FineTuningPlan, GenerationPlan
from fatui import actions, figures
from fatui.model_session import ModelSession
from fatui.reproduce import finetune_command
from fatui.screens.model_screen import ModelScreen
from fatui.widgets.choice import Choice
from fatui.widgets.live_pane import ceiling, rate_trends
from fatui.widgets.trend_chart import Scale, Trend, TrendChart

SECONDS: Final = 300.0
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
            Choice("type", ("bfloat16", "float16", "float32"), id="dtype"),
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
        return FineTuningPlan(cases=(case,), implementations=self.implementations, seconds=SECONDS)

    def command(self, plan: GenerationPlan | FineTuningPlan) -> str:
        """Return the command that runs a plan."""
        assert isinstance(plan, FineTuningPlan)
        return finetune_command(plan)

    def draw(self, session: ModelSession) -> None:
        """Draw losses and iterations/s."""
        tokens = session.plan.cases[0].tokens
        top = ceiling(max((series.highest or 0.0 for series in session.rates.values()), default=0.0) / tokens)
        rates = tuple(_per_iteration(trend, tokens, session) for trend in rate_trends(session))
        self.query_one("#tuning-rates", TrendChart).show(Scale("it/s", top, figures.rate(top)), rates)
        highest = max((series.highest or 0.0 for series in session.losses.values()), default=0.0)
        scale = Scale("loss", highest, f"{highest:.2f}", columns=("now", "first"))
        self.query_one("#losses", TrendChart).show(scale, tuple(_loss(name, session) for name in session.plan.ordered))


def _per_iteration(trend: Trend, tokens: int, session: ModelSession) -> Trend:
    """Convert a trend of tokens/s to iterations/s."""
    series = session.rates.get(trend.label)
    if series is None or not trend.points:
        return trend
    points = tuple(point / tokens for point in trend.points)
    now, best = ((value or 0.0) / tokens for value in (series.last, series.highest))
    return Trend(trend.label, points, now=figures.rate(now), best=figures.rate(best))


def _loss(name: str, session: ModelSession) -> Trend:
    series = session.losses.get(name)
    if series is None or not series.points:
        return Trend(name, note="waiting" if session.active else "no losses")
    return Trend(name, tuple(series.points), now=f"{series.last:.3f}", best=f"{series.points[0]:.3f}")
