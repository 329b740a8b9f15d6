"""Quantized keys and values, as `mx.quantize` makes them and as mlx-lm's quantized caches keep them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, cast

import mlx.core as mx
from msgspec import Struct

from attention.core.errors import UsageError
from attention.core.forking import check_not_forked
from attention.core.kv_format import DEFAULT_GROUP, DENSE, FIXED, Format, KVFormat, parse_format
from attention.core.numbers import shown_value
from attention.masks import dtype_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class QuantizedArray(Struct, frozen=True, eq=False):
    """An array (B, Hkv, Lk, D), quantized along D. Made by `quantized`.

    Its values are those of exact arithmetic on its parts; `mx.dequantize` rounds them to a dtype.
    """

    numbers: mx.array
    """(B, Hkv, Lk, D * bits / 32) in uint32."""
    scales: mx.array
    """(B, Hkv, Lk, D / group_size): a float dtype in mode affine, otherwise uint8."""
    biases: mx.array | None
    """As the scales, in mode affine; otherwise None."""
    format: Format
    dtype: mx.Dtype
    """Dtype of the array that was quantized: that of the scales in mode affine."""

    def __repr__(self) -> str:
        return _described(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.format.group_size)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.scales.ndim

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Index the axes before the last, as those of an array: `x[0]`, `x[:, :, 8:]`, and `x[...]` for another object.

        Raises:
            IndexError: the index reaches the last axis, along which values share scales.
        """
        items = index if isinstance(index, tuple) else (index,)
        if len([one for one in items if one is not None]) >= self.ndim or (len(items) > 1 and ... in items):
            raise IndexError("a quantized array is indexed along the axes before its last one")
        return self.with_arrays([part[index] for part in self.arrays])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.arrays)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Numbers and scales, and in mode affine biases."""
        return (self.numbers, self.scales) if self.biases is None else (self.numbers, self.scales, self.biases)

    def with_arrays(self, arrays: Sequence[mx.array]) -> "QuantizedArray":
        """Return an array of the same format with other parts, as a slice along the keys."""
        numbers, scales, *biases = arrays
        return QuantizedArray(numbers, scales, biases[0] if biases else None, self.format, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what deep copies and pickles are made of: the dtype's name, since MLX's dtypes cannot be pickled."""
        return _restored, (self.arrays, self.format, str(self.dtype).rpartition(".")[2])

    def constant_integers(self) -> "QuantizedArray":
        """Return the array with its integer parts, scales of one byte included, as constants with a gradient of 0.

        MLX's own gradients of them raise errors or are meaningless.
        """
        kept = (part if part.dtype in FLOATS else mx.stop_gradient(part) for part in self.arrays)
        return self.with_arrays(list(kept))

    def dequantized(self, dtype: mx.Dtype | None = None) -> mx.array:
        """Return the array in a dtype, by default its own; each value is computed in float32, and rounded once."""
        check_not_forked()
        form, fixed = self.format, self.constant_integers()
        scales, biases = fixed.scales, fixed.biases
        if biases is not None:  # otherwise MLX computes in the dtype of the scales, and rounds twice
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        made = mx.dequantize(fixed.numbers, scales, biases, form.group_size, form.bits, form.mode, dtype=mx.float32)
        return made.astype(dtype or self.dtype)

    def exact(self) -> "NDArray[np.float64]":
        """Return the values in float64, which represents them exactly but for the sum with a bias."""
        import numpy as np

        if self.biases is None:  # a product of two small floats
            return np.array(self.dequantized(mx.float32)).astype(np.float64)
        form = self.format
        ones = mx.ones(self.scales.shape)
        numbers = mx.dequantize(self.numbers, ones, mx.zeros_like(ones), form.group_size, form.bits)
        scales, biases = (
            np.repeat(np.array(part.astype(mx.float32)).astype(np.float64), form.group_size, axis=-1)
            for part in (self.scales, self.biases)
        )
        made: NDArray[np.float64] = np.array(numbers).astype(np.float64) * scales + biases
        return made

    def problems(self) -> list[str]:
        """Return what is wrong with the parts: their dtypes, and shapes that do not fit each other."""
        form, numbers, scales, biases = self.format, self.numbers, self.scales, self.biases
        found = []
        if numbers.dtype != mx.uint32 or numbers.ndim != 4:
            found.append(f"numbers: got {numbers.dtype} in {numbers.ndim} dimensions; it takes uint32 in 4")
        if scales.dtype not in (FLOATS if form.has_biases else (mx.uint8,)):
            accepted = "float32, float16, bfloat16" if form.has_biases else "uint8"
            found.append(f"scales: got {scales.dtype}; {form.text} takes {accepted}")
        if found:
            return found
        width = numbers.shape[-1] * 32 // form.bits
        shape = (*numbers.shape[:-1], width // form.group_size)
        if width * form.bits != numbers.shape[-1] * 32 or width % form.group_size or tuple(scales.shape) != shape:
            found.append(
                f"scales: got shape {tuple(scales.shape)}; {form.text} takes {shape} for numbers of shape "
                f"{tuple(numbers.shape)}"
            )
        elif form.has_biases != (biases is not None):
            got, takes = ("None", "those of mx.quantize") if biases is None else ("an array", "none")
            found.append(f"biases: got {got}; {form.text} takes {takes}")
        elif biases is not None and (biases.shape != scales.shape or biases.dtype != scales.dtype):
            found.append(
                f"biases: got {biases.dtype} of shape {tuple(biases.shape)}; it takes those of the scales, "
                f"{scales.dtype} of shape {tuple(scales.shape)}"
            )
        return found


class PackedParts(tuple[mx.array, ...]):
    """The arrays of `mx.quantize` for an array, with what mlx-lm's models read of keys and values beside attention.

    Attributes:
        format: how they are quantized.
        dtype: of the array: that of the scales, or what was said; not there if neither is known.
    """

    format: Format
    dtype: mx.Dtype

    @classmethod
    def of(cls, arrays: Sequence[mx.array], form: Format, dtype: mx.Dtype | None) -> Self:
        """Return the arrays with their format and the dtype of the array that was quantized."""
        made = cls(arrays)
        made.format = form
        known = made[1].dtype if form.has_biases else dtype
        if known is not None:
            made.dtype = known
        return made

    def __repr__(self) -> str:
        return _described(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self[1].shape[:-1], self[1].shape[-1] * self.format.group_size)


def _described(x: QuantizedArray | PackedParts) -> str:
    return f"QuantizedArray({x.shape}, {x.format.text}, {dtype_name(x.dtype)})"


def _restored(arrays: Sequence[mx.array], form: Format, dtype: str) -> QuantizedArray:
    numbers, scales, *biases = arrays
    return QuantizedArray(numbers, scales, biases[0] if biases else None, form, getattr(mx, dtype))


KeyOrValue = mx.array | QuantizedArray


def arrays_of(*given: KeyOrValue | None) -> list[mx.array]:
    """Return dense arrays and the parts of quantized ones in one list; None is left out."""
    return [part for x in given if x is not None for part in (x.arrays if isinstance(x, QuantizedArray) else (x,))]


def kv_format_of(k: KeyOrValue, v: KeyOrValue) -> str:
    """Return the format of keys and values as the text of a workload: "int8+int4", or "none" if they are dense."""
    if isinstance(k, mx.array) or isinstance(v, mx.array):
        return DENSE
    return _text(k.format, v.format)


@lru_cache(maxsize=256)
def _text(key: Format, value: Format) -> str:
    return KVFormat(key, value).text


def quantized(
    x: "mx.array | Sequence[mx.array] | QuantizedArray",
    format: str | Format | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: mx.Dtype | None = None,
) -> QuantizedArray:
    """Return keys or values that `attention` reads without dequantizing them in memory.

    Args:
        x: an array (B, Hkv, Lk, D), which is quantized; or what `mx.quantize` returned for one, as the caches of mlx-lm
            keep it: (numbers, scales, biases), or (numbers, scales) in the modes without biases.
        format: "int8", "int6", "int5", "int4", "int3", "int2", with groups of 64 values, or with a group size as in
            "int4:32"; "mxfp8", "mxfp4", "nvfp4". Instead of it:
        bits: as in `mx.quantize`; 4 by default in mode affine.
        group_size: as in `mx.quantize`; 64 by default in mode affine.
        mode: as in `mx.quantize`: "affine", "mxfp8", "mxfp4" or "nvfp4".
        dtype: of the array that was quantized, if x is a pair without biases; bfloat16 by default.

    Raises:
        UsageError: no such format, a width that the group size does not divide, or parts of other shapes or dtypes.
        ForkedError: attention was computed before this process was forked.
    """
    if isinstance(x, QuantizedArray):
        return x
    form = _format(format, bits, group_size, mode)
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"dtype: got {shown_value(dtype)}; it takes float32, float16 or bfloat16, or None")
    if isinstance(x, mx.array):
        check_not_forked()
        return _quantize(x, form)
    return _wrap(x, form, dtype)


