"""Run of a plan from start to exit code: progress on stderr, signals, exports, history, and the printed table."""

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TextIO

from attention.core import events as on
from attention.core.plan import AnyPlan, FineTuningPlan, GenerationPlan, StreamPlan
from attention.core.results import Report
from attention.engine.record import AnyRecord, StreamRecord
from fatui import cli, formatting
from fatui.cli.options import given_remote, print_dtype_reason
from fatui.cli.output import STDOUT, Export, console, print_results, write_files
from fatui.engine_process import Engine, Silence
from fatui.report.export import case_lines
from fatui.report.stream_curves import text_chart, time_chart
from fatui.report.table import CHART_HEIGHT, CHART_WIDTH
from fatui.reproduce import RunIdentity
from fatui.storage.history import HistoryError, RunHistory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from fatui.remote import Remote

REDRAW_S: Final = 0.25
"""Minimum seconds between redraws; drawing more often would take time from the measurement."""
BAR_WIDTH: Final = 30
MAX_QUIET_S: Final = 10.0
"""Without a bar, the current step is printed after this long without a line."""


class ProgressPrinter:
    """Reporter of a run's progress on stderr, from its events.

    Attributes:
        record: the engine's record, from which the curves of a stream are drawn; None before the engine is made.
    """

    def __init__(self, plan: AnyPlan) -> None:
        self._plan = plan
        self.record: AnyRecord | None = None
        self._bar = _bar(self._curves) if sys.stderr.isatty() else None
        self._task = self._bar.add_task("starting", total=1.0, left="…") if self._bar else None
        self._drawn = 0.0
        self._progress: on.Progress | None = None
        self._progress_at = 0.0
        self._printed = ""
        self._printed_at = time.monotonic()
        self._silence_reported_s = 0.0

    def __enter__(self) -> Self:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar, and leave stderr without a trace of it."""
        if self._bar:
            self._bar.stop()

    def listen(self, event: on.AnyEvent) -> None:
        """Handle one event."""
        match event:
            case on.Progress():
                self._progress, self._progress_at = event, time.monotonic()
                self._draw()
            case on.CaseStarted() if self._bar is None:
                label = self._plan.cases[event.case].label
                self._print_once(f"case {event.case + 1} of {len(self._plan.cases)}: {label}")
            case on.CaseTimeEstimated():
                noun = "row" if isinstance(self._plan, StreamPlan) else "implementation"
                self._print_once(formatting.estimate_text(event, noun))
            case on.StepStarted(step="training") if self._bar is None:
                self._print_once(f"{event.implementation}: training")
            case on.RowEnded() if self._bar is None:
                self._print_once(f"{event.implementation}: {event.status}")  # the reason is printed below the table
            case on.Tuned() | on.Switched():
                self._print_once(on.tuning_log_line(event))
            case on.Message():
                self._print_once(event.text if event.level == "info" else f"{event.level}: {event.text}")

    def tick(self, silence: Silence) -> None:
        """Update the time left; warn that the engine is silent, and again each time the silence has doubled."""
        self._draw()
        if self._bar is None and time.monotonic() - self._printed_at >= MAX_QUIET_S:
            self._print_once(self._progress.now if self._progress else "starting the engine")
        if not silence.unexplained:
            self._silence_reported_s = 0.0
        elif silence.seconds >= 2 * self._silence_reported_s:
            self._silence_reported_s = silence.seconds
            at = f" ({silence.step})" if silence.step else ""
            lasted = formatting.duration(silence.seconds)
            self._print_once(f"the engine has been silent for {lasted}{at}; ctrl+c stops it and keeps the results")

    def _curves(self) -> str:
        """Return the curves of a stream so far, drawn above the bar; empty for other runs."""
        if not isinstance(self.record, StreamRecord):
            return ""
        chart = time_chart(self.record.case(0))
        return "\n".join(text_chart(chart, CHART_WIDTH, CHART_HEIGHT)) if chart.curves else ""

    def _draw(self) -> None:
        now, event = time.monotonic(), self._progress
        if self._bar is None or self._task is None or event is None or now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        left = formatting.time_left(event.left_s(now - self._progress_at)) if event.sure else "timing calls"
        self._bar.update(self._task, completed=event.done, description=event.now, left=left)
        self._bar.refresh()

    def _print_once(self, text: str) -> None:
        """Print a line unless it repeats the last one, as when a restarted engine begins its case again."""
        if text == self._printed:
            return
        self._printed, self._printed_at = text, time.monotonic()
        if self._bar:
            self._bar.console.print(f"fatui: {text}", markup=False, highlight=False)
        else:
            cli.print_line(text)


def _bar(above: Callable[[], str]) -> "Progress":
    """Return a progress bar with a line of text above it, which a function returns at each redraw."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    class BarBelowText(Progress):
        def get_renderables(self) -> "Iterable[RenderableType]":
            if text := above():
                yield Text(text, no_wrap=True)
            yield from super().get_renderables()

    return BarBelowText(
        BarColumn(BAR_WIDTH),
        TaskProgressColumn(),
        TextColumn("· {task.fields[left]} ·"),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console(sys.stderr),
        auto_refresh=False,
        transient=True,
    )


def run_model_plan(
    arguments: argparse.Namespace, plan: GenerationPlan | FineTuningPlan, command: str, exports: list[Export]
) -> int:
    """Run a plan of models as `run_plan` does, on this machine or the one that the command line names.

    Raises:
        NoBackendError: mlx-lm is not installed, and the models run here.
    """
    remote = given_remote(arguments)
    if remote is None:
        from attention.mlx_lm.configuration import check_mlx_lm

        check_mlx_lm()
    print_dtype_reason(arguments.dtype)
    return run_plan(plan, command, None, exports, remote)


