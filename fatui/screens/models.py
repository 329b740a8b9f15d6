"""The models screen: generation with whole models, tokens/s during the run, and the table."""

from typing import ClassVar, Final

from textual.binding import BindingType
from textual.widget import Widget

from attention.models.workloads import generations
from attention.plan import FineTuningPlan, GenerationPlan
from fatui import actions, figures
from fatui.model_session import ModelSession
from fatui.reproduce import model_command
from fatui.screens.model_screen import ModelScreen
from fatui.widgets.choice import Choice
from fatui.widgets.live_pane import ceiling, rate_trends
from fatui.widgets.trend_chart import Scale, TrendChart

WHOLE: Final = "all"
SECONDS: Final = 10.0


class Models(ModelScreen):
    """Screen that measures prefill and decode of a model with each implementation."""

    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.MODELS), actions.closing("models")]
    TITLE_TEXT = "Models"
    NAME = "models"

    def choices(self) -> list[Choice]:
        """Return the choices of prompt lengths, generated tokens, layers, batch and dtype; others can be typed."""
        return [
            Choice("prompt", ("512", "128", "2048", "8192", "512,2048", "2048,8192"), id="prompt", typed_option=str),
            Choice("generate", ("64", "8", "16", "256"), id="generate", typed_option=str),
            Choice("layers", (WHOLE, "2", "4", "8"), id="layers", typed_option=str),
            Choice("batch", ("1", "4", "16"), id="batch", typed_option=str),
            Choice("type", ("bfloat16", "float16", "float32"), id="dtype"),
        ]

    def charts(self) -> list[Widget]:
        """Return the chart of the current phase's tokens/s."""
        return [TrendChart(Scale("tokens/s"), id="model-rates")]

    def plan(self) -> GenerationPlan:
        """Build the plan from the choices."""
        layers = self.chosen("layers")
        cases = generations(
            self.model_layers(),
            model=self.chosen("model"),
            prompts=self.numbers("prompt"),
            batches=self.numbers("batch"),
            generate=self.numbers("generate")[0],
            measured_layers=None if layers == WHOLE else int(layers),
            dtype=self.chosen("dtype"),
        )
        return GenerationPlan(cases=cases, implementations=self.implementations, seconds=SECONDS)

    def command(self, plan: GenerationPlan | FineTuningPlan) -> str:
        """Return the command that runs a plan."""
        assert isinstance(plan, GenerationPlan)
        return model_command(plan)

    def draw(self, session: ModelSession) -> None:
        """Draw tokens/s."""
        top = ceiling(max((series.highest or 0.0 for series in session.rates.values()), default=0.0))
        self.query_one("#model-rates", TrendChart).show(Scale("tokens/s", top, figures.rate(top)), rate_trends(session))
