"""CUDA kernels with quantized keys and values against float64 over their exact values; most need a CUDA device."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from attention.core.kv_format import parse_kv_format
from attention.kernels import cuda
from attention.kernels.cuda.quantized.decode import QuantizedDecode
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.quantized.launch import alone_on_multiprocessor, fill, inputs, refusal
from attention.kernels.cuda.runtime.call import CallShape, normalize
from attention.quantized_kv import quantized
from tests.support import kernel_oracle
from tests.support.cuda_compiled import needs_nvrtc, report
from tests.support.quantized_values import FORMATS, exact, laid_out, normal

needs_gpu = pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])
KINDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 37},
    "softcap": {"softcap": 1.5},
    "all": {"causal": True, "window": 150, "softcap": 1.5},
}


class Case:
    """Random queries, quantized keys and values, and what the kernel makes of them."""

    def __init__(self, size, dim, formats, dtype="bfloat16", scales=None, layout=0, seed=0, **keywords):
        batch, heads, kv_heads, queries, keys = size
        self.dtype = kernel_oracle.DTYPES[dtype]
        of_kv = kernel_oracle.DTYPES[scales or dtype]
        random = np.random.default_rng(seed)
        self.q = mx.array(random.standard_normal((batch, heads, queries, dim), np.float32)).astype(self.dtype)
        self.kv = [
            laid_out(normal(seed + i, (batch, kv_heads, keys, dim), of_kv, form.text), layout)
            for i, form in enumerate(as_pair(formats), 1)
        ]
        self.keywords = {"scale": dim**-0.5, **keywords}

    def found(self):
        made = cuda.flash_attention_quantized(self.q, *self.kv, logsumexp=True, **self.keywords)
        kernel_oracle.poison()
        mx.eval(made)
        return made

    def check(self, what):
        output, logsumexp = self.found()
        numbers = [kernel_oracle.numbers(self.q), *map(exact, self.kv)]
        options = kernel_oracle.Options(**self.keywords)
        right, sums, _ = kernel_oracle.attention(*numbers, options)
        plain = kernel_oracle.plain_attention(*numbers, options, self.dtype)
        kernel_oracle.assert_near(output, right, plain, self.dtype, 2, f"{what}: output")
        found = kernel_oracle.numbers(logsumexp)
        assert np.array_equal(np.isneginf(found), np.isneginf(sums)), what
        with np.errstate(invalid="ignore"):  # keys are rounded to float16
            assert np.nanmax(np.abs(found - sums) - 1e-4 * np.abs(sums), initial=0) < 2e-3, f"{what}: logsumexp"


def as_pair(text):
    found = parse_kv_format(text)
    return found.key, found.value


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("formats", [*FORMATS, "int8+int4", "int4:32+mxfp8", "mxfp4+int2", "nvfp4+int3:128"])
def test_every_format_meets_flash_attention_3s_error_bound(formats):
    for seed, dtype in enumerate(("bfloat16", "float16")):
        Case((2, 8, 2, 1, 1000), 128, formats, dtype, seed=seed).check(f"{formats} {dtype}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 4, 1, 2, 700), (2, 8, 2, 5, 333), (1, 16, 1, 4, 90), (1, 2, 2, 9, 5)])
def test_masks_of_several_queries(size, kind):
    Case(size, 128, "int4", "float16", **KINDS[kind]).check(kind)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 192, 256])
def test_head_dims(dim):
    for formats in ("nvfp4",) if dim % 32 else ("int4:32", "int8:32", "mxfp8", "nvfp4", "int3:32"):
        Case((1, 8, 2, 1, 500), dim, formats, "float16").check(f"{dim} {formats}")
        Case((1, 8, 2, 3, 260), dim, formats, "bfloat16", causal=True).check(f"{dim} {formats}, 3 queries")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("formats", ["int4", "int6+int3:32", "mxfp8", "int8"])
def test_parts_are_read_in_any_layout(formats, layout):
    Case((2, 8, 2, 1, 300), 64, formats, layout=layout).check(f"{formats}, layout {layout}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
def test_scales_of_another_dtype_than_the_queries(scales):
    for dtype in ("bfloat16", "float16"):
        Case((1, 8, 2, 1, 700), 128, "int4", dtype, scales).check(f"{dtype}, scales in {scales}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("formats", ["int4", "int8", "mxfp4", "mxfp8", "nvfp4"])
def test_values_of_any_size(formats, size):
    """Scales that grow along the keys, so that the factors of a warp have to follow."""
    if formats == "nvfp4" and size != 1.0:
        pytest.skip("its scales have the range of e4m3")
    random = np.random.default_rng(5)
    growth = np.exp2(np.linspace(-6, 6, 900))[:, None]
    q, k = (random.standard_normal((1, 2, rows, 64)).astype(np.float32) for rows in (1, 900))
    v = random.standard_normal((1, 2, 900, 64)) * growth * size
    case = Case((1, 2, 2, 1, 900), 64, formats)
    case.q = mx.array(q).astype(mx.bfloat16)
    case.kv = [quantized(mx.array(x.astype(np.float32)).astype(mx.bfloat16), formats) for x in (k * growth, v)]
    case.check(f"{formats}, {size}")


@pytest.mark.gpu
@needs_gpu
def test_groups_without_spread_are_their_bias():
    case = Case((1, 4, 1, 1, 200), 64, "int4")
    case.kv = [quantized(mx.full((1, 1, 200, 64), value, mx.bfloat16), "int4") for value in (0.0, 5.0)]
    assert mx.allclose(case.found()[0], mx.full((1, 4, 1, 64), 5.0), atol=0.05).item()


@pytest.mark.gpu
@needs_gpu
def test_the_same_input_gives_the_same_bits():
    case = Case((1, 32, 8, 1, 8192), 128, "int4")
    first = case.found()[0]
    assert all(mx.array_equal(first, case.found()[0]).item() for _ in range(5))


@pytest.mark.gpu
@needs_gpu
def test_vmap_folds_the_axis_into_the_batch():
    case = Case((3, 8, 2, 1, 200), 64, "int4:32")
    k, v = case.kv

    def attend(q, *parts):
        return cuda.flash_attention_quantized(q, k.with_arrays(parts[:3]), v.with_arrays(parts[3:]), **case.keywords)[0]

    parts = [x[:, None] for x in (case.q, *k.arrays, *v.arrays)]
    assert mx.array_equal(mx.vmap(attend)(*parts)[:, 0], attend(case.q, *k.arrays, *v.arrays)).item()


@pytest.mark.gpu
@needs_gpu
def test_a_gradient_is_refused_in_one_line():
    case = Case((1, 4, 2, 1, 100), 64, "int8")
    with pytest.raises(ValueError, match="no gradients with quantized keys and values"):
        mx.eval(mx.grad(lambda q: cuda.flash_attention_quantized(q, *case.kv, scale=0.1)[0].sum())(case.q))


def test_a_call_says_what_the_kernels_do_not_take():
    few, many = (CallShape(1, 8, 2, queries, 100, 64, "bf16") for queries in (1, 100))
    plain = normalize(0.1, False, None, None, 100)
    assert refusal(few, plain) is None
    assert "up to 64 rows" in refusal(many, plain)
    assert "array mask" in refusal(few, normalize(0.1, False, None, None, 100, "bool"))


def test_parts_that_a_format_lacks_are_no_inputs():
    packed = PackedKV.of_text("int4+mxfp8", "bfloat16")
    assert inputs(packed) == ("q", "k", "k_scales", "k_biases", "v", "v_scales")
    alignments = packed.alignments(128)
    assert [alignments[name] for name in ("k", "k_scales", "v", "v_scales")] == [8, 4, 16, 4]
    assert PackedKV.of_texts(*packed.texts) == packed


@pytest.mark.parametrize("limit", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("formats", ["int4", "int8:32", "mxfp4", "int8:32+int5:32"])
def test_buffers_fit_in_shared_memory(formats, limit):
    architecture = "sm_90a" if limit > 200_000 else "sm_80"
    for dim, tiles, alone in ((64, 1, True), (128, 1, True), (128, 1, False), (128, 2, False), (256, 1, True)):
        packed = PackedKV.of_text(formats, "float32")
        whole = QuantizedDecode(dim, tiles, False, "f16", False, False, architecture, packed, shared_memory_limit=limit)
        kernel = fill(whole, alone)
        for made in (kernel, alone_on_multiprocessor(kernel)) if kernel.resident_blocks > 1 else (kernel,):
            assert made.shared_memory * made.resident_blocks <= limit
            assert made.stages >= 2


@needs_nvrtc
@pytest.mark.slow  # a second each
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("formats", ["int4", "int8", "int5", "mxfp4", "mxfp8", "nvfp4", "int4:32+int2"])
def test_kernels_compile_without_spills(formats, architecture):
    packed = PackedKV.of_text(formats, "bfloat16")
    limit = 166_912 if architecture == "sm_80" else 232_448
    for tiles, masked in ((1, False), (1, True), (2, True)):
        whole = QuantizedDecode(
            128, tiles, masked, "bf16", masked, True, architecture, packed, shared_memory_limit=limit
        )
        kernel = fill(whole, not masked)
        for made in {kernel, alone_on_multiprocessor(kernel) if kernel.resident_blocks > 1 else kernel}:
            assert report(made.program).spilled == 0
            assert made.shared_memory * made.resident_blocks <= limit
