"""Count how often `fatui gate` passes the same code, and fails code with a planted slowdown.

    python -m benchmarks.gate --count 100 --folder /tmp/gate                          # the same code
    python -m benchmarks.gate --count 20 --delay 0.05 --folder /tmp/gate              # 5 % slower
    python -m benchmarks.gate --count 20 --delay 0.03 --seconds 20 --folder /tmp/gate
    python -m benchmarks.gate --count 2000 --resample /tmp/gate [--delay 0.05]        # comparisons of kept pairs

The planted row is the implementation `Delayed` below: the baseline's work, and then a wait for a share of the time that
it took. With `--lanes` several comparisons run side by side, each on two cores of its own. Runs are kept in the folder,
and a line is printed for each comparison; none begins after `--limit` seconds.

`--resample` draws the pairs of each comparison at random from those that were kept, and changes base and new at random,
which for the same code is as good as another measurement; `--delay` makes one row of each slower.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

import mlx.core as mx
from msgspec import structs

from attention.core.workload import Workload
from attention.implementations.baseline import Baseline
from attention.implementations.calls import MlxRunner
from attention.measure.rounds import Runner
from benchmarks.pty_app import ROOT, environment_for
from fatui.report.comparison import MIN_PAIRS, RowChange, compare
from fatui.report.gate import parse_criteria
from fatui.storage.result_files import read

GATE_FAILED: Final = 4
CORES: Final = 2
"""Cores of a lane."""
PLANTED: Final = "planted.py"
ROW: Final = re.compile(r"^\| .* \| (?P<name>[^|]+) \| [^|]+ \| [^|]+ \| (?P<outcome>[A-Z]+) \|$", re.MULTILINE)


class DelayedRunner(MlxRunner):
    """Calls of the baseline; each sample is followed by a wait for a share of the time that it took."""

    delay = 0.0
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
        end = now + self.delay * (now - began)
        while time.perf_counter() < end:
            pass


class Delayed(Baseline):
    """The baseline with a planted slowdown."""

    name = "delayed"
    delay = 0.0

    def runner(self, workload: Workload, inputs: Sequence[Any], scale: float) -> Runner:
        """Bind the call."""
        made = DelayedRunner(self, workload, inputs, scale)
        made.delay = self.delay
        return made


def main() -> int:
    """Make the comparisons, and print how many passed."""
    options = _options()
    if options.resample is not None:
        return _resample(options)
    kind = f"{options.preset}-{options.seconds or 'own'}-s-{options.delay:g}"
    began, counts = time.monotonic(), Counter[str]()
    lanes: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))[-CORES * options.lanes :] if options.lanes > 1 else []
    for lane in range(options.lanes):
        lanes.put(cores[CORES * lane : CORES * (lane + 1)])

    def compare(number: int) -> None:
        if time.monotonic() - began > options.limit:
            return
        own = lanes.get()
        started = time.monotonic()
        result = _comparison(options, options.folder / kind / f"{number:03}", own)
        lanes.put(own)
        counts[result.partition(";")[0]] += 1
        took = time.monotonic() - started
        print(f"{kind} {number + 1}: {result}; {took:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)

    with ThreadPoolExecutor(options.lanes) as pool:
        list(pool.map(compare, range(options.count)))
    made, passed = counts.total(), sum(count for result, count in counts.items() if result.startswith("passes"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    print(f"{kind}: {passed} of {made} pass, {made - passed} fail ({reasons})")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="comparisons")
    parser.add_argument("--delay", type=float, default=0.0, help="planted slowdown as a fraction; 0: the same code")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seconds", type=float, help="of the rounds of a case (the preset's)")
    parser.add_argument("--impl", default="baseline,poc,practical,demo", help="implementations beside the planted one")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of runs at most")
    parser.add_argument("--fail-on", default="slower:3%")
    parser.add_argument("--lanes", type=int, default=1, help="comparisons side by side, on two cores each")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no comparison begins")
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--resample", type=Path, help="a folder of kept runs to draw comparisons from")
    options = parser.parse_args()
    if (options.folder is None) is (options.resample is None):
        parser.error("it takes --folder or --resample")
    return options


def _resample(options: argparse.Namespace) -> int:
    """Judge comparisons of kept pairs of the same code, and print how they end."""
    pairs = _kept_pairs(options.resample)
    slower = parse_criteria([options.fail_on]).slower or 0.0
    draw, counts, used = random.Random(0), Counter[str](), 0
    for _ in range(options.count):
        delayed = draw.choice(sorted(pairs[0])) if options.delay else None
        drawn = []
        for found in draw.choices(pairs, k=options.pairs):
            swapped = draw.random() < 0.5
            drawn.append(
                {name: _changed(each, swapped, options.delay * (name == delayed)) for name, each in found.items()}
            )
        for number in range(MIN_PAIRS, options.pairs + 1):
            outcomes = {
                name: structs.replace(each, by_pair=tuple(one[name].by_pair[0] for one in drawn[:number])).outcome(
                    slower, len(drawn[0])
                )
                for name, each in drawn[0].items()
            }
            if "SLOWER" in outcomes.values() or "UNDECIDED" not in outcomes.values():
                break
        used += number
        alarm = ", ".join(name for name, outcome in outcomes.items() if outcome == "SLOWER" and name != delayed)
        counts["another row SLOWER" if alarm else "passes" if "SLOWER" not in outcomes.values() else "fails"] += 1
        counts["with undecided rows"] += "UNDECIDED" in outcomes.values()
    each = used / options.count
    print(f"{options.count} comparisons drawn from {len(pairs)} pairs, {each:.1f} pairs each: {dict(counts)}")
    return 0


def _kept_pairs(folder: Path) -> list[dict[str, RowChange]]:
    """Return the rows of each kept pair, without planted ones; pairs that lack one of the first pair's are left out."""
    found: list[dict[str, RowChange]] = []
    for base in sorted(folder.rglob("base/*.json")):
        new = base.parents[1] / "new" / base.name
        if new.exists():
            changes = compare(read(base), read(new)).changes
            rows = {
                each.implementation: each for each in changes if each.by_pair and PLANTED not in each.implementation
            }
            if not found or set(rows) == set(found[0]):
                found.append(rows)
    return found


