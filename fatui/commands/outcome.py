"""Run of a plan from start to exit code: exports, history, and the printed table."""

from typing import TYPE_CHECKING, Any

from fatui import cli

if TYPE_CHECKING:
    from attention.events import RunRefused
    from attention.plan import AnyPlan
    from attention.record import AnyRecord
    from attention.report import Report
    from fatui.commands.delivery import Delivery


def measure(plan: "AnyPlan", command: str, preset: str | None, deliveries: "list[Delivery]") -> int:
    """Run a plan, export, store and print its results; return the exit code.

    Args:
        plan: what to run.
        command: the command that repeats the run.
        preset: the preset's name, if any.
        deliveries: the exports.
    """
    from fatui.commands.running import execute, undisturbed
    from fatui.reproduce import Started

    started = Started(command, preset)
    record, interrupted = execute(plan)
    report = record.report(started.run(interrupted))
    with undisturbed():  # a second Ctrl+C must not lose what the first one kept
        failures = deliver_files(report, deliveries)
        _keep(report)
    print_results(report, deliveries)
    for failure in failures:
        cli.tell(failure)
    return _exit_code(record, report, interrupted, failed=bool(failures))


def deliver_files(report: "Report", deliveries: "list[Delivery]") -> list[str]:
    """Write the exports that are files; return the error messages, one line each."""
    from fatui.commands.delivery import STDOUT, deliver

    study = _study_as_data(report)
    return [problem for item in deliveries if item.target != STDOUT and (problem := deliver(item, report, study))]


def print_results(report: "Report", deliveries: "list[Delivery]") -> None:
    """Print the table, or the export to stdout instead of it."""
    from fatui.commands.delivery import STDOUT, deliver

    for item in deliveries:
        if item.target == STDOUT:
            deliver(item, report, _study_as_data(report))
            return
    if report.all_cases:
        from fatui.commands.printing import results_width, show
        from fatui.study import beside
        from fatui.table import report_table

        show(report_table(report, beside(report), results_width()))


def _study_as_data(report: "Report") -> "dict[str, Any] | None":
    from msgspec import to_builtins

    from fatui.study import beside

    study = beside(report)
    return to_builtins(study) if study else None


def _keep(report: "Report") -> None:
    from fatui.history import History, HistoryError

    history = History()
    try:
        if report.all_cases:
            history.add(report)
    except HistoryError as error:
        cli.tell(f"{error}; this run is not kept in the history")
    if history.notice:
        cli.tell(history.notice)


def _exit_code(record: "AnyRecord", report: "Report", interrupted: bool, failed: bool) -> int:
    if record.refused and not interrupted:
        return _refused(record.refused)
    if interrupted:
        cli.tell("interrupted" + ("" if report.all_cases else "; nothing was measured"))
        return cli.INTERRUPTED
    broken = any(row.status in ("failed", "inaccurate") for case in report.all_cases for row in case.rows)
    return cli.FAILED if broken or failed else cli.DONE


def _refused(refusal: "RunRefused") -> int:
    for line in refusal.reason.splitlines():
        cli.tell(line)
    return {"no backend": cli.NO_BACKEND, "cannot start": cli.FAILED}.get(refusal.kind, cli.WRONG_USAGE)
