"""The family of edge cases: one theme per case, each at a point where an algorithm branches or a number changes scale.

Case n has theme n modulo their number, so that every theme has an equal share of any run. The scores are often exact by
construction (small integers times powers of two, or constants), so that the accepted error is small.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.random import Generator

from tests.fuzz.cases import LAYOUTS, REPEATS_HEADS, REPEATS_ROWS
from tests.fuzz.problem import DTYPES, NUM_LAYOUTS, Floats, Mode, Problem, relaid

FORWARD_TRANSFORMS: Final = ("plain", "plain", "compile", "vmap", "vmap_q")
GRADIENT_TRANSFORMS: Final = ("plain", "compile", "checkpoint", "vmap", "vmap_q", "vmap_grad", "grad_compile")
SEED_OF_FAMILY: Final = 77
MAX_DEMO_SCORES: Final = 1e5


@dataclass
class Draw:
    """Sizes and dtype of a case, and its random number generator."""

    random: Generator
    mode: Mode
    dtype: str
    batch: int
    kv_heads: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int

    def normal(self, *shape: int) -> Floats:
        return np.asarray(self.random.standard_normal(shape))

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.dim

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_heads, self.keys, self.dim

    @property
    def v_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.kv_heads, self.keys, self.value_dim

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def array(self, values: Floats) -> mx.array:
        return mx.array(np.asarray(values, np.float32)).astype(DTYPES[self.dtype])

    def problem(
        self,
        q: Floats | mx.array,
        k: Floats | mx.array,
        v: Floats | mx.array,
        *,
        mask: "mx.array | str | None" = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Problem:
        """Make the problem of arrays in float64, or in the case's type."""
        arrays = [x if isinstance(x, mx.array) else self.array(x) for x in (q, k, v)]
        return Problem(*arrays, mask, scale, window, softcap)

    def mask_shape(self) -> tuple[int, ...]:
        """Draw a shape that broadcasts to the scores."""
        whole = (self.batch, self.heads, self.queries, self.keys)
        ndim = int(self.random.choice([4, 4, 3, 2]))
        return tuple(n if self.chance(0.6) else 1 for n in whole)[4 - ndim :]


def problem(seed: int, number: int, mode: Mode) -> Problem | None:
    """Make case `number` of a seed."""
    random = np.random.default_rng([SEED_OF_FAMILY, seed, number])
    theme = THEMES[number % len(THEMES)]
    draw = _sizes(random, mode)
    made = theme(draw)
    cotangent, transform = None, str(random.choice(FORWARD_TRANSFORMS))
    if mode == "gradient":
        cotangent = draw.array(draw.normal(*draw.q_shape[:3], made.v.shape[3]))
        transform = str(random.choice(GRADIENT_TRANSFORMS))
        additive = isinstance(made.mask, mx.array) and made.mask.dtype in DTYPES.values()
        made.has_mask_gradient = additive and draw.chance(0.5)
    if mode == "demo":
        transform = "plain"
        if np.prod(made.score_shape) > MAX_DEMO_SCORES:
            return None
    if transform == "vmap_q" and made.has_mask_gradient:
        transform = "vmap_grad"
    shapes = {"q": made.q.shape, "k": made.k.shape, "v": made.v.shape, "dtype": draw.dtype}
    mask = made.mask if not isinstance(made.mask, mx.array) else (made.mask.shape, str(made.mask.dtype))
    bounds = {"scale": made.scale, "window": made.window, "softcap": made.softcap, "budgets": made.budgets}
    facts = {"theme": theme.__name__, **shapes, "mask": mask, **bounds, "mask gradient": made.has_mask_gradient}
    return replace(made, cotangent=cotangent, transform=transform, facts=facts)


