"""compute-sanitizer on a small call of each kind, on a GPU: `python -m benchmarks.cuda.sanitize`.

Exit code 0: nothing found; 1: errors found and printed; 3: no compute-sanitizer or no GPU.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from attention.kernels import cuda
from attention.kernels.cuda.runtime.call import MaskKind

if TYPE_CHECKING:
    import mlx.core as mx

TOOLS: Final = ("memcheck", "racecheck")
DIMS: Final = (64, 128, 192, 256)
SIZES: Final = ((150, 170), (1, 900))
"""Queries and keys: partial tiles, and few queries with split keys."""
MANY: Final = 140
"""Planes of one tile of queries each, more than a GPU has multiprocessors."""
GENERAL: Final[tuple[tuple[tuple[int, int], MaskKind | None, tuple[int, int]], ...]] = (
    ((64, 64), None, SIZES[0]),
    ((128, 128), "bool", SIZES[0]),
    ((128, 128), "bool", SIZES[1]),
    ((80, 80), "float16", SIZES[0]),
    ((192, 128), "float32", SIZES[0]),
    ((256, 256), None, SIZES[0]),
)
"""Cases of the general kernels: key and value width, mask dtype, and size."""
QUANTIZED: Final = ((64, "int4:32", "int8"), (128, "mxfp4", "int4"), (128, "int5", "mxfp8"), (96, "nvfp4", "int3:32"))
"""Cases of the kernels for quantized keys and values: width, and formats of keys and of values."""


def calls(dim: int) -> None:
    """Run one call of each kind at a head dimension, and its gradients.

    Raises:
        RuntimeError: the Hopper kernels do not compute those gradients, so the sanitizer would check nothing.
    """
    import mlx.core as mx

    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.runtime.call import CallShape, normalize
    from attention.kernels.cuda.sm90 import gradient

    for queries, keys in SIZES:
        shape = CallShape(1, 4, 2, queries, keys, dim, "bf16")
        *primals, cotangent = selfcheck.inputs(shape)
        for causal, window, softcap in ((False, None, None), (True, None, None), (True, 70, None), (True, None, 5.0)):

            def attend(
                q: mx.array,
                k: mx.array,
                v: mx.array,
                causal: bool = causal,
                window: int | None = window,
                softcap: float | None = softcap,
            ) -> mx.array:
                return cuda.flash_attention(q, k, v, scale=0.1, causal=causal, window=window, softcap=softcap)

            mx.eval(mx.vjp(attend, primals, [cotangent])[1])
            refusal = gradient.refusal(shape, normalize(0.1, causal, window, softcap, keys))
            if refusal:
                raise RuntimeError(refusal)
        mx.eval(mx.vjp(_listed, primals, [cotangent])[1])
        mx.eval(mx.vjp(_sloped, primals, [cotangent])[1])
    many_work_items(dim)


def many_work_items(dim: int) -> None:
    """Run the forward kernels for large problems, whose blocks take several work items, at a head dimension."""
    import mlx.core as mx

    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.runtime.call import CallShape, normalize
    from attention.kernels.cuda.runtime.launch import INPUTS, OUTPUTS, make_plan
    from attention.kernels.cuda.sm90.forward import specialise
    from attention.kernels.cuda.sm90.launch import forward_stages

    shape = CallShape(1, MANY, MANY, 80, 300, dim, "bf16")
    inputs = selfcheck.inputs(shape)[:3]
    for causal, window in ((False, None), (True, None), (True, 70)):
        call = normalize(0.1, causal, window, None, shape.keys)
        stages = forward_stages(shape, call, kernel=specialise(dim, causal, "bf16", window is not None))
        mx.eval(make_plan(INPUTS, OUTPUTS, stages)(inputs))


def _listed(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Compute attention with a pattern of full, partial and missing tiles."""
    from attention import masks

    return cuda.flash_attention(q, k, v, scale=0.1, pattern=masks.prefix(130) | masks.window(20))


