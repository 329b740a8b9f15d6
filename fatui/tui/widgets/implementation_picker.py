"""The list of implementations: which are selected, and the path each would take for the workload."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from fatui.formatting import short_name
from fatui.tui.painting import KeepsStyles
from fatui.tui.view_models.availability import PickerRow
from fatui.untrusted_text import clip, one_line

NAME_WIDTH: Final = 9
FIGURE_WIDTH: Final = 8
"""Minimum characters of the columns of memory and time."""
TITLES: Final = {"memory": "memory", "time": "a call"}
WHOLE: Final = " E: all"
"""What follows a reason that is cut."""
HEAD: Final = 1
"""Rows above the list."""


class ImplementationPicker(KeepsStyles, can_focus=True):
    """List from which space or a click selects implementations; the lines below give the reason for the path."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *("picker--on", "picker--off", "picker--cursor", "picker--path", "picker--unable", "picker--reason"),
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("home", "move(-100)", "First", show=False),
        Binding("end", "move(100)", "Last", show=False),
        Binding("E", "explain", "Path and reason in full", show=False),
        Binding("space,enter", "take", "Select or deselect", show=False),
    ]

    class Toggled(Message):
        """Posted when an implementation was selected or deselected."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Explained(Message):
        """Posted when the path and the reason of an implementation are to be shown as a whole."""

        def __init__(self, name: str, text: str) -> None:
            super().__init__()
            self.name, self.text = name, text

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id)
        self.rows: tuple[PickerRow, ...] = ()
        self._cursor = 0

    def show(self, rows: tuple[PickerRow, ...]) -> None:
        """Set the list."""
        if rows != self.rows:
            self.rows = rows
            self._cursor = max(0, min(self._cursor, len(rows) - 1))
            self.refresh(layout=False)

    def action_move(self, count: int) -> None:
        """Move the cursor; past either end, focus the next or previous widget."""
        target = self._cursor + count
        if abs(count) == 1 and not 0 <= target < len(self.rows):
            self.screen.focus_next() if count > 0 else self.screen.focus_previous()
            return
        self._cursor = min(max(target, 0), len(self.rows) - 1)
        self.refresh()

    def jump_spots(self) -> list[tuple[int, int, Callable[[], object]]]:
        """Return the place of each implementation."""
        return [(0, y + HEAD - self._top, partial(self._jump_to, y)) for y in range(self._top, len(self.rows))]

    def _jump_to(self, index: int) -> None:
        self._cursor = index
        self.focus()
        self.refresh()

    def go_to(self, name: str) -> None:
        """Focus the list with the cursor on an implementation, which is then in view."""
        self._jump_to([row.name for row in self.rows].index(name))

    def action_take(self) -> None:
        """Select or deselect the implementation under the cursor."""
        if self.rows:
            self.post_message(self.Toggled(self.rows[self._cursor].name))

    def action_explain(self) -> None:
        """Show the path and the reason of the implementation under the cursor as a whole."""
        if self.rows:
            row = self.rows[self._cursor]
            self.post_message(self.Explained(row.name, "\n\n".join(filter(None, (row.path, row.reason)))))

    def on_click(self, event: events.Click) -> None:
        """Select or deselect the clicked implementation."""
        index = event.y - HEAD + self._top
        if event.y >= HEAD and index < len(self.rows):
            self._cursor = index
            self.refresh()
            self.action_take()

    def _reason_lines(self) -> list[str]:
        """Wrap the reason of the implementation under the cursor to the space left, cut with an ellipsis."""
        if not self.rows:
            return []
        import textwrap

        row = self.rows[self._cursor]
        room = self.size.height - len(self.rows) - HEAD
        path = f"{row.path}; " if len(row.path) > self._path_width else ""
        lines = textwrap.wrap(f"{row.name}: {path}{row.reason}", max(10, self.size.width)) if row.reason else []
        if len(lines) > room > 0:
            lines = [*lines[: room - 1], clip(" ".join(lines[room - 1 :]), self.size.width - len(WHOLE)) + WHOLE]
        return lines

    def render_line(self, y: int) -> Strip:
        """Draw one implementation, or a line of the reason below the list."""
        if y < HEAD:
            titles = "".join(f"{TITLES[each]:>{width}}" for each, width in self._figures.items())
            head = f"{'':<{NAME_WIDTH + 3}}{titles}  path"
            return self._strip([Segment(head, self.part_style("picker--reason"))])
        index = y - HEAD + self._top
        if index < len(self.rows):
            return self._row_strip(self.rows[index], index == self._cursor and self.has_focus)
        lines = self._reason_lines()
        at = index - len(self.rows)
        text = lines[at] if at < len(lines) else ""
        return self._strip([Segment(text, self.part_style("picker--reason"))])

    def _row_strip(self, row: PickerRow, at_cursor: bool) -> Strip:
        name = f"{'✓' if row.chosen else '·'} {short_name(one_line(row.name), NAME_WIDTH):<{NAME_WIDTH}} "
        figures = "".join(f"{getattr(row, each):>{width}}" for each, width in self._figures.items())
        if row.able:
            name += f"{figures}  "
        path = clip(row.path, self.size.width - len(name))
        if at_cursor:
            style = self.part_style("picker--cursor")
            return Strip([Segment(name + path, style)]).adjust_cell_length(self.size.width, style)
        main = self.part_style("picker--on" if row.chosen else "picker--off")
        other = self.part_style("picker--path" if row.able else "picker--unable")
        return self._strip([Segment(name, main), Segment(path, other)])

    @property
    def _top(self) -> int:
        """The first visible row of a list that is longer than the widget, so that the cursor is visible."""
        room = max(1, self.size.height - HEAD)
        return 0 if len(self.rows) <= room else min(max(0, self._cursor - room + 1), len(self.rows) - room)

    @property
    def _path_width(self) -> int:
        return self.size.width - NAME_WIDTH - 3 - sum(self._figures.values()) - 2

    @property
    def _figures(self) -> dict[str, int]:
        """The columns beside the name, with their widths: a time is known after the first run."""
        memory = max([FIGURE_WIDTH, *(len(row.memory) for row in self.rows)])
        time = max([FIGURE_WIDTH, *(len(row.time) + 1 for row in self.rows)])
        return {"memory": memory, "time": time} if any(row.time for row in self.rows) else {"memory": memory}

    def _strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).adjust_cell_length(self.size.width, self.part_style())