def _sizes(random: Generator, mode: Mode) -> Draw:
    kv_heads = int(random.choice([1, 1, 2]))
    dim = int(random.choice([4, 16, 32, 64, 80, 128]))
    return Draw(
        random,
        mode,
        dtype=str(random.choice(["float32", "float32", "float16", "bfloat16"])),
        batch=int(random.choice([1, 1, 2])),
        kv_heads=kv_heads,
        heads=kv_heads * int(random.choice([1, 2, 4])),
        queries=int(random.choice([1, 3, 8, 16, 33, 64, 127])),
        keys=int(random.choice([1, 2, 17, 64, 65, 128, 200, 256, 257, 511])),
        dim=dim,
        value_dim=dim if random.random() < 0.7 else int(random.choice([1, 8, 48, 64])),
    )


# ---- themes


def first_keys_hidden(draw: Draw) -> Problem:
    """Mask the first keys for all or most rows, with scores far below 0 for the rest."""
    draw.keys = max(draw.keys, 200)
    shift = -float(draw.random.choice([50, 110, 300, 2000, 60000]))
    if draw.mode == "gradient":  # dQ sums multiples of the shift that cancel but for the rounding of the scores
        draw.dtype, shift = "float32", max(shift, -110.0)
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape) + 3
    q[..., 0], k[..., 0] = 8.0, shift / 8  # the same for each pair, so that softmax does not change
    hidden = int(draw.random.integers(1, draw.keys))
    key = np.arange(draw.keys)
    kind = str(draw.random.choice(["window", "bool", "additive", "ragged"]))
    mask, window = mx.array(key >= hidden), None
    if kind == "window":
        mask, window = None, max(1, draw.keys - hidden)
    elif kind == "ragged":  # another number of keys for each row
        mask = mx.array(key >= draw.random.integers(0, draw.keys, (draw.queries, 1)))
    elif kind == "additive":
        mask = draw.array(np.where(key >= hidden, 0.0, -np.inf))
    made = draw.problem(q, k, v, scale=1.0, mask=mask, window=window)
    if draw.mode == "gradient":
        made.largest_score = shift**2 / 8
    return made


def scores_of_any_size(draw: Draw) -> Problem:
    """Make scores integers times 2^e, from about 1e-30 to 1e30.

    One dimension produces them, so that scores are equal or far apart, however the factor is rounded.
    """
    q, k = (np.round(draw.random.uniform(-4, 4, shape)) for shape in (draw.q_shape, draw.k_shape))
    q[..., 1:] = 0
    exponent = int(draw.random.integers(-100, 94))
    scale = float(2.0**exponent * draw.random.choice([1.0, 1.0, 0.7, 3.0]))
    if draw.dtype != "float16" and draw.chance(0.5):  # large or small numbers, and not a large or small scale
        half = exponent // 2
        q, k, scale = q * 2.0**half, k * 2.0 ** (exponent - half), 1.0
    if draw.mode == "gradient":  # gradients have the size of the factor, and so has the rounding of dP - delta in them
        draw.dtype, scale = "float32", float(np.clip(scale, 1e-20, 100))
    mask = str(draw.random.choice(["none", "causal"]))
    return draw.problem(q, k, draw.normal(*draw.v_shape), scale=scale, mask=None if mask == "none" else mask)


def shifted_scores(draw: Draw) -> Problem:
    """Shift all scores of a call by one number, up or down, which changes nothing."""
    shift = float(draw.random.choice([-1, 1]) * draw.random.choice([10, 100, 1000, 1e5]))
    if draw.mode == "gradient":  # the shift is a key's element, and so the rounding of dP - delta is that much larger
        draw.dtype, draw.keys, shift = "float32", max(draw.keys, 64), float(np.clip(shift, -10, 10))
    q, k = (np.round(draw.random.uniform(-2, 2, shape)) for shape in (draw.q_shape, draw.k_shape))
    q[..., 0], k[..., 0] = 1.0, shift if draw.dtype != "float16" else np.clip(shift, -6e4, 6e4)
    made = draw.problem(q, k, draw.normal(*draw.v_shape), scale=1.0, mask="causal" if draw.chance(0.5) else None)
    made.largest_score = shift**2 if draw.mode == "gradient" else abs(shift)
    return made


