"""Input in its order: a key acts on what the one before it has brought into focus, a click on what was in view."""

import asyncio
import time
from collections import deque
from typing import Final

from textual import events
from textual.app import App
from textual.geometry import Offset
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget

MAX_WAIT_S: Final = 0.3
"""Seconds after which a key counts as done whose widget has gone, or is busy."""
MIN_WAIT_S: Final = 0.01
MIN_TURNS: Final = 40
"""Turns of the event loop that it has besides: on a busy machine the app may have had no time for it."""
LEFT_BUTTON: Final = 1


class KeyDone(Message, bubble=True):
    """Posted to where a key went, so that it takes the same way to the app: it arrives when the key has acted."""


class OrderedInput(App[int]):
    """App that holds a key back while an earlier one is on its way, and in which clicks are those of the left button.

    Textual hands a key to the widget that has the focus as it is read: of keys that are typed fast or pasted, those
    after one that moves the focus went to where the focus was before. The second click of a double click went to what
    the first had brought into view, and clicks of any button acted alike.
    """

    _acting_since: float | None = None
    """When the key was handed out that is on its way."""
    _acting_on: Screen[object] | None = None
    """The screen that it went to."""
    _to_focus: Widget | None = None
    """The widget that gets the focus with the next layout."""
    _clicked_on: Screen[object] | None = None
    """The screen on which the latest click was, or the first of a double click."""
    _clicked_at: Offset | None = None
    _clicked_s: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._held: deque[events.Key] = deque()

    def focus_after_layout(self, widget: Widget) -> None:
        """Focus a widget that is on the screen after the next layout; keys wait for that."""
        self._to_focus = widget
        self.screen.call_after_refresh(self._focus_now, widget)

    def _focus_now(self, widget: Widget) -> None:
        self._to_focus = None
        widget.screen.set_focus(widget)

    async def on_event(self, event: events.Event) -> None:
        """Handle an event; hold keys while another is on its way, and leave out presses that are for no one here."""
        if isinstance(event, events.MouseDown | events.MouseUp) and not event.is_forwarded and not self._takes(event):
            return
        if not isinstance(event, events.Key) or event.is_forwarded:
            await super().on_event(event)
        elif self._acting_since is not None:
            self._held.append(event)
            if len(self._held) == 1:
                waited_s = time.monotonic() - self._acting_since
                self.set_timer(max(MAX_WAIT_S - waited_s, MIN_WAIT_S), self._release_late)
        else:
            self._held.append(event)
            await self._act()

    def _takes(self, event: events.MouseDown | events.MouseUp) -> bool:
        """Return whether a press or release is of the left button, and of a click that began on the current screen."""
        if event.button != LEFT_BUTTON or not self.screen_stack:
            return False
        if isinstance(event, events.MouseUp):
            self._clicked_at, self._clicked_s = event.screen_offset, event.time
        elif event.screen_offset != self._clicked_at or event.time - self._clicked_s > self.CLICK_CHAIN_TIME_THRESHOLD:
            self._clicked_on = self.screen
        return self.screen is self._clicked_on

    async def _act(self) -> None:
        """Hand out the next key that is held, if any is."""
        self._acting_since = None
        if self._held and self.screen_stack:
            key = self._held.popleft()
            target = self.focused or self.screen
            self._acting_on, self._acting_since = self.screen, time.monotonic()
            await super().on_event(key)
            if not target.post_message(KeyDone()):  # it has gone
                self.post_message(KeyDone())
            if self._held:
                self.set_timer(MAX_WAIT_S, self._release_late)

    def on_key_done(self, event: KeyDone) -> None:
        """Hand out the next key; after one that opened a screen, or moves the focus, once the screen is laid out."""
        event.stop()
        if not self._held or not self.screen_stack:  # none: the app ends
            self._acting_since = None
        elif self._to_focus is not None or self.screen is not self._acting_on:
            self.screen.call_after_refresh(self.call_later, self._act)
        else:
            self.call_later(self._act)  # after a focus that was requested

    async def _release_late(self, turns: int = MIN_TURNS) -> None:
        """Hand out the next key if the one before it got lost."""
        if self._held and self._acting_since is not None and time.monotonic() - self._acting_since >= MAX_WAIT_S:
            if turns:
                await asyncio.sleep(0)
                self.call_later(self._release_late, turns - 1)
            else:
                await self._act()
