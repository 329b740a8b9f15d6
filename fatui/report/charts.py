"""SVG charts drawn by matplotlib in the page's colours, light and dark, and readable without colour."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Final

from attention.core.results import Case, FineTuningCase, Report
from fatui.report.counterparts import (
    beside_unquantized,
    by_length,
    by_shape,
    density_break_even,
    density_curves,
    density_points,
    format_points,
    random_blocks,
    shapes_of,
)
from fatui.report.document import Chart
from fatui.report.evidence import sound_rows
from fatui.report.scaling import TREND_AXES, Sweep, curves_of, sweeps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Series = Mapping[str, Sequence[tuple[float, float, float, float]]]
"""The points of each name: x, y, and the interval's low and high."""
HOW_TO_GET: Final = "pip install 'fatui[report]'"
INK: Final = "#010203"
"""Placeholder of the page's text colour in the drawing, replaced in the SVG."""
INKS: Final = ("#11a101", "#11a102", "#11a103", "#11a104", "#11a105", "#11a106")
"""Placeholders of the page's six series colours."""
UNQUANTIZED: Final = "unquantized"
"""Name of the line of unquantized keys and values, which is 1."""
MARKERS: Final = "os^Dvp"
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
WIDTH_IN, HEIGHT_IN = 7.0, 3.6


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def line_chart(
    series: Series,
    x: str,
    y: str,
    names: Sequence[str],
    *,
    logarithmic: bool = True,
    ticks: Sequence[str] = (),
    marks: Mapping[str, float] | None = None,
) -> str:
    """Draw lines with intervals and a legend, as SVG for an HTML page.

    Args:
        series: the points of each line, in order.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        names: all names with a line in any chart of the report, so that each has the same style in all of them.
        logarithmic: whether both axes are logarithmic; otherwise both are linear and the vertical one starts at 0.
        ticks: words at 0, 1, ... on a linear horizontal axis, instead of numbers.
        marks: where names break even on the horizontal axis: a vertical line each.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": f"{x}{y}{list(series.items())}",
            "text.parse_math": False,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        _scale(axes, series, logarithmic)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        for name, points in series.items():
            _line(axes, names.index(name), name, points)
        for name, at in (marks or {}).items():
            colour = INKS[names.index(name) % len(INKS)]
            axes.axvline(at, color=colour, linestyle=":", label=f"{name} breaks even: {at:.2g}")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
        return _as_svg(figure)


def _scale(axes: "Axes", series: Series, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    if not logarithmic:
        axes.set_ylim(0, 1.05 * max((point[3] for points in series.values() for point in points), default=1.0))
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _line(axes: "Axes", index: int, name: str, points: Sequence[tuple[float, float, float, float]]) -> None:
    at, middle, low, high = zip(*points, strict=True)
    errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    colour, mark = INKS[index % len(INKS)], MARKERS[index % len(MARKERS)]
    few = len(points) <= 24
    axes.errorbar(
        at,
        middle,
        yerr=errors if few else None,
        color=colour,
        marker=mark if few else None,
        linestyle=DASHES[index % len(DASHES)],
        label=name,
        capsize=2,
        markersize=5,
    )


def _as_svg(figure: "Figure") -> str:
    """Return the drawing as an inline SVG: the page's colours, no fixed size, and only the ids that are referenced."""
    out = StringIO()
    figure.savefig(
        out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    for index, ink in enumerate(INKS):
        svg = svg.replace(ink, f"var(--series-{index + 1})")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", svg)
    return re.sub(r"(<svg[^>]*?) (?:width|height)=\"[^\"]*\"", r"\1", svg).strip()


def sweep_charts(reports: Sequence[Report], names: Sequence[str]) -> list[Chart]:
    """Return two charts per sweep: tokens/s, and speedups over the reference."""
    made = []
    for report in reports:
        for sweep in sweeps(report):
            made += [chart for chart in (_throughput(sweep, names), _speedups(sweep, names)) if chart]
    return made


def _throughput(sweep: Sweep, names: Sequence[str]) -> Chart | None:
    curves = curves_of(sweep.cases, sweep.axis)
    series = {
        name: [(float(point.at), point.rate, point.low, point.high) for point in points]
        for name, points in curves.items()
        if len(points) > 1
    }
    title = f"Throughput by {TREND_AXES[sweep.axis]}, {sweep.elsewhere}"
    return Chart(title, line_chart(series, TREND_AXES[sweep.axis], "tokens/s", names)) if series else None


def _speedups(sweep: Sweep, names: Sequence[str]) -> Chart | None:
    reference = sweep.cases[0].reference
    if len({case.reference for case in sweep.cases}) != 1:
        return None
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for case in sweep.cases:
        for row in sound_rows(case):
            if row.speedup and row.implementation != reference:
                point = (float(sweep.at(case)), row.speedup.value, row.speedup.low, row.speedup.high)
                series.setdefault(row.implementation, []).append(point)
    series = {name: points for name, points in series.items() if len(points) > 1}
    title = f"Speedup over {reference} by {TREND_AXES[sweep.axis]}, {sweep.elsewhere}"
    return Chart(title, line_chart(series, TREND_AXES[sweep.axis], f"times {reference}", names)) if series else None


def format_charts(cases: Sequence[Case], names: Sequence[str]) -> list[Chart]:
    """Return the charts of quantized keys and values.

    Two for each shape with several formats: speedups over unquantized, and errors. Then for each implementation that
    was measured at several lengths: speedups over unquantized by the number of keys, with a line for each format.
    """
    quantized = beside_unquantized(cases)
    made = []
    for shape, group in by_shape(quantized).items():
        points = {name: found for name in names if (found := format_points(group, name))}
        formats = [
            *dict.fromkeys((point.bits, point.workload.kv_format) for found in points.values() for point in found)
        ]
        formats.sort(key=lambda each: (-each[0], each[1]))
        if len(formats) < 2:
            continue
        ticks = [f"{name}\n{bits:.3g} bits" for bits, name in formats]
        place = {name: float(index) for index, (_, name) in enumerate(formats)}
        speeds = {
            name: [(place[p.workload.kv_format], p.ratio.value, p.ratio.low, p.ratio.high) for p in found]
            for name, found in points.items()
        }
        errors = {
            name: [(place[p.workload.kv_format], *(100 * (p.row.kv_error or 0.0),) * 3) for p in found]
            for name, found in points.items()
        }
        speeds[UNQUANTIZED] = [(float(index), 1.0, 1.0, 1.0) for index in range(len(formats))]
        styles = [*names, UNQUANTIZED]
        for title, y, series in (
            ("Speedup over unquantized keys and values", "times unquantized", speeds),
            ("Error of quantized keys and values", "% of the output's RMS", errors),
        ):
            drawn = line_chart(series, "bits per value, with scales", y, styles, logarithmic=False, ticks=ticks)
            made.append(Chart(f"{title}, {shape}", drawn))
    return [*made, *_length_charts(quantized, names)]


def _length_charts(cases: Sequence[Case], names: Sequence[str]) -> list[Chart]:
    made = []
    for shape, by_format in by_length(cases).items():
        for name in names:
            found = {kv_format: format_points(group, name) for kv_format, group in by_format.items()}
            series = {
                kv_format: [(float(p.workload.kv_seq), p.ratio.value, p.ratio.low, p.ratio.high) for p in points]
                for kv_format, points in found.items()
                if len(points) > 1
            }
            if not series:
                continue
            lengths = sorted({point[0] for points in series.values() for point in points})
            series[UNQUANTIZED] = [(length, 1.0, 1.0, 1.0) for length in lengths]
            drawn = line_chart(series, "keys", "times unquantized", [*series])
            made.append(Chart(f"Speedup of {name} over unquantized keys and values by length, {shape}", drawn))
    return made


def density_charts(cases: Sequence[Case], names: Sequence[str]) -> list[Chart]:
    """Return one chart per shape with random blocks of several densities: the time over each one's own dense time.

    Where a line crosses that of dense, a vertical one names the density at which the implementation breaks even.
    """
    made = []
    for shape, group in shapes_of(cases).items():
        densities, lines = density_curves(group, names)
        if not densities:
            continue
        series = {
            name: [(float(point.at), point.rate, point.low, point.high) for point in points]
            for name, points in lines.items()
        }
        marks = {
            name: found.density
            for name in names
            if (found := density_break_even(random_blocks(density_points(group, name))))
        }
        styles = [*names, *(name for name in series if name not in names)]
        drawn = line_chart(series, "density", "times dense", styles, logarithmic=False, marks=marks)
        made.append(Chart(f"Time of random blocks over dense time by density, {shape}", drawn))
    return made


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
