"""Masks as values: what they show, how they compose and compare, and what their block lists hold."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import UsageError, masks
from attention.masks import block_list
from attention.masks.block_list import BlockList, ListCache
from tests.support import mask_values

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.integers(1, 300))


def expanded(lists: BlockList) -> np.ndarray:
    """Return what a list says of every pair, read entry by entry."""
    batches, heads, (_, _, seq, kv_seq) = lists.batches, lists.heads, lists.shape
    q, k = lists.block_q, lists.block_k
    whole = np.zeros((batches * heads, lists.row_tiles * q, lists.key_tiles * k), bool)
    for plane in range(batches * heads):
        for row in range(lists.row_tiles):
            place = plane * lists.row_tiles + row
            listed = lists.entries[lists.offsets[place] : lists.offsets[place + 1]]
            assert (np.diff(listed[:, 0]) > 0).all()
            for key, index in listed:
                tile = np.ones((q, k), bool)
                if index >= 0:
                    words = lists.bits[index][:, np.arange(k) // 32]
                    tile = (words >> (np.arange(k) % 32)) & 1 == 1
                    part = tile[: seq - row * q, : kv_seq - key * k]
                    assert part.any()
                    assert not part.all()
                whole[plane, row * q : (row + 1) * q, key * k : (key + 1) * k] = tile
    return whole.reshape(batches, heads, *whole.shape[1:])[:, :, :seq, :kv_seq]


def transposed_entries(lists: BlockList) -> set[tuple[int, int, int, int]]:
    other = lists.transposed()
    assert len(other.offsets) == lists.batches * lists.heads * lists.key_tiles + 1
    found = set()
    for place in range(len(other.offsets) - 1):
        listed = other.entries[other.offsets[place] : other.offsets[place + 1]]
        assert (np.diff(listed[:, 0]) > 0).all()
        plane, key = divmod(place, lists.key_tiles)
        found |= {(plane, int(row), key, int(index)) for row, index in listed}
    return found


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 2**32), st.sampled_from([16, 37, 64, 128]), st.sampled_from([32, 64, 128]))
def test_a_list_is_the_mask_pair_by_pair(shape, seed, block_q, block_k):
    mask, seen = mask_values.draw(np.random.default_rng(seed), shape)
    lists = mask.block_list(shape, block_q, block_k)
    np.testing.assert_array_equal(np.broadcast_to(expanded(lists), shape), seen)
    assert lists.pairs == mask.pairs(shape) == seen.sum()
    assert (len(lists.offsets), len(lists.bits) >= 1) == (lists.batches * lists.heads * lists.row_tiles + 1, True)
    places = np.repeat(np.arange(len(lists.offsets) - 1), np.diff(lists.offsets))
    listed = zip(places, lists.entries, strict=True)
    by_row = {(*divmod(int(at), lists.row_tiles), *map(int, entry)) for at, entry in listed}
    assert transposed_entries(lists) == by_row


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(0, 2**32))
def test_the_dense_form_is_the_mask_pair_by_pair(shape, seed):
    mask, seen = mask_values.draw(np.random.default_rng(seed), shape)
    np.testing.assert_array_equal(np.broadcast_to(np.array(mask.dense(shape)), shape), seen)


@pytest.mark.parametrize("shape", [(1, 1, 128, 128), (1, 1, 100, 128), (1, 1, 128, 96)])
def test_every_window_and_prefix_ends_in_its_tile(shape):
    """Sizes at and beside a multiple of a tile's, which random ones seldom are."""
    _, _, q, k = mask_values.places(shape)
    for n in (multiple + beside for multiple in (16, 32, 64, 96) for beside in (-1, 0, 1)):
        for mask, seen in ((masks.window(n), (q >= k) & (q - k < n)), (masks.prefix(n), (k < n) & (q == q))):
            lists = mask.block_list(shape, 16, 32)
            np.testing.assert_array_equal(expanded(lists)[0, 0], seen[0, 0], f"{mask}")


