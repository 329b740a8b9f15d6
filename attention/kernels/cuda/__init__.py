"""FlashAttention in CUDA C++, compiled on first use with NVRTC and launched through MLX.

Importing this package is cheap: MLX, NVRTC and the driver are loaded on the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import KernelUnavailable
from attention.core.route import NO_NEEDS, Needs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import mlx.core as mx

    from attention.core.workload import Workload
    from attention.kernels.cuda.attend import Attend
    from attention.masks import Pattern
    from attention.quantized_kv import QuantizedArray

__all__ = [
    "KernelUnavailable",
    "availability",
    "flash_attention",
    "flash_attention_quantized",
    "flash_attention_with_logsumexp",
    "load",
    "supports",
    "variant",
]


def availability() -> tuple[bool, str]:
    """Return whether the kernels can run on this machine, with a one-line reason; compiles nothing."""
    from attention.kernels.cuda import requirements

    try:
        return True, requirements.describe()
    except KernelUnavailable as unavailable:
        return False, str(unavailable)


def variant() -> str:
    """Return the kernels for this GPU: "hopper" (general and Hopper), "ampere" (general, sm_80 and later) or "none"."""
    from attention.kernels.cuda import requirements

    return requirements.variant()


def load(on_message: Callable[[str], None] | None = None) -> None:
    """Compile the launcher unless it is cached; each kernel is compiled on its first use.

    Args:
        on_message: called with a one-line message before compilation starts.

    Raises:
        KernelUnavailable: with the reason.
    """
    from attention.kernels.cuda import requirements
    from attention.kernels.cuda.runtime import launcher

    found = requirements.describe()
    if on_message is not None and not launcher.is_settled():
        on_message(f"Compiling the launcher of the CUDA kernels (once, about ten seconds; {found}) ...")
    launcher.unavailable_reason()  # without it, kernels are launched through MLX's precompiled-kernel operation


def supports(workload: Workload, needs: Needs = NO_NEEDS) -> str | None:
    """Return None if the kernels support a workload on this machine, else a one-line reason; compiles nothing."""
    from attention.kernels.cuda import requirements

    return requirements.refusal_here(workload, needs)


def flash_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    pattern: Pattern | None = None,
    alibi: mx.array | None = None,
) -> mx.array:
    """Compute attention on an NVIDIA GPU; arguments and results as in `kernels.common.FlashAttention`.

    D and Dv are up to 256, in float16 or bfloat16, and the scale is positive. Strided inputs are not copied if the last
    axis is contiguous and the other strides are multiples of 8 elements. An additive mask is float16, bfloat16 or
    float32, is read with its own strides, and is differentiable: only its gradient materialises the score matrix.
    `pattern` is the pairs that are visible, instead of causal and window; only their tiles are computed. `alibi` is
    slopes (H,), float32: slope * (key - position of the query) is added to the scores after the softcap.

    Raises:
        ValueError: shapes, dtypes or values are inconsistent or unsupported (`supports` checks a workload).
        KernelUnavailable: the kernel cannot run on this machine.
    """
    if mask is None and pattern is None and alibi is None:
        try:
            found = _find_call(q, k, v, scale, causal, window, softcap)
        except TypeError:  # an argument of the wrong type: reported by the checks of `_resolve_call`
            found = None
        if found is not None:
            return found
    return _attend(q, k, v, scale, causal, window, mask, softcap, pattern, alibi, False)[0]


def flash_attention_with_logsumexp(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    pattern: Pattern | None = None,
    alibi: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute `flash_attention` and the logsumexp (natural logarithm) of each row of scores.

    Returns:
        The output (B, H, Lq, Dv), and the logsumexp (B, H, Lq) in float32, -inf for a fully masked row. Both are
        differentiable.

    Raises:
        ValueError: shapes, dtypes or values are inconsistent or unsupported.
        KernelUnavailable: the kernel cannot run on this machine.
    """
    output, logsumexp = _attend(q, k, v, scale, causal, window, mask, softcap, pattern, alibi, True)[:2]
    return output, logsumexp