def run_plan(
    plan: AnyPlan,
    command: str,
    preset: str | None,
    exports: list[Export],
    remote: "Remote | None" = None,
    after: Callable[[Report], None] | None = None,
) -> int:
    """Run a plan, export, store and print its results; return the exit code.

    Args:
        plan: what to run.
        command: the command that repeats the run.
        preset: the preset's name, if any.
        exports: the exports.
        remote: the machine that runs it; None for this one.
        after: prints what follows the table, which it is called after; not with an export on stdout.
    """
    started = RunIdentity(remote.prefixed(command) if remote else command, preset)
    lines = [RowLines(export, started) for export in exports if export.format == "jsonl"]
    exports = [export for export in exports if export.format != "jsonl"]
    record, interrupted = run_headless(plan, lines, remote)
    report = record.report(started.run(interrupted))
    with signals_blocked():  # a second Ctrl+C must not lose what the first one kept
        failures = [problem for each in lines if (problem := each.end(record))]
        failures += write_files(report, exports)
        _store_run(report)
    if not any(each.on_stdout for each in lines):
        print_results(report, exports)
        if after is not None and all(export.target != STDOUT for export in exports):
            after(report)
    for failure in failures:
        cli.print_line(failure)
    return _exit_code(record, report, interrupted, failed=bool(failures))


class RowLines:
    """Writer of a line of JSON for each row, as soon as its case is done.

    Attributes:
        on_stdout: whether the lines go to stdout.
    """

    def __init__(self, export: Export, started: RunIdentity) -> None:
        self.on_stdout = export.target == STDOUT
        self._export, self._started = export, started
        self._written: set[int] = set()
        self._problem: str | None = None
        self._file: TextIO | None = None
        try:
            self._file = sys.stdout if self.on_stdout else Path(export.target).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            self._fail(error)

    def write(self, case: int, record: AnyRecord) -> None:
        """Write the rows of a case, once."""
        if case in self._written or self._file is None:
            return
        self._written.add(case)
        report = record.report(self._started.run(), cases=())
        try:
            self._file.write(case_lines(report, case + 1, record.case(case)))
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(error)

    def end(self, record: AnyRecord) -> str | None:
        """Write the rows of the case that was interrupted; return an error message of one line, or None."""
        for case in range(len(record.cases)):
            self.write(case, record)
        if self._file is not None and not self.on_stdout:
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)
        return self._problem

    def _fail(self, error: OSError) -> None:
        self._problem = f"--jsonl: {self._export.target} could not be written: {error.strerror or error}"
        file, self._file = self._file, None
        if file is not None and not self.on_stdout:
            with contextlib.suppress(OSError):
                file.close()


def _store_run(report: Report) -> None:
    history = RunHistory()
    try:
        if report.all_cases:
            history.add(report)
    except HistoryError as error:
        cli.print_line(f"{error}; this run is not kept in the history")
    if history.notice:
        cli.print_line(history.notice)


def _exit_code(record: AnyRecord, report: Report, interrupted: bool, failed: bool) -> int:
    if record.refused and not interrupted:
        return _refused(record.refused)
    if interrupted:
        cli.print_line("interrupted" + ("" if report.all_cases else "; nothing was measured"))
        return cli.INTERRUPTED
    broken = any(row.status in ("failed", "inaccurate") for case in report.all_cases for row in case.rows)
    return cli.FAILED if broken or failed else cli.DONE


def _refused(refusal: on.RunRefused) -> int:
    for line in formatting.problem_text(refusal).splitlines():
        cli.print_line(line)
    return {"no backend": cli.NO_BACKEND, "cannot start": cli.FAILED}.get(refusal.kind, cli.WRONG_USAGE)


WATCH_S: Final = 1.0


def run_headless(
    plan: AnyPlan, lines: Sequence[RowLines] = (), remote: "Remote | None" = None
) -> tuple[AnyRecord, bool]:
    """Run a plan to its end or until a signal stops it.

    Args:
        plan: the plan.
        lines: writers of the rows of cases that are done.
        remote: the machine that runs it; None for this one.

    Returns:
        What was measured, and whether it was interrupted.
    """
    with ProgressPrinter(plan) as progress:
        return asyncio.run(_run(plan, progress, lines, remote))


async def _run(
    plan: AnyPlan, progress: ProgressPrinter, lines: Sequence[RowLines], remote: "Remote | None"
) -> tuple[AnyRecord, bool]:
    def listen(event: on.AnyEvent) -> None:
        progress.listen(event)
        if isinstance(event, on.CaseDone):
            for each in lines:
                each.write(event.case, engine.record)

    engine = Engine(plan, listen, remote=remote)
    progress.record = engine.record
    loop = asyncio.get_running_loop()
    for number in cli.STOPPING:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, lambda: engine.kill() if engine.stopped else engine.stop())
    watching = asyncio.create_task(_poll_silence(engine, progress))
    try:
        await engine.run()
    finally:
        watching.cancel()
    return engine.record, engine.stopped


async def _poll_silence(engine: Engine, progress: ProgressPrinter) -> None:
    """Report the time and the engine's silence, once a second."""
    while True:
        await asyncio.sleep(WATCH_S)
        progress.tick(engine.silence)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Ignore stop signals while the results are written."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in cli.STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
