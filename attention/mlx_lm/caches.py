"""Quantized KV caches for mlx-lm's models: plain, rotating and in batches, in every format of `mx.quantize`.

`mx.quantize` makes two or three arrays of one: numbers, scales and, in mode affine, biases. All have a row for each
token, so one cache of mlx-lm holds the numbers of keys and values, another one the scales, a third one the biases:

    PackedKVCache          parts[0]               parts[1]               parts[2]
      keys                 numbers (B,H,L,·)      scales (B,H,L,·)       biases (B,H,L,·)
      values               numbers (B,H,L,·)      scales (B,H,L,·)       biases (B,H,L,·)

Where a row goes, what rotates, is padded, trimmed, merged or masked is decided by mlx-lm's own code, the same for all
of them; only rows that it would write in place go there in one operation for all parts (`_row_in_place`). A chunk of a
prompt is quantized when it arrives; no other keys and values are kept.
"""

import copy
from collections.abc import Sequence
from typing import Any, Final, Self

import mlx.core as mx
from mlx_lm.models import cache as mlx_caches

from attention.core.errors import UsageError
from attention.core.kv_format import DEFAULT_GROUP, DENSE, Format, KVFormat, parse_kv_format
from attention.kernels.append import append_quantized, quantize
from attention.quantized_kv import PackedParts, quantized

LAYOUTS: Final = {
    layout.__name__: layout
    for layout in (
        mlx_caches.KVCache,
        mlx_caches.RotatingKVCache,
        mlx_caches.BatchKVCache,
        mlx_caches.BatchRotatingKVCache,
        mlx_caches.ConcatenateKVCache,
        mlx_caches.ChunkedKVCache,
    )
}
"""The classes of mlx-lm that cache one array of keys and one of values, by the name that a file has."""
KEPT: Final = 4
"""Number of first tokens that the rotating caches of mlx-lm's `make_prompt_cache` keep."""
COMPUTE_WITH_KEYS: Final = ("phi3small", "plamo", "stablelm")
"""Models of mlx-lm that do more with cached keys and values than handing them to attention."""
NOT_READ_BY_MLX_LM: Final = (
    "cache: mlx-lm's own attention cannot read {format}; it takes one int format for keys and values, "
    "or a model run inside attention.patch_mlx_lm(...)"
)


