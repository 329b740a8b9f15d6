"""Masks, against brute force over single pairs."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention import UsageError, masks
from attention.core.mask_text import MaskSpec, visible_pairs
from attention.core.workload import Workload
from attention.masks import Mask
from attention.measure.reference import visible

lengths = st.integers(1, 24)
windows = st.none() | st.integers(1, 30)


def brute(mask: Mask, seq: int, kv_seq: int) -> np.ndarray:
    seen = np.ones((seq, kv_seq), dtype=bool)
    for row in range(seq):
        for key in range(kv_seq):
            position = row + kv_seq - seq
            if (mask.causal or mask.window is not None) and key > position:
                seen[row, key] = False
            if mask.window is not None and key <= position - mask.window:
                seen[row, key] = False
    return seen


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Mask, int, int, range, range]:
    seq, kv_seq = draw(lengths), draw(lengths)
    q0, k0 = draw(st.integers(0, seq - 1)), draw(st.integers(0, kv_seq - 1))
    rows = range(q0, draw(st.integers(q0 + 1, seq)))
    keys = range(k0, draw(st.integers(k0 + 1, kv_seq)))
    return Mask(causal=draw(st.booleans()), window=draw(windows)), seq, kv_seq, rows, keys


@given(tiles())
def test_a_tile_is_cut_out_of_the_whole(tile: tuple[Mask, int, int, range, range]) -> None:
    mask, seq, kv_seq, rows, keys = tile
    wanted = brute(mask, seq, kv_seq)[rows.start : rows.stop, keys.start : keys.stop]
    found = mask.tile(rows, keys, seq, kv_seq)
    assert mask.masks_any(rows, keys, seq, kv_seq) == (not wanted.all())
    assert (found is None) == wanted.all()
    if found is not None:
        np.testing.assert_array_equal(np.array(found), wanted)


@given(tiles())
def test_visible_keys_begin_and_end_with_a_seen_key(tile: tuple[Mask, int, int, range, range]) -> None:
    mask, seq, kv_seq, rows, _ = tile
    seen = brute(mask, seq, kv_seq)[rows.start : rows.stop].any(axis=0)
    visible = mask.visible_keys(rows, seq, kv_seq)
    assert not seen[: visible.start].any()
    assert not seen[visible.stop :].any()
    if visible:
        assert seen[visible.start]
        assert seen[visible.stop - 1]


@given(lengths, lengths, st.booleans(), windows)
def test_pairs_and_blind_rows_are_counted_exactly(seq: int, kv_seq: int, causal: bool, window: int | None) -> None:
    mask = Mask(causal=causal, window=window)
    seen = brute(mask, seq, kv_seq)
    spec = MaskSpec(window=window) if window else MaskSpec(causal=causal)
    assert visible_pairs(spec, seq, kv_seq, 1) == seen.sum()
    assert mask.empty_rows(seq, kv_seq) == (~seen.any(axis=1)).sum()
    assert not seen[: mask.empty_rows(seq, kv_seq)].any()


def test_bool_and_additive_arrays_join_with_positions() -> None:
    causal = Mask(causal=True).materialize(3, 3)
    allowed = mx.array([[True, False, True]])
    assert np.array(masks.combine(causal, allowed)).tolist() == [
        [True, False, False],
        [True, False, False],
        [True, False, True],
    ]
    added = masks.combine(causal, mx.array([[1.0, 2.0, 3.0]]))
    assert np.array(added).tolist() == [[1.0, -np.inf, -np.inf], [1.0, 2.0, -np.inf], [1.0, 2.0, 3.0]]


def test_a_blind_row_is_opened_and_the_others_are_left() -> None:
    mask = mx.array([[False, False], [True, False]])
    opened, seeing = masks.opened(mask)
    assert np.array(seeing).tolist() == [[False], [True]]
    assert np.array(opened).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (mx.zeros((3, 5)), "got shape (3, 5); it takes one that broadcasts to (B, H, Lq, Lk) = (1, 2, 4, 5)"),
        (mx.zeros((1, 1, 1, 4, 5)), "got shape (1, 1, 1, 4, 5)"),
        (
            mx.zeros((4, 5), mx.int32),
            "got an array of int32; it takes bool (True is seen), or numbers to add in float32",
        ),
    ],
)
def test_an_array_that_does_not_fit_is_reported(array: mx.array, words: str) -> None:
    with pytest.raises(UsageError) as error:
        masks.check_array(array, (1, 2, 4, 5))
    assert words in str(error.value)


@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (1, 4, 1), (2, 1, 1), (1, 2, 4, 5)])
def test_arrays_that_broadcast_are_taken(shape: tuple[int, ...]) -> None:
    array = mx.zeros(shape)
    masks.check_array(array, (1, 2, 4, 5))
    assert mx.broadcast_to(array, (1, 2, 4, 5)).shape == (1, 2, 4, 5)


@pytest.mark.parametrize(
    "text", ["documents:100", "prefix:64+window:70", "strided:30,7", "blocks:0.3", "prefix:9+causal"]
)
@pytest.mark.parametrize(("seq", "kv_seq"), [(256, 256), (130, 300), (300, 130)])
def test_a_mask_string_is_its_value(text: str, seq: int, kv_seq: int) -> None:
    workload = Workload(mask=text, batch=2, heads=2, seq=seq, kv_seq=kv_seq)
    pattern = masks.of_workload(workload).pattern
    assert pattern is not None
    shape = (2, 2, seq, kv_seq)
    assert pattern.pairs(shape) == workload.pairs
    found = np.broadcast_to(np.array(pattern.dense(shape)), shape)
    for head in range(2):
        np.testing.assert_array_equal(found[0, head], visible(workload.mask_spec, np.arange(seq), seq, kv_seq, head))


@pytest.mark.parametrize("pattern", [masks.prefix(1), masks.causal(), masks.window(3) | masks.prefix(40)], ids=str)
def test_bits_are_stored_row_by_row(pattern: masks.Pattern) -> None:
    assert pattern.block_list((1, 1, 70, 90), 64, 64).bits.flags.c_contiguous
