"""Attention layers of Gemma 2 around a call of attention: mlx-lm computes their softcap in separate operations."""

from typing import Any

import mlx.core as mx


class FetchedCache:
    """A cache whose keys and values are known already, for a layer of mlx-lm that would update the cache again."""

    def __init__(self, offset: Any, keys: mx.array, values: mx.array) -> None:
        self.offset = offset
        self._fetched = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values fetched before; the arguments are equal to the latest of them."""
        return self._fetched


def projected(layer: Any, x: mx.array, cache: Any) -> tuple[mx.array, Any, Any, Any]:
    """Return queries (B, H, L, D), all keys and values of the cache, and its offset before them.

    As the first half of `mlx_lm.models.gemma2.Attention.__call__`, without the scale.
    """
    batch, length, _ = x.shape
    queries, keys, values = (
        made.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
        for made, heads in (
            (layer.q_proj(x), layer.n_heads),
            (layer.k_proj(x), layer.n_kv_heads),
            (layer.v_proj(x), layer.n_kv_heads),
        )
    )
    if cache is None:
        return layer.rope(queries), layer.rope(keys), values, 0
    offset = cache.offset
    queries, keys = (layer.rope(made, offset=offset) for made in (queries, keys))
    return queries, *cache.update_and_fetch(keys, values), offset


def joined(layer: Any, output: mx.array) -> mx.array:
    """Return the layer's result (B, L, width) of the attention output (B, H, L, D)."""
    batch, _, length, _ = output.shape
    made: mx.array = layer.o_proj(output.transpose(0, 2, 1, 3).reshape(batch, length, -1))
    return made
