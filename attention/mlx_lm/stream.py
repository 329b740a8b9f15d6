"""Benchmark a stream of tokens through a model: time, memory and loss of each one, by how its tokens are kept."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import mlx.core as mx
import numpy as np

from attention.core import events as on
from attention.core.stream import FULL, RECOMPUTED, STREAMING, WINDOW, Stream
from attention.engine.stream import ATTENDS, CACHE_SHARE, MIN_CALLS, StreamBench
from attention.mlx_lm import configuration, text
from attention.mlx_lm.generation import COST_TOKENS
from attention.mlx_lm.network import Network
from attention.mlx_lm.patch import replace_attention
from attention.mlx_lm.streaming import make_prompt_cache

MAX_RECOMPUTED: Final = 512
"""Maximum positions at which a window is recomputed; each is a whole pass over it."""


class ModelStreamBench(StreamBench):
    """A text through a model, token after token, each predicted from what is kept of those before it."""

    def _prepare(self, work: Stream) -> object:
        assert work.model is not None
        found = configuration.find_model(work.model)
        encoded = text.tokenizer_of(found).encode(text.read(work.text, "text"))
        if len(encoded) <= work.tokens:
            self._progress.log(f"the text has {len(encoded):,} tokens, and is repeated")
        self._tokens = np.resize(np.array(encoded, np.int32), work.tokens + 1)
        self._network = Network(found, work.dtype, seed=self._plan.seed)
        if not self._network.made:
            self._progress.emit_progress("making the weights", 0.0)
            self._network.make()
        self._progress.emit(on.WeightsLoaded(case=self._progress.case, weights_bytes=self._network.weights_bytes))
        return self._tokens

    def _longest(self, work: Stream) -> int:
        assert work.model is not None
        token_bytes = configuration.find_model(work.model).layers * work.full_workload(1).kv_token_bytes
        return int(self._limit * (1 if self._plan.force else CACHE_SHARE) // token_bytes)

    def _rows_s(self, names: Sequence[str], work: Stream) -> list[float]:
        assert work.model is not None
        found = configuration.find_model(work.model)
        small = Network(found, work.dtype, min(2, found.layers), self._plan.seed)
        small.make()
        window = min(work.kept, work.tokens)
        few = min(window, COST_TOKENS)
        chunks_s = _pass_s(small, found.layers, work.chunk) * work.tokens / work.chunk
        windows = min(MAX_RECOMPUTED, 1 + (work.tokens - window) // max(1, work.kept // 2))
        again_s = _pass_s(small, found.layers, few) * window / few * windows if RECOMPUTED in names else 0.0
        return [again_s if name == RECOMPUTED else chunks_s for name in names]

    def _measure(self, name: str, work: Stream) -> bool:
        workload = work.full_workload(min(work.tokens, work.kept)) if name == FULL else work.workload
        self._emit_route(name, workload)
        with replace_attention(ATTENDS):
            if name == RECOMPUTED:
                return self._recompute(work)
            complete = self._steps(name, work, self._step(name, work), may_continue=self._fits(name, work))
        if name == STREAMING:
            kept = self._network.layers * work.workload.key_value_bytes
            self._emit_bound(self._network.own_bytes + kept)
        return complete

    def _cache(self, name: str, work: Stream) -> list[Any]:
        model = self._network.model
        if name == FULL:
            return self._network.cache()
        if name == WINDOW:  # as many tokens as `streaming` keeps, all of them the last ones
            return list(make_prompt_cache(model, first=0, window=work.kept))
        return list(make_prompt_cache(model, first=work.first, window=work.window, format=work.kv_format))

    def _step(self, name: str, work: Stream) -> Callable[[int], float | None]:
        """Return what gives the tokens from a position on, and returns the mean loss of those that follow them."""
        cache, model = self._cache(name, work), self._network.model

        def step(position: int) -> float:
            end = min(position + work.chunk, work.tokens)
            inputs = mx.array(self._tokens[None, position:end])
            loss = _loss(model(inputs, cache=cache), mx.array(self._tokens[None, position + 1 : end + 1]))
            return cast("float", loss.item())

        return step

    def _fits(self, name: str, work: Stream) -> Callable[[int], bool]:
        """Return whether the cache may go on growing at a position."""
        longest = self._longest(work)
        return lambda position: name != FULL or position + work.block_tokens <= longest

    def _recompute(self, work: Stream) -> bool:
        """Pass whole windows through the model: the cost of new tokens without a cache, and their loss.

        The loss is that of a window's second half, whose tokens see at least half a window; the halves of a stream
        that is short enough follow each other without a gap.
        """
        ends = np.arange(min(work.kept, work.tokens), work.tokens + 1, max(1, work.kept // 2))
        if len(ends) > MAX_RECOMPUTED:
            ends = ends[np.linspace(0, len(ends) - 1, MAX_RECOMPUTED, dtype=np.int64)]
        stream = self._blocks(RECOMPUTED)
        marked = self._begins_with_marker(work)
        began = time.perf_counter()
        for end in map(int, ends):
            if time.perf_counter() - began > self._plan.seconds:
                stream.flush()
                return False
            window = self._tokens[max(0, end - work.kept) : end].copy()
            if marked:
                window[0] = self._tokens[0]
            started = time.perf_counter()
            logits = self._network.model(mx.array(window[None]))
            half = len(window) // 2
            targets = self._tokens[end - len(window) + half + 1 : end + 1]
            loss = _loss(logits[:, half:], mx.array(targets[None]))
            value = cast("float", loss.item())
            stream.add((time.perf_counter() - started) / work.chunk, value, len(targets))
            stream.close_block(end)
            if stream.due:
                stream.flush()
                self._progress.emit_progress(f"{RECOMPUTED}: token {end:,} of {work.tokens:,}", 0.0)
        stream.flush()
        return True

    def _begins_with_marker(self, work: Stream) -> bool:
        """Whether the tokenizer puts a token of its own before a text: a recomputed window then begins with it too."""
        assert work.model is not None
        return text.begin_token(configuration.find_model(work.model)) == int(self._tokens[0])


def _pass_s(network: Network, layers: int, tokens: int) -> float:
    """Estimate the seconds of a pass of some tokens through all layers, from one and two of them."""
    inputs, times = mx.zeros((1, tokens), mx.int32), []
    for count in (1, 2):
        with network.shortened(count) as model:
            spent = []
            for _ in range(1 + MIN_CALLS):  # the first compiles
                began = time.perf_counter()
                mx.eval(model(inputs, cache=network.cache()))
                spent.append(time.perf_counter() - began)
            times.append(min(spent[1:]))
    return times[0] + max(times[1] - times[0], 0.0) * (layers - 1)


def _loss(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the mean negative log probability of the targets (1, L), in nats, in float32."""
    scores = logits.astype(mx.float32)
    chosen = mx.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return mx.mean(mx.logsumexp(scores, axis=-1) - chosen)
