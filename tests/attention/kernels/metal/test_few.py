"""Few queries, whose keys are split: every head dim, type and kind is clean and accurate, and joined if split.

The number of rows of a tile alternates between cases; all three numbers with all the others would take
three times as long.
"""

import pytest

from attention.kernels.metal.tiles import DECODE_ROWS, HEAD_DIMS, SIZES
from tests.support.metal.case import KINDS, problems_of_few_in_all_runs

pytestmark = pytest.mark.slow
CASES = [
    (head_dim, dtype, DECODE_ROWS[(i + j + k) % len(DECODE_ROWS)], kind)
    for i, dtype in enumerate(SIZES)
    for j, head_dim in enumerate(HEAD_DIMS)
    for k, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("head_dim", "dtype", "rows", "kind"), CASES)
def test_few_queries_are_right_and_clean(head_dim, dtype, rows, kind):
    assert problems_of_few_in_all_runs(head_dim, dtype, rows, kind) == {}


def test_every_kind_and_every_type_meets_every_number_of_rows():
    for place in (1, 3):
        met = {(case[2], case[place]) for case in CASES}
        assert len(met) == len(DECODE_ROWS) * len({case[place] for case in CASES})