class PackedKVCache:
    """A cache of quantized keys and values for one layer of a model; `to_quantized` and `make_prompt_cache` make it.

    It has the methods of the mlx-lm cache whose layout it has. What `update_and_fetch` returns, tuples of the arrays
    of `mx.quantize`, is read by implementations of attention while `patch_mlx_lm` is open. Otherwise mlx-lm's own
    attention reads it if keys and values have one format of mode affine, and the model has no sinks.

    Attributes:
        kv_format: formats of keys and values.
        parts: caches of mlx-lm for numbers, scales and, if a format has them, biases.
    """

    def __init__(self, layout: Any, kv_format: KVFormat) -> None:
        """Create it from an mlx-lm cache; keys and values that this one holds are quantized.

        Raises:
            UsageError: the group size of a format does not divide the width.
        """
        self.kv_format = kv_format
        held = None if layout.keys is None else self._quantize(layout.keys, layout.values)
        bare = copy.copy(layout)
        bare.keys = bare.values = None
        self.parts = [copy.deepcopy(bare) for _ in range(self._count)]
        for part, pair in zip(self.parts, held or (), strict=held is not None):
            part.keys, part.values = pair

    @property
    def _count(self) -> int:
        return 3 if self.kv_format.key.has_biases or self.kv_format.value.has_biases else 2

    def _quantize(self, keys: mx.array, values: mx.array) -> list[tuple[mx.array, mx.array]]:
        """Return the arrays of keys and of values for each of `parts`."""
        formats = self.kv_format.key, self.kv_format.value
        for name, array, form in zip(("keys", "values"), (keys, values), formats, strict=True):
            if problem := form.width_problem(array.shape[-1]):
                raise UsageError(f"{name}: got heads of width {array.shape[-1]}; {problem}")
        made = [quantize(array, form) for array, form in zip((keys, values), formats, strict=True)]
        # A format without biases beside one that has them gets biases of width 0.
        k, v = ([*one, one[1][..., :0]][: self._count] for one in made)
        return [*zip(k, v, strict=True)]

    def _join(
        self, fetched: Sequence[tuple[mx.array, mx.array]], dtype: mx.Dtype | None = None
    ) -> tuple[PackedParts, PackedParts]:
        """Return keys and values as `mx.quantize` returns them; `dtype` is what they had, if it is known."""
        k, v = zip(*fetched, strict=True)
        return self._packed(k[: 2 + self.kv_format.key.has_biases], v[: 2 + self.kv_format.value.has_biases], dtype)

    def _packed(
        self, keys: Sequence[mx.array], values: Sequence[mx.array], dtype: mx.Dtype | None
    ) -> tuple[PackedParts, PackedParts]:
        return PackedParts.of(keys, self.kv_format.key, dtype), PackedParts.of(values, self.kv_format.value, dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PackedParts, PackedParts]:
        """Quantize and store keys and values (B, Hkv, L, D); return all that are attended to, quantized.

        Raises:
            UsageError: the group size of a format does not divide the width.
        """
        row = _row_in_place(self.parts[0], keys.shape[2])
        if row is not None:
            return self._append(keys, values, row)
        arrays = self._quantize(keys, values)
        fetched = [part.update_and_fetch(*pair) for part, pair in zip(self.parts, arrays, strict=True)]
        return self._join(fetched, values.dtype)

    def _append(self, keys: mx.array, values: mx.array, row: int) -> tuple[PackedParts, PackedParts]:
        """Store rows where `_row_in_place` says, and return what `update_and_fetch` does, in fewer operations."""
        count, first = keys.shape[2], self.parts[0]
        offset = first.offset + count  # in a batch one array for all parts
        for part in self.parts:
            part.offset = offset
            if not isinstance(part, mlx_caches.KVCache):
                part._idx = row + count
        written = offset if isinstance(offset, int) else first._idx
        used = min(written, first.keys.shape[2])
        held = self._join([(part.keys, part.values) for part in self.parts])
        stored, views = append_quantized(held, keys, values, self.kv_format, row=row, used=used)
        self.keys, self.values = stored
        return self._packed(*views, values.dtype)

    def keys_and_values(self) -> tuple[PackedParts, PackedParts]:
        """Return all keys and values that are attended to, quantized."""
        return self._join([part.keys_and_values() for part in self.parts])

    @property
    def bits(self) -> int:
        """Bits of a number; mlx-lm's own attention recognises a quantized cache by them.

        Raises:
            UsageError: that attention would misread the cache: it knows one pair of bits and group size.
        """
        return self._format_for_mlx_lm().bits

    @property
    def group_size(self) -> int:
        """Group size; errors as those of `bits`."""
        return self._format_for_mlx_lm().group_size

    def _format_for_mlx_lm(self) -> Format:
        form = self.kv_format.shared_affine
        if form is None:
            raise UsageError(NOT_READ_BY_MLX_LM.format(format=self.kv_format.text))
        return form

    @property
    def keys(self) -> tuple[mx.array, ...] | None:
        """The arrays of the keys with unused rows; None while the cache is empty."""
        return None if self.empty() else self._join([(part.keys, part.values) for part in self.parts])[0]

    @keys.setter
    def keys(self, arrays: Sequence[mx.array]) -> None:
        for part, array in zip(self.parts, arrays, strict=False):
            part.keys = array

    @property
    def values(self) -> tuple[mx.array, ...] | None:
        """The arrays of the values with unused rows; None while the cache is empty."""
        return None if self.empty() else self._join([(part.keys, part.values) for part in self.parts])[1]

    @values.setter
    def values(self, arrays: Sequence[mx.array]) -> None:
        for part, array in zip(self.parts, arrays, strict=False):
            part.values = array

    @property
    def state(self) -> Any:
        """What a file holds: the states of `parts`, the name of their class, the formats."""
        return [part.state for part in self.parts], self.layout, self.kv_format.text

    @state.setter
    def state(self, state: Any) -> None:
        try:
            states, layout, text = state
            self.kv_format = _parse(text)
            self.parts = [_load_part(layout, one) for one in states]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError("prompt cache: its state is not one of a PackedKVCache; the file is damaged") from error
        self._check()

    @classmethod
    def from_state(cls, state: Any) -> Self:
        """Return a cache with a state, as mlx-lm's `load_prompt_cache` makes it.

        Raises:
            UsageError: the state's arrays do not fit together.
        """
        made = cls.__new__(cls)
        made.state = state
        return made

    def _check(self) -> None:
        """Raise UsageError unless the arrays of all parts fit together and with the formats."""
        damaged = "prompt cache: {}; the file is damaged, or its format was changed after it was saved"
        empty = {part.keys is None for part in self.parts}
        if len(self.parts) != self._count or len(empty) != 1:
            raise UsageError(
                damaged.format(f"got {len(self.parts)} of {self._count} arrays, or some of them are empty")
            )
        if empty == {True}:
            return
        try:
            k, v = quantized(self.keys or (), self.kv_format.key), quantized(self.values or (), self.kv_format.value)
        except UsageError as error:
            raise UsageError(damaged.format(error.problems[0])) from error
        if k.shape[:3] != v.shape[:3]:
            raise UsageError(damaged.format(f"got keys of shape {k.shape} and values of shape {v.shape}"))
        positions = {repr([*_position(part).items()]) for part in self.parts}
        first = self.parts[0]
        end = first._idx if hasattr(first, "_idx") else first.offset - getattr(first, "start_position", 0)
        if len(positions) != 1 or type(end) is not int or not 0 <= end <= k.shape[2]:
            raise UsageError(damaged.format(f"got {end} tokens in {k.shape[2]} rows"))

    @property
    def layout(self) -> str:
        """Name of the class of `parts`."""
        return type(self.parts[0]).__name__

    @property
    def offset(self) -> Any:
        """Number of tokens seen: an int, or in a batch an array of them."""
        return self.parts[0].offset

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, unused rows included."""
        return sum(part.nbytes for part in self.parts)

    def size(self) -> int:
        """Return the number of tokens that are attended to."""
        return int(self.parts[0].size())

    def empty(self) -> bool:
        """Return whether nothing was stored yet."""
        return bool(self.parts[0].empty())

    def make_mask(self, *args: Any, **named: Any) -> Any:
        """Return the mask of a call, as the mlx-lm cache with this layout makes it."""
        return self.parts[0].make_mask(*args, **named)

    def is_trimmable(self) -> bool:
        """Return whether tokens can be removed from the end."""
        return bool(self.parts[0].is_trimmable())

    def trim(self, n: int) -> int:
        """Remove up to n tokens from the end; return how many were removed."""
        (removed,) = {part.trim(n) for part in self.parts}
        return int(removed)

    @property
    def start_position(self) -> int:
        """Position of the first token that is kept, in a chunked layout."""
        return int(self.parts[0].start_position)

    def maybe_trim_front(self) -> None:
        """Drop tokens before the current chunk, in a chunked layout."""
        for part in self.parts:
            part.maybe_trim_front()

    def prepare(self, **named: Any) -> None:
        """Announce the padding of a batch's next tokens."""
        for part in self.parts:
            part.prepare(**named)

    def finalize(self) -> None:
        """Move a batch's padding from the right to the left."""
        for part in self.parts:
            part.finalize()

    def filter(self, batch_indices: Any) -> None:
        """Keep these sequences of a batch."""
        for part in self.parts:
            part.filter(batch_indices)

    def extend(self, other: "PackedKVCache") -> None:
        """Append the sequences of another batch.

        Raises:
            UsageError: it has other formats.
        """
        self._check_same([self, other])
        for part, further in zip(self.parts, other.parts, strict=True):
            types = _types((part, further))
            part.extend(further)  # of an empty cache mlx-lm makes both arrays in the type of keys
            _set_types(part, types)

    def extract(self, idx: int) -> "PackedKVCache":
        """Return the cache of one sequence of a batch."""
        return _of_parts([part.extract(idx) for part in self.parts], self.kv_format)

    @classmethod
    def merge(cls, caches: "Sequence[PackedKVCache]") -> "PackedKVCache":
        """Return one cache for a batch of sequences.

        Raises:
            UsageError: the caches have different formats or layouts.
        """
        cls._check_same(caches)
        first = caches[0]
        if not hasattr(first.parts[0], "merge"):
            raise UsageError(f"caches: got {first.layout}; mlx-lm has no batches of them")
        merged = [_merged([one.parts[i] for one in caches]) for i in range(len(first.parts))]
        return _of_parts(merged, first.kv_format)

    @staticmethod
    def _check_same(caches: Sequence[Any]) -> None:
        texts = [
            f"{one.kv_format.text} in a {one.layout}" if isinstance(one, PackedKVCache) else type(one).__name__
            for one in caches
        ]
        if len({*texts}) != 1:
            raise UsageError(f"caches: got {', '.join(dict.fromkeys(texts))}; a batch takes caches of one kind")


