"""Timing of calls on a GPU: interleaved in random order, each sample preceded by a lead-in of the same call.

Under a power limit the clock depends on the preceding load, so an untimed run of the same length and calls precedes
each sample. Medians are reported. If the inputs of a few calls fit in the L2 cache, calls cycle through several sets of
inputs.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

Call = Callable[[], Any]
Run = Callable[[int], float]
"""Runs the given number of calls and returns the seconds per call."""
ROUNDS, SAMPLE_S, MOST_CALLS = 7, 0.03, 1000


def timed_mlx(*calls: Call) -> Run:
    """Return a run of MLX calls, queued and evaluated together, that cycles through the given ones."""

    def run(count: int) -> float:
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([calls[i % len(calls)]() for i in range(count)])
        mx.synchronize()
        return (time.perf_counter() - start) / count

    return run


def timed_torch(*calls: Call) -> Run:
    """Return a run of PyTorch calls that cycles through the given ones."""
    import torch

    def run(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    return run


def medians(runs: dict[str, Run]) -> dict[str, float]:
    """Return the median seconds per call of each run, interleaved, with a lead-in before each sample."""
    counts = {}
    for name, run in runs.items():
        for _ in range(3):  # without the launcher, the third call is traced by `mx.compile`
            run(1)
        counts[name] = max(1, min(MOST_CALLS, round(SAMPLE_S / min(run(1), run(3)))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(1), list(runs)
    for _ in range(ROUNDS):
        for name in order.sample(names, len(names)):
            runs[name](counts[name])
            samples[name].append(runs[name](counts[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def one_at_a_time(runs: dict[str, Run], count: int = 200) -> dict[str, float]:
    """Return the median seconds of one queued and evaluated call of each run, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(1), list(runs)
    for _ in range(count):
        for name in order.sample(names, len(names)):
            samples[name].append(runs[name](1))
    return {name: statistics.median(times) for name, times in samples.items()}


def random_arrays(*shapes: tuple[int, ...], dtype: mx.Dtype = mx.bfloat16) -> list[mx.array]:
    """Return random normal arrays, evaluated."""
    arrays = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    mx.eval(arrays)
    return arrays


def in_torch(arrays: Sequence[mx.array]) -> list[Any]:
    """Copy bfloat16 arrays to PyTorch on the GPU."""
    import numpy as np
    import torch

    return [torch.from_numpy(np.array(x.view(mx.int16))).cuda().view(torch.bfloat16) for x in arrays]


def cudnn(sets: Sequence[Sequence[mx.array]], causal: bool) -> Run:
    """Return a run of PyTorch's SDPA on cuDNN that cycles through sets of q, k and v."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call_of(q: Any, k: Any, v: Any) -> Call:
        def call() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return call

    return timed_torch(*(call_of(*in_torch(arrays)) for arrays in sets))


def report(label: str, seconds: dict[str, float], work: float, unit: str) -> dict[str, Any]:
    """Print and return a row; `work` is the work per call, in `unit` times seconds."""
    rates = " ".join(f"{name} {work / s:.4g}" for name, s in seconds.items())
    ratios = " ".join(f"/{name} {s / seconds['ours']:.2f}" for name, s in seconds.items() if name != "ours")
    print(f"{label:34} {rates} {unit}  {ratios}", flush=True)
    return {"label": label, "seconds": seconds}


def check_target(text: str, least: float, measured: float) -> dict[str, Any]:
    """Print and return whether a target figure is met."""
    holds = measured >= least
    print(f"asked: {text}: at least {least:.4g}; measured {measured:.4g}: {'holds' if holds else 'MISSED'}", flush=True)
    return {"asked": text, "least": least, "measured": measured, "holds": holds}


def selected_parts(words: Iterable[object]) -> tuple[list[str], Path | None]:
    """Parse the command line; return the selected words and the file of `--json`.

    Raises:
        SystemExit: a word is unknown.
    """
    known = [str(word) for word in words]
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"of {', '.join(known)}; all without any")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to keep the seconds")
    found = parser.parse_args()
    for word in found.words:
        if word not in known:  # not `choices`: with nargs="*", Python 3.11 then requires a word
            parser.error(f"{word} is none of {', '.join(known)}")
    return found.words, found.json


def write_rows(rows: Sequence[object], path: Path | None) -> None:
    """Write rows to a JSON file, if a path is given."""
    if path:
        path.write_text(json.dumps(rows, indent=1))
