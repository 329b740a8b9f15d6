"""Formats of quantized keys and values: those of `mx.quantize`, with a text such as "int4" or "int8:32+mxfp4"."""

from functools import lru_cache
from typing import Final, Literal

from msgspec import Struct

from attention.core.errors import UsageError
from attention.core.numbers import shown_value

Mode = Literal["affine", "mxfp8", "mxfp4", "nvfp4"]

AFFINE_BITS: Final = (8, 6, 5, 4, 3, 2)
AFFINE_GROUPS: Final = (32, 64, 128)
DEFAULT_GROUP: Final = 64
FIXED: Final[dict[str, tuple[int, int]]] = {"mxfp8": (8, 32), "mxfp4": (4, 32), "nvfp4": (4, 16)}
"""Bits and group size of the modes that have one choice of them."""
FORMAT_NAMES: Final = (*(f"int{bits}" for bits in AFFINE_BITS), *FIXED)
DENSE: Final = "none"
"""Text of keys and values that are not quantized."""
_ACCEPTED: Final = f"{', '.join(FORMAT_NAMES)}, int ones with a group size as in int4:32"


class Format(Struct, frozen=True):
    """How an array is quantized along its last axis, as `mx.quantize` does it.

    A group of `group_size` consecutive values shares a scale, and in mode affine a bias: value = scale * number + bias,
    number from 0 to 2^bits - 1. In the other modes a number is a small float: e4m3 in mxfp8, e2m1 in mxfp4 and nvfp4;
    the scale, one byte, is a power of two (e8m0) in the mx modes and e4m3 in nvfp4.
    Numbers are packed into 32-bit words, the first in the lowest bits.
    """

    mode: Mode
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Raise UsageError unless `mx.quantize` has the format."""
        if self.mode == "affine":
            for name, value, taken in (
                ("bits", self.bits, AFFINE_BITS),
                ("group_size", self.group_size, AFFINE_GROUPS),
            ):
                if type(value) is not int or value not in taken:
                    raise UsageError(f"{name}: got {shown_value(value)}; it takes {', '.join(map(str, taken))}")
        elif self.mode not in [*FIXED]:  # of any type
            raise UsageError(f"mode: got {shown_value(self.mode)}; it takes affine, {', '.join(FIXED)}")
        elif (self.bits, self.group_size) != FIXED[self.mode]:
            bits, group = FIXED[self.mode]
            raise UsageError(
                f"mode {self.mode}: got {shown_value(self.bits)} bits in groups of {shown_value(self.group_size)}; "
                f"it takes {bits} bits in groups of {group}"
            )

    @property
    def text(self) -> str:
        """The name, with the group size unless it is the default."""
        if self.mode != "affine":
            return self.mode
        return f"int{self.bits}" if self.group_size == DEFAULT_GROUP else f"int{self.bits}:{self.group_size}"

    @property
    def has_biases(self) -> bool:
        """Whether a group has a bias beside its scale."""
        return self.mode == "affine"

    def width_problem(self, width: int) -> str | None:
        """Return which widths arrays of the format have, if this is none of them, or else None."""
        if width % self.group_size == 0:
            return None
        others = [size for size in AFFINE_GROUPS if self.mode == "affine" and width % size == 0]
        more = f"; int{self.bits}:{others[-1]} takes {width}" if others else ""
        return f"{self.text} takes multiples of its group size, {self.group_size}{more}"

    def row_bytes(self, width: int, scale_bytes: int) -> int:
        """Return the bytes of a row of `width` values.

        Args:
            width: a multiple of the group size.
            scale_bytes: bytes of a scale and of a bias in mode affine: those of the dtype that was quantized.
        """
        per_group = 2 * scale_bytes if self.has_biases else 1
        return width * self.bits // 8 + width // self.group_size * per_group


class KVFormat(Struct, frozen=True):
    """Formats of keys and of values."""

    key: Format
    value: Format

    @property
    def text(self) -> str:
        """One name, or two joined by a plus: keys first."""
        return self.key.text if self.key == self.value else f"{self.key.text}+{self.value.text}"

    @property
    def shared_affine(self) -> Format | None:
        """The format, if keys and values share one of mode affine: mlx-lm's own attention reads no others."""
        return self.key if self.key == self.value and self.key.has_biases else None


def parse_format(text: str) -> Format:
    """Return the format with a name such as "int4", "int8:32" or "mxfp4".

    Raises:
        UsageError: there is no such format.
    """
    name, colon, group = text.partition(":")
    if name in FIXED and not colon:
        bits, size = FIXED[name]
        return Format(name, bits, size)  # type: ignore[arg-type]  # its keys are modes
    if name.startswith("int") and name in FORMAT_NAMES:
        size = DEFAULT_GROUP if not colon else int(group) if group.isascii() and group.isdecimal() else 0
        if size in AFFINE_GROUPS:
            return Format("affine", int(name.removeprefix("int")), size)
        raise UsageError(f"group size: got {group!r} in {text!r}; it takes {', '.join(map(str, AFFINE_GROUPS))}")
    raise UsageError(f"format: got {text!r}; it takes {_ACCEPTED}")


@lru_cache(maxsize=256)
def parse_kv_format(text: str) -> KVFormat | None:
    """Return the formats of keys and values: one for both, "int8+int4" for K in int8 and V in int4, "none" for neither.

    Raises:
        UsageError: there is no such format.
    """
    if text == DENSE:
        return None
    key, plus, value = text.partition("+")
    try:
        return KVFormat(parse_format(key), parse_format(value if plus else key))
    except UsageError as error:
        raise UsageError(
            *(
                f"{problem}; two are joined as in int8+int4, keys first; none leaves both unquantized"
                for problem in error.problems
            )
        ) from None
