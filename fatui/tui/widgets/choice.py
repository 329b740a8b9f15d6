"""A one-row choice among a few words; in a sweep several can be marked."""

from collections.abc import Callable
from typing import ClassVar, Final, Protocol

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.dom import DOMNode
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from fatui.tui.painting import KeepsStyles
from fatui.untrusted_text import clip

MAX_DIGITS: Final = 8
"""Maximum number of typed digits."""


class Typing(Protocol):
    """How typed text makes options that are not in the list."""

    def typed(self, present: str, text: str) -> str | None:
        """Return the option that a text stands for, or None while it is incomplete.

        Args:
            present: the option chosen before the text.
            text: what was typed.
        """
        ...

    def begins(self, present: str, text: str) -> bool:
        """Return whether a text is the beginning of one that stands for an option."""
        ...


class Stepper(KeepsStyles, can_focus=True):
    """A row in which the mouse wheel takes single steps, instead of scrolling the pane.

    Going up stays in the pane: from its top control the focus would leave unseen, and digits would go to panes.
    """

    def action_step(self, count: int) -> None:
        """Move by a number of steps."""
        raise NotImplementedError

    def action_up(self) -> None:
        """Focus the control before, unless this is the pane's first."""
        chain = self.screen.focus_chain
        index = chain.index(self) if self in chain else 0
        if index and _pane_of(chain[index - 1]) is _pane_of(self):
            chain[index - 1].focus()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Go up one step."""
        event.stop()
        event.prevent_default()
        self.action_step(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Go down one step."""
        event.stop()
        event.prevent_default()
        self.action_step(-1)


def _pane_of(widget: Widget) -> DOMNode | None:
    """Return the pane that a widget is in."""
    return next((node for node in widget.ancestors if node.has_class("pane")), None)


class Choice(Stepper):
    """Choice of one option; with `typed_option`, typed digits make a further option, with `typing` a typed text.

    `typed_option` raises ValueError, saying what it takes, for digits that make none.

    In a sweep it shows the marked options, and beside them the option under the cursor if it is another.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choice--label", "choice--value"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Previous", show=False),
        Binding("right,enter", "step(1)", "Next", show=False),
        Binding("up,k", "up", "The control before", show=False),
        Binding("down,j", "app.focus_next", "The next control", show=False),
        Binding("space", "mark", "Next; in a sweep, mark", show=False),
        Binding("home", "end(0)", "First", show=False),
        Binding("end", "end(-1)", "Last", show=False),
    ]
    DEFAULT_CSS = "Choice { height: 1; }"

    class Changed(Message):
        """Posted when the user chose another option, or marked others."""

        def __init__(self, choice: "Choice", values: tuple[str, ...]) -> None:
            super().__init__()
            self.choice, self.values = choice, values

    class Refused(Message):
        """Posted when typed digits make no option."""

        def __init__(self, choice: "Choice", reason: str) -> None:
            super().__init__()
            self.choice, self.reason = choice, reason

    def __init__(
        self,
        label: str,
        options: tuple[str, ...],
        *,
        id: str,
        typed_option: Callable[[str], str] | None = None,
        typing: Typing | None = None,
        say: Callable[[str], str] = str,
    ) -> None:
        super().__init__(id=id)
        self.label = label
        self.options = options
        self.values: tuple[str, ...] = options[:1]
        self.sweeping = False
        self._cursor = options[0]
        self._typed_option = typed_option
        self._typing = typing
        self._before_typing = ""
        self._say = say
        self._typed = ""

    @property
    def value(self) -> str:
        """The value, or the first of several."""
        return self.values[0]

    def show(self, values: tuple[str, ...], *, sweeping: bool = False, options: tuple[str, ...] | None = None) -> None:
        """Set the chosen options, and the options, without posting a message."""
        options = options or self.options
        self.refresh()  # always: how a value is said may depend on another choice
        if (values, sweeping, options) == (self.values, self.sweeping, self.options):
            return
        if self._cursor in self.options and len(options) == len(self.options):
            self._cursor = options[self.options.index(self._cursor)]
        if values != self.values:
            self._typed = ""
        self.values, self.sweeping, self.options = values, sweeping, options
        if not sweeping or self._cursor not in (*values, *self.options):
            self._cursor = values[0]

    def _choose(self, values: tuple[str, ...]) -> None:
        if values != self.values:
            self.values = values
            self.post_message(self.Changed(self, values))

    def _go_to(self, value: str) -> None:
        self._cursor = value
        if not self.sweeping:
            self._choose((value,))
        self.refresh()

    def action_step(self, count: int) -> None:
        """Go to the next option, wrapping around; from a typed one, to the first."""
        self._typed = ""
        index = self.options.index(self._cursor) + count if self._cursor in self.options else 0
        self._go_to(self.options[index % len(self.options)])

    def action_end(self, index: int) -> None:
        """Go to the first option or the last."""
        self._typed = ""
        self._go_to(self.options[index])

    def action_mark(self) -> None:
        """Go to the next option; in a sweep, toggle the mark of the one under the cursor, except on the last one."""
        self._typed = ""
        if not self.sweeping:
            self.action_step(1)
            return
        others = tuple(value for value in self.values if value != self._cursor)
        self._choose(others or self.values if self._cursor in self.values else (*self.values, self._cursor))
        self.refresh()

    def on_key(self, event: events.Key) -> None:
        """Collect typed text into an option; digits may end in a k, which multiplies by 1024. Enter ends the text."""
        if self._typed and event.key == "enter":  # as on a slider, and does not go on to the next option
            self._typed = ""
            event.stop()
            event.prevent_default()
            self.refresh()
            return
        if self._typing is not None:
            self._type_text(event, self._typing)
        if self._typed_option is None:
            return
        if self._typed and event.character in ("k", "K"):
            event.stop()
            event.prevent_default()
            self._type_number(str(int(self._typed) * 1024), self._typed_option)
            self._typed = ""
            return
        digit = event.character or ""
        if not (digit.isascii() and digit.isdigit()):
            self._typed = ""
            return
        event.stop()
        text = (self._typed + digit).lstrip("0") or "0"
        if len(text) > MAX_DIGITS:
            self.post_message(self.Refused(self, f"{self.label} takes {MAX_DIGITS} digits at most"))
        elif self._type_number(text, self._typed_option):
            self._typed = text

    def _type_number(self, text: str, typed_option: Callable[[str], str]) -> bool:
        """Go to the option that digits make, or post why there is none; return whether there is one."""
        try:
            option = typed_option(text)
        except ValueError as error:
            self.post_message(self.Refused(self, f"{self.label} {error}"))
            return False
        self._go_to(option)
        return True

    def _type_text(self, event: events.Key, typing: Typing) -> None:
        """Add a character to the typed text, or begin another one with it; go to the option that it stands for."""
        character = event.character or ""
        present = self._before_typing if self._typed else self._cursor
        text = self._typed + character
        if not typing.begins(present, text):
            present, text = self._cursor, character
        if not character or not typing.begins(present, text):
            self._typed = ""
            self.refresh()
            return
        event.stop()
        event.prevent_default()
        self._typed, self._before_typing = text, present
        option = typing.typed(present, text)
        if option is not None:
            self._go_to(option)
        self.refresh()

    def on_blur(self) -> None:
        """Finish the typed value."""
        self._typed = ""

    def on_click(self, event: events.Click) -> None:
        """Go to the next option, or on the label's side of the word to the previous one; in a sweep, mark."""
        if self.sweeping:
            self.action_mark()
        else:
            self.action_step(-1 if event.x <= len(self.label) + 1 else 1)

    @property
    def value_text(self) -> str:
        """The text beside the label."""
        left, right = ("‹", "›") if self.has_focus else (" ", " ")
        if self._typing is not None and self._typed:
            return f"{left}{self._typed}▏"
        if not self.sweeping:
            return f"{left}{self._say(self.value)}{right}"
        chosen = self._say(self.value) if len(self.values) == 1 else f"{len(self.values)} values"
        if not self.has_focus or self.values == (self._cursor,):
            return f"{left}{chosen}{right}"
        cursor = f"{left}{'●' if self._cursor in self.values else '┼'}{self._say(self._cursor)}{right}"
        room = self.size.width - len(self.label) - len(cursor) - 3
        return f" {clip(chosen, room)} {cursor}" if room > 0 else cursor

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        label, value = self.part_style("choice--label"), self.part_style("choice--value")
        parts = [Segment(f"{self.label} ", label), Segment(self.value_text, value)]
        return Strip(parts).adjust_cell_length(self.room.width, self.part_style())


