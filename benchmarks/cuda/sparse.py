"""Checks and benchmarks of the kernels with block lists, on Hopper: `python -m benchmarks.cuda.sparse PART`.

Parts: check, forward, long, check-backward, backward; all without any. Rates count visible pairs. A share is of the
time of the dense kernel, which is timed in the same rounds. `--json PATH` writes the results.
"""

import functools
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention import masks
from attention.kernels.common.selfcheck import LOGSUMEXP_TOLERANCE, TOLERANCE, Floats, exact, relative_error
from attention.kernels.cuda.portable import gradient as portable_gradient
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, make_plan, run_of
from attention.kernels.cuda.runtime.program import Element, machine_code
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90.backward import specialise as specialise_backward
from attention.kernels.cuda.sm90.forward import Forward, specialise, specialise_lists
from attention.kernels.cuda.sm90.launch import forward_plan, forward_stages
from attention.masks import Pattern, dtype_name
from attention.measure.rounds import TimedCall
from benchmarks.cuda.harness import random_arrays, selected_parts, write_rows
from benchmarks.rounds import EagerMlxCalls, MlxCalls, medians

Rows = list[dict[str, Any]]
HEADS, LENGTH = 16, 32768
BLOCK: Final = 128


def random_blocks(density: float, length: int, heads: int = HEADS, seed: int = 1) -> Pattern:
    """Return random blocks, as many in each row of blocks."""
    count = -(-length // BLOCK)
    order = np.random.default_rng(seed).random((heads, count, count)).argsort(axis=-1)
    return masks.blocks(order[None] < max(1, round(density * count)), block=BLOCK)


def mixed_lengths(length: int, seed: int = 1) -> list[int]:
    """Return document lengths from 17 to 8192 that add up to a length."""
    random, made, left = np.random.default_rng(seed), [], length
    while left:
        made.append(min(left, int(np.exp(random.uniform(np.log(17), np.log(8192))))))
        left -= made[-1]
    return made


def patterns(length: int) -> dict[str, Pattern]:
    """Return the masks that are timed."""
    causal = masks.causal()
    return {
        "full": random_blocks(1, length),
        "blocks 0.5": random_blocks(0.5, length),
        "blocks 0.25": random_blocks(0.25, length),
        "blocks 0.1": random_blocks(0.1, length),
        "blocks 0.05": random_blocks(0.05, length),
        "window 1024": masks.window(1024),
        "documents 2048": causal & masks.documents([2048] * (length // 2048)),
        "documents mixed": causal & masks.documents(mixed_lengths(length)),
    }


# ---- checks ------------------------------------------------------------------------------------------------------


def checked_patterns(shape: CallShape) -> dict[str, Pattern]:
    """Return masks with full, partial and missing tiles, shared by batch and heads or not, and with empty rows."""
    random = np.random.default_rng(3)
    size = (shape.batch, shape.heads, -(-shape.queries // 32), -(-shape.keys // 32))
    cells = random.random(size) < 0.3
    cells[:, :, :5] = False
    third = shape.keys // 3
    return {
        "by head": masks.blocks(cells, block=32),
        "documents": masks.causal() & masks.documents([third, 17, shape.keys - third - 17]),
        "prefix": masks.prefix(40) | masks.window(100),
        "padding": masks.padding([shape.keys - 7 * i for i in range(shape.batch)]),
    }


SIZES: Final = ((2, 4, 2, 300, 300), (1, 3, 1, 217, 433))
"""Batch, heads, key heads, queries and keys."""


def check() -> Rows:
    """Compare the Hopper kernels and the general kernel with float64 on small inputs."""
    kinds: tuple[tuple[Element, bool, bool], ...] = (("bf16", False, False), ("f16", True, False), ("f16", False, True))
    kernels = [specialise_lists(dim, *kind) for dim in (64, 128, 192, 256) for kind in kinds]
    kernels += [specialise_lists(dim, "bf16", most=True) for dim in (64, 128)]
    compile_all(kernels)
    rows = []
    for kernel in kernels:

        def run(shape: CallShape, call: CallParams, made: list[mx.array], kernel: Forward = kernel) -> list[mx.array]:
            return make_plan(INPUTS, OUTPUTS, forward_stages(shape, call, kernel=kernel))(made[:3])

        what = f"forward, {kernel.consumers} consumers"
        rows.append(_checked(what, kernel.head_dim, kernel.element, kernel.softcap, run, _output_error))
    return rows + [_checked("general forward", dim, "bf16", False, _general, _output_error) for dim in GENERAL_DIMS]


def check_backward() -> Rows:
    """Compare the gradients of the Hopper and the general kernels with float64 on small inputs."""
    kinds: list[tuple[int, Element, bool]] = []
    for dim in (64, 128, 192, 256):
        kinds += [(dim, "bf16", False), (dim, "f16", True)]
    compile_all([specialise_backward(dim, False, kind, softcap=cap, lists=True) for dim, kind, cap in kinds])
    rows = [_checked("backward", *kind, _backward, _gradient_error) for kind in kinds]
    return rows + [
        _checked("general backward", dim, "bf16", False, _general_backward, _gradient_error) for dim in GENERAL_DIMS
    ]


GENERAL_DIMS: Final = (64, 128, 192)
Launched = Callable[[CallShape, CallParams, list[mx.array]], Sequence[mx.array]]
Compared = Callable[[CallShape, CallParams, Sequence[mx.array], list[mx.array]], str | None]


def _general(shape: CallShape, call: CallParams, made: list[mx.array]) -> Sequence[mx.array]:
    divided = portable_launch.division(shape, call, False)
    return run_of(INPUTS, OUTPUTS, portable_launch.stages(shape, call, divided))(made[:3])


def _backward(shape: CallShape, call: CallParams, made: list[mx.array]) -> Sequence[mx.array]:
    outputs = forward_plan(shape, call)(made[:3])[: len(OUTPUTS)]
    return gradient.by_kernel(made[:3], made[3:], outputs, shape, call)


def _general_backward(shape: CallShape, call: CallParams, made: list[mx.array]) -> Sequence[mx.array]:
    return portable_gradient.gradients(made[:3], made[3:], _general(shape, call, made), shape, call)


def _output_error(shape: CallShape, call: CallParams, found: Sequence[mx.array], made: list[mx.array]) -> str | None:
    output, logsumexp = _expected(shape, call)
    error, gap = relative_error(found[0], output), _gap(found[1], logsumexp)
    right = error <= TOLERANCE[dtype_name(made[0].dtype)] and gap <= LOGSUMEXP_TOLERANCE
    return None if right else f"output {error:.2g}, logsumexp {gap:.2g}"


def _gap(found: mx.array, expected: Floats) -> float:
    """Return the largest difference of logsumexps; infinite unless the same rows are masked."""
    values = exact(found)
    if not np.array_equal(np.isneginf(values), np.isneginf(expected)):
        return math.inf
    return float(np.nan_to_num(np.abs(values - expected), nan=0).max())


@functools.lru_cache(maxsize=64)
def _expected(shape: CallShape, call: CallParams) -> tuple[Floats, Floats]:
    q, k, v = (exact(x) for x in selfcheck.inputs(shape)[:3])
    return selfcheck.reference(q, k, v, call)


def _gradient_error(shape: CallShape, call: CallParams, found: Sequence[mx.array], made: list[mx.array]) -> str | None:
    return selfcheck.gradient_disagreement(call, found, made)


def _checked(
    what: str, dim: int, element: Element, softcap: bool, launched: Launched, compared: Compared
) -> dict[str, Any]:
    """Run a kernel on small inputs; an exception counts as a wrong result."""
    wrong, start = [], time.perf_counter()
    for size in SIZES:
        shape = CallShape(*size, dim, element)
        made = selfcheck.inputs(shape)
        for name, pattern in checked_patterns(shape).items():
            call = CallParams(dim**-0.5, False, None, 2.0 if softcap else None, pattern=pattern)
            try:
                found = launched(shape, call, made)
                mx.eval(found)
                reason = compared(shape, call, found, made)
            except Exception as error:  # the next kernel is still checked
                reason = repr(error)
            if reason:
                wrong.append(f"{size} {name}: {reason}")
    text = f"{what} {dim} {element}{' softcap' if softcap else ''}"
    print(f"check {text} ({time.perf_counter() - start:.1f} s): {'; '.join(wrong) or 'right'}", flush=True)
    return {"check": text, "wrong": wrong}


def compile_all(kernels: Sequence[Any]) -> None:
    """Compile kernels at the same time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda kernel: machine_code(kernel.program), kernels))
    print(f"compiled {len(kernels)} kernels in {time.perf_counter() - start:.1f} s", flush=True)


# ---- timings -----------------------------------------------------------------------------------------------------


_BOUNDS: Final = ((False, False), (True, False), (True, True))
"""Causal and window of the kernels without lists."""
_FEW: Final = ("window 1024", "documents 2048", "documents mixed", "blocks 0.1")
"""Masks that are timed at every head dim."""


def forward() -> Rows:
    """Time the forward kernels with bounds and with lists."""
    return _forward(128, LENGTH, None) + _forward(64, LENGTH, _FEW)


def long() -> Rows:
    """Time random blocks at twice the length."""
    return _forward(128, 2 * LENGTH, ("blocks 0.1",))


def _forward(dim: int, length: int, names: tuple[str, ...] | None) -> Rows:
    kernels = [specialise(dim, causal, "bf16", window) for causal, window in _BOUNDS]
    compile_all([*kernels, specialise_lists(dim, "bf16")])
    arrays = random_arrays(*[(1, HEADS, length, dim)] * 3)

    def timed(shape: CallShape, call: CallParams) -> MlxCalls:
        plan = make_plan(INPUTS, OUTPUTS[:1], forward_stages(shape, call, False))
        return MlxCalls(lambda: plan(arrays)[0])

    return _compared("forward", dim, length, 4 * dim, names, timed)


def backward() -> Rows:
    """Time the backward kernels with bounds and with lists."""
    return _backward_pass(128, None) + _backward_pass(64, _FEW)


def _backward_pass(dim: int, names: tuple[str, ...] | None) -> Rows:
    kernels = [specialise_backward(dim, causal, "bf16", window) for causal, window in _BOUNDS]
    compile_all([*kernels, specialise_backward(dim, False, "bf16", lists=True)])
    arrays = random_arrays(*[(1, HEADS, LENGTH, dim)] * 4)

    def timed(shape: CallShape, call: CallParams) -> EagerMlxCalls:
        output, logsumexp, stats = forward_plan(shape, call)(arrays[:3])[:3]
        given = [*arrays[:3], output, arrays[3], stats, logsumexp]
        mx.eval(given)
        plan = gradient.make_plan_of_gradient(shape, call, False)
        return EagerMlxCalls(lambda: plan(given)[:3])

    return _compared("backward", dim, LENGTH, 10 * dim, names, timed)


def _compared(
    what: str,
    dim: int,
    length: int,
    flops: int,
    names: tuple[str, ...] | None,
    timed: Callable[[CallShape, CallParams], TimedCall],
) -> Rows:
    """Time the kernels on each mask, interleaved with the dense kernel; `flops` are per visible pair."""
    shape, dense = CallShape(1, HEADS, HEADS, length, length, dim, "bf16"), CallParams(dim**-0.5, False, None, None)
    whole, rows = timed(shape, dense), []
    by_name: dict[str, dict[str, CallParams]] = {"causal": {"bounds": replace(dense, causal=True)}}
    for name, pattern in patterns(length).items():
        by_name[name] = {"lists": replace(dense, pattern=pattern)}
    by_name["window 1024"]["bounds"] = replace(dense, causal=True, window=1024)
    for name, calls in by_name.items():
        if names is not None and name not in names:
            continue
        seconds = medians({"dense": whole} | {how: timed(shape, call) for how, call in calls.items()})
        for how, call in calls.items():
            label = f"{what} {dim}, {length} tokens, {name}, {how}"
            rows.append(
                _row(label, seconds[how], seconds["dense"], flops * _pairs(call, shape), flops * HEADS * length**2)
            )
    return rows


def _pairs(call: CallParams, shape: CallShape) -> int:
    """Return the visible pairs of all heads of a call."""
    if call.pattern is not None:
        return call.pattern.block_list(shape.scores, BLOCK, BLOCK).pairs
    seen = np.minimum(np.arange(1, shape.keys + 1, dtype=np.int64), call.window or shape.keys)
    return shape.heads * int(seen.sum())


def _row(label: str, seconds: float, dense: float, work: int, dense_work: int) -> dict[str, Any]:
    """Print and return a row; `work` is in FLOPs of visible pairs."""
    rate, dense_rate = work / seconds / 1e12, dense_work / dense / 1e12
    rates = f"{rate:6.1f} TFLOP/s (dense {dense_rate:.0f})"
    print(f"{label:50} {1e3 * seconds:8.3f} ms {rates}, {seconds / dense:.4f} of dense", flush=True)
    return {"label": label, "seconds": seconds, "rate": rate, "dense_rate": dense_rate, "share": seconds / dense}


PARTS: Final[dict[str, Callable[[], Rows]]] = {
    "check": check,
    "forward": forward,
    "long": long,
    "check-backward": check_backward,
    "backward": backward,
}


def main() -> int:
    """Run the named parts, or all; return 1 if a check failed. A part that fails does not stop the others."""
    words, path = selected_parts(PARTS)
    rows: Rows = []
    for name in PARTS:
        if name in words or not words:
            try:
                rows += PARTS[name]()
            except Exception as error:  # the rest is still of use
                traceback.print_exc()
                rows.append({"part": name, "wrong": [repr(error)]})
            write_rows(rows, path)
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
