"""`fatui compare`: past runs, row by row; a gate for continuous integration; runs of several machines side by side."""

import argparse
from typing import TYPE_CHECKING, Final

from attention.core.errors import UsageError
from fatui import cli

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from attention.core.results import Report
    from fatui.cli.output import Export
    from fatui.report.comparison import Comparison, MachineTable, RowChange
    from fatui.report.gate import Gate, Thresholds
    from fatui.storage.history import RunHistory

MAX_THRESHOLD_BYTES: Final = 2**16
DROPPED_FIRST: Final = ("tokens/s", "memory", "speedup")
"""Columns that a table of several machines leaves out if it would be too wide."""
EXAMPLE: Final = """examples:
  fatui compare last~1 last     the run before the last, and the last
  fatui compare 3f9c 81d0
  fatui compare base/ new/ --fail-on slower:3% --fail-on memory:10% --fail-on inaccurate
  fatui compare base.json new.json --thresholds gate.toml --markdown -
  fatui compare laptop.json h200.json last --by device

Above 1 means that the second run is faster. "times" compares the medians as they are. Between two runs the machine
differs, so "change" is that of the speedup over the baseline, whose code is assumed unchanged; it counts only beyond
both noise floors and beyond the change in the baseline's own time, and is "≈ 1" within them.

With --fail-on each row is FASTER, SAME, SLOWER or UNDECIDED; the exit code is 4 if the gate fails. Folders, and names
joined by commas, are compared as pairs of runs, in their order. `fatui gate` makes such pairs itself (docs/gate.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    named = "a run of the history (its id or the start of it, last, last~1), a file of --json, or a folder of files"
    parser.add_argument("before", metavar="BASE", help=named)
    parser.add_argument("after", metavar="NEW", nargs="?", help="another")
    parser.add_argument("more", metavar="RUN", nargs="*", default=[], help="further ones, with --by device")
    parser.add_argument("--by", metavar="device", help="put runs of several machines side by side")
    add_criteria(parser.add_argument_group("gate"))
    parser.add_argument("--markdown", metavar="FILE", help="write the comparison as a Markdown table ('-' is stdout)")


def add_criteria(group: "argparse._ActionsContainer") -> None:
    """Add the options that say what fails a gate."""
    group.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="WHAT",
        help="slower:3%%, memory:10%% or inaccurate: what makes the exit code 4; may be repeated",
    )
    group.add_argument("--thresholds", metavar="FILE", help="the same as a TOML file, also for single implementations")
    group.add_argument("--undecided", metavar="fail|pass", help="what rows do that the runs cannot decide (pass)")


def run(arguments: argparse.Namespace) -> int:
    """Print the ratio and interval of each row, and judge them; return the exit code.

    Raises:
        UsageError: the request is wrong, or a file is not a run.
        HistoryError: the history is unusable, or has no such run.
    """
    if arguments.by is not None:
        return _side_by_side(arguments)
    if arguments.after is None or arguments.more:
        count = "one name" if arguments.after is None else f"{2 + len(arguments.more)} names"
        raise UsageError(f"compare: got {count}; it takes BASE and NEW, or any number with --by device")
    from fatui.cli.options import Problems
    from fatui.cli.output import requested_exports
    from fatui.report.comparison import compare_pairs
    from fatui.report.gate import judge

    mistakes = Problems()
    thresholds = mistakes.catch(lambda: given_thresholds(arguments))
    exports = mistakes.catch(lambda: requested_exports(arguments, ("markdown",))) or []
    mistakes.raise_all()
    assert thresholds is not None
    with cli.opened_history() as history:
        comparison = compare_pairs(_pairs(arguments, history))
    return report_gate(judge(comparison, thresholds), exports)


def report_gate(gate: "Gate", exports: "Sequence[Export]") -> int:
    """Print a comparison and, if anything is judged, what fails and what is left open; return the exit code."""
    from fatui.report.gate import to_markdown

    judging = gate.thresholds.judging
    code = _print_or_write(comparison_table(gate.comparison, gate if judging else None), to_markdown(gate), exports)
    if not judging:
        return code
    for text in (*gate.problems, *gate.remarks):
        cli.print_line(text)
    return code if gate.passed else cli.GATE_FAILED


def _side_by_side(arguments: argparse.Namespace) -> int:
    """Print the rows of several machines."""
    from fatui.cli.output import requested_exports
    from fatui.report.comparison import by_machine, to_markdown
    from fatui.storage.history import read_runs

    if arguments.by != "device":
        raise UsageError(f"--by: got '{arguments.by[:40]}'; it takes device")
    if arguments.fail_on or arguments.thresholds is not None or arguments.undecided is not None:
        raise UsageError("--by device: it takes no gate; times of different machines say nothing about code")
    exports = requested_exports(arguments, ("markdown",))
    names = [name for name in (arguments.before, arguments.after, *arguments.more) if name is not None]
    with cli.opened_history() as history:
        table = by_machine([report for name in names for report in read_runs(name, history)])
    return _print_or_write(_machine_blocks(table), to_markdown(table), exports)


def _print_or_write(table: "RenderableType", text: str, exports: "Sequence[Export]") -> int:
    """Print a table, unless its Markdown goes to stdout, and write that to its exports; return the exit code."""
    from fatui.cli.output import STDOUT, show, write_text

    if not any(export.target == STDOUT for export in exports):
        show(table)
    failures = [problem for export in exports if (problem := write_text(export, text))]
    for failure in failures:
        cli.print_line(failure)
    return cli.FAILED if failures else cli.DONE


def _machine_blocks(table: "MachineTable") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from fatui.report.comparison import HEADS, NOTE, cells, labels
    from fatui.report.table import FittedTable, short_name

    blocks: list[RenderableType] = [Text(f"[{number}] {name}") for number, name in enumerate(table.machines, 1)]
    for label, rows in labels(table).items():
        shown = FittedTable("", *HEADS[1:], dropped_first=DROPPED_FIRST)
        for first, *rest in (cells(name, entry) for name, entry in rows):
            shown.add_row(short_name(first), *rest)
        blocks += [Text(f"\n{label}", style="bold"), shown]
    return Group(*blocks, *(Text(f"  {note}", style="dim") for note in (NOTE, *table.notes)))


def given_thresholds(arguments: argparse.Namespace) -> "Thresholds":
    """Return the thresholds of `add_criteria`.

    Raises:
        UsageError: with every mistake.
    """
    from msgspec import structs

    from fatui.report.gate import POLICIES, Thresholds, parse_criteria

    base = _thresholds_of_file(arguments.thresholds) if arguments.thresholds is not None else Thresholds()
    made = parse_criteria(arguments.fail_on, base)
    if arguments.undecided is None:
        return made
    if arguments.undecided not in POLICIES:
        raise UsageError(f"--undecided: got '{arguments.undecided[:40]}'; it takes fail or pass")
    return structs.replace(made, undecided=arguments.undecided)


def _thresholds_of_file(name: str) -> "Thresholds":
    from attention.core.files import expand_home, parse_toml, read_bounded
    from fatui.report.gate import thresholds_of

    if not name:
        raise UsageError("--thresholds: got ''; it takes a file")
    path = expand_home(name)
    try:
        return thresholds_of(parse_toml(read_bounded(path, MAX_THRESHOLD_BYTES).decode()))
    except UsageError as error:
        raise UsageError(*(f"{path}: {problem}" for problem in error.problems)) from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _pairs(arguments: argparse.Namespace, history: "RunHistory") -> "list[tuple[Report, Report]]":
    from fatui.storage.history import read_runs

    before, after = (read_runs(name, history) for name in (arguments.before, arguments.after))
    if len(before) != len(after):
        raise UsageError(f"compare: BASE has {len(before)} runs and NEW {len(after)}; pairs take as many of both")
    return list(zip(before, after, strict=True))


def comparison_table(comparison: "Comparison", gate: "Gate | None" = None) -> "RenderableType":
    """Render a block per workload, then the rows that only one run has; with a gate the outcome of each row."""
    from rich.console import Group
    from rich.text import Text

    from fatui.report.gate import outcome_text

    before, after = comparison.before.run, comparison.after.run
    title = Text(f"{before.id} ({before.started[:16]}), then {after.id} ({after.started[:16]})", style="bold")
    if comparison.pairs > 1:
        title.append(f", and {comparison.pairs - 1} more pairs")
    notes = [f"  they differ in {text}" for text in comparison.differences]
    notes += [f"  {name}: edited since it was written" for name in comparison.edited]
    notes += [f"  only in {before.id}: {name}" for name in comparison.only_before]
    notes += [f"  only in {after.id}: {name}" for name in comparison.only_after]
    words = {id(row.change): outcome_text(row) for row in gate.rows} if gate else {}
    blocks = [_block(changes, words) for changes in _by_workload(comparison).values()]
    if not blocks:
        notes.insert(0, "  the two runs have no row in common")
    if gate:
        passed = "passes" if gate.passed else "fails"
        notes.append(f"  the gate {passed}")
    return Group(title, *blocks, *(Text(note, style="dim") for note in notes))


def _by_workload(comparison: "Comparison") -> "dict[str, list[RowChange]]":
    groups: dict[str, list[RowChange]] = {}
    for change in comparison.changes:
        groups.setdefault(change.workload.label, []).append(change)
    return groups


def _block(changes: "list[RowChange]", outcomes: dict[int, str]) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from fatui import formatting
    from fatui.report.table import FittedTable, short_name

    title = Text(f"\n{changes[0].workload.label}", style="bold")
    title.append(f" · {_basis(changes[0])}", style="not bold dim")
    table = FittedTable(dropped_first=("times", "before", "after"))
    for head in ("", "before", "after", "times", "change", ""):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for change in changes:
        calls = (formatting.interval_text(row.call_s) for row in (change.before, change.after))
        times = f"{formatting.three(change.times.value)}x" if change.times else formatting.UNKNOWN
        word = outcomes.get(id(change)) or _word(change)
        table.add_row(short_name(change.implementation), *calls, times, formatting.speedup_text(change.ratio), word)
    return Group(title, table)


def _basis(change: "RowChange") -> str:
    """Describe the reference of a case's changes, and how large a change must be to count."""
    from fatui import formatting

    if change.in_turns:
        return "measured in turns, round by round: times are compared as they are"
    if change.reference is None:
        return "no common baseline: the machine's own change cannot be separated from a row's"
    if change.drift is None:
        return f"too few rounds of {change.reference} to measure the machine's own change"
    factor = change.drift.value
    times = formatting.three(max(factor, 1 / factor))
    itself = "as fast as before" if times == "1.00" else f"{times}x as {'fast' if factor > 1 else 'slow'} as before"
    counts = f"a change counts beyond {formatting.percent(change.floor)}"
    return f"relative to {change.reference}, which is {itself}; {counts}"


def _word(change: "RowChange") -> str:
    from fatui import formatting

    states = [row.status for row in (change.before, change.after) if row.status != "ok"]
    if states:
        return ", then ".join((change.before.status, change.after.status))
    few = change.before.collecting or change.after.collecting
    if few or change.ratio is None:
        return few or "no common baseline"
    if change.is_reference:
        return "reference"
    if not change.ratio.significant:
        return "same" if formatting.is_clear(change.ratio) and change.outcome() == "SAME" else "unclear"
    path = change.before.path, change.after.path
    moved = f", {path[0]} became {path[1]}" if path[0] != path[1] else ""
    return ("faster" if change.ratio.value > 1 else "slower") + moved
