"""What every screen of the app does otherwise than Textual's."""

from typing import Any

from textual import events
from textual.await_complete import AwaitComplete
from textual.command import CommandPalette
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Input, OptionList


class AppScreen:
    """A screen that closes once, and is laid out for the size that the terminal has.

    Keys that were pressed before it was gone, such as a second escape, do nothing: Textual would close the screen below
    as well, or end the app with an error if there is none. Sizes that the terminal no longer has are left out: Textual
    lays a screen out for each, and posts it to the screen again, so that two would follow each other for ever.
    """

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Close the screen with a result, unless it has closed already."""
        assert isinstance(self, Screen)
        return Screen.dismiss(self, result) if self.is_active else AwaitComplete()

    async def _on_resize(self, event: events.Resize) -> None:
        """Keep Textual's handler from a size that is out of date."""
        assert isinstance(self, Screen)
        if event.size != self.app.size:
            event.prevent_default()


class Palette(AppScreen, CommandPalette):
    """Textual's palette; a double click outside it closes it once, and one on a command runs that once."""

    async def _on_message(self, message: Message) -> None:
        """Leave out what was typed or chosen when it had closed already."""
        if self.is_active or not isinstance(message, Input.Changed | Input.Submitted | OptionList.OptionSelected):
            await super()._on_message(message)