def flash_attention_quantized(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    pattern: Pattern | None = None,
    alibi: mx.array | None = None,
    logsumexp: bool = False,
) -> Sequence[mx.array]:
    """Compute `flash_attention` of quantized keys and values, which are dequantized on chip.

    Keys and values may have other formats. The parts are read in place if their last axis is contiguous. There is no
    gradient.

    Returns:
        The output (B, H, Lq, Dv) and, with `logsumexp`, the logsumexp (B, H, Lq) in float32.

    Raises:
        ValueError: shapes, dtypes or values are inconsistent or unsupported, or a gradient is requested.
        KernelUnavailable: the kernel does not take the call, or cannot run on this machine.
    """
    if not logsumexp and mask is None and pattern is None and alibi is None:
        try:
            found = _find_packed_call(
                q,
                k.numbers,
                k.scales,
                k.biases,
                v.numbers,
                v.scales,
                v.biases,
                v.format.bits,
                scale,
                causal,
                window,
                softcap,
            )
        except (TypeError, IndexError):  # a wrong type or shape: reported by the checks of `_resolve_packed_call`
            found = None
        if found is not None:
            return [found]
    key = (
        q.shape, q.dtype, k.numbers.shape, k.format, k.scales.dtype, v.numbers.shape, v.format, v.scales.dtype,
        scale, causal, window, softcap, logsumexp,
        None if mask is None else (mask.dtype, mask.shape), pattern,
        None if alibi is None else (alibi.dtype, alibi.shape),
    )  # fmt: skip
    known = _known.get(key)
    if known is None:
        known = _resolve_packed_call(q, k, v, scale, causal, window, mask, softcap, pattern, alibi, logsumexp)
        _known[key] = known
    given = [q, *k.arrays, *v.arrays]
    if mask is not None:
        from attention.masks import as_4d

        given.append(as_4d(mask))
    if alibi is not None:
        given.append(alibi)
    return known(given)[: 2 if logsumexp else 1]


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    pattern: Pattern | None,
    alibi: mx.array | None,
    with_logsumexp: bool,
) -> Sequence[mx.array]:
    kind = None if mask is None else (mask.dtype, mask.shape)
    shapes = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
    slopes = None if alibi is None else (alibi.dtype, alibi.shape)
    key = (shapes, scale, causal, window, kind, softcap, pattern, slopes, with_logsumexp)
    known = _known.get(key)
    if known is None:
        known = _resolve_call(q, k, v, scale, causal, window, mask, softcap, pattern, alibi, with_logsumexp)
        _known[key] = known
    return known(q, k, v, *(x for x in (mask, alibi) if x is not None))


_known: BoundedDict[object, Attend] = BoundedDict(256)


def _find_nothing(*_: object) -> mx.array | None:
    return None


_find_call: Callable[..., mx.array | None] = _find_nothing
"""Lookup in the launcher's table of repeated calls, once it has an entry: faster than a key built in Python."""
_find_packed_call: Callable[..., mx.array | None] = _find_nothing
"""The same of calls with quantized keys and values as wide as each other."""


def forget_calls() -> None:
    """Clear the cache of repeated calls, so that their kernels are selected again."""
    _known.clear()
    if _find_call is not _find_nothing or _find_packed_call is not _find_nothing:
        from attention.kernels.cuda.runtime import launcher

        launcher.module().forget_calls()


def _resolve_call(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    pattern: Pattern | None,
    alibi: mx.array | None,
    with_logsumexp: bool,
) -> Attend:
    """Select the kernels of a call; a plan without mask or logsumexp is also added to the launcher's table."""
    from attention.kernels.cuda.attend import repeated_call
    from attention.kernels.cuda.runtime import launcher
    from attention.kernels.cuda.runtime.call import check_arrays, normalize

    global _find_call  # noqa: PLW0603  the fast path of every call
    dtype, kind = check_arrays(q, k, v, mask, alibi)
    call = normalize(scale, causal, window, softcap, k.shape[2], kind, pattern, alibi is not None)
    made = repeated_call(q.shape, k.shape, v.shape[3], dtype, call, with_logsumexp)
    if mask is None and pattern is None and alibi is None and not with_logsumexp and launcher.is_plan(made):
        launcher.module().keep_call(q, k, v, scale, causal, window, softcap, made)
        _find_call = launcher.module().find_call
    return made


def _resolve_packed_call(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    pattern: Pattern | None,
    alibi: mx.array | None,
    logsumexp: bool,
) -> Attend:
    """Select the kernels of a call with quantized keys and values.

    A plan without mask is also added to the launcher's table, if the shapes of its parts tell their formats.
    """
    from attention.kernels.cuda.attend import repeated_packed_call
    from attention.kernels.cuda.quantized.formats import PackedKV, check_packed
    from attention.kernels.cuda.runtime import launcher
    from attention.kernels.cuda.runtime.call import normalize

    global _find_packed_call  # noqa: PLW0603  the fast path of every call
    dtype, kind = check_packed(q, k, v, mask, alibi)
    call = normalize(scale, causal, window, softcap, k.shape[2], kind, pattern, alibi is not None)
    made = repeated_packed_call(q.shape, k.shape, v.shape[3], dtype, call, PackedKV.of(k, v), logsumexp)
    plain = mask is None and pattern is None and alibi is None and not logsumexp
    if plain and launcher.is_plan(made):
        parts = (k.numbers, k.scales, k.biases, v.numbers, v.scales, v.biases)
        launcher.module().keep_packed_call(q, *parts, v.format.bits, scale, causal, window, softcap, made)
        _find_packed_call = launcher.module().find_packed_call
    return made
