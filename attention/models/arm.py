"""One implementation in the rounds of a model, and what two numbers of layers say of the whole."""

from statistics import median
from typing import Protocol

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


class Observer(Protocol):
    """Follows a run of a model, and learns which calls of attention are evaluated."""

    def needed(self) -> None:
        """What comes next reads the output of the latest call of attention."""
        ...

    def unneeded(self) -> None:
        """Nothing reads the output of the latest call of attention."""
        ...


class ModelRun(Runner, Protocol):
    """A run of a model, which the clock can repeat from the same state.

    Attributes:
        observer: who follows it, if anyone does.
    """

    observer: Observer | None

    def prepare(self) -> None:
        """Restores the state that the next run starts from; outside of any clock.

        Raises:
            StateChanged: it is not the one that the first run started from.
        """
        ...


class ModelArm(Arm, kw_only=True, eq=False):
    """Samples the whole model, or two numbers of its layers and estimates it from them.

    Attributes:
        implementation: what is put in the place of the model's attention; the name may say that it is the second arm.
        short: with fewer layers, where the whole model does not run.
        layers: how many, and how many.
        steps: of one sample; times are those of one step.
        base_bytes: active memory that is not counted: the weights.
        further_bytes: what the layers that do not run would keep: their keys and values.
        few_s, many_s: seconds of a step with fewer and with all layers that are there, one for each sample.
        peak_bytes: above the base, of the first sample, and the further bytes.
    """

    runner: ModelRun
    implementation: str
    short: ModelRun | None
    layers: Layers
    steps: int
    base_bytes: int
    further_bytes: int
    few_s: list[float] = field(default_factory=list)
    many_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        """Gives a second arm, made from this one, figures of its own."""
        self.few_s, self.many_s = [*self.few_s], [*self.many_s]

    def sample(self) -> None:
        """Adds one sample, in seconds a step."""
        with replaced(self.implementation):
            if self.lead_in:
                self._timed(self.runner)
            if self.peak_bytes is None:
                mx.reset_peak_memory()  # sets the peak to 0, not to what is active
            many = self._timed(self.runner)
            if self.peak_bytes is None:
                self.peak_bytes = max(0, mx.get_peak_memory() - self.base_bytes) + self.further_bytes
            few = self._timed(self.short) if self.short else None
        self.take(many, few)

    def take(self, many: float, few: float | None) -> None:
        """Add a sample from the seconds of a step with all layers that are there, and with fewer where those run."""
        few = many if few is None else few
        self.many_s.append(many)
        self.few_s.append(few)
        self.samples.append(self.layers.estimate(few, many) if self.short else many)

    def _timed(self, runner: ModelRun) -> float:
        runner.prepare()
        return take_sample(runner, 1) / self.steps

    @property
    def layer_s(self) -> float:
        """Median seconds of one layer."""
        return median(self.layers.each(few, many) for few, many in zip(self.few_s, self.many_s, strict=True))

    @property
    def fixed_s(self) -> float:
        """Median seconds of all else."""
        return median(self.layers.rest(few, many) for few, many in zip(self.few_s, self.many_s, strict=True))
