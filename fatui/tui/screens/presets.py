"""The presets screen: bundled presets and the user's own, with a preview of each."""

from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Input, Static

from attention.core.errors import UsageError
from fatui.storage import presets
from fatui.tui import actions
from fatui.tui.lab import Lab
from fatui.tui.screens.base import AppScreen
from fatui.tui.screens.tables import HasTable
from fatui.tui.view_models.table_lines import TableColumn, TableLine
from fatui.tui.widgets.bars import KeyBar, StatusLine
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.table_pane import TablePane
from fatui.untrusted_text import escape_controls

COLUMNS = (
    TableColumn(name="name", title="preset", right=False, widest=28),
    TableColumn(name="cases", title="cases", rank=1),
    TableColumn(name="origin", title="from", right=False, rank=2),
    TableColumn(name="title", title="title", right=False, rank=3, widest=48),
)
MAX_PREVIEW = 20_000
EMPTY = "There are no presets; 'Save as' on the main screen makes one."


class Presets(HasTable, AppScreen, Screen[str]):
    """Screen of the presets; the result is the name of the one to load."""

    CSS_PATH: ClassVar = ["list.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [*actions.bindings(actions.PRESETS), actions.closing("presets")]
    app: Lab

    def __init__(self) -> None:
        super().__init__(classes="list-screen")
        self._listed: dict[str, presets.PresetEntry] = {}
        self._deleted: list[tuple[Path, str | None]] = []
        """The file of each deleted preset, and its name if the draft was made from it."""

    def compose(self) -> ComposeResult:
        """Yield the list and the preview."""
        yield StatusLine()
        with Horizontal(id="split"):
            pane = TablePane(COLUMNS, empty=EMPTY, table="preset-list", id="presets-pane")
            pane.border_title = "Presets"
            yield pane
            with VerticalScroll(classes="pane half", can_focus=False) as preview:
                preview.border_title = "Preview"
                yield Static(id="preview", markup=False)
        yield KeyBar(keys=(("enter", "Load", "screen.load"), *actions.bar(actions.PRESETS, self.app.keys)))

    def on_mount(self) -> None:
        """Read the presets."""
        self._read()
        if self.app.draft.preset:
            self.query_one(RowTable).go_to(self.app.draft.preset)
        self._preview()

    def _read(self) -> None:
        self._listed = {listed.name: listed for listed in presets.list_presets()}
        own = sum(not listed.bundled for listed in self._listed.values())
        self.query_one(TablePane).show_lines([_line(listed) for listed in self._listed.values()])
        self.query_one(StatusLine).show("Presets", f"{len(self._listed) - own} bundled, {own} of your own")
        self._preview()

    @property
    def _chosen(self) -> str | None:
        return self.query_one(RowTable).key

    @on(RowTable.Highlighted)
    def _preview(self) -> None:
        listed = self._listed.get(self._chosen or "")
        self.query_one("#preview", Static).update(_preview_text(listed) if listed else "")

    @on(RowTable.Chosen)
    def action_load(self) -> None:
        """Load the preset under the cursor, unless it has mistakes."""
        listed = self._listed.get(self._chosen or "")
        if listed is not None and listed.preset is None:
            self.app.tell(f"'{listed.name}' has mistakes and cannot be loaded", "warning")
        elif listed is not None:
            self.dismiss(listed.name)

    def action_back(self) -> None:
        """Close the rename field or the filter if one is open, else the screen."""
        field = self.query("#rename")
        if field:
            field.remove()
            self.query_one(RowTable).focus()
        elif not self.query_one(TablePane).clear_filter():
            self.dismiss()

    def action_rename(self) -> None:
        """Open the rename field below the list."""
        if self._chosen is None or self.query("#rename"):
            return
        field = Input(self._chosen, id="rename", placeholder="new name; escape cancels")
        self.query_one(TablePane).mount(field)
        field.focus()

    @on(Input.Submitted, "#rename")
    def _rename(self, event: Input.Submitted) -> None:
        old, new = self._chosen, event.value.strip()
        event.input.remove()
        self.query_one(RowTable).focus()
        if old is not None and new != old and self._try(lambda: presets.rename(old, new)):
            if self.app.draft.preset == old:
                self.app.follow_preset(new)
            self._read()
            self.query_one(RowTable).go_to(new)

    def action_delete(self) -> None:
        """Delete a preset of the user's own; undo restores it."""
        name = self._chosen
        if name is None:
            return

        def delete() -> None:
            self._deleted.append((presets.delete(name), name if self.app.draft.preset == name else None))

        if self._try(delete):
            if self.app.draft.preset == name:
                self.app.follow_preset(name)  # a bundled preset of the same name may have become visible
            self._read()
            self.app.tell(f"'{name}' is deleted; {self.app.keys['presets_undo']} brings it back")

    def action_undo(self) -> None:
        """Restore the last deleted preset."""
        if not self._deleted:
            self.app.tell("nothing was deleted here")
            return
        path, name = self._deleted[-1]
        if self._try(lambda: presets.restore(path)):
            self._deleted.pop()
            if name is not None and self.app.draft.preset in (None, name):
                self.app.follow_preset(name)
            self._read()

    def _try(self, act: object) -> bool:
        assert callable(act)
        try:
            act()
        except (UsageError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.app.tell(why, "warning")
            return False
        return True


def _line(listed: presets.PresetEntry) -> TableLine:
    made = listed.preset
    cells = {"name": listed.name, "origin": "bundled" if listed.bundled else "own"}
    if made is None:
        figures: dict[str, float | str | None] = {**cells, "cases": None, "title": None}
        return TableLine(key=listed.name, cells={**cells, "title": "has mistakes"}, tone="bad", figures=figures)
    figures = {**cells, "cases": len(made.cases), "title": made.title}
    return TableLine(
        key=listed.name, cells={**cells, "cases": str(len(made.cases)), "title": made.title}, figures=figures
    )


def _preview_text(listed: presets.PresetEntry) -> str:
    if listed.preset is None:
        return escape_controls("\n".join(["This preset has mistakes:", "", *listed.problems]), MAX_PREVIEW)
    made = listed.preset
    limit = f"up to {made.seconds:g} s a case; {', '.join(made.implementations)}"
    head = [text for text in (made.title, made.summary, limit, str(listed.source)) if text]
    return escape_controls("\n".join([*head, "", presets.to_toml(made)]), MAX_PREVIEW)
