"""Sequences without an end in mlx-lm's models: caches of the first tokens and a window of the latest; their benchmark.

A model rotates queries and keys to `cache.offset`, which is a token's slot in the ring: positions are bounded. What
queries have to be turned by, for keys of an earlier lap and for the first tokens, `attention.streaming` does with the
frequencies of the layer's rotary embedding, while `patch_mlx_lm` is open.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, cast

import mlx.core as mx
import msgspec
import numpy as np
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models import cohere2, smollm3
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from attention.core import events as on
from attention.core.errors import UsageError, error_line
from attention.core.stream import FULL, RECOMPUTED, STREAMING, WINDOW, Stream
from attention.engine.stream import ATTENDS, CACHE_SHARE, MIN_CALLS, StreamBench
from attention.mlx_lm import configuration, text
from attention.mlx_lm.generation import COST_TOKENS
from attention.mlx_lm.network import Network
from attention.mlx_lm.patch import replace_attention
from attention.streaming import Rope, StreamingKV
from attention.streaming.files import Description

NEEDS_PATCH: Final = (
    "cache: mlx-lm's own attention cannot read a StreamingCache; it takes a model run inside "
    "attention.patch_mlx_lm(...)"
)


class StreamingCache:
    """The cache of one layer; `make_prompt_cache` makes it. It has the methods of mlx-lm's caches.

    Attributes:
        state_kv: keys and values.
    """

    def __init__(self, state_kv: StreamingKV) -> None:
        self.state_kv = state_kv

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[StreamingKV, StreamingKV]:
        """Return what the patched attention takes: the state with these keys and values (B, Hkv, L, D)."""
        return self.state_kv.update(keys, values, rotated=self.state_kv.rope is not None)

    @property
    def bits(self) -> int:
        """Raise UsageError: mlx-lm's own attention looks for it, and cannot read this cache."""
        raise UsageError(NEEDS_PATCH)

    @property
    def offset(self) -> Any:
        """Rotary position of the next token: an int, or an array if the rows of the batch differ."""
        offset = self.state_kv.offset
        return offset if isinstance(offset, int) else mx.array(offset)

    @property
    def position(self) -> int | list[int]:
        """Number of tokens seen; a list if the rows of the batch differ."""
        return self.state_kv.position

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, unused slots included."""
        return self.state_kv.nbytes

    def size(self) -> int:
        """Return the number of tokens that are attended to."""
        return len(self.state_kv.kept())

    def empty(self) -> bool:
        """Return whether nothing was stored yet."""
        return self.size() == 0

    def make_mask(self, tokens: int, *args: Any, **named: Any) -> str | None:
        """Return what models pass on as a mask; what is seen is up to the state."""
        return None if tokens == 1 else "causal"

    def is_trimmable(self) -> bool:
        """Return whether tokens can be removed from the end, so that the rest is as if they had never come.

        They can while nothing was overwritten, and with `spare` slots; mlx-lm asks before it reuses a prompt's cache.
        """
        return self.empty() or self.state_kv.removable_exactly() > 0

    def trim(self, n: int) -> int:
        """Remove up to n tokens from the end; return how many were removed: all, if there are fewer.

        Raises:
            UsageError: the ring has no longer what would be left.
        """
        seen = self.state_kv.position
        removed = min(n, seen if isinstance(seen, int) else min(seen))
        self.state_kv.rewind(removed)
        return removed

    @property
    def state(self) -> Any:
        """What a file of mlx-lm holds: all arrays, and the text that describes them."""
        arrays, description = self.state_kv.described()
        return [arrays[name] for name in sorted(arrays)], msgspec.json.encode([sorted(arrays), description]).decode()

    @state.setter
    def state(self, state: Any) -> None:
        try:
            arrays, text = state
            names, description = msgspec.json.decode(text, type=tuple[list[str], Description])
            self.state_kv = StreamingKV.of_description(dict(zip(names, arrays, strict=True)), description)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = error_line(error).partition(": ")[2]
            raise UsageError(f"prompt cache: not one of a StreamingCache, or damaged: {reason}") from error

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Return a cache with a state, as mlx-lm's `load_prompt_cache` makes it.

        Raises:
            UsageError: the state is not one of such a cache.
        """
        made = cls.__new__(cls)
        made.state = state
        return made


def _first_of(holder: Any, names: Sequence[str]) -> Any:
    """Return the first attribute that there is; a module of MLX without parameters is false, but there."""
    return next((found for name in names if (found := getattr(holder, name, None)) is not None), None)


def rope_of(layer: Any) -> Rope | None:
    """Return the rotary embedding of a layer of a model; None if it has none, or does not use it.

    Raises:
        UsageError: it depends on the length of the sequence.
    """
    attention = _first_of(layer, ("self_attn", "attention", "attn"))
    found = _first_of(attention, ("rope", "rotary_emb"))
    unused = isinstance(attention, cohere2.Attention) and not attention.use_sliding_window
    if found is None or unused or isinstance(found, smollm3.NoPE):
        return None
    if isinstance(found, DynamicNTKScalingRoPE):
        raise UsageError("model: its rotary positions depend on the length of the sequence; a stream has none")
    dims = _first_of(found, ("dims", "dim"))
    freqs = getattr(found, "_freqs", None)
    if type(dims) is not int:
        raise UsageError(f"model: got rotary positions by {type(found).__name__}; it takes those of mlx-lm")
    traditional, scale = bool(getattr(found, "traditional", False)), float(getattr(found, "scale", 1.0))
    if freqs is not None:
        return Rope(dims, traditional=traditional, freqs=mx.array(freqs))
    return Rope(dims, base=float(getattr(found, "base", 10000.0)), traditional=traditional, scale=scale)


def make_prompt_cache(
    model: Any, first: int = 4, window: int = 2048, format: str | None = None, *, spare: int = 0
) -> list[Any]:
    """Return the caches of a model, one a layer; arguments as in `StreamingKV`.

    Layers that keep a window of their own, or no keys and values, get what mlx-lm makes for them.

    Raises:
        UsageError: the model caches something else, or a number is out of range.
    """
    made: list[Any] = mlx_caches.make_prompt_cache(model)
    layers: Sequence[Any] = model.layers
    if len(layers) != len(made) or hasattr(getattr(model, "args", None), "kv_lora_rank"):
        raise UsageError("model: got one that caches something else than the keys and values of each layer")
    caches: list[Any] = []
    for cache, layer in zip(made, layers, strict=True):
        if type(cache) is mlx_caches.KVCache:
            caches.append(StreamingCache(StreamingKV(first, window, format, rope=rope_of(layer), spare=spare)))
        elif type(cache) in (mlx_caches.RotatingKVCache, mlx_caches.ArraysCache):
            caches.append(cache)
        else:
            raise UsageError(f"model: got a layer with a {type(cache).__name__}; it takes those with a KVCache")
    return caches


setattr(mlx_caches, StreamingCache.__name__, StreamingCache)  # where load_prompt_cache looks up a file's classes


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
