"""Arrays as MLX's SDPA on CUDA takes them."""

from collections.abc import Sequence

import mlx.core as mx

from attention.kernels.cuda.runtime import launcher


def laid_out(*arrays: mx.array) -> Sequence[mx.array]:
    """Returns arrays for MLX's SDPA on CUDA, copied where it would fail on their layout.

    Strided columns and reversed axes raise an error of cuDNN's there; keys that are broadcast over their length end the
    process, in decoding, by a division by zero. Strides are known only when an array is computed, so it is the
    launcher that looks at them. Without one, whatever is not contiguous is copied.
    """
    return _laid_out(arrays, given=True)


def of_sdpa(output: mx.array) -> mx.array:
    """Returns the output of MLX's SDPA, whose gradient is laid out as `laid_out` does."""
    return _laid_out([output], given=False)[0]


def _laid_out(arrays: Sequence[mx.array], given: bool) -> Sequence[mx.array]:
    if launcher.unavailable_reason() is None:
        made: Sequence[mx.array] = launcher.module().laid_out(arrays, given)
        return made
    return [mx.contiguous(x) for x in arrays] if given else arrays
