"""Benchmarks against MLX's SDPA and PyTorch's cuDNN, on a GPU: `python -m benchmarks.cuda.measure PART`.

Parts: small, decode, training, prefill, dims; `--json PATH` writes the timings. Each part ends with its target figures
and whether they are met. Method: see benchmarks/rounds.py. Profiler counters: see profiling.py.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from attention.kernels.cuda import flash_attention
from attention.measure.rounds import TimedCall
from benchmarks.cuda.harness import check_target, cudnn, in_torch, peak_beyond_output, random_arrays, report, run_parts
from benchmarks.rounds import MlxCalls, TorchCalls, medians, one_at_a_time

Rows = list[dict[str, Any]]
SEED_TABLE = [(1, 8, 64, 32), (1, 8, 64, 64), (1, 8, 128, 32), (1, 8, 128, 64), (2, 8, 128, 32), (4, 8, 256, 32)]
"""presets/seed-table.toml, in float16."""
SMALL = [(1, 8, 64, 32), (1, 8, 64, 64), (4, 8, 256, 64), (1, 8, 512, 128), (1, 4, 1024, 256)]
"""Small shapes in bfloat16."""


def ours_and_mlx(sets: Sequence[Sequence[mx.array]], causal: bool) -> dict[str, TimedCall]:
    """Return timed runs of this package's forward pass and MLX's SDPA, cycling through sets of q, k and v."""
    scale, mask = sets[0][0].shape[-1] ** -0.5, "causal" if causal else None
    ours = functools.partial(flash_attention, scale=scale, causal=causal)
    theirs = functools.partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
    return {name: MlxCalls(*(functools.partial(f, *arrays) for arrays in sets)) for name, f in
            (("ours", ours), ("mlx", theirs))}  # fmt: skip


def least(rows: Rows, over: str) -> float:
    """Return the smallest speedup over another implementation."""
    ratios: list[float] = [row["seconds"][over] / row["seconds"]["ours"] for row in rows]
    return min(ratios)


def small() -> Rows:
    """Benchmark launch-bound shapes: calls queued back to back, and one evaluated call at a time."""
    queued, single = [], []
    for shape, dtype in [(s, mx.float16) for s in SEED_TABLE] + [(s, mx.bfloat16) for s in SMALL]:
        runs = ours_and_mlx([random_arrays(shape, shape, shape, dtype=dtype)], False)
        label = f"{shape} {str(dtype).rpartition('.')[2]}"
        queued.append(report(f"{label} queued", medians(runs), 1e-6, "M calls/s"))
        single.append(report(f"{label} evaluated", one_at_a_time(runs), 1e-6, "M calls/s"))
    return [
        *queued,
        *single,
        check_target("calls queued, least over MLX's SDPA", 1.0, least(queued, "mlx")),
        check_target("one evaluated call, least over MLX's SDPA", 1.0, least(single, "mlx")),
    ]


def decode() -> Rows:
    """Benchmark decode (32 query and 8 key heads, D = 128, cycling inputs); the faster plain copy is the ceiling."""
    rows, rates = [_copies()], {}
    ceiling = max(2 * 2**30 / s / 1e9 for s in rows[0]["seconds"].values())
    for batch, keys, sets in ((1, 8192, 8), (1, 32768, 4), (1, 131072, 3), (16, 8192, 3)):
        made = _decode_rows(batch, keys, sets)
        rows += made
        rates[batch, keys] = made[0]["seconds"]
        mx.clear_cache()
    short = rates[1, 8192]
    rows.append(check_target("1 x 8192 dense, over MLX's SDPA", 3.0, short["mlx"] / short["ours"]))
    for batch, keys in ((1, 131072), (16, 8192)):
        rate = _cache_bytes(batch, keys) / rates[batch, keys]["ours"] / 1e9
        rows.append(check_target(f"{batch} x {keys}, of the faster copy's {ceiling:.0f} GB/s", 0.85, rate / ceiling))
    return rows


def _cache_bytes(batch: int, keys: int) -> int:
    """Return the bytes of keys and values: 8 heads of 128 in bfloat16."""
    return 2 * 2 * batch * 8 * keys * 128


def _decode_rows(batch: int, keys: int, sets: int) -> Rows:
    """Benchmark contiguous K/V and slices of a larger cache (as in mlx-lm); for the shortest, single calls too."""
    cache = (batch, 8, keys + 256, 128)
    arrays = [random_arrays((batch, 32, 1, 128), cache, cache) for _ in range(sets)]
    sliced = [(q, k[:, :, :keys], v[:, :, :keys]) for q, k, v in arrays]
    dense = [(q, mx.contiguous(k), mx.contiguous(v)) for q, k, v in sliced]
    mx.eval(sliced, dense)
    rows, work = [], _cache_bytes(batch, keys) / 1e9
    for name, given in (("dense", dense), ("slice", sliced)):
        runs, label = ours_and_mlx(given, False), f"decode {batch} x {keys} {name}"
        peers = {"cudnn": cudnn(given, False)} if name == "dense" else {}
        rows.append(report(label, medians(runs | peers), work, "GB/s"))
        if (batch, keys) == (1, 8192):
            rows.append(report(f"{label}, evaluated", one_at_a_time(runs), work, "GB/s"))
            rows.append(report(f"{label}, same inputs", medians(ours_and_mlx(given[:1], False)), work, "GB/s"))
    return rows


def _copies() -> dict[str, Any]:
    import torch

    source, there = random_arrays((2**29,))[0], torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(there)
    runs: dict[str, TimedCall] = {
        "ours": MlxCalls(lambda: source + 0),
        "torch": TorchCalls(lambda: target.copy_(there)),
    }
    return report("copy of 1 GiB (ours: MLX's)", medians(runs), 2 * source.nbytes / 1e9, "GB/s")


def prefill(dims: tuple[int, ...] = (64, 128, 256), lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)) -> Rows:
    """Benchmark prefill: B * L = 16384 tokens, hidden size 2048."""
    by_kind: dict[tuple[int, bool], Rows] = {}
    for dim in dims:
        for causal in (False, True):
            for length in lengths:
                shape = (16384 // length, 2048 // dim, length, dim)
                arrays = [random_arrays(shape, shape, shape)]
                work = 4 * shape[0] * shape[1] * length**2 * dim / (2 if causal else 1) / 1e12
                runs = ours_and_mlx(arrays, causal) | {"cudnn": cudnn(arrays, causal)}
                label = f"{shape} {'causal' if causal else 'full'}"
                by_kind.setdefault((dim, causal), []).append(report(label, medians(runs), work, "TFLOP/s"))
                mx.clear_cache()
    rows = [row for kind in by_kind.values() for row in kind]
    over = statistics.geometric_mean(row["seconds"]["cudnn"] / row["seconds"]["ours"] for row in rows)
    wanted = [
        check_target("geometric mean over cuDNN", 1.12, over),
        check_target("least over cuDNN", 1.0, least(rows, "cudnn")),
        check_target("least over MLX's SDPA", 1.0, least(rows, "mlx")),
    ]
    if 256 in dims:
        wanted.append(check_target("D = 256 full, least over MLX's SDPA", 2.2, least(by_kind[256, False], "mlx")))
        wanted.append(check_target("D = 256 causal, least over MLX's SDPA", 6.0, least(by_kind[256, True], "mlx")))
        wanted.append(
            check_target("D = 256, MiB left of 64 beside inputs and output", 0.0, 64 - _memory_beside_output())
        )
    return rows + wanted


def _memory_beside_output() -> float:
    """Return the MiB of a call (16384 tokens, 8 heads of 256) above its inputs and output."""
    shape = (1, 8, 16384, 256)
    q, k, v = random_arrays(shape, shape, shape)
    return peak_beyond_output(lambda: flash_attention(q, k, v, scale=1 / 16)) / 2**20


def dims() -> Rows:
    """Benchmark all head dims (16 heads, 4096 tokens) against the next larger one with its own tiling."""
    rows, wanted = {}, []
    for causal in (False, True):
        for dim in (32, 64, 80, 96, 128, 192, 256):
            shape = (4, 16, 4096, dim)
            runs = ours_and_mlx([random_arrays(shape, shape, shape)], causal)
            work = 4 * shape[0] * shape[1] * shape[2] ** 2 * dim / (2 if causal else 1) / 1e12
            rows[dim, causal] = report(f"{shape} {'causal' if causal else 'full'}", medians(runs), work, "TFLOP/s")
            mx.clear_cache()
        for dim, larger in ((32, 64), (80, 128), (96, 128), (192, 256)):
            ratio = rows[larger, causal]["seconds"]["ours"] / rows[dim, causal]["seconds"]["ours"]
            wanted.append(check_target(f"D = {dim} {'causal' if causal else 'full'}, over D = {larger}", 1.0, ratio))
    return [*rows.values(), *wanted]


def training() -> Rows:
    """Benchmark forward plus backward, and the backward pass alone: the difference to a forward pass."""
    rows, backward = [], []
    for dim in (64, 128, 256):
        for causal in (False, True):
            for length in (2048, 8192):
                both, alone = _training(16384 // length, 2048 // dim, length, dim, causal)
                rows += [both, alone]
                backward.append(alone["seconds"])
                mx.clear_cache()
    ratios = [s["cudnn"] / s["ours"] for s in backward]
    over = statistics.geometric_mean(ratios) if min(ratios) > 0 else math.nan  # no ratio if the difference is noise
    return [*rows, check_target("backward, geometric mean over cuDNN", 1.0, over)]


def _training(batch: int, heads: int, length: int, dim: int, causal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    shape, scale, mask = (batch, heads, length, dim), dim**-0.5, "causal" if causal else None
    arrays = random_arrays(shape, shape, shape, shape)
    ours = functools.partial(flash_attention, scale=scale, causal=causal)
    theirs = functools.partial(mx.fast.scaled_dot_product_attention, scale=scale, mask=mask)
    runs = {"ours": _passes(ours, arrays), "mlx": _passes(theirs, arrays), "cudnn": _cudnn_passes(arrays, causal)}
    seconds = medians({f"{name} {which}": run for name, made in runs.items() for which, run in made.items()})
    both = {name: seconds[f"{name} both"] for name in runs}
    alone = {name: seconds[f"{name} both"] - seconds[f"{name} forward"] for name in runs}
    work = 4 * batch * heads * length**2 * dim / (2 if causal else 1) / 1e12
    label = f"{shape} {'causal' if causal else 'full'}"
    return (
        report(f"{label} both", both, 3.5 * work, "TFLOP/s"),
        report(f"{label} backward", alone, 2.5 * work, "TFLOP/s"),
    )


def _passes(attend: Callable[..., mx.array], arrays: list[mx.array]) -> dict[str, TimedCall]:
    """Return timed runs of the forward pass under `vjp`, and of both passes."""
    return {
        "forward": MlxCalls(lambda: mx.vjp(attend, arrays[:3], arrays[3:])[0]),
        "both": MlxCalls(lambda: mx.vjp(attend, arrays[:3], arrays[3:])[1]),
    }


def _cudnn_passes(arrays: list[mx.array], causal: bool) -> dict[str, TimedCall]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, cotangent = in_torch(arrays)
    q, k, v = inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    both = TorchCalls(lambda: torch.autograd.grad(forward(), inputs, cotangent))
    return {"forward": TorchCalls(forward), "both": both}


PARTS = {"small": small, "decode": decode, "training": training, "prefill": prefill, "dims": dims}


def main() -> None:
    """Run the named parts, or all; `--json PATH` writes the timings."""
    run_parts(PARTS)


if __name__ == "__main__":
    main()
