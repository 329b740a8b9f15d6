"""The CPU kernel under block lists and alibi, against float64 with the same mask as an array."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention import attention, masks
from attention.core.workload import Workload
from attention.implementations.calls import take_path
from attention.implementations.fused import Poc
from attention.kernels import cpu
from attention.masks import Mask
from attention.measure.device import probe
from tests.support import block_lists, kernel_oracle
from tests.support.cpu_calls import laid_out, largest_product, normal, qkv
from tests.support.marks import slow

pytestmark = pytest.mark.usefixtures("kernel")
ONE_ROUNDING = {mx.float32: 2**-23, mx.float16: 2**-11, mx.bfloat16: 2**-8}


def lists_of(mask, seed=0):
    return block_lists.lists_of(mask, *cpu.LIST_TILE, seed)


def mask_of(kind, shape, seed=0):
    """Return a bool mask: tiles at random, of three kinds (`tiles`), a band, noise, or whole rows."""
    random = np.random.default_rng(seed)
    *planes, queries, keys = shape
    noise = random.random(shape) < 0.5
    if kind == "noise":
        return noise
    if kind == "rows":
        return np.broadcast_to(random.random((*planes, queries, 1)) < 0.6, shape)
    if kind == "band":
        distance = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
        return np.broadcast_to((distance >= 0) & (distance < 40), shape)
    states = random.integers(0, 3, (*planes, -(-queries // 64), -(-keys // 128)))
    states = states.repeat(64, 2).repeat(128, 3)[:, :, :queries, :keys]
    return (states == 2) | ((states == 1) & noise)


def slopes_of(heads):
    return mx.array((2.0 ** -np.arange(1, heads + 1)).astype(np.float32))


def added_by(slopes, queries, keys):
    """Return what slopes add to the scores: (H, Lq, Lk)."""
    positions = np.arange(queries)[:, None] + keys - queries
    return np.array(slopes, np.float64)[:, None, None] * (np.arange(keys) - positions)


def assert_right(q, k, v, mask, *, slopes=None, array=None, softcap=None, seed=0):
    """Compare output, logsumexp and gradients; the oracle gets mask, slopes and array as one additive array."""
    whole = (*q.shape[:3], k.shape[2])
    added = np.where(np.broadcast_to(mask, whole), 0.0, -np.inf)
    if slopes is not None:
        added = added + added_by(slopes, *whole[2:])
    if array is not None:
        added = added + (np.where(array, 0.0, -np.inf) if array.dtype == bool else array)
    scale = q.shape[3] ** -0.5
    options = kernel_oracle.Options(scale=scale, softcap=softcap, mask=added)
    call = {"scale": scale, "softcap": softcap, "lists": lists_of(mask, seed), "alibi": slopes}
    call["mask"] = None if array is None else mx.array(array)
    do = normal(7, *q.shape[:3], v.shape[3], dtype=q.dtype)
    o, logsumexp = cpu.flash_attention_with_logsumexp(q, k, v, **call)
    untraced = cpu.flash_attention(q, k, v, **call)
    _, got = mx.vjp(lambda *x: cpu.flash_attention(*x, **call), [q, k, v], [do])

    arrays = [kernel_oracle.numbers(x) for x in (q, k, v)]
    exact, exact_logsumexp, _ = kernel_oracle.attention(*arrays, options)
    largest = np.abs(np.where(np.isfinite(added), added, 0)).max(initial=0)
    rounding = 2**-23 * (1 + scale * largest_product(q, k) + largest)
    floor = rounding * float(mx.max(mx.abs(v)))
    plain = kernel_oracle.plain_attention(*arrays, options, q.dtype)
    for out in (o, untraced):
        kernel_oracle.assert_near(out, exact, plain, q.dtype, 2, "output", floor)
    empty = exact_logsumexp == -np.inf
    assert (np.array(logsumexp)[empty] == -np.inf).all()
    assert (kernel_oracle.numbers(o)[empty] == 0).all()
    tolerance = (3e-4 if q.dtype == mx.bfloat16 else 2e-5) + rounding
    np.testing.assert_allclose(np.array(logsumexp)[~empty], exact_logsumexp[~empty], atol=tolerance, rtol=1e-5)

    numbers = [*arrays, kernel_oracle.numbers(do)]
    exacts = kernel_oracle.gradients(*numbers, options)
    plains = kernel_oracle.plain_gradients(*numbers, options, q.dtype)
    sums = kernel_oracle.gradient_sums(*numbers, options)
    for name, *each, total in zip(("dq", "dk", "dv"), got, exacts, plains, sums, strict=True):
        one = (ONE_ROUNDING[q.dtype] + rounding) * total.max(initial=0)
        kernel_oracle.assert_near(*each, q.dtype, 3, name, one)
    assert (kernel_oracle.numbers(got[0])[empty] == 0).all()


dtypes = pytest.mark.parametrize("dtype", kernel_oracle.DTYPES.values(), ids=kernel_oracle.DTYPES)


@pytest.mark.sampled(0.3)
@dtypes
@pytest.mark.parametrize("kind", ["tiles", "band", "noise", "rows"])
def test_listed_tiles_give_what_the_mask_gives(dtype, kind):
    shape = (1, 4, 2, 200, 400, 64, 48)
    assert_right(*qkv(*shape, dtype), mask_of(kind, (1, 4, *shape[3:5])), seed=1)


@dtypes
@pytest.mark.parametrize(("queries", "dim"), [(200, 64), (200, 17), (3, 64)])
def test_all_tiles_listed_give_the_dense_call(dtype, queries, dim):
    """Bit for bit, as they take the same products: those of pairs too."""
    q, k, v = qkv(1, 4, 2, queries, 400, dim, dim, dtype)
    lists = lists_of(np.ones((1, 1, queries, 400), bool))
    do = normal(7, *q.shape, dtype=dtype)
    results = [
        mx.vjp(lambda *x, more=more: cpu.flash_attention(*x, scale=0.2, **more), [q, k, v], [do])
        for more in ({"lists": lists}, {})
    ]
    for listed, dense in zip(*([*out, *gradients] for out, gradients in results), strict=True):
        assert mx.array_equal(listed, dense)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("planes", [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("queries", [5, 130])
def test_planes_repeat_over_batch_and_heads(planes, queries):
    shape = (2, 4, 2, queries, 300, 32, 32)
    assert_right(*qkv(*shape, mx.float32), mask_of("tiles", (*planes, *shape[3:5])))


@pytest.mark.sampled(0.2)
@dtypes
@pytest.mark.parametrize("rows", [(8, 2, 1), slow((8, 8, 1)), slow((16, 1, 1)), (4, 1, 3), (6, 2, 21), slow((2, 1, 9))])
def test_few_queries_against_long_lists(dtype, rows):
    """Decoding: one panel holds several heads with lists of their own, and the keys are split into spans."""
    heads, kv_heads, queries = rows
    mask = mask_of("tiles", (1, heads, queries, 2100), seed=queries)
    assert_right(*qkv(1, heads, kv_heads, queries, 2100, 32, 64, dtype), mask, seed=2)


@pytest.mark.sampled(0.3)
@dtypes
def test_lists_go_with_softcap_array_mask_and_alibi(dtype):
    shape = (1, 4, 2, 150, 260, 32, 32)
    random = np.random.default_rng(1)
    lists = mask_of("tiles", (1, 4, *shape[3:5]))
    for array in (random.random(shape[3:5]) < 0.8, random.standard_normal((1, 4, 1, 260)).astype(np.float32)):
        assert_right(*qkv(*shape, dtype), lists, slopes=slopes_of(4), array=array, softcap=3.0)


@pytest.mark.sampled(0.4)
@dtypes
@pytest.mark.parametrize("queries", [2, 140])
def test_alibi_needs_no_lists(dtype, queries):
    q, k, v = qkv(1, 4, 2, queries, 300, 32, 32, dtype)
    slopes, do = slopes_of(4), normal(3, 1, 4, queries, 32, dtype=dtype)
    added = added_by(slopes, queries, 300)
    options = kernel_oracle.Options(scale=0.2, causal=True, mask=added)
    arrays = [kernel_oracle.numbers(x) for x in (q, k, v)]
    out, got = mx.vjp(lambda *x: cpu.flash_attention(*x, scale=0.2, causal=True, alibi=slopes), [q, k, v], [do])
    exact = kernel_oracle.attention(*arrays, options)[0]
    floor = 2**-23 * np.abs(added).max()
    kernel_oracle.assert_near(
        out[0], exact, kernel_oracle.plain_attention(*arrays, options, dtype), dtype, 2, "output", floor
    )
    exacts = kernel_oracle.gradients(*arrays, kernel_oracle.numbers(do), options)
    plains = kernel_oracle.plain_gradients(*arrays, kernel_oracle.numbers(do), options, dtype)
    for name, *each in zip(("dq", "dk", "dv"), got, exacts, plains, strict=True):
        kernel_oracle.assert_near(*each, dtype, 3, name, floor * 8)


@st.composite
def listed_calls(draw):
    sizes = st.sampled_from([1, 2, 7, 31, 64, 65, 129, 200])
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    queries, keys = draw(sizes), draw(st.sampled_from([1, 33, 127, 128, 129, 300, 700]))
    dims = st.sampled_from([1, 8, 17, 32, 64, 96])
    shape = (batch, kv_heads * group, kv_heads, queries, keys, draw(dims), draw(dims))
    planes = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, shape[1]]))
    seed = draw(st.integers(0, 2**20))
    mask = mask_of(draw(st.sampled_from(["tiles", "band", "noise", "rows"])), (*planes, queries, keys), seed)
    options = {
        "slopes": slopes_of(shape[1]) if draw(st.booleans()) else None,
        "softcap": draw(st.sampled_from([None, 2.0])),
        "array": np.random.default_rng(seed).random((queries, keys)) < 0.7 if draw(st.booleans()) else None,
    }
    return shape, mask, options, seed, draw(st.integers(0, 3))


def assert_right_at_random(call, name):
    shape, mask, options, seed, layout = call
    q, k, v = (laid_out(x, layout) for x in qkv(*shape, kernel_oracle.DTYPES[name], seed))
    assert_right(q, k, v, mask, seed=seed, **options)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=listed_calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_any_lists(call, name):
    assert_right_at_random(call, name)


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=listed_calls(), name=st.sampled_from(sorted(kernel_oracle.DTYPES)))
def test_many_lists(call, name):
    assert_right_at_random(call, name)


def listed_loss(lists, **more):
    return lambda q, k, v: (cpu.flash_attention(q, k, v, scale=0.2, lists=lists, **more) ** 2).sum()


@pytest.mark.thorough
def test_bits_do_not_depend_on_threads_or_the_order_of_items(monkeypatch):
    """With one head the gradients take two passes on several threads, with many heads one."""
    for heads in (1, 6):
        q, k, v = qkv(1, heads, heads, 500, 900, 32, 32, mx.float32)
        lists = lists_of(mask_of("tiles", (1, heads, 500, 900)))
        results = []
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("FATUI_THREADS", threads)
            value, gradients = mx.value_and_grad(listed_loss(lists), (0, 1, 2))(q, k, v)
            results.append([np.array(x) for x in (value, *gradients)])
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_number_of_items_changes_only_roundings():
    q, k, v = qkv(1, 2, 2, 600, 700, 32, 32, mx.float32)
    lists = lists_of(mask_of("tiles", (1, 2, 600, 700)))
    few, many = (cpu.flash_attention(q, k, v, scale=0.2, lists=lists, items=n) for n in (1, 1000))
    np.testing.assert_allclose(np.array(few), np.array(many), atol=2e-6)


@pytest.mark.parametrize("transform", [mx.compile, mx.checkpoint], ids=["compile", "checkpoint"])
@pytest.mark.compiles
def test_transformations_keep_lists_and_alibi(transform):
    q, k, v = qkv(2, 4, 2, 70, 300, 32, 32, mx.float32)
    loss = listed_loss(lists_of(mask_of("tiles", (2, 1, 70, 300))), alibi=slopes_of(4))
    expected = mx.value_and_grad(loss, (0, 1, 2))(q, k, v)
    value, gradients = mx.value_and_grad(transform(loss), (0, 1, 2))(q, k, v)
    for one, other in zip([value, *gradients], [expected[0], *expected[1]], strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_vmap_repeats_planes_over_what_it_maps():
    q, k, v = qkv(2, 4, 2, 70, 200, 16, 16, mx.float32)
    slopes = mx.stack([slopes_of(4), 0.5 * slopes_of(4), mx.zeros(4)])
    for planes in ((1, 1), (2, 4)):
        lists = lists_of(mask_of("tiles", (*planes, 70, 200)))
        stacked = mx.stack([q, 2 * q, -q])
        gradient = mx.grad(lambda q, s, lists=lists: listed_loss(lists, alibi=s)(q, k, v))
        got = mx.vmap(gradient)(stacked, slopes)
        expected = mx.stack([gradient(one, s) for one, s in zip(stacked, slopes, strict=True)])
        assert mx.allclose(got, expected, atol=1e-4)


@pytest.mark.compiles
def test_lists_that_compile_cannot_tell_apart_are_not_merged():
    q, k, v = qkv(1, 1, 1, 64, 256, 16, 16, mx.float32)
    masks_ = [np.arange(256)[None, None, None].repeat(64, 2) // 128 == n for n in (0, 1)]
    both = mx.compile(lambda q: [cpu.flash_attention(q, k, v, scale=0.2, lists=lists_of(m)) for m in masks_])(q)
    for one, mask in zip(both, masks_, strict=True):
        expected = cpu.flash_attention(q, k, v, scale=0.2, mask=mx.array(mask))
        assert mx.allclose(one, expected, atol=1e-5)


def test_keys_that_lists_hide_may_hold_anything():
    q, k, v = qkv(1, 2, 2, 70, 300, 32, 32, mx.float32)
    mask = np.broadcast_to(np.arange(300) % 3 > 0, (1, 1, 70, 300))
    spoilt = mx.where(mx.array(mask[0, 0, 0])[:, None], k, mx.array(np.nan))
    o, expected = (cpu.flash_attention(q, x, v, scale=0.2, lists=lists_of(mask)) for x in (spoilt, k))
    assert mx.array_equal(o, expected)


def test_a_mask_of_nothing_gives_zeros():
    q, k, v = qkv(1, 2, 2, 70, 300, 32, 32, mx.float32)
    lists = lists_of(np.zeros((1, 1, 70, 300), bool))
    o, logsumexp = cpu.flash_attention_with_logsumexp(q, k, v, scale=0.2, lists=lists)
    assert mx.all(o == 0)
    assert mx.all(logsumexp == -mx.inf)
    for gradient in mx.grad(listed_loss(lists), (0, 1, 2))(q, k, v):
        assert mx.all(gradient == 0)


def test_what_does_not_fit_is_refused_with_a_reason():
    q, k, v = qkv(1, 4, 2, 70, 300, 16, 16, mx.float32)
    mask = np.ones((1, 4, 70, 300), bool)
    for wrong, words in (
        ({"lists": block_lists.lists_of(mask, 128, 128)}, "tiles of 128 x 128; the CPU kernel takes 64 x 128"),
        ({"lists": lists_of(mask[:, :3])}, "planes for 1 or B batch rows and 1 or H heads"),
        ({"lists": lists_of(mask[:, :, :60])}, "offsets"),
        ({"lists": lists_of(mask), "causal": True}, "no causal"),
        ({"lists": lists_of(mask), "window": 5}, "no window"),
        ({"alibi": mx.zeros(3)}, "slopes"),
    ):
        with pytest.raises(ValueError, match=words):
            cpu.flash_attention(q, k, v, scale=1.0, **wrong)
    with pytest.raises(ValueError, match="no gradient for the slopes"):
        mx.grad(lambda s: cpu.flash_attention(q, k, v, scale=1.0, alibi=s).sum())(mx.zeros(4))
    with pytest.raises(ValueError, match="no vmap over block lists"):
        offsets = mx.stack([mx.array(lists_of(mask).offsets)] * 2)
        mx.vmap(lambda x: cpu.flash_attention(q, k, v, scale=1.0, lists=_WithOffsets(x)))(offsets)


class _WithOffsets:
    block_q, block_k, batches, heads = 64, 128, 1, 4

    def __init__(self, offsets):
        self._offsets = offsets

    def arrays(self):
        return self._offsets, *lists_of(np.ones((1, 4, 70, 300), bool)).arrays()[1:]


PATTERNS = {
    "window and prefix": masks.window(70) | masks.prefix(20),
    "documents": masks.documents((100, 37, 163)) & masks.causal(),
    "padding": masks.padding((300, 110)),
    "dilated": masks.dilated(40, 3),
    "tree": masks.where(lambda b, h, q, k: (k < 200) | (k % (h + 2) == q % (h + 2))),
}


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("queries", [3, 190])
def test_poc_takes_patterns(name, queries):
    pattern = PATTERNS[name]
    q, k, v = qkv(2, 4, 2, queries, 300, 32, 32, mx.float32)
    poc, array = Poc(), pattern.dense((2, 4, queries, 300))
    structured = Mask(pattern=pattern)
    results = [
        mx.value_and_grad(lambda *x, m=m: (poc(*x, scale=0.2, mask=m) ** 2).sum(), (0, 1, 2))(q, k, v)
        for m in (structured, Mask(array=array))
    ]
    for one, other in zip(*([value, *gradients] for value, gradients in results), strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4)
    take_path()
    poc(q, k, v, scale=0.2, mask=structured)
    assert take_path() == poc.route(_workload(queries), probe()).path


@pytest.mark.parametrize("mask", [None, "causal", masks.window(50) | masks.prefix(3), "added"], ids=str)
def test_poc_returns_the_logsumexp_of_the_kernel(mask):
    given = qkv(1, 4, 2, 70, 90, 16, 16, mx.float32)
    mask = mx.random.normal((4, 70, 90), key=mx.random.key(5)) if mask == "added" else mask
    found = attention(*given, mask=mask, return_lse=True, implementation="poc")
    assert "CPU" in take_path()
    for one, other in zip(found, attention(*given, mask=mask, return_lse=True, implementation="baseline"), strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-5)


def _workload(queries):
    return Workload(
        batch=2, heads=4, kv_heads=2, seq=queries, kv_seq=300, head_dim=32, dtype="float32", mask="documents:30"
    )


def test_routes_name_the_lists():
    route = Poc().route(_workload(100), probe())
    assert route.supported
    assert route.path.endswith(", lists")
    assert "block lists" in route.reason


@pytest.mark.parametrize(
    "mask",
    [masks.dilated(50, 3), masks.padding(20), mx.ones((40, 40), mx.bool_)],
    ids=["lists", "padding", "array"],
)
@pytest.mark.parametrize("queries", [20, 200])
@pytest.mark.compiles
def test_a_shapeless_graph_takes_its_own_mask(mask, queries):
    attend = mx.compile(lambda q, k, v: attention(q, k, v, mask=mask, implementation="poc"), shapeless=True)
    mx.eval(attend(*qkv(2, 2, 2, 40, 40, 16, 16, mx.float32)))
    with pytest.raises(ValueError, match=r"other lengths; mx\.compile without shapeless"):
        attend(*qkv(2, 2, 2, queries, 40, 16, 16, mx.float32))
