"""Rotary positions: keys keep the rotation that they are stored with; queries are rotated to the right distances."""

from typing import TYPE_CHECKING, Final

import mlx.core as mx
import numpy as np
from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.numbers import is_number, shown_value

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_DIMS: Final = 65_536
MIN_FACTOR, MAX_FACTOR = 1e-30, 1e30
"""Bounds of base and scale, between which angles stay in float32's range."""


class Rope(Struct, frozen=True, eq=False):
    """Rotary position embedding (RoFormer, 2021) of the first `dims` values of a head, as in `mx.fast.rope`."""

    dims: int
    base: float = 10000.0
    traditional: bool = False
    """Whether pairs are adjacent values; otherwise value i is paired with value i + dims / 2."""
    scale: float = 1.0
    freqs: mx.array | None = None
    """(dims / 2,): positions per radian, instead of powers of `base`."""

    def __post_init__(self) -> None:
        """Raise UsageError unless the parts fit together."""
        if type(self.dims) is not int or not 2 <= self.dims <= MAX_DIMS or self.dims % 2:
            raise UsageError(f"rope: got dims {shown_value(self.dims)}; it takes an even number from 2 to {MAX_DIMS:,}")
        for name, value in (("base", self.base), ("scale", self.scale)):
            if not is_number(value) or not MIN_FACTOR <= value <= MAX_FACTOR:
                raise UsageError(
                    f"rope: got {name} {shown_value(value)}; it takes a number from {MIN_FACTOR:g} to {MAX_FACTOR:g}"
                )
            structs.force_setattr(self, name, float(value))
        if type(self.traditional) is not bool:
            raise UsageError(f"rope: got traditional {shown_value(self.traditional)}; it takes True or False")
        if self.freqs is not None and not isinstance(self.freqs, mx.array):
            raise UsageError(f"rope: got freqs of type {type(self.freqs).__name__}; it takes None or an mlx.core.array")
        if self.freqs is not None and tuple(self.freqs.shape) != (self.dims // 2,):
            raise UsageError(f"rope: got freqs of shape {tuple(self.freqs.shape)}; it takes ({self.dims // 2},)")

    def check_width(self, width: int) -> None:
        """Raise UsageError if heads are narrower than what is rotated."""
        if width < self.dims:
            raise UsageError(f"rope: got {self.dims} dims; heads of width {width} take at most {width}")

    def radians(self) -> mx.array:
        """Return the angle of one position, (dims / 2,) in float32."""
        if self.freqs is not None:
            return self.scale / self.freqs.astype(mx.float32)
        exponents = mx.arange(0, self.dims, 2, dtype=mx.float32) / self.dims
        return self.scale * mx.exp(-exponents * float(np.log(self.base)))

    def consecutive(self, x: mx.array, position: int) -> mx.array:
        """Rotate row t of (B, H, L, D) by `position` + t."""
        base = None if self.freqs is not None else self.base
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=base, scale=self.scale, offset=position, freqs=self.freqs
        )

    def turned(self, x: mx.array, by: "int | NDArray[np.int64]") -> mx.array:
        """Rotate all rows of (B, H, L, D) by a number of positions, or row t by `by[t]`."""
        if isinstance(by, int):
            if by == 0:
                return x
            batch, heads, rows, width = x.shape
            return self.consecutive(x.reshape(batch, heads * rows, 1, width), by).reshape(x.shape)
        if not by.any():
            return x
        angles = mx.array(by.astype(np.float32))[:, None] * self.radians()
        cos, sin = mx.cos(angles), mx.sin(angles)
        rotated, rest = x[..., : self.dims].astype(mx.float32), x[..., self.dims :]
        if self.traditional:
            low, high = rotated[..., ::2], rotated[..., 1::2]
        else:
            low, high = rotated[..., : self.dims // 2], rotated[..., self.dims // 2 :]
        pair = [low * cos - high * sin, low * sin + high * cos]
        made = mx.stack(pair, -1).reshape(rotated.shape) if self.traditional else mx.concatenate(pair, -1)
        return mx.concatenate([made.astype(x.dtype), rest], -1) if rest.shape[-1] else made.astype(x.dtype)
