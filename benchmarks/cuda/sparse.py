"""Checks and benchmarks of the kernels with block lists, on Hopper: `python -m benchmarks.cuda.sparse PART`.

Parts: check, forward, check-backward, backward; all without any. Every variant is compared with float64 first. Rates
count visible pairs, and shares are of the dense kernel's time in the same run. `--json PATH` writes the results.
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
from attention.kernels.cuda.sm90.backward import BLOCK_Q
from attention.kernels.cuda.sm90.backward import specialise as specialise_backward
from attention.kernels.cuda.sm90.forward import Forward, specialise, specialise_lists
from attention.kernels.cuda.sm90.launch import forward_kernel, forward_plan, forward_stages
from attention.masks import Pattern, dtype_name
from benchmarks.cuda.harness import random_arrays, selected_parts, write_rows
from benchmarks.rounds import EagerMlxCalls, MlxCalls, medians

Rows = list[dict[str, Any]]
HEADS, LENGTH = 16, 32768
BLOCK: Final = 128
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "paced": {"consumers": 2, "overlap": True, "paced": True},
    "overlap": {"consumers": 2, "overlap": True, "paced": False},
    "turns": {"consumers": 2, "overlap": False, "paced": False},
}


def variants(dim: int) -> dict[str, Forward]:
    """Return the kernels compared at a head dim."""
    return {name: replace(specialise_lists(dim, "bf16"), **how) for name, how in VARIANTS.items()}


def wide_variants(dim: int) -> dict[str, Forward]:
    """Return the kernels compared for masks without blocks of 128 rows."""
    made = variants(dim)
    return made if dim > 64 else {**made, "three": replace(made["overlap"], consumers=3)}


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
    """Compare the forward variants and the general kernel with float64 on small inputs."""
    kernels = [kernel for dim in (64, 128) for kernel in wide_variants(dim).values()]
    kernels += [specialise_lists(dim, "f16", softcap, few) for dim in (64, 128, 192, 256)
                for softcap, few in ((False, False), (True, False), (False, True))]  # fmt: skip
    compile_all(kernels)
    rows = []
    for kernel in kernels:

        def run(shape: CallShape, call: CallParams, made: list[mx.array], kernel: Forward = kernel) -> list[mx.array]:
            return make_plan(INPUTS, OUTPUTS, forward_stages(shape, call, kernel=kernel))(made[:3])

        how = f"{kernel.consumers} consumers, overlap {kernel.overlap}, paced {kernel.paced}"
        rows.append(_checked(f"forward {how}", kernel.head_dim, kernel.element, kernel.softcap, run, _output_error))
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


def forward() -> Rows:
    """Time the dense kernels and the variants with lists."""
    rows: Rows = []
    for dim, names in ((128, None), (64, ("window 1024", "documents 2048", "blocks 0.1"))):
        shape = CallShape(1, HEADS, HEADS, LENGTH, LENGTH, dim, "bf16")
        compile_all(
            [*wide_variants(dim).values(), *(specialise(dim, causal, "bf16", window) for causal, window in _BOUNDS)]
        )
        arrays = random_arrays(*[(1, HEADS, LENGTH, dim)] * 3)
        dense = {
            "full": CallParams(dim**-0.5, False, None, None),
            "causal": CallParams(dim**-0.5, True, None, None),
            "window 1024": CallParams(dim**-0.5, True, 1024, None),
        }
        runs = {name: _timed(arrays, shape, call, forward_kernel(shape, call)) for name, call in dense.items()}
        seconds = medians(runs)
        for name, call in dense.items():
            rows.append(_row(f"forward {dim} {name}, bounds", seconds[name], _pairs(call, LENGTH), 4 * dim, None))
        whole = seconds["full"]
        for name, pattern in patterns(LENGTH).items():
            if names is None or name in names:
                rows += _compared(arrays, shape, name, pattern, whole)
    return rows


_BOUNDS: Final = ((False, False), (True, False), (True, True))
"""Causal and window of the kernels without lists."""


def backward() -> Rows:
    """Time the dense backward kernels and those with lists."""
    rows: Rows = []
    for dim in (128, 64):
        shape = CallShape(1, HEADS, HEADS, LENGTH, LENGTH, dim, "bf16")
        kernels = [specialise_backward(dim, causal, "bf16", window) for causal, window in _BOUNDS]
        compile_all([*kernels, specialise_backward(dim, False, "bf16", lists=True)])
        arrays = random_arrays(*[(1, HEADS, LENGTH, dim)] * 4)
        scale, whole = dim**-0.5, None
        bounds = {"full": (False, None), "causal": (True, None), "window 1024": (True, 1024)}
        for name, (causal, window) in bounds.items():
            call = CallParams(scale, causal, window, None)
            seconds = medians({name: _timed_backward(arrays, shape, call)})[name]
            whole = whole or seconds
            rows.append(_row(f"backward {dim} {name}, bounds", seconds, _pairs(call, LENGTH), 10 * dim, None))
        for name, pattern in patterns(LENGTH).items():
            if dim == 128 or name in ("window 1024", "documents 2048", "blocks 0.1"):
                call = CallParams(scale, False, None, None, pattern=pattern)
                seconds = medians({name: _timed_backward(arrays, shape, call)})[name]
                pairs = pattern.block_list(shape.scores, BLOCK_Q, 128).pairs
                rows.append(_row(f"backward {dim} {name}, lists", seconds, pairs, 10 * dim, whole))
    return rows


def _timed_backward(arrays: list[mx.array], shape: CallShape, call: CallParams) -> EagerMlxCalls:
    output, logsumexp, stats = forward_plan(shape, call)(arrays[:3])[:3]
    given = [*arrays[:3], output, arrays[3], stats, logsumexp]
    mx.eval(given)
    plan = gradient.make_plan_of_gradient(shape, call, False)

    return EagerMlxCalls(lambda: plan(given)[:3])


def _compared(arrays: list[mx.array], shape: CallShape, name: str, pattern: Pattern, whole: float) -> Rows:
    """Time the variants with lists on one mask."""
    call, rows = CallParams(shape.head_dim**-0.5, False, None, None, pattern=pattern), []
    runs, pairs = {}, 0
    kernels = (variants if name.startswith("blocks") else wide_variants)(shape.head_dim)
    for variant, kernel in kernels.items():
        start = time.perf_counter()
        made = pattern.block_list(shape.scores, kernel.block_m, kernel.block_n)
        listed = time.perf_counter() - start
        pairs = made.pairs
        runs[variant] = _timed(arrays, shape, call, kernel)
        spent = time.perf_counter() - start - listed
        print(f"  {name} {variant}: list {1e3 * listed:.1f} ms, launch {1e3 * spent:.1f} ms", flush=True)
    for variant, seconds in medians(runs).items():
        rows.append(_row(f"forward {shape.head_dim} {name}, {variant}", seconds, pairs, 4 * shape.head_dim, whole))
    return rows


def _timed(arrays: list[mx.array], shape: CallShape, call: CallParams, kernel: Forward) -> MlxCalls:
    plan = make_plan(INPUTS, OUTPUTS[:1], forward_stages(shape, call, False, kernel))
    return MlxCalls(lambda: plan(arrays)[0])


def _pairs(call: CallParams, length: int) -> int:
    """Return the visible pairs of all heads of a call by bounds."""
    rows = np.arange(1, length + 1, dtype=np.int64)
    seen = np.minimum(rows, call.window or length) if call.causal else np.full(length, length)
    return HEADS * int(seen.sum())


def _row(label: str, seconds: float, pairs: int, flops: int, whole: float | None) -> dict[str, Any]:
    rate = flops * pairs / seconds / 1e12
    share = None if whole is None else seconds / whole
    print(
        f"{label:44} {1e3 * seconds:8.3f} ms {rate:6.1f} TFLOP/s{f'  {share:.4f} of dense' if share else ''}",
        flush=True,
    )
    return {"label": label, "seconds": seconds, "rate": rate, "share": share}


PARTS: Final[dict[str, Callable[[], Rows]]] = {
    "check": check,
    "forward": forward,
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
