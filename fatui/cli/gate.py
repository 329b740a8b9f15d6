"""`fatui gate`: measure two versions of the code in turns, pair of runs after pair, until every row is decided."""

import argparse
import shlex
from typing import TYPE_CHECKING, Final

from attention.core.errors import UsageError
from fatui import cli
from fatui.cli.compare import add_criteria

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from attention.core.results import Report
    from fatui.report.gate import Gate, Thresholds

DEFAULT_CRITERIA: Final = ("slower:3%", "inaccurate")
SIDES: Final = ("base", "new")
"""Folders of the runs that are kept."""
EXAMPLE: Final = """examples:
  fatui gate base/ new/ --bench 'quick --impl baseline,kernel.py:Fast'
  fatui gate base/ new/ --fail-on slower:5% --fail-on memory:10% --markdown gate.md
  fatui gate base/ new/ --thresholds gate.toml --keep runs/ --bench 'llama-7b --seconds 2'

BASE and NEW are folders with two versions of the code. `fatui bench` runs in both, with the options of --bench: a round
of one, then a round of the other. Pairs of runs are added until every row is shown to be slower, or not to be slower by
as much as the limit, or until there are --pairs of them. Exit codes: 0 the gate passes, 4 it fails, 1 a run gave no
results, 2 wrong usage, 130 interrupted (docs/gate.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    from fatui.report.comparison import MAX_PAIRS

    parser.add_argument("before", metavar="BASE", help="the folder of the version to compare with")
    parser.add_argument("after", metavar="NEW", help="the folder of the version to judge")
    parser.add_argument(
        "--bench", metavar="OPTIONS", default="quick", help="those of `fatui bench` in one text (quick)"
    )
    add_criteria(parser)
    parser.add_argument(
        "--pairs", type=int, default=MAX_PAIRS, metavar="N", help=f"pairs of runs at most ({MAX_PAIRS})"
    )
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs in its folders base and new")
    parser.add_argument("--markdown", metavar="FILE", help="write the comparison as a Markdown table ('-' is stdout)")


def run(arguments: argparse.Namespace) -> int:
    """Measure pairs of runs until the gate is decided; print the judgement; return the exit code.

    Raises:
        UsageError: the request is wrong.
    """
    from tempfile import TemporaryDirectory

    from attention.core.files import expand_home
    from fatui.alternation import Ended
    from fatui.cli.compare import given_thresholds, report_gate
    from fatui.cli.options import Problems
    from fatui.cli.output import requested_exports

    mistakes = Problems()
    if not (arguments.fail_on or arguments.thresholds):
        arguments.fail_on = list(DEFAULT_CRITERIA)
    thresholds = mistakes.catch(lambda: given_thresholds(arguments))
    exports = mistakes.catch(lambda: requested_exports(arguments, ("markdown",))) or []
    bench = mistakes.catch(lambda: _bench_options(arguments.bench))
    folders = mistakes.catch(lambda: _folders(arguments))
    mistakes.raise_all()
    assert thresholds is not None
    assert folders is not None
    assert bench is not None
    with TemporaryDirectory(prefix="fatui-gate-") as scratch:
        kept = expand_home(scratch if arguments.keep is None else arguments.keep)
        try:
            gate = _measure(folders, bench, arguments.pairs, thresholds, kept)
        except Ended as ended:
            cli.print_line(ended)
            return cli.WRONG_USAGE if ended.code == cli.WRONG_USAGE else cli.FAILED
        return report_gate(gate, exports)


def _folders(arguments: argparse.Namespace) -> "list[Path]":
    """Return the two folders, after a check of them, of the number of pairs, and of the folder for the runs."""
    from attention.core.files import expand_home
    from fatui.report.comparison import MAX_PAIRS, MIN_PAIRS
    from fatui.storage.history import is_folder

    paths = [expand_home(name) for name in (arguments.before, arguments.after)]
    problems = [f"{str(path)[:200]}: there is no such folder" for path in paths if not is_folder(path)]
    if not MIN_PAIRS <= arguments.pairs <= MAX_PAIRS:
        problems.append(f"--pairs: got {arguments.pairs}; it takes {MIN_PAIRS} to {MAX_PAIRS}")
    if arguments.keep is not None and (problem := _keep_problem(arguments.keep)):
        problems.append(f"--keep: {problem}")
    if problems:
        raise UsageError(*problems)
    return paths


def _keep_problem(keep: str) -> str | None:
    """Return why a folder cannot be that of the runs; None if it can."""
    import os

    from attention.core.files import expand_home

    folder = expand_home(keep)
    try:
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if not keep or not there.is_dir():
            return f"got '{keep[:200]}'; it takes a folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{keep[:200]} cannot be written: no permission"
        if any(run for side in SIDES for run in (folder / side).glob("*.json")):
            return f"{keep[:200]} has runs already, which would be compared with the new ones"
    except (OSError, ValueError) as error:  # a name that is too long
        return f"{keep[:60]} cannot be made: {getattr(error, 'strerror', None) or error}"
    return None


def _bench_options(text: str) -> list[str]:
    from fatui.cli.main import command_request

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--bench: {error}: {text[:100]}") from None
    try:
        command_request("bench", words)
    except UsageError as error:
        raise UsageError(*(f"--bench: {problem}" for problem in error.problems)) from None
    return words


def _measure(
    folders: "Sequence[Path]", bench: "Sequence[str]", most: int, thresholds: "Thresholds", kept: "Path"
) -> "Gate":
    """Measure pairs until they decide, or there are as many as allowed; the order within a pair alternates."""
    from fatui.alternation import in_turns
    from fatui.report.comparison import compare_pairs
    from fatui.report.gate import judge
    from fatui.storage.result_files import read

    runs: list[tuple[Report, Report]] = []
    for name in SIDES:
        (kept / name).mkdir(parents=True, exist_ok=True)
    with in_turns(folders, bench) as alternation:
        while True:
            number = len(runs) + 1
            files = [kept / name / f"{number:02}.json" for name in SIDES]
            alternation.measure(files, first=(number + 1) % 2)
            runs.append((read(files[0]), read(files[1])))
            gate = judge(compare_pairs(runs), thresholds)
            open_rows = sum(bool(row.undecided) for row in gate.rows)
            cli.print_line(f"pair {number} of at most {most}: {open_rows} of {len(gate.rows)} rows undecided")
            if gate.ended(most):
                return gate