def _changed(change: RowChange, swapped: bool, delay: float) -> RowChange:
    (ratio,) = change.by_pair
    low, high = (1 / ratio.high, 1 / ratio.low) if swapped else (ratio.low, ratio.high)
    value, share = 1 / ratio.value if swapped else ratio.value, 1 + delay
    made = structs.replace(ratio, value=value / share, low=low / share, high=high / share)
    return structs.replace(change, ratio=made, by_pair=(made,))


def _comparison(options: argparse.Namespace, folder: Path, cores: Sequence[int]) -> str:
    """Compare two folders with the planted row; return "passes" or by which rows it fails, and the number of pairs."""
    implementations = options.impl
    for side, delay in (("base", 0.0), ("new", options.delay)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        text = f"from benchmarks.gate import Delayed\n\n\nclass Planted(Delayed):\n    delay = {delay}\n"
        (folder / side / PLANTED).write_text(text)
    if options.delay:
        implementations += f",{PLANTED}:Planted"
    bench = f"{options.preset} --impl {implementations}" + (f" --seconds {options.seconds}" if options.seconds else "")
    command = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    command += [sys.executable, "-m", "fatui", "gate", str(folder / "base"), str(folder / "new"), "--bench", bench]
    command += ["--fail-on", options.fail_on, "--pairs", str(options.pairs), "--keep", str(folder), "--markdown", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_for(ROOT))
    if done.returncode not in (0, GATE_FAILED):
        return f"ended with {done.returncode}: {done.stderr[-300:]}"
    rows = [(match["name"].strip(), match["outcome"]) for match in ROW.finditer(done.stdout)]
    named = {outcome: ", ".join(name for name, own in rows if own == outcome) for outcome in ("SLOWER", "UNDECIDED")}
    open_rows = f", undecided {named['UNDECIDED']}" if named["UNDECIDED"] else ""
    result = "passes" if done.returncode == 0 else f"{named['SLOWER']} slower"
    return f"{result}; {done.stderr.count('fatui: pair ')} pairs{open_rows}"


if __name__ == "__main__":
    sys.exit(main())
