"""Arms of the rounds that run a model, each in separate passes or all in shared passes.

If matrix products are slow, a pass of a model takes seconds, nearly all of them outside attention. In a shared pass
every attention call is evaluated by all implementations, one after another, and the model continues with one of the
outputs. An implementation's time is the time outside attention plus that of its own calls. On a device that runs one
operation at a time, as MLX's CPU backend does, this equals the time of a separate pass; the noise of the time outside
attention is the same for all implementations and cancels in their ratios.
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

from attention.measure.rounds import Arm, Clock, Runner, take_sample
from attention.mlx_lm.patch import replace_attention
from attention.monitoring import patch_points


class Layers(Struct, frozen=True):
    """Two numbers of layers that are run, `few` and `many`, and the number in the whole model."""

    few: int
    many: int
    whole: int
    unfinished: int = 0
    """Number of run layers that only compute keys and values, like the last one of a prefill."""

    def estimate(self, few: float, many: float) -> float:
        """Extrapolate a quantity to the whole model from its values for `few` and `many` layers."""
        return max(many + (self.whole - self.many) * self.each(few, many), many)

    def each(self, few: float, many: float) -> float:
        """Return a quantity per layer."""
        return (many - few) / (self.many - self.few)

    def rest(self, few: float, many: float) -> float:
        """Return a quantity without its complete layers."""
        return many - (self.many - self.unfinished) * self.each(few, many)


class Observer(Protocol):
    """Observer of a model run, notified which attention calls are evaluated."""

    def needed(self) -> None:
        """Called before the output of the latest attention call is read."""
        ...

    def unneeded(self) -> None:
        """Called if the output of the latest attention call is not read."""
        ...


class ModelRun(Runner, Protocol):
    """A run of a model that can be repeated from the same state.

    Attributes:
        observer: notified of attention calls; may be None.
    """

    observer: Observer | None

    def prepare(self) -> None:
        """Restore the initial state of the next run; not timed.

        Raises:
            StateChanged: the state differs from that of the first run.
        """
        ...


class ModelArm(Arm, kw_only=True, eq=False):
    """An implementation in a model: samples the whole model, or estimates it from two numbers of layers.

    Attributes:
        implementation: replaces the model's attention; `name` differs from it in the reference's second arm.
        short: the run with fewer layers; None if the whole model runs.
        layers: numbers of layers of the runs.
        steps: number of steps per sample; times are per step.
        base_bytes: active memory to subtract: the weights.
        further_bytes: keys and values of the layers that do not run.
        few_s, many_s: seconds per step of `short` and of `runner`, one value per sample.
        peak_bytes: peak of the first sample above `base_bytes`, plus `further_bytes`.
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
        """Copy the lists, so that an arm made from this one does not share them."""
        self.few_s, self.many_s = [*self.few_s], [*self.many_s]

    def make_calls(self) -> int:
        """Make the steps of a sample of the whole model, and return their number."""
        with replace_attention(self.implementation):
            self._timed(self.runner)
        return self.steps

    def sample(self) -> None:
        """Add one sample, in seconds per step."""
        with replace_attention(self.implementation):
            if self.lead_in:
                self._timed(self.runner)
            if self.peak_bytes is None:
                mx.reset_peak_memory()  # sets the peak to 0, not to the active memory
            many = self._timed(self.runner)
            if self.peak_bytes is None:
                self.peak_bytes = max(0, mx.get_peak_memory() - self.base_bytes) + self.further_bytes
            few = self._timed(self.short) if self.short else None
        self.take(many, few)

    def take(self, many: float, few: float | None) -> None:
        """Add a sample from the seconds per step of `runner` and, if it exists, of `short`."""
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
        """Median seconds of everything else."""
        return median(self.layers.rest(few, many) for few, many in zip(self.few_s, self.many_s, strict=True))


class NotShareable(Exception):
    """The model does not attend through mlx-lm's function, or not only through it."""


