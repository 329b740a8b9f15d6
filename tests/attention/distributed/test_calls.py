"""The calls that ranks make of their rows and keys, one after another in this process."""

from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from attention import attention, masks
from attention.arguments import check_mask, check_score_mod
from attention.distributed import make_layout
from attention.distributed.attend import Problem, _attend_call
from attention.distributed.collectives import Group
from attention.distributed.exchange import make_exchange
from attention.implementations import load_implementation
from attention.masks import Pattern

HEADS, RANKS = 4, 3


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    "mask", [masks.documents([10, 27]), masks.window(9) | masks.prefix(30), masks.causal() & masks.documents([10, 27])]
)
def test_biased_calls_have_the_logsumexps_of_the_sequence(mask: Pattern, kind: str) -> None:
    q, k, v = (mx.random.normal((1, heads, 37, 8), key=mx.random.key(n)) for n, heads in enumerate((HEADS, 2, 2)))
    bias = masks.alibi([0.5, -0.2, 0.1, 0.02])
    wanted = attention(q, k, v, mask=mask, score_mod=bias, return_lse=True)
    layout = make_layout(37, RANKS, kind)  # type: ignore[arg-type]
    problem = Problem(
        load_implementation("practical"),
        8**-0.5,
        check_score_mod(bias, check_mask(mask, None, q, k), HEADS),
        None,
        layout,
        layout,
        cast("Group", None),  # nothing is sent
        return_lse=True,
    )
    exchange = make_exchange(layout, layout, problem.seen((1, HEADS)))
    for rank in range(RANKS):
        place = np.concatenate([np.arange(*chunk) for chunk in layout.chunks[rank]])
        needed = mx.array(np.concatenate([np.arange(*chunk) for chunk in exchange.needed[rank]]))
        for call in exchange.calls[rank]:
            rows = mx.array(place)
            found = _attend_call(q[:, :, rows], k[:, :, needed], v[:, :, needed], call, problem, (0, HEADS))
            own = mx.array(place[slice(*call.rows)])
            for one, other in zip(found, wanted, strict=True):
                assert one is not None
                np.testing.assert_allclose(np.array(one), np.array(other[:, :, own]), atol=1e-5)