def test_rows_before_the_first_key_share_no_bits():
    shape = (1, 1, 106, 64)
    seen = np.zeros((106, 64), bool)
    seen[42:82, :40] = seen[82:, 40:] = True
    lists = masks.documents([40, 24]).block_list(shape, 16, 32)
    np.testing.assert_array_equal(expanded(lists)[0, 0], seen)


def test_tiles_that_depend_on_the_distance_are_stored_once():
    window = masks.window(300).block_list((1, 4, 8192, 8192), 64, 64)
    assert len(window.bits) == 3  # at the diagonal, and two where the window ends, which 64 does not divide
    packed = (masks.causal() & masks.documents([2048] * 4)).block_list((1, 4, 8192, 8192), 64, 64)
    assert len(packed.bits) == 1
    dilated = masks.dilated(1000, 7).block_list((1, 1, 8192, 8192), 64, 64)
    assert len(dilated.bits) < 20


def test_documents_share_the_bits_of_a_boundary():
    lists = masks.documents([1000, 3000, 4192]).block_list((1, 1, 8192, 8192), 64, 64)
    assert len(lists.bits) < 20
    assert (lists.entries[:, 1] >= 0).sum() > 200


def test_values_are_equal_by_what_they_say():
    array = np.eye(4, dtype=bool)
    assert masks.causal() & masks.prefix(3) == masks.causal() & masks.prefix(3)
    assert masks.documents([2, 3]) == masks.documents(ids=[5, 5, 9, 9, 9]) == masks.documents(np.array([[2, 3]]))
    assert hash(masks.blocks(array, 16)) == hash(masks.blocks(mx.array(array), 16))
    assert masks.blocks(array, 16) != masks.blocks(~array, 16)
    assert masks.documents([2, 3]) != masks.documents([3, 2])
    assert masks.causal() | masks.causal() == masks.causal()
    assert masks.dilated(5, 1) == masks.window(5)


def test_a_function_is_equal_to_itself_alone():
    def f(b, h, q, k):
        return q >= k

    assert masks.where(f) == masks.where(f)
    assert masks.where(f) != masks.where(lambda b, h, q, k: q >= k)


def test_a_value_shows_its_parts():
    mask = masks.causal() & masks.documents([3, 5]) | masks.prefix(2)
    assert repr(mask) == "(causal() & documents([3, 5])) | prefix(2)"
    assert repr(masks.documents([16] * 64)) == "documents([16] * 64)"
    assert repr(masks.padding([3, 4], side="left")) == "padding([3, 4], side='left')"
    assert repr(masks.where(expanded)) == "where(expanded)"


def test_bounds_become_bounds():
    assert masks.of_pattern(masks.causal()).causal
    assert masks.of_pattern(masks.window(9) & masks.causal()).window == 9
    assert masks.of_pattern(masks.window(9) | masks.window(12)).window == 12
    assert masks.of_pattern(masks.window(9) | masks.causal()).causal
    assert masks.of_pattern(masks.window(9) | masks.prefix(1)).pattern is not None


@pytest.mark.parametrize("n", [2**31, 2**32 + 1, 2**63, 10**30])
def test_numbers_beyond_every_length_show_all_there_is(n):
    lengths = (1, 2, 40, 40)
    distance = np.arange(40)[:, None] - np.arange(40)
    for mask, shown in (
        (masks.window(n) | masks.prefix(1), (distance >= 0) | (np.arange(40) < 1)),
        (masks.prefix(n), distance == distance),
        (masks.dilated(n, 3), (distance >= 0) & (distance % 3 == 0)),
        (masks.dilated(2, n), distance == 0),
        (masks.blocks([[True]], n), distance == distance),
    ):
        for found in (np.array(mask.dense(lengths)), mask.block_list(lengths, 64, 32).dense()):
            assert (np.broadcast_to(found, lengths) == shown).all(), mask


@pytest.mark.parametrize("large", [2**31, 2**32])
def test_ids_beyond_int32_stay_apart(large):
    ids = np.array([0, large, 0, large, -large, 1, -large])
    mask, lengths = masks.documents(ids=ids), (1, 1, 7, 7)
    shown = (ids[:, None] == ids) & (ids >= 0)
    assert (np.array(mask.dense(lengths)) == shown).all()
    assert (mask.block_list(lengths, 64, 32).dense() == shown).all()


