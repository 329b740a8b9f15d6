"""The app's view of a model run."""

from attention import events as on
from attention.plan import FineTuningPlan, GenerationPlan
from attention.report import FineTuningCase, ModelCase, Report
from fatui.narrate import expected
from fatui.series import Series
from fatui.session import RunSession


class ModelSession(RunSession[GenerationPlan | FineTuningPlan, ModelCase | FineTuningCase]):
    """A run of generation or fine-tuning.

    Attributes:
        losses: the training losses of each implementation so far.
        said: the worker's latest message: the expected time of a case, or how to shorten it.
    """

    losses: dict[str, Series]
    said: str

    def _start_clock(self) -> None:
        super()._start_clock()
        self.said = ""
        self.losses = {}

    def case(self, index: int) -> ModelCase | FineTuningCase:
        """Return the rows of one case."""
        final = self._final.get(index)
        made: ModelCase | FineTuningCase = final if final else self.record.case(index)
        return made

    def report(self) -> Report:
        """Return the report of the run so far, as stored in the history and in exports."""
        return self.record.report(self._of_run())

    def _begin_case(self, case: int) -> None:
        super()._begin_case(case)
        self.losses = {}

    def _listen(self, event: on.AnyEvent) -> None:
        super()._listen(event)
        if isinstance(event, on.Message):
            self.said = event.text
        elif isinstance(event, on.Expected):
            self.said = expected(event)
        if isinstance(event, on.IterationDone) and event.implementation != on.AGAIN:
            tokens = self.plan.cases[event.case].tokens
            if event.number > 1:  # the first one compiles
                self.rates.setdefault(event.implementation, Series()).add(tokens / event.seconds)
            if event.loss is not None:
                self.losses.setdefault(event.implementation, Series()).add(event.loss)
            self.note_memory("MLX active", event.active_bytes)
            self.note_memory("MLX peak", event.peak_bytes)
