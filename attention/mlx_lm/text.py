"""Training data for fine-tuning: the bundled text or a user's file, as token sequences of equal length."""

from pathlib import Path
from typing import Any, Final, Protocol

from attention.core.errors import UsageError
from attention.core.files import expand_home
from attention.mlx_lm.configuration import Configuration

BUNDLED: Final = Path(__file__).with_name("declaration.txt")
"""The United States Declaration of Independence, 1776."""
END: Final = 256
Sequence = tuple[list[int], int]
"""Tokens, and the number of leading tokens without a loss, as mlx-lm's trainer expects."""


class Tokenizer(Protocol):
    """The interface of a tokenizer used here."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, for models with random weights and a vocabulary of at least 257."""

    eos_token_id = END

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text and the end token."""
        return [*text.encode(), END]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return bytes(token for token in tokens if token < END).decode(errors="replace")


def tokenizer_of(configuration: Configuration) -> Tokenizer:
    """Return a folder's tokenizer, or bytes for random weights.

    Raises:
        UsageError: the folder's tokenizer cannot be loaded, or the vocabulary is too small for bytes.
    """
    if configuration.folder is None:
        vocabulary = configuration.fields.get("vocab_size", 0)
        if vocabulary <= END:
            raise UsageError(f"model: {configuration.name} has {vocabulary} tokens; bytes need {END + 1}")
        return ByteTokenizer()
    from mlx_lm.utils import load_tokenizer

    try:
        loaded: Any = load_tokenizer(configuration.folder)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises anything for a broken folder
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"model: the tokenizer of {configuration.folder} cannot be loaded: {first}") from error
    tokenizer: Tokenizer = loaded
    return tokenizer


def begin_token(configuration: Configuration) -> int | None:
    """Return the token that a folder's tokenizer puts before a text; None if it puts none, and for random weights."""
    if configuration.folder is None:
        return None
    found: object = getattr(tokenizer_of(configuration), "bos_token_id", None)
    return found if type(found) is int else None


def read(file: str | None, field: str) -> str:
    """Return the text of a file, or the bundled one; `field` of a case names the file, and begins an error message.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    path = BUNDLED if file is None else expand_home(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{field}: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise UsageError(f"{field}: {path} is empty")
    return text


def sequences(tokens: list[int], length: int, min_count: int) -> list[Sequence]:
    """Split a text into at least `least` sequences of equal length; a short text overlaps or is repeated.

    Args:
        tokens: tokens of the whole text.
        length: predicted tokens per sequence; one more is the context of the first.
        least: minimum number of sequences.
    """
    wanted = length + 1
    while len(tokens) < wanted:
        tokens = tokens + tokens
    last_start = len(tokens) - wanted
    count = max(min_count, len(tokens) // wanted)
    starts = [round(last_start * index / max(count - 1, 1)) for index in range(count)]
    return [(tokens[start : start + wanted], 0) for start in starts]
