"""The patch takes every kind of call, passes unsupported calls on to MLX, and is completely undone."""

import asyncio
import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import attention
from attention.core.errors import KernelUnavailable, UnsupportedError, UsageError
from attention.core.route import Needs, Route
from attention.core.workload import Workload
from attention.implementations.baseline import Baseline
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import current_backend
from attention.implementations.fused import KERNELS, Poc
from attention.masks import Mask

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.models import base, cache, llama, qwen2

from tests.support.marks import slow

NAME = "scaled_dot_product_attention"
LATER = "mlx_lm.models.granite"


class Picky(Baseline):
    """An implementation that declines causal calls."""

    name = "picky"

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, *, mask: Mask, **more: Any) -> mx.array:
        if mask.causal:
            raise UnsupportedError("causal masks")
        return super().__call__(q, k, v, mask=mask, **more)


def everything() -> dict[tuple[str, str], int]:
    """The identity of every attribute of every loaded module of mlx-lm, and of MLX's own function."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mlx_lm"}
    modules["mlx.core.fast"] = mx.fast
    return {(name, key): id(value) for name, module in modules.items() for key, value in vars(module).items()}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before, path_hooks = everything(), [*sys.meta_path]
    yield
    after = everything()
    assert {key: after[key] for key in before} == before
    assert sys.meta_path == path_hooks
    for module in ("mlx_lm.models.base", "mlx.core.fast"):
        assert [i for (_, name), i in after.items() if name == NAME].count(after[module, NAME]) >= 1


def arrays(seq: int, kv_seq: int, width: int = 64, value_width: int = 64) -> tuple[mx.array, mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seq + kv_seq), 3)
    shapes = ((2, 4, seq, width), (2, 2, kv_seq, width), (2, 2, kv_seq, value_width))
    q, k, v = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True))
    return q, k, v


def band(*shape: int) -> mx.array:
    """A bool mask without fully masked rows."""
    return (mx.random.uniform(shape=shape, key=mx.random.key(9)) > 0.4) | (mx.arange(shape[-1]) == 0)


MASKS = {
    "none": lambda: None,
    "causal": lambda: "causal",
    "bool 2-D": lambda: band(9, 33),
    "bool 4-D": lambda: band(2, 1, 9, 33),
    "bool a head": lambda: band(1, 4, 9, 33),
    "additive": lambda: mx.where(band(2, 1, 9, 33), mx.random.normal((9, 33), key=mx.random.key(1)), -mx.inf),
}


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("mask", [mask if mask in ("causal", "additive") else slow(mask) for mask in MASKS])
@pytest.mark.parametrize("kind", ["plain", "sinks", "wide values", "cache slices", "quantized"])
@pytest.mark.parametrize("budget", [None, 32 << 10], ids=["whole", "in blocks"])
def test_practical_takes_every_call_that_models_make(mask: str, kind: str, budget: int | None) -> None:
    q, k, v = arrays(9, 33, value_width=32 if kind == "wide values" else 64)
    sinks = mx.array([1.0, -2.0, 0.5, 3.0]) if kind == "sinks" else None
    held: Any = None
    if (kind, mask) == ("quantized", "bool a head"):
        pytest.skip("mlx-lm takes no mask of a head's own there")
    if kind == "cache slices":
        held = cache.KVCache()
        k, v = held.update_and_fetch(k, v)
        k, v = held.keys[..., :33, :], held.values[..., :33, :]
    if kind == "quantized":
        held = cache.QuantizedKVCache(group_size=32, bits=8)
        k, v = held.update_and_fetch(k, v)
    call = {"cache": held, "scale": 0.2, "mask": MASKS[mask](), "sinks": sinks}
    wanted = base.scaled_dot_product_attention(q + 0, k, v, **call)  # mlx-lm scales quantized calls' query in place
    with attention.patch_mlx_lm(Practical(budget)) as patch:
        got = base.scaled_dot_product_attention(q, k, v, **call)
    assert (patch.calls_taken, patch.calls_handed) == (1, 0), patch.summary()
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=2e-5)


@pytest.mark.thorough
def test_sinks_have_mlxs_gradient_in_blocks() -> None:
    q, k, v = arrays(9, 33)
    sinks = mx.array([1.0, -2.0, 0.5, 3.0])

    def loss(*primals: mx.array) -> mx.array:
        q, k, v, sinks = primals
        return mx.square(llama.scaled_dot_product_attention(q, k, v, None, 0.2, "causal", sinks)).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    wanted = gradient(q, k, v, sinks)
    with attention.patch_mlx_lm(Practical(32 << 10)):
        got = gradient(q, k, v, sinks)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)


def test_what_is_not_taken_goes_to_mlx_with_a_counted_reason() -> None:
    q, k, v = arrays(9, 33)
    sinks = mx.zeros((4,))
    wanted = llama.scaled_dot_product_attention(q, k, v, None, 0.2, "causal")
    with attention.patch_mlx_lm(Picky()) as patch:
        got = llama.scaled_dot_product_attention(q, k, v, None, 0.2, "causal")
        llama.scaled_dot_product_attention(q, k, v, None, 0.2, None, sinks)
        llama.scaled_dot_product_attention(q, k, v, None, 0.2, None)
    assert mx.array_equal(got, wanted)
    assert patch.handed == {"causal masks": 1, "attention sinks": 1}
    assert patch.taken == {"manual, unfused": 1}
    assert "picky took 1 of 3 calls of attention" in patch.summary()
    assert "MLX's own got 1: attention sinks" in patch.summary()


def test_the_path_counted_is_the_path_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """An additive mask of another type than the query's needs memory that the route of its shape does not predict."""
    mask = mx.where(mx.tril(mx.ones((200, 200), mx.bool_)), 0.0, -1e9).astype(mx.float32)
    q = mx.random.normal((1, 4, 200, 16), key=mx.random.key(0)).astype(mx.float16)
    in_blocks = Practical._in_blocks
    for budget in range(1 << 20, 12 << 20, 1 << 20):
        ran = ["MLX SDPA, unfused"]

        def spied(self: Practical, choice: Any, *rest: Any, ran: list[str] = ran) -> mx.array:
            if choice.forward.is_cut:
                ran[0] = f"blocks {choice.blocks.rows} x {choice.blocks.keys}"
            return in_blocks(self, choice, *rest)

        monkeypatch.setattr(Practical, "_in_blocks", spied)
        with attention.patch_mlx_lm(Practical(budget)) as patch:
            mx.eval(llama.scaled_dot_product_attention(q, q, q, None, 0.25, mask))
        assert patch.taken == {ran[0]: 1}, budget


