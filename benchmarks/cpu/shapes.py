"""The default shapes and their inputs."""

from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
import numpy as np

TYPES: Final = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class BenchShape:
    """B/H/L/D of a square call, or of decoding with a cache of `keys` and fewer K/V heads."""

    batch: int
    heads: int
    queries: int
    head_dim: int
    causal: bool = False
    kv_heads: int = 0
    keys: int = 0

    @property
    def name(self) -> str:
        """Name for the table."""
        if self.keys:
            return f"{self.batch}/{self.heads}({self.kv_heads})/1x{self.keys}/{self.head_dim}"
        return f"{self.batch}/{self.heads}/{self.queries}/{self.head_dim}" + (" causal" if self.causal else "")

    def flops(self, backward: bool) -> float:
        """Return 4 B H P D with P the unmasked pairs; 3.5 times that with the backward pass."""
        keys = self.keys or self.queries
        pairs = self.queries * (self.queries + 1) // 2 if self.causal else self.queries * keys
        return 4.0 * self.batch * self.heads * pairs * self.head_dim * (3.5 if backward else 1.0)

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """(B, H, Lq, D)."""
        return (self.batch, self.heads, self.queries, self.head_dim)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, Lk, D), also the shape of the values."""
        return (self.batch, self.kv_heads or self.heads, self.keys or self.queries, self.head_dim)

    def numbers(self) -> list[np.ndarray[Any, Any]]:
        """Return random q, k, v and an output gradient, in float32."""
        random = np.random.default_rng(0)
        shapes = (self.query_shape, self.key_shape, self.key_shape, self.query_shape)
        return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


SHAPES: Final = (
    BenchShape(1, 8, 64, 32),
    BenchShape(1, 8, 128, 64),
    BenchShape(4, 8, 256, 32),
    BenchShape(1, 8, 512, 64),
    BenchShape(1, 8, 2048, 64),
    BenchShape(1, 8, 2048, 64, causal=True),
    BenchShape(1, 4, 4096, 128),
    BenchShape(1, 4, 4096, 128, causal=True),
)
DECODE: Final = BenchShape(1, 32, 1, 128, kv_heads=8, keys=8192)
LONG: Final = 2048
"""Minimum length for the target of the share of the machine's peak."""
