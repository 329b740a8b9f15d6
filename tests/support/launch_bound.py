"""A simulated device on which small calls are launch-bound: noisy, cold at first, with phases of several seconds."""

import math
import random
from collections.abc import Sequence

from msgspec import Struct

from tests.support.tuning_examples import FakeTime


class Candidate(Struct, frozen=True, kw_only=True):
    """Cost of one call, in seconds."""

    host_s: float
    """CPU time of a call: Python, and queueing the launch."""
    device_s: float = 3e-6
    """GPU time of a call, while further calls are queued."""
    first_s: float = 0.3
    """Extra time of the first call: compilation, plans."""
    fixed_s: float = 0.0
    """Fixed cost of a sample beyond that of other candidates: visible in a single call, hidden in a queue of calls."""

    @property
    def call_s(self) -> float:
        """Cost in a long queue."""
        return max(self.host_s, self.device_s)


class Weather(Struct, frozen=True, kw_only=True):
    """Disturbances."""

    noise: float = 0.02
    """Relative spread of one sample."""
    stalls: float = 0.03
    """Share of the samples in which another process takes the CPU."""
    stall_s: float = 1e-3
    phases: float = 0.3
    """Maximum temporary slowdown of the CPU."""
    phase_s: float = 0.3
    ramp: float = 1.0
    """Slowdown of the GPU before its clock is up."""
    ramp_s: float = 0.1
    heat: float = 0.0
    """Slowdown of a GPU call right after one that draws full power."""


class LaunchBound:
    """The device: a clock advanced by the costs of its candidates' calls."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.clock = FakeTime()
        self.began = self.clock.now
        self.draw = random.Random(seed)
        self.weather = weather
        self.slowness, self.until, self.warmth = 1.0, self.began, 0.0

    def host(self) -> float:
        """Current slowdown of the CPU, as a factor."""
        if self.clock.now >= self.until:
            self.slowness = 1 + self.weather.phases * self.draw.random()
            self.until = self.clock.now + self.weather.phase_s * self.draw.expovariate(1.0)
        return self.slowness

    def gpu(self) -> float:
        """Current slowdown of the GPU, as a factor."""
        worked = self.clock.now - self.began
        return 1 + self.weather.ramp * math.exp(-worked / self.weather.ramp_s) + self.weather.heat * self.warmth


class DeviceRunner:
    """Calls of one candidate."""

    SYNC_S = 3e-5
    GROWTH = 3
    """Samples of a new length until the memory of all their outputs is allocated."""

    def __init__(self, device: LaunchBound, candidate: Candidate) -> None:
        self.device, self.candidate = device, candidate
        self.cold, self.most, self.fresh = True, 0, 0

    def queue(self) -> object:
        return self

    def wait(self, outputs: Sequence[object]) -> None:
        device, one, calls = self.device, self.candidate, len(outputs)
        if calls > self.most:
            self.most, self.fresh = calls, self.GROWTH
        growing = 1.5 if self.fresh > 0 else 1.0
        self.fresh -= 1
        spent = calls * max(one.host_s * device.host() * growing, one.device_s * device.gpu())
        spent *= math.exp(device.draw.gauss(0, device.weather.noise))
        spent += self.SYNC_S + one.fixed_s
        if device.draw.random() < device.weather.stalls:
            spent += device.weather.stall_s * device.draw.random()
        spent += one.first_s if self.cold else 0.0
        self.cold = False
        device.clock.now += spent
        device.warmth = one.device_s / one.call_s

    def results(self) -> list[object]:
        return []

    def peak_bytes(self) -> int | None:
        return None
