"""Every specialisation in float16: clean in both schedules, aligned or not, accurate by FlashAttention 3's rule."""

import pytest

from attention.kernels.metal.tiles import HEAD_DIMS
from tests.support.metal.case import KINDS, problems_in_all_runs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_forward_and_gradients_are_right_and_clean(head_dim, kind):
    assert problems_in_all_runs(head_dim, "float16", kind) == {}
