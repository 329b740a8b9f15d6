"""Implementations with planted behaviour, named to the engine as "tests/support/planted.py:NAME"."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
from msgspec import structs

from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import Workload
from attention.engine.case_runner import CaseRunner
from attention.implementations.baseline import Baseline
from attention.implementations.calls import MlxRunner
from attention.masks import Mask
from attention.measure.device import Device
from attention.measure.rounds import run_rounds


class Planted(Baseline):
    """The baseline under another name, with planted behaviour before each call."""

    name = "planted"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        self.calls += 1
        self.before_call()
        return self.change(super().__call__(q, k, v, scale=scale, mask=mask, softcap=softcap))

    def before_call(self) -> None:
        """Run the planted behaviour."""

    def change(self, output: mx.array) -> mx.array:
        """Change the result, if that is planted."""
        return output


def in_rounds() -> bool:
    """Whether the rounds make the call: of those before them there are few or many, as fast as the machine is."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not run_rounds.__code__:
        frame = frame.f_back
    return frame is not None


class InRounds(Planted):
    """Misbehaves in its third call of the rounds, of which there are six at least."""

    calls_in_rounds = 0

    def before_call(self) -> None:
        if in_rounds():
            self.calls_in_rounds += 1
            if self.calls_in_rounds == 3:
                self.misbehave()

    def misbehave(self) -> None:
        """Run the planted behaviour."""


class KilledInRounds(InRounds):
    """Dies as if killed by the system, once the rounds have started."""

    def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KilledAtOnce(Planted):
    """Dies of an invalid memory access at the first call."""

    def before_call(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Sleeps(Planted):
    """Takes 20 ms more than the baseline."""

    def before_call(self) -> None:
        time.sleep(0.02)


class SleepsLong(Planted):
    """Takes 300 ms more than the baseline."""

    def before_call(self) -> None:
        time.sleep(0.3)


class Raises(Planted):
    """Raises at the first call."""

    def before_call(self) -> None:
        raise RuntimeError("planted failure\nwith a second line")


class RaisesInRounds(InRounds):
    """Raises once the rounds have started."""

    def misbehave(self) -> None:
        raise RuntimeError("planted late")


class BreaksTheGpu(Planted):
    """Fails like a CUDA kernel after an invalid memory access; without a GPU, the runner is told there is one."""

    def before_call(self) -> None:
        if mx.default_device() == mx.Device(mx.cpu):
            CaseRunner._backend = property(lambda runner: "cuda")
            raise RuntimeError("cudaStreamSynchronize failed: an illegal memory access was encountered")
        kernel = mx.fast.cuda_kernel(
            name="wild",
            input_names=["x"],
            output_names=["y"],
            source="y[0] = *reinterpret_cast<const float*>(reinterpret_cast<unsigned long long>(x) + (1ull << 46));",
        )
        ones, shape = (1, 1, 1), (1,)
        mx.eval(
            kernel(
                inputs=[mx.ones(shape)], output_shapes=[shape], output_dtypes=[mx.float32], grid=ones, threadgroup=ones
            )
        )
        mx.synchronize()


class KeepsItsResult(Planted):
    """Computes the first call, and returns its result from every later call of the same shapes."""

    kept: mx.array | None = None

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, **named: Any) -> mx.array:
        if self.kept is None:
            self.kept = super().__call__(q, k, v, **named)
        return self.kept


class WrongLater(Planted):
    """Returns a result that is slightly off, from the fifth call on."""

    def change(self, output: mx.array) -> mx.array:
        return output + 0.05 if self.calls > 4 else output


class Wrong(Planted):
    """Returns a result that is slightly off."""

    def change(self, output: mx.array) -> mx.array:
        return output + 0.05


class NotANumber(Planted):
    """Returns NaN."""

    def change(self, output: mx.array) -> mx.array:
        return output * mx.nan


class Stuck(Planted):
    """Never returns from the first call."""

    def before_call(self) -> None:
        time.sleep(3600)


class Prints(Planted):
    """Prints to stdout, which belongs to the events."""

    def before_call(self) -> None:
        print("noise on stdout", flush=True)


class Refuses(Planted):
    """Supports no workload."""

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return Route(path="-", fused=False, reason="it takes nothing", supported=False)


class KnowsNoPatterns(Planted):
    """Its route does not look at the mask."""

    takes_patterns = False


class Hungry(Planted):
    """Predicts that it needs a tebibyte."""

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return Route(path="hungry", fused=False, reason="it is hungry", predicted_bytes=2**40)


class Leaves(Planted):
    """Exits the process with a code and a word on stderr."""

    def before_call(self) -> None:
        os.write(2, b"planted last words\n")
        os._exit(7)


class Builds(Planted):
    """Requires a build before the first call."""

    built = False

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Whether build() has not been called yet."""
        return not self.built

    def build(self, tell: Callable[[str], None]) -> None:
        """Take a while, and report it."""
        tell("planted building")
        time.sleep(0.4)
        self.built = True

    def before_call(self) -> None:
        if not self.built:
            raise RuntimeError("called before it was built")


class SlowerRunner(MlxRunner):
    """Waits longer than the call takes, by a share of it."""

    share = 0.0

    def queue(self) -> list[mx.array]:
        """Queue a call; the first of a sample starts the stopwatch."""
        if self.started is None:
            self.started = time.perf_counter()
        return super().queue()

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate, then spin for the share; sleeping is not exact enough for a thousandth."""
        super().wait(outputs)
        now = time.perf_counter()
        until = now + (now - (self.started or now)) * self.share
        self.started = None
        while time.perf_counter() < until:
            pass

    started: float | None = None


