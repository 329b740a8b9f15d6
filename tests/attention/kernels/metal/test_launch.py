"""Launch arguments: strides, masks of all shapes, small arrays, gradients; run in the verifier."""

import re

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import metal
from attention.kernels.common import selfcheck as comparison
from attention.kernels.metal import gradients, launch, selfcheck
from attention.kernels.metal.call import CallParams, CallShape, normalize
from attention.measure import reference
from attention.measure.reference import Rules
from tests.support.metal.device import Device, needs_verifier, on_a_mac


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    with on_a_mac(Device()) as made:
        yield made


def arrays(*shapes, seed=0):
    mx.random.seed(seed)
    return [mx.random.normal(shape) for shape in shapes]


def exact(q, k, v, **rules):
    q, k, v = (comparison.exact(x) for x in (q, k, v))
    mask = rules.pop("mask", None)
    whole = None if mask is None else np.broadcast_to(np.array(mask), (*q.shape[:3], k.shape[2]))
    share = q.shape[1] // k.shape[1]
    return np.array(
        [
            [
                reference.forward(
                    q[b, h],
                    k[b, h // share],
                    v[b, h // share],
                    Rules(**rules, mask=None if whole is None else whole[b, h]),
                ).output
                for h in range(q.shape[1])
            ]
            for b in range(q.shape[0])
        ]
    )


def test_heads_may_lie_inside_rows_and_slices_anywhere():
    packed, keys = arrays((2, 19, 4, 40), (2, 2, 64, 32))
    q = packed.swapaxes(1, 2)[..., 4:36]
    k, v = keys[:, :, 3:35], keys[:, :, ::2]
    found = metal.flash_attention(q, k, v, scale=0.2)
    assert np.allclose(np.array(found), exact(q, k, v, scale=0.2), atol=2e-6)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("shape", [(37,), (40, 37), (2, 1, 1, 37), (1, 4, 40, 1), (2, 4, 40, 37)], ids=str)
def test_a_mask_may_have_any_shape_that_broadcasts(shape):
    q, k, v, mask = arrays((2, 4, 40, 32), (2, 2, 37, 32), (2, 2, 37, 32), shape)
    found = metal.flash_attention(q, k, v, scale=0.2, mask=mask)
    assert np.allclose(np.array(found), exact(q, k, v, scale=0.2, mask=mask), atol=2e-6)


@pytest.mark.thorough
@needs_verifier
def test_small_arrays_are_device_memory(device):
    """MLX passes arrays of fewer than 8 elements as constant memory, which changes the source unless prevented."""
    q, k, v = arrays((1, 1, 1, 32), (1, 1, 5, 32), (1, 1, 5, 32))
    mask, sinks = mx.array([True, False, True, True, False]), mx.array([-50.0])

    def attend(q):
        return metal.flash_attention(q, k, v, scale=0.2, mask=mask, sinks=sinks)

    assert np.allclose(np.array(attend(q)), exact(q, k, v, scale=0.2, mask=mask), atol=2e-6)
    mx.eval(mx.grad(lambda q: attend(q).sum())(q))
    last = {one.kernel: one.text for one in device.launches}
    assert set(last) == {"forward", "join", "backward_query", "backward_key"}
    for name in ("mask", "sinks", "lse", "rest", "lses", "rests", "delta"):
        assert not [kernel for kernel, text in last.items() if re.search(rf"const constant \w+\* {name} ", text)]


def test_sinks_may_be_a_slice():
    q, k, v, sinks = arrays((1, 2, 40, 32), (1, 2, 37, 32), (1, 2, 37, 32), (4,))
    sliced, whole = (metal.flash_attention(q, k, v, scale=0.2, sinks=s) for s in (sinks[::2], sinks[::2] + 0.0))
    assert np.array_equal(np.array(sliced), np.array(whole))


@pytest.mark.parametrize("by", ["kernel", "score matrix"])
def test_a_sink_of_minus_infinity_is_none_for_empty_rows_too(by):
    shape = CallShape(1, 2, 1, 40, 37, 32, "float32")  # causal, so the first three queries see nothing
    call, without = (CallParams(0.2, causal=True, sinks=sinks) for sinks in (True, False))
    q, k, v, d_o = arrays((1, 2, 40, 32), (1, 1, 37, 32), (1, 1, 37, 32), (1, 2, 40, 32))
    d_lse = mx.where(mx.arange(40) < 3, 0.0, 1.0) * mx.ones((1, 2, 1))
    found = []
    for one in (call, without):
        primals = launch.arrays_of(q, k, v, sinks=mx.full((2,), -mx.inf))
        outputs = launch.forward(primals, shape, one)
        given = (primals, d_o, d_lse)
        if by == "score matrix":
            found.append(gradients.plain_gradients(*given, one))
        else:
            found.append(gradients.by_kernel(*given, outputs, shape, one))
    for ours, expected in zip(*found, strict=True):
        assert np.allclose(np.array(ours), np.array(expected), atol=2e-6)


def test_gradients_flow_through_the_logsumexp():
    q, k, v, by = arrays((1, 2, 20, 32), (1, 1, 25, 32), (1, 1, 25, 32), (1, 2, 20))

    def loss(q, k, v):
        output, logsumexp = metal.flash_attention_with_logsumexp(q, k, v, scale=0.2, causal=True)
        return output.sum() + (logsumexp * by).sum()

    def plainly(q, k, v):
        call = normalize(0.2, True, None, None, 25)
        output, logsumexp = gradients.plain_attention(launch.arrays_of(q, k, v), call)
        return output.sum() + (logsumexp * by).sum()

    ours, theirs = (mx.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (loss, plainly))
    for a, b in zip(ours, theirs, strict=True):
        assert np.allclose(np.array(a), np.array(b), atol=2e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_through_the_score_matrix_are_right(mask, sinks):
    shape, call = CallShape(1, 4, 2, 9, 12, 32, "float32"), CallParams(0.3, True, 5, 2.0, mask, sinks)
    given = selfcheck.inputs(shape, call)
    made = gradients.plain_gradients(given.arrays(shape), given.cotangent, None, call)
    found = made if sinks else made[:3]
    assert selfcheck.gradient_disagreement(given, call, found) is None


def test_the_checks_own_reference_is_right():
    shape, call = CallShape(1, 4, 2, 9, 12, 32, "float32"), CallParams(0.3, True, 5, 2.0, "float32")
    given = selfcheck.inputs(shape, call)
    rules = {"scale": 0.3, "causal": True, "window": 5, "softcap": 2.0, "mask": given.mask}
    expected = exact(given.q, given.k, given.v, **rules)
    assert np.allclose(selfcheck.reference(given, call)[0], expected, atol=1e-12)
    call = CallParams(0.3, True, sinks=True)
    given = selfcheck.inputs(shape, call)
    theirs = mx.fast.scaled_dot_product_attention(
        given.q, given.k, given.v, scale=0.3, mask="causal", sinks=given.sinks
    )
    assert np.allclose(selfcheck.reference(given, call)[0], np.array(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"window": 0}, "window is at least 1"),
        ({"softcap": -1.0}, "softcap is positive"),
        ({"softcap": float("inf")}, "softcap is positive and finite; got inf"),
        ({"scale": float("nan")}, "scale is finite"),
        ({"mask": mx.zeros((3, 7))}, "does not broadcast"),
        ({"mask": mx.zeros((20, 25), mx.int32)}, "mask is bool, float32"),
        ({"sinks": mx.zeros(3)}, r"sinks have shape \(2,\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(keywords, words):
    q, k, v = arrays((1, 2, 20, 32), (1, 1, 25, 32), (1, 1, 25, 32))
    with pytest.raises(ValueError, match=words):
        metal.flash_attention(q, k, v, **{"scale": 0.2, **keywords})