def _types(parts: Sequence[Any]) -> tuple[mx.Dtype, mx.Dtype] | None:
    """Return the dtypes of keys and of values of mlx-lm caches; None if all are empty."""
    return next(((part.keys.dtype, part.values.dtype) for part in parts if part.keys is not None), None)


def _set_types(part: Any, types: tuple[mx.Dtype, mx.Dtype] | None) -> Any:
    """Convert what an mlx-lm cache holds, if it holds something; return the cache."""
    if types is not None and part.keys is not None:
        part.keys, part.values = part.keys.astype(types[0]), part.values.astype(types[1])
    return part


def _merged(parts: Sequence[Any]) -> Any:
    """Return mlx-lm's batch of some caches, which it makes in one dtype, that of keys.

    Scales of float formats are bytes, and those of the others floats, which hold any byte.
    """
    types = _types(parts)
    if types is not None and types[0] != types[1]:
        wide = types[1] if types[0] == mx.uint8 else types[0]
        parts = [_set_types(copy.copy(part), (wide, wide)) for part in parts]
    return _set_types(type(parts[0]).merge(parts), types)


def _row_in_place(part: Any, count: int) -> int | None:
    """Return the row from which on an mlx-lm cache writes `count` tokens; None if it allocates or moves rows first."""
    if part.keys is None:
        return None
    capacity = part.keys.shape[2]
    if type(part) in (mlx_caches.KVCache, mlx_caches.BatchKVCache):
        row = int(part.offset if type(part) is mlx_caches.KVCache else part._idx)
        return row if row + count <= capacity else None
    if type(part) is mlx_caches.RotatingKVCache and count == 1:
        is_whole = part.offset < capacity or capacity == part.max_size
        row = int(part.keep if part._idx == part.max_size else part._idx)
        return row if is_whole and capacity <= part.max_size else None
    return None


