"""Scores of any size, rows hidden by masks, and gradients of masks, each with an exactly known value."""

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import metal
from tests.support.marks import thorough
from tests.support.metal.device import Device, on_a_mac

FEW = 2
"""Queries whose keys are split."""
MANY = 40


@pytest.fixture(autouse=True)
def device(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    with on_a_mac(Device()) as made:
        yield made


def integers(*shape, seed=0):
    return mx.random.randint(-3, 4, shape, key=mx.random.key(seed)).astype(mx.float32)


def values(*shape, seed=9):
    return mx.random.normal(shape, key=mx.random.key(seed))


def weights(scores):
    """The softmax in float64."""
    made = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return made / made.sum(axis=-1, keepdims=True)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("shift", [-200.0, -5000.0])
def test_first_keys_hidden_and_low_scores(queries, shift):
    """The first 400 of 600 keys, which are whole tiles and a whole split, are hidden; all scores equal the shift."""
    q, k, v = mx.ones((1, 1, queries, 32)), mx.full((1, 1, 600, 32), shift / 32), values(1, 1, 600, 32)
    found = metal.flash_attention(q, k, v, scale=1.0, mask=mx.arange(600) >= 400)
    assert np.allclose(np.array(found), np.array(v[:, :, 400:].mean(axis=2, keepdims=True)), atol=2e-6)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("queries", [FEW, MANY])
@pytest.mark.parametrize("scale", [1e-30, 2.0**-3, 0.7 * 2.0**40, 1e28])
def test_scores_of_any_size(queries, scale):
    """Scores are integers times the scale, so that the largest are equal or far apart."""
    q, k, v = integers(1, 1, queries, 32), integers(1, 1, 530, 32, seed=1), values(1, 1, 530, 32)
    found = metal.flash_attention(q, k, v, scale=scale)
    products = np.array(q).astype(np.float64) @ np.array(k).astype(np.float64).swapaxes(-1, -2)
    assert np.allclose(np.array(found), weights(products * scale) @ np.array(v).astype(np.float64), atol=5e-6)


@pytest.mark.parametrize("value", [-1e9, float(mx.finfo(mx.float32).min)])
def test_a_row_that_a_finite_mask_hides_is_a_mean(value):
    """Keys are split into spans of unequal lengths, each weighted by its length in the mean."""
    q, k, v = mx.zeros((1, 1, FEW, 32)), values(1, 1, 523, 32, seed=3), values(1, 1, 523, 32)
    found = metal.flash_attention(q, k, v, scale=1.0, mask=mx.full((523,), value))
    assert np.allclose(np.array(found), np.array(v.mean(axis=2, keepdims=True)), atol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("value", [-1e9, float(mx.finfo(mx.float32).min)])
def test_gradients_of_rows_that_a_finite_mask_hides(value):
    """The weights of such a row sum to 1, and so does its contribution to dV for a cotangent of 1."""
    q, k, v = mx.zeros((1, 1, MANY, 32)), values(1, 1, 70, 32, seed=3), values(1, 1, 70, 32)
    mask = mx.full((MANY, 70), value)
    d_q, d_v = mx.grad(lambda q, v: metal.flash_attention(q, k, v, scale=1.0, mask=mask).sum(), argnums=(0, 1))(q, v)
    assert np.allclose(np.array(d_v), MANY / 70, rtol=1e-5)
    dp = np.array(v).astype(np.float64).sum(axis=-1)[0, 0]
    centred = np.array(k).astype(np.float64)[0, 0] * (dp - dp.mean())[:, None] / 70
    assert np.allclose(np.array(d_q)[0, 0], centred.sum(axis=0), atol=2e-5)


@pytest.mark.thorough
def test_sinks_as_low_as_a_finite_mask_get_their_share():
    """A sink and 70 keys at -1e9 each: the sink has 1/71 of every row, and the gradient of a key with value 0."""
    q, k, v = mx.zeros((1, 1, MANY, 32)), values(1, 1, 70, 32, seed=3), mx.ones((1, 1, 70, 32))
    mask, sinks = mx.full((70,), -1e9), mx.array([-1e9])

    def loss(sinks):
        return metal.flash_attention(q, k, v, scale=1.0, mask=mask, sinks=sinks).sum()

    total, gradient = mx.value_and_grad(loss)(sinks)
    assert np.allclose(total.item(), MANY * 32 * 70 / 71, rtol=1e-5)
    assert np.allclose(gradient.item(), -MANY * 32 * 70 / 71**2, rtol=1e-4)


def test_a_mask_and_a_score_whose_sum_overflows_hide_no_row():
    q, k, v = mx.full((1, 1, 3, 32), -1e17), mx.full((1, 1, 40, 32), 1e17), values(1, 1, 40, 32)
    found = metal.flash_attention(q, k, v, scale=1.0, mask=mx.full((40,), mx.finfo(mx.float32).min))
    assert np.allclose(np.array(found), np.array(v.mean(axis=2, keepdims=True)), atol=2e-6)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        ("plain", (MANY, 37)),
        thorough("checkpoint", (1, 4, MANY, 1)),
        pytest.param("plain", (1, 4, MANY, 1), marks=pytest.mark.slow),
        *(
            pytest.param(transform, shape, marks=pytest.mark.slow)
            for transform in ("plain", "checkpoint")
            for shape in ((37,), (2, 1, 1, 37))
        ),
        pytest.param("checkpoint", (MANY, 37), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_additive_mask_gets_its_gradient(shape, transform):
    q, k, v = values(2, 4, MANY, 32, seed=1), values(2, 2, 37, 32, seed=2), values(2, 2, 37, 32)
    mask, cotangent = values(*shape, seed=4), values(2, 4, MANY, 32, seed=5)

    def plainly(mask):
        keys, each = mx.repeat(k, 2, axis=1), mx.repeat(v, 2, axis=1)
        scores = 3.0 * mx.tanh(0.2 * q @ keys.swapaxes(-1, -2) / 3.0) + mask
        return ((mx.softmax(scores, axis=-1) @ each) * cotangent).sum()

    def ours(mask):
        return (metal.flash_attention(q, k, v, scale=0.2, mask=mask, softcap=3.0) * cotangent).sum()

    found = mx.grad(mx.checkpoint(ours) if transform == "checkpoint" else ours)(mask)
    assert found.shape == mask.shape
    assert np.allclose(np.array(found), np.array(mx.grad(plainly)(mask)), atol=1e-5)