def rows_hidden_by_finite_masks(draw: Draw) -> Problem:
    """Cover whole rows with large finite mask values, whose scores are equal: the result is the mean of the values."""
    name = str(draw.random.choice(["float32", "float16", "bfloat16", draw.dtype]))
    smallest = float(mx.finfo(DTYPES[name]).min)
    value = float(draw.random.choice([-1e4, -1e9 if name != "float16" else -6e4, smallest, smallest / 2]))
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape)
    covered = draw.random.random(draw.queries) < draw.random.choice([0.3, 1.0])
    q[:, :, covered] = 0
    mask = np.where(covered[:, None] | (draw.random.random((draw.queries, draw.keys)) < 0.2), value, 0.0)
    if draw.chance(0.3):
        mask = np.where(draw.random.random(mask.shape) < 0.2, -np.inf, mask)
    window = int(draw.random.integers(1, draw.keys + 1)) if draw.chance(0.2) else None
    array = mx.array(mask.astype(np.float32)).astype(DTYPES[name])
    return draw.problem(q, k, v, mask=array, window=window)


def additive_masks(draw: Draw) -> Problem:
    """Draw masks of ordinary numbers and all shapes, with some pairs and rows hidden."""
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape)
    shape = draw.mask_shape()
    mask = draw.normal(*shape)
    if draw.chance(0.4):
        mask = np.where(draw.random.random(shape) < 0.3, -np.inf, mask)
    if draw.chance(0.2):
        mask = np.where(draw.random.random((*shape[:-1], 1)) < 0.3, -np.inf, mask)
    name = str(draw.random.choice(["float32", draw.dtype]))
    array = mx.array(mask.astype(np.float32)).astype(DTYPES[name])
    softcap = float(draw.random.choice([1.0, 20.0])) if draw.chance(0.3) else None
    window = int(draw.random.integers(1, draw.keys + 1)) if draw.chance(0.3) else None
    return draw.problem(q, k, v, mask=array, softcap=softcap, window=window)


def long_keys(draw: Draw) -> Problem:
    """Draw many keys and few queries, or a long square, in budgets far below the size of the scores."""
    draw.batch, draw.dim, draw.value_dim = 1, 16, int(draw.random.choice([8, 16]))
    draw.kv_heads = draw.heads = 1
    draw.queries, draw.keys = [(1, 20000), (5, 8193), (300, 300), (129, 1024)][int(draw.random.integers(0, 4))]
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape)
    mask = "causal" if draw.chance(0.5) else None
    window = int(draw.random.choice([7, 100, 1000])) if draw.chance(0.3) else None
    softcap = 10.0 if draw.chance(0.3) else None
    made = draw.problem(q, k, v, mask=mask, window=window, softcap=softcap)
    made.budgets = {"practical64k": 65536, "practical256k": 262144}
    return made


def budgets_at_edges(draw: Draw) -> Problem:
    """Draw budgets at and around the size of the scores, in the type of the call and in float32."""
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape)
    kind = str(draw.random.choice(["none", "causal", "bool", "softcap"]))
    mask: mx.array | str | None = "causal" if kind == "causal" else None
    if kind == "bool":
        mask = mx.array(draw.random.random(draw.mask_shape()) < 0.7)
    made = draw.problem(q, k, v, mask=mask, softcap=5.0 if kind == "softcap" else None)
    scores = draw.batch * draw.heads * draw.queries * draw.keys
    size = int(draw.random.choice([2, 4])) * int(draw.random.choice([1, 2]))
    made.budgets = {f"practical{step:+d}": max(1, scores * size + step) for step in (-1, 0, 1)}
    return made