class Toggles(Widget, can_focus=True):
    """Row of words; left and right move, space or a click selects or deselects, though never the last one selected."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"picker--on", "picker--off", "picker--cursor"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "Previous", show=False),
        Binding("right", "move(1)", "Next", show=False),
        Binding("space,enter", "take", "Select or deselect", show=False),
    ]
    DEFAULT_CSS = "Toggles { height: 1; }"

    class Changed(Message):
        """Posted when a word was selected or deselected."""

    def __init__(self, options: tuple[str, ...], chosen: tuple[str, ...], *, id: str) -> None:
        super().__init__(id=id)
        self.options = options
        self.chosen = chosen
        self._cursor = 0

    def action_move(self, count: int) -> None:
        """Move to another word, wrapping around."""
        self._cursor = (self._cursor + count) % len(self.options)
        self.refresh()

    def action_take(self) -> None:
        """Select or deselect the word under the cursor."""
        word = self.options[self._cursor]
        chosen = tuple(each for each in self.options if (each in self.chosen) != (each == word))
        if chosen:
            self.chosen = chosen
            self.post_message(self.Changed())
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Select or deselect the clicked word."""
        at = 0
        for index, word in enumerate(self.options):
            at += len(word) + 4
            if event.x < at:
                self._cursor = index
                self.action_take()
                return

    def on_focus(self) -> None:
        """Show the cursor."""
        self.refresh()

    def on_blur(self) -> None:
        """Hide the cursor."""
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        on, off, cursor = (self.get_component_rich_style(f"picker--{part}") for part in ("on", "off", "cursor"))
        parts = []
        for index, word in enumerate(self.options):
            taken = word in self.chosen
            style = cursor if self.has_focus and index == self._cursor else on if taken else off
            parts += [Segment(f"{'●' if taken else '○'} {word}", style), Segment("  ", off)]
        return Strip(parts).adjust_cell_length(self.size.width, self.rich_style)
