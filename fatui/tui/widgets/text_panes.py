"""Panes of text: the first screen, the verdict below a finished table, and the row under its cursor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from attention.core.results import Case, Report, Row
from fatui.tui.painting import set_text, set_title
from fatui.tui.view_models.cost import CANNOT, REFUSED
from fatui.tui.view_models.home import Past, home_text
from fatui.tui.view_models.row_details import WIDTH, figure_lines, sample_lines, sentences
from fatui.untrusted_text import one_line

if TYPE_CHECKING:
    from fatui.verdict import Verdict

ROOMY: Final = 14
"""Minimum lines of the pane at which each loss has a line of its own."""
CARD_LINES: Final = 8
"""Lines of a card in which each loss has one, and the heading of the table above it."""
ROWS_FIRST: Final = 15
"""Lines of a table that are shown before each loss has a line: the means and two cases of four implementations."""
MAX_LOSSES: Final = 4
EMPTY = "The figures of the row under the cursor of the comparison are shown here."


class HomePane(VerticalScroll):
    """Pane with the last verdict on this machine, or what a first run will tell."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", "Open the last run", show=False)]

    class Opened(Message):
        """Posted when the last run is to be opened."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.border_title = "4 Home"
        self.past: Past | None = None
        self._told: tuple[dict[str, str], str] | None = None

    def compose(self) -> ComposeResult:
        """Yield the text."""
        yield Static(id="home-text", markup=False)

    def show(self, past: Past | None, keys: dict[str, str], where: str = "this machine") -> None:
        """Draw the last run on a machine."""
        self.past, self._told = past, (keys, where)
        width = self.content_size.width - 2 if self.content_size else WIDTH  # a scroll bar may come
        set_text(self.query_one("#home-text", Static), home_text(past, keys, where, width))

    def on_resize(self) -> None:
        """Fit the list of runs to the new width."""
        if self._told is not None:
            self.show(self.past, *self._told)

    def action_open(self) -> None:
        """Open the run."""
        if self.past is not None:
            self.post_message(self.Opened())


class RowPane(VerticalScroll):
    """Pane that follows the cursor of the comparison, on wide terminals."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.border_title = "6 Row"
        self._shown: object = None

    def compose(self) -> ComposeResult:
        """Yield the text."""
        yield Static(EMPTY, id="row-text", markup=False)

    def show(self, case: Case | None, row: Row | None, command: str) -> None:
        """Draw a row of a case; without one, say what will be here."""
        width = self.content_size.width - 2 if self.content_size else WIDTH  # a scroll bar may come
        if self._shown == (case, row, command, width):
            return
        self._shown = case, row, command, width
        text = EMPTY
        if case is not None and row is not None:
            samples = ["", *sample_lines(row)] if row.samples else []
            text = "\n".join([*figure_lines(row, case, width), *samples, "", *sentences(row, case, command)])
        set_title(self, f"6 Row · {row.implementation}" if row else "6 Row")
        set_text(self.query_one("#row-text", Static), text)


class CostBlock(Static):
    """What a run would take: its time, its memory, and what would be refused; the last is in the colour of warnings."""

    DEFAULT_CSS = "CostBlock { height: auto; color: $text-muted; }"

    def __init__(self, *, id: str = "cost") -> None:
        super().__init__(id=id, markup=False)
        self._lines: tuple[str, ...] = ()

    def show(self, lines: Sequence[str]) -> None:
        """Set the lines."""
        if tuple(lines) == self._lines:
            return
        self._lines = tuple(lines)
        self.display = bool(lines)
        styles = ("$text-warning" if line.startswith((CANNOT, REFUSED)) else "" for line in lines)
        parts = [Content.styled(one_line(line), style) for line, style in zip(lines, styles, strict=True)]
        self.update(Content("\n").join(parts))


class VerdictCard(Vertical):
    """Card of a run; hidden until it has ended."""

    DEFAULT_CSS = """
    VerdictCard { height: auto; max-height: 60%; padding: 0 1; display: none; }
    VerdictCard Static { height: auto; }
    VerdictCard.-brief Static { text-wrap: nowrap; text-overflow: ellipsis; }
    VerdictCard.-brief #verdict-head { text-wrap: wrap; max-height: 2; }
    VerdictCard.-brief #verdict-sure { text-wrap: wrap; max-height: 3; }
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

    def show(self, report: Report, room: int, rows: int, keys: dict[str, str], *, goes_on: bool = False) -> None:
        """Show the verdict of a report.

        Args:
            report: the run.
            room: lines of the pane.
            rows: lines of the table above up to its last row, which come before the longer form of the card.
            keys: the key of each action.
            goes_on: whether the run can be measured longer.
        """
        roomy = room >= max(ROOMY, min(rows, ROWS_FIRST) + CARD_LINES)
        if self._shown == (report, roomy, goes_on):
            return
        self._shown = report, roomy, goes_on
        from fatui.trust import trust, trust_line, worst
        from fatui.verdict import confidence_text, finding, headline, loss_lines, verdicts

        made, findings = verdicts(report), trust(report)
        heads = [text for verdict in made for text in (headline(verdict), *verdict.notes)]
        losses = _by_phase([" · ".join(loss_lines(verdict, brief=True)) for verdict in made], made)
        if len(made) == 1:
            losses = loss_lines(made[0], brief=not roomy)
        more = len(losses) - MAX_LOSSES
        shown = [*losses[:MAX_LOSSES], *([f"and {more} more"] if more > 0 else [])]
        sure = _by_phase([confidence_text(verdict) if verdict.winner else "" for verdict in made], made)
        doubtful = any(verdict.too_noisy or verdict.confidence != "high" for verdict in made)
        offers = [f"{keys['longer']} measures longer"] if doubtful and goes_on else []
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


def _by_phase(texts: Sequence[str], verdicts: Sequence["Verdict"]) -> list[str]:
    """Return the text of each verdict, begun with its phase; one without, if all say the same."""
    if len(set(texts)) <= 1:
        return [text for text in texts[:1] if text]
    return [
        f"{verdict.title.rpartition(' ')[2]}: {text}" for text, verdict in zip(texts, verdicts, strict=True) if text
    ]
