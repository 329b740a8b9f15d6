"""The first section of a report: the verdict card, and a chart of the speedups with their intervals."""

from collections.abc import Sequence
from typing import Final

from attention.core.results import AnyCase, Ratio
from fatui import formatting
from fatui.report.document import Block, Card, Chart, MissingData
from fatui.report.evidence import Evidence
from fatui.trust import TrustFinding, ranked, trust
from fatui.untrusted_text import html
from fatui.verdict import Verdict, confidence_text, group_verdicts, headline, loss_lines, mean_speedup

WIDTH: Final = 640
LABEL: Final = 130
VALUES: Final = 150
ROW: Final = 26
TEXT_BAR: Final = 40
"""Characters of the longest bar in Markdown."""


def summary_blocks(evidence: Evidence, command: str) -> list[Block]:
    """Return a card for each verdict, each followed by its chart, or how to measure something.

    Args:
        evidence: the rows.
        command: what to run if they support no verdict.
    """
    interrupted = any(run.run.interrupted for run in evidence.runs)
    groups = group_verdicts(evidence.cases, evidence.models, evidence.fine_tunings, interrupted=interrupted)
    found = _worst(evidence)
    blocks: list[Block] = []
    for cases, verdict in groups:
        blocks.append(_card(verdict, found))
        if chart := speedup_chart(cases, verdict):
            blocks.append(chart)
    return blocks or [MissingData("No implementations were compared.", command)]


def _worst(evidence: Evidence) -> tuple[TrustFinding, ...]:
    """Return the findings of all runs, of each topic the most serious."""
    found: dict[str, TrustFinding] = {}
    for run in evidence.runs:
        for each in trust(run):
            before = found.get(each.topic)
            if before is None or each.rank >= before.rank:
                found[each.topic] = each
    return ranked(found.values())


def _card(verdict: Verdict, found: Sequence[TrustFinding]) -> Card:
    sure = [confidence_text(verdict)] if verdict.winner else []
    return Card(
        headline(verdict),
        (*verdict.notes, *loss_lines(verdict)),
        (*sure, *(each.text for each in found)),
        cautious=verdict.confidence != "high" or any(each.severity != "note" for each in found),
    )


def speedup_chart(cases: Sequence[AnyCase], verdict: Verdict) -> Chart | None:
    """Draw the mean speedup of each implementation over the verdict's reference as bars with their intervals."""
    names = tuple(dict.fromkeys(row.implementation for case in cases for row in case.rows))
    shared = [case for case in cases if case.reference == verdict.reference]
    bars = [(name, ratio) for name in names if (ratio := mean_speedup(shared, name))]
    if not bars or verdict.reference is None:
        return None
    unity = Ratio(value=1.0, low=1.0, high=1.0)
    bars = sorted([(verdict.reference, unity), *bars], key=lambda each: -each[1].value)
    what = f"geometric means of {len(shared)} cases" if len(shared) > 1 else shared[0].workload.label
    title = f"Speedup over {verdict.reference}, {what}"
    return Chart(title, _svg(bars, verdict.winner), _text(bars))


def _svg(bars: Sequence[tuple[str, Ratio]], winner: str | None) -> str:
    room = WIDTH - LABEL - VALUES
    top = max(ratio.high for _, ratio in bars)
    parts = []
    for index, (name, ratio) in enumerate(bars):
        y = index * ROW
        colour = "var(--series-3)" if name == winner else "var(--series-6)"
        low, value, high = (LABEL + room * each / top for each in (ratio.low, ratio.value, ratio.high))
        middle = y + ROW / 2
        parts += [
            f'<text x="{LABEL - 8}" y="{middle + 5:.1f}" text-anchor="end">{html(name[-16:])}</text>',
            f'<rect x="{LABEL}" y="{y + 5}" width="{value - LABEL:.1f}" height="{ROW - 10}" fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
            'stroke="currentColor" fill="none"/>',
            f'<text x="{WIDTH - VALUES + 10}" y="{middle + 5:.1f}">{html(formatting.speedup_text(ratio))}</text>',
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ROW * len(bars)}" font-size="13"'
    return f'{head} fill="currentColor">{"".join(parts)}</svg>'


def _text(bars: Sequence[tuple[str, Ratio]]) -> str:
    top = max(ratio.value for _, ratio in bars)
    width = max(len(name) for name, _ in bars)
    texts = [formatting.speedup_text(ratio) for _, ratio in bars]
    figures = max(map(len, texts))
    return "\n".join(
        f"{name:<{width}}  {text:>{figures}}  {'█' * max(1, round(TEXT_BAR * ratio.value / top))}"
        for (name, ratio), text in zip(bars, texts, strict=True)
    )
