"""Arguments of calls over several ranks, of which this process is one."""

import mlx.core as mx
import pytest

from attention import attention, distributed, quantized
from attention.core.errors import UnsupportedError, UsageError
from attention.core.workload import Workload
from attention.streaming import StreamingKV
from benchmarks.distributed.measure import OneOfRanks

OF_TWO = OneOfRanks(0, 2)


def arrays(rows: int = 32, heads: int = 4) -> list[mx.array]:
    return [mx.zeros((1, each, rows, 64)) for each in (heads, heads // 2, heads // 2)]


@pytest.mark.parametrize("kind", ["heads", "replicated"])
def test_a_layout_by_name_may_have_all_rows_on_each_rank(kind: str):
    q, k, v = arrays()
    assert attention(q, k, v, group=OF_TWO, layout=kind, implementation="baseline").shape == q.shape


def test_heads_need_no_logsumexp():
    q, k, v = arrays()
    assert attention(q, k, v, group=OF_TWO, layout="heads", implementation="mlx").shape == q.shape


def test_a_layout_with_unequal_parts_is_refused_on_every_rank():
    for rank in range(4):
        with pytest.raises(UsageError, match="zigzag of 148 rows does not give each of 4 ranks 37"):
            attention(*arrays(37), group=OneOfRanks(rank, 4))


def test_keys_that_ranks_do_not_take_are_refused():
    q, k, v = arrays()
    state = StreamingKV(4, 32)
    with pytest.raises(UnsupportedError, match="k is a QuantizedArray; with a group it takes an array"):
        attention(q, quantized(k), quantized(v), group=OF_TWO)
    with pytest.raises(UnsupportedError, match="k is a StreamingKV; with a group it takes an array"):
        attention(q, state, state, group=OF_TWO)


def test_what_is_no_group_is_named():
    with pytest.raises(UsageError, match="group: got 2; it takes a group"):
        attention(*arrays(), group=2)


def test_arrays_are_checked_on_a_rank_without_rows_too():
    q, k, v = arrays(0)
    with pytest.raises(UsageError, match="k: got width 32; it takes q's width, 64"):
        attention(q, k[..., :32], v, group=OF_TWO, layout=distributed.make_layout(1, 2))


@pytest.mark.parametrize(
    ("q", "words"), [([1.0], "q: got list; it takes"), (mx.zeros((2, 2)), r"q: got shape \(2, 2\)")]
)
def test_rows_that_no_layout_can_be_of_are_named(q: object, words: str):
    _, k, v = arrays()
    with pytest.raises(UsageError, match=words):
        attention(q, k, v, group=OF_TWO)


@pytest.mark.parametrize(("ranks", "weights", "words"), [(0, None, "ranks: got 0"), (2, [1], "weights: got")])
def test_the_planner_refuses_numbers_that_are_none(ranks: int, weights: list[float] | None, words: str):
    with pytest.raises(UsageError, match=words):
        distributed.decide(Workload(kv_seq=64, pass_="decode"), ranks, weights=weights)


@pytest.mark.parametrize("name", ["layout", "key_layout"])
def test_a_part_of_a_sequence_needs_its_group(name: str):
    """Without it the call computed attention over the part alone."""
    given = {name: distributed.make_layout(64, 2)}
    with pytest.raises(UsageError, match=f"^{name}: got one of 2 ranks, and no group"):
        attention(*arrays(), **given)
    with pytest.raises(UsageError, match=f"^{name}: got 3"):
        attention(*arrays(), **{name: 3})
    whole = {name: distributed.make_layout(32, 1)}
    assert attention(*arrays(), **whole).shape == arrays()[0].shape


def test_the_planner_names_what_is_no_workload():
    with pytest.raises(UsageError, match=r"^workload: got 512"):
        distributed.decide(512, 2)