def test_a_fallback_in_mid_call_is_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q = mx.random.normal((1, 4, 9, 16))
    chosen = Poc()

    def unavailable(*args: Any, **more: Any) -> mx.array:
        raise KernelUnavailable("the compiler is gone")

    monkeypatch.setattr(chosen, "_find_kernel", lambda key, *rest: (unavailable, "the kernel"))
    with attention.patch_mlx_lm(chosen) as patch:
        llama.scaled_dot_product_attention(q, q, q, None, 0.25, "causal")
    assert patch.taken == {"falls back: MLX SDPA": 1}


def test_a_new_length_asks_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module(KERNELS[current_backend()])
    asked: list[int] = []

    def route(workload: Workload, needs: Needs) -> Route:
        asked.append(workload.kv_seq)
        return Route(path="the kernel", fused=True, reason="it needs no compiler here")

    monkeypatch.setattr(kernel, "route", route)
    monkeypatch.setattr(kernel, "attend", lambda q, k, v, **more: q)
    q = mx.zeros((1, 2, 1, 16))
    with attention.patch_mlx_lm(Poc()) as patch:
        for length in (31, 31, 32, 31, 33):
            k = mx.zeros((1, 1, length, 16))
            llama.scaled_dot_product_attention(q, k, k, cache=None, scale=0.25, mask=None)
    assert patch.calls_taken == 5
    assert asked == [31, 32, 33]


def test_demo_counts_the_choice_that_ran() -> None:
    q = mx.random.normal((1, 4, 9, 16))
    with attention.patch_mlx_lm("demo") as patch:
        llama.scaled_dot_product_attention(q, q, q, None, 0.25, "causal")
    assert [path.startswith("tuned: ") for path in patch.taken] == [True], patch.taken


