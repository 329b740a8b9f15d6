"""The charts of a report: throughput and speedup along each sweep, and the losses of each fine-tuning."""

from collections.abc import Sequence

from attention.report import FineTuningCase, Report
from fatui import scaling
from fatui.report.charts import line_chart
from fatui.report.document import Chart
from fatui.report.evidence import sound
from fatui.report.trends import AXES, Sweep, sweeps


def sweep_charts(reports: Sequence[Report], names: Sequence[str]) -> list[Chart]:
    """Return two charts per sweep: tokens/s, and speedups over the reference."""
    made = []
    for report in reports:
        for sweep in sweeps(report):
            made += [chart for chart in (_throughput(sweep, names), _speedups(sweep, names)) if chart]
    return made


def _throughput(sweep: Sweep, names: Sequence[str]) -> Chart | None:
    curves = scaling.curves_of(sweep.cases, sweep.axis)
    series = {
        name: [(float(point.at), point.rate, point.low, point.high) for point in points]
        for name, points in curves.items()
        if len(points) > 1
    }
    title = f"Throughput by {AXES[sweep.axis]}, {sweep.elsewhere}"
    return Chart(title, line_chart(series, AXES[sweep.axis], "tokens/s", names)) if series else None


def _speedups(sweep: Sweep, names: Sequence[str]) -> Chart | None:
    reference = sweep.cases[0].reference
    if len({case.reference for case in sweep.cases}) != 1:
        return None
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for case in sweep.cases:
        for row in sound(case):
            if row.speedup and row.implementation != reference:
                point = (float(sweep.at(case)), row.speedup.value, row.speedup.low, row.speedup.high)
                series.setdefault(row.implementation, []).append(point)
    series = {name: points for name, points in series.items() if len(points) > 1}
    title = f"Speedup over {reference} by {AXES[sweep.axis]}, {sweep.elsewhere}"
    return Chart(title, line_chart(series, AXES[sweep.axis], f"times {reference}", names)) if series else None


def loss_charts(cases: Sequence[FineTuningCase], names: Sequence[str]) -> list[Chart]:
    """Return one chart of losses per fine-tuning, with a line per implementation."""
    made = []
    for case in cases:
        series = {
            row.implementation: [
                (number, loss, loss, loss) for number, loss in enumerate(row.losses, 1) if loss is not None
            ]
            for row in case.rows
            if row.status == "ok"
        }
        series = {name: points for name, points in series.items() if points}
        if series:
            title = f"Training loss, {case.workload.label}"
            made.append(Chart(title, line_chart(series, "iteration", "loss", names, logarithmic=False)))
    return made
