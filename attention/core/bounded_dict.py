"""A dict of bounded size, for results cached by the kind of call."""

from typing import Final, TypeVar

K = TypeVar("K")
V = TypeVar("V")
MAX_KNOWN_CALLS: Final = 4096
"""Default maximum: enough kinds of call for a decoding loop, which makes a new one at each length."""


class BoundedDict(dict[K, V]):
    """A dict that drops its oldest entry when one more than its maximum is added; lookups are those of a dict."""

    def __init__(self, max_entries: int = MAX_KNOWN_CALLS) -> None:
        super().__init__()
        self._max_entries = max_entries

    def __setitem__(self, key: K, value: V) -> None:
        """Add or replace an entry."""
        if len(self) >= self._max_entries and key not in self:
            self.pop(next(iter(self)), None)  # another thread may have dropped it
        super().__setitem__(key, value)
