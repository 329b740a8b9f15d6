"""Formats of a call's keys and values as the kernels see them: dtypes of the scales, alignment of rows, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from attention.core.kv_format import Format, KVFormat, parse_kv_format
from attention.kernels.cuda.runtime.call import MaskKind, check_slopes, mask_kind, refusal

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.quantized_kv import QuantizedArray

SCALE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
NO_GRADIENT: Final = "the CUDA kernels have no gradients with quantized keys and values"


@dataclass(frozen=True)
class PackedKV:
    """Formats of keys and values, and names of the dtypes of their scales."""

    format: KVFormat
    key_scale: str
    value_scale: str

    @staticmethod
    def of(k: QuantizedArray, v: QuantizedArray) -> PackedKV:
        """Return the formats of keys and values."""
        return PackedKV(KVFormat(k.format, v.format), _name(k.scales.dtype), _name(v.scales.dtype))

    @property
    def texts(self) -> tuple[str, str, str]:
        """The formats as a label of a plan has them; arguments of `of_texts`."""
        return self.format.text, self.key_scale, self.value_scale

    @staticmethod
    def of_texts(formats: str, key_scale: str, value_scale: str) -> PackedKV:
        """Return the formats with a text as in `Workload.kv_format`."""
        return PackedKV(_parsed(formats), key_scale, value_scale)

    @staticmethod
    def of_text(text: str, dtype: str) -> PackedKV:
        """Return the formats with a text as in `Workload.kv_format`, quantized from a dtype."""
        found = _parsed(text)
        scales = [dtype if form.has_biases else "uint8" for form in (found.key, found.value)]
        return PackedKV(found, *scales)

    @property
    def parts(self) -> tuple[tuple[Format, str], tuple[Format, str]]:
        """Format and dtype of the scales, of keys and of values."""
        return (self.format.key, self.key_scale), (self.format.value, self.value_scale)

    @property
    def missing(self) -> frozenset[str]:
        """Inputs of the kernels that a format lacks."""
        without = {"k_biases": self.format.key, "v_biases": self.format.value}
        return frozenset(name for name, form in without.items() if not form.has_biases)

    def alignments(self, head_dim: int, value_dim: int = 0) -> dict[str, int]:
        """Return the bytes to which the rows of each input are aligned; `value_dim` 0 means head_dim.

        Kernels load numbers by the 16, and at most a row of scales at a time.
        """
        widths = {"k": head_dim, "v": value_dim or head_dim}
        forms = dict(zip(widths, self.parts, strict=True))
        found = {name: _alignment(form) for name, (form, _) in forms.items()}
        for name, (form, scale) in forms.items():
            found[f"{name}_scales"] = found[f"{name}_biases"] = _scale_alignment(form, scale, widths[name])
        return found


def _parsed(text: str) -> KVFormat:
    found = parse_kv_format(text)
    if found is None:
        raise ValueError(f"format: got {text!r}; quantized keys and values have another one")
    return found


def check_packed(
    q: mx.array, k: QuantizedArray, v: QuantizedArray, mask: mx.array | None = None, slopes: mx.array | None = None
) -> tuple[str, MaskKind | None]:
    """Validate the arrays of a call; return the names of the dtypes of the queries and of the mask.

    Raises:
        ValueError: shapes or dtypes are inconsistent or unsupported.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(q_shape) != 4:
        raise ValueError(f"[flash_attention] q has 4 axes; got {len(q_shape)}.")
    fits = q_shape[0] == k_shape[0] and q_shape[3] == k_shape[3] and v_shape[:3] == k_shape[:3]
    if not fits or not k_shape[1] or q_shape[1] % k_shape[1] or 0 in q_shape or 0 in v_shape:
        raise ValueError(f"[flash_attention] shapes do not fit: q {q_shape}, k {k_shape}, v {v_shape}.")
    reason = refusal(_name(q.dtype), k_shape[3], v_shape[3])
    if reason:
        raise ValueError(f"[flash_attention] {reason}.")
    check_slopes(slopes, q_shape[1])
    return _name(q.dtype), None if mask is None else mask_kind(mask, (*q_shape[:3], k_shape[2]))


def _alignment(form: Format) -> int:
    """Return the largest power of two that divides the bytes of 16 numbers, from the 4 of a word to 16."""
    row = 2 * form.bits
    return max(4, min(16, row & -row))


def _scale_alignment(form: Format, scale: str, head_dim: int) -> int:
    """Return the largest power of two that divides the bytes of a row of scales, at most 16."""
    row = head_dim // form.group_size * SCALE_BYTES[scale]
    return min(16, row & -row)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
