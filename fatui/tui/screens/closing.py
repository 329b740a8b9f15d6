"""How screens close."""

from typing import Any

from textual.await_complete import AwaitComplete
from textual.screen import Screen


class ClosesOnce:
    """A screen that closes once: keys that were pressed before it was gone, such as a second escape, do nothing.

    Textual would close the screen below as well, or end the app with an error if there is none.
    """

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """Close the screen with a result, unless it has closed already."""
        assert isinstance(self, Screen)
        return Screen.dismiss(self, result) if self.is_active else AwaitComplete()
