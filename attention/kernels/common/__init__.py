"""What the kernels of all backends share: their signature, the cache folder, the first-use check, unfused attention."""

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import mlx.core as mx


class FlashAttention(Protocol):
    """What `flash_attention` of every backend takes; each has further keywords."""

    def __call__(
        self,
        q: "mx.array",
        k: "mx.array",
        v: "mx.array",
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        mask: "mx.array | None" = None,
        softcap: float | None = None,
    ) -> "mx.array":
        """Compute softmax(softcap * tanh(q k' * scale / softcap) + mask) v without the score matrix (Dao et al., 2022).

        Args:
            q: queries (B, H, Lq, D).
            k: keys (B, Hkv, Lk, D), H a multiple of Hkv, in the dtype of q.
            v: values (B, Hkv, Lk, Dv), in the dtype of q.
            scale: factor of the dot products, usually D ** -0.5.
            causal: query i attends to keys up to i + Lk - Lq (lower-right aligned).
            window: a query attends to the last `window` of those keys only; implies causal.
            mask: bool (true = attend) or additive, broadcast to (B, H, Lq, Lk); may be combined with causal and window.
            softcap: bound of the scores, applied before the mask.

        Returns:
            (B, H, Lq, Dv) in the dtype of q; fully masked rows are 0. It is differentiable in q, k and v.

        Raises:
            ValueError: shapes, dtypes or values are invalid or unsupported.
            KernelUnavailable: the kernel cannot run on this machine.
        """
        ...


def check_bounds(window: int | None, softcap: float | None) -> None:
    """Validate the keywords that every kernel has.

    Raises:
        ValueError: names the invalid keyword.
    """
    if window is not None and window < 1:
        raise ValueError(f"[flash_attention] window is at least 1; got {window}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"[flash_attention] softcap is positive and finite; got {softcap}.")
