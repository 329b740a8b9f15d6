"""The help dialog: the key bindings of the screen below, as configured."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

ABOUT = "Letter keys work outside inputs; tab moves to the next control. [keys] in {config} remaps them."


class Help(ModalScreen[None]):
    """List of keys, each with a sentence."""

    CSS_PATH: ClassVar = ["dialog.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="back"),
        Binding("question_mark", "close", "Close", id="help"),
        Binding("q", "close", "Close", id="quit"),
        Binding("enter", "close", "Close"),
    ]

    def __init__(self, groups: list[tuple[str, list[tuple[str, str]]]], config: str) -> None:
        super().__init__()
        self._groups, self._config = groups, config

    def compose(self) -> ComposeResult:
        """Yield a block per part of the screen."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Keys"
            dialog.border_subtitle = "escape closes"
            for title, keys in self._groups:
                yield Static(f"[b]{title}[/b]")
                yield Static("\n".join(f"  {key:<14}{words}" for key, words in keys) + "\n", markup=False)
            yield Static(ABOUT.format(config=self._config), markup=False, classes="hint")

    def action_close(self) -> None:
        """Close the screen."""
        self.dismiss()
