"""Whether the energy of rows is right: joules of a call as rows have them, beside NVML's counters over seconds.

    python -m benchmarks.energy [--seconds 5]      # on an NVIDIA GPU that computes nothing else

A row's figure is from a quarter of a second between two steps of the counter (`attention.measure.energy`). Beside it
stand, for calls back to back over seconds, the same counter from its first step to its last, and the integral of the
power that NVML reports every few milliseconds; and what the calls take in the rounds, beside another implementation,
where they may run at other clocks. The levels of power: keys and values read from memory (decode), matrix products
(prefill), calls that launches limit (small), and none (idle).
"""

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from statistics import mean, median
from typing import Any, Final

from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.calls import make_inputs, runner_for
from attention.measure.device import open_nvml, probe
from attention.measure.energy import energy_counter, energy_of_calls, per_call, power_limit_w, watts_of
from attention.measure.rounds import Arm, Runner, calls_for, take_sample, warm_up
from benchmarks.rounds import sample

WIDE: Final = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
LEVELS: Final = {
    "decode": Workload(batch=16, kv_seq=8192, pass_="decode", **WIDE),  # type: ignore[arg-type]
    "prefill": Workload(seq=8192, mask="causal", **WIDE),  # type: ignore[arg-type]
    "small": Workload(seq=128, heads=8, head_dim=32, dtype="float16"),
}
SAMPLE_S: Final = 0.02
WARM_UP_S: Final = 0.5
REPEATS: Final = 3
ROUNDS: Final = 20
POLL_S: Final = 0.005
IDLE_S: Final = 0.01
"""Seconds of a "call" that computes nothing."""


class Watch:
    """A thread that notes the counter, the power and the clock while calls are made."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.watts: list[tuple[float, float]] = []
        self.clocks_mhz: list[int] = []
        library, handle = open_nvml() or (None, None)
        assert library is not None, "no NVML"
        self._nvml: Any = library
        self._handle: Any = handle
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        nvml, handle, last = self._nvml, self._handle, None
        while not self._ended.wait(POLL_S):
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            now = time.perf_counter()
            if last not in (None, joules):
                self.steps.append((now, joules))
            last = joules
            self.watts.append((time.perf_counter(), nvml.nvmlDeviceGetPowerUsage(handle) / 1e3))
            self.clocks_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))

    def integral(self) -> float:
        """Return the joules of the reported power between the counter's first step and its last."""
        first, last = self.steps[0][0], self.steps[-1][0]
        inside = [mark for mark in self.watts if first <= mark[0] <= last]
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(inside)) * (
            (last - first) / (inside[-1][0] - inside[0][0])
        )


def measure(make_calls: Callable[[], int], seconds: float) -> dict[str, Any]:
    """Measure the energy of calls in the way of rows, and over seconds."""
    counter = energy_counter(probe())
    assert counter is not None, "no counter of energy"
    rows = [energy_of_calls(make_calls, counter) for _ in range(REPEATS)]
    began, made = time.perf_counter(), 0
    calls: list[tuple[float, float]] = [(began, 0)]
    with Watch() as watch:
        while time.perf_counter() - began < seconds:
            made += make_calls()
            calls.append((time.perf_counter(), made))
    watch.steps = [step for step in watch.steps if step[0] <= calls[-1][0]]
    long_j = per_call(watch.steps, calls, 0.5 * seconds)
    assert long_j is not None, "the counter stood still"
    joules = watch.steps[-1][1] - watch.steps[0][1]
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(watch.steps)]
    return {
        "row_j": [each.joules for each in rows],
        "row_w": [each.watts for each in rows],
        "row_s": [each.call_s for each in rows],
        "long_j": long_j,
        "integral_j": long_j * watch.integral() / joules,
        "long_w": watts_of(watch.steps, calls),
        "reported_w": mean(watts for _, watts in watch.watts),
        "step_s": median(gaps),
        "largest_step_s": max(gaps),
        "clock_mhz": median(watch.clocks_mhz),
        "call_s": (calls[-1][0] - began) / made,
    }


def in_rounds(runner: Runner, other: Runner) -> tuple[float, float]:
    """Return the seconds of a call in rounds beside another, and the median clock in MHz meanwhile."""
    arms = []
    for name, each in (("this", runner), ("other", other)):
        call_s = take_sample(each, 3)
        arms.append(Arm(name=name, runner=each, call_s=call_s, calls=calls_for(call_s, SAMPLE_S, 1), lead_in=True))
    with Watch() as watch:
        times = sample(arms, ROUNDS)
    return median(times["this"]), median(watch.clocks_mhz)


def main() -> int:
    """Measure every level, and print a line each and the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of calls back to back (5)")
    seconds = parser.parse_args().seconds
    print(f"{probe().name}, limit {power_limit_w(probe())} W", flush=True)

    def idle() -> int:
        time.sleep(IDLE_S)
        return 1

    found = {}
    for name, workload in LEVELS.items():
        inputs = make_inputs(workload, 0)
        runner, other = (
            runner_for(load_implementation(each), workload, inputs, workload.head_dim**-0.5) for each in ("poc", "mlx")
        )
        for each in (runner, other):
            take_sample(each, 3)
        call_s = warm_up(runner, take_sample(runner, 3), WARM_UP_S, SAMPLE_S, 1)
        arm = Arm(name=name, runner=runner, call_s=call_s, calls=calls_for(call_s, SAMPLE_S, 1))
        figures = measure(arm.make_calls, seconds)
        figures["rounds_s"], figures["rounds_mhz"] = in_rounds(runner, other)
        figures["product_w"] = median(figures["row_j"]) / figures["rounds_s"]
        found[name] = figures
        print(_line(name, figures), flush=True)
    found["idle"] = measure(idle, seconds)
    print(_line("idle", found["idle"]), flush=True)
    print(json.dumps(found))
    return 0


def _line(name: str, figures: dict[str, Any]) -> str:
    whole = figures["long_j"]
    rows = ", ".join(f"{each / whole - 1:+.1%}" if each else "none" for each in figures["row_j"])
    text = f"{name}: {whole * 1e3:.4g} mJ a call ({figures['long_w']:.0f} W, {figures['clock_mhz']:.0f} MHz); "
    text += f"rows {rows}; integral of power {figures['integral_j'] / whole - 1:+.1%}; "
    text += f"steps of {figures['step_s'] * 1e3:.0f} ms, {figures['largest_step_s'] * 1e3:.0f} at most"
    if "rounds_s" in figures:
        slower = figures["call_s"] / figures["rounds_s"]
        text += f"; back to back a call takes {slower:.3f} of that in rounds ({figures['rounds_mhz']:.0f} MHz), "
        text += f"J over s of the rounds {figures['product_w']:.0f} W"
    return text


if __name__ == "__main__":
    sys.exit(main())
