"""Which GPU a rank of a group sees."""

import pytest

from attention.core.plan import RankSetting
from attention.engine.worker import own_gpu


@pytest.mark.parametrize(
    ("visible", "backend", "seen"),
    [
        (None, "nccl", ["0", "1"]),
        ("2, 5", "nccl", ["2", "5"]),
        ("3", "nccl", ["3", ""]),
        ("", "nccl", ["", ""]),
        (None, "ring", ["0", "0"]),
        ("4", "ring", ["4", "4"]),
        ("2,5", "ring", ["2", "5"]),
        ("", "ring", ["", ""]),
    ],
)
def test_a_rank_has_a_gpu_of_those_visible(visible, backend, seen):
    settings = [RankSetting(rank=n, ranks=2, backend=backend, place=n, places=2) for n in range(2)]
    assert [own_gpu(setting, visible) for setting in settings] == seen
