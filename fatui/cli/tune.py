"""`fatui tune`: find the fastest candidate of `demo` for a preset's cases, show the stored choices, or forget them."""

import argparse
from typing import TYPE_CHECKING, Final

from attention.core.errors import UsageError
from fatui import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attention.core.events import Message, TuningEvent
    from attention.core.workload import Workload
    from attention.implementations.autotune.check import ChoiceCheck
    from attention.implementations.autotune.implementation import Demo
    from attention.implementations.autotune.store import Store, TrialResult

DEFAULT_PRESET: Final = "quick"
BUDGET_S: Final = 0.5
CHECK_S: Final = 2.0
STALE: Final = " *"
MIN_SECONDS: Final = 0.01
MAX_SECONDS: Final = 600.0
EXAMPLE: Final = """examples:
  fatui tune scaling                     try the candidates for each case, and store the best
  fatui tune llama-7b --seconds 2        take more time for each
  fatui tune --show                      show the stored choices
  fatui tune --forget training           forget the classes whose name holds "training"; without a word, all
  fatui tune --check scaling seed-table  compare demo with the best of its candidates, case by case

A class, "BH≤8 L≤512 D=64 float16 causal" say, is all calls for which one choice holds: here those of 5 to 8 heads, all
sequences together, and 257 to 512 rows. A trial takes up to three times its time while the best two are within noise.

Exit codes: 0 done, 1 a case failed or the check does not hold, 2 wrong usage or preset, 3 no backend, 130 interrupted
(what was found until then is kept)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"presets' names or files ({DEFAULT_PRESET})")
    parser.add_argument("--seconds", metavar="S", help=f"time for one trial ({BUDGET_S:g}), or a check ({CHECK_S:g})")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print the stored choices, and run nothing")
    what.add_argument("--forget", nargs="?", const="", metavar="WORD", help="forget all, or classes named with WORD")
    what.add_argument("--check", action="store_true", help="measure demo against its candidates; tunes first if needed")


def run(arguments: argparse.Namespace) -> int:
    """Run the requested action; return the exit code.

    Raises:
        UsageError: the request is invalid.
        NoBackendError: there is no usable backend.
    """
    if (arguments.show or arguments.forget is not None) and arguments.presets:
        raise UsageError("tune: --show and --forget take no preset")
    from attention.core import events
    from fatui.cli.options import parse_seconds

    usual = CHECK_S if arguments.check else BUDGET_S
    seconds = usual if arguments.seconds is None else parse_seconds(arguments.seconds, MIN_SECONDS, MAX_SECONDS)

    with events.listening_to_tuning(_print_event):
        if arguments.show:
            return _show()
        if arguments.forget is not None:
            return _forget(arguments.forget)
        from attention.measure.device import probe

        probe()  # raises with what to install if there is no backend
        cases = _cases(arguments.presets or [DEFAULT_PRESET])
        return _check(cases, seconds) if arguments.check else _tune(cases, seconds)


def _cases(presets: "Sequence[str]") -> "list[Workload]":
    from fatui.storage.presets import load

    return list(dict.fromkeys(case for name in presets for case in load(name).cases))


def _print_event(event: "TuningEvent | Message") -> None:
    from attention.core.events import Message, Tuned, tuning_log_line

    if isinstance(event, Message | Tuned):
        cli.print_line(tuning_log_line(event))


def _each(cases: "list[Workload]", do: "Callable[[Workload], object]") -> int:
    """Call `do` for each case that fits in memory; return how many failed, and print why."""
    failed = 0
    for number, case in enumerate(cases, 1):
        cli.print_line(f"case {number} of {len(cases)}: {case.label}")
        try:
            refusal = _refusal(case)
            if refusal:
                cli.print_line(f"refused: {refusal}")
            else:
                do(case)
        except (RuntimeError, ValueError) as error:
            cli.print_line(f"failed: {error}")
            failed += 1
    return failed


def _refusal(case: "Workload") -> str | None:
    """Return why a case cannot run, or None: its inputs and the smallest candidate exceed the free memory."""
    from attention.implementations import load_implementation
    from attention.measure.device import probe
    from fatui import formatting

    device = probe()
    needed = case.input_bytes + (load_implementation("practical").route(case, device).predicted_bytes or 0)
    if needed <= device.available_bytes:
        return None
    return f"needs {formatting.size(needed)} of {formatting.size(device.available_bytes)}"


def _tune(cases: "list[Workload]", seconds: float) -> int:
    from attention.implementations.autotune.implementation import Demo

    demo = Demo(budget_s=seconds)
    entries: list[TrialResult] = []
    failed = 0
    try:
        failed = _each(cases, lambda case: entries.append(_tuned(demo, case)))
    finally:
        _print(entries)
    if entries:
        cli.print_line(f"demo uses these from now on; they are stored in {demo.store.path}")
    return cli.FAILED if failed else cli.DONE


def _tuned(demo: "Demo", case: "Workload") -> "TrialResult":
    from attention.implementations.autotune.trial import Task
    from attention.implementations.calls import make_inputs
    from attention.masks import of_workload

    return demo.tune(Task(workload=case, inputs=make_inputs(case, 0), scale=case.scale, mask=of_workload(case)))


def _show() -> int:
    store = _store()
    entries = store.entries()
    if entries:
        _print(entries)
    else:
        cli.print_line(f"nothing is stored in {store.path}; `fatui tune PRESET` runs trials")
    return cli.DONE


def _forget(word: str) -> int:
    store = _store()
    gone = [entry.workload for entry in store.entries() if word in entry.workload.label or word == entry.winner]
    if not gone:
        cli.print_line(f"nothing {f'named with {word!r} ' if word else ''}is stored in {store.path}")
        return cli.DONE
    if not store.forget(gone):
        return cli.FAILED
    cli.print_line(f"forgot {len(gone)} of the choices stored in {store.path}")
    return cli.DONE


def _store() -> "Store":
    from attention.implementations.autotune.store import Store

    return Store()


def _print(entries: "list[TrialResult]") -> None:
    """Print a table of the classes and the choices found for them."""
    if not entries:
        return
    from attention.implementations.autotune.store import candidate_fingerprint
    from attention.implementations.autotune.trial import ratio_of
    from fatui import formatting
    from fatui.cli.output import show
    from fatui.report.table import FittedTable

    table = FittedTable(dropped_first=("error", "runner-up", "ahead by"))
    table.add_column("class", overflow="fold")
    table.add_column("winner", no_wrap=True)
    table.add_column("per call", justify="right", no_wrap=True)
    table.add_column("runner-up", no_wrap=True)
    table.add_column("ahead by", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    for entry in entries:
        ratio = ratio_of(entry)
        ahead = _estimate(entry) if ratio is None else formatting.speedup_text(ratio)
        call = formatting.seconds(entry.call_s[entry.winner])
        error = formatting.error(entry.max_error)
        mark = "" if entry.made_with == candidate_fingerprint() else STALE
        table.add_row(entry.workload.label, entry.winner + mark, call, entry.runner_up or "-", ahead, error)
    show(table)
    if any(entry.made_with != candidate_fingerprint() for entry in entries):
        cli.print_line(
            f"{STALE.strip()} tried with other kernels than the current ones: will be tried again on next use"
        )


def _estimate(entry: "TrialResult") -> str:
    """Estimate a winner's lead over a runner-up that the prescreen eliminated."""
    from fatui import formatting

    if entry.runner_up is None:
        return "-"
    return f"about {formatting.three(entry.call_s[entry.runner_up] / entry.call_s[entry.winner])}x"