def _load_part(layout: str, state: Any) -> Any:
    make: Any = LAYOUTS[layout].from_state
    part = make(state)
    for name in ("_lengths", "_right_padding"):  # of batches between prepare and finalize: no state has them
        vars(part).setdefault(name, None)
    return part


def _position(part: Any) -> dict[str, Any]:
    """Return what an mlx-lm cache holds beside keys and values, arrays as lists."""
    held = {name: value for name, value in vars(part).items() if name not in ("keys", "values")}
    return {name: value.tolist() if isinstance(value, mx.array) else value for name, value in held.items()}


class QuantizedKVCache(PackedKVCache):
    """A plain cache with one format of mode affine: its files are those of mlx-lm's class of the same name.

    mlx-lm loads them as its own `QuantizedKVCache`; `to_quantized` makes one of these of it.
    """

    @property
    def state(self) -> Any:
        """The state of mlx-lm's class."""
        return self.keys, self.values, self.offset, self.group_size, self.bits

    @state.setter
    def state(self, state: Any) -> None:
        keys, values, offset, group_size, bits = state
        form = Format("affine", bits, group_size)
        states = [(None, None, offset)] * 3
        if keys is not None:
            states = [(k, v, offset) for k, v in zip(keys, values, strict=True)]
        own = PackedKVCache.from_state((states, "KVCache", form.text))
        self.kv_format, self.parts = own.kv_format, own.parts


def _of_parts(parts: list[Any], kv_format: KVFormat) -> PackedKVCache:
    plain = type(parts[0]) is mlx_caches.KVCache and kv_format.shared_affine is not None
    kind = QuantizedKVCache if plain else PackedKVCache
    made = kind.__new__(kind)
    made.parts, made.kv_format = parts, kv_format
    return made


def _parse(text: str) -> KVFormat:
    formats = parse_kv_format(text)
    if formats is None:
        raise UsageError(f"kv_format: got {DENSE!r}; it takes the name of a format, such as int4")
    return formats


