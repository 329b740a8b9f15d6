"""Small inputs of the self-check on first use, and the comparison of its results with float64."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from attention.kernels.common import selfcheck
from attention.kernels.common.selfcheck import Floats, RulesOf, additive, exact
from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.launch import Arrays, arrays_of
from attention.kernels.metal.lists import ListArrays, lists_of_pattern
from attention.kernels.metal.tiles import LIST_QUERIES
from attention.masks import Pattern, blocks, dilated, dtype_name
from attention.measure.reference import Rules
from attention.quantized_kv import KeyOrValue, QuantizedArray, quantized

Bools = NDArray[np.bool_]
QUERIES, KEYS = 70, 83
LISTED_QUERIES, LISTED_KEYS = 100, 150
"""With block lists: two by three tiles, the last of them incomplete."""
COVER = {"float32": -1e9, "bfloat16": -1e9, "float16": -6e4}
"""Large finite values of additive masks, by dtype."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a self-check; `mask` to `seen` if the call has them."""

    q: mx.array
    k: KeyOrValue
    v: KeyOrValue
    cotangent: mx.array
    mask: mx.array | None
    sinks: mx.array | None
    logsumexp_cotangent: mx.array | None = None
    slopes: mx.array | None = None
    lists: ListArrays | None = None
    seen: Bools | None = None
    """The visible pairs of the lists."""

    def arrays(self, shape: CallShape) -> Arrays:
        """Return the arguments of the forward kernel."""
        whole = (shape.batch, shape.heads, shape.queries, shape.keys)
        mask = None if self.mask is None else mx.broadcast_to(self.mask, whole)
        return arrays_of(self.q, self.k, self.v, mask, self.sinks, self.slopes, self.lists)


def small_shape(shape: CallShape, lists: bool) -> CallShape:
    """Return a small shape that runs the same kernels, unless these split the keys."""
    queries, keys = (LISTED_QUERIES, LISTED_KEYS) if lists else (QUERIES, KEYS)
    return replace(shape, batch=1, heads=4, kv_heads=2, queries=queries, keys=keys)


