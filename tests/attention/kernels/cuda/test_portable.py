"""Results of the portable kernels by FlashAttention 3's rule, without unwritten elements; needs a GPU.

Every call here uses them, also on Hopper, instead of the GPU's own kernels.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from benchmarks.cuda.measure_portable import portable_only
from tests.support import kernel_oracle
from tests.support.cuda_case import KINDS, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])]

SQUARE = [(dim, dim) for dim in (32, 64, 80, 96, 128, 192, 256)]
DIMS = [*SQUARE, (192, 128), (40, 72), (20, 33), (64, 256), (96, 128), (80, 256)]
SIZES = [  # batch, heads, kv_heads, queries, keys
    (2, 4, 2, 300, 300),
    (1, 3, 1, 500, 377),
    (2, 2, 1, 77, 900),
    (1, 2, 2, 165, 31),
    (1, 14, 2, 200, 190),
]
FEW = [(1, 8, 2, 1, 1000), (2, 8, 1, 5, 2333), (3, 2, 2, 1, 17), (1, 4, 4, 33, 700), (2, 6, 2, 13, 9)]


@pytest.fixture(autouse=True, scope="module")
def _general_alone():
    with portable_only():
        yield


QUICK = [(64, 64), (128, 128), (192, 128)]
COMBINATIONS = [
    pytest.param(
        *(dims, kind, ("bfloat16", "float16")[i % 2], ("bhld", "blhd", "cut")[i % 3]),
        id=f"{dims}-{kind}",
        marks=[] if dims in QUICK else [pytest.mark.slow],  # a second or two to compile each of four kernels
    )
    for i, (dims, kind) in enumerate(product(DIMS, KINDS))
]


@pytest.mark.parametrize(("dims", "kind", "dtype", "layout"), COMBINATIONS)
def test_outputs_meet_flash_attention_3s_error_bound(dims, kind, dtype, layout):
    for seed, size in enumerate(SIZES[:3]):
        Case(size, dims, dtype, KINDS[kind], seed, layout).check_forward(str(size))


@pytest.mark.parametrize(("dims", "kind", "dtype", "layout"), COMBINATIONS)
def test_few_queries_are_as_near(dims, kind, dtype, layout):
    for seed, size in enumerate(FEW):
        Case(size, dims, dtype, KINDS[kind], seed, layout).check_forward(str(size))


@pytest.mark.parametrize(("dims", "kind", "dtype", "layout"), COMBINATIONS)
def test_gradients_are_as_near(dims, kind, dtype, layout):
    for seed, size in enumerate(SIZES):
        Case(size, dims, dtype, KINDS[kind], seed, layout).check_gradients(str(size))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 400), st.integers(1, 700)),
    dims=st.sampled_from([(64, 64), (128, 128), (96, 128)]),
    kind=st.sampled_from(["full", "window", "bool", "float32"]),
    layout=st.sampled_from(["bhld", "blhd", "cut"]),
    seed=st.integers(0, 10_000),
)
def test_any_size_is_as_near(size, dims, kind, layout, seed):
    batch, kv_heads, group, queries, keys = size
    case = Case((batch, kv_heads * group, kv_heads, queries, keys), dims, "bfloat16", KINDS[kind], seed, layout)
    case.check_forward("forward")
    case.check_gradients("backward")


@pytest.mark.parametrize("size", [SIZES[0], FEW[1]])
@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_the_same_input_gives_the_same_bits(size, kind):
    case = Case(size, (128, 128), "bfloat16", KINDS[kind], 1)
    first = case.forward()
    for _ in range(4):
        assert all(mx.array_equal(a, b).item() for a, b in zip(first, case.forward(), strict=True))


@pytest.mark.parametrize("masked", ["bool", "float32"])
def test_rows_that_see_nothing_give_zeros_and_no_gradient(masked):
    case = Case((1, 2, 2, 100, 90), (64, 64), "bfloat16", {"mask": ("11qk", masked)}, 3)
    blind = mx.arange(100)[:, None] % 3 == 0
    nothing = mx.array(False) if masked == "bool" else mx.array(-mx.inf)
    case.keywords["mask"] = mx.where(blind, nothing, case.mask)
    output, logsumexp = case.forward()
    assert mx.all(output[:, :, ::3] == 0).item()
    assert mx.all(logsumexp[:, :, ::3] == -mx.inf).item()
    assert mx.all(case.gradients()[0][:, :, ::3] == 0).item()


def test_a_mask_of_large_finite_numbers_blinds_no_row():
    case = Case((1, 2, 2, 100, 90), (64, 64), "float16", {}, 3)
    for least in (-1e4, -1e9, float(mx.finfo(mx.float32).min)):
        case.keywords["mask"] = mx.full((1, 90), least)
        output, _ = case.forward()
        assert np.isfinite(kernel_oracle.numbers(output)).all()
        assert mx.any(output != 0).item()


def test_a_mask_that_is_added_has_its_own_gradient():
    case = Case((2, 4, 2, 70, 90), (64, 64), "bfloat16", {"mask": ("1h1k", "float32")}, 5)
    mask = mx.where(mx.isinf(case.mask), 0, case.mask)
    q, k, v, cotangent = case.arrays

    def plain(mask):
        wide_k, wide_v = (mx.repeat(x, 2, axis=1).astype(mx.float32) for x in (k, v))
        scores = q.astype(mx.float32) @ wide_k.swapaxes(-1, -2) * case.options.scale + mask
        return [mx.softmax(scores, axis=-1) @ wide_v]

    def ours(mask):
        return [cuda.flash_attention(q, k, v, scale=case.options.scale, mask=mask)]

    found = mx.vjp(ours, [mask], [cotangent])[1][0]
    expected = mx.vjp(plain, [mask], [cotangent.astype(mx.float32)])[1][0]
    assert mx.allclose(found, expected, rtol=2e-2, atol=2e-2 * mx.abs(expected).max().item()).item()


@pytest.mark.parametrize("wrap", [mx.compile, mx.checkpoint])
def test_masked_calls_trace(wrap):
    case = Case(SIZES[0], (64, 64), "bfloat16", KINDS["bool"], 1)
    expected = case.forward()[0]
    keywords = {name: value for name, value in case.keywords.items() if name != "mask"}
    traced = wrap(lambda q, k, v, mask: cuda.flash_attention(q, k, v, mask=mask, **keywords))
    assert mx.array_equal(traced(*case.arrays[:3], case.mask), expected).item()
