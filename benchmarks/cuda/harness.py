"""Peers, inputs, rows and command lines of the CUDA benchmarks; they are timed in `benchmarks.rounds`.

If the inputs of a few calls fit in the L2 cache, calls cycle through several sets of inputs.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.rounds import Call, TorchCalls


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


def cudnn(sets: Sequence[Sequence[mx.array]], causal: bool) -> TorchCalls:
    """Return calls of PyTorch's SDPA on cuDNN that cycle through sets of q, k and v."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call_of(q: Any, k: Any, v: Any) -> Call:
        def call() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        return call

    return TorchCalls(*(call_of(*in_torch(arrays)) for arrays in sets))


def report(label: str, seconds: dict[str, float], work: float, unit: str) -> dict[str, Any]:
    """Print and return a row; `work` is the work per call, in `unit` times seconds."""
    rates = " ".join(f"{name} {work / s:.4g}" for name, s in seconds.items())
    ratios = " ".join(f"/{name} {s / seconds['ours']:.2f}" for name, s in seconds.items() if name != "ours")
    print(f"{label:34} {rates} {unit}  {ratios}", flush=True)
    return {"label": label, "seconds": seconds}


def check_target(text: str, least: float, measured: float) -> dict[str, Any]:
    """Print and return whether a target figure is met."""
    holds = measured >= least
    verdict = "holds" if holds else "MISSED"
    print(f"target: {text}: at least {least:.4g}; measured {measured:.4g}: {verdict}", flush=True)
    return {"target": text, "least": least, "measured": measured, "holds": holds}


def selected_parts(words: Iterable[object]) -> tuple[list[str], Path | None]:
    """Parse the command line; return the selected words and the file of `--json`.

    Raises:
        SystemExit: a word is unknown.
    """
    known = [str(word) for word in words]
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", metavar="WORD", help=f"what to run: {', '.join(known)} (all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the times in seconds")
    found = parser.parse_args()
    for word in found.words:
        if word not in known:  # not `choices`: with nargs="*", Python 3.11 then requires a word
            parser.error(f"{word} is none of {', '.join(known)}")
    return found.words, found.json


def peak_beyond_output(call: Callable[[], mx.array]) -> int:
    """Return the bytes that a call, not its first, allocates at its peak beyond its output."""
    mx.eval(call())
    mx.synchronize()  # else what earlier calls held may be freed during this one
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = call()
    mx.eval(made)
    return mx.get_peak_memory() - before - made.nbytes


def run_parts(parts: Mapping[str, Callable[[], Sequence[dict[str, Any]]]]) -> None:
    """Run the parts named on the command line, or all, and print the missed targets; `--json PATH` writes the rows."""
    words, path = selected_parts(parts)
    rows = [row for name, part in parts.items() if name in words or not words for row in part()]
    missed = [row["target"] for row in rows if row.get("holds") is False]
    print(f"missed: {'; '.join(missed) or 'nothing'}")
    write_rows(rows, path)


def write_rows(rows: Sequence[object], path: Path | None) -> None:
    """Write rows to a JSON file, if a path is given."""
    if path:
        path.write_text(json.dumps(rows, indent=1))
