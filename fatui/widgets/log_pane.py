"""The log and its filter, which opens above it."""

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Input

from fatui.ascii import literal
from fatui.journal import Journal
from fatui.widgets.log_view import LEVELS, LogView

HINT = "word to find; start with warning: or error: for a level"


class LogPane(Vertical):
    """Pane with the journal; the title gives the filter and the number of lines held back."""

    DEFAULT_CSS = "LogPane Input { height: 1; border: none; padding: 0 1; } LogPane LogView { height: 1fr; }"

    def __init__(self, journal: Journal, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.journal = journal
        self._title = ""

    def compose(self) -> ComposeResult:
        """Yield the lines; the filter is mounted when it is opened."""
        yield LogView(self.journal, id="log-view")

    @property
    def view(self) -> LogView:
        """The view of the lines."""
        return self.query_one(LogView)

    def refresh_lines(self) -> None:
        """Show new lines and update the title."""
        view = self.view
        view.update_lines()
        parts = ["Log"]
        if view.needle or view.level != "info":
            what = [f"'{view.needle}'"] if view.needle else []
            parts.append(f"only {', '.join([*what, *([f'{view.level}s'] if view.level != 'info' else [])])}")
        if view.paused:
            parts.append(f"paused, {view.held_back} held back")
        title = " · ".join(parts)
        if self._title != title:
            self._title = title
            self.border_title = literal(title)

    def toggle_pause(self) -> None:
        """Pause, or continue and show what was held back."""
        self.view.paused = not self.view.paused
        self.refresh_lines()

    def ask(self) -> None:
        """Open the filter, which takes a word, a level, or both: "error: poc"."""
        if self.query(Input):
            self.query_one(Input).focus()
            return
        field = Input(self.view.needle, placeholder=HINT, compact=True)
        self.mount(field, before=self.view)
        field.focus()

    @on(Input.Changed)
    def _filter(self, event: Input.Changed) -> None:
        event.stop()
        text, level = event.value.strip(), "info"
        for each in LEVELS:
            if text.lower().startswith(f"{each}:"):
                text, level = text[len(each) + 1 :].strip(), each
        self.view.filter(text, level)
        self.refresh_lines()

    @on(Input.Submitted)
    def _close(self, event: Input.Submitted) -> None:
        event.stop()
        event.input.remove()
        self.view.focus()

    def key_escape(self) -> None:
        """Close the filter and show all lines."""
        if self.query(Input):
            self.query_one(Input).remove()
            self.view.filter("", "info")
            self.view.focus()
            self.refresh_lines()
