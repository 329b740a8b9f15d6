"""`fatui compare`: two past runs, row by row."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fatui.compare import Change, Comparison

EXAMPLE: Final = """examples:
  fatui compare last~1 last     the run before the last, and the last
  fatui compare 3f9c 81d0

A ratio above 1 means that the second run is faster; "≈ 1" is inside the larger noise floor of the two."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    parser.add_argument("before", metavar="ID", help="a run of the history: its id, the beginning of it, last, last~1")
    parser.add_argument("after", metavar="ID", help="another")


def run(arguments: argparse.Namespace) -> int:
    """Prints each row's ratio with its interval.

    Raises:
        HistoryError: the history cannot be used, or has no such run.
    """
    from fatui.commands.printing import show
    from fatui.compare import compare
    from fatui.history import History

    history = History()
    try:
        comparison = compare(history.get(arguments.before), history.get(arguments.after))
    finally:
        if history.notice:
            cli.tell(history.notice)
    show(comparison_table(comparison))
    return cli.DONE


def comparison_table(comparison: "Comparison") -> "RenderableType":
    """A block for each workload, and what has no partner."""
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


def _by_workload(comparison: "Comparison") -> "dict[str, list[Change]]":
    groups: dict[str, list[Change]] = {}
    for change in comparison.changes:
        groups.setdefault(change.workload.label, []).append(change)
    return groups


def _block(changes: "list[Change]") -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fatui import figures
    from fatui.columns import shortened

    title = Text(f"\n{changes[0].workload.label}", style="bold")
    title.append(f" · noise floor {figures.percent(changes[0].floor)}", style="not bold dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    for head in ("", "before", "after", "ratio", ""):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for change in changes:
        times = (figures.interval_text(row.call_s) for row in (change.before, change.after))
        table.add_row(shortened(change.implementation), *times, figures.speedup_text(change.ratio), _word(change))
    return Group(title, table)


def _word(change: "Change") -> str:
    from fatui import figures

    states = [row.status for row in (change.before, change.after) if row.status != "ok"]
    if states or change.ratio is None:
        return ", then ".join((change.before.status, change.after.status)) if states else "too few rounds to say"
    if not change.ratio.significant:
        return "same" if figures.is_clear(change.ratio) else "unclear"
    path = change.before.path, change.after.path
    moved = f", {path[0]} became {path[1]}" if path[0] != path[1] else ""
    return ("faster" if change.ratio.value > 1 else "slower") + moved
