"""Run of a plan from start to exit code: exports, history, and the printed table."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from attention.core.plan import AnyPlan
from attention.engine.record import AnyRecord
from fatui.cli import messages
from fatui.cli.progress import ProgressPrinter
from fatui.engine_process import Engine

if TYPE_CHECKING:
    from attention.core.events import RunRefused
    from attention.core.results import Report
    from fatui.cli.exports import Export


def run_plan(plan: "AnyPlan", command: str, preset: str | None, deliveries: "list[Export]") -> int:
    """Run a plan, export, store and print its results; return the exit code.

    Args:
        plan: what to run.
        command: the command that repeats the run.
        preset: the preset's name, if any.
        deliveries: the exports.
    """
    from fatui.reproduce import RunIdentity

    started = RunIdentity(command, preset)
    record, interrupted = run_headless(plan)
    report = record.report(started.run(interrupted))
    with signals_blocked():  # a second Ctrl+C must not lose what the first one kept
        failures = write_files(report, deliveries)
        _store_run(report)
    print_results(report, deliveries)
    for failure in failures:
        messages.print_line(failure)
    return _exit_code(record, report, interrupted, failed=bool(failures))


def write_files(report: "Report", deliveries: "list[Export]") -> list[str]:
    """Write the exports that are files; return the error messages, one line each."""
    from fatui.cli.exports import STDOUT, write_export

    study = _study_as_data(report)
    return [problem for item in deliveries if item.target != STDOUT and (problem := write_export(item, report, study))]


def print_results(report: "Report", deliveries: "list[Export]") -> None:
    """Print the table, or the export to stdout instead of it."""
    from fatui.cli.exports import STDOUT, write_export

    for item in deliveries:
        if item.target == STDOUT:
            write_export(item, report, _study_as_data(report))
            return
    if report.all_cases:
        from fatui.cli.printing import results_width, show
        from fatui.report.study import beside
        from fatui.report.table import report_table

        show(report_table(report, beside(report), results_width()))


def _study_as_data(report: "Report") -> "dict[str, Any] | None":
    from msgspec import to_builtins

    from fatui.report.study import beside

    study = beside(report)
    return to_builtins(study) if study else None


def _store_run(report: "Report") -> None:
    from fatui.storage.history import HistoryError, RunHistory

    history = RunHistory()
    try:
        if report.all_cases:
            history.add(report)
    except HistoryError as error:
        messages.print_line(f"{error}; this run is not kept in the history")
    if history.notice:
        messages.print_line(history.notice)


def _exit_code(record: "AnyRecord", report: "Report", interrupted: bool, failed: bool) -> int:
    if record.refused and not interrupted:
        return _refused(record.refused)
    if interrupted:
        messages.print_line("interrupted" + ("" if report.all_cases else "; nothing was measured"))
        return messages.INTERRUPTED
    broken = any(row.status in ("failed", "inaccurate") for case in report.all_cases for row in case.rows)
    return messages.FAILED if broken or failed else messages.DONE


def _refused(refusal: "RunRefused") -> int:
    for line in refusal.reason.splitlines():
        messages.print_line(line)
    return {"no backend": messages.NO_BACKEND, "cannot start": messages.FAILED}.get(refusal.kind, messages.WRONG_USAGE)


WATCH_S: Final = 1.0
STOPPING: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def run_headless(plan: AnyPlan) -> tuple[AnyRecord, bool]:
    """Run a plan to its end or until a signal stops it.

    Returns:
        What was measured, and whether it was interrupted.
    """
    with ProgressPrinter(plan) as narrator:
        return asyncio.run(_run(plan, narrator))


async def _run(plan: AnyPlan, narrator: ProgressPrinter) -> tuple[AnyRecord, bool]:
    engine = Engine(plan, narrator.listen)
    loop = asyncio.get_running_loop()
    for number in STOPPING:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, lambda: engine.kill() if engine.stopped else engine.stop())
    watching = asyncio.create_task(_poll_silence(engine, narrator))
    try:
        await engine.run()
    finally:
        watching.cancel()
    return engine.record, engine.stopped


async def _poll_silence(engine: Engine, narrator: ProgressPrinter) -> None:
    """Pass the time and the engine's silence to the narrator, once a second."""
    while True:
        await asyncio.sleep(WATCH_S)
        narrator.tick(engine.silence)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Ignore stop signals while the results are written."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
