"""The first screen, in the place of the comparison until there is one."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Static

from fatui.tui.view_models.home import Past, home_text


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

    def show(self, past: Past | None, keys: dict[str, str]) -> None:
        """Draw the last run."""
        self.past = past
        self.query_one("#home-text", Static).update(home_text(past, keys))

    def action_open(self) -> None:
        """Open the run."""
        if self.past is not None:
            self.post_message(self.Opened())
