import doctest
from pathlib import Path

import numpy as np
import pytest

from attention import masks
from attention.core.errors import UsageError
from attention.distributed.exchange import Seen, make_exchange
from attention.distributed.layout import LAYOUTS, Layout, make_layout

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


def test_the_examples_of_the_page_run():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert (failed, tried > 3) == (0, True)


def held(layout: Layout) -> list[int]:
    return sorted(p for chunks in layout.chunks for start, stop in chunks for p in range(start, stop))


@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "balanced"])
@pytest.mark.parametrize(("seq", "ranks"), [(1, 1), (1, 3), (37, 4), (1000, 3), (4096, 8), (5000, 7)])
def test_each_position_is_on_one_rank(kind, seq, ranks):
    assert held(make_layout(seq, ranks, kind)) == list(range(seq))


def test_zigzag_pairs_first_and_last_chunks():
    layout = make_layout(1024, 2, "zigzag")
    assert layout.chunks == (((0, 256), (768, 1024)), ((256, 768),))


def test_zigzag_balances_causal_pairs():
    layout = make_layout(8192, 4, "zigzag")
    pairs = [sum(stop * (stop + 1) - start * (start + 1) for start, stop in own) for own in layout.chunks]
    assert max(pairs) == min(pairs)


def test_long_chunks_begin_at_whole_tiles():
    layout = make_layout(100_000, 3, "zigzag")
    assert all(start % 128 == 0 for own in layout.chunks for start, _ in own)


def test_balanced_layout_follows_costs_and_speeds():
    assert make_layout(1024, 2, "balanced", costs=[0, 0, 0, 0, 0, 0, 1, 1]).chunks == (((0, 896),), ((896, 1024),))
    assert make_layout(1024, 2, "contiguous", weights=[3, 1]).chunks == (((0, 768),), ((768, 1024),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "seq: got 0; it takes a whole number from 1"),
        ((8, 0), "ranks: got 0; it takes a whole number from 1 to 4096"),
        ((8, 2, "zigzak"), "layout: got 'zigzak'; it takes "),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        make_layout(*arguments)


def test_bad_weights_are_named():
    with pytest.raises(UsageError, match=r"weights: got \[1\]; it takes one positive number for each of 2 ranks"):
        make_layout(8, 2, weights=[1])


def test_layout_names_are_complete():
    assert {make_layout(8, 2, kind).kind for kind in LAYOUTS} == set(LAYOUTS)


def test_window_moves_only_its_reach():
    layout = make_layout(8192, 4, "contiguous")
    exchange = make_exchange(layout, layout, Seen((1, 1), causal=True, window=100))
    assert exchange.slot == 99
    assert [exchange.received(rank) for rank in range(4)] == [0, 99, 99, 99]


def test_documents_within_ranks_move_nothing():
    layout = make_layout(1024, 2, "contiguous")
    mask = masks.causal() & masks.documents([256] * 4)
    assert make_exchange(layout, layout, Seen((1, 1), pattern=mask)).slot == 0


def test_part_of_a_mask_is_its_rows_and_keys():
    whole = masks.causal() & masks.documents([300, 212]) | masks.prefix(7)
    dense = np.array(whole.dense((1, 1, 512, 512)))[0, 0]
    for rows, keys in ((((0, 128), (384, 512)), ((0, 256), (384, 512))), (((5, 50), (60, 61)), ((3, 300),))):
        from attention.masks.parts import Section, indices

        part = Section(whole, (512, 512), rows, keys)
        cut = dense[np.ix_(indices(rows), indices(keys))]
        made = part.block_list((1, 1, *cut.shape), 64, 64)
        assert np.array_equal(made.dense()[0, 0], cut)
        assert made.pairs == cut.sum()
        assert np.array_equal(np.array(part.dense((1, 1, *cut.shape)))[0, 0], cut)
