"""Results of the CUDA kernels against float64; needs a CUDA device."""

import functools
from dataclasses import replace

import pytest

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from attention.kernels.common.selfcheck import exact, relative_error
from attention.kernels.cuda import gradients
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallShape
from attention.kernels.cuda.sm90.decode import MAX_ROWS
from tests.support.cuda_case import CALLS, KINDS, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])]

WITHOUT_ARRAY = [name for name, kind in KINDS.items() if "mask" not in kind]
SIZES = [  # batch, heads, kv_heads, queries, keys
    (1, 2, 2, 128, 128),
    (2, 4, 2, 300, 300),
    (1, 3, 1, 500, 377),
    (1, 2, 1, 77, 900),
    (1, 2, 2, 65, 31),
    (3, 14, 2, 200, 190),
    (1, 1, 1, 1, 1),
    (2, 8, 2, 1, 1000),
    (1, 8, 2, 1, 5000),
    (2, 8, 2, 5, 2333),
    (1, 4, 4, 64, 64),
    (1, 2, 1, 9, 5),
]


def attend(shape, call, made):
    return cuda.flash_attention_with_logsumexp(
        *made[:3], scale=call.scale, causal=call.causal, window=call.window, softcap=call.softcap
    )


@pytest.mark.skipif(cuda.variant() != "hopper", reason="only Hopper GPUs have kernels of their own for many queries")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("name", WITHOUT_ARRAY)
def test_outputs_meet_flash_attention_3s_error_bound(name, dim, dtype):
    for seed, size in enumerate(SIZES):
        path = "decode" if size[1] // size[2] * size[3] <= MAX_ROWS else "forward"
        Case(size, (dim, dim), dtype, KINDS[name], seed, path=path).check_forward(str(size))


@pytest.mark.parametrize("size", [(2, 4, 2, 300, 300), (1, 32, 8, 1, 8192)])
def test_the_same_input_gives_the_same_bits(size):
    shape, call = CallShape(*size, 128, "bf16"), CALLS["causal"]
    made = selfcheck.inputs(shape)
    first = attend(shape, call, made)
    for _ in range(5):
        assert all(mx.array_equal(a, b).item() for a, b in zip(first, attend(shape, call, made), strict=True))


@pytest.mark.parametrize("size", [(1, 2, 2, 300, 300), (1, 2, 2, 1, 3000)])
def test_repeated_calls_read_their_own_inputs(size):
    shape, call = CallShape(*size, 64, "f16"), CALLS["causal"]
    for seed in range(6):
        made = selfcheck.inputs(shape, seed)
        assert selfcheck.disagreement(call, *attend(shape, call, made), made) is None


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("queries", [1, 3])
def test_lengths_that_share_a_plan_see_their_own_keys(queries, softcap):
    """Keys and values after those of a call are NaN; lengths are of three numbers of steps, in an order of no use."""
    whole = CallShape(2, 8, 2, queries, 1040, 64, "bf16")
    call = replace(CALLS["causal"], softcap=softcap)
    q, k, v, cotangent = selfcheck.inputs(whole)
    for keys in (1023, 1009, 1024, 1010, 1008, 1040, 1025):
        ended = (mx.concatenate([x[:, :, :keys], mx.full_like(x[:, :, keys:], mx.nan)], 2) for x in (k, v))
        given = [q, *(x[:, :, :keys] for x in ended)]
        mx.eval(given)
        made, shape = [q, k[:, :, :keys], v[:, :, :keys], cotangent], replace(whole, keys=keys)
        output, logsumexp = attend(shape, call, given)
        assert selfcheck.disagreement(call, output, logsumexp, made) is None
        own = functools.partial(cuda.flash_attention, scale=call.scale, causal=True, softcap=softcap)
        assert mx.array_equal(own(*given), output).item()  # without the logsumexp, and what a gradient needs
        found = mx.vjp(own, given, [cotangent])[1]
        assert selfcheck.gradient_disagreement(call, found, made) is None


def test_strided_inputs_are_taken():
    shape, call = CallShape(2, 4, 4, 100, 100, 64, "bf16"), CALLS["causal"]
    made = selfcheck.inputs(shape)
    strided = [mx.contiguous(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in made]
    assert selfcheck.disagreement(call, *attend(shape, call, strided), made) is None


def test_calls_trace_under_compile_and_checkpoint():
    shape, call = CallShape(1, 2, 2, 130, 130, 64, "bf16"), CALLS["causal"]
    made = selfcheck.inputs(shape)
    expected = attend(shape, call, made)[0]
    for traced in (mx.compile, mx.checkpoint):
        found = traced(lambda q, k, v: attend(shape, call, [q, k, v])[0])(*made[:3])
        assert mx.array_equal(found, expected).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("name", WITHOUT_ARRAY)
def test_gradients_are_as_near(name, dim, dtype):
    for seed, size in enumerate(SIZES[:7]):
        Case(size, (dim, dim), dtype, KINDS[name], seed).check_gradients(str(size))


def test_gradients_flow_through_the_logsumexp():
    shape, call = CallShape(1, 4, 2, 150, 130, 64, "f16"), CALLS["causal"]
    q, k, v, _ = selfcheck.inputs(shape)

    def total(attend):
        return lambda q, k, v: mx.where(mx.isinf(attend(q, k, v)[1]), 0, attend(q, k, v)[1]).sum()

    ours = mx.grad(total(lambda *x: attend(shape, call, x)), argnums=(0, 1))(q, k, v)
    theirs = mx.grad(total(lambda *x: gradients.plain_attention(*x, call)), argnums=(0, 1))(q, k, v)
    for found, expected in zip(ours, theirs, strict=True):
        assert relative_error(found, exact(expected)) < 5e-3


@pytest.mark.parametrize("size", [(1, 4, 2, 300, 300), (1, 4, 2, 5, 300)])
def test_repeated_gradients_read_their_own_inputs(size):
    shape, call = CallShape(*size, 64, "bf16"), CALLS["causal"]
    for seed in range(6):
        made = selfcheck.inputs(shape, seed)
        _, found = mx.vjp(lambda *x: attend(shape, call, x)[0], made[:3], made[3:])
        assert selfcheck.gradient_disagreement(call, found, made) is None


def test_gradients_trace_under_compile():
    shape, call = CallShape(1, 4, 2, 200, 200, 128, "bf16"), CALLS["causal"]
    made = selfcheck.inputs(shape)
    traced = mx.compile(lambda *x: mx.vjp(lambda *y: attend(shape, call, y)[0], x[:3], x[3:])[1])
    for _ in range(3):
        assert selfcheck.gradient_disagreement(call, traced(*made), made) is None
