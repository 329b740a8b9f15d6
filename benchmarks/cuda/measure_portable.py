"""Benchmarks of the general kernels: `python -m benchmarks.cuda.measure_portable [forward backward masks]`.

Peers are PyTorch's FlashAttention 2 (its flash backend) and, with array masks, MLX's SDPA. Method: see
benchmarks/rounds.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from attention.kernels import cuda
from attention.kernels.cuda import attend, choice, flash_attention, gradients
from attention.measure.rounds import TimedCall
from benchmarks.cuda.harness import in_torch, random_arrays, report, selected_parts, write_rows
from benchmarks.rounds import MlxCalls, TorchCalls, medians


@contextlib.contextmanager
def portable_only() -> Iterator[None]:
    """Use the general kernels for every call, forward and backward, while the context is open."""
    choice.set_portable_only(True)
    _forget()
    try:
        yield
    finally:
        choice.set_portable_only(False)
        _forget()


def _forget() -> None:
    """Clear the cached selections."""
    cuda.forget_calls()
    for kept in (attend.repeated_call, gradients._own_is_taken, gradients._general_is_taken):
        kept.cache_clear()


SHAPES = [(dim, causal, length) for dim in (64, 128) for causal in (False, True) for length in (2048, 8192)]
OTHERS = [(dim, causal, 4096) for dim in (32, 80, 96, 192, 256) for causal in (False, True)]


def flash_2(arrays: list[mx.array], causal: bool) -> tuple[TimedCall, TimedCall]:
    """Return timed runs of PyTorch's flash backend: the forward pass, and the backward pass alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, cotangent = in_torch(arrays)

    def attend() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    inputs = [x.requires_grad_() for x in (q, k, v)]
    output = attend()

    def forward() -> Any:
        with torch.no_grad():
            return attend()

    return TorchCalls(forward), TorchCalls(lambda: torch.autograd.grad(output, inputs, cotangent, retain_graph=True))


def _case(dim: int, causal: bool, length: int) -> tuple[tuple[int, ...], str, float]:
    """Return the shape (B * L = 16384 tokens, hidden size 2048), a label, and the TFLOPs of one L x L product."""
    shape = (16384 // length, 2048 // dim, length, dim)
    work = 2 * shape[0] * shape[1] * length**2 * dim / (2 if causal else 1) / 1e12
    return shape, f"{shape} {'causal' if causal else 'full'}", work


def forward() -> list[Any]:
    """Benchmark the forward pass."""
    rows = []
    for dim, causal, length in SHAPES + OTHERS:
        shape, label, work = _case(dim, causal, length)
        arrays = random_arrays(shape, shape, shape, shape)
        q, k, v, _ = arrays
        scale = dim**-0.5

        def ours(q: Any = q, k: Any = k, v: Any = v, scale: float = scale, causal: bool = causal) -> mx.array:
            return flash_attention(q, k, v, scale=scale, causal=causal)

        runs = {"ours": MlxCalls(ours), "flash2": flash_2(arrays, causal)[0]}
        rows.append(report(label, medians(runs), 2 * work, "TFLOP/s"))
        mx.clear_cache()
    return rows


def backward() -> list[Any]:
    """Benchmark the backward pass alone, after an untimed forward pass."""
    from attention.kernels.cuda.portable import gradient
    from attention.kernels.cuda.runtime.call import CallParams, CallShape

    rows = []
    for dim, causal, length in SHAPES + OTHERS:
        shape, label, work = _case(dim, causal, length)
        arrays = random_arrays(shape, shape, shape, shape)
        call = CallParams(dim**-0.5, causal, None, None)
        shape_of_call = CallShape(shape[0], shape[1], shape[1], length, length, dim, "bf16")
        outputs = list(_with_logsumexp(arrays[:3], call))
        mx.eval(outputs)

        def ours(
            arrays: Any = arrays,
            outputs: Any = outputs,
            shape_of_call: CallShape = shape_of_call,
            call: CallParams = call,
        ) -> Any:
            return gradient.gradients(arrays[:3], arrays[3:], outputs, shape_of_call, call)

        runs = {"ours": MlxCalls(ours), "flash2": flash_2(arrays, causal)[1]}
        rows.append(report(f"{label} backward", medians(runs), 5 * work, "TFLOP/s"))
        mx.clear_cache()
    return rows


def _with_logsumexp(arrays: list[mx.array], call: Any) -> Any:
    from attention.kernels.cuda import flash_attention_with_logsumexp

    return flash_attention_with_logsumexp(*arrays, scale=call.scale, causal=call.causal)


MASKED = [  # batch, heads, kv_heads, queries, keys, dim; the axes of the mask that are not broadcast
    (1, 32, 8, 1, 8192, 128, "k"),
    (8, 32, 8, 1, 8192, 128, "bk"),
    (16, 32, 8, 1, 2048, 128, "bk"),
    (1, 32, 8, 4, 8192, 128, "qk"),
    (4, 16, 16, 1, 4096, 64, "bk"),
    (1, 32, 32, 1, 1024, 128, "k"),
    (4, 16, 16, 512, 512, 64, "bk"),
    (1, 16, 16, 4096, 4096, 128, "qk"),
    (2, 8, 8, 2048, 2048, 64, "bhqk"),
]


def masks() -> list[Any]:
    """Benchmark array masks, bool and additive, with few and many queries."""
    rows = []
    for batch, heads, kv_heads, queries, keys, dim, axes in MASKED:
        shape, kept = (batch, heads, queries, dim), (batch, kv_heads, keys, dim)
        sizes = {"b": batch, "h": heads, "q": queries, "k": keys}
        seen = mx.random.uniform(shape=[sizes[axis] if axis in axes else 1 for axis in "bhqk"]) < 0.9
        for name, mask in (("bool", seen), ("added", mx.where(seen, 0.0, -mx.inf).astype(mx.bfloat16))):
            q, k, v = random_arrays(shape, kept, kept)
            mx.eval(mask)
            scale = dim**-0.5

            def ours(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask, scale: float = scale) -> mx.array:
                return flash_attention(q, k, v, scale=scale, mask=mask)

            def theirs(q: Any = q, k: Any = k, v: Any = v, mask: Any = mask, scale: float = scale) -> mx.array:
                return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

            runs = {"ours": MlxCalls(ours), "mlx": MlxCalls(theirs)}
            label = f"{shape} to {kv_heads} x {keys}, {name} {axes}"
            rows.append(report(label, medians(runs), 1e-3, "k calls/s"))
            mx.clear_cache()
    return rows


PARTS: dict[str, Callable[[], list[Any]]] = {"forward": forward, "backward": backward, "masks": masks}


def main() -> None:
    """Run the named parts, or all; `--json PATH` writes the timings."""
    words, path = selected_parts(PARTS)
    with portable_only():
        rows = [row for name, part in PARTS.items() if name in words or not words for row in part()]
    write_rows(rows, path)


if __name__ == "__main__":
    main()
