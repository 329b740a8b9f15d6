"""Attention over an endless sensor stream, with no model at all: a forecast of each next sample, and an alarm.

    python examples/sensor_stream.py --steps 100000

Keys are the last samples of each sensor, values what followed them. The query is the present: what followed the moments
most like it is the forecast, and a sample far from its forecast an alarm. The state keeps the first samples, recorded
while the machine was known to be sound, and a window of the latest; its time and memory per sample stay what they are
however long the stream gets.
"""

import argparse
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from statistics import median
from typing import Final

import mlx.core as mx
from msgspec import Struct

from attention import StreamingKV

SENSORS: Final = 3
SHAPE: Final = 32
"""Samples that make up a key: the width of a head."""
SHARPNESS: Final = 40.0
"""Scale of the scores, which are correlations from -1 to 1."""
FAULT_EVERY: Final = 1709
FAULT_LENGTH: Final = 3
ALARM: Final = 12.0
"""An error this many times the usual one is an alarm."""
USUAL: Final = 256
"""Errors whose median is the usual one."""


class Summary(Struct):
    """What was seen of a stream."""

    steps: int
    step_s: float
    """Median seconds of a step."""
    state_bytes: int
    error: float
    """Mean absolute error of the forecasts."""
    naive_error: float
    """That of forecasting each sample to be as the one before."""
    faults: int
    found: int
    """Faults with an alarm."""
    false_alarms: int


def samples(seed: int) -> Iterator[tuple[list[float], bool]]:
    """Yield the sensors' samples of a machine that turns, and whether it is faulty, without end."""
    draw = random.Random(seed)
    step = 0
    while True:
        angle = 2 * math.pi * step / 25
        load = 1 + 0.3 * math.sin(2 * math.pi * step / 3600)
        faulty = step % FAULT_EVERY >= FAULT_EVERY - FAULT_LENGTH
        values = [
            load * (math.sin(angle + sensor) + 0.4 * math.sin(2.6 * angle)) + draw.gauss(0, 0.02)
            for sensor in range(SENSORS)
        ]
        yield [value + 2.0 if faulty else value for value in values], faulty
        step += 1


class Forecaster:
    """A forecast of the next sample of each sensor, from attention over all that its state keeps."""

    def __init__(self, first: int, window: int) -> None:
        self.state = StreamingKV(first=first, window=window)
        self._recent: deque[list[float]] = deque(maxlen=SHAPE + 1)

    def take(self, values: list[float]) -> list[float] | None:
        """Take a sample of every sensor, and return the forecast of the next; None until there are enough."""
        self._recent.append(values)
        if len(self._recent) <= SHAPE:
            return None
        series = mx.array(list(self._recent)).T  # (sensors, SHAPE + 1)
        before, middle, size = _normalised(series[:, :-1])
        now, centre, scale = _normalised(series[:, 1:])
        followed = (series[:, -1:] - middle) / size
        value = mx.broadcast_to(followed, (SENSORS, SHAPE))
        out = self.state.attend(now[None, :, None], before[None, :, None], value[None, :, None], scale=SHARPNESS)
        forecast: list[float] = (out[0, :, 0, 0] * scale[:, 0] + centre[:, 0]).tolist()  # type: ignore[assignment]
        return forecast


def _normalised(rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return rows without their means and of length 1, with the means and the lengths."""
    middle = mx.mean(rows, axis=1, keepdims=True)
    size = mx.sqrt(mx.sum(mx.square(rows - middle), axis=1, keepdims=True)) + 1e-6
    return (rows - middle) / size, middle, size


def follow(steps: int, first: int = 256, window: int = 1792, seed: int = 0, report_every: int = 20_000) -> Summary:
    """Follow the stream for some steps, and print what was seen of it now and then."""
    forecaster, times = Forecaster(first, window), deque[float](maxlen=10_000)
    usual, errors, naive = deque[float](maxlen=USUAL), [0.0, 0], [0.0, 0]
    faults: set[int] = set()
    found: set[int] = set()
    false_alarms = 0
    forecast: list[float] | None = None
    last: list[float] | None = None
    settled = -1
    for step, (values, faulty) in zip(range(steps), samples(seed), strict=False):
        fault = step // FAULT_EVERY
        if forecast is not None and last is not None:
            error = max(abs(a - b) for a, b in zip(values, forecast, strict=True))
            watching = len(usual) == USUAL
            if faulty and watching:
                faults.add(fault)
            if watching and error > ALARM * median(usual):
                if faulty:
                    found.add(fault)
                    settled = step + 2 * SHAPE  # what came after a fault is unlike anything seen
                elif step > settled:
                    false_alarms += 1
            elif step > settled:
                usual.append(error)
                errors = [errors[0] + error, errors[1] + 1]
                naive = [naive[0] + max(abs(a - b) for a, b in zip(values, last, strict=True)), naive[1] + 1]
        began = time.perf_counter()
        forecast, last = forecaster.take(values), values
        times.append(time.perf_counter() - began)
        if (step + 1) % report_every == 0:
            size = forecaster.state.nbytes / 1024
            print(f"{step + 1:>12,} samples  {1e6 * median(times):6.0f} us each  {size:6.0f} KiB of state", flush=True)
    return Summary(
        steps=steps,
        step_s=median(times),
        state_bytes=forecaster.state.nbytes,
        error=errors[0] / max(1, errors[1]),
        naive_error=naive[0] / max(1, naive[1]),
        faults=len(faults),
        found=len(found),
        false_alarms=false_alarms,
    )


def main() -> None:
    """Follow the stream that the command line describes, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="samples of the stream (100000)")
    parser.add_argument("--first", type=int, default=256, help="first samples that are kept (256)")
    parser.add_argument("--window", type=int, default=1792, help="last samples that are kept (1792)")
    arguments = parser.parse_args()
    seen = follow(arguments.steps, arguments.first, arguments.window)
    print(f"forecasts are off by {seen.error:.3f} on average, the last sample by {seen.naive_error:.3f}")
    print(f"{seen.found} of {seen.faults} faults found, {seen.false_alarms} false alarms")


if __name__ == "__main__":
    main()
