"""A prompt taken in and tokens made after it, step by step as mlx-lm's generate_step does it, for any batch."""

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx

from attention.models.arm import Observer
from attention.models.network import Network
from attention.models.state import StateChanged, copied, digest_of_caches
from attention.models.workloads import Generation

PREFILL_STEP: Final = 2048
"""Tokens that mlx-lm takes in at once."""
Logits = mx.array


class Prompts:
    """The prompts of a case, random and seeded: (batch, length)."""

    def __init__(self, case: Generation, vocabulary: int, seed: int) -> None:
        """Makes them."""
        self.tokens = mx.random.randint(0, vocabulary, (case.batch, case.prompt), key=mx.random.key(seed))
        mx.eval(self.tokens)

    def take_in(self, model: Any, cache: list[Any], observer: Observer | None = None) -> Logits:
        """Fills a cache, and returns the logits of the first token after the prompts: (batch, vocabulary).

        All tokens but the last only leave their keys and values; what a last layer would compute beyond them, mlx-lm
        does not ask for, and MLX does not compute.
        """
        last = self.tokens.shape[1] - 1
        for start in range(0, last, PREFILL_STEP):
            model(self.tokens[:, start : min(start + PREFILL_STEP, last)], cache=cache)
            if observer:
                observer.unneeded()
            mx.eval([each.state for each in cache])
            mx.clear_cache()
        return _next_logits(model, cache, self.tokens[:, last], observer)


def _next_logits(model: Any, cache: list[Any], token: mx.array, observer: Observer | None = None) -> Logits:
    logits: mx.array = model(token[:, None], cache=cache)[:, -1]
    if observer:
        observer.needed()
    return logits


class PrefillRun:
    """Takes the prompts in, with a cache of its own each time."""

    observer: Observer | None = None

    def __init__(self, network: Network, prompts: Prompts, layers: int) -> None:
        """Binds the model's first layers to the prompts."""
        self._network, self._prompts, self._layers = network, prompts, layers

    def prepare(self) -> None:
        """Each run makes its own cache: there is nothing to restore."""

    def queue(self) -> list[mx.array]:
        """Queues the last step; those before it are waited for, one by one."""
        with self._network.shortened(self._layers) as model:
            return [self._prompts.take_in(model, self._network.cache(), self.observer)]

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluates the logits."""
        mx.eval(outputs)

    def results(self) -> list[mx.array]:
        """Runs once and returns the logits of the first token."""
        outputs = self.queue()
        self.wait(outputs)
        return outputs

    def peak_bytes(self) -> int | None:
        """Not known here: the rounds measure it."""


class DecodeRun:
    """Makes tokens greedily after the prompts; the next step is queued before a token is read, as mlx-lm does.

    Every run works on a copy of the caches that the prompts left. mlx-lm can take tokens back from some caches only: a
    window that has wrapped and a recurrent state keep what was made.
    """

    observer: Observer | None = None

    def __init__(self, network: Network, cache: list[Any], token: mx.array, steps: int, layers: int) -> None:
        """Binds the model's first layers to a filled cache.

        Args:
            network: the model.
            cache: keys and values of the prompts, of all layers; they are only read.
            token: (batch,), the one to begin with.
            steps: tokens to make.
            layers: how many run.
        """
        self._network, self._cache, self._token = network, cache, token
        self._steps, self._layers = steps, layers
        self._digest = digest_of_caches(self._cache)
        self._fresh: list[Any] | None = None

    def prepare(self) -> None:
        """Copies the caches for the next run, outside of its clock.

        Raises:
            StateChanged: the copy differs from what the prompts left.
        """
        fresh: list[Any] = copied(self._cache)
        if digest_of_caches(fresh) != self._digest:
            raise StateChanged("the caches are not as the prompts left them")
        self._fresh = fresh

    def _taken(self) -> list[Any]:
        """The caches of this run, which are nobody else's afterwards."""
        if self._fresh is None:
            self.prepare()
        fresh, self._fresh = self._fresh, None
        assert fresh is not None
        return fresh

    def queue(self) -> list[mx.array]:
        """Makes all tokens; the last one is read, so that nothing is left to wait for."""
        cache = self._taken()
        with self._network.shortened(self._layers) as model:
            token = self._queued(model, cache, self._token)
            for left in reversed(range(self._steps)):
                following = self._queued(model, cache, token) if left else token
                token.tolist()
                token = following
        return [token]

    def wait(self, outputs: Sequence[object]) -> None:
        """Nothing is left to wait for."""

    def results(self) -> list[mx.array]:
        """Runs one step and returns its logits."""
        cache = self._taken()
        with self._network.shortened(self._layers) as model:
            logits = _next_logits(model, cache, self._token)
            mx.eval(logits)
        return [logits]

    def peak_bytes(self) -> int | None:
        """Not known here: the rounds measure it."""

    def _queued(self, model: Any, cache: list[Any], token: mx.array) -> mx.array:
        following = mx.argmax(_next_logits(model, cache, token, self.observer), axis=-1)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        return following
