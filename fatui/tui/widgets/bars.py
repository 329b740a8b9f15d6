"""The top row: what is set up and on which machine, with the phase on the right."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final

from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from fatui.tui.actions import HELP
from fatui.tui.painting import KeepsStyles
from fatui.untrusted_text import clip

SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


GAP = 2


class StatusLine(KeepsStyles):
    """Row of two texts; the left one is cut if both do not fit."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"status--name", "status--left", "status--right", "status--alarm"}
    DEFAULT_CSS = "StatusLine { height: 1; dock: top; }"

    def __init__(self, *, id: str = "status") -> None:
        super().__init__(id=id)
        self.left, self.right, self.alarm = "", "", False

    def show(self, left: str, right: str, *, alarm: bool = False) -> None:
        """Set the texts; an alarm is highlighted."""
        if (left, right, alarm) != (self.left, self.right, self.alarm):
            self.left, self.right, self.alarm = left, right, alarm
            self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        name, left, right, alarm = (self.part_style(f"status--{part}") for part in ("name", "left", "right", "alarm"))
        end = clip(self.right, max(0, self.size.width - 12))
        room = self.size.width - len(" fatui  ") - len(end) - GAP - 1
        middle = f"{clip(self.left, room):<{max(0, room)}}" + " " * GAP
        parts = [
            Segment(" fatui ", name),
            Segment(f" {middle}", left),
            Segment(f"{end} ", alarm if self.alarm else right),
        ]
        return Strip(parts).adjust_cell_length(self.size.width, left)


PALETTE = "^p Palette"


class KeyBar(Widget):
    """Row of keys with their labels; a click runs the key's action. The help and the palette are at its right end."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"keys--key", "keys--label"}
    DEFAULT_CSS = "KeyBar { height: 1; dock: bottom; }"

    def __init__(self, *, id: str = "key-bar", keys: tuple[tuple[str, str, str], ...] = ()) -> None:
        super().__init__(id=id)
        self.keys = keys
        self._pressed: tuple[tuple[str, str, str], ...] | None = None
        """The keys at which the mouse button went down."""
        self._clicked: tuple[tuple[str, str, str], ...] | None = None
        """Those of the latest click, or of the first of a double click."""

    def show(self, keys: tuple[tuple[str, str, str], ...]) -> None:
        """Set the keys, each a tuple of key, label and action."""
        if keys != self.keys:
            self.keys = keys
            self.refresh()

    @property
    def _help(self) -> str:
        """The key of the help with its label; empty without one."""
        return next((f"{key} {label}  " for key, label, action in self.keys if action == HELP), "")

    @property
    def _end(self) -> int:
        """Columns of the right end."""
        return cell_len(self._help) + len(PALETTE) + 1

    def _fitting(self) -> tuple[tuple[str, str, str], ...]:
        room, fitting = self.size.width - self._end - 1, []
        for key, label, action in self.keys:
            if action == HELP:
                continue
            room -= cell_len(key) + cell_len(label) + 3
            if room < 0:
                break
            fitting.append((key, label, action))
        return tuple(fitting)

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        key_style, label_style = (self.get_component_rich_style(f"keys--{part}") for part in ("key", "label"))
        parts = []
        for key, label, _ in self._fitting():
            parts += [Segment(f" {key}", key_style), Segment(f" {label} ", label_style)]
        used = sum(part.cell_length for part in parts)
        parts.append(Segment(" " * max(1, self.size.width - used - self._end), label_style))
        key, _, label = self._help.partition(" ")
        parts += [Segment(key, key_style), Segment(f" {label}" if label else "", label_style)]
        parts += [Segment("^p", key_style), Segment(PALETTE[2:] + " ", label_style)]
        return Strip(parts).adjust_cell_length(self.size.width, label_style)

    def on_mouse_down(self) -> None:
        """Note what is aimed at."""
        self._pressed = self.keys

    async def on_click(self, event: events.Click) -> None:
        """Run the clicked action; nothing if other keys came under the mouse meanwhile, as at the end of a run."""
        if event.chain == 1:
            self._clicked = self._pressed
        if self._clicked is not None and self._clicked != self.keys:
            return
        at = 0
        for key, label, action in self._fitting():
            at += cell_len(key) + cell_len(label) + 3
            if event.x < at:
                await self.run_action(action)
                return
        if event.x >= self.size.width - len(PALETTE) - 1:
            self.app.action_command_palette()
        elif event.x >= self.size.width - self._end:
            await self.run_action(HELP)


TABS = (("setup", "Set up"), ("live", "Live"), ("results", "Results"), ("log", "Log"))


class PaneTabs(Widget):
    """Row of tabs; a click opens one."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"tabs--open", "tabs--other"}
    DEFAULT_CSS = "PaneTabs { height: 1; }"

    class Opened(Message):
        """Posted when a tab was clicked."""

        def __init__(self, tab: str) -> None:
            super().__init__()
            self.tab = tab

    def __init__(self, hint: str = "", *, id: str = "tabs") -> None:
        """Create the row; `hint` follows the tabs."""
        super().__init__(id=id)
        self.tab, self._hint = TABS[0][0], hint

    def show(self, tab: str) -> None:
        """Mark a tab as open."""
        self.tab = tab
        self.refresh()

    @staticmethod
    def _title(name: str, title: str, tab: str) -> str:
        return f" [{title}] " if name == tab else f"  {title}  "

    def render_line(self, y: int) -> Strip:
        """Draw the row; brackets mark the open tab without colour."""
        opened, other = (self.get_component_rich_style(f"tabs--{part}") for part in ("open", "other"))
        parts = [
            Segment(self._title(name, title, self.tab), opened if name == self.tab else other) for name, title in TABS
        ]
        return Strip([*parts, Segment(f"  {self._hint}", other)]).adjust_cell_length(self.size.width, other)

    def jump_spots(self) -> list[tuple[int, int, Callable[[], object]]]:
        """Return the place of each tab."""
        spots: list[tuple[int, int, Callable[[], object]]] = []
        at = 0
        for name, title in TABS:
            spots.append((at, 0, partial(self.post_message, self.Opened(name))))
            at += len(self._title(name, title, self.tab))
        return spots

    def on_click(self, event: events.Click) -> None:
        """Open the clicked tab."""
        at = 0
        for name, title in TABS:
            at += len(self._title(name, title, self.tab))
            if event.x < at:
                self.post_message(self.Opened(name))
                return