def test_a_picture_shows_full_partial_and_skipped_tiles():
    lists = (masks.causal() & masks.documents([64, 192])).block_list((1, 1, 256, 256), 64, 64)
    assert lists.picture() == "▒···\n·▒··\n·█▒·\n·██▒"
    assert masks.prefix(64).block_list((1, 1, 100, 256), 64, 64).picture(2) == "█·".replace("█", "▒")
    assert str(lists).startswith("7 of 16 tiles of 64 x 64, 4 of them partial (1 stored); 20,608 pairs, 31.4% of")


def test_lists_are_kept_by_value():
    shape = (1, 1, 256, 256)
    first = (masks.causal() & masks.prefix(7)).block_list(shape)
    assert (masks.causal() & masks.prefix(7)).block_list(shape) is first
    assert (masks.causal() & masks.prefix(8)).block_list(shape) is not first


def test_kept_lists_are_limited_in_bytes():
    made = [masks.prefix(n).block_list((1, 1, 256, 256)) for n in (1, 2, 3)]
    cache = ListCache(made[0].nbytes + made[1].nbytes)
    for n, one in enumerate(made):
        cache.get(n, lambda one=one: one)
    assert cache.get(2, lambda: made[0]) is made[2]
    assert cache.get(0, lambda: made[1]) is made[1]


def test_a_function_is_evaluated_only_where_needed():
    requested = []

    def f(b, h, q, k):
        requested.append(int(np.prod(np.broadcast_shapes(q.shape, k.shape))))
        return (q * k) % 3 == 0

    lists = (masks.where(f) & masks.window(100)).block_list((1, 1, 20_000, 20_000), 64, 64)
    assert sum(requested) < 20_000 * 400
    assert max(requested) <= block_list.MAX_CHUNK_PAIRS
    assert lists.pairs > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.window(0), "mask: window got n 0; it takes a whole number from 1"),
        (lambda: masks.dilated(2, 1.5), "mask: dilated got stride 1.5; it takes"),
        (masks.documents, "mask: documents takes lengths or ids, one of the two"),
        (lambda: masks.documents([1], ids=[0]), "mask: documents takes lengths or ids"),
        (lambda: masks.documents([3, 0]), "mask: documents got lengths [3, 0]; it takes whole numbers from 1"),
        (lambda: masks.documents([[3, 1], [2]]), "mask: documents got lengths that add up to [4, 2]"),
        (lambda: masks.documents(ids=[0.5]), "mask: documents got ids of float64"),
        (
            lambda: masks.documents(7),
            "int64, shape (); it takes a list of whole numbers, or one such list",
        ),
        (lambda: masks.documents([]), "mask: documents got lengths []; it takes whole numbers from 1"),
        (lambda: masks.padding([[3]]), "shape (1, 1); it takes a whole number or a list of them"),
        (lambda: masks.padding([1.5]), "mask: padding got lengths of float64"),
        (lambda: masks.padding([-1]), "mask: padding got lengths [-1]; it takes whole numbers from 0"),
        (lambda: masks.padding(3, side="top"), "mask: padding got side 'top'; it takes 'left' or 'right'"),
        (lambda: masks.blocks(np.ones((2, 2))), "mask: blocks got an array of float64 and shape (2, 2); it takes bool"),
        (lambda: masks.blocks(np.ones((2, 2), bool), 0), "mask: blocks got block 0"),
        (lambda: masks.blocks([[True], [True, False]], 8), "mask: blocks got an array of object"),
        (lambda: masks.documents(ids=np.array([2**63], np.uint64)), "mask: documents got ids of uint64"),
        (lambda: masks.where(3), "mask: where got int; it takes a function of (b, h, q, k)"),
        (lambda: masks.causal() & 3, "mask: got a mask combined with int"),
        (lambda: masks.alibi(3), "score_mod: alibi got slopes 3; it takes one number per head"),
        (lambda: masks.alibi([0.5, float("nan")]), "score_mod: alibi got a slope of nan; it takes numbers to 1e+28"),
        (lambda: masks.alibi([-1e300]), "score_mod: alibi got a slope of -1e+300; it takes numbers to 1e+28"),
        (lambda: masks.alibi(mx.zeros((2, 2))), "score_mod: alibi got slopes of float32, shape (2, 2)"),
    ],
)
def test_a_bad_value_is_named(make, words):
    with pytest.raises(UsageError) as error:
        make()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def raising(b, h, q, k):
    raise KeyError("no such table")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (masks.documents([3, 4]), "mask: documents got 7 positions in all; there are 8 keys"),
        (masks.documents([[8], [8], [8]]), "mask: documents got 3 sequences; the batch has 2"),
        (masks.documents(ids=[0, 1, 0]), "mask: documents got 3 positions in all; there are 8 keys"),
        (masks.padding([1, 2, 3]), "mask: padding got 3 lengths; it takes one for each of 2 sequences"),
        (masks.padding(9), "mask: padding got the length 9; there are 8 keys"),
        (masks.blocks(np.ones((1, 2), bool), 3), "mask: blocks got an array of shape (1, 1, 1, 2); with blocks of 3"),
        (masks.where(lambda b, h, q, k: q - k), "where(<lambda>): its function returned an array of int32; it must be"),
        (masks.where(lambda b, h, q, k: (q - k) * 0.5), "its function returned an array of float32; it must be bool"),
        (masks.where(lambda b, h, q, k: "yes"), "its function returned str; it must return a bool mlx.core.array"),
        (masks.where(lambda b, h, q, k: mx.ones((3, 5)) > 0), "its function returned shape (3, 5); it must broadcast"),
        (masks.where(raising), "where(raising): its function raised KeyError: 'no such table'"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, words):
    with pytest.raises(UsageError) as error:
        mask.block_list((2, 2, 8, 8))
    assert words in str(error.value)
    with pytest.raises(UsageError) as of_two:
        (mask & masks.documents([2])).block_list((2, 2, 8, 8))
    assert len(of_two.value.problems) == 2 or "documents" in words


