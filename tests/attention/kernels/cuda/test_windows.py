"""The Hopper kernels for large problems with windows, against float64; small problems take others."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, make_plan
from attention.kernels.cuda.sm90 import fp8, fp8_launch, gradient
from attention.kernels.cuda.sm90.forward import fewer_consumers, specialise
from attention.kernels.cuda.sm90.launch import forward_stages
from tests.support import fp8_model, kernel_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.variant() != "hopper", reason="only Hopper GPUs have these kernels"),
]
WINDOWS = [1, 64, 100, 129, 320, 1000]
"""Multiples of the tiles of keys and of the rows of a consumer, and not."""
SIZES = [  # batch, heads, kv_heads, queries, keys: a block has up to three work items, of one or several tiles of keys
    (1, 280, 140, 80, 300),
    (1, 100, 25, 330, 400),
    (1, 8, 8, 1100, 1500),
    (1, 4, 1, 900, 500),
    (1, 1, 1, 193, 2049),
]


def made_of(size, dim, element, window):
    shape = CallShape(*size, dim, element)
    return shape, CallParams(dim**-0.5, True, window, None), selfcheck.inputs(shape, window)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("dim", "element"), [(64, "f16"), (128, "bf16"), (192, "bf16"), (256, "f16")])
def test_every_number_of_consumers_is_right(dim, element, window, size):
    shape, call, made = made_of(size, dim, element, window)
    arrays, options = [kernel_oracle.numbers(x) for x in made[:3]], kernel_oracle.Options(dim**-0.5, True, window)
    exact, logsumexp, _ = kernel_oracle.attention(*arrays, options)
    plain = kernel_oracle.plain_attention(*arrays, options, made[0].dtype)
    seen = np.isfinite(logsumexp)
    largest = specialise(dim, True, element, True)
    for kernel in (largest, *fewer_consumers(largest)):
        found = make_plan(INPUTS, OUTPUTS, forward_stages(shape, call, kernel=kernel))(made[:3])
        kernel_oracle.poison()
        mx.eval(found)
        what = f"{kernel.consumers} consumers"
        kernel_oracle.assert_near(found[0], exact, plain, made[0].dtype, 2, what)
        own = kernel_oracle.numbers(found[1])
        assert np.array_equal(np.isfinite(own), seen), what
        assert np.abs(own[seen] - logsumexp[seen]).max() < 1e-3, what


@pytest.mark.parametrize("window", [37, 128, 200])
@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_of_the_largest_kernel_are_right(dim, window):
    for size in SIZES[1:4]:
        shape, call, made = made_of(size, dim, "bf16", window)
        stages = forward_stages(shape, call, kernel=specialise(dim, True, "bf16", True))
        outputs = make_plan(INPUTS, OUTPUTS, stages)(made[:3])[: len(OUTPUTS)]
        found = gradient.by_kernel(made[:3], made[3:], outputs, shape, call)
        kernel_oracle.poison()
        mx.eval(found)
        arrays, options = [kernel_oracle.numbers(x) for x in made], kernel_oracle.Options(dim**-0.5, True, window)
        exact = kernel_oracle.gradients(*arrays, options)
        plain = kernel_oracle.plain_gradients(*arrays, options, mx.bfloat16)
        for name, own, right, rounded in zip(("dQ", "dK", "dV"), found, exact, plain, strict=True):
            kernel_oracle.assert_near(own, right, rounded, mx.bfloat16, 3, f"{size}: {name}")


@pytest.mark.parametrize("window", [1, 100, 128, 200])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_number_of_consumers_is_right_in_8_bits(dim, window):
    for size in SIZES[1:4]:
        shape, call, made = made_of(size, dim, "bf16", window)
        arrays = [kernel_oracle.numbers(x) for x in made[:3]]
        exact = kernel_oracle.attention(*arrays, kernel_oracle.Options(dim**-0.5, causal=True, window=window))[0]
        largest = fp8.specialise(dim, True, "bf16", True)
        for kernel in (largest, *fewer_consumers(largest)):
            found = fp8_launch.plan(shape, call, kernel)(made[:3])[0]
            kernel_oracle.poison()
            assert fp8_model.relative_rmse(kernel_oracle.numbers(found), exact) < 0.09, (size, kernel.consumers)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_input_gives_the_same_bits(dim):
    shape, call, made = made_of((1, 16, 16, 4096, 4096), dim, "bf16", 1024)
    plan = make_plan(INPUTS, OUTPUTS, forward_stages(shape, call, kernel=specialise(dim, True, "bf16", True)))
    first = plan(made[:3])[0]
    for _ in range(20):
        assert mx.array_equal(first, plan(made[:3])[0]).item()
