"""The family of masks as values: the calls of the broad family with a composed mask, and some of them with ALiBi.

The order of the random draws is part of the definition of a case: a change of it, or of one in `cases` or in
`mask_values`, changes every seed.
"""

from dataclasses import asdict

import mlx.core as mx
import numpy as np

from tests.fuzz import cases
from tests.fuzz.problem import DTYPES, Mode, Problem
from tests.support import mask_values

SEED_OF_FAMILY = 505


def problem(seed: int, number: int, mode: Mode) -> Problem | None:
    """Make case `number` of a seed; None if the mode excludes it."""
    random = np.random.default_rng([SEED_OF_FAMILY, seed, number])
    case = cases.draw(random)
    case.mask, case.mask_content = "value", ""
    if mode == "demo" and case.batch * case.heads * case.queries * case.keys > cases.MAX_DEMO_SCORES:
        return None
    if mode == "gradient" and case.content == "huge":
        case.content = "normal"
    q, k, v = cases.arrays(random, case)
    mask, seen = mask_values.draw(random, (case.batch, case.heads, case.queries, case.keys))
    window = case.window if random.random() < 0.3 else None
    slopes = tuple(random.choice([0.5, 0.1, 2.0**-8, 0.0], case.heads).tolist()) if random.random() < 0.3 else None
    cotangent, transform = None, str(random.choice(["plain", "plain", "compile", "vmap"]))
    if mode == "gradient":
        shape = (case.batch, case.heads, case.queries, case.value_dim)
        cotangent = mx.array(random.standard_normal(shape).astype(np.float32)).astype(DTYPES[case.dtype])
        transform = str(random.choice([*cases.GRADIENT_TRANSFORMS, "vmap_grad"]))
    made = Problem(q, k, v, mask, case.scale, window, case.softcap, cotangent=cotangent, transform=transform)
    made.seen, made.slopes = seen, slopes
    made.facts = {**asdict(case), "window": window, "value": repr(mask), "slopes": slopes}
    return made
