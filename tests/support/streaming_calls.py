"""Tokens for streaming states, and the outputs that an oracle expects of them."""

import mlx.core as mx
import numpy as np

from attention import Rope
from tests.support.streaming_oracle import Sequence

HEADS, KV_HEADS, WIDTH = 4, 2, 16
ROPES = {"none": None, "halves": (16, 10000.0, False), "adjacent": (8, 100.0, True)}


def made(tokens: int, batch: int = 1, seed: int = 0, width: int = WIDTH) -> list[np.ndarray]:
    """Return q, k and v of new tokens, (batch, heads, tokens, width)."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, h, tokens, width), np.float32) for h in (HEADS, KV_HEADS, KV_HEADS)]


def rope_of(values: tuple[int, float, bool] | None) -> Rope | None:
    """Return the product's object."""
    return None if values is None else Rope(values[0], base=values[1], traditional=values[2])


def expected(row: Sequence, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Append tokens (heads, L, D) to an oracle and return its outputs (H, L, D)."""
    out = []
    for t in range(q.shape[1]):
        row.append(k[:, t].astype(float), v[:, t].astype(float))
        out.append(row.attend(q[:, t].astype(float)))
    return np.stack(out, 1)


def close(got: mx.array, want: np.ndarray, error: float = 3e-6) -> bool:
    """Return whether outputs agree."""
    return bool(np.abs(np.array(got.astype(mx.float32)) - want).max() <= error)
