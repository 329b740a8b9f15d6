"""The broad family: random shapes, types, layouts, masks and contents.

The order of the random draws is part of the definition of a case: a change of it changes every seed.
"""

from dataclasses import asdict, dataclass
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.random import Generator

from tests.fuzz.problem import DTYPES, NUM_LAYOUTS, Mode, Problem, relaid

MAX_LENGTH: Final = 300
MAX_DIM: Final = 300
SEED_STRIDE: Final = 1_000_003
"""Case n of seed s draws from the generator of seed s * SEED_STRIDE + n."""
MAX_DEMO_SCORES: Final = 1e6
"""Maximum scores of a case for `demo`, which tries every candidate."""
LENGTHS_Q: Final = (1, 1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
LENGTHS_K: Final = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)
DIMS: Final = (1, 2, 8, 16, 31, 32, 33, 64, 80, 96, 128, 192, 256)
VALUE_DIMS: Final = (1, 2, 16, 33, 64, 128, 256)
WINDOWS: Final = (1, 1, 2, 3, 16, 64, 100, 255, 256, 500, 10000)
SOFTCAPS: Final = (0.5, 1.0, 5.0, 30.0, 50.0, 1e-3, 1e4)
SCALES: Final = (0.0, -0.3, -1.0, 1e-6, 1e-30, 1.0, 3.0, 0.5)
MASK_CONTENTS: Final = ("normal", "inf", "infrows", "1e9", "all1e9", "allinf", "alibi", "zero")
CONTENTS: Final = (
    *("normal", "normal", "normal", "normal"),
    *("big", "tiny", "denormal", "const", "onehot", "huge", "sparse"),
)
LAYOUTS: Final = (0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
REPEATS_HEADS: Final = 9
"""A layout of q, k or v: one head of one batch for all, with strides of 0."""
REPEATS_ROWS: Final = 10
"""A layout of q, k or v: one row for all, with a stride of 0."""
GRADIENT_TRANSFORMS: Final = ("plain", "compile", "checkpoint", "vmap", "grad_compile")


@dataclass
class Case:
    """The parameters that a case was drawn with."""

    batch: int
    kv_heads: int
    heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    dtype: str = ""
    mask: str = ""
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    mask_axes: int = 0
    """Bit i: the mask has axis i of (B, H, Lq, Lk) in full, and not of length 1."""
    mask_ndim: int = 4
    mask_dtype: str = ""
    mask_content: str = ""
    mask_layout: int = 0
    content: str = ""
    layouts: tuple[int, int, int] = (0, 0, 0)


def generator(seed: int, number: int) -> Generator:
    """Return the random number generator of a case."""
    return np.random.default_rng(seed * SEED_STRIDE + number)


def problem(seed: int, number: int, mode: Mode) -> Problem | None:
    """Make case `number` of a seed; None if the mode excludes it."""
    random = generator(seed, number)
    case = draw(random)
    if mode == "demo" and case.batch * case.heads * case.queries * case.keys > MAX_DEMO_SCORES:
        return None
    if mode == "gradient" and case.content == "huge":
        case.content = "normal"
    q, k, v = arrays(random, case)
    mask = array_mask(random, case)
    cotangent, transform = None, "plain"
    if mode == "gradient":
        shape = (case.batch, case.heads, case.queries, case.value_dim)
        cotangent = mx.array(random.standard_normal(shape).astype(np.float32)).astype(DTYPES[case.dtype])
        transform = str(random.choice(GRADIENT_TRANSFORMS))
    facts: dict[str, object] = asdict(case)
    given = "causal" if case.mask == "causal" else mask
    return Problem(
        q, k, v, given, case.scale, case.window, case.softcap, cotangent=cotangent, transform=transform, facts=facts
    )


def _size(random: Generator, most: int, edges: tuple[int, ...]) -> int:
    x = random.random()
    if x < 0.3:
        return int(random.choice(edges))
    if x < 0.7:
        return int(random.integers(1, min(most, 24) + 1))
    return int(random.integers(1, most + 1))


def draw(random: Generator) -> Case:
    """Draw everything of a case but its arrays."""
    batch = int(random.choice([1, 1, 2, 3]))
    kv_heads = int(random.choice([1, 1, 2, 3, 4]))
    heads = kv_heads * int(random.choice([1, 1, 2, 3, 4, 8]))
    queries, keys = _size(random, MAX_LENGTH, LENGTHS_Q), _size(random, MAX_LENGTH, LENGTHS_K)
    if random.random() < 0.04:
        keys = int(random.integers(1000, 5000))
        queries = int(random.integers(1, 9))
    dim = _size(random, MAX_DIM, DIMS)
    value_dim = dim if random.random() < 0.5 else _size(random, MAX_DIM, VALUE_DIMS)
    case = Case(batch, kv_heads, heads, queries, keys, dim, value_dim)
    _shrink(random, case)
    case.dtype = str(random.choice(["float32", "float16", "bfloat16"]))
    case.mask = str(random.choice(["none", "causal", "bool", "add"], p=[0.2, 0.25, 0.27, 0.28]))
    case.window = None if random.random() < 0.7 else int(random.choice(WINDOWS))
    case.softcap = None if random.random() < 0.75 else float(random.choice(SOFTCAPS))
    case.scale = None if random.random() < 0.6 else float(random.choice(SCALES))
    case.mask_axes, case.mask_ndim = int(random.integers(0, 16)), int(random.choice([4, 4, 4, 3, 2, 1, 0]))
    case.mask_dtype = str(random.choice(["float32", "float16", "bfloat16", "same", "same"]))
    case.mask_content = str(random.choice(MASK_CONTENTS))
    case.mask_layout = int(random.integers(0, NUM_LAYOUTS))
    case.content = str(random.choice(CONTENTS))
    first, second, third = (int(random.choice(LAYOUTS)) for _ in range(3))
    case.layouts = (first, second, third)
    return case


def _shrink(random: Generator, case: Case) -> None:
    """Halve random sizes until the reference in float64 takes little time."""
    names = {"H": "heads", "Lq": "queries", "Lk": "keys", "D": "dim", "Dv": "value_dim"}
    while case.batch * case.heads * case.queries * case.keys * (case.dim + case.value_dim) > (
        3e7 if random.random() < 0.1 else 6e6
    ):
        chosen = names[str(random.choice(list(names)))]
        if chosen == "heads":
            case.heads = case.kv_heads = 1
        else:
            setattr(case, chosen, max(1, getattr(case, chosen) // 2))


def contents(random: Generator, shape: tuple[int, ...], kind: str, dtype: str) -> np.ndarray:
    """Draw the values of q, k or v."""
    x = random.standard_normal(shape)
    if kind == "big":
        x *= 8
    if kind == "tiny":
        x *= 1e-4
    if kind == "denormal":
        x *= 1e-39 if dtype != "float16" else 3e-7
    if kind == "const":
        x[:] = 0.5
    if kind == "onehot":
        x = (np.abs(x) > 1.5) * 10.0
    if kind == "huge":
        x = np.sign(x) * (200 if dtype == "float16" else 1e4) * (1 + 0.1 * np.abs(x))
    if kind == "sparse":
        x *= random.random(shape) < 0.05
    return x


def arrays(random: Generator, case: Case) -> list[mx.array]:
    """Draw q, k and v."""
    key_shape = (case.batch, case.kv_heads, case.keys)
    shapes = ((case.batch, case.heads, case.queries, case.dim), (*key_shape, case.dim), (*key_shape, case.value_dim))
    made = []
    for i, (shape, layout) in enumerate(zip(shapes, case.layouts, strict=True)):
        kind = "normal" if i == 2 and case.content == "huge" else case.content
        array = mx.array(contents(random, shape, kind, case.dtype).astype(np.float32)).astype(DTYPES[case.dtype])
        if layout == REPEATS_HEADS:
            array = mx.broadcast_to(array[:1, :1], shape)
        elif layout == REPEATS_ROWS:
            array = mx.broadcast_to(array[:, :, :1], shape)
        else:
            array = relaid(array, layout)
        made.append(array)
    return made


def array_mask(random: Generator, case: Case) -> mx.array | None:
    """Draw the array mask, or return None if the case has none."""
    if case.mask not in ("bool", "add"):
        return None
    whole = (case.batch, case.heads, case.queries, case.keys)
    shape = tuple(n if case.mask_axes >> i & 1 else 1 for i, n in enumerate(whole))[4 - case.mask_ndim :]
    if case.mask == "bool":
        share = random.choice([0.05, 0.5, 0.95, 0, 1.0])
        mask = mx.array(random.random(shape) < share)
    else:
        mask = _additive(random, shape, case)
    return relaid(mask, case.mask_layout) if mask.ndim == 4 else mask


def _additive(random: Generator, shape: tuple[int, ...], case: Case) -> mx.array:
    dtype = case.dtype if case.mask_dtype == "same" else case.mask_dtype
    x = np.asarray(random.standard_normal(shape))
    kind = case.mask_content
    if kind == "inf":
        x = np.where(random.random(shape) < 0.5, -np.inf, x)
    if kind == "infrows" and x.ndim >= 2:
        x = np.where(random.random((*shape[:-1], 1)) < 0.5, -np.inf, x)
    if kind == "1e9":
        x = np.where(random.random(shape) < 0.5, -1e9, 0.0)
    if kind == "all1e9":
        x = np.full(shape, -1e9)
    if kind == "allinf":
        x = np.full(shape, -np.inf)
    if kind == "alibi":
        x = -np.abs(x) * 50
    if kind == "zero":
        x = np.zeros(shape)
    if dtype == "float16":
        x = np.where(x == -1e9, -65504.0, x)
    return mx.array(x.astype(np.float32)).astype(DTYPES[dtype])
