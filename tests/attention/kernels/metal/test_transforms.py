"""The kernels under `mx.vmap`, mapped before and after the gradient; unsupported transformations raise one line."""

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import metal
from tests.support.marks import slow
from tests.support.metal.device import Device, on_a_mac

AXES = [(0, 0, 0, 0, None), (0, None, None, None, None), (None, 1, 2, None, None), (0, 0, 0, None, 0)]
"""Mapped axes of q, k, v, the mask and the sinks."""


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    with on_a_mac(Device()) as made:
        yield made


def given(axes):
    """Return q, k, v, a mask and sinks, mapped along an axis of length 2 where `axes` has one."""
    shapes = ((2, 2, 33, 32), (2, 1, 40, 32), (2, 1, 40, 32), (2, 1, 33, 40), (2,))
    whole = [
        shape if axis is None else (*shape[:axis], 2, *shape[axis:]) for shape, axis in zip(shapes, axes, strict=True)
    ]
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(whole)]


def attend(q, k, v, mask, sinks):
    return metal.flash_attention(q, k, v, scale=0.2, mask=mask, sinks=sinks)


def loss(*arrays):
    output = attend(*arrays)
    return (output * mx.arange(output.size).reshape(output.shape)).sum() / output.size


def one_by_one(function, arrays, axes):
    """Return the expected result of `mx.vmap`."""
    pairs = [list(zip(arrays, axes, strict=True))] * 2
    calls = [
        function(*(x if axis is None else mx.take(x, i, axis) for x, axis in each)) for i, each in enumerate(pairs)
    ]
    return [mx.stack(list(each)) for each in zip(*calls, strict=True)]


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_vmap_is_a_call_for_each_index(axes):
    arrays = given(axes)
    (expected,) = one_by_one(lambda *x: [attend(*x)], arrays, axes)
    assert np.allclose(np.array(mx.vmap(attend, in_axes=axes)(*arrays)), np.array(expected), atol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [AXES[0], *map(slow, (AXES[1], *AXES[3:]))], ids=str)
def test_vmap_of_the_gradient_is_one_for_each_index(axes):
    arrays = given(axes)
    gradient = mx.grad(loss, argnums=tuple(range(5)))
    found = mx.vmap(gradient, in_axes=axes)(*arrays)
    for ours, expected in zip(found, one_by_one(gradient, arrays, axes), strict=True):
        assert np.allclose(np.array(ours), np.array(expected), atol=1e-5)


@pytest.mark.thorough
def test_the_gradient_of_vmap_is_the_sum_of_the_gradients():
    axes = AXES[0]
    arrays = given(axes)
    found = mx.grad(lambda *x: mx.vmap(loss, in_axes=axes)(*x).sum(), argnums=tuple(range(5)))(*arrays)
    expected = one_by_one(mx.grad(loss, argnums=tuple(range(5))), arrays, axes)
    for ours, right in zip(found[:4], expected[:4], strict=True):
        assert np.allclose(np.array(ours), np.array(right), atol=1e-5)
    assert np.allclose(np.array(found[4]), np.array(expected[4].sum(axis=0)), atol=1e-5)


def test_second_derivatives_are_refused_in_one_line():
    q, *others = given((None,) * 5)
    with pytest.raises(ValueError, match=r"^flash_attention has no second derivative; .*'baseline' has\.$"):
        mx.eval(mx.grad(lambda q: mx.grad(loss)(q, *others).sum())(q))


def test_forward_mode_is_refused_in_one_line():
    q, *others = given((None,) * 5)
    with pytest.raises(ValueError, match=r"^flash_attention has no forward-mode derivative \(jvp\); .*'baseline' has"):
        mx.eval(mx.jvp(lambda q: attend(q, *others), [q], [mx.ones_like(q)]))
