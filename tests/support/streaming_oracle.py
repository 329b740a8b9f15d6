"""What a streaming state keeps and computes, in float64 and without a ring: lists of tokens, one row at a time."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotated(x: Array, positions: Array, dims: int, base: float, traditional: bool) -> Array:
    """Rotate rows of (heads, n, D) to their positions."""
    angles = np.asarray(positions)[:, None] * base ** (-np.arange(0, dims, 2) / dims)
    cos, sin = np.cos(angles), np.sin(angles)
    low, high = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(dims // 2), slice(dims // 2, dims))
    made = x.copy()
    made[..., low] = x[..., low] * cos - x[..., high] * sin
    made[..., high] = x[..., low] * sin + x[..., high] * cos
    return made


@dataclass
class Sequence:
    """One row of a batch: its tokens by position, and which of them the ring still has.

    Attributes:
        rope: dims, base and whether pairs are adjacent; None without positions.
        tokens: key and value of each position, (Hkv, D).
        lost: positions from `first` up to here are gone.
    """

    first: int
    window: int
    spare: int = 0
    rope: tuple[int, float, bool] | None = None
    tokens: list[tuple[Array, Array]] = field(default_factory=list)
    lost: int = 0

    def append(self, k: Array, v: Array) -> None:
        """Add a token."""
        self.tokens.append((k, v))
        self.lost = max(self.lost, len(self.tokens) - self.window - self.spare, self.first)

    def rewind(self, tokens: int) -> None:
        """Take back the latest tokens."""
        del self.tokens[len(self.tokens) - tokens :]

    def kept(self) -> list[int]:
        """Positions that the latest query attends to."""
        count = len(self.tokens)
        latest = range(max(self.first, self.lost, count - self.window), count)
        return [*range(min(self.first, count)), *latest]

    def attend(self, q: Array) -> Array:
        """Attention of the latest token's query (H, D)."""
        kept = self.kept()
        k = np.stack([self.tokens[i][0] for i in kept], 1)
        v = np.stack([self.tokens[i][1] for i in kept], 1)
        query = q[:, None]
        if self.rope is not None:
            k = rotated(k, np.arange(len(kept)), *self.rope)
            query = rotated(query, np.array([len(kept) - 1]), *self.rope)
        k, v = (x.repeat(len(q) // len(x), axis=0) for x in (k, v))
        scores = (query @ k.transpose(0, 2, 1))[:, 0] / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        made: Array = np.einsum("hk,hkd->hd", weights / weights.sum(-1, keepdims=True), v)
        return made