def _format(given: str | Format | None, bits: int | None, group_size: int | None, mode: str) -> Format:
    if given is not None:
        if bits is not None or group_size is not None or mode != "affine":
            raise UsageError("format: got it together with bits, group_size or mode; it takes the place of all three")
        if not isinstance(given, str | Format):
            raise UsageError(f"format: got {shown_value(given)}; it takes None or a name, as 'int8' or 'int4:32'")
        return parse_format(given) if isinstance(given, str) else given
    fixed = FIXED.get(mode, (4, DEFAULT_GROUP)) if isinstance(mode, str) else (0, 0)
    return Format(
        mode,  # type: ignore[arg-type]  # checked by Format
        fixed[0] if bits is None else bits,
        fixed[1] if group_size is None else group_size,
    )


def _quantize(x: mx.array, form: Format) -> QuantizedArray:
    if x.ndim != 4 or 0 in x.shape or x.dtype not in FLOATS:
        raise UsageError(
            f"x: got {x.dtype} of shape {tuple(x.shape)}; it takes float32, float16 or bfloat16 of shape "
            "(batch, heads, length, width), none of them 0"
        )
    if problem := form.width_problem(x.shape[-1]):
        raise UsageError(f"x: got width {x.shape[-1]}; {problem}")
    numbers, scales, *biases = mx.quantize(x, form.group_size, form.bits, form.mode)
    return QuantizedArray(numbers, scales, biases[0] if biases else None, form, x.dtype)


def _wrap(parts: Sequence[mx.array], form: Format, dtype: mx.Dtype | None) -> QuantizedArray:
    wanted = ("numbers", "scales", "biases") if form.has_biases else ("numbers", "scales")
    given = list(parts) if isinstance(parts, tuple | list) else None
    if given is None or len(given) != len(wanted) or not all(isinstance(part, mx.array) for part in given):
        got = type(parts).__name__ if given is None else f"{len(given)} {'part' if len(given) == 1 else 'parts'}"
        raise UsageError(
            f"x: got {got}; {form.text} takes an array, or the arrays ({', '.join(wanted)}) of mx.quantize"
        )
    numbers, scales = given[:2]
    biases = given[2] if form.has_biases else None
    own = scales.dtype if form.has_biases else dtype or mx.bfloat16
    made = QuantizedArray(numbers, scales, biases, form, cast("mx.Dtype", own))
    if problems := made.problems():
        raise UsageError(*problems)
    return made
