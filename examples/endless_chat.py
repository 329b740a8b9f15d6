"""A chat that never ends: one cache for all of it, of constant size, and nothing is ever processed twice.

    python examples/endless_chat.py ~/models/Qwen2.5-0.5B-Instruct
    python examples/tiny_model.py tiny-model && python examples/endless_chat.py tiny-model --window 124 --turns 200

What is said goes into the cache once. The first tokens (instructions, and where attention goes that has nothing to look
at) and a window of the latest are kept; what lies between is forgotten, and the chat goes on. With --turns the model
talks to itself.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model, load_tokenizer
from msgspec import Struct

from attention import patch_mlx_lm
from attention.mlx_lm.streaming import make_prompt_cache

STARTERS: Final = ("What is a class?", "How does a loop end?", "Tell me more.", "Why is that so?")


class Turn(Struct):
    """One answer, and the state after it."""

    said: str
    position: int
    """Tokens of the whole chat so far."""
    cache_bytes: int


class Chat:
    """A conversation with a model, with a cache that does not grow."""

    def __init__(self, model: Any, tokenizer: Any, first: int, window: int, temperature: float = 0.7) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._cache = list(make_prompt_cache(model, first=first, window=window))
        self._sampler: Callable[[mx.array], mx.array] = make_sampler(temperature)
        self._begun = False

    def say(self, words: str, most: int) -> Turn:
        """Give the model some words, and return its answer of `most` tokens at the most."""
        new = self._tokenizer.encode(self._prompt(words), add_special_tokens=not self._begun)
        self._begun = True
        made: list[int] = []
        steps = generate_step(
            mx.array(new), self._model, prompt_cache=self._cache, max_tokens=most, sampler=self._sampler
        )
        for token, _ in steps:
            if token in self._tokenizer.eos_token_ids:
                break
            made.append(int(token))
        cache_bytes = sum(layer.nbytes for layer in self._cache)
        return Turn(self._tokenizer.decode(made), self._cache[0].position, cache_bytes)

    def _prompt(self, words: str) -> str:
        if self._tokenizer.chat_template is None:
            return f"\n{words}\n"
        message = [{"role": "user", "content": words}]
        text: str = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text


def loaded(folder: Path) -> tuple[Any, Any]:
    """Return the model and the tokenizer of an mlx-lm folder."""
    return load_model(folder)[0], load_tokenizer(folder)  # type: ignore[no-untyped-call]


def typed() -> Iterator[str]:
    """Yield what is typed, until the input ends."""
    while words := input("> "):
        yield words


def chat(folder: Path, first: int, window: int, turns: int | None, most: int) -> list[Turn]:
    """Chat until the turns are over, or without a number of them with the keyboard; return the last turns."""
    model, tokenizer = loaded(folder)
    kept: list[Turn] = []
    with patch_mlx_lm("poc"):
        talk = Chat(model, tokenizer, first, window)
        words: Iterable[str] = typed() if turns is None else islice(_endless(STARTERS), turns)
        for number, said in enumerate(words, 1):
            turn = talk.say(said, most)
            kept = [*kept[-99:], turn]
            if turns is None:
                print(turn.said)
            elif number % max(1, turns // 10) == 0:
                size = turn.cache_bytes / 1024
                where = f"turn {number:>6}  token {turn.position:>9,}  cache {size:,.0f} KiB"
                print(f"{where}  {turn.said[:48]!r}", flush=True)
    return kept


def _endless(words: tuple[str, ...]) -> Iterator[str]:
    while True:
        yield from words


def main() -> None:
    """Chat as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an mlx-lm folder")
    parser.add_argument("--first", type=int, default=4, help="first tokens that are kept (4)")
    parser.add_argument("--window", type=int, default=2044, help="last tokens that are kept (2044)")
    parser.add_argument("--turns", type=int, help="let the model talk to itself, for so many turns")
    parser.add_argument("--most", type=int, default=200, help="tokens of an answer at most (200)")
    arguments = parser.parse_args()
    try:
        chat(arguments.model, arguments.first, arguments.window, arguments.turns, arguments.most)
    except (KeyboardInterrupt, EOFError):
        sys.exit(0)


if __name__ == "__main__":
    main()