def constants(draw: Draw) -> Problem:
    """Draw zeros, or one number everywhere, as in a warm-up call."""
    q, k, v = (
        np.full(shape, float(draw.random.choice([0.0, 0.0, 1.0, -2.0, 1e-30 if draw.dtype != "float16" else 1e-7])))
        for shape in (draw.q_shape, draw.k_shape, draw.v_shape)
    )
    return draw.problem(q, k, v, mask="causal" if draw.chance(0.5) else None)


def unusual_masks(draw: Draw) -> Problem:
    """Draw masks of no or one axis, of float64, and bool masks that hide all or nothing; some are refused."""
    q, k, v = draw.normal(*draw.q_shape), draw.normal(*draw.k_shape), draw.normal(*draw.v_shape)
    kind = str(draw.random.choice(["0-d", "1-d", "float64", "bool"]))
    name = str(draw.random.choice(["float32", "float16", "bool"]))
    shape: tuple[int, ...] = () if kind == "0-d" else (int(draw.random.choice([1, draw.keys])),)
    if kind == "float64":
        shape = (draw.queries, draw.keys)
    if kind == "bool" or name == "bool":
        mask = mx.array(draw.random.random(shape) < float(draw.random.choice([0.0, 0.5, 1.0])))
    else:
        mask = mx.array(np.asarray(draw.normal(*shape), np.float32)).astype(DTYPES[name])
    if kind == "float64":
        with mx.stream(mx.cpu):
            mask = mask.astype(mx.float64)
    made = draw.problem(q, k, v, mask=mask)
    made.may_be_refused = kind == "float64"
    return made


def layouts(draw: Draw) -> Problem:
    """Draw arrays strided along any axis, reversed, shifted or repeated; some with a single query."""
    if draw.chance(0.3):
        draw.queries, draw.keys = 1, int(draw.random.choice([256, 300, 1025]))

    def laid(values: Floats) -> mx.array:
        array = draw.array(values)
        layout = int(draw.random.choice(LAYOUTS[3:]))
        if layout == REPEATS_HEADS:
            return mx.broadcast_to(array[:1, :1], array.shape)
        if layout == REPEATS_ROWS:
            return mx.broadcast_to(array[:, :, :1], array.shape)
        array = relaid(array, layout)
        if draw.chance(0.4):  # the last axis reversed
            back = mx.contiguous(array[..., ::-1])
            mx.eval(back)
            return back[..., ::-1]
        return array

    q, k, v = laid(draw.normal(*draw.q_shape)), laid(draw.normal(*draw.k_shape)), laid(draw.normal(*draw.v_shape))
    mask = None
    if draw.chance(0.5):
        shape = (draw.batch, draw.heads, draw.queries, draw.keys)
        mask = relaid(mx.array(draw.random.random(shape) < 0.7), int(draw.random.integers(0, NUM_LAYOUTS)))
    return draw.problem(q, k, v, mask=mask)


def large_half_precision(draw: Draw) -> Problem:
    """Draw 16-bit inputs whose dot products, or whose scores with a mask, overflow their type."""
    draw.dtype = str(draw.random.choice(["float16", "bfloat16"]))
    size = float(draw.random.choice([30, 200]))
    q = np.round(draw.random.uniform(-1, 1, draw.q_shape)) * size
    k = np.round(draw.random.uniform(-1, 1, draw.k_shape)) * size
    lowest = float(mx.finfo(DTYPES[draw.dtype]).min)
    mask = None
    if draw.chance(0.5):
        mask = draw.array(np.where(draw.random.random((draw.queries, draw.keys)) < 0.5, lowest, 0.0))
    scale = float(draw.random.choice([1.0, 0.125, 4.0]))
    return draw.problem(q, k, draw.normal(*draw.v_shape), mask=mask, scale=scale)


THEMES: Final[tuple[Callable[[Draw], Problem], ...]] = (
    first_keys_hidden,
    scores_of_any_size,
    shifted_scores,
    rows_hidden_by_finite_masks,
    additive_masks,
    long_keys,
    budgets_at_edges,
    constants,
    unusual_masks,
    layouts,
    large_half_precision,
)