def test_a_mistake_of_the_model_raises_mlxs_own_error() -> None:
    q, k, v = arrays(9, 33)
    with attention.patch_mlx_lm() as patch, pytest.raises(ValueError, match="scaled_dot_product_attention"):
        llama.scaled_dot_product_attention(q, k[:, :, :, :5], v, None, 0.2, None)
    assert patch.calls_taken == 0


def test_direct_calls_of_mlx_are_taken_from_models_alone() -> None:
    from mlx_lm.models import plamo2

    q, k, v = arrays(9, 33)
    call = eval("lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2)", vars(plamo2))
    with attention.patch_mlx_lm() as patch:
        mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2)
        assert patch.calls_taken == 0
        call(q, k, v)
    assert patch.calls_taken == 1


def test_a_model_loaded_meanwhile_is_patched_and_restored() -> None:
    sys.modules.pop(LATER, None)
    with attention.patch_mlx_lm():
        later = importlib.import_module(LATER)
        assert vars(later)[NAME] is vars(qwen2)[NAME] is vars(base)[NAME]
        replaced = vars(later)[NAME]
    assert vars(later)[NAME] is vars(qwen2)[NAME] is vars(base)[NAME]
    assert vars(later)[NAME] is not replaced


def test_what_kept_the_replacement_calls_mlx_afterwards() -> None:
    q, k, v = arrays(9, 33)
    with attention.patch_mlx_lm() as patch:
        kept = llama.scaled_dot_product_attention
    assert mx.array_equal(kept(q, k, v, None, 0.2, None), llama.scaled_dot_product_attention(q, k, v, None, 0.2, None))
    assert patch.calls_taken == 0


def test_somebody_elses_replacement_stays() -> None:
    def own(*args: Any, **kwargs: Any) -> None: ...

    original = qwen2.scaled_dot_product_attention
    qwen2.scaled_dot_product_attention = own
    try:
        with attention.patch_mlx_lm():
            assert qwen2.scaled_dot_product_attention is own
        assert qwen2.scaled_dot_product_attention is own
    finally:
        qwen2.scaled_dot_product_attention = original


def attend() -> None:
    q, k, v = arrays(2, 3)
    llama.scaled_dot_product_attention(q, k, v, None, 0.2, None)


def test_of_nested_patches_the_inner_one_takes() -> None:
    with attention.patch_mlx_lm("baseline") as outer, attention.patch_mlx_lm("practical") as inner:
        attend()
    assert (outer.calls_taken, inner.calls_taken) == (0, 1)


def test_the_same_patch_can_be_entered_again() -> None:
    patch = attention.patch_mlx_lm("baseline")
    with patch:
        with patch:
            attend()
        attend()
    assert patch.calls_taken == 2


def test_an_exception_undoes_it_and_passes() -> None:
    original = llama.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="mine"), attention.patch_mlx_lm():
        raise RuntimeError("mine")
    assert llama.scaled_dot_product_attention is original


def test_patches_that_overlap_in_threads_are_all_undone() -> None:
    entered, left = threading.Event(), threading.Event()
    patches = [attention.patch_mlx_lm("baseline"), attention.patch_mlx_lm("practical")]

    def second() -> None:
        entered.wait()
        with patches[1]:
            left.wait()
            attend()

    thread = threading.Thread(target=second)
    thread.start()
    with patches[0]:
        entered.set()
        while not patches[1].is_open:
            pass
        attend()
    left.set()
    thread.join()
    assert (patches[0].calls_taken, patches[1].calls_taken) == (0, 2)


def test_it_decorates_functions_generators_and_coroutines() -> None:
    patch = attention.patch_mlx_lm("baseline")

    @patch
    def plain() -> int:
        attend()
        return 5

    @patch
    def several() -> Iterator[int]:
        attend()
        yield 1

    @patch
    async def later() -> int:
        attend()
        return 7

    assert (plain(), [*several()], asyncio.run(later())) == (5, [1], 7)
    assert patch.calls_taken == 3
    gc.collect()


def test_an_unknown_implementation_is_reported_at_once() -> None:
    with pytest.raises(UsageError, match="did you mean 'practical'"):
        attention.patch_mlx_lm("practicle")
