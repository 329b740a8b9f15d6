"""Small attention calls, and their float64 references."""

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import NAMES
from attention.masks import Mask
from attention.measure.device import Device
from attention.measure.reference import Rules, forward, gradients

INSTALLED = tuple(
    name
    for name in NAMES
    # flex compiles for each shape, and poc-fp8 is for Hopper alone
    if name not in ("flex", "poc-fp8") and (name != "torch" or importlib.util.find_spec("torch"))
)
"""The implementations that can run here: all exact ones, except torch if it is not installed."""
CPU = Device(backend="cpu", name="any", cores=2, memory_bytes=2**34, available_bytes=2**33)


@dataclass(frozen=True)
class Example:
    """A call with every feature that an implementation may support."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    seq: int = 33
    kv_seq: int = 33
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float32"
    causal: bool = False
    window: int | None = None
    array: str = ""
    """"", "bool" or "additive", with some fully masked rows; "keys": depends on the key only."""
    softcap: float | None = None
    label: str = field(default="", compare=False)

    def workload(self, pass_: str = "forward") -> Workload:
        mask = "none" if not self.causal else "causal"
        return Workload(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            seq=self.seq,
            kv_seq=self.kv_seq,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,  # type: ignore[arg-type]
            mask=f"window:{self.window}" if self.window else mask,
            pass_=pass_,  # type: ignore[arg-type]
        )

    @property
    def needs(self) -> Needs:
        return Needs(softcap=self.softcap is not None, array_mask=bool(self.array))

    @property
    def scale(self) -> float:
        return 0.4

    def inputs(self, seed: int = 0) -> list[mx.array]:
        random = np.random.default_rng(seed)
        shapes = [
            (self.batch, self.heads, self.seq, self.head_dim),
            (self.batch, self.kv_heads, self.kv_seq, self.head_dim),
            (self.batch, self.kv_heads, self.kv_seq, self.value_dim),
            (self.batch, self.heads, self.seq, self.value_dim),
        ]
        return [mx.array(random.normal(size=s).astype(np.float32)).astype(getattr(mx, self.dtype)) for s in shapes]

    def numpy_mask(self) -> Any:
        random = np.random.default_rng(7)
        if self.array == "keys":
            return random.random((1, 1, 1, self.kv_seq)) < 0.7
        seen = random.random((self.batch, 1, self.seq, self.kv_seq)) < 0.6
        seen[0, :, 3] = False
        seen[:, :, -1] = False
        if self.array == "bool":
            return seen
        added = random.normal(size=(1, self.heads, self.seq, self.kv_seq)).astype(np.float32)
        added[:, 1, 2] = -np.inf
        added[:, :, :, 5] = -np.inf
        return added

    def mask(self) -> Mask:
        array = mx.array(self.numpy_mask()) if self.array else None
        if array is not None and array.dtype != mx.bool_:
            array = array.astype(getattr(mx, self.dtype))
        return Mask(causal=self.causal, window=self.window, array=array)

    @cache  # noqa: B019  of the few examples below
    def exact(self) -> list[np.ndarray]:
        """Return output, dQ, dK and dV of all heads in float64, for the inputs of the first seed."""
        q, k, v, up = (to_numpy(x) for x in self.inputs())
        shape = (self.batch, self.heads, self.seq, self.kv_seq)
        whole = None
        if self.array:
            given = self.mask().array
            assert given is not None
            low = np.array(given) if given.dtype == mx.bool_ else to_numpy(given)
            whole = np.broadcast_to(low, shape)
        out, d_q, d_k, d_v = np.zeros(up.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
        for b in range(self.batch):
            for h in range(self.heads):
                g = h * self.kv_heads // self.heads
                part = None if whole is None else whole[b, h]
                rules = Rules(scale=self.scale, causal=self.causal, window=self.window, mask=part, softcap=self.softcap)
                out[b, h] = forward(q[b, h], k[b, g], v[b, g], rules).output
                d_q[b, h], dk, dv = gradients(q[b, h], k[b, g], v[b, g], up[b, h], rules)
                d_k[b, g] += dk
                d_v[b, g] += dv
        return [out, d_q, d_k, d_v]


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}

EXAMPLES = [
    Example(label="plain"),
    Example(label="one key", kv_seq=1),
    Example(label="one query", seq=1),
    Example(label="grouped heads", heads=4, kv_heads=2),
    Example(label="one key head", kv_heads=1, causal=True),
    Example(label="wide values", value_dim=12),
    Example(label="narrow values, half", value_dim=4, dtype="float16", causal=True),
    Example(label="causal", causal=True),
    Example(label="causal, more keys", causal=True, seq=20, kv_seq=41),
    Example(label="causal, more queries", causal=True, seq=41, kv_seq=20),
    Example(label="window", window=7),
    Example(label="window of one", window=1),
    Example(label="window beyond all keys", window=500, heads=4, kv_heads=2),
    Example(label="window, more queries", window=4, seq=41, kv_seq=20, value_dim=12),
    Example(label="bool array", array="bool"),
    Example(label="bool array of keys", array="keys", heads=4, kv_heads=2),
    Example(label="bool array and causal", array="bool", causal=True, seq=20, kv_seq=33),
    Example(label="additive array", array="additive", heads=4, kv_heads=2),
    Example(label="additive array and window", array="additive", window=9, dtype="bfloat16"),
    Example(label="softcap", softcap=1.5),
    Example(label="softcap, causal, grouped", softcap=2.0, causal=True, heads=4, kv_heads=2, seq=20),
    Example(label="softcap, additive", softcap=2.0, array="additive", value_dim=5),
    Example(label="half", dtype="float16", heads=4, kv_heads=2),
    Example(label="bfloat", dtype="bfloat16", window=6),
]