def to_quantized(cache: Any, kv_format: str | KVFormat = "int4") -> Any:
    """Return a cache with the content and layout of an mlx-lm cache, its keys and values quantized.

    Args:
        cache: of mlx-lm, dense or quantized in the same format already; a `CacheList` of such caches; or an
            `ArraysCache`, which holds no keys and values and is returned itself. It is not changed.
        kv_format: as in `attention.core.kv_format`: "int4", "int8:32", "mxfp4", or "int8+int4", keys first.

    Raises:
        UsageError: no such format, or a cache of another kind or format.
    """
    formats = _parse(kv_format) if isinstance(kv_format, str) else kv_format
    if type(cache) is mlx_caches.CacheList:
        return type(cache)(*(to_quantized(one, formats) for one in cache.caches))
    if type(cache) is mlx_caches.ArraysCache:
        return cache
    if type(cache) is mlx_caches.QuantizedKVCache:
        keys, values, *rest = cache.state
        # Copies: both caches write into their arrays in place.
        own = (None if arrays is None else [mx.array(one) for one in arrays] for arrays in (keys, values))
        cache = QuantizedKVCache.from_state((*own, *rest))
    if isinstance(cache, PackedKVCache):
        if cache.kv_format != formats:
            raise UsageError(
                f"cache: got one in {cache.kv_format.text}; only a dense one can be quantized to {formats.text}"
            )
        return cache
    if LAYOUTS.get(type(cache).__name__) is not type(cache):
        raise UsageError(f"cache: got {type(cache).__name__}; it takes {', '.join(LAYOUTS)}")
    return _of_parts(PackedKVCache(cache, formats).parts, formats)


def check_keys_are_for_attention(model: Any) -> None:
    """Raise UsageError if a model computes with the cached keys before attention, or attends by itself."""
    kind = getattr(model, "model_type", None)
    if kind in COMPUTE_WITH_KEYS or (kind == "gear" and model.args.attn_logit_softcapping):
        raise UsageError(f"model: {kind} computes with cached keys outside attention; it takes mlx-lm's dense caches")


def caches_latents(model: Any) -> bool:
    """Return whether a model, or the language model in it, has multi-head latent attention (DeepSeek's)."""
    return any(hasattr(module, "kv_lora_rank") for _, module in model.named_modules())


def make_prompt_cache(model: Any, max_kv_size: int | None = None, kv_format: str = "int4") -> list[Any]:
    """Return mlx-lm's `make_prompt_cache(model, max_kv_size)` with quantized keys and values.

    Args:
        model: of mlx-lm.
        max_kv_size: tokens kept in rotating caches, for a model that does not make its own caches.
        kv_format: as in `to_quantized`; "none" gives mlx-lm's own caches.

    Raises:
        UsageError: no such format; max_kv_size is not a whole number above `KEPT`; or the model keeps something else
            than keys and values.
    """
    formats = parse_kv_format(kv_format)
    if max_kv_size is not None and (type(max_kv_size) is not int or max_kv_size <= KEPT):
        raise UsageError(
            f"max_kv_size: got {max_kv_size!r}; it takes a whole number from {KEPT + 1}, since the first {KEPT} tokens "
            "are kept, or None"
        )
    made: list[Any] = mlx_caches.make_prompt_cache(model, max_kv_size)
    if formats is None:
        return made
    if caches_latents(model):
        kind = getattr(model, "model_type", type(model).__name__)
        raise UsageError(f"model: {kind} caches latent vectors instead of keys and values; it takes kv_format none")
    check_keys_are_for_attention(model)
    return quantize_prompt_cache(made, formats)


def quantize_prompt_cache(caches: Sequence[Any], kv_format: str | KVFormat = "int4") -> list[Any]:
    """Return `to_quantized` of each cache.

    Raises:
        UsageError: no such format, a cache that cannot be quantized, or none that holds keys and values.
    """
    made = [to_quantized(cache, kv_format) for cache in caches]
    if all(type(one) is mlx_caches.ArraysCache for one in made):
        raise UsageError("caches: got none that holds keys and values")
    return made


def quantize_rotating(cache: Any, group_size: int = DEFAULT_GROUP, bits: int = 4) -> PackedKVCache:
    """Return `to_quantized` of a rotating cache, with the arguments of mlx-lm's method.

    `mlx_lm.generate` calls that method if it is given `kv_bits`, and `max_kv_size` or a model with a sliding window.
    """
    form = Format("affine", bits, group_size)
    made: PackedKVCache = to_quantized(cache, KVFormat(form, form))
    return made


setattr(mlx_caches, PackedKVCache.__name__, PackedKVCache)  # where load_prompt_cache looks up a file's classes
