"""Times the kernels against MLX's SDPA and PyTorch's cuDNN, on a GPU: `python -m attention.kernels.cuda.measure PART`.

Parts: prefill, dims, decode, small, training. In each round every call is sampled once, in alternating order; each
sample is preceded by as long an untimed run of the same call, since under a power limit the clock depends on what ran
just before. Reported are medians.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from attention.kernels.cuda import flash_attention

Run = Callable[[int], float]
ROUNDS, SAMPLE_S = 7, 0.04


def timed_mlx(call: Callable[[], Any]) -> Run:
    """Seconds a call, of k calls queued and evaluated together."""

    def run(count: int) -> float:
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([call() for _ in range(count)])
        mx.synchronize()
        return (time.perf_counter() - start) / count

    return run


def timed_torch(call: Callable[[], Any]) -> Run:
    """The same for PyTorch."""
    import torch

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    return run


def medians(runs: dict[str, Run]) -> dict[str, float]:
    """Seconds of each call, interleaved, each sample with a lead-in of its own."""
    counts = {}
    for name, run in runs.items():
        for _ in range(3):  # the third call is traced
            run(1)
        counts[name] = max(1, min(200, round(SAMPLE_S / min(run(1), run(2)))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            runs[name](counts[name])
            samples[name].append(runs[name](counts[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def drawn(*shapes: tuple[int, ...]) -> list[mx.array]:
    """Random bfloat16 arrays."""
    arrays = [mx.random.normal(shape).astype(mx.bfloat16) for shape in shapes]
    mx.eval(arrays)
    return arrays


def in_torch(arrays: list[mx.array]) -> list[Any]:
    """The same values in PyTorch."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.array(x.view(mx.int16))).cuda().view(torch.bfloat16) for x in arrays]


def cudnn(arrays: list[mx.array], causal: bool) -> Run:
    """PyTorch's SDPA on cuDNN."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = in_torch(arrays)

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return timed_torch(call)


def forward_runs(arrays: list[mx.array], causal: bool, with_cudnn: bool = True) -> dict[str, Run]:
    """Ours, MLX's and cuDNN's forward on the same inputs."""
    q, k, v = arrays
    scale, mask = q.shape[-1] ** -0.5, "causal" if causal else None
    runs = {
        "ours": timed_mlx(lambda: flash_attention(q, k, v, scale=scale, causal=causal)),
        "mlx": timed_mlx(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)),
    }
    return {**runs, "cudnn": cudnn(arrays, causal)} if with_cudnn else runs


def report(label: str, seconds: dict[str, float], work: float, unit: str) -> dict[str, Any]:
    """Prints a row; `work` is in units of 1 a second, `unit` says of what."""
    rates = " ".join(f"{name} {work / s:.4g}" for name, s in seconds.items())
    ratios = " ".join(f"/{name} {s / seconds['ours']:.2f}" for name, s in seconds.items() if name != "ours")
    print(f"{label:34} {rates} {unit}  {ratios}", flush=True)
    return {"label": label, "seconds": seconds}


def prefill(dims: tuple[int, ...] = (64, 128, 256), lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)) -> list[Any]:
    """B * L = 16384 tokens, 2048 hidden."""
    rows = []
    for dim in dims:
        for causal in (False, True):
            for length in lengths:
                shape = (16384 // length, 2048 // dim, length, dim)
                work = 4 * shape[0] * shape[1] * length**2 * dim / (2 if causal else 1) / 1e12
                label = f"{shape} {'causal' if causal else 'full'}"
                seconds = medians(forward_runs(drawn(shape, shape, shape), causal, dim % 64 == 0))
                rows.append(report(label, seconds, work, "TFLOP/s"))
                mx.clear_cache()
    return rows


def dims() -> list[Any]:
    """The other head dimensions."""
    return prefill((32, 80, 96, 192), (4096,))


def decode() -> list[Any]:
    """32 query and 8 key heads, D = 128; and a plain copy, whose rate is the ceiling."""
    source = drawn((1 << 30,))[0]
    copied = medians({"ours": timed_mlx(lambda: source + 0)})
    rows = [report("copy of 2 GiB", copied, 2 * source.nbytes / 1e9, "GB/s")]
    for batch, keys in ((1, 8192), (1, 32768), (1, 131072), (16, 8192)):
        arrays = drawn((batch, 32, 1, 128), (batch, 8, keys, 128), (batch, 8, keys, 128))
        work = (arrays[1].nbytes + arrays[2].nbytes) / 1e9
        rows.append(report(f"decode {batch} x 32/8 x {keys}", medians(forward_runs(arrays, False)), work, "GB/s"))
    return rows


def small() -> list[Any]:
    """Shapes bound by launching: queued back to back, and one evaluated call at a time."""
    rows = []
    for batch, heads, length, dim in (
        (1, 8, 64, 32),
        (1, 8, 64, 64),
        (4, 8, 256, 64),
        (1, 8, 512, 128),
        (1, 4, 1024, 256),
    ):
        shape = (batch, heads, length, dim)
        runs = forward_runs(drawn(shape, shape, shape), False, False)
        rows.append(report(f"{shape} queued", medians(runs), 1e-6, "M calls/s"))
        once = {name: statistics.median(run(1) for _ in range(300)) for name, run in runs.items()}
        print("   us a call, queued", {n: round(s * 1e6, 1) for n, s in rows[-1]["seconds"].items()},
              "one at a time", {n: round(s * 1e6, 1) for n, s in once.items()})  # fmt: skip
        rows.append({"label": f"{shape} one", "seconds": once})
    return rows


def training() -> list[Any]:
    """Forward and backward."""
    rows = []
    for dim in (64, 128, 256):
        for causal in (False, True):
            for length in (2048, 8192):
                rows.append(_training(16384 // length, 2048 // dim, length, dim, causal))
                mx.clear_cache()
    return rows


def _training(batch: int, heads: int, length: int, dim: int, causal: bool) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (batch, heads, length, dim)
    arrays = drawn(shape, shape, shape, shape)
    mask = "causal" if causal else None

    def both(attend: Callable[..., mx.array]) -> Run:
        return timed_mlx(lambda: mx.vjp(attend, arrays[:3], arrays[3:])[1])

    q, k, v, cotangent = [x.requires_grad_() for x in in_torch(arrays)]

    def peer() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return torch.autograd.grad(out, (q, k, v), cotangent.detach())

    runs = {
        "ours": both(lambda q, k, v: flash_attention(q, k, v, scale=dim**-0.5, causal=causal)),
        "mlx": both(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask=mask)),
        "cudnn": timed_torch(peer),
    }
    work = 14 * batch * heads * length**2 * dim / (2 if causal else 1) / 1e12
    return report(f"{shape} {'causal' if causal else 'full'} f+b", medians(runs), work, "TFLOP/s")


PARTS = {"prefill": prefill, "dims": dims, "decode": decode, "small": small, "training": training}


def main() -> None:
    """Measures the parts named, or all; `--json PATH` keeps the seconds."""
    words = sys.argv[1:]
    path = words[words.index("--json") + 1] if "--json" in words else None
    rows = [row for name in PARTS if name in words or not words for row in PARTS[name]()]
    if path:
        with open(path, "w") as file:  # noqa: PTH123
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
