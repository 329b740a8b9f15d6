"""`fatui compare`: two past runs, row by row."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fatui.report.comparison import Comparison, RowChange

EXAMPLE: Final = """examples:
  fatui compare last~1 last     the run before the last, and the last
  fatui compare 3f9c 81d0

Above 1 means that the second run is faster. "times" compares the medians as they are. Between two runs the machine
differs, so "change" is that of the speedup over the baseline, whose code is assumed unchanged; it counts only beyond
both noise floors and beyond the change in the baseline's own time, and is "≈ 1" within them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("before", metavar="ID", help="a run of the history: its id or the start of it, last, last~1")
    parser.add_argument("after", metavar="ID", help="another")


def run(arguments: argparse.Namespace) -> int:
    """Print the ratio and interval of each row.

    Raises:
        HistoryError: the history is unusable, or has no such run.
    """
    from fatui.cli.output import show
    from fatui.report.comparison import compare
    from fatui.storage.history import RunHistory

    history = RunHistory()
    try:
        comparison = compare(history.get(arguments.before), history.get(arguments.after))
    finally:
        if history.notice:
            cli.print_line(history.notice)
    show(comparison_table(comparison))
    return cli.DONE


def comparison_table(comparison: "Comparison") -> "RenderableType":
    """Render a block per workload, then the rows that only one run has."""
    from rich.console import Group
    from rich.text import Text

    before, after = comparison.before.run, comparison.after.run
    title = Text(f"{before.id} ({before.started[:16]}), then {after.id} ({after.started[:16]})", style="bold")
    notes = [f"  they differ in {text}" for text in comparison.differences]
    notes += [f"  only in {before.id}: {name}" for name in comparison.only_before]
    notes += [f"  only in {after.id}: {name}" for name in comparison.only_after]
    blocks = [_block(changes) for changes in _by_workload(comparison).values()]
    if not blocks:
        notes.insert(0, "  the two runs have no row in common")
    return Group(title, *blocks, *(Text(note, style="dim") for note in notes))


def _by_workload(comparison: "Comparison") -> "dict[str, list[RowChange]]":
    groups: dict[str, list[RowChange]] = {}
    for change in comparison.changes:
        groups.setdefault(change.workload.label, []).append(change)
    return groups


def _block(changes: "list[RowChange]") -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fatui import formatting
    from fatui.report.table import short_name

    title = Text(f"\n{changes[0].workload.label}", style="bold")
    title.append(f" · {_basis(changes[0])}", style="not bold dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    for head in ("", "before", "after", "times", "change", ""):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for change in changes:
        calls = (formatting.interval_text(row.call_s) for row in (change.before, change.after))
        times = f"{formatting.three(change.times.value)}x" if change.times else formatting.UNKNOWN
        texts = (short_name(change.implementation), *calls, times, formatting.speedup_text(change.ratio), _word(change))
        table.add_row(*texts)
    return Group(title, table)


def _basis(change: "RowChange") -> str:
    """Describe the reference of a case's changes, and how large a change must be to count."""
    from fatui import formatting

    if change.reference is None:
        return "no common baseline: the machine's own change cannot be separated from a row's"
    if change.drift is None:
        return f"too few rounds of {change.reference} to measure the machine's own change"
    factor = change.drift.value
    itself = f"{formatting.three(max(factor, 1 / factor))}x as {'fast' if factor > 1 else 'slow'} as before"
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
    if change.implementation == change.reference:
        return "reference"
    if not change.ratio.significant:
        return "same" if formatting.is_clear(change.ratio) else "unclear"
    path = change.before.path, change.after.path
    moved = f", {path[0]} became {path[1]}" if path[0] != path[1] else ""
    return ("faster" if change.ratio.value > 1 else "slower") + moved
