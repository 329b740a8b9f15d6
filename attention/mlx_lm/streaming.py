"""Sequences without an end in mlx-lm's models: caches of the first tokens and a window of the latest.

A model rotates queries and keys to `cache.offset`, which is a token's slot in the ring: positions are bounded. What
queries have to be turned by, for keys of an earlier lap and for the first tokens, `attention.streaming` does with the
frequencies of the layer's rotary embedding, while `patch_mlx_lm` is open.
"""

from collections.abc import Sequence
from typing import Any, Final, Self

import mlx.core as mx
import msgspec
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models import cohere2, hunyuan, hunyuan_v1_dense, smollm3
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from attention.core.errors import UsageError, error_line
from attention.mlx_lm.caches import caches_latents, check_keys_are_for_attention
from attention.streaming import Rope, StreamingKV
from attention.streaming.files import Description

ROPES: Final = ("rope", "rotary_emb", "_rope_freqs")
"""Names that mlx-lm's models give to a layer's rotary embedding, or to its frequencies if it is no module."""
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

    def make_mask(self, tokens: int, *args: Any, window_size: int | None = None, **named: Any) -> str | None:
        """Return what models pass on as a mask; what is seen is up to the state.

        Raises:
            UsageError: the layer's own window is shorter than that of the state.
        """
        if window_size is not None and window_size < self.state_kv.window:
            raise UsageError(
                f"window: got {self.state_kv.window}, and a layer of the model attends to {window_size} tokens; "
                f"it takes up to {window_size}"
            )
        return None if tokens == 1 else "causal"

    def is_trimmable(self) -> bool:
        """Return whether tokens can be removed from the end, so that the rest is as if they had never come.

        They can while nothing was overwritten, and with `spare` slots. mlx-lm asks before it reuses a prompt's cache,
        and before speculative decoding, which ignores how many tokens were removed: so an empty cache can only with
        `spare`.
        """
        return self.state_kv.layout.spare > 0 if self.empty() else self.state_kv.removable_exactly() > 0

    def trim(self, n: int) -> int:
        """Remove up to n tokens from the end; return how many were removed: all, if there are fewer.

        Raises:
            UsageError: the ring has no longer all of what would be left.
        """
        seen, most = self.state_kv.position, self.state_kv.removable_exactly()
        removed = min(n, seen if isinstance(seen, int) else min(seen))
        if removed > most:  # mlx-lm does not look at how many were removed
            raise UsageError(
                f"cache: got {removed} tokens to remove; its ring still has what it takes to remove "
                f"{most}; for more, make_prompt_cache(..., spare={removed})"
            )
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


def _rotating(layer: Any) -> tuple[Any, Any]:
    """Return the module of a layer that rotates queries and keys, and by what; None and None if there is none."""
    for _, module in layer.named_modules():
        for name in ROPES:
            if name in module:
                return module, module[name]
    return None, None


def rope_of(layer: Any) -> Rope | None:
    """Return the rotary embedding of a layer of a model; None if it has none, or does not use it.

    Raises:
        UsageError: it depends on the length of the sequence, or queries and keys are changed after it.
    """
    attention, found = _rotating(layer)
    unused = isinstance(attention, cohere2.Attention) and not attention.use_sliding_window
    if found is None or unused or isinstance(found, smollm3.NoPE):
        return None
    is_hunyuan = isinstance(attention, hunyuan.Attention | hunyuan_v1_dense.Attention)
    if is_hunyuan and attention.use_qk_norm:
        raise UsageError("model: it multiplies queries and keys by weights after rotating them; a stream rotates again")
    if isinstance(found, mx.array):
        return Rope(2 * found.size, freqs=found)
    if isinstance(found, DynamicNTKScalingRoPE):
        raise UsageError("model: its rotary positions depend on the length of the sequence; a stream has none")
    dims = getattr(found, "dims", None) or getattr(found, "dim", None)
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
    if len(layers) != len(made) or caches_latents(model):
        raise UsageError("model: got one that caches something else than the keys and values of each layer")
    check_keys_are_for_attention(model)
    if any(name.rpartition(".")[2] == "wpe" for name, _ in model.named_modules()):
        raise UsageError("model: its learned positions are those of the whole sequence; a stream has none")
    caches: list[Any] = []
    for cache, layer in zip(made, layers, strict=True):
        if type(cache) is mlx_caches.KVCache:
            caches.append(StreamingCache(StreamingKV(first, window, format, rope=rope_of(layer), spare=spare)))
        elif type(cache) is mlx_caches.ArraysCache and _rotating(layer)[1] is not None:
            raise UsageError(
                "model: its linear attention rotates to positions of the whole sequence; a stream has none"
            )
        elif type(cache) in (mlx_caches.RotatingKVCache, mlx_caches.ArraysCache):
            caches.append(cache)
        else:
            raise UsageError(f"model: got a layer with a {type(cache).__name__}; it takes those with a KVCache")
    return caches


setattr(mlx_caches, StreamingCache.__name__, StreamingCache)  # where load_prompt_cache looks up a file's classes
