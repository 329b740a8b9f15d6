"""Calls with masks as values, ALiBi and the logsumexp: who computes them, and what they say."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from attention import UnsupportedError, UsageError, attention, masks
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import take_path
from attention.measure.device import probe
from tests.support.marks import slow

ROWS, KEYS = 60, 90
Q, K, V, G = (
    mx.random.normal(shape, key=mx.random.key(n))
    for n, shape in enumerate([(2, 4, ROWS, 16), (2, 2, KEYS, 16), (2, 2, KEYS, 8), (2, 4, ROWS, 8)])
)
SLOPES = [0.5, 0.25, 0.125, 0.0]
MASK = (masks.causal() & masks.documents([40, 30, 20])) | masks.prefix(3)
BLIND = masks.padding([0, 70]) & masks.causal()
SMALL = Practical(1 << 18)
"""Of a budget that gives several tiles."""
EVERY = ["baseline", "practical", "poc", "demo"]


def named(implementation):
    """Return an id that is the same in each worker."""
    return implementation if isinstance(implementation, str) else "in blocks"


def close(a: mx.array, b: mx.array, off: float = 2e-5) -> bool:
    return bool(mx.allclose(a, b, rtol=off, atol=off))


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("implementation", [*EVERY, SMALL], ids=named)
def test_rows_that_see_nothing_are_0_with_gradients_of_0(implementation):
    def attend(q, k, v):
        return attention(q, k, v, mask=BLIND, implementation=implementation)

    (out,), (d_query, d_key, d_value) = mx.vjp(attend, [Q, K, V], [G])
    for one in (out, d_query, d_key, d_value):
        assert mx.array_equal(one[0], mx.zeros_like(one[0]))
        assert mx.abs(one[1]).max() > 0


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("implementation", [*EVERY, SMALL], ids=named)
@pytest.mark.parametrize("mask", [None, "causal", MASK, BLIND], ids=str)
def test_the_logsumexp_is_that_of_the_masked_scores(implementation, mask):
    out, lse = attention(
        Q, K, V, mask=mask, softcap=3.0, score_mod=masks.alibi(SLOPES), return_lse=True, implementation=implementation
    )
    q, k = (np.array(x, np.float64) for x in (Q, K))
    scores = 3.0 * np.tanh(q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2) / 4 / 3.0)
    position, key = np.arange(ROWS)[:, None] + KEYS - ROWS, np.arange(KEYS)
    scores += np.array(SLOPES)[:, None, None] * (key - position)
    seen = np.ones((2, 1, ROWS, KEYS), bool)
    if mask == "causal":
        seen &= key <= position
    elif mask is not None:
        seen &= np.array(mask.dense((2, 4, ROWS, KEYS)))
    with np.errstate(divide="ignore"):
        expected = np.log(np.where(seen, np.exp(scores), 0).sum(axis=-1))
    assert (out.shape, lse.shape, lse.dtype) == ((2, 4, ROWS, 8), (2, 4, ROWS), mx.float32)
    np.testing.assert_allclose(np.array(lse), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("implementation", ["practical", SMALL, "poc"], ids=named)
@pytest.mark.parametrize("added", [False, True])
def test_the_logsumexp_has_a_gradient(implementation, added):
    array = mx.random.normal((4, ROWS, KEYS), key=mx.random.key(9))

    def loss(q, k, v, array, by):
        out, lse = attention(q, k, v, mask=array if added else MASK, return_lse=True, implementation=by)
        return (out * G).sum() + mx.sin(lse).sum()

    argnums = (0, 1, 2, 3) if added else (0, 1, 2)
    expected = mx.grad(loss, argnums=argnums)(Q, K, V, array, "baseline")
    for one, other in zip(mx.grad(loss, argnums=argnums)(Q, K, V, array, implementation), expected, strict=True):
        assert close(one, other)


def test_a_row_without_keys_passes_no_gradient_of_its_logsumexp():
    def finite(q):
        _, lse = attention(q, K, V, mask=BLIND, return_lse=True)
        return mx.where(mx.isinf(lse), 0, lse).sum()

    gradient = mx.grad(finite)(Q)
    assert mx.array_equal(gradient[0], mx.zeros_like(gradient[0]))
    assert mx.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["practical", "poc", "mlx", "torch"])
def test_a_mask_string_is_routed_as_a_pattern(name):
    if name == "torch":
        pytest.importorskip("torch")
    workload = Workload(seq=512, heads=2, head_dim=16, dtype="float32", mask="documents:100")
    route = load_implementation(name).route(workload, probe())
    assert route.supported
    wanted = {"practical": "blocks of a list", "mlx": "MLX SDPA, dense mask", "torch": "torch SDPA, dense mask"}
    if name in wanted:
        assert route.path == wanted[name]
    dense = load_implementation(name).route(Workload(seq=512, heads=2, head_dim=16, dtype="float32"), probe())
    if name in ("mlx", "torch"):
        assert route.predicted_bytes >= dense.predicted_bytes + 512 * 512


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("implementation", ["baseline", "poc", SMALL], ids=named)
@pytest.mark.parametrize("axes", [(0, 0), slow((None, 0)), slow((0, None))], ids=str)
def test_slopes_are_mapped(implementation, axes):
    given = [mx.stack([x, 0.5 * x]) if axis == 0 else x for x, axis in zip((Q, mx.array(SLOPES)), axes, strict=True)]

    def attend(q, slopes):
        return attention(q, K, V, mask=MASK, score_mod=masks.alibi(slopes), implementation=implementation)

    def loss(q, slopes):
        return (mx.vmap(attend, in_axes=axes)(q, slopes) ** 2).sum()

    def one_by_one(q, slopes):
        pairs = list(zip((q, slopes), axes, strict=True))
        return mx.stack([attend(*(x if axis is None else x[i] for x, axis in pairs)) for i in (0, 1)])

    assert close(mx.vmap(attend, in_axes=axes)(*given), one_by_one(*given))
    wanted = mx.grad(lambda *x: (one_by_one(*x) ** 2).sum())(*given)
    assert close(mx.grad(loss)(*given), wanted, 1e-4)


def test_poc_hands_over_what_its_kernel_does_not_declare(monkeypatch):
    from attention.implementations import fused

    kernel = fused._kernel("cpu")
    monkeypatch.setattr(kernel, "TAKES", frozenset())
    poc = fused.Poc()
    workload = Workload(seq=ROWS, kv_seq=KEYS, heads=4, kv_heads=2, head_dim=16, value_dim=8, dtype="float32")
    route = poc.route(workload, probe(), Needs(pattern=True))
    assert (route.path, route.fallback) == ("falls back: practical", True)
    assert route.reason.startswith("the kernel for cpu takes no patterns; ")
    out = attention(Q, K, V, mask=MASK, implementation=poc)
    assert take_path() == "falls back: practical"
    assert close(out, attention(Q, K, V, mask=MASK, implementation="baseline"))
    attention(Q, K, V, score_mod=masks.alibi(SLOPES), implementation=poc)
    assert take_path() == "falls back: practical"


class Plugin:
    name = "plugin"

    def route(self, workload, device, needs=None):
        return load_implementation("baseline").route(workload, device)

    def __call__(self, q, k, v, *, scale, mask, softcap=None):
        return load_implementation("baseline")(q, k, v, scale=scale, mask=mask, softcap=softcap)


def test_without_a_declaration_there_is_no_pattern():
    with pytest.raises(UnsupportedError, match=r"plugin: it takes no patterns of attention\.masks"):
        attention(Q, K, V, mask=MASK, implementation=Plugin())
    with pytest.raises(UnsupportedError, match="plugin: it takes no score_mod"):
        attention(Q, K, V, score_mod=masks.alibi(SLOPES), implementation=Plugin())
    with pytest.raises(UnsupportedError, match="plugin: it does not return the logsumexp"):
        attention(Q, K, V, return_lse=True, implementation=Plugin())
    attention(Q, K, V, mask=masks.causal() & masks.window(5), implementation=Plugin())  # bounds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"score_mod": lambda s: s}, "score_mod: got function; it takes None or attention.masks.alibi(slopes)"),
        ({"score_mod": masks.alibi([1.0])}, "score_mod: alibi got 1 slopes; it takes one for each of 4 heads"),
        ({"mask": masks.documents([9])}, "mask: documents got 9 positions in all; there are 90 keys"),
        ({"mask": MASK, "window": 0}, "window: got 0; it takes a whole number from 1"),
    ],
)
def test_a_bad_call_is_named(given, words):
    with pytest.raises(UsageError) as error:
        attention(Q, K, V, **given)
    assert str(error.value) == words or words in str(error.value)


@pytest.mark.parametrize("implementation", ["practical", "poc"])
def test_heads_that_share_keys_have_blocks_of_their_own(implementation):
    """A tile that one head sees whole, the other in part, and a third not at all."""
    shape = (1, 4, 256, 256)
    array = np.array([[[1, 0], [1, 1]], [[0, 0], [1, 0]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]], bool)[None]
    mask = masks.blocks(array, 128) & masks.causal() | masks.blocks(~array[:, :, ::-1], 128)
    q = mx.random.normal((1, 4, 256, 16), key=mx.random.key(1))
    k = mx.random.normal((1, 2, 256, 16), key=mx.random.key(2))
    found = attention(q, k, k, mask=mask, implementation=implementation)
    dense = mx.broadcast_to(mask.dense(shape), shape)
    assert close(found, attention(q, k, k, mask=dense, implementation="baseline"))


def test_a_window_limits_what_a_pattern_shows():
    found = attention(Q, K, V, mask=MASK, window=7)
    assert close(found, attention(Q, K, V, mask=MASK & masks.window(7), implementation="baseline"))


def test_tiles_without_a_visible_pair_are_not_computed():
    blocks = Practical()._strategy  # the strategy names what is skipped
    mask = masks.window(100) | masks.prefix(10)
    workload = Workload(seq=4096, heads=1, head_dim=16, dtype="float32", mask="pattern:0.03")
    choice = blocks(workload, "cpu", Needs(pattern=True), 64 << 20, mask)
    assert "skip 9" in choice.reason or "skip 8" in choice.reason


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["practical", "poc"])
def test_memory_does_not_grow_with_the_scores(implementation):
    length = 262_144
    q, k, v = (mx.random.normal((1, 1, length, 16), key=mx.random.key(n)) for n in range(3))
    mx.eval(q, k, v)
    mask = masks.documents([5000] * 52 + [2144]) & masks.window(1024)
    assert mask.pairs((1, 1, length, length)) < length * 1024
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = attention(q, k, v, mask=mask, implementation=implementation)
    mx.eval(out)
    assert mx.get_peak_memory() - before < (256 << 20) + out.nbytes
    last = slice(-200, None)
    near = attention(q[:, :, last], k[:, :, -2144:], v[:, :, -2144:], window=1024)
    assert close(out[:, :, last], near)


def test_a_bias_of_one_thread_is_for_all():
    bias = masks.alibi([0.5, 0.25])
    q = mx.random.normal((1, 2, 9, 16), key=mx.random.key(0))
    mx.eval(q)

    def attend() -> float:
        return attention(q, q, q, mask="causal", score_mod=bias, implementation="baseline").sum().item()

    with ThreadPoolExecutor(1) as pool:
        of_thread = pool.submit(attend).result()
    assert of_thread == attend()


@pytest.mark.compiles
@pytest.mark.parametrize(
    "mask", ["causal", masks.prefix(9), mx.ones((33, 33), mx.bool_)], ids=["causal", "value", "array"]
)
@pytest.mark.parametrize("name", ["mlx", "practical", "baseline"])
def test_a_shapeless_graph_takes_the_lengths_of_its_mask(name, mask):
    """MLX would compute with the mask of the traced lengths, and read beyond the arrays."""
    q, k = (mx.random.normal((1, heads, 33, 16), key=mx.random.key(heads)) for heads in (2, 1))
    attend = mx.compile(lambda q, k: attention(q, k, k, mask=mask, implementation=name), shapeless=True)
    try:
        found = attend(q, k)
    except ValueError as error:  # blocks of `practical`
        assert "cannot infer output shapes" in str(error)
    else:
        assert mx.allclose(found, attention(q, k, k, mask=mask, implementation="baseline"), atol=1e-5).item()
    longer = mx.concatenate([k, k], axis=2)
    for query, key in ((q[:, :, :20], k), (q, longer), (q[:, :, :1], k), (mx.concatenate([q, q], axis=2), longer)):
        with pytest.raises(ValueError, match=r"reshape|output shapes"):
            mx.eval(attend(query, key))


@pytest.mark.compiles
def test_a_shapeless_baseline_refuses_other_lengths():
    """A matrix product of MLX would read beyond its arrays, or end the process."""
    q, k = (mx.random.normal((1, 2, 8, 16), key=mx.random.key(key)) for key in range(2))
    attend = mx.compile(lambda q, k, v: attention(q, k, v, implementation="baseline"), shapeless=True)
    assert mx.allclose(attend(q, k, k), attention(q, k, k, implementation="mlx"), atol=1e-5).item()
    longer = mx.concatenate([q, q], axis=2)
    for arrays in ((longer, k, k), (q, longer, longer), (q, k, longer), (q[:, :, :4], k, k)):
        with pytest.raises(ValueError, match="reshape"):
            mx.eval(attend(*arrays))