def _sloped(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Compute causal attention with ALiBi."""
    import mlx.core as mx

    return cuda.flash_attention(q, k, v, scale=0.1, causal=True, alibi=mx.array([0.5, 0.25, 0.1, 0.0], mx.float32))


def general_calls() -> None:
    """Run calls of the general kernels, forward and backward: tilings, mask dtypes, split keys."""
    import mlx.core as mx

    from attention.kernels.cuda.attend import broadcast_mask
    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.runtime.call import CallParams, CallShape
    from benchmarks.cuda.measure_portable import portable_only

    for (head_dim, value_dim), kind, (queries, keys) in GENERAL:
        shape = CallShape(1, 4, 2, queries, keys, head_dim, "bf16", value_dim)
        call = CallParams(0.1, kind is None, None, None, kind)
        *primals, cotangent = selfcheck.inputs(shape)
        masks = [broadcast_mask(x, shape) for x in selfcheck.random_mask(shape, call)]

        def attend(q: mx.array, k: mx.array, v: mx.array, masks: Any = masks, call: CallParams = call) -> mx.array:
            mask = masks[0] if masks else None
            return cuda.flash_attention(q, k, v, scale=call.scale, causal=call.causal, mask=mask)

        with portable_only():
            for function in (attend, _listed, _sloped):
                mx.eval(mx.vjp(function, primals, [cotangent])[1])


def fp8_calls() -> None:
    """Run calls of the kernels in 8 bits: partial tiles, tiles split over blocks, every mask."""
    import mlx.core as mx

    from attention.kernels.cuda import fp8
    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.runtime.call import CallShape
    from attention.masks import Mask

    for dim, (queries, keys) in ((64, (150, 170)), (96, (300, 2900)), (128, (330, 523))):
        inputs = selfcheck.inputs(CallShape(1, 4, 2, queries, keys, dim, "bf16"))[:3]
        for mask in (Mask(), Mask(causal=True), Mask(causal=True, window=70)):
            mx.eval(fp8.attend(*inputs, scale=0.1, mask=mask))


def quantized_calls() -> None:
    """Run calls with quantized keys and values: formats, head dims, masks, one to many queries, split keys."""
    import mlx.core as mx

    from attention.kernels.cuda.runtime import selfcheck
    from attention.kernels.cuda.runtime.call import CallShape
    from attention.quantized_kv import quantized

    for dim, key, value in QUANTIZED:
        for queries, keys in ((1, 900), (5, 170), (100, 170)):
            q, k, v = selfcheck.inputs(CallShape(1, 4, 2, queries, keys, dim, "bf16"))[:3]
            for causal, window in ((False, None), (True, 70)):
                mx.eval(
                    cuda.flash_attention_quantized(
                        q, quantized(k, key), quantized(v, value), scale=0.1, causal=causal, window=window
                    )
                )
            mask = mx.random.normal((queries, keys)) < 1
            mx.eval(cuda.flash_attention_quantized(q, quantized(k, key), quantized(v, value), scale=0.1, mask=mask))


def step_calls() -> None:
    """Run steps of streams, whose kernel writes a slot that it reads: dense, quantized, with rotary positions."""
    import mlx.core as mx

    from attention import Rope, StreamingKV

    for kv_format, rope in (("none", None), ("int4", None), ("int8", None), ("mxfp4", None), ("int4", Rope(128))):
        state = StreamingKV(4, 700, kv_format, rope=rope)
        for length in (710, 1, 1, 1):
            q, k, v = (mx.random.normal((1, heads, length, 128)).astype(mx.bfloat16) for heads in (8, 2, 2))
            mx.eval(state.attend(q, k, v))


def main() -> int:
    """Run every tool on the general kernels and, on Hopper, on the Hopper kernels at every head dimension."""
    usable, reason = cuda.availability()
    sanitizer = shutil.which("compute-sanitizer")
    if not usable or sanitizer is None:
        print(
            reason if not usable else "compute-sanitizer is not on the PATH; the CUDA toolkit has it", file=sys.stderr
        )
        return 3
    parts = (*((*map(str, DIMS), "fp8") if cuda.variant() == "hopper" else ()), "general", "quantized", "steps")
    with ThreadPoolExecutor(len(parts)) as pool:  # under a sanitizer a process leaves most of the GPU idle
        return max(pool.map(functools.partial(sanitized, sanitizer), parts))


def sanitized(sanitizer: str, part: str) -> int:
    """Run every tool on one part and print its findings; return 1 if there are any, else 0."""
    own = (sys.executable, "-m", "benchmarks.cuda.sanitize", part)
    subprocess.run(own, check=True)  # compilation and self-checks would be slow under a sanitizer
    found = 0
    for tool in TOOLS:
        command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *own)
        start = time.monotonic()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        result = "nothing found" if run.returncode == 0 else run.stdout + run.stderr
        print(f"{tool:9} {part}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
        found |= int(run.returncode != 0)
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        named = {"general": general_calls, "quantized": quantized_calls, "fp8": fp8_calls, "steps": step_calls}
        named[sys.argv[1]]() if sys.argv[1] in named else calls(int(sys.argv[1]))
    else:
        sys.exit(main())