class Slower5Percent(Baseline):
    """The baseline, slower by five percent."""

    name = "planted"
    share = 0.05

    def runner(self, workload: Workload, inputs: Sequence[mx.array], scale: float) -> SlowerRunner:
        """Bind the call to a runner that adds the share."""
        bound = SlowerRunner(self, workload, inputs, scale)
        bound.share = self.share
        return bound


class SlowerATenthOfAPercent(Slower5Percent):
    """The baseline, slower by a thousandth."""

    share = 0.001


class IgnoresSignals(Planted):
    """Ignores SIGTERM, and never returns."""

    def before_call(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


class Pauses(Planted):
    """Stops the own process."""

    def before_call(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class LeavesAChild(Planted):
    """Starts a process that outlives this one for a while and holds its pipes open."""

    def before_call(self) -> None:
        if self.calls == 1:
            subprocess.Popen(["sleep", "20"], start_new_session=True)


class LeavesAnOrphan(Planted):
    """Starts a process in a new session, through one that exits immediately, and records its id."""

    def before_call(self) -> None:
        if self.calls == 1:
            script = 'sleep 300 & echo $! > "$PLANTED_PID"'
            subprocess.run(
                ["sh", "-c", script],
                check=True,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


class WritesALongLine(Planted):
    """Writes more to stderr than a line may contain."""

    def before_call(self) -> None:
        if self.calls == 1:
            os.write(2, b"x" * (65 << 20))


class ChangesItsInputs(Planted):
    """Scales the query in place, a common mistake."""

    def __call__(self, q: mx.array, *arrays: mx.array, **options: Any) -> mx.array:
        q *= 2.0
        return super().__call__(q, *arrays, **options)


class WritesIntoMemory(Planted):
    """Writes zeros into the memory of the query, which others read too."""

    def __call__(self, q: mx.array, *arrays: mx.array, **options: Any) -> mx.array:
        np.array(q, copy=False)[:] = 0
        return super().__call__(q, *arrays, **options)


class HasNoRoute(Planted):
    """Returns no route."""

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return None  # type: ignore[return-value]


class Exits(InRounds):
    """Calls sys.exit once the rounds have started."""

    def misbehave(self) -> None:
        sys.exit(0)


class RaisesNoText(Planted):
    """Raises with a text that UTF-8 cannot encode."""

    def before_call(self) -> None:
        raise ValueError("\udcff bad")


class ReturnsNothing(Planted):
    """Returns no output."""

    def change(self, output: mx.array) -> mx.array:
        return None  # type: ignore[return-value]


class KeepsScratch(Planted):
    """Reports that a call takes a MiB outside MLX."""

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        return structs.replace(super().route(workload, device, needs), scratch_bytes=2**20)


class OnRankOne(Planted):
    """Misbehaves on rank 1 of a group only, once its calls have been measured for a while."""

    first_calls = 12

    def before_call(self) -> None:
        if os.environ.get("MLX_RANK") == "1" and self.calls == self.first_calls:
            self.misbehave()

    def misbehave(self) -> None:
        """Run the planted behaviour."""


class KilledOnRankOne(OnRankOne):
    """Dies there as if killed by the system."""

    def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class StoppedOnRankOne(OnRankOne):
    """Stops there, as by SIGSTOP, and never goes on."""

    def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class OutOfMemoryOnRankOne(OnRankOne):
    """Raises there what MLX raises when a GPU's memory is full."""

    def misbehave(self) -> None:
        raise RuntimeError("[cuda] out of memory: 68719476736 bytes")


class ExitsOnRankOne(OnRankOne):
    """Ends the process there."""

    def misbehave(self) -> None:
        sys.exit("planted exit")


class WhileMerging(Planted):
    """Rank 0 is late with its part of a call, and signals rank 1, which waits for it in the middle of the call."""

    late_call = 6
    signal = signal.SIGKILL

    def __init__(self) -> None:
        super().__init__()
        self._part: tuple[object, ...] | None = None

    def __call__(self, q: mx.array, k: mx.array, *arrays: mx.array, **options: Any) -> mx.array:
        self.begin(q, k)
        return super().__call__(q, k, *arrays, **options)

    def with_logsumexp(self, q: mx.array, k: mx.array, *arrays: mx.array, **options: Any) -> tuple[mx.array, mx.array]:
        """Compute output and logsumexp, as ranks do that have a part of the keys."""
        self.begin(q, k)
        return super().with_logsumexp(q, k, *arrays, **options)

    def begin(self, q: mx.array, k: mx.array) -> None:
        """Count a call of the ranks together, of which the first is one; on one device the arrays are whole."""
        self._part = self._part or (q.shape, k.shape)
        if (q.shape, k.shape) != self._part:
            return
        self.late_call -= 1
        if os.environ.get("MLX_RANK") == "0" and self.late_call == 0:
            time.sleep(0.5)
            os.kill(other_rank(), self.signal)


def other_rank() -> int:
    """Return the process id of rank 1 on this machine."""
    ranks = psutil.Process().parent().children()
    return next(each.pid for each in ranks if any('"rank":1,' in word for word in each.cmdline()))


class KilledWhileMerging(WhileMerging):
    """It dies there as if killed by the system."""


class StoppedWhileMerging(WhileMerging):
    """It stops there, and never goes on."""

    signal = signal.SIGSTOP


class OtherRouteOnRankOne(Planted):
    """Takes another path there, as after a failed compilation."""

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        route = super().route(workload, device, needs)
        return structs.replace(route, path="another path") if os.environ.get("MLX_RANK") == "1" else route
