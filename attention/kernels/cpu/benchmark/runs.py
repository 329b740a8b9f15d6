"""Calls of each implementation, and alternating timing."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import mlx.core as mx

from attention.device import usable_cores
from attention.kernels import cpu
from attention.kernels.cpu.benchmark.shapes import TYPES, Shape

Run = Callable[[], object]

SETTLE_S: Final = 0.012
"""Torch's threads spin for 7 ms after a call, which would take half a processor from the next sample."""


def ours(shape: Shape, dtype: str, backward: bool = False, fused: bool = True) -> Run:
    """Return a call of the CPU kernel, or of MLX's own attention if `fused` is false."""
    q, k, v, cotangent = (mx.array(x).astype(TYPES[dtype]) for x in shape.numbers())
    mx.eval(q, k, v, cotangent)
    scale = shape.head_dim**-0.5

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if fused:
            return cpu.flash_attention(q, k, v, scale=scale, causal=shape.causal)
        mask = "causal" if shape.causal else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    if backward:
        return lambda: mx.vjp(attend, [q, k, v], [cotangent])[1]
    return lambda: attend(q, k, v)


def torchs(shape: Shape, dtype: str, backward: bool = False) -> Run | None:
    """Return torch's call on as many threads, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads())
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    q, k, v, cotangent = (torch.tensor(x).to(getattr(torch, dtype)) for x in shape.numbers())
    shared: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads else {}
    if not backward:
        return lambda: attention(q, k, v, is_causal=shape.causal, **shared)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*inputs, is_causal=shape.causal), inputs, cotangent)


def threads() -> int:
    """Return the number of threads that the kernel uses."""
    return int(os.environ.get("FATUI_THREADS") or usable_cores())


def sample(run: Run, calls: int) -> float:
    """Return seconds per call, of several independent calls evaluated together."""
    start = time.perf_counter()
    outputs = [run() for _ in range(calls)]
    first = outputs[0][0] if isinstance(outputs[0], list) else outputs[0]
    if isinstance(first, mx.array):
        mx.eval(outputs)
    return (time.perf_counter() - start) / calls


def settled_sample(run: Run, calls: int, lead_in: bool = True) -> float:
    """Take a sample after other libraries' threads have gone to sleep, and after an untimed call."""
    time.sleep(SETTLE_S)
    if lead_in:
        sample(run, 1)
    return sample(run, calls)


def calls_for(run: Run, seconds: float) -> int:
    """Return the number of calls for a sample of about `seconds`; at least one."""
    once = sample(run, 1)
    return 1 if once > 4 * seconds else max(1, min(200, round(seconds / max(1e-6, sample(run, 2)))))


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """Return the names in the order of one round: each round begins with the next one."""
    order = list(names)
    first = number % len(order)
    return order[first:] + order[:first]


def one_round(runs: dict[str, Run], calls: int, number: int) -> dict[str, float]:
    """Return seconds per call of each, measured in the order of the round."""
    return {name: settled_sample(runs[name], calls) for name in in_turn(runs, number)}
