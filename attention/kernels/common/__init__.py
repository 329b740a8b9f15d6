"""What the kernels of all backends share: the cache folder, the first-use check, the fingerprint of the code."""

import math


def check_bounds(window: int | None, softcap: float | None) -> None:
    """Validate the keywords that every kernel has.

    Raises:
        ValueError: names the invalid keyword.
    """
    if window is not None and window < 1:
        raise ValueError(f"[flash_attention] window is at least 1; got {window}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"[flash_attention] softcap is positive and finite; got {softcap}.")
