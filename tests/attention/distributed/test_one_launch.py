"""Where the keys and rows of a call in one launch are, on each rank: by positions, without a GPU."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from attention import masks
from attention.distributed import attend, attention, make_layout, one_launch
from attention.distributed.exchange import Seen, make_exchange
from attention.distributed.one_launch import TILE, Arrangement, arrange

CAUSAL = Seen((1, 8), causal=True)


def window(keys: int) -> Seen:
    return Seen((1, 8), causal=True, window=keys)


def positions(layout, rank):
    return [p for start, stop in layout.chunks[rank] for p in range(start, stop)]


def key_positions(own: Arrangement, layout, rank, contributions) -> list[int]:
    """Return the positions of a call's keys, as the kernel finds them."""
    far = [None] * own.plan.rows
    for other, first, place, count in own.plan.needed:
        far[place : place + count] = contributions[other][first : first + count]
    mine = positions(layout, rank)
    found = []
    for number, (is_far, row) in enumerate(own.sources):
        tile = (far if is_far else mine)[row : row + TILE]
        assert len(tile) == TILE or number == len(own.sources) - 1  # the kernel reads zeros beyond an array only
        found += tile
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "seq", "seen"),
    [
        ("zigzag", 4096, CAUSAL),
        ("zigzag", 5000, CAUSAL),
        ("zigzag", 4096, Seen((1, 8))),
        ("zigzag", 8192, window(300)),
        ("contiguous", 8192, window(300)),
        ("contiguous", 5000, window(1000)),
        ("contiguous", 5001, Seen((1, 8))),
    ],
)
def test_keys_and_rows_are_where_the_kernel_looks(kind, seq, seen, ranks):
    layout = make_layout(seq, ranks, kind)
    arranged = arrange(make_exchange(layout, layout, seen))
    assert arranged is not None
    contributions = []
    for rank, own in enumerate(arranged):
        mine, sent = positions(layout, rank), [None] * own.plan.contributed[rank]
        for _, first, place, count in own.plan.sent:
            sent[place : place + count] = mine[first : first + count]
        contributions.append(sent)
    for rank, own in enumerate(arranged):
        keys = key_positions(own, layout, rank, contributions)
        assert len(keys) == own.keys
        assert keys == sorted(keys)
        for row, position in enumerate(positions(layout, rank)):
            place = row + own.shifts[row >= own.second]
            if seen.causal:
                assert keys[place] == position
                first = 0 if seen.window is None else max(0, position - seen.window + 1)
                assert keys[max(0, place - (position - first))] == first
        if not seen.causal:
            assert keys == list(range(seq))


def test_calls_that_the_kernel_does_not_take():
    short = make_layout(100, 2, "zigzag")
    assert arrange(make_exchange(short, short, CAUSAL)) is None  # chunks are not whole tiles
    alone = make_layout(4096, 1, "contiguous")
    assert arrange(make_exchange(alone, alone, CAUSAL)) is None  # nothing is moved


@pytest.fixture
def lookups(monkeypatch):
    """The problems for which a launch was looked for, on a simulated GPU."""
    found = []

    def find_run(q, k, v, problem):
        found.append(problem)
        return lambda q, k, v: [q, q[..., 0]]

    monkeypatch.setattr(attend, "current_backend", lambda: "cuda")
    monkeypatch.setattr(one_launch, "is_traced", lambda *arrays: False)
    monkeypatch.setattr(attend, "_find_run", find_run)
    attend._known.clear()
    yield found
    attend._known.clear()


def test_equal_calls_look_for_their_launch_once(lookups):
    group = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    x = mx.zeros((1, 2, 128, 64), mx.bfloat16)
    different = [
        {},
        {"mask": "causal"},
        {"window": 100},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"layout": "contiguous"},
        {"return_lse": True},
        {"mask": masks.prefix(30) | masks.window(40)},
    ]
    for count, keywords in enumerate(different, 1):
        for _ in range(3):
            attention(x, x, x, group=group, implementation="poc", **keywords)
        assert len(lookups) == count, keywords
    other = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    attention(x, x, x, group=other, implementation="poc")
    attention(x, x[:, :1], x[:, :1], group=group, implementation="poc")
    assert len(lookups) == len(different) + 2
