"""The family of quantized keys and values: calls of the broad family, packed in random formats and memory layouts.

The order of the random draws is part of the definition of a case: a change of it, or of one in `cases` or in
`mask_values`, changes every seed.
"""

from dataclasses import asdict
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.random import Generator

from attention.core.kv_format import parse_format
from attention.quantized_kv import QuantizedArray, quantized
from tests.fuzz import cases
from tests.fuzz.problem import DTYPES, Mode, Problem
from tests.support import mask_values
from tests.support.quantized_values import FORMATS, laid_out

SEED_OF_FAMILY: Final = 717
WIDTHS: Final = (32, 64, 64, 96, 128, 128, 160, 192, 256)


def problem(seed: int, number: int, mode: Mode) -> Problem | None:
    """Make case `number` of a seed; None if the mode excludes it."""
    random = np.random.default_rng([SEED_OF_FAMILY, seed, number])
    case = cases.draw(random)
    forms = [str(random.choice(FORMATS)) for _ in range(2)]
    case.dim, case.value_dim = (_width(random, form) for form in forms)
    if mode == "demo" and case.batch * case.heads * case.queries * case.keys > cases.MAX_DEMO_SCORES:
        return None
    if case.content in ("huge", "denormal"):
        case.content = "normal"
    if case.content == "big":  # scores whose rounding in float32 depends on the order of sums
        case.scale = None
    case.layouts = (case.layouts[0], 0, 0)
    q, k, v = cases.arrays(random, case)
    packed = [_packed(random, x, form) for x, form in zip((k, v), forms, strict=True)]
    mask = cases.array_mask(random, case)
    made = Problem(q, *packed, "causal" if case.mask == "causal" else mask, case.scale, case.window, case.softcap)
    made.facts = {**asdict(case), "formats": forms}
    if case.mask == "none" and random.random() < 0.5:
        made.mask, made.seen = mask_values.draw(random, (case.batch, case.heads, case.queries, case.keys))
        made.facts["value"] = repr(made.mask)
    made.transform = str(random.choice(["plain", "plain", "compile"]))
    if mode == "gradient":
        shape = (case.batch, case.heads, case.queries, case.value_dim)
        cotangent = random.standard_normal(shape).astype(np.float32)
        made.cotangent = mx.array(cotangent).astype(DTYPES[case.dtype])
        made.transform = str(random.choice(["plain", "compile", "grad_compile"]))
        made.has_mask_gradient = case.mask == "add" and case.mask_content in ("normal", "inf", "zero")
    return made


def _width(random: Generator, form: str) -> int:
    group = parse_format(form).group_size
    return int(random.choice([width for width in WIDTHS if width % group == 0]))


def _packed(random: Generator, x: mx.array, form: str) -> QuantizedArray:
    """Quantize an array; its scales may be of another dtype, and its parts views of a longer buffer."""
    made = quantized(x.astype(mx.float32) if random.random() < 0.2 else x, form)
    layout = int(random.choice([0, 1, 2, 2, 3, 4]))
    if layout < 4:
        return laid_out(made, layout)
    return made.with_arrays([mx.broadcast_to(part[:1, :1], part.shape) for part in made.arrays])
