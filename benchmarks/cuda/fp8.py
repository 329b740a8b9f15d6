"""Benchmark of attention in 8 bits on Hopper, with target figures: `python -m benchmarks.cuda.fp8 PART`.

Parts: speed, error; both without any. `speed` times `poc-fp8` in the same rounds as the kernel in bfloat16, and the
attention kernel and the quantization by themselves; causal FLOPs count half. `error` compares the relative error with
that of SageAttention's recipe in float64. `--json PATH` writes the results.
"""

import sys
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention.kernels import cuda
from attention.kernels.common.selfcheck import exact
from attention.kernels.cuda import fp8
from attention.kernels.cuda.runtime.call import CallShape, normalize
from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, make_plan
from attention.kernels.cuda.sm90 import fp8_launch
from attention.masks import Mask
from attention.measure.reference import Rules, forward, recipe_output
from benchmarks.cuda.harness import check_target, random_arrays, report, selected_parts, write_rows
from benchmarks.rounds import MlxCalls, medians

Rows = list[dict[str, Any]]
HEAD_DIM: Final = 128
SHAPES: Final = [  # batch, heads, key heads, length, head dim
    (8, 16, 16, 2048, HEAD_DIM),
    (2, 16, 16, 8192, HEAD_DIM),
    (1, 16, 16, 32768, HEAD_DIM),
    (2, 32, 8, 8192, HEAD_DIM),
    (2, 32, 32, 8192, 64),
]
TARGET_SHAPES: Final = (SHAPES[1], SHAPES[3])
MIN_SPEEDUP: Final = 1.45
MAX_ERROR_RATIO: Final = 3.0
ERROR_LENGTH: Final = 2048
CHECKED_ROWS: Final = np.arange(0, ERROR_LENGTH, 37)


def speed() -> Rows:
    """Time every shape, full and causal; returns rows and targets."""
    rows = []
    for batch, heads, key_heads, length, dim in SHAPES:
        for causal in (False, True):
            shape = CallShape(batch, heads, key_heads, length, length, dim, "bf16")
            seconds = _seconds(shape, causal)
            flops = 4 * batch * heads * length**2 * dim / (2 if causal else 1)
            label = f"{batch}x{heads}/{key_heads}x{length}x{dim} {'causal' if causal else 'full'}"
            rows.append(report(label, seconds, flops / 1e12, "TFLOP/s"))
            if (batch, heads, key_heads, length, dim) in TARGET_SHAPES:
                gain = seconds["bfloat16"] / seconds["ours"]
                rows.append(check_target(f"{label}: the whole call over bfloat16", MIN_SPEEDUP, gain))
    return rows


def _seconds(shape: CallShape, causal: bool) -> dict[str, float]:
    """Return seconds of the whole call ("ours"), of its two launches, and of the kernel in bfloat16."""
    rows, keys = (shape.batch, shape.heads, shape.queries), (shape.batch, shape.kv_heads, shape.keys)
    q, k, v = random_arrays((*rows, shape.head_dim), (*keys, shape.head_dim), (*keys, shape.head_dim))
    scale = shape.head_dim**-0.5
    call = normalize(scale, causal, None, None, shape.keys)
    fp8.check(shape, call)
    quantization, attention = fp8_launch.stages(shape, call, fp8_launch.forward_kernel(shape, call))
    quantize = make_plan(INPUTS[1:], fp8_launch.QUANTIZED, [quantization])
    attend = make_plan((INPUTS[0], *fp8_launch.QUANTIZED), OUTPUTS[:1], [attention])
    quantized = quantize(k, v)[: len(fp8_launch.QUANTIZED)]
    mx.eval(quantized)
    mask = Mask(causal=causal)
    return medians(
        {
            "ours": MlxCalls(lambda: fp8.attend(q, k, v, scale=scale, mask=mask)),
            "kernel": MlxCalls(lambda: attend(q, *quantized)[0]),
            "quantization": MlxCalls(lambda: quantize(k, v)[0]),
            "bfloat16": MlxCalls(lambda: cuda.flash_attention(q, k, v, scale=scale, causal=causal)),
        }
    )


def inputs(kind: str) -> list[mx.array]:
    """Return q, k and v of one head; `kind` names what is unusual about them."""
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((1, 1, ERROR_LENGTH, HEAD_DIM)).astype(np.float32) for _ in range(3))
    if kind == "constant outliers of K":
        k[..., [3, 17, 40]] += np.array([30, -45, 60], np.float32)
    if kind == "outlier channels of K":
        k[..., [3, 17, 40]] *= 20
    if kind == "large scores":
        q *= 4
    if kind == "growing values":
        v *= np.exp(np.arange(ERROR_LENGTH) / 200).astype(np.float32)[:, None]
    return [mx.array(x).astype(mx.bfloat16) for x in (q, k, v)]


KINDS: Final = ("normal", "constant outliers of K", "outlier channels of K", "large scores", "growing values")


def error() -> Rows:
    """Compare the relative error with that of the published recipe; returns rows and targets."""
    rows, scale = [], HEAD_DIM**-0.5
    for kind in KINDS:
        made = inputs(kind)
        q, k, v = (exact(x)[0, 0] for x in made)
        for causal in (False, True):
            rules = Rules(scale=scale, causal=causal)
            right = forward(q, k, v, rules, CHECKED_ROWS).output
            own = exact(fp8.attend(*made, scale=scale, mask=Mask(causal=causal)))[0, 0][CHECKED_ROWS]
            found, published = (
                float(np.linalg.norm(output - right) / np.linalg.norm(right))
                for output in (own, recipe_output(q, k, v, rules, CHECKED_ROWS))
            )
            label = f"{kind}, {'causal' if causal else 'full'}"
            print(f"{label:34} relative error {found:.4f}, of the recipe {published:.4f}", flush=True)
            rows.append({"label": label, "error": found, "recipe": published})
            rows.append(check_target(f"{label}: recipe's error over ours", 1 / MAX_ERROR_RATIO, published / found))
    return rows


PARTS: Final = {"speed": speed, "error": error}


def main() -> None:
    """Run the parts named on the command line."""
    words, path = selected_parts(PARTS)
    rows = [row for name, part in PARTS.items() if not words or name in words for row in part()]
    write_rows(rows, path)
    sys.exit(not all(row.get("holds", True) for row in rows))


if __name__ == "__main__":
    main()
