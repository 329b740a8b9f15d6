"""The CPU kernel over quantized keys and values, against float64 over their exact values."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention.kernels import cpu
from attention.quantized_kv import quantized
from tests.support import block_lists, kernel_oracle, quantized_values
from tests.support.cpu_calls import normal

pytestmark = pytest.mark.usefixtures("kernel")
DTYPES = list(kernel_oracle.DTYPES.values())
SHAPES = [  # B, H, Hkv, Lq, Lk
    (1, 8, 2, 1, 1300),  # decoding, in spans
    (2, 3, 3, 1, 77),
    (1, 6, 1, 1, 200),
    (1, 4, 2, 3, 333),  # a few queries
    (1, 8, 1, 5, 140),
    (2, 4, 2, 70, 130),
    (1, 2, 1, 300, 290),  # several panels share a tile
]
MASKS = ["none", "causal", "window", "bool", "added", "lists", "alibi"]


def mask_keywords(kind, shape, seed):
    """Return keywords of the call, and the same mask for the oracle."""
    _, heads, _, queries, keys = shape
    random = np.random.default_rng(seed)
    if kind == "causal":
        return {"causal": True}, {"causal": True}
    if kind == "window":
        return {"window": 50}, {"window": 50}
    if kind == "bool":
        mask = random.random((queries, keys)) < 0.7
        return {"mask": mx.array(mask)}, {"mask": mask}
    if kind == "added":
        mask = random.standard_normal((1, heads, 1, keys)).astype(np.float32)
        return {"mask": mx.array(mask)}, {"mask": mask}
    if kind == "lists":
        mask = random.random((1, heads, queries, keys)) < 0.5
        mask[..., : keys // 2] = True
        return {"lists": block_lists.lists_of(mask, *cpu.LIST_TILE, seed)}, {"mask": mask}
    if kind == "alibi":
        slopes = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
        distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
        return {"alibi": mx.array(slopes)}, {"mask": slopes.astype(float)[:, None, None] * distance}
    return {}, {}


def assert_right(q, k, v, keywords, oracle, softcap=None):
    scale = q.shape[3] ** -0.5
    out, logsumexp = cpu.flash_attention_with_logsumexp(q, k, v, scale=scale, softcap=softcap, **keywords)
    alone = cpu.flash_attention(q, k, v, scale=scale, softcap=softcap, **keywords)
    options = kernel_oracle.Options(scale=scale, softcap=softcap, **oracle)
    arrays = [kernel_oracle.numbers(q), quantized_values.exact(k), quantized_values.exact(v)]
    exact, exact_logsumexp, _ = kernel_oracle.attention(*arrays, options)
    plain = kernel_oracle.plain_attention(*arrays, options, q.dtype)
    group = q.shape[1] // k.shape[1]
    products = np.abs(arrays[0]) @ np.abs(arrays[1]).repeat(group, 1).swapaxes(-1, -2)
    rounding = 2**-23 * (1 + scale * products.max())
    kernel_oracle.assert_near(out, exact, plain, q.dtype, 2, "output", rounding * np.abs(arrays[2]).max())
    assert mx.array_equal(out, alone)
    seen = np.isfinite(exact_logsumexp)
    tolerance = rounding + (2e-5 if q.dtype == mx.float32 else 3e-4)  # half types: queries in integers of 16 bits
    np.testing.assert_allclose(np.array(logsumexp)[seen], exact_logsumexp[seen], atol=tolerance, rtol=1e-5)
    assert (np.array(logsumexp)[~seen] == -np.inf).all()


def width(form, tiles):
    """Return a multiple of the format's group."""
    group = int(form.partition(":")[2] or (16 if form == "nvfp4" else 32))
    return -(-tiles // group) * group


# Every format of K and of V, each with every dtype of queries and of scales; other factors take turns.
CASES = [
    pytest.param(
        SHAPES[i % 7],
        (form, quantized_values.FORMATS[(i * 8 + 5) % 21]),
        MASKS[(i // 3 + i) % 7],
        i,
        id=f"{i}-{form}",
        marks=() if i < len(quantized_values.FORMATS) else pytest.mark.slow,
    )
    for i, form in enumerate(quantized_values.FORMATS * 3)
]


@pytest.mark.parametrize(("shape", "forms", "mask", "number"), CASES)
def test_any_format_agrees_with_float64(shape, forms, mask, number):
    batch, heads, kv_heads, queries, keys = shape
    widths = [width(form, (32, 64, 96, 128, 48)[(number + i) % 5]) for i, form in enumerate(forms)]
    q = normal(number, batch, heads, queries, widths[0], dtype=DTYPES[(number + number // 21) % 3])
    k, v = (
        quantized_values.laid_out(
            quantized_values.normal(
                number + i, (batch, kv_heads, keys, widths[i]), DTYPES[(number // 7 + i) % 3], forms[i]
            ),
            (number + i) % 4,
        )
        for i in range(2)
    )
    keywords, oracle = mask_keywords(mask, shape, number)
    assert_right(q, k, v, keywords, oracle, softcap=5.0 if number % 4 == 1 else None)


@st.composite
def calls(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4, 5, 8]))
    sizes = st.sampled_from([1, 2, 3, 9, 64, 65, 130])
    shape = (draw(st.integers(1, 2)), kv_heads * group, kv_heads, draw(sizes), draw(st.sampled_from([1, 31, 128, 700])))
    forms = [draw(st.sampled_from(quantized_values.FORMATS)) for _ in range(2)]
    widths = [width(form, draw(st.sampled_from([16, 32, 80, 128, 256, 512]))) for form in forms]
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    layouts = [draw(st.integers(0, 3)) for _ in range(2)]
    return shape, forms, widths, dtypes, layouts, draw(st.sampled_from(MASKS)), draw(st.integers(0, 2**20))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), softcap=st.sampled_from([None, 3.0]))
def test_any_call(call, softcap):
    shape, forms, widths, dtypes, layouts, mask, seed = call
    q = normal(seed, *shape[:2], shape[3], widths[0], dtype=dtypes[2])
    k, v = (
        quantized_values.laid_out(
            quantized_values.normal(seed + i, (shape[0], shape[2], shape[4], widths[i]), dtypes[i], forms[i]),
            layouts[i],
        )
        for i in range(2)
    )
    assert_right(q, k, v, *mask_keywords(mask, shape, seed), softcap=softcap)


@pytest.mark.parametrize("name", kernel_oracle.DTYPES)
@pytest.mark.parametrize("form", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_number_and_scale_of_small_floats(form, name):
    """Values whose only key is seen give the output itself: all 256 numbers, with scales from tiny to large."""
    bits = 8 if form == "mxfp8" else 4
    codes = np.arange(256, dtype=np.uint8) if bits == 8 else (np.arange(128) % 16 * 17).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # NaN, tested below
    group = 16 if form == "nvfp4" else 32
    raw = [0, 1, 0x38, 0x7E, 0xB8] if form == "nvfp4" else [126, 127, 128, 120, 130]
    for byte in raw:
        numbers = mx.array(codes).view(mx.uint32)[None, None, None]
        v = quantized((numbers, mx.full((1, 1, 1, 256 // group), byte, mx.uint8)), form)
        k = quantized(mx.ones((1, 1, 1, 32)), "int8:32")
        q = mx.ones((1, 1, 1, 32)).astype(kernel_oracle.DTYPES[name])
        out = cpu.flash_attention(q, k, v, scale=1.0)
        expected = mx.array(quantized_values.exact(v).astype(np.float32)).astype(q.dtype)
        assert mx.array_equal(out, expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_nan_among_small_floats_stays_nan(dtype):
    numbers = mx.array(np.full(32, 0x7F, np.uint8)).view(mx.uint32)[None, None, None]
    v = quantized((numbers, mx.full((1, 1, 1, 1), 127, mx.uint8)), "mxfp8")
    k = quantized(mx.ones((1, 1, 1, 32)), "int8:32")
    q = mx.ones((1, 1, 1, 32)).astype(dtype)
    assert mx.all(mx.isnan(cpu.flash_attention(q, k, v, scale=1.0)))
    assert mx.all(mx.isnan(cpu.flash_attention(q, v, k, scale=1.0)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("exponent", [118, 119, 122])
def test_scales_near_the_largest_float_are_exact(exponent, dtype):
    """Scales of mxfp8 are multiplied by 2^8 where that does not overflow."""
    numbers = mx.array(np.full(32, 0x38, np.uint8)).view(mx.uint32)[None, None, None]  # 1.0
    v = quantized((numbers, mx.full((1, 1, 1, 1), 127 + exponent, mx.uint8)), "mxfp8")
    k = quantized(mx.ones((1, 1, 1, 32)), "int8:32")
    q = mx.ones((1, 1, 1, 32)).astype(dtype)
    assert mx.all(cpu.flash_attention(q, k, v, scale=1.0).astype(mx.float32) == 2.0**exponent)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_nan_leaves_the_other_values_of_its_tile(dtype):
    codes = np.full((3, 32), 0x38, np.uint8)
    codes[1, 5] = 0x7F
    v = quantized((mx.array(codes).view(mx.uint32)[None, None], mx.full((1, 1, 3, 1), 127, mx.uint8)), "mxfp8")
    k = quantized(mx.ones((1, 1, 3, 32)), "int8:32")
    out = cpu.flash_attention(mx.ones((1, 1, 1, 32)).astype(dtype), k, v, scale=1.0)
    assert mx.isnan(out[..., 5]).item()
    assert mx.allclose(out[..., 6:], mx.array(1.0))


@pytest.mark.parametrize("scales", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("form", ["int8", "int4", "int4:32", "mxfp4"])
def test_last_tiles_of_any_length(form, scales):
    """Keys after the last one have no weight, wherever they are in a vector or a pair."""
    q = normal(0, 1, 4, 1, 128).astype(mx.bfloat16)
    for length in (1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 65, 80, 95, 97, 112, 127, 129, 145, 192):
        k, v = (quantized_values.normal(i, (1, 1, length, 128), scales, form) for i in (1, 2))
        assert_right(q, k, v, {}, {})


def call_of(length=300, form="int4"):
    q = normal(0, 2, 4, 70, 64)
    k, v = (quantized_values.normal(i, (2, 2, length, 64), mx.float16, form) for i in (1, 2))
    return q, k, v


def test_large_scores_are_computed_in_double():
    """Float32 rounds a score near 2^14 by 2^-10, which would show in the probabilities."""
    q, k, v = call_of()
    assert_right(q * 3000, k, v, {}, {})
    assert_right(q[:, :, :1] * 3000, k, v, {}, {})


@pytest.mark.parametrize("form", ["int8", "int4", "mxfp4", "mxfp8"])
def test_large_keys_and_small_queries_have_scores_in_between(form):
    """Sums of integers overflow with the scale of the keys before they are multiplied by the unit of the query."""
    q = (normal(0, 1, 4, 1, 64) * 1e-30).astype(mx.bfloat16)
    k = quantized(normal(1, 1, 1, 200, 64) * 1e32, form)
    assert_right(q, k, quantized_values.normal(2, (1, 1, 200, 64), mx.float16, "int8"), {}, {})


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("largest", [3.0, 50.0, 3000.0])
@pytest.mark.parametrize("form", ["int8:32", "int4:32", "mxfp4"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_large_channel_leaves_the_others_their_bits(dtype, form, largest):
    """Keys are 0 where the query is large, so that the scores are those of the other channels."""
    channel = mx.arange(64)
    large = (channel == 7) | (channel == 20)
    q = mx.where(large, mx.array(largest), normal(0, 1, 4, 1, 64)).astype(dtype)
    k = quantized(mx.where(channel < 32, 0, normal(1, 1, 1, 200, 64)), form)
    assert_right(q, k, quantized_values.normal(2, (1, 1, 200, 64), mx.float16, "int8"), {}, {})


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    for queries in (1, 70):
        q, k, v = call_of(3000)
        results = []
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("FATUI_THREADS", threads)
            results.append(np.array(cpu.flash_attention(q[:, :, :queries], k, v, scale=0.2, causal=True)))
        assert all(np.array_equal(results[0], other) for other in results[1:])


def test_vmap_is_folded_into_the_batch():
    q, k, v = call_of()

    def attend(q, numbers, scales):
        return cpu.flash_attention(q, k.with_arrays((numbers, scales, k.biases)), v, scale=0.2, causal=True)

    stacked = mx.stack([q, -q, 2 * q]), mx.stack([k.numbers] * 3), mx.stack([k.scales, 0.5 * k.scales, 2 * k.scales])
    got = mx.vmap(attend)(*stacked)
    expected = mx.stack([attend(*each) for each in zip(*stacked, strict=True)])
    assert mx.allclose(got, expected, atol=1e-5)


@pytest.mark.compiles
def test_compile_keeps_formats_apart():
    q, k, v = call_of()
    as_four = k.with_arrays((mx.concatenate([k.numbers] * 2, 3), *(mx.concatenate([x] * 2, 3) for x in k.arrays[1:])))
    forms = [(q, k, v), (mx.concatenate([q, q], 3), as_four, v)]
    both = mx.compile(lambda: [cpu.flash_attention(*each, scale=0.2) for each in forms])()
    for out, each in zip(both, forms, strict=True):
        assert mx.allclose(out, cpu.flash_attention(*each, scale=0.2), atol=1e-6)


@pytest.mark.compiles
def test_shapeless_compile_takes_a_growing_cache():
    _, k, v = call_of()
    q = normal(0, 2, 4, 1, 64)

    def attend(q, *parts):
        keys, values = k.with_arrays(parts[:3]), v.with_arrays(parts[3:])
        return cpu.flash_attention(q, keys, values, scale=0.2)

    compiled = mx.compile(attend, shapeless=True)
    for length in (300, 120):
        parts = [part[:, :, :length] for part in (*k.arrays, *v.arrays)]
        assert mx.allclose(compiled(q, *parts), attend(q, *parts), atol=1e-6)


@pytest.mark.compiles
def test_shapeless_compile_refuses_parts_of_other_lengths():
    q, k, v = call_of()
    frozen = k.arrays[1:]
    compiled = mx.compile(
        lambda numbers, *parts: cpu.flash_attention(
            q, k.with_arrays((numbers, *frozen)), v.with_arrays(parts), scale=0.2
        ),
        shapeless=True,
    )
    mx.eval(compiled(k.numbers, *v.arrays))
    with pytest.raises(ValueError, match="scales of quantized keys and values are those of other lengths"):
        mx.eval(compiled(*(part[:, :, :200] for part in (k.numbers, *v.arrays))))


def test_gradients_are_refused_with_a_reason():
    q, k, v = call_of()
    with pytest.raises(ValueError, match="no gradient for quantized keys and values"):
        mx.grad(lambda q: cpu.flash_attention(q, k, v, scale=0.2).sum())(q)


def test_what_does_not_fit_is_refused_with_a_reason():
    q, k, v = call_of()
    dense = mx.zeros((2, 2, 300, 64))
    for arguments, words in (
        ((q, k, dense), "one quantized and one not"),
        ((q, dense, v), "one quantized and one not"),
        ((normal(0, 2, 4, 70, 32), k, v), r"shapes do not agree: q \(2, 4, 70, 32\), k \(2, 2, 300, 64\)"),
        ((normal(0, 2, 3, 70, 64), k, v), "multiple"),
        ((q, k, v.with_arrays([x[:, :, :200] for x in v.arrays])), "shapes do not agree"),
        ((q, k.with_arrays((k.numbers, k.scales[..., :1, :], k.biases)), v), "scales of quantized k are"),
        ((q, k, v.with_arrays((v.numbers, v.scales, v.biases.astype(mx.float32)))), "biases of quantized v are"),
    ):
        with pytest.raises(ValueError, match=words):
            cpu.flash_attention(*arguments, scale=1.0)


def test_a_call_allocates_tiles_and_no_copy_of_keys_and_values():
    shapes = (1, 32, 1, 128), (1, 8, 8192, 128), (1, 8, 8192, 128)
    tiles = cpu.workspace_bytes(*shapes, dtype=mx.bfloat16, quantized=True)
    dense = cpu.workspace_bytes(*shapes, dtype=mx.float32)
    assert tiles == dense < 8 * 8192 * 128 // 2


def test_a_small_call_is_predicted_with_its_threads():
    shapes = (1, 8, 1, 128), (1, 8, 64, 128), (1, 8, 64, 128)
    assert cpu.workspace_bytes(*shapes, dtype=mx.bfloat16, quantized=True) == cpu.workspace_bytes(
        *shapes, dtype=mx.bfloat16
    )
