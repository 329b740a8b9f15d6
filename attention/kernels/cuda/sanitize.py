"""NVIDIA's compute-sanitizer over a small call of each kind, on a GPU: `python -m attention.kernels.cuda.sanitize`.

Exit code 0: nothing found; 1: something was, and is printed; 3: there is no compute-sanitizer or no GPU.
"""

import functools
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from attention.kernels import cuda
from attention.kernels.cuda.call import MaskKind

TOOLS: Final = ("memcheck", "racecheck")
DIMS: Final = (64, 128, 192, 256)
SIZES: Final = ((150, 170), (1, 900))
"""Queries and keys: of no whole tiles, and few queries to keys that are split."""
GENERAL: Final[tuple[tuple[tuple[int, int], MaskKind | None, tuple[int, int]], ...]] = (
    ((64, 64), None, SIZES[0]),
    ((128, 128), "bool", SIZES[0]),
    ((128, 128), "bool", SIZES[1]),
    ((80, 80), "float16", SIZES[0]),
    ((192, 128), "float32", SIZES[0]),
    ((256, 256), None, SIZES[0]),
)
"""Widths of keys and values, the kind of mask, and a size, for the general kernels."""


def calls(dim: int) -> None:
    """One call of each kind at a head dimension, and its gradients.

    Raises:
        RuntimeError: our own kernels do not make those gradients, so nothing would have been looked at.
    """
    import mlx.core as mx

    from attention.kernels.cuda import gradient, selfcheck
    from attention.kernels.cuda.call import Shape, normal

    for queries, keys in SIZES:
        shape = Shape(1, 4, 2, queries, keys, dim, "bf16")
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
            refusal = gradient.refusal(shape, normal(0.1, causal, window, softcap, keys))
            if refusal:
                raise RuntimeError(refusal)


def general_calls() -> None:
    """Calls of the general kernels, forward and backward: their tilings, masks of each kind, keys that are split."""
    import mlx.core as mx

    from attention.kernels.cuda import selfcheck
    from attention.kernels.cuda.attend import spread
    from attention.kernels.cuda.call import Call, Shape
    from attention.kernels.cuda.general_alone import general_alone

    for (head_dim, value_dim), kind, (queries, keys) in GENERAL:
        shape = Shape(1, 4, 2, queries, keys, head_dim, "bf16", value_dim)
        call = Call(0.1, kind is None, None, None, kind)
        *primals, cotangent = selfcheck.inputs(shape)
        masks = [spread(x, shape) for x in selfcheck.random_mask(shape, call)]

        def attend(q: mx.array, k: mx.array, v: mx.array, masks: Any = masks, call: Call = call) -> mx.array:
            mask = masks[0] if masks else None
            return cuda.flash_attention(q, k, v, scale=call.scale, causal=call.causal, mask=mask)

        with general_alone():
            mx.eval(mx.vjp(attend, primals, [cotangent])[1])


def main() -> int:
    """Runs every tool over the Hopper kernels at every head dimension, where there are any, and the general kernels."""
    usable, reason = cuda.availability()
    sanitizer = shutil.which("compute-sanitizer")
    if not usable or sanitizer is None:
        print(
            reason if not usable else "compute-sanitizer is not on the PATH; the CUDA toolkit has it", file=sys.stderr
        )
        return 3
    parts = (*(map(str, DIMS) if cuda.variant() == "hopper" else ()), "general")
    with ThreadPoolExecutor(len(parts)) as pool:  # a tool slows a process down, and leaves most of the GPU idle
        return max(pool.map(functools.partial(sanitized, sanitizer), parts))


def sanitized(sanitizer: str, part: str) -> int:
    """Runs every tool over one part, prints what each found, and returns 1 if that is anything."""
    own = (sys.executable, "-m", "attention.kernels.cuda.sanitize", part)
    subprocess.run(own, check=True)  # compiles and checks, which takes long under a sanitizer
    found = 0
    for tool in TOOLS:
        command = (sanitizer, "--tool", tool, "--error-exitcode", "1", *own)
        start = time.monotonic()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        told = "nothing found" if run.returncode == 0 else run.stdout + run.stderr
        print(f"{tool:9} {part}: {told} ({time.monotonic() - start:.0f} s)", flush=True)
        found |= int(run.returncode != 0)
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        general_calls() if sys.argv[1] == "general" else calls(int(sys.argv[1]))
    else:
        sys.exit(main())
