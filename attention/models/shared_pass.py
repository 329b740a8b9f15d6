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
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from attention.measure.clock import Clock, take_sample
from attention.models.arm import ModelArm, ModelRun
from attention.models.replacing import replaced
from attention.patch import seams


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
        with replaced(self._arms[name]):
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
            out: mx.array = seams.of_models().replacement(*args, **named)
            return out
        finally:
            self._inside = before

    def _called(self, *args: Any, **named: Any) -> mx.array:
        """In the place of mlx-lm's function."""
        if self._inside:
            out: mx.array = seams.of_models().original(*args, **named)
            return out
        self.needed()
        began = self._clock()
        reference = next(iter(self._arms))
        with self._dropped_if_it_fails(reference), replaced(self._arms[reference]):
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
        out: mx.array = seams.fast().original(*args, **named)
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
        places = (seams.of_models(), self._called), (seams.fast(), self._called_directly)
        for place, taker in places:
            place.add(taker=taker)
        mx.reset_peak_memory()
        run.observer = self
        try:
            whole_s = take_sample(run, 1, self._clock)
        finally:
            run.observer = None
            self._pending = None
            for place, taker in places:
                place.remove(taker=taker)
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
