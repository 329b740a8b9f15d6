"""Block lists: right and clean, exactly the dense kernels where the pairs are the same, and as few loads as tiles."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from attention.core.errors import UsageError
from attention.core.route import NO_NEEDS
from attention.core.workload import Workload
from attention.kernels import metal
from attention.kernels.metal import gradients, launch, selfcheck
from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.lists import RECORD, list_arrays, lists_of_pattern, visible_pairs
from attention.kernels.metal.path import known_results, route
from attention.kernels.metal.tiles import HEAD_DIMS, LIST_KEYS, LIST_QUERIES, SIZES
from attention.masks import blocks, causal, dilated, documents, padding, prefix, where, window
from tests.support.block_lists import lists_of, random_pairs
from tests.support.metal.case import (
    LISTED,
    problems,
    problems_of,
    problems_of_lists_in_all_runs,
    with_lists,
)
from tests.support.metal.device import Device, needs_verifier, on_a_mac

SHAPE = CallShape(1, 4, 2, 100, 150, 64, "float16")
CALL = LISTED["lists of heads"].call(64, "float16")


@pytest.fixture
def device():
    with on_a_mac(Device()) as made:
        yield made


def results(given, shape, call):
    """Return output, logsumexp and gradients."""
    arrays = given.arrays(shape)
    outputs = launch.forward(arrays, shape, call)
    return [*outputs[:2], *launch.backward(arrays, outputs, given.cotangent, None, shape, call)[:3]]


def test_forward_and_gradients_are_right_and_clean(device):
    assert problems(SHAPE, LISTED["lists of heads"]) == []


@pytest.mark.thorough
def test_lists_of_causal_pairs_are_bitwise_the_causal_kernel(device):
    shape, causal = replace(SHAPE, heads=2, kv_heads=1, queries=70, keys=100), CallParams(CALL.scale, causal=True)
    given = selfcheck.inputs(shape, causal)
    seen = np.arange(shape.keys) <= np.arange(shape.queries)[:, None] + shape.keys - shape.queries
    listed = replace(with_lists(given, seen[None, None]), slopes=mx.zeros(shape.heads))
    for ours, expected in zip(results(listed, shape, CALL), results(given, shape, causal), strict=True):
        assert np.array_equal(np.array(ours), np.array(expected))


def test_rows_and_keys_without_entries_give_zero(device):
    given = with_lists(selfcheck.inputs(SHAPE, CALL), np.zeros((1, 1, SHAPE.queries, SHAPE.keys), np.bool_))
    output, logsumexp, *gradients = results(given, SHAPE, CALL)
    assert mx.all(mx.isneginf(logsumexp))
    assert not any(np.any(np.array(each)) for each in (output, *gradients))


@needs_verifier
def test_keys_are_loaded_for_blocks_with_visible_pairs_alone(device):
    seen = np.zeros((1, 1, 100, 150), np.bool_)
    seen[..., 40:64, 64:96] = seen[..., 64:, 128:] = True  # the second half of a tile's rows, and a tile at both ends
    assert problems_of(with_lists(selfcheck.inputs(SHAPE, CALL), seen), SHAPE, CALL) == []
    reads = {one.kernel: one.counts.reads for one in device.launches}
    of_keys = SHAPE.heads * SHAPE.head_dim * (1 * 32 + 2 * 22)
    assert [reads["forward"][name] for name in "kv"] == [of_keys] * 2
    assert [reads["backward_query"][name] for name in "kv"] == [of_keys] * 2
    assert reads["backward_key"]["q"] == SHAPE.heads * SHAPE.head_dim * (32 + 36)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTED)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", SIZES)
def test_every_specialisation_is_right_and_clean(dtype, head_dim, kind):
    assert problems_of_lists_in_all_runs(head_dim, dtype, kind) == {}


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 7])
def test_few_queries_with_lists_are_one_launch(device, queries):
    shape = CallShape(2, 4, 2, queries, 600, 64, "bfloat16")
    assert problems(shape, LISTED["lists and all"], backward=False) == []
    assert [one.kernel for one in device.launches] == ["forward"]


@pytest.mark.parametrize("planes", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_the_longest_lists_are_scheduled_first_and_each_once(planes):
    seen = random_pairs((*planes, 200, 300), seed=1)
    lists = lists_of(seen, LIST_QUERIES, LIST_KEYS)
    made = list_arrays(lists, group=2)
    for records, group in ((made.lists, 1), (made.key_lists, 2)):
        shape = records.shape[:3]
        lengths = np.array(records[..., 1] - records[..., 0])
        assert lengths.sum() == len(lists.entries)
        heads = max(1, shape[1] // group)
        whole = lengths.reshape(shape[0], heads, -1, shape[2]).sum(axis=2)
        places = np.array(records.reshape(-1, RECORD)[: whole.size, 2:5])
        assert len({tuple(place) for place in places}) == whole.size
        in_order = [whole[tuple(place)] for place in places]
        assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("planes", [(1, 1), (2, 4)])
def test_visible_pairs_of_the_arrays_are_those_of_the_mask(planes):
    seen = random_pairs((*planes, 100, 150), seed=2)
    made = list_arrays(lists_of(seen, LIST_QUERIES, LIST_KEYS), group=1)
    assert np.array_equal(np.array(visible_pairs(made.lists, made.entries, made.bits, 100, 150)), seen)


def test_visible_pairs_of_empty_lists_are_none():
    made = list_arrays(lists_of(np.zeros((1, 1, 5, 9), np.bool_), LIST_QUERIES, LIST_KEYS), group=1)
    assert not mx.any(visible_pairs(made.lists, made.entries, made.bits, 5, 9))


@pytest.fixture
def checked(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))


def test_a_pattern_is_attended_after_its_own_self_check(device, checked):
    mx.random.seed(4)
    q, k, v = (mx.random.normal((1, heads, 90, 64)).astype(mx.float16) for heads in (4, 2, 2))
    slopes = mx.array([0.0, 0.1, 0.2, 0.3])
    pattern = documents([50, 40]) & causal() | prefix(3)

    def ours(q, k, v):
        return metal.flash_attention(q, k, v, scale=0.125, pattern=pattern, alibi=slopes)

    def plainly(q, k, v):
        bias = slopes[:, None, None] * (mx.arange(90) - mx.arange(90)[:, None])
        mask = mx.where(pattern.dense((1, 4, 90, 90)), bias, -mx.inf)
        return mx.fast.scaled_dot_product_attention(*(x.astype(mx.float32) for x in (q, k, v)), scale=0.125, mask=mask)

    found, made = mx.vjp(ours, [q, k, v], [q])
    right, expected = mx.vjp(plainly, [q, k, v], [q.astype(mx.float32)])
    for a, b in zip((*found, *made), (*right, *expected), strict=True):
        assert np.allclose(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)), atol=2e-2)
    assert [verdict.name for verdict in known_results()] == [
        "backward float16 D=64 block lists alibi",
        "forward float16 D=64 block lists alibi",
    ]


@pytest.mark.slow
def test_gradients_through_the_score_matrix_are_right(device):
    shape = replace(SHAPE, dtype="float32")
    given = selfcheck.inputs(shape, CALL)
    made = gradients.plain_gradients(given.arrays(shape), given.cotangent, None, CALL)
    assert selfcheck.gradient_disagreement(given, CALL, made[:3]) is None


@pytest.mark.slow
def test_the_gradient_of_the_slopes_is_that_of_the_score_matrix(device, checked):
    q, k, v = (mx.random.normal((1, heads, 70, 64), key=mx.random.key(heads)).astype(mx.float16) for heads in (4, 2, 2))

    def loss(slopes):
        out = metal.flash_attention(q, k, v, scale=0.125, pattern=window(20) | prefix(2), alibi=slopes)
        return out.astype(mx.float32).sum()

    slopes, step = mx.array([0.0, 0.1, 0.2, 0.3]), mx.array([0.0, 1.0, 0.0, 0.0])
    around = [loss(slopes + 0.02 * sign * step).item() for sign in (-1, 1)]
    assert mx.grad(loss)(slopes)[1].item() == pytest.approx((around[1] - around[0]) / 0.04, rel=0.02)


@pytest.mark.slow
def test_vmap_folds_lists_that_differ_between_batches(device, checked):
    pattern = padding([60, 35])
    q = mx.random.normal((3, 2, 2, 60, 64), key=mx.random.key(1)).astype(mx.float16)
    k, v = (mx.random.normal((2, 1, 60, 64), key=mx.random.key(at)).astype(mx.float16) for at in (2, 3))

    def attend(q):
        return metal.flash_attention(q, k, v, scale=0.125, pattern=pattern)

    def gradient(q):
        return mx.grad(lambda q: (attend(q) * q).sum())(q)

    for each in (attend, gradient):
        found, right = mx.vmap(each)(q), mx.stack([each(one) for one in q])
        assert np.allclose(np.array(found), np.array(right), atol=2e-3)


def test_a_pattern_that_does_not_fit_is_named(device):
    q = mx.zeros((1, 1, 40, 64))
    with pytest.raises(UsageError, match="documents"):
        metal.flash_attention(q, q, q, scale=1.0, pattern=documents([30, 30]))


@pytest.mark.parametrize(
    ("workload", "path"),
    [
        (Workload(seq=512, head_dim=64, mask="documents:128"), "Metal kernel, lists"),
        (Workload(seq=1, kv_seq=4096, head_dim=64, mask="documents:128"), "Metal kernel, lists"),
        (Workload(seq=1, kv_seq=4096, head_dim=64), "Metal kernel, split K"),
    ],
    ids=str,
)
def test_the_route_names_the_lists(device, checked, workload, path):
    made = route(workload, NO_NEEDS)
    assert made.path == path
    assert ("not split" in made.reason) == (path == "Metal kernel, lists" and workload.seq == 1)


@st.composite
def parts(draw, batch, heads, queries, keys):
    """Draw one part of a mask for a call of this shape."""
    length = st.integers(1, keys)
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    block = draw(st.sampled_from([5, 16, 32, 64, 100]))
    cells = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        -(-queries // block),
        -(-keys // block),
    )
    cuts = np.sort(random.integers(0, keys + 1, (batch, 3)))
    return draw(
        st.one_of(
            st.just(causal()),
            length.map(window),
            length.map(prefix),
            st.builds(dilated, length, st.integers(1, 40)),
            st.just(documents(ids=(np.arange(keys) >= cuts[:, :, None]).sum(axis=1) - 1)),
            st.builds(
                padding,
                st.lists(st.integers(0, keys), min_size=batch, max_size=batch),
                st.sampled_from(["left", "right"]),
            ),
            st.just(blocks(random.random(cells) < 0.5, block)),
            st.just(where(lambda b, h, q, k: (q * 7 + k * 3 + h * 5 + b) % 11 < 6)),
        )
    )


@st.composite
def compositions(draw):
    """Draw the shape of a call, and a mask of up to four parts."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    sizes = (draw(st.integers(1, 2)), heads, draw(st.integers(1, 140)), draw(st.integers(1, 160)))
    pattern = draw(parts(*sizes))
    for part in draw(st.lists(parts(*sizes), max_size=3)):
        pattern = pattern & part if draw(st.booleans()) else pattern | part
    shape = CallShape(sizes[0], heads, kv_heads, *sizes[2:], 64, draw(st.sampled_from(list(SIZES))))
    return shape, pattern


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@for_all(compositions())
def test_compositions_are_right_and_clean(drawn):
    shape, pattern = drawn
    call = LISTED["lists"].call(shape.head_dim, shape.dtype)
    given = selfcheck.inputs(shape, replace(call, lists=False))
    seen = np.array(pattern.dense((shape.batch, shape.heads, shape.queries, shape.keys)))
    with on_a_mac(Device()):
        assert problems_of(replace(given, lists=lists_of_pattern(pattern, shape), seen=seen), shape, call) == []