@pytest.mark.parametrize(
    ("q", "k", "words"), [(0, 32, "block_q: got 0"), (8, 48, "block_k: got 48; it takes a multiple")]
)
def test_a_bad_tile_is_named(q, k, words):
    with pytest.raises(UsageError, match=words):
        masks.causal().block_list((1, 1, 8, 8), q, k)


@pytest.mark.compiles
def test_a_function_of_traced_arrays_is_named():
    def traced(limit):
        return masks.where(lambda b, h, q, k: k < limit).block_list((1, 1, 64, 64)).arrays()[0]

    with pytest.raises(UsageError, match="its result cannot be computed"):
        mx.compile(traced)(mx.array(3))


def test_and_instead_of_an_ampersand_is_refused() -> None:
    with pytest.raises(UsageError, match="combined by & and"):
        masks.causal() and masks.documents([4, 4])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.031, 0.0996, 0.1, 0.11, 1.0])
def test_whole_tiles_of_blocks_are_those_of_the_array(share):
    array = np.random.default_rng(4).random((2, 3, 40, 64)) < share
    made = masks.blocks(array, block=128).block_list((2, 3, 40 * 128, 64 * 128))
    where = np.argwhere(array.reshape(-1, 64))
    assert np.array_equal(made.row_of_entry(), where[:, 0])
    assert np.array_equal(made.entries, np.stack([where[:, 1], np.full(len(where), -1)], axis=1))


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 3, -5), (1, 2, 3.0, 5), 7, None, "1235"])
@pytest.mark.parametrize("mask", [masks.causal(), masks.causal() | masks.prefix(2)], ids=["band", "composed"])
def test_a_shape_that_is_none_is_named(mask: masks.Pattern, shape: object) -> None:
    for function in (mask.pairs, mask.block_list):
        with pytest.raises(UsageError, match=r"^shape: got .*; it takes \(B, H, Lq, Lk\)"):
            function(shape)  # type: ignore[arg-type]