class _Call:
    """An attention call of which it is not known yet whether its output is read."""

    def __init__(self, args: tuple[Any, ...], named: dict[str, Any], out: mx.array, built_s: float) -> None:
        self.args, self.named, self.out, self.built_s = args, named, out, built_s


class SharedPass:
    """Passes in which several implementations compute each attention call; the model continues with the first one's.

    Attributes:
        seconds: duration of the latest passes, with all implementations.
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
        """Create it; nothing runs yet.

        Args:
            runs: the passes of one sample by name: "many" and, for an estimated model, "few".
            arms: implementations by arm name; the first is the reference.
            seed: of the order of the arms, which is drawn again for each call.
            at_work: called with an arm's name before it computes a call.
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
        """Run once and discard the times.

        Raises:
            NotShareable: the passes cannot be shared.
        """
        self._take()
        self._waiting = {}

    def sample(self, arm: str) -> tuple[dict[str, float], int]:
        """Return an arm's seconds by run name, and its peak memory in bytes; runs the passes if no sample is left.

        Raises:
            BaseException: whatever the arm's implementation raised.
        """
        while not self._waiting.get(arm):
            if arm in self.errors:
                raise self.errors[arm]
            self._take()
        return self._waiting[arm].pop(0)

    def unneeded(self) -> None:
        """Drop the latest call: only the keys and values that it would have read are evaluated."""
        self._pending = None

    def needed(self) -> None:
        """Evaluate the latest call by all implementations, before its output is read."""
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
            # The model continues with the reference's output, whose graph was built when the model called.
            out = call.out if reference else self._built(call.args, call.named)
            mx.eval(out)
            took_s = self._clock() - started + (call.built_s if reference else 0.0)
        self._times[name] = self._times.get(name, 0.0) + took_s
        self._peaks[name] = max(self._peaks.get(name, 0), mx.get_peak_memory())

    @contextmanager
    def _dropped_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # any failure, even sys.exit(), ends only the row of its implementation
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
        """Replacement of mlx-lm's attention function during a shared pass."""
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
        """Replacement of MLX's function; counts a model's direct calls, which cannot be shared."""
        self._direct += not self._inside
        out: mx.array = patch_points.fast_sdpa().original(*args, **named)
        return out

    def _take(self) -> None:
        """Run the passes of one sample; if the first arm fails, repeat them with the next one as the reference."""
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
        """Return a pass's seconds outside attention, and each arm's seconds in attention and peak memory in bytes."""
        run.prepare()
        self._times, self._peaks = {}, {}
        self._away_s, self._rest_peak, self._direct, self._settled, self._pending = 0.0, 0, 0, 0, None
        places = (patch_points.models_sdpa(), self._called), (patch_points.fast_sdpa(), self._called_directly)
        for place, interceptor in places:
            place.add(interceptor=interceptor)
        mx.reset_peak_memory()
        run.observer = self
        try:
            with patch_points.models_causal_mask().held():  # which each implementation replaces, in each layer
                whole_s = take_sample(run, 1, self._clock)
        finally:
            run.observer = None
            self._pending = None
            for place, interceptor in places:
                place.remove(interceptor=interceptor)
        if self._direct or not self._settled:
            raise NotShareable("the model does not attend through mlx-lm's function alone")
        rest_peak = max(self._rest_peak, mx.get_peak_memory())
        peaks = {name: max(rest_peak, self._peaks[name]) for name in self._arms}
        return whole_s - self._away_s, {name: self._times[name] for name in self._arms}, peaks


class SharedArm(ModelArm, kw_only=True, eq=False):
    """An arm whose samples come from shared passes."""

    shared: SharedPass

    def sample(self) -> None:
        """Add one sample, in seconds per step."""
        seconds, peak_bytes = self.shared.sample(self.name)
        self.take(seconds["many"] / self.steps, seconds["few"] / self.steps if self.short else None)
        if self.peak_bytes is None:
            self.peak_bytes = max(0, peak_bytes - self.base_bytes) + self.further_bytes
