"""Benchmark of the backward pass against cuDNN's, on Hopper: `python -m benchmarks.cuda.measure_backward`.

Head dims and lengths as arguments (`64 256 2048`) restrict the table to them; `--json PATH` writes the timings. The
`training` part of measure.py times forward plus backward.
"""

import math
from typing import Any

import mlx.core as mx

from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90.launch import forward_plan
from attention.measure.rounds import TimedCall
from benchmarks.cuda.harness import in_torch, random_arrays, report, selected_parts, write_rows
from benchmarks.rounds import EagerMlxCalls, TorchCalls, medians

DIMS, LENGTHS = (64, 128, 192, 256), (2048, 4096, 8192, 16384)


def ours(arrays: list[mx.array], shape: CallShape, call: CallParams) -> TimedCall:
    """Return a timed run of the three backward kernels; `arrays` are q, k, v and the cotangent of the output."""
    output, logsumexp = forward_plan(shape, call)(arrays[:3])[:2]
    given = [*arrays[:3], output, arrays[3], logsumexp, logsumexp]
    mx.eval(given)
    plan = gradient.make_plan_of_gradient(shape, call, False)
    return EagerMlxCalls(lambda: plan(given)[:3])


def cudnn(arrays: list[mx.array], causal: bool) -> TimedCall:
    """Return a timed run of PyTorch's cuDNN backward pass on a retained graph."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, cotangent = in_torch(arrays)
    q, k, v = inputs = [x.requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return TorchCalls(lambda: torch.autograd.grad(output, inputs, cotangent, retain_graph=True))


def measured(dim: int, length: int, causal: bool) -> dict[str, Any]:
    """Return a row of the table: B * L = 16384 tokens, hidden size about 2048."""
    batch, heads = 16384 // length, 2048 // dim
    shape = CallShape(batch, heads, heads, length, length, dim, "bf16")
    arrays = random_arrays(*[(batch, heads, length, dim)] * 4)
    runs = {"ours": ours(arrays, shape, CallParams(dim**-0.5, causal, None, None)), "cudnn": cudnn(arrays, causal)}
    work = 10 * batch * heads * length**2 * dim / (2 if causal else 1) / 1e12
    return report(f"{(batch, heads, length, dim)} {'causal' if causal else 'full'}", medians(runs), work, "TFLOP/s")


def main() -> None:
    """Run the benchmark and print the geometric mean of the speedups."""
    words, path = selected_parts(DIMS + LENGTHS)
    dims = [dim for dim in DIMS if str(dim) in words] or DIMS
    lengths = [length for length in LENGTHS if str(length) in words] or LENGTHS
    rows = []
    for dim in dims:
        for causal in (False, True):
            for length in lengths:
                rows.append(measured(dim, length, causal))
                mx.clear_cache()
    ratios = [row["seconds"]["cudnn"] / row["seconds"]["ours"] for row in rows]
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}, least {min(ratios):.3f} of cuDNN")
    write_rows(rows, path)


if __name__ == "__main__":
    main()
