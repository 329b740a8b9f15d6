"""The terminal app measured in a pty, on the real engine: its keys, its cost, its start, and its figures.

    python -m benchmarks.app keys                       # from a key to its repaint, beside a busy engine
    python -m benchmarks.app live                       # share of a core that the app takes during rounds
    python -m benchmarks.app start --other ../before    # to the first paint, in turns with another checkout
    python -m benchmarks.app rates                      # tokens/s in the app over those of `fatui bench`

Beside times of the clock, which need an idle machine, stand CPU seconds and the seconds that the app waited for a core,
from Linux's scheduler. The history, the settings and the remembered state are those of an empty folder.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.pty_app import ROOT, PtyApp, Scheduled, environment_for, scheduled

FATUI: Final = (sys.executable, "-m", "fatui")
PAINTED: Final = "Palette"
BUSY: Final = "seed-table"
"""A preset whose rounds outlast a measurement."""
PATIENCE_S: Final = 300.0
KEYS: Final = {"digit": ("7", "▏", "\x7f"), "step": ("\x1b[C", "●", "\x1b[D")}
"""What is pressed on a slider, what its repaint has in it, and what undoes it: a digit is typed, or it is moved."""
Rates = dict[str, float]
"""Tokens/s by implementation."""


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(name: str, seconds: Sequence[float]) -> str:
    """Format the median and the 99 % quantile of some times."""
    median, late = statistics.median(seconds), quantile(seconds, 0.99)
    return (
        f"{name}: median {1e3 * median:.1f} ms, 99 % quantile {1e3 * late:.1f} ms, longest {1e3 * max(seconds):.1f} ms"
    )


def _begin_run(app: PtyApp, preset: str) -> None:
    """Wait until the rounds of a run have begun.

    Raises:
        TimeoutError: they did not.
    """
    if app.read(PATIENCE_S, until=PAINTED) is None or app.read(PATIENCE_S, until="round") is None:
        raise TimeoutError(f"no rounds of {preset} within {PATIENCE_S:g} s")


def measure_keys(count: int, preset: str = BUSY, kind: str = "digit") -> list[tuple[float, Scheduled]]:
    """Press a key of KEYS on a slider while the engine measures; return for each time the seconds to its repaint, and
    what the scheduler gave the app in them.
    """
    key, painted, back = KEYS[kind]
    took: list[tuple[float, Scheduled]] = []
    draw = random.Random(0)
    with PtyApp(*FATUI, preset, "--run") as app:
        _begin_run(app, preset)
        app.press("\t")
        app.read(0.5)
        while len(took) < count:
            app.read(draw.uniform(0.05, 0.3))
            before = scheduled(app.pid)
            app.press(key)
            seconds = app.read(3, until=painted) or math.inf
            took.append((seconds, scheduled(app.pid).since(before)))
            app.press(back)
            app.read(0.1)
        app.leave()
    return took


def measure_live(seconds: float, preset: str = BUSY) -> tuple[float, Scheduled]:
    """Return the seconds of a stretch of rounds, and what the scheduler gave the app in them."""
    with PtyApp(*FATUI, preset, "--run") as app:
        _begin_run(app, preset)
        app.read(2)
        began, before = time.monotonic(), scheduled(app.pid)
        while time.monotonic() < began + seconds:
            app.read(0.5)
        passed, given = time.monotonic() - began, scheduled(app.pid).since(before)
        app.leave()
    return passed, given


def first_paint(root: Path = ROOT) -> tuple[float, float]:
    """Return the seconds, and the CPU seconds, from the start of the app to its first paint."""
    with PtyApp(*FATUI, root=root) as app:
        if app.read(PATIENCE_S, until=PAINTED) is None:
            raise TimeoutError("no first paint")
        return time.monotonic() - app.began, scheduled(app.pid).cpu_s


def import_s(root: Path = ROOT) -> float:
    """Return the CPU seconds that the imports of the app take."""
    code = "import time; began = time.process_time(); import fatui.tui.app; print(time.process_time() - began)"
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, cwd=root, env=environment_for(root), capture_output=True, check=True, text=True)
    return float(made.stdout)


def rates_in_app(preset: str) -> Rates:
    """Run a preset in the app, and return its tokens/s."""
    before = _newest()
    with PtyApp(*FATUI, preset, "--run") as app:
        end = time.monotonic() + PATIENCE_S
        while _newest() == before:
            if time.monotonic() > end:
                raise TimeoutError(f"the run of {preset} did not end")
            app.read(0.5)
        app.press("q")
        app.ended()
    return _rates_of_last()


def rates_on_command_line(preset: str) -> Rates:
    """Run `fatui bench PRESET`, and return its tokens/s."""
    subprocess.run([*FATUI, "bench", preset], cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE_S)
    return _rates_of_last()


def _newest() -> int:
    """Return when the history was last written, without opening it, which could disturb a run."""
    files = Path(os.environ["XDG_DATA_HOME"]).rglob("*.sqlite*")
    return max((path.stat().st_mtime_ns for path in files), default=0)


def _rates_of_last() -> Rates:
    """Tokens/s of the last run, by the lower quartile of the samples: a machine that others share is slow for seconds
    at a time, which moves a run's median by more than any app could.
    """
    made = subprocess.run(
        [*FATUI, "history", "show", "last", "--json", "-"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    case: dict[str, Any] = json.loads(made.stdout)["cases"][0]
    tokens = case["workload"]["batch"] * case["workload"]["seq"]
    rows = [row for row in case["rows"] if len(row.get("samples") or ()) > 3]
    return {row["implementation"]: tokens / statistics.quantiles(row["samples"], n=4)[0] for row in rows}


def paired_ratios(pairs: int, preset: str, say: Callable[[str], None] = print) -> dict[str, list[float]]:
    """Return tokens/s in the app over those of the command line, from runs in an order that alternates."""
    rates_on_command_line(preset)  # compiles the kernels, and lets `demo` choose
    ratios: dict[str, list[float]] = {}
    for pair in range(pairs):
        if pair % 2:
            in_app, on_line = rates_in_app(preset), rates_on_command_line(preset)
        else:
            on_line, in_app = rates_on_command_line(preset), rates_in_app(preset)
        for name in in_app.keys() & on_line.keys():
            ratios.setdefault(name, []).append(in_app[name] / on_line[name])
        say(f"pair {pair + 1}: {', '.join(f'{name} {each[-1]:.3f}' for name, each in ratios.items())}; {_load()}")
    return ratios


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def _print_keys(options: argparse.Namespace) -> None:
    took = measure_keys(options.count, options.preset, options.key)
    print(f"{len(took)} keys ({options.key}), {_load()}")
    print(summary("key to repaint", [seconds for seconds, _ in took]))
    print(summary("of which on a core", [given.cpu_s for _, given in took]))
    print(summary("and waiting for one", [given.waited_s for _, given in took]))


def _print_live(options: argparse.Namespace) -> None:
    passed, given = measure_live(options.seconds, options.preset)
    print(f"the app takes {given.cpu_s / passed:.1%} of a core during rounds ({passed:.0f} s, {_load()})")


def _print_start(options: argparse.Namespace) -> None:
    roots = [ROOT, *([options.other.resolve()] if options.other else [])]
    found: dict[Path, list[tuple[float, float, float]]] = {root: [] for root in roots}
    for root in roots:
        first_paint(root)  # compiles what Python has not compiled yet
    for number in range(options.count):
        for root in roots[:: 1 if number % 2 else -1]:
            found[root].append((*first_paint(root), import_s(root)))
    for root, each in found.items():
        clock, cpu, imports = (statistics.median(column) for column in zip(*each, strict=True))
        least = min(row[1] for row in each)
        print(f"{root}: first paint after {cpu:.3f} s of CPU (least {least:.3f}), {clock:.2f} s by the clock, ", end="")
        print(f"imports {imports:.3f} s of CPU; median of {len(each)}, {_load()}")


def _print_rates(options: argparse.Namespace) -> None:
    ratios = paired_ratios(options.pairs, options.preset)
    for name, each in ratios.items():
        print(f"{name}: median {statistics.median(each):.3f}")
    mean = statistics.geometric_mean(statistics.median(each) for each in ratios.values())
    print(f"tokens/s in the app over `fatui bench`, geometric mean: {mean:.3f}")


def main() -> int:
    """Measure one thing, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.app", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(required=True)
    keys = kinds.add_parser("keys")
    keys.add_argument("--count", type=int, default=150)
    keys.add_argument("--preset", default=BUSY)
    keys.add_argument("--key", choices=sorted(KEYS), default="digit")
    keys.set_defaults(measure=_print_keys)
    live = kinds.add_parser("live")
    live.add_argument("--seconds", type=float, default=15.0)
    live.add_argument("--preset", default=BUSY)
    live.set_defaults(measure=_print_live)
    start = kinds.add_parser("start")
    start.add_argument("--count", type=int, default=7)
    start.add_argument("--other", type=Path, help="another checkout")
    start.set_defaults(measure=_print_start)
    rates = kinds.add_parser("rates")
    rates.add_argument("--pairs", type=int, default=5)
    rates.add_argument("--preset", default="quick")
    rates.set_defaults(measure=_print_rates)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as private:
        for name in ("CONFIG", "DATA", "STATE"):
            os.environ[f"XDG_{name}_HOME"] = str(Path(private) / name.lower())
        options.measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
