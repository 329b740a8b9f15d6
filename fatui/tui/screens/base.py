"""What every screen of the app does otherwise than Textual's."""

from typing import TYPE_CHECKING, Any, Literal

from textual import events
from textual.app import ComposeResult
from textual.await_complete import AwaitComplete
from textual.command import CommandList, CommandPalette
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Input, OptionList

if TYPE_CHECKING:
    _Screen = Screen[Any]
else:  # at runtime no widget: Textual takes a screen's styles from the first of its bases that is one
    _Screen = object


class AppScreen(_Screen):
    """A screen that closes once, and is laid out for the size that the terminal has.

    Keys that were pressed before it was gone, such as a second escape, do nothing: Textual would close the screen below
    as well, or end the app with an error if there is none. Sizes that the terminal no longer has are left out: Textual
    lays a screen out for each, and posts it to the screen again, so that two would follow each other for ever. A press
    of the mouse on a widget that has gone, but not from the screen yet, is left out too: Textual looks for its parent.
    """

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Close the screen with a result, unless it has closed already."""
        return super().dismiss(result) if self.is_active else AwaitComplete()

    async def _on_resize(self, event: events.Resize) -> None:
        """Keep Textual's handler from a size that is out of date."""
        if event.size != self.app.size:
            event.prevent_default()

    def _forward_event(self, event: events.Event) -> None:
        """Keep Textual from starting a selection of text in a widget that has gone."""
        if isinstance(event, events.MouseDown) and not self.app.mouse_captured:
            pressed, _ = self.get_widget_and_offset_at(event.x, event.y)
            if pressed is not None and pressed is not self and pressed.parent is None:
                return
        super()._forward_event(event)


class Options(OptionList):
    """A list of options that takes what came too soon or too late, and any terminal: Textual's raises errors."""

    DEFAULT_CSS = "Options { min-width: 16; }"

    async def _on_click(self, event: events.Click) -> None:
        """Leave out a click on an option that has gone."""
        if event.style.meta.get("option", -1) >= self.option_count:
            event.prevent_default()

    def _move_page(self, direction: Literal[-1, 1]) -> None:
        """Move by a page, once there are lines."""
        if self.scrollable_content_region:
            super()._move_page(direction)


class Commands(CommandList, Options):
    """The commands of a palette."""

    DEFAULT_CSS = "Commands { min-width: 16; }"


class Palette(AppScreen, CommandPalette):
    """Textual's palette; a double click outside it closes it once, and one on a command runs that once."""

    def compose(self) -> ComposeResult:
        """Yield what Textual's palette is made of."""
        for widget in super().compose():
            yield Commands() if type(widget) is CommandList else widget

    async def _on_message(self, message: Message) -> None:
        """Leave out what was typed or chosen when it had closed already."""
        if self.is_active or not isinstance(message, Input.Changed | Input.Submitted | OptionList.OptionSelected):
            await super()._on_message(message)
