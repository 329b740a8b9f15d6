"""Memory layouts that MLX's SDPA supports on CUDA."""

from collections.abc import Sequence

import mlx.core as mx

from attention.kernels.cuda.runtime import launcher


def laid_out(*arrays: mx.array) -> Sequence[mx.array]:
    """Return the arrays, copied if MLX's SDPA on CUDA would fail on their layout.

    Strided columns and reversed axes raise an error in cuDNN; keys that are broadcast over their length crash the
    process in decoding, by a division by zero. Strides are known only once an array is computed, so the launcher checks
    them. Without the launcher, every array that is not contiguous is copied.
    """
    return _laid_out(arrays, given=True)


def of_sdpa(output: mx.array) -> mx.array:
    """Return the output of MLX's SDPA; its cotangent is copied like the arrays of `laid_out`."""
    return _laid_out([output], given=False)[0]


def _laid_out(arrays: Sequence[mx.array], given: bool) -> Sequence[mx.array]:
    if launcher.unavailable_reason() is None:
        made: Sequence[mx.array] = launcher.module().laid_out(arrays, given)
        return made
    return [mx.contiguous(x) for x in arrays] if given else arrays
