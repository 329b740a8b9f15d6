"""A one-row slider over discrete stops; in a sweep several values can be marked."""

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import ClassVar, Final

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.strip import Strip

from fatui.tui.widgets.choice import Stepper

LABEL_WIDTH: Final = 10
VALUE_WIDTH: Final = 9
PAGE: Final = 3
TYPEABLE: Final = "0123456789kKmM_., "
Parse = Callable[[str], tuple[int, ...]]
Say = Callable[[int], str]


class Slider(Stepper):
    """Slider for one number, or several in a sweep; any number that `parse` accepts can be typed.

    A typed number counts once enter applies it. Arrows, the mouse and leaving the slider drop it: a digit may have been
    meant for a pane.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"slider--label", "slider--track", "slider--thumb", "slider--value"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Less", show=False),
        Binding("right", "step(1)", "More", show=False),
        Binding("up,k", "up", "The control before", show=False),
        Binding("down,j", "app.focus_next", "The next control", show=False),
        Binding("home", "end(-1)", "Least", show=False),
        Binding("end", "end(1)", "Most", show=False),
        Binding("pageup", f"step({PAGE})", "Much more", show=False),
        Binding("pagedown", f"step(-{PAGE})", "Much less", show=False),
        Binding("space", "mark", "Mark for the sweep", show=False),
        Binding("enter", "commit", "Apply the typed value", show=False),
        Binding("escape", "cancel", "Discard the typed value", show=False),
    ]
    DEFAULT_CSS = "Slider { height: 1; }"

    class Changed(Message):
        """Posted when the user chose other values."""

        def __init__(self, slider: "Slider", values: tuple[int, ...]) -> None:
            super().__init__()
            self.slider, self.values = slider, values

        @property
        def control(self) -> "Slider":
            """The slider."""
            return self.slider

    class Refused(Message):
        """Posted when the typed text is not a value."""

        def __init__(self, slider: "Slider", reason: str) -> None:
            super().__init__()
            self.slider, self.reason = slider, reason

    class Typing(Message):
        """Posted when the typed text changes; `slider.typed` is None once it was applied or dropped."""

        def __init__(self, slider: "Slider") -> None:
            super().__init__()
            self.slider = slider

    def __init__(self, label: str, stops: tuple[int, ...], *, parse: Parse, say: Say = str, id: str) -> None:
        super().__init__(id=id)
        self.label = label
        self.stops = stops
        self.values: tuple[int, ...] = stops[:1]
        self.sweeping = False
        self.typed: str | None = None
        self._cursor = stops[0]
        self._parse, self._say = parse, say
        self._dragging = False

    def change(self, label: str, *, parse: Parse, say: Say) -> None:
        """Set what the slider is for."""
        self.label, self._parse, self._say = label, parse, say
        self.refresh()

    def show(self, values: tuple[int, ...], *, stops: tuple[int, ...] | None = None, sweeping: bool = False) -> None:
        """Set the values without posting a message."""
        stops = stops or self.stops
        if (values, stops, sweeping) == (self.values, self.stops, self.sweeping):
            return
        self.values, self.stops, self.sweeping = values, stops, sweeping
        if not sweeping or self._cursor not in (*values, *stops):
            self._cursor = values[0]
        self.refresh()

    def _choose(self, values: tuple[int, ...]) -> None:
        if values and values != self.values:
            self.values = values
            self.refresh()
            self.post_message(self.Changed(self, values))

    def _go_to(self, value: int) -> None:
        self._set_typed(None)
        self._cursor = value
        if not self.sweeping:
            self._choose((value,))
        self.refresh()

    def _toggle(self, value: int) -> None:
        """Mark or unmark a value, though never the last one marked."""
        self._set_typed(None)
        self._cursor = value
        values = set(self.values) ^ {value} or {value}
        self._choose(tuple(sorted(values)))
        self.refresh()

    def action_step(self, count: int) -> None:
        """Move by a number of stops; from between two stops, first to the next one in that direction."""
        index = bisect_left(self.stops, self._cursor)
        on_stop = index < len(self.stops) and self.stops[index] == self._cursor
        if not on_stop and count > 0:
            count -= 1
        self._go_to(self.stops[min(max(index + count, 0), len(self.stops) - 1)])

    def action_end(self, direction: int) -> None:
        """Go to the first or the last stop."""
        self._go_to(self.stops[0 if direction < 0 else -1])

    def action_mark(self) -> None:
        """In a sweep, mark or unmark the value under the cursor."""
        self._toggle(self._cursor)

    def action_commit(self) -> None:
        """Apply the typed text, or post why it was refused."""
        if self.typed is None:
            return
        text = self.typed
        self._set_typed(None)
        try:
            values = self._parse(text)
        except ValueError as error:
            self.post_message(self.Refused(self, f"{self.label} {error}"))
            return
        self._cursor = values[0]
        self._choose(values)

    def action_cancel(self) -> None:
        """Discard the typed text."""
        self._set_typed(None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave enter and escape to the screen unless text is typed, and space unless sweeping."""
        if action in ("commit", "cancel"):
            return self.typed is not None
        return self.sweeping if action == "mark" else True

    @property
    def pending(self) -> str:
        """What to do about the typed text, in words: "seq: 2 is being typed; enter applies it, escape drops it"."""
        return f"{self.label}: {self.typed} is being typed; enter applies it, escape drops it"

    def _set_typed(self, text: str | None) -> None:
        if text != self.typed:
            self.typed = text
            self.refresh()
            self.post_message(self.Typing(self))

    def on_key(self, event: events.Key) -> None:
        """Collect a typed value, which starts with a digit; letters that cannot be part of it do nothing else."""
        typed, character = self.typed or "", event.character or ""
        if event.key == "backspace" and typed:
            self._set_typed(typed[:-1] or None)
        elif character == " " and typed and not typed.endswith(","):
            self.post_message(self.Refused(self, self.pending))
        elif character and character in TYPEABLE and (typed or character.isdigit()):
            self._set_typed(typed + character)
        elif typed and character.isalpha():
            self.post_message(self.Refused(self, self.pending))
        else:
            return
        event.stop()
        event.prevent_default()

    def on_blur(self) -> None:
        """Drop the typed text when the focus leaves, and post that it was."""
        if self.typed is not None:
            self.post_message(self.Refused(self, f"{self.label}: the typed {self.typed} is dropped: enter applies it"))
            self._set_typed(None)

    def _stop_at(self, x: int) -> int:
        last = max(1, self._track_width - 1)
        at = min(max(x - LABEL_WIDTH - 1, 0), last) / last
        return self.stops[round(at * (len(self.stops) - 1))]

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Start a drag; in a sweep, mark."""
        if event.x <= LABEL_WIDTH or event.x > LABEL_WIDTH + self._track_width:
            return
        if self.sweeping:
            self._toggle(self._stop_at(event.x))
            return
        self._dragging = True
        self.capture_mouse()
        self._go_to(self._stop_at(event.x))

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Follow the drag."""
        if self._dragging:
            self._go_to(self._stop_at(event.x))

    def on_mouse_up(self) -> None:
        """End the drag."""
        self._dragging = False
        self.release_mouse()

    @property
    def _track_width(self) -> int:
        return max(3, self.room.width - LABEL_WIDTH - VALUE_WIDTH - 2)

    def _column(self, value: int) -> int:
        """Return the column of a value on the track; between two stops, interpolate its logarithm."""
        index = min(max(bisect_left(self.stops, value), 0), len(self.stops) - 1)
        place = float(index)
        if index > 0 and self.stops[index] > value:
            low, high = math.log(self.stops[index - 1]), math.log(self.stops[index])
            place = index - 1 + (math.log(value) - low) / (high - low)
        return round(place / max(1, len(self.stops) - 1) * (self._track_width - 1))

    def _track(self) -> str:
        width = self._track_width
        cells = ["├", *("─" * (width - 2)), "┤"]
        if self.sweeping and self.has_focus:
            cells[self._column(self._cursor)] = "┼"
        for value in self.values:
            cells[self._column(value)] = "●"
        if self.sweeping and self.has_focus and self._cursor in self.values:
            cells[self._column(self._cursor)] = "◉"
        return "".join(cells)

    @property
    def value_text(self) -> str:
        """The text to the right of the track."""
        if self.typed is not None:
            return f"{self.typed[-VALUE_WIDTH + 1 :]}▏"
        return self._say(self.values[0]) if len(self.values) == 1 else f"{len(self.values)} values"

    def render_line(self, y: int) -> Strip:
        """Draw the row."""
        label, track, thumb, value = (
            self.part_style(f"slider--{part}") for part in ("label", "track", "thumb", "value")
        )
        marks = [Segment(char, thumb if char in "●◉┼" else track) for char in self._track()]
        ends = Segment(f"{self.label:<{LABEL_WIDTH}} ", label), Segment(f" {self.value_text:>{VALUE_WIDTH}}", value)
        return Strip([ends[0], *marks, ends[1]]).adjust_cell_length(self.room.width, self.part_style())
