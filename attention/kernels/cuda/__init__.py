"""The fused CUDA kernels: flash attention in CUDA C++, compiled at first use with NVRTC, launched through MLX.

Importing this costs nothing: MLX, NVRTC and the driver come in only when something is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from attention.errors import KernelUnavailable
from attention.route import PLAIN, Needs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import mlx.core as mx

    from attention.kernels.cuda.attend import Attend
    from attention.workload import Workload

__all__ = [
    "KernelUnavailable",
    "availability",
    "flash_attention",
    "flash_attention_with_logsumexp",
    "load",
    "supports",
    "variant",
]


def availability() -> tuple[bool, str]:
    """Whether the kernels can be used on this machine, and why (not), in one line; compiles nothing."""
    from attention.kernels.cuda import machine

    try:
        return True, machine.look()
    except KernelUnavailable as unavailable:
        return False, str(unavailable)


def variant() -> str:
    """Which kernels this GPU gets: "hopper" (its own too), "ampere" (the general ones, sm_80 and later), or "none"."""
    from attention.kernels.cuda import machine

    return machine.variant()


def load(on_message: Callable[[str], None] | None = None) -> None:
    """Compiles the launcher, if this machine has none yet; each kernel is compiled at its first use.

    Args:
        on_message: told in one line what will be compiled.

    Raises:
        KernelUnavailable: with the reason.
    """
    from attention.kernels.cuda import launcher, machine

    found = machine.look()
    if on_message is not None and not launcher.is_settled():
        on_message(f"Compiling the launcher of the CUDA kernels (once, about ten seconds; {found}) ...")
    launcher.missing()  # without it they are launched through MLX's own operation


def supports(workload: Workload, needs: Needs = PLAIN) -> str | None:
    """Why the kernels do not take a workload here, in one line, or None if they do; compiles and runs nothing."""
    from attention.kernels.cuda import machine

    return machine.refusal_here(workload, needs)


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
) -> mx.array:
    """softmax(softcap * tanh(q k' * scale / softcap) + mask) v, without the score matrix (Dao et al., 2022).

    Args:
        q: queries (B, H, Lq, D), D up to 256; float16 or bfloat16, as k and v. Not copied, however they are strided, if
            the last axis is dense and the others go by multiples of 8 elements.
        k: keys (B, Hkv, Lk, D), H a multiple of Hkv.
        v: values (B, Hkv, Lk, Dv), Dv up to 256.
        scale: what the dot products are multiplied by, usually D ** -0.5; positive.
        causal: query i sees keys up to i + Lk - Lq (lower-right aligned).
        window: a query sees the last `window` of those keys only; implies causal.
        mask: broadcasts to (B, H, Lq, Lk): bool, true where a query sees a key, or float16, bfloat16 or float32, added
            to the scores; read as it lies. It may go with causal and window.
        softcap: bound of the scores, applied before the mask.

    Returns:
        (B, H, Lq, Dv) in the type of q; rows with nothing to attend to are 0. Gradients go to q, k and v, and to a mask
        that is added, which alone takes the whole score matrix.

    Raises:
        ValueError: for shapes, types or values that do not fit or are not taken (`supports` tells beforehand).
        KernelUnavailable: if the kernel cannot run on this machine.
    """
    if mask is None:
        try:
            found = _find_call(q, k, v, scale, causal, window, softcap)
        except TypeError:  # something that is not what it should be: to be told in words below
            found = None
        if found is not None:
            return found
    return _attend(q, k, v, scale, causal, window, mask, softcap, False)[0]


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
) -> tuple[mx.array, mx.array]:
    """`flash_attention`, and the natural logarithm of each row's sum of exponentials.

    Returns:
        The output (B, H, Lq, Dv), and the logsumexp (B, H, Lq) in float32, -inf for a row with nothing to attend to.
        Gradients flow through both.

    Raises:
        ValueError: for shapes, types or values that do not fit or are not taken.
        KernelUnavailable: if the kernel cannot run on this machine.
    """
    output, logsumexp = _attend(q, k, v, scale, causal, window, mask, softcap, True)[:2]
    return output, logsumexp


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    with_logsumexp: bool,
) -> Sequence[mx.array]:
    kind = None if mask is None else (mask.dtype, mask.shape)
    key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, scale, causal, window, kind, softcap, with_logsumexp)
    known = _known.get(key)
    if known is None:
        known = _look_up(q, k, v, scale, causal, window, mask, softcap, with_logsumexp)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = known
    return known(q, k, v) if mask is None else known(q, k, v, mask)


_known: dict[object, Attend] = {}
_MOST_KNOWN: Final = 256


def _find_nothing(*_: object) -> mx.array | None:
    return None


_find_call: Callable[..., mx.array | None] = _find_nothing
"""The launcher's own table of calls, once it keeps one: faster than a key made in Python."""


def forget_calls() -> None:
    """Forgets what known calls take, for where that is to change."""
    _known.clear()
    if _find_call is not _find_nothing:
        from attention.kernels.cuda import launcher

        launcher.module().forget_calls()


def _look_up(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    causal: bool,
    window: int | None,
    mask: mx.array | None,
    softcap: float | None,
    with_logsumexp: bool,
) -> Attend:
    """What a call takes, decided now; the launcher is told too, if that is all its own."""
    from attention.kernels.cuda import launcher
    from attention.kernels.cuda.attend import repeated
    from attention.kernels.cuda.call import check_arrays, normal

    global _find_call  # noqa: PLW0603  what every call begins with
    dtype, kind = check_arrays(q, k, v, mask)
    call = normal(scale, causal, window, softcap, k.shape[2], kind)
    made = repeated(q.shape, k.shape, v.shape[3], dtype, call, with_logsumexp)
    if mask is None and not with_logsumexp and launcher.is_plan(made):
        launcher.module().keep_call(q, k, v, scale, causal, window, softcap, made)
        _find_call = launcher.module().find_call
    return made