def _pattern(shape: CallShape, random: np.random.Generator) -> Pattern:
    """Return a pattern with full, partial and empty tiles, which differ between heads, and empty rows of tiles."""

    def drawn(block: int, density: float) -> Pattern:
        cells = random.random((1, shape.heads, -(-shape.queries // block), -(-shape.keys // block))) < density
        if block == LIST_QUERIES:
            cells[:, 0, -1] = False
        return blocks(cells, block)

    return drawn(LIST_QUERIES, 0.7) & (drawn(LIST_QUERIES, 0.3) | drawn(16, 0.3) | dilated(shape.keys, 3))


def check_params(call: CallParams, small: CallShape) -> CallParams:
    """Return the call used to check another: equal compile-time constants, other values."""
    return replace(call, scale=small.head_dim**-0.5, window=None if call.window is None else 40)


def inputs(shape: CallShape, call: CallParams, seed: int = 7, logsumexp: bool = False) -> Inputs:
    """Return random inputs, optionally with a cotangent of the logsumexp.

    The mask hides all of row 0. An additive one fills row 1 with a large finite value, where the query is 0, so that
    the weights are equal. No array is contiguous: q is a slice within its rows, k and the cotangent have the heads
    axis inside the rows, as in models, and the columns of v are strided. Quantized keys and values are views of longer
    buffers, as in a cache.
    """
    random = np.random.default_rng(seed)
    batch, dim, dtype = shape.batch, shape.head_dim, getattr(mx, shape.dtype)
    sizes = (
        (batch, shape.heads, shape.queries, dim + 8),
        (batch, shape.keys, shape.kv_heads, dim),
        (batch, shape.kv_heads, shape.keys, 2 * dim),
        (batch, shape.queries, shape.heads, dim),
    )
    q, k, v, cotangent = (mx.array(random.standard_normal(s, np.float32)).astype(dtype) for s in sizes)
    mask = None
    if call.mask in COVER:
        q[:, :, 1:2] = 0
    if call.mask != "none":
        seen = random.random((shape.heads, shape.queries, shape.keys)) < 0.7
        seen[:, 0] = False
        added = np.where(seen, random.standard_normal(seen.shape), -np.inf).astype(np.float32)
        added[:, 1:2] = COVER.get(call.mask, 0)
        mask = mx.array(seen) if call.mask == "bool" else mx.array(added).astype(getattr(mx, call.mask))
    sinks = mx.array(random.standard_normal(shape.heads, np.float32)) if call.sinks else None
    by_sum = mx.array(random.standard_normal((batch, shape.heads, shape.queries), np.float32)) if logsumexp else None
    slopes = mx.array(0.1 * random.random(shape.heads, np.float32)) if call.alibi else None
    keys: KeyOrValue = k.swapaxes(1, 2)
    values: KeyOrValue = v[..., ::2]
    if shape.kv_format is not None:
        keys, values = (
            _in_buffer(quantized(x, form)) for x, form in ((keys, shape.kv_format.key), (values, shape.kv_format.value))
        )
    given = Inputs(q[..., 4:-4], keys, values, cotangent.swapaxes(1, 2), mask, sinks, by_sum, slopes)
    if not call.lists:
        return given
    pattern = _pattern(shape, random)
    seen = np.array(pattern.dense((batch, shape.heads, shape.queries, shape.keys)))
    return replace(given, lists=lists_of_pattern(pattern, shape), seen=seen)


def _in_buffer(x: QuantizedArray) -> QuantizedArray:
    """Return an array as a view of a longer one."""
    rows = x.shape[2]
    return x.with_arrays([mx.pad(part, [(0, 0), (0, 0), (3, 5), (0, 0)])[:, :, 3 : 3 + rows] for part in x.arrays])


def exact_rows(x: KeyOrValue) -> Floats:
    """Return keys or values in float64."""
    return x.exact() if isinstance(x, QuantizedArray) else exact(x)


def _rules(given: Inputs, call: CallParams) -> RulesOf:
    """Return the rules of each head; mask, block lists and alibi are one additive mask."""
    shape = (*given.q.shape[:3], given.k.shape[2])
    queries, keys = shape[2:]
    added = np.zeros(shape) if given.mask is None else np.broadcast_to(additive(given.mask), shape)
    if given.seen is not None:
        added = np.where(given.seen, added, -np.inf)
    if given.slopes is not None:
        distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
        added = added + exact(given.slopes)[:, None, None] * distance
    plain = Rules(scale=call.scale, causal=call.causal, window=call.window, softcap=call.softcap)
    sinks = None if given.sinks is None else exact(given.sinks)
    return lambda b, h: structs.replace(plain, mask=added[b, h], sink=None if sinks is None else float(sinks[h]))


def reference(given: Inputs, call: CallParams) -> tuple[Floats, Floats]:
    """Return output and logsumexp; fully masked rows give 0 and -inf.

    The logsumexp with quantized keys is that of keys rounded to the dtype of q, as the kernels round them.
    """
    q, values, rules = exact(given.q), exact_rows(given.v), _rules(given, call)
    output, logsumexp = selfcheck.results(q, exact_rows(given.k), values, rules)
    if isinstance(given.k, QuantizedArray):
        logsumexp = selfcheck.results(q, exact(given.k.dequantized(given.q.dtype)), values, rules)[1]
    return output, logsumexp


def reference_gradients(given: Inputs, call: CallParams) -> list[Floats]:
    """Return the gradients of q, k and v, and with sinks each row's contribution to theirs, (B, H, Lq)."""
    q, k, v, cotangent = (exact_rows(x) for x in (given.q, given.k, given.v, given.cotangent))
    by_sum = None if given.logsumexp_cotangent is None else exact(given.logsumexp_cotangent)
    made = selfcheck.gradients(q, k, v, cotangent, _rules(given, call), by_sum)
    return made if given.sinks is not None else made[:3]


def disagreement(given: Inputs, call: CallParams, output: mx.array, logsumexp: mx.array) -> str | None:
    """Return what is wrong with a call's results, in one line, or None."""
    return selfcheck.disagreement(output, logsumexp, reference(given, call), dtype_name(given.q.dtype))


def gradient_disagreement(given: Inputs, call: CallParams, found: Sequence[mx.array]) -> str | None:
    """Return what is wrong with the gradients of q, k, v and the sinks if present, in one line, or None."""
    expected = reference_gradients(given, call)
    expected = [*expected[:3], *(rows.sum(axis=(0, 2)) for rows in expected[3:])]
    return selfcheck.gradient_disagreement(found, expected, dtype_name(given.q.dtype))
