"""One pass of a model for all implementations: each attends in it, and they share the time of all the rest.

A pass of a model takes seconds where matrix products are slow, nearly all of them in what is the same for every
implementation. In a shared pass every call of attention is evaluated by all of them, one after another, and one of the
outputs goes on. An implementation's time is that of the rest of the pass and of its own calls, which is what a pass of
its own takes on a device that runs one operation at a time, as MLX's CPU backend does; the rest has the same noise in
all of them, and leaves the ratios.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten
from msgspec import Struct, field

from attention.measure.clock import Clock, Runner, take_sample
from attention.measure.rounds import Arm
from attention.mlx_lm.replacement import replace_attention
from attention.monitoring import patch_points


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
        with replace_attention(self.implementation):
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


class NotShareable(Exception):
    """The model does not attend through mlx-lm's function, or not only."""


class _Call:
    """A call of attention whose output is not known to be needed yet."""

    def __init__(self, args: tuple[Any, ...], named: dict[str, Any], out: mx.array, built_s: float) -> None:
        self.args, self.named, self.out, self.built_s = args, named, out, built_s


class SharedPass:
    """Runs passes in which several implementations attend; the first one's outputs go on.

    Attributes:
        seconds: of the latest pass, all implementations included.
    """

    def __init__(
        self,
        runs: Mapping[str, ModelRun],
        arms: Mapping[str, str],
        *,
        seed: int,
        at_work: Callable[[str], None] = lambda name: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Take what to run and who attends; nothing runs yet.

        Args:
            runs: the passes of one sample, by a name: "many" and, where fewer layers run too, "few".
            arms: implementations, by the names of the arms.
            seed: of the order in which they attend, a new one for each call.
            at_work: called with an arm's name before it attends.
            clock: in seconds.
        """
        self.seconds = 0.0
        self._runs, self._arms = runs, dict(arms)
        self._draw, self._at_work, self._clock = random.Random(seed), at_work, clock
        self._pending: _Call | None = None
        self._inside = False
        self._direct = self._settled = 0
        self._times: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._rest_peak = 0
        self._away_s = 0.0
        self._waiting: dict[str, list[tuple[dict[str, float], int]]] = {}
        self.errors: dict[str, BaseException] = {}

    def warm_up(self) -> None:
        """Run once; what was timed is dropped.

        Raises:
            NotShareable: the passes cannot be shared.
        """
        self._take()
        self._waiting = {}

    def sample(self, arm: str) -> tuple[dict[str, float], int]:
        """Return an arm's seconds, by the names of the runs, and its peak memory in bytes; runs where none is left.

        Raises:
            BaseException: whatever the arm's implementation raised.
        """
        while not self._waiting.get(arm):
            if arm in self.errors:
                raise self.errors[arm]
            self._take()
        return self._waiting[arm].pop(0)

    def unneeded(self) -> None:
        """Forget the latest call: only the keys and values that it would have read are evaluated."""
        self._pending = None

    def needed(self) -> None:
        """Evaluate the latest call by everyone: what comes next reads its output."""
        call, self._pending = self._pending, None
        if call is None:
            return
        read: Any = tree_flatten([call.args, call.named])
        mx.eval([each for _, each in read if isinstance(each, mx.array)])
        began = self._clock()
        self._rest_peak = max(self._rest_peak, mx.get_peak_memory())
        self._settled += 1
        reference = next(iter(self._arms))
        for name in self._draw.sample([*self._arms], len(self._arms)):
            with self._dropped_if_it_fails(name):
                self._attend(name, call, reference=name == reference)
            if reference in self.errors:
                raise self.errors[reference]
        self._at_work("")
        mx.reset_peak_memory()
        self._away_s += self._clock() - began

    def _attend(self, name: str, call: _Call, *, reference: bool) -> None:
        self._at_work(name)
        mx.reset_peak_memory()
        with replace_attention(self._arms[name]):
            started = self._clock()
            # The graph goes on from the reference's call, which was built when the model called.
            out = call.out if reference else self._built(call.args, call.named)
            mx.eval(out)
            took_s = self._clock() - started + (call.built_s if reference else 0.0)
        self._times[name] = self._times.get(name, 0.0) + took_s
        self._peaks[name] = max(self._peaks.get(name, 0), mx.get_peak_memory())

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # an implementation's failure is its own row's, sys.exit() included
            self.errors[name] = error
            del self._arms[name]

    def _built(self, args: tuple[Any, ...], named: dict[str, Any]) -> mx.array:
        before, self._inside = self._inside, True
        try:
            out: mx.array = patch_points.models_sdpa().replacement(*args, **named)
            return out
        finally:
            self._inside = before

    def _called(self, *args: Any, **named: Any) -> mx.array:
        """In the place of mlx-lm's function."""
        if self._inside:
            out: mx.array = patch_points.models_sdpa().original(*args, **named)
            return out
        self.needed()
        began = self._clock()
        reference = next(iter(self._arms))
        with self._dropped_if_it_fails(reference), replace_attention(self._arms[reference]):
            started = self._clock()
            out = self._built(args, named)
            built_s = self._clock() - started
        if reference in self.errors:
            raise self.errors[reference]
        self._pending = _Call(args, named, out, built_s)
        self._away_s += self._clock() - began
        return out

    def _called_directly(self, *args: Any, **named: Any) -> mx.array:
        """In the place of MLX's function, which a model may call itself: such a call cannot be shared."""
        self._direct += not self._inside
        out: mx.array = patch_points.fast_sdpa().original(*args, **named)
        return out

    def _take(self) -> None:
        """Run a sample of passes; where the first arm fails in it, again with the next one's outputs."""
        began = self._clock()
        while self._arms:
            count = len(self._arms)
            try:
                timed = {name: self._timed(run) for name, run in self._runs.items()}
            except BaseException:
                if len(self._arms) == count:
                    raise
                continue
            self._waiting = {name: [] for name in self._arms}
            for arm in self._arms:
                seconds = {name: rest_s + times[arm] for name, (rest_s, times, _) in timed.items()}
                self._waiting[arm].append((seconds, max(peaks[arm] for _, _, peaks in timed.values())))
            break
        self.seconds = self._clock() - began

    def _timed(self, run: ModelRun) -> tuple[float, dict[str, float], dict[str, int]]:
        """Seconds of the rest of a pass, and each arm's seconds of attention and peak memory in bytes."""
        run.prepare()
        self._times, self._peaks = {}, {}
        self._away_s, self._rest_peak, self._direct, self._settled, self._pending = 0.0, 0, 0, 0, None
        places = (patch_points.models_sdpa(), self._called), (patch_points.fast_sdpa(), self._called_directly)
        for place, taker in places:
            place.add(interceptor=taker)
        mx.reset_peak_memory()
        run.observer = self
        try:
            whole_s = take_sample(run, 1, self._clock)
        finally:
            run.observer = None
            self._pending = None
            for place, taker in places:
                place.remove(interceptor=taker)
        if self._direct or not self._settled:
            raise NotShareable("the model does not attend through mlx-lm's function alone")
        rest_peak = max(self._rest_peak, mx.get_peak_memory())
        peaks = {name: max(rest_peak, self._peaks[name]) for name in self._arms}
        return whole_s - self._away_s, {name: self._times[name] for name in self._arms}, peaks


class SharedArm(ModelArm, kw_only=True, eq=False):
    """An arm that takes its samples from passes that it shares with the others."""

    shared: SharedPass

    def sample(self) -> None:
        """Add one sample, in seconds a step."""
        seconds, peak_bytes = self.shared.sample(self.name)
        self.take(seconds["many"] / self.steps, seconds["few"] / self.steps if self.short else None)
        if self.peak_bytes is None:
            self.peak_bytes = max(0, peak_bytes - self.base_bytes) + self.further_bytes