def _check(cases: "list[Workload]", seconds: float) -> int:
    from attention.implementations.autotune.check import MIN_FOUND_SHARE, MIN_SPEED_SHARE, check_choice, holds, worst
    from attention.implementations.autotune.implementation import Demo

    demo = Demo()
    checked: list[ChoiceCheck] = []
    failed = _each(cases, lambda case: checked.append(check_choice(demo, case, seconds)))
    if not checked:
        return cli.FAILED
    _print_checked(checked)
    least, found = worst(checked), sum(case.found for case in checked)
    print(
        f"demo is at least {least.share.value:.3f}x ({least.share.low:.3f} to {least.share.high:.3f}) "
        f"the best single candidate, at {least.workload.label}; {MIN_SPEED_SHARE:g}x is required"
    )
    share = f"{found} of {len(checked)} cases ({found / len(checked):.0%})"
    print(f"it found the best, or one inside the noise floor, in {share}; {MIN_FOUND_SHARE:.0%} is required")
    return cli.FAILED if failed or not holds(checked) else cli.DONE


def _print_checked(checked: "list[ChoiceCheck]") -> None:
    from fatui import formatting
    from fatui.cli.output import show
    from fatui.report.table import FittedTable

    heads = ("case", "choice", "best", "demo / best", "noise floor", "found")
    table = FittedTable(*heads, dropped_first=("noise floor", "best"))
    for case in checked:
        share = f"{case.share.value:.3f} ({case.share.low:.3f} to {case.share.high:.3f})"
        found = "yes" if case.found else "no"
        table.add_row(case.workload.label, case.chosen, case.best, share, formatting.percent(case.floor), found)
    show(table, "")
