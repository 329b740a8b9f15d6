"""What models are fine-tuned on: the bundled text or one of the user's, as sequences of tokens of one length."""

from pathlib import Path
from typing import Any, Final, Protocol

from attention.errors import UsageError
from attention.files import expanded
from attention.models.configuration import Configuration

BUNDLED: Final = Path(__file__).with_name("declaration.txt")
"""The United States Declaration of Independence, 1776."""
END: Final = 256
Sequence = tuple[list[int], int]
"""Tokens, and how many of them at the start are not learnt: what mlx-lm's trainer takes."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens, for models with random weights: any vocabulary of 257 or more can take them."""

    eos_token_id = END

    def encode(self, text: str) -> list[int]:
        """Returns the bytes of a text, and the token that ends it."""
        return [*text.encode(), END]

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of some tokens."""
        return bytes(token for token in tokens if token < END).decode(errors="replace")


def tokenizer_of(configuration: Configuration) -> Tokenizer:
    """A folder's own tokenizer; bytes where the weights are random.

    Raises:
        UsageError: the folder's cannot be loaded, or bytes are too many for the vocabulary.
    """
    if configuration.folder is None:
        vocabulary = configuration.fields.get("vocab_size", 0)
        if vocabulary <= END:
            raise UsageError(f"model: {configuration.name} has {vocabulary} tokens; bytes need {END + 1}")
        return ByteTokenizer()
    from mlx_lm.utils import load_tokenizer

    try:
        loaded: Any = load_tokenizer(configuration.folder)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever transformers raises for a folder that is not as it should be
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"model: the tokenizer of {configuration.folder} cannot be loaded: {first}") from error
    tokenizer: Tokenizer = loaded
    return tokenizer


def read(data: str | None) -> str:
    """The text of a file, or the bundled one.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    path = BUNDLED if data is None else expanded(data)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise UsageError(f"data: {path} is empty")
    return text


def sequences(tokens: list[int], length: int, least: int) -> list[Sequence]:
    """Cuts a text into sequences of one length, at least so many: a short text overlaps itself, or is repeated.

    Args:
        tokens: the whole text's.
        length: tokens of each sequence that are predicted; one more is the first one's context.
        least: sequences that are needed.
    """
    wanted = length + 1
    while len(tokens) < wanted:
        tokens = tokens + tokens
    room = len(tokens) - wanted
    count = max(least, len(tokens) // wanted)
    starts = [round(room * index / max(count - 1, 1)) for index in range(count)]
    return [(tokens[start : start + wanted], 0) for start in starts]
