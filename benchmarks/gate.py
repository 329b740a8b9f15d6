"""Count how often `fatui gate` passes the same code, and fails code with a planted slowdown.

    python -m benchmarks.gate --count 100 --folder /tmp/gate                          # the same code
    python -m benchmarks.gate --count 20 --delays 0.05 --folder /tmp/gate             # 5 % slower
    python -m benchmarks.gate --count 60 --delays 0,0,0,0.05 --folder /tmp/gate       # in turns, three of four the same
    python -m benchmarks.gate --count 2000 --simulate /tmp/gate [--delays 0.05]       # of kept pairs: a simulation

The planted row is the implementation `Delayed` of `benchmarks.planted`: the baseline's work, and then a wait for a
share of the time that it took. With `--lanes` several comparisons run side by side, each on two cores of its own. Runs
and results are kept in the folder, and a line is printed for each comparison, with the count so far, and a table at the
end; none begins after `--limit` seconds. Stopped (SIGINT or SIGTERM), it ends what runs and prints the table too. The
same command again makes those that are missing: results in the folder count, and what was interrupted begins anew.

`--simulate` measures nothing. A comparison's pairs are drawn at random from those that were kept of the same code, and
base and new changed at random; of each pair blocks of successive rounds are drawn, the same of both sides and of all
rows, so that drift, and what successive rounds have in common, stay. `--delays` makes one row of each slower,
`--rounds` draws more or fewer rounds than were measured. The judgement is the gate's own.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Final

import msgspec
from msgspec import Struct, structs

from attention.core.results import Report, Row
from benchmarks.pty_app import ROOT, environment_for
from fatui.report.comparison import MAX_PAIRS, compare_pairs
from fatui.report.gate import Gate, judge, parse_criteria
from fatui.storage.result_files import read

GATE_FAILED: Final = 4
CORES: Final = 2
"""Cores of a lane."""
INTERRUPTED: Final = 130
STOPPED: Final = threading.Event()
RUNNING: Final = set[subprocess.Popen[str]]()
PLANTED: Final = "planted.py"
RESULT: Final = "result.json"
BLOCK: Final = 4
"""Successive rounds that are drawn together."""
ROW: Final = re.compile(r"^\| .* \| (?P<name>[^|]+) \| [^|]+ \| [^|]+ \| (?P<outcome>[A-Z]+) \|$", re.MULTILINE)


class Result(Struct, frozen=True, kw_only=True):
    """How a comparison ended."""

    outcome: str
    """"passes", "fails", or what else happened."""
    slower: tuple[str, ...] = ()
    """Rows called SLOWER, and those left open."""
    undecided: tuple[str, ...] = ()
    pairs: int = 0
    seconds: float = 0.0
    load: float = 0.0

    @property
    def text(self) -> str:
        """Describe it in a line."""
        rows = f", {', '.join(self.slower)} slower" if self.slower else ""
        left = f", undecided {', '.join(self.undecided)}" if self.undecided else ""
        return f"{self.outcome}{rows}; {self.pairs} pairs{left}; {self.seconds:.0f} s, load {self.load:.1f}"


def main() -> int:
    """Make the comparisons, and print how many passed."""
    options = _options()
    if options.simulate is not None:
        return _simulate(options)
    began = time.monotonic()
    lanes: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))[-CORES * options.lanes :] if options.lanes > 1 else []
    for lane in range(options.lanes):
        lanes.put(cores[CORES * lane : CORES * (lane + 1)])

    STOPPED.clear()
    found: dict[str, list[Result]] = {}

    def compare(number: int) -> None:
        """Make a comparison, unless one of an earlier command is there or the time is over, and count it."""
        delay = options.delays[number % len(options.delays)]
        kind = f"{options.preset}-{options.seconds or 'own'}-s-{delay:g}"
        folder = options.folder / kind / f"{number:03}"
        file = folder / RESULT
        if file.exists():
            result = msgspec.json.decode(file.read_bytes(), type=Result)
        elif STOPPED.is_set() or time.monotonic() - began > options.limit:
            return
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted comparison
            own = lanes.get()
            started = time.monotonic()
            result = _comparison(options, folder, own, delay)
            lanes.put(own)
            result = structs.replace(result, seconds=time.monotonic() - started, load=os.getloadavg()[0])
            if STOPPED.is_set():
                return
            file.write_bytes(msgspec.json.encode(result))
            own_kind = [*found.get(kind, ()), result]
            so_far = f"so far {sum(as_asked(kind, each) for each in own_kind)} of {len(own_kind)} as asked"
            print(f"{kind} {number + 1} of {options.count}: {result.text}; {so_far}", flush=True)
        found.setdefault(kind, []).append(result)

    with _stoppable(), ThreadPoolExecutor(options.lanes) as pool:
        list(pool.map(compare, range(options.count)))
    print("\n".join(["", *table_lines(found)]))
    return INTERRUPTED if STOPPED.is_set() else 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """End the comparisons that run, and begin no other, on SIGINT and SIGTERM."""

    def stop(number: int, frame: object) -> None:
        STOPPED.set()
        for process in list(RUNNING):
            process.send_signal(signal.SIGINT)  # it ends its commands

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_asked(kind: str, result: Result) -> bool:
    """Return whether a comparison ended as it should: the same code passes, and a planted slowdown is the one found."""
    if _is_same_code(kind):
        return result.outcome == "passes"
    return result.outcome == "fails" and any(PLANTED in name for name in result.slower)


def _is_same_code(kind: str) -> bool:
    return kind.endswith("-s-0")


def table_lines(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return a table of the comparisons of each kind: what was compared, seconds a side, planted slowdown."""
    lines = [
        "| comparison | as asked | of | SLOWER otherwise | with undecided rows | pairs | seconds | load |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for kind, results in sorted(found.items()):
        good = sum(as_asked(kind, each) for each in results)
        false = sum(any(_is_same_code(kind) or PLANTED not in name for name in each.slower) for each in results)
        pairs = [each.pairs for each in results]
        undecided = sum(bool(each.undecided) for each in results)
        seconds, load = median(each.seconds for each in results), median(each.load for each in results)
        lines.append(
            f"| {kind} | {good} | {len(results)} | {false} | {undecided} | "
            f"{min(pairs)} to {max(pairs)}, median {median(pairs):g} | {seconds:.0f} | {load:.1f} |"
        )
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10, help="comparisons")
    parser.add_argument(
        "--delays", type=_fractions, default=[0.0], help="planted slowdowns, taken in turns, as fractions; 0: same code"
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seconds", type=float, help="of the rounds of a case (the preset's)")
    parser.add_argument("--impl", default="baseline,poc,practical,demo", help="implementations beside the planted one")
    parser.add_argument("--pairs", type=int, default=MAX_PAIRS, help="pairs of runs at most")
    parser.add_argument("--fail-on", default="slower:3%")
    parser.add_argument("--lanes", type=int, default=1, help="comparisons side by side, on two cores each")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no comparison begins")
    parser.add_argument("--folder", type=Path, help="where runs and results are kept")
    parser.add_argument("--simulate", type=Path, help="a folder of kept runs to draw comparisons from")
    parser.add_argument("--rounds", type=int, help="drawn rounds of a run (as many as were measured)")
    options = parser.parse_args()
    if (options.folder is None) is (options.simulate is None):
        parser.error("it takes --folder or --simulate")
    return options


def _fractions(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


Pair = tuple[Report, Report]


def _simulate(options: argparse.Namespace) -> int:
    """Judge comparisons drawn from kept pairs of the same code, and print how they end."""
    kept = kept_pairs(options.simulate)
    thresholds = parse_criteria([options.fail_on])
    draw = random.Random(0)
    names = sorted(row.implementation for row in kept[0][0].cases[0].rows)
    for delay in dict.fromkeys(options.delays):
        counts, used = Counter[str](), 0
        for _ in range(options.count):
            slowed = draw.choice(names) if delay else None
            pairs: list[Pair] = []
            while True:
                pairs.append(drawn(draw.choice(kept), draw, options.rounds, slowed, delay))
                gate: Gate = judge(compare_pairs(pairs), thresholds)
                if gate.ended(options.pairs):
                    break
            used += len(pairs)
            slower = {row.change.implementation for row in gate.rows if row.outcome == "SLOWER"}
            counts["passes" if gate.passed else "fails"] += 1
            counts["another row SLOWER"] += bool(slower - {slowed}) and slowed is not None
            counts["with undecided rows"] += any(row.outcome == "UNDECIDED" for row in gate.rows)
        print(
            f"simulated from {len(kept)} kept pairs, one row {delay:.0%} slower: {options.count} comparisons of "
            f"{used / options.count:.1f} pairs: {', '.join(f'{n} {name}' for name, n in counts.most_common() if n)}",
            flush=True,
        )
    return 0


def kept_pairs(folder: Path) -> list[Pair]:
    """Return the kept pairs of runs, without planted rows; pairs that lack rows or samples are left out."""
    found: list[Pair] = []
    for base in sorted(folder.rglob("base/*.json")):
        new = base.parents[1] / "new" / base.name
        if new.exists():
            both = (read(base), read(new))
            if not all(report.cases for report in both):  # interrupted
                continue
            pair = (_unplanted(both[0]), _unplanted(both[1]))
            rows = [[row.implementation for row in report.cases[0].rows if row.samples] for report in pair]
            whole = all(len({len(row.samples) for row in report.cases[0].rows}) == 1 for report in pair)
            if rows[0] == rows[1] and whole and (not found or rows[0] == _names(found[0][0])):
                found.append(pair)
    return found


def _names(report: Report) -> list[str]:
    return [row.implementation for row in report.cases[0].rows]


def _unplanted(report: Report) -> Report:
    case = report.cases[0]
    rows = tuple(row for row in case.rows if PLANTED not in row.implementation)
    return structs.replace(report, cases=(structs.replace(case, rows=rows),))


def drawn(pair: Pair, draw: random.Random, rounds: int | None, slowed: str | None, delay: float) -> Pair:
    """Return a pair of runs made of blocks of a pair's rounds, with one row of the second slower."""
    first, second = pair if draw.random() < 0.5 else pair[::-1]
    measured = min(len(first.cases[0].rows[0].samples), len(second.cases[0].rows[0].samples))
    wanted, taken = rounds or measured, list[int]()
    while len(taken) < wanted:
        begin = draw.randrange(measured)
        taken += [(begin + step) % measured for step in range(min(BLOCK, wanted - len(taken)))]
    return _of_rounds(first, taken, None, 0.0), _of_rounds(second, taken, slowed, delay)


def _of_rounds(report: Report, taken: Sequence[int], slowed: str | None, delay: float) -> Report:
    case = report.cases[0]

    def row_of(row: Row) -> Row:
        factor = 1 + delay if row.implementation == slowed else 1.0
        return structs.replace(row, samples=tuple(factor * row.samples[index] for index in taken))

    return structs.replace(report, cases=(structs.replace(case, rows=tuple(map(row_of, case.rows))),))


def _comparison(options: argparse.Namespace, folder: Path, cores: Sequence[int], delay: float) -> Result:
    """Compare two folders with the planted row."""
    implementations = options.impl
    for side, own in (("base", 0.0), ("new", delay)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        text = f"from benchmarks.planted import Delayed\n\n\nclass Planted(Delayed):\n    delay = {own}\n"
        (folder / side / PLANTED).write_text(text)
    if delay:
        implementations += f",{PLANTED}:Planted"
    bench = f"{options.preset} --impl {implementations}" + (f" --seconds {options.seconds}" if options.seconds else "")
    command = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    command += [sys.executable, "-m", "fatui", "gate", str(folder / "base"), str(folder / "new"), "--bench", bench]
    command += ["--fail-on", options.fail_on, "--pairs", str(options.pairs), "--keep", str(folder), "--markdown", "-"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_for(ROOT),
        start_new_session=True,  # a key in the terminal stops it through this process alone
    ) as process:
        RUNNING.add(process)
        printed, errors = process.communicate()
        RUNNING.discard(process)
    if process.returncode not in (0, GATE_FAILED):
        return Result(outcome=f"ended with {process.returncode}: {errors[-300:]}")
    rows = [(match["name"].strip(), match["outcome"]) for match in ROW.finditer(printed)]
    return Result(
        outcome="fails" if process.returncode else "passes",
        slower=tuple(name for name, own in rows if own == "SLOWER"),
        undecided=tuple(name for name, own in rows if own == "UNDECIDED"),
        pairs=errors.count("fatui: pair "),
    )


if __name__ == "__main__":
    sys.exit(main())
