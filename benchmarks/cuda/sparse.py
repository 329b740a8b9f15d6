"""Checks and benchmarks of the kernels with block lists, on Hopper: `python -m benchmarks.cuda.sparse PART`.

Parts: check, forward, check-backward, backward; all without any. Every variant is compared with float64 first. Rates
count visible pairs, and shares are of the dense kernel's time in the same run. `--json PATH` writes the results.
"""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention import masks
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, make_plan
from attention.kernels.cuda.runtime.program import machine_code
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90.backward import BLOCK_Q, Backward
from attention.kernels.cuda.sm90.backward import specialise as specialise_backward
from attention.kernels.cuda.sm90.forward import Forward, specialise, specialise_lists
from attention.kernels.cuda.sm90.launch import forward_kernel, forward_plan, forward_stages
from attention.masks import Pattern
from benchmarks.cuda.timing import Run, medians, random_arrays, selected_parts, timed_mlx, write_rows

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
    made = {name: replace(specialise_lists(dim, "bf16"), **how) for name, how in VARIANTS.items()}
    if dim == 64:
        made["three"] = replace(made["overlap"], consumers=3)
    return made


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


SIZES: Final = ((2, 4, 2, 300, 300), (1, 3, 1, 517, 1333), (2, 2, 2, 65, 31), (1, 1, 1, 1, 700))
"""Batch, heads, key heads, queries and keys."""


def check() -> Rows:
    """Compare every variant with float64 on small inputs."""
    kernels = [kernel for dim in (64, 128) for kernel in variants(dim).values()]
    kernels += [specialise_lists(dim, "f16", softcap, few) for dim in (64, 128, 192, 256)
                for softcap, few in ((False, False), (True, False), (False, True))]  # fmt: skip
    compile_all(kernels)
    return [_checked(kernel) for kernel in kernels]


def check_backward() -> Rows:
    """Compare the gradients of every variant with float64 on small inputs."""
    kernels = [specialise_backward(dim, False, element, softcap=softcap, lists=True) for dim in (64, 128, 192, 256)
               for element, softcap in (("bf16", False), ("f16", True))]  # fmt: skip
    compile_all(kernels)
    return [_checked_backward(kernel) for kernel in kernels]


def _checked_backward(kernel: Backward) -> dict[str, Any]:
    wrong = []
    for size in (*SIZES, (2, 6, 2, 190, 450)):
        shape = CallShape(*size, kernel.head_dim, kernel.element)
        *made, cotangent = selfcheck.inputs(shape)
        for name, pattern in checked_patterns(shape).items():
            call = CallParams(shape.head_dim**-0.5, False, None, 2.0 if kernel.softcap else None, pattern=pattern)
            outputs = forward_plan(shape, call)(made)[: len(OUTPUTS)]
            found = gradient.by_kernel(made, [cotangent], outputs, shape, call)
            reason = selfcheck.gradient_disagreement(shape, call, found, [*made, cotangent])
            if reason:
                wrong.append(f"{size} {name}: {reason}")
    print(f"check backward {kernel}: {'; '.join(wrong) or 'right'}", flush=True)
    return {"check": str(kernel), "wrong": wrong}


def _checked(kernel: Forward) -> dict[str, Any]:
    wrong = []
    for size in SIZES:
        shape = CallShape(*size, kernel.head_dim, kernel.element)
        made = selfcheck.inputs(shape)
        for name, pattern in checked_patterns(shape).items():
            call = CallParams(shape.head_dim**-0.5, False, None, 2.0 if kernel.softcap else None, pattern=pattern)
            found = make_plan(INPUTS, OUTPUTS, forward_stages(shape, call, kernel=kernel))(made[:3])
            reason = selfcheck.disagreement(shape, call, found[0], found[1], made)
            if reason:
                wrong.append(f"{size} {name}: {reason}")
    how = f"{kernel.consumers} consumers, overlap {kernel.overlap}, paced {kernel.paced}, softcap {kernel.softcap}"
    print(f"check {kernel.head_dim} {kernel.element} {how}: {'; '.join(wrong) or 'right'}", flush=True)
    return {"check": str(kernel), "wrong": wrong}


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
        compile_all([*variants(dim).values(), *(specialise(dim, *how) for how in _DENSE)])
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


_DENSE: Final[tuple[tuple[bool, Any, bool], ...]] = (
    (False, "bf16", False),
    (True, "bf16", False),
    (True, "bf16", True),
)


def backward() -> Rows:
    """Time the dense backward kernels and those with lists."""
    rows: Rows = []
    for dim in (128, 64):
        shape = CallShape(1, HEADS, HEADS, LENGTH, LENGTH, dim, "bf16")
        compile_all([specialise_backward(dim, *how, lists=lists) for how, lists in _BACKWARD])
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


_BACKWARD: Final[tuple[tuple[tuple[Any, ...], bool], ...]] = (
    ((False, "bf16"), False),
    ((True, "bf16"), False),
    ((True, "bf16", True), False),
    ((False, "bf16"), True),
)


def _timed_backward(arrays: list[mx.array], shape: CallShape, call: CallParams) -> Run:
    output, logsumexp, stats = forward_plan(shape, call)(arrays[:3])[:3]
    given = [*arrays[:3], output, arrays[3], stats, logsumexp]
    mx.eval(given)
    plan = gradient.make_plan_of_gradient(shape, call, False)

    def run(count: int) -> float:
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(count):  # evaluated one by one, so that memory does not exceed that of one call
            mx.async_eval(plan(given)[:3])  # type: ignore[no-untyped-call]
        mx.synchronize()
        return (time.perf_counter() - start) / count

    return run


def _compared(arrays: list[mx.array], shape: CallShape, name: str, pattern: Pattern, whole: float) -> Rows:
    """Time the variants with lists on one mask."""
    call, rows = CallParams(shape.head_dim**-0.5, False, None, None, pattern=pattern), []
    runs, pairs = {}, 0
    for variant, kernel in variants(shape.head_dim).items():
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


def _timed(arrays: list[mx.array], shape: CallShape, call: CallParams, kernel: Forward) -> Run:
    plan = make_plan(INPUTS, OUTPUTS[:1], forward_stages(shape, call, False, kernel))
    return timed_mlx(lambda: plan(arrays)[0])


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
    """Run the named parts, or all; return 1 if a check failed."""
    words, path = selected_parts(PARTS)
    rows = []
    for name in PARTS:
        if name in words or not words:
            rows += PARTS[name]()
            write_rows(rows, path)
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
