"""One implementation in the rounds of a model, and what two numbers of layers say of the whole."""

from statistics import median

import mlx.core as mx
from msgspec import Struct, field

from attention.implementations.protocol import Runner
from attention.measure.clock import take_sample
from attention.measure.rounds import Arm
from attention.models.replacing import replaced


class Layers(Struct, frozen=True):
    """Two numbers of layers that run, and the model's."""

    few: int
    many: int
    whole: int
    unfinished: int = 0
    """Of those that run, how many only leave their keys and values, as a prefill's last one does."""

    def estimate(self, few: float, many: float) -> float:
        """A figure of the whole model from those of few and of many layers: a layer's share for each further layer."""
        return max(many + (self.whole - self.many) * self.each(few, many), many)

    def each(self, few: float, many: float) -> float:
        """A layer's share of a figure."""
        return (many - few) / (self.many - self.few)

    def rest(self, few: float, many: float) -> float:
        """What a figure is without layers that do all their work."""
        return many - (self.many - self.unfinished) * self.each(few, many)


class ModelArm(Arm, kw_only=True, eq=False):
    """Samples the whole model, or two numbers of its layers and estimates it from them.

    Attributes:
        short: with fewer layers, where the whole model does not run.
        layers: how many, and how many.
        steps: of one sample; times are those of one step.
        base_bytes: active memory that is not counted: the weights.
        few_s, many_s: seconds of a step with fewer and with all layers that are there, one for each sample.
        peak_bytes: above the base, of the first sample; an estimate where the whole model does not run.
    """

    short: Runner | None
    layers: Layers
    steps: int
    base_bytes: int
    few_s: list[float] = field(default_factory=list)
    many_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def sample(self) -> None:
        """Adds one sample, in seconds a step."""
        first = self.peak_bytes is None
        with replaced(self.name):
            if self.lead_in:
                take_sample(self.runner, 1)
            many, peak = self._timed(self.runner, first)
            few, few_peak = self._timed(self.short, first) if self.short else (many, peak)
        self.many_s.append(many)
        self.few_s.append(few)
        self.samples.append(self.layers.estimate(few, many) if self.short else many)
        if first:
            self.peak_bytes = round(self.layers.estimate(few_peak, peak)) if self.short else peak

    def _timed(self, runner: Runner, with_memory: bool) -> tuple[float, int]:
        """Seconds of a step, and the peak above the base."""
        if with_memory:
            mx.reset_peak_memory()  # sets the peak to 0, not to what is active
        seconds = take_sample(runner, 1) / self.steps
        return seconds, max(0, mx.get_peak_memory() - self.base_bytes)

    @property
    def layer_s(self) -> float:
        """Median seconds of one layer."""
        return median(self.layers.each(few, many) for few, many in zip(self.few_s, self.many_s, strict=True))

    @property
    def fixed_s(self) -> float:
        """Median seconds of all else."""
        return median(self.layers.rest(few, many) for few, many in zip(self.few_s, self.many_s, strict=True))
