"""The row under the comparison's cursor: its figures, samples and the command that measures it again."""

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from attention.core.results import Case, Row
from fatui.tui.terminal import literal
from fatui.tui.view_models.row_details import figure_lines, sample_lines, sentences

EMPTY = "The figures of the row under the cursor of the comparison are shown here."


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
