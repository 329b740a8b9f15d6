"""Panes of text: the first screen, in the place of the comparison until there is one, and the row under its cursor."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Static

from attention.core.results import Case, Row
from fatui.tui.terminal import literal
from fatui.tui.view_models.home import Past, home_text
from fatui.tui.view_models.row_details import figure_lines, sample_lines, sentences

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

    def compose(self) -> ComposeResult:
        """Yield the text."""
        yield Static(id="home-text", markup=False)

    def show(self, past: Past | None, keys: dict[str, str], where: str = "this machine") -> None:
        """Draw the last run on a machine."""
        self.past = past
        self.query_one("#home-text", Static).update(home_text(past, keys, where))

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
        if self._shown == (case, row, command):
            return
        self._shown = case, row, command
        text = EMPTY
        if case is not None and row is not None:
            samples = ["", *sample_lines(row)] if row.samples else []
            text = "\n".join([*figure_lines(row, case), *samples, "", *sentences(row, case, command)])
        self.border_title = literal(f"6 Row · {row.implementation}" if row else "6 Row")
        self.query_one("#row-text", Static).update(text)
