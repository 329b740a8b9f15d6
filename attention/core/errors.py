"""Exceptions of the engine; each message is one line per problem."""

from collections.abc import Iterable
from enum import Enum
from typing import Final

MAX_REASON: Final = 300
"""Maximum number of characters of a reported reason."""


class UsageError(ValueError):
    """One or more mistakes in a request, all reported together.

    Attributes:
        problems: one sentence per mistake: the name, the value, and what is accepted.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnsupportedError(ValueError):
    """An implementation was called with arguments that it does not support, as its route says."""


class Remedy(Enum):
    """What resolves an error. An application puts it into words: it knows how it is installed."""

    INSTALL_BACKEND = "install a backend of MLX"
    INSTALL_MLX_LM = "install mlx-lm"


class NoBackendError(RuntimeError):
    """MLX or mlx-lm is not installed, or MLX has no backend.

    Attributes:
        what: what is missing.
        why: the cause, such as the text of another exception; may be empty.
        remedy: what resolves it; None if unknown.
    """

    def __init__(self, what: str, why: str = "", remedy: Remedy | None = None) -> None:
        super().__init__(f"{what} ({why})" if why else what)
        self.what, self.why, self.remedy = what, why, remedy


class ForkedError(RuntimeError):
    """Attention cannot be computed in a process that was forked after MLX had been used."""


class KernelUnavailable(RuntimeError):
    """A custom kernel cannot be used on this machine; the message is the reason in one line."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest known word, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def error_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its text, of at most MAX_REASON characters."""
    try:
        text = next(iter(str(error).splitlines()), "")
    except Exception:  # its own __str__ may fail
        text = ""
    return truncated(f"{type(error).__name__}: {text}".rstrip(": "))


def truncated(line: str) -> str:
    """Truncate a line to MAX_REASON characters, ending in "…"."""
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


class InputsOverwrittenError(RuntimeError):
    """An implementation wrote into inputs that all implementations of a case share."""
