"""A dialog with a yes-or-no question."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

ANSWERS = "[@click=screen.answer(True)][b]y[/b] {yes}[/]     [@click=screen.answer(False)][b]n, enter[/b] {no}[/]"


class Question(ModalScreen[bool]):
    """Yes-or-no dialog: y or the key that opened it is yes; enter, escape or n is no, which changes nothing."""

    CSS_PATH: ClassVar = ["dialog.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,ctrl+c,ctrl+q", "answer(True)", "Yes"),
        Binding("q", "answer(True)", "Yes", id="quit"),
        Binding("n,enter", "answer(False)", "No"),
        Binding("escape", "answer(False)", "No", id="back"),
    ]

    def __init__(self, text: str, *, yes: str, no: str) -> None:
        super().__init__()
        self._text, self._yes, self._no = text, yes, no

    def compose(self) -> ComposeResult:
        """Yield the question and its two answers."""
        with Vertical(classes="dialog"):
            yield Static(self._text, markup=False)
            yield Static(ANSWERS.format(yes=self._yes, no=self._no), classes="answers")

    def action_answer(self, yes: bool) -> None:
        """Close with the answer."""
        self.dismiss(yes)
