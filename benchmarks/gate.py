"""Count how often the gate of `fatui compare` passes runs of the same code, and fails runs with a planted slowdown.

    python -m benchmarks.gate --count 100 --folder /tmp/gate                       # the same code
    python -m benchmarks.gate --count 20 --delay 0.05 --folder /tmp/gate           # 5 % slower
    python -m benchmarks.gate --count 20 --delay 0.03 --seconds 20 --folder /tmp/gate

A comparison is made of pairs of runs of `fatui bench`, one of the base and one of the changed code, in an order that
alternates: `--pairs` of them, and further ones as long as a row is undecided, up to `--max-pairs`. The planted row is
the implementation `Delayed` below: the baseline's work, and then a wait for a share of the time that it took. Runs are
kept in the folder, so that the script continues where it was stopped; it prints a line for each comparison.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from attention.core.workload import Workload
from attention.implementations.baseline import Baseline
from attention.implementations.calls import MlxRunner
from attention.measure.rounds import Runner

DELAY: Final = "FATUI_GATE_DELAY"
"""Environment variable of the share of its time that `Delayed` waits."""
PLANTED: Final = "benchmarks.gate:Delayed"
GATE_FAILED: Final = 4
ROW: Final = re.compile(r"^\| .* \| (?P<name>[^|]+) \| [^|]+ \| [^|]+ \| (?P<outcome>[A-Z]+) \|$", re.MULTILINE)


class DelayedRunner(MlxRunner):
    """Calls of the baseline; each sample is followed by a wait for a share of the time that it took."""

    _began: float | None = None

    def queue(self) -> list[mx.array]:
        """Queue one call."""
        if self._began is None:
            self._began = time.perf_counter()
        return super().queue()

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs, then wait."""
        super().wait(outputs)
        now = time.perf_counter()
        began, self._began = self._began or now, None
        end = now + float(os.environ.get(DELAY, "0")) * (now - began)
        while time.perf_counter() < end:
            pass


class Delayed(Baseline):
    """The baseline with a planted slowdown."""

    name = "delayed"

    def runner(self, workload: Workload, inputs: Sequence[Any], scale: float) -> Runner:
        """Bind the call."""
        return DelayedRunner(self, workload, inputs, scale)


def main() -> int:
    """Make the comparisons, and print how many passed."""
    options = _options()
    kind = f"{options.preset}-{options.seconds or 'own'}-s-{options.delay:g}"
    counts: Counter[str] = Counter()
    for number in range(options.count):
        result = _comparison(options, options.folder / kind / f"{number:03}")
        counts[result] += 1
        print(f"{kind} {number + 1}: {result}; load {os.getloadavg()[0]:.1f}", flush=True)
    passed = counts["passes"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    print(f"{kind}: {passed} of {options.count} pass, {options.count - passed} fail ({reasons})")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="comparisons")
    parser.add_argument("--delay", type=float, default=0.0, help="planted slowdown as a fraction; 0: the same code")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seconds", type=float, help="of the rounds of a case (the preset's)")
    parser.add_argument("--impl", help="implementations (the preset's)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of a comparison at least")
    parser.add_argument("--max-pairs", type=int, default=8, help="pairs of runs at most")
    parser.add_argument("--fail-on", default="slower:3%")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs are kept")
    return parser.parse_args()


def _comparison(options: argparse.Namespace, folder: Path) -> str:
    """Measure pairs until the gate is decided; return "passes", or the outcomes by which it fails."""
    names = ("base", "new")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for pair in range(options.max_pairs):
        for name in names if pair % 2 == 0 else names[::-1]:
            file = folder / name / f"{pair}.json"
            if not file.exists():
                _measure(options, file, options.delay if name == "new" else 0.0)
        if pair + 1 >= options.pairs:
            result = _judge(options, folder)
            if "UNDECIDED" not in result:
                break
    return result


def _measure(options: argparse.Namespace, file: Path, delay: float) -> None:
    implementations = options.impl or "baseline,poc,practical,demo"
    if options.delay:
        implementations += f",{PLANTED}"
    command = [sys.executable, "-m", "fatui", "bench", options.preset, "--impl", implementations]
    command += ["--seconds", str(options.seconds)] if options.seconds else []
    made = file.with_suffix(".part")
    environment = {**os.environ, DELAY: str(delay), "XDG_DATA_HOME": str(options.folder / "data")}
    subprocess.run(
        [*command, "--json", str(made)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    made.rename(file)


def _judge(options: argparse.Namespace, folder: Path) -> str:
    sides = [str(folder / "base"), str(folder / "new")]
    command = [sys.executable, "-m", "fatui", "compare", *sides, "--fail-on", options.fail_on, "--markdown", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, GATE_FAILED):
        raise RuntimeError(f"fatui compare ended with {done.returncode}: {done.stderr}")
    if done.returncode == 0:
        return "passes"
    rows = [(match["name"].strip(), match["outcome"]) for match in ROW.finditer(done.stdout)]
    failing = [f"{name} {outcome}" for name, outcome in rows if outcome in ("SLOWER", "UNDECIDED")]
    return ", ".join(failing)


if __name__ == "__main__":
    sys.exit(main())
