"""Calls with quantized keys and values on a GPU, all views of longer buffers, against float64 over their values."""

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from attention import attention
from attention.implementations import load_implementation
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import call_signature
from attention.masks import Mask
from attention.measure.device import probe
from tests.support import kernel_oracle, quantized_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(mx.default_device() == mx.Device(mx.cpu), reason="MLX computes on the CPU here"),
]
BY = {"baseline": "baseline", "practical": "practical", "in parts": Practical(1 << 21), "poc": "poc"}


@pytest.mark.parametrize("dtype", kernel_oracle.DTYPES.values(), ids=str)
@pytest.mark.parametrize("forms", ["int4+int8:32", "int3:32+int6", "mxfp4+mxfp8", "nvfp4+int4:128"])
@pytest.mark.parametrize("name", BY)
def test_calls_are_right(name, forms, dtype):
    key_form, _, value_form = forms.partition("+")
    kinds = [(1, {}), (200, {"causal": True}), (60, {"window": 50}), (40, {"softcap": 4.0})]
    for seq, options in kinds:
        q = mx.random.normal((2, 8, seq, 128), key=mx.random.key(seq)).astype(dtype)
        k, v = (
            quantized_values.laid_out(quantized_values.normal(n, (2, 2, 333, 128), dtype, form), 2)
            for n, form in enumerate((key_form, value_form))
        )
        window, softcap = options.get("window"), options.get("softcap")
        mask = "causal" if "causal" in options else None
        out = attention(q, k, v, mask=mask, window=window, softcap=softcap, implementation=BY[name])
        oracle = kernel_oracle.Options(scale=128**-0.5, **options)
        given = [kernel_oracle.numbers(q), quantized_values.exact(k), quantized_values.exact(v)]
        exact = kernel_oracle.attention(*given, oracle)[0]
        plain = kernel_oracle.plain_attention(*given, oracle, dtype)
        in_tf32 = 2e-3 if name == "baseline" and dtype != mx.bfloat16 else 4e-6  # MLX's float32 products on CUDA
        kernel_oracle.assert_near(out, exact, plain, dtype, 2, f"{name} {seq}", in_tf32 * np.abs(given[2]).max())


@pytest.mark.parametrize("seq", [1, 40, 200])
@pytest.mark.parametrize("forms", ["int8+int4:32", "mxfp4"])
def test_sinks_are_an_extra_logit(seq, forms):
    """`poc` computes calls with sinks in its kernels, as `practical` does over the dequantized values."""
    key_form, _, value_form = forms.partition("+")
    q = mx.random.normal((1, 8, seq, 64), key=mx.random.key(seq)).astype(mx.bfloat16)
    k, v = (
        quantized_values.normal(n, (1, 2, 300, 64), mx.bfloat16, form)
        for n, form in enumerate((key_form, value_form or key_form))
    )
    sinks = mx.array([-3.0, 0, 1, 2, 3, 4, 6, 9]).astype(mx.bfloat16)
    poc = load_implementation("poc")
    workload, needs = call_signature(q, k, v, Mask(causal=True), None)
    assert not poc.route(workload, probe(), structs.replace(needs, sinks=True)).fallback
    found = poc(q, k, v, scale=1 / 8, mask=Mask(causal=True), sinks=sinks)
    dense = [mx.array(quantized_values.exact(x).astype(np.float32)) for x in (k, v)]
    wide = q.astype(mx.float32), *dense
    wanted = Practical()(*wide, scale=1 / 8, mask=Mask(causal=True), sinks=sinks.astype(mx.float32))
    assert mx.abs(found.astype(mx.float32) - wanted).max() <= 0.02 * mx.abs(wanted).max()


@pytest.mark.parametrize("name", ["baseline", "practical", "in parts"])
def test_gradients_of_the_query_are_right(name):
    for seq in (1, 128, 150):
        q = mx.random.normal((1, 4, seq, 64), key=mx.random.key(seq)).astype(mx.bfloat16)
        k, v = (
            quantized_values.normal(n, (1, 2, 200, 64), mx.bfloat16, form) for n, form in enumerate(("int8", "mxfp4"))
        )
        dense = [mx.array(quantized_values.exact(x).astype(np.float32)) for x in (k, v)]

        def loss(q, k, v, by):
            return (attention(q, k, v, implementation=by).astype(mx.float32) ** 2).sum()

        found = mx.grad(lambda q: loss(q, k, v, BY[name]))(q).astype(mx.float32)  # noqa: B023
        wanted = mx.grad(lambda q: loss(q, *dense, "baseline"))(q.astype(mx.float32))  # noqa: B023
        assert mx.abs(found - wanted).max() <= 0.05 * mx.abs(wanted).max()
