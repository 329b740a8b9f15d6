"""Attention and its gradients in float64, and FlashAttention 3's rule for the accepted error of a kernel."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Options:
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: np.ndarray | None = None

    def keywords(self) -> dict:
        mask = None if self.mask is None else mx.array(self.mask)
        return {**self.__dict__, "mask": mask}


def numbers(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def visible(options: Options, shape: tuple[int, ...]) -> np.ndarray:
    queries, keys = shape[-2:]
    own = np.arange(queries)[:, None] + keys - queries
    key = np.arange(keys)[None]
    seen = np.ones(shape, bool)
    if options.causal or options.window:
        seen &= key <= own
    if options.window:
        seen &= key > own - options.window
    if options.mask is not None:
        mask = np.broadcast_to(options.mask, shape)
        seen &= mask if mask.dtype == bool else mask > -np.inf
    return seen


def attention(q, k, v, options: Options, rounded=lambda x: x):
    """Return output, logsumexp and intermediates for gradients; `rounded` emulates a lower precision."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = rounded(rounded(q * options.scale) @ k.swapaxes(-1, -2))
    slope = np.ones_like(s)
    if options.softcap:
        t = rounded(np.tanh(s / options.softcap))
        s, slope = rounded(t * options.softcap), 1 - t * t
    if options.mask is not None and options.mask.dtype != bool:
        s = rounded(s + np.where(options.mask > -np.inf, options.mask, 0.0))
    seen = visible(options, s.shape)
    s = np.where(seen, s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    some = total > 0
    p = rounded(e / np.where(some, total, 1.0))
    logsumexp = np.where(some, top + np.log(np.where(some, total, 1.0)), -np.inf)[..., 0]
    return rounded(p @ v), logsumexp, (p, slope, k, v)


def gradients(q, k, v, do, options: Options, rounded=lambda x: x, stored=None):
    """Return dq, dk and dv; by rowsum(dO * O) of the output rounded by `stored`, if given, else by rowsum(dP * P)."""
    output, _, (p, slope, wide_k, wide_v) = attention(q, k, v, options, rounded)
    dp = rounded(do @ wide_v.swapaxes(-1, -2))
    delta = dp * p if stored is None else do * stored(output)
    ds = rounded(p * (dp - delta.sum(-1, keepdims=True)) * slope)
    dq = rounded(ds @ wide_k * options.scale)
    dk = ds.swapaxes(-1, -2) @ q * options.scale
    dv = p.swapaxes(-1, -2) @ do
    fold = lambda x: rounded(x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2))  # noqa: E731
    return dq, fold(dk), fold(dv)


def gradient_sums(q, k, v, do, options: Options):
    """Return dq, dk and dv with all addends positive, the scale of their rounding errors."""
    _, _, (p, slope, wide_k, wide_v) = attention(q, k, v, options)
    dp = np.abs(do) @ np.abs(wide_v).swapaxes(-1, -2)
    ds = p * (dp + (dp * p).sum(-1, keepdims=True)) * np.abs(slope) * abs(options.scale)
    fold = lambda x: x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2)  # noqa: E731
    dk, dv = ds.swapaxes(-1, -2) @ np.abs(q), p.swapaxes(-1, -2) @ np.abs(do)
    return ds @ np.abs(wide_k), fold(dk), fold(dv)


def rounding(dtype: mx.Dtype):
    if dtype == mx.float32:  # float32 sums too, once everything is float32
        return lambda x: np.asarray(x, np.float32)
    return lambda x: numbers(mx.array(np.asarray(x, np.float32)).astype(dtype))


def plain_attention(q, k, v, options: Options, dtype: mx.Dtype) -> np.ndarray:
    """Plain attention in this precision, with every step rounded."""
    round_ = rounding(dtype)
    return attention(round_(q), round_(k), round_(v), options, round_)[0]


def plain_gradients(q, k, v, do, options: Options, dtype: mx.Dtype) -> tuple[np.ndarray, ...]:
    round_ = rounding(dtype)
    return gradients(round_(q), round_(k), round_(v), round_(do), options, round_)


def assert_near(
    got: mx.array, exact: np.ndarray, plain: np.ndarray, dtype: mx.Dtype, factor: float, what: str, floor: float = 0
) -> None:
    """FlashAttention 3's rule: at most `factor` times the error of plain attention, a few roundings, and `floor`."""
    assert got.shape == exact.shape
    value = numbers(got)
    assert not np.isnan(value).any(), f"{what} has NaN"
    round_ = rounding(dtype)
    slack = 2 * np.abs(round_(round_(exact + 0.3) - 0.3) - exact).max(initial=0)
    error, allowed = np.abs(value - exact).max(initial=0), factor * np.abs(plain - exact).max(initial=0) + slack + floor
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def poison() -> None:
    """Fill MLX's cache of freed memory with NaN, so that unwritten elements are detected."""
    made = [mx.full((1 << power,), float("nan"), mx.float32) for power in range(8, 23) for _ in range(6)]
    mx.eval(made)
