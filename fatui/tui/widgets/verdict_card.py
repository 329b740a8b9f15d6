"""The verdict card below a finished table: what to use, why not the others, how sure that is, and what it rests on."""

from typing import Final

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from attention.core.results import Report

ROOMY: Final = 14
"""Minimum lines of the pane at which each loss has a line of its own."""
MAX_LOSSES: Final = 4


class VerdictCard(Vertical):
    """Card of a run; hidden until it has ended."""

    DEFAULT_CSS = """
    VerdictCard { height: auto; max-height: 60%; padding: 0 1; display: none; }
    VerdictCard Static { height: auto; }
    VerdictCard.-brief Static { text-wrap: nowrap; text-overflow: ellipsis; }
    VerdictCard.-brief #verdict-head, VerdictCard.-brief #verdict-sure { text-wrap: wrap; max-height: 2; }
    """

    def __init__(self, *, id: str = "verdict") -> None:
        super().__init__(id=id)
        self._shown: object = None

    def compose(self) -> ComposeResult:
        """Yield the lines."""
        yield Static(id="verdict-head", markup=False)
        yield Static(id="verdict-losses", markup=False)
        yield Static(id="verdict-sure", markup=False)
        yield Static(id="verdict-trust", markup=False)

    def clear(self) -> None:
        """Hide the card."""
        self._shown = None
        self.display = False

    def say(self, text: str, *, bad: bool) -> None:
        """Show one line instead of a verdict: why nothing was measured."""
        if self._shown != (text, bad):
            self._shown = text, bad
            self._fill("bad" if bad else "none", head=text)

    def show(self, report: Report, room: int, keys: dict[str, str]) -> None:
        """Show the verdict of a report.

        Args:
            report: the run.
            room: lines of the pane.
            keys: the key of each action.
        """
        if self._shown == (report, room):
            return
        self._shown = report, room
        from fatui.trust import trust, trust_line, worst
        from fatui.verdict import confidence_text, finding, headline, loss_lines, verdicts

        made, findings = verdicts(report), trust(report)
        heads = [text for verdict in made for text in (headline(verdict), *verdict.notes)]
        roomy = room >= ROOMY
        losses = [line for verdict in made for line in loss_lines(verdict, brief=not roomy)]
        more = len(losses) - MAX_LOSSES
        shown = [*losses[:MAX_LOSSES], *([f"and {more} more"] if more > 0 else [])]
        sure = [confidence_text(verdict) for verdict in made if verdict.winner]
        doubtful = any(verdict.too_noisy or verdict.confidence != "high" for verdict in made)
        offers = [f"{keys['longer']} measures longer"] if doubtful and report.cases else []
        offers += [f"{keys['explain_trust']} explains"]
        won = all(verdict.winner for verdict in made)
        kind = "noisy" if any(verdict.too_noisy for verdict in made) else "won" if made and won else "none"
        self._fill(
            kind,
            head="\n".join(heads or [finding(report)]),
            losses=("\n" if roomy else " · ").join(shown),
            sure=" · ".join([*sure, *offers]),
            trust=trust_line(findings),
        )
        self.set_class(not roomy, "-brief")
        self.query_one("#verdict-sure").set_classes("-warning" if doubtful else "")
        self.query_one("#verdict-trust").set_classes(f"-{worst(findings)}")

    def _fill(self, kind: str, **texts: str) -> None:
        for name in ("head", "losses", "sure", "trust"):
            part = self.query_one(f"#verdict-{name}", Static)
            part.display = bool(texts.get(name))
            part.update(texts.get(name, ""))
        self.query_one("#verdict-head").set_classes(f"-{kind}")
        self.display = True
