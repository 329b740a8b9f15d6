"""The dialog that exports a run to files."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Final

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from attention.files import expanded
from fatui.widgets.choice import Choice

FORMATS: Final = ("md", "csv", "json", "html", "svg", "log")
"""`html` is the written report of the run; the others are its table, its rows (csv, json), its picture and its log."""
Writers = dict[str, Callable[[], str]]


class Export(ModalScreen[tuple[Path, tuple[str, ...]]]):
    """Dialog for a folder and a name; the result is the path without suffix, and the chosen suffixes."""

    CSS_PATH: ClassVar = ["dialog.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Do not export", id="back")]

    def __init__(self, folder: str, name: str) -> None:
        super().__init__()
        self._folder, self._name = folder, name

    def compose(self) -> ComposeResult:
        """Yield the fields, and the list of files to be written."""
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Export the run"
            dialog.border_subtitle = "enter writes · escape does not"
            yield Static("Folder")
            yield Input(self._folder, id="folder")
            yield Static("Name, without suffix")
            yield Input(self._name, id="name")
            yield Choice("write", ("all", *FORMATS), id="formats")
            yield Static(id="outcome", markup=False, classes="answers")

    def on_mount(self) -> None:
        """List the files, and focus the name."""
        self.query_one("#name", Input).focus()
        self._show()

    @property
    def endings(self) -> tuple[str, ...]:
        """The suffixes of the files to be written."""
        chosen = self.query_one(Choice).value
        return FORMATS if chosen == "all" else (chosen,)

    @property
    def stem(self) -> Path:
        """The path without suffix."""
        name = self.query_one("#name", Input).value.strip()
        return expanded(self.query_one("#folder", Input).value.strip() or ".") / name

    @property
    def problem(self) -> str:
        """What is wrong with the input, or an empty string."""
        name = self.query_one("#name", Input).value.strip()
        if not name or "/" in name or name in (".", ".."):
            return "a name is needed, without '/'"
        return "" if self.stem.parent.is_dir() else f"there is no folder {self.stem.parent}"

    @on(Input.Changed)
    @on(Choice.Changed)
    def _show(self) -> None:
        line = self.query_one("#outcome", Static)
        line.set_class(bool(self.problem), "problem")
        if self.problem:
            line.update(self.problem)
            return
        there = [ending for ending in self.endings if self.stem.with_name(f"{self.stem.name}.{ending}").exists()]
        replaced = f"; replaces {', '.join(there)}" if there else ""
        line.update(f"writes {self.stem}.{{{','.join(self.endings)}}}{replaced}")

    @on(Input.Submitted)
    def _write(self) -> None:
        if self.problem:
            self.app.bell()
        else:
            self.dismiss((self.stem, self.endings))

    def action_cancel(self) -> None:
        """Close without writing."""
        self.dismiss()


def write_all(stem: Path, writers: Writers) -> tuple[list[Path], list[str]]:
    """Write each text; return the files written and the error messages."""
    from fatui.paths import write_atomically

    written, problems = [], []
    for ending, make in writers.items():
        path = stem.with_name(f"{stem.name}.{ending}")
        try:
            write_atomically(path, make())
        except OSError as error:
            problems.append(f"{path} not written: {error.strerror or error}")
        else:
            written.append(path)
    return written, problems
