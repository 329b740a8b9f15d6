"""Launching the kernels through mx.fast.metal_kernel, which compiles their sources on first use."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import mlx.core as mx

from attention.kernels.metal.call import CallParams, CallShape, Specialisation, specialisation
from attention.kernels.metal.lists import MIN_DEVICE_ELEMENTS, ListArrays
from attention.kernels.metal.tiles import LIST_KEYS, LIST_QUERIES, SIMD, Kind
from attention.quantized_kv import KeyOrValue, QuantizedArray

FOLDER: Final = Path(__file__).parent
PARTS: Final = ("key_scales", "key_biases", "value_scales", "value_biases")
POSITIONS: Final = ("mask", "slopes", "lists", "entries", "bits")
SCALARS: Final = ("scale", "softcap", "window")
INPUTS: Final = {
    "forward": ("q", "k", "v", *POSITIONS, "sinks", *SCALARS, "division"),
    "forward_quantized": ("q", "k", "v", *PARTS, *POSITIONS, "sinks", *SCALARS, "division"),
    "backward_query": ("q", "k", "v", "o", "lse", "rest", "d_o", "d_lse", *POSITIONS, *SCALARS),
    "backward_key": ("q", "k", "v", "lse", "rest", "delta", "d_o", *POSITIONS, *SCALARS),
    "join": ("parts", "lses", "rests"),
}
"""Names of the arrays of each kernel. With those that MLX adds for shapes and strides, they are at most Metal's 31."""
SOURCES: Final = {"forward_quantized": ("forward", "quantized")}
"""Body and end of the header of kernels whose source is not just common.metal and a body of their own name."""
OUTPUTS: Final = {
    "forward": ("o", "lse", "rest"),
    "forward_quantized": ("o", "lse", "rest"),
    "backward_query": ("d_q", "delta"),
    "backward_key": ("d_k", "d_v"),
    "join": ("o", "lse", "rest"),
}
MODES: Final = ("affine", "mxfp8", "mxfp4", "nvfp4")
"""As in quantized.metal."""
SPLIT_KEYS: Final = 256
"""Minimum number of keys per split. Chosen, not measured, like `MAX_SPLITS` and `TARGET_THREADGROUPS`."""
MAX_SPLITS: Final = 32
TARGET_THREADGROUPS: Final = 256
"""Number of threadgroups above which the keys of a call with few queries are not split further."""

Kernel = Callable[..., list[mx.array]]
Forward = tuple[mx.array, mx.array, mx.array]
"""Output, logsumexp, and its float32 rounding residual: both together are exact even with a mask of -1e9."""


class Arrays(NamedTuple):
    """The arrays of a call; those that it lacks are placeholders."""

    q: mx.array
    k: mx.array
    v: mx.array
    mask: mx.array
    sinks: mx.array
    slopes: mx.array
    """Of alibi, (H,)."""
    lists: mx.array
    """This and the following: `ListArrays`."""
    entries: mx.array
    bits: mx.array
    key_lists: mx.array
    key_entries: mx.array
    key_scales: mx.array
    """This and the following: of quantized keys and values, whose numbers are k and v."""
    key_biases: mx.array
    value_scales: mx.array
    value_biases: mx.array


metal_kernel: Callable[..., Kernel] = cast("Callable[..., Kernel]", mx.fast.metal_kernel)
"""Creates a kernel from a source; the only access to Metal."""


def source(text: str) -> str:
    """Return the source of a kernel's body."""
    return (FOLDER / f"{text}.metal").read_text(encoding="ascii")


@functools.cache
def _kernel(text: str) -> Kernel:
    """Create a kernel from a source; MLX compiles it for each combination of input dtypes and constants."""
    body, *more = SOURCES.get(text, (text,))
    return metal_kernel(
        name=f"fatui_{text}",
        input_names=list(INPUTS[text]),
        output_names=list(OUTPUTS[text]),
        source=source(body),
        header="\n".join(map(source, ("common", *more))),
        ensure_row_contiguous=False,
    )


def queue(text: str, inputs: Sequence[mx.array], **call: Any) -> list[mx.array]:
    """Queue a kernel and return its outputs; an error of Metal is raised when they are evaluated."""
    return _kernel(text)(inputs=list(inputs), **call)


@functools.lru_cache(maxsize=1024)
def scalars(call: CallParams) -> tuple[mx.array, ...]:
    """Return the scalars of a call as arrays without axes."""
    floats = [mx.array(x, mx.float32) for x in (call.scale, call.softcap or 0.0)]
    made = (*floats, mx.array(call.window or 0, mx.int32))
    mx.eval(*made)
    return made


@functools.lru_cache(maxsize=1024)
def _division(span: int, splits: int) -> mx.array:
    """Return how the keys are split: keys of a split, and number of splits."""
    made = mx.array([span, splits], mx.int32)
    mx.eval(made)
    return made


@functools.cache
def placeholder(axes: int) -> mx.array:
    """Return a placeholder for an absent array; no kernel reads it."""
    made = mx.zeros((1,) * axes, mx.float32)
    mx.eval(made)
    return made


def arrays_of(
    q: mx.array,
    k: KeyOrValue,
    v: KeyOrValue,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
    slopes: mx.array | None = None,
    lists: ListArrays | None = None,
) -> Arrays:
    """Return the arrays of a call; the mask gets four axes, sinks and slopes (H,) the dtype float32."""
    if lists is None:
        lists = ListArrays(placeholder(4), placeholder(1), placeholder(1), placeholder(4), placeholder(1))
    return Arrays(
        *(q, _numbers(k), _numbers(v)),
        placeholder(4) if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape),
        placeholder(1) if sinks is None else sinks.astype(mx.float32),
        placeholder(1) if slopes is None else slopes.astype(mx.float32),
        *lists,
        *_scales_and_biases(k),
        *_scales_and_biases(v),
    )


def _numbers(x: KeyOrValue) -> mx.array:
    return x.numbers if isinstance(x, QuantizedArray) else x


def _scales_and_biases(x: KeyOrValue) -> tuple[mx.array, mx.array]:
    if not isinstance(x, QuantizedArray):
        return placeholder(4), placeholder(4)
    return x.scales, placeholder(4) if x.biases is None else x.biases


def in_device(array: mx.array) -> mx.array:
    """Return the array with a last axis that repeats it.

    MLX passes arrays of fewer than 8 elements as constant memory, which would change the kernel that was checked.
    """
    return mx.broadcast_to(array[..., None], (*array.shape, MIN_DEVICE_ELEMENTS))


def _in_device_if_small(array: mx.array) -> mx.array:
    return in_device(array) if array.size < MIN_DEVICE_ELEMENTS else array


def _padded(array: mx.array) -> mx.array:
    """Return an array (H,) as contiguous device memory: the kernels have no buffer to spare for its stride."""
    return mx.contiguous(mx.pad(array, (0, MIN_DEVICE_ELEMENTS)))


def constants(special: Specialisation) -> list[tuple[str, Any]]:
    """Return the template arguments common to all attention kernels."""
    tile = special.tile
    return [
        ("T", getattr(mx, special.dtype)),
        ("D", tile.head_dim),
        ("PAD", tile.pad),
        ("BLOCK_Q", tile.block_q),
        ("BLOCK_K", tile.block_k),
        ("SIMDGROUPS", tile.simdgroups),
        ("CAUSAL", special.causal),
        ("WINDOW", special.window),
        ("SOFTCAP", special.softcap),
        ("MASK", {"none": 0, "bool": 1}.get(special.mask, 2)),
        ("ALIBI", special.alibi),
        ("LISTS", special.lists),
        ("LIST_Q", LIST_QUERIES),
        ("LIST_K", LIST_KEYS),
    ]


def _format_constants(special: Specialisation) -> list[tuple[str, Any]]:
    """Return the further template arguments of the forward kernel for quantized keys and values."""
    if special.kv_format is None:
        return []
    forms = {"KEY": special.kv_format.key, "VALUE": special.kv_format.value}
    return [
        (f"{name}_{what}", number)
        for name, form in forms.items()
        for what, number in (("MODE", MODES.index(form.mode)), ("BITS", form.bits), ("GROUP", form.group_size))
    ]


def forward(arrays: Arrays, shape: CallShape, call: CallParams) -> Forward:
    """Compute the forward pass; the keys of a call with few queries are split and the parts joined."""
    if not call.splits_keys(shape):
        o, lse, rest = _attend("forward", arrays, shape, call, 1, shape.keys)
        return o[0], lse[0], rest[0]
    splits, span = key_split(shape, call)
    parts, lses, rests = _attend("decode", arrays, shape, call, splits, span)
    return (parts[0], lses[0], rests[0]) if splits == 1 else join(parts, lses, rests, shape)


def key_split(shape: CallShape, call: CallParams) -> tuple[int, int]:
    """Return the number of key splits of a call with few queries, and the keys per split, a multiple of the tile."""
    tile = specialisation("decode", shape, call).tile
    groups = shape.batch * shape.kv_heads * _ceil(shape.group * shape.queries, tile.block_q)
    splits = max(1, min(_ceil(TARGET_THREADGROUPS, groups), MAX_SPLITS, shape.keys // SPLIT_KEYS))
    span = tile.block_k * _ceil(shape.keys, splits * tile.block_k)
    return _ceil(shape.keys, span), span


def _attend(kind: Kind, arrays: Arrays, shape: CallShape, call: CallParams, splits: int, span: int) -> Forward:
    """Return outputs (splits, B, H, Lq, D), and logsumexps and their residuals (splits, B, H, Lq)."""
    special = specialisation(kind, shape, call)
    tile, packed = special.tile, kind == "decode"
    out = mx.float32 if splits > 1 else arrays.q.dtype
    sinks = _padded(arrays.sinks) if call.sinks else arrays.sinks
    lines = (splits, shape.batch, shape.heads, shape.queries)
    own = [("PACKED", packed), ("SINKS", special.sinks), ("OUT", out), *_format_constants(special)]
    name, keys_and_values = "forward", [arrays.k, arrays.v]
    if shape.kv_format is not None:
        parts = (arrays.key_scales, arrays.key_biases, arrays.value_scales, arrays.value_biases)
        name, keys_and_values = "forward_quantized", [*map(_in_device_if_small, (*keys_and_values, *parts))]
    o, lse, rest = queue(
        name,
        [arrays.q, *keys_and_values, *_positions(arrays, shape, call), sinks, *scalars(call), _division(span, splits)],
        output_shapes=[(*lines, shape.head_dim), lines, lines],
        output_dtypes=[out, mx.float32, mx.float32],
        template=constants(special) + own,
        grid=_grid_of_packed(special, shape, splits) if packed else _grid(special, arrays, shape),
        threadgroup=(tile.threads, 1, 1),
    )
    return o, lse, rest


def _grid_of_packed(special: Specialisation, shape: CallShape, splits: int) -> tuple[int, int, int]:
    blocks = _ceil(shape.group * shape.queries, special.tile.block_q)
    return blocks * special.tile.threads, shape.kv_heads, shape.batch * splits


def _grid(special: Specialisation, arrays: Arrays, shape: CallShape) -> tuple[int, int, int]:
    """Return the threads of a kernel that owns blocks of rows, or of keys (dK and dV); with lists, in their order."""
    tile, of_keys = special.tile, special.tile.kind == "backward_key"
    block, heads = (tile.block_k, shape.kv_heads) if of_keys else (tile.block_q, shape.heads)
    if not special.lists:
        return _ceil(shape.keys if of_keys else shape.queries, block) * tile.threads, heads, shape.batch
    batches, list_heads, tiles = (arrays.key_lists if of_keys else arrays.lists).shape[:3]
    own_heads = heads if list_heads > 1 else 1
    blocks = (LIST_KEYS if of_keys else LIST_QUERIES) // block
    return batches * own_heads * tiles * blocks * tile.threads, heads // own_heads, shape.batch // batches


def join(parts: mx.array, lses: mx.array, rests: mx.array, shape: CallShape) -> Forward:
    """Join the parts of a call with split keys; one simdgroup per row."""
    dtype = getattr(mx, shape.dtype)
    o, lse, rest = queue(
        "join",
        [parts, *(in_device(x.reshape(x.shape[0], -1)) for x in (lses, rests))],
        output_shapes=[parts.shape[1:], lses.shape[1:], lses.shape[1:]],
        output_dtypes=[dtype, mx.float32, mx.float32],
        template=[("T", dtype), ("D", shape.head_dim)],
        grid=(SIMD * shape.batch * shape.heads * shape.queries, 1, 1),
        threadgroup=(SIMD, 1, 1),
    )
    return o, lse, rest


def backward(
    arrays: Arrays,
    outputs: Sequence[mx.array],
    d_o: mx.array,
    d_lse: mx.array | None,
    shape: CallShape,
    call: CallParams,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return dQ, dK, dV and each row's delta (B, H, Lq); the second kernel reads the delta computed by the first."""
    d_q, delta = _of_queries(arrays, outputs, d_o, d_lse, shape, call)
    d_k, d_v = _of_keys(arrays, outputs, delta, d_o, shape, call)
    return d_q, d_k, d_v, delta


def _of_queries(
    arrays: Arrays,
    outputs: Sequence[mx.array],
    d_o: mx.array,
    d_lse: mx.array | None,
    shape: CallShape,
    call: CallParams,
) -> list[mx.array]:
    """Return the gradient of q, and delta."""
    special = specialisation("backward_query", shape, call)
    by_sum = placeholder(3) if d_lse is None else in_device(d_lse)
    return queue(
        "backward_query",
        [
            *(*arrays[:3], outputs[0], *map(in_device, outputs[1:]), d_o, by_sum),
            *(*_positions(arrays, shape, call), *scalars(call)),
        ],
        output_shapes=[arrays.q.shape, outputs[1].shape],
        output_dtypes=[arrays.q.dtype, mx.float32],
        template=[*constants(special), ("CHUNK", special.tile.chunk), ("LOGSUMEXP", d_lse is not None)],
        grid=_grid(special, arrays, shape),
        threadgroup=(special.tile.threads, 1, 1),
    )


def _of_keys(
    arrays: Arrays,
    outputs: Sequence[mx.array],
    delta: mx.array,
    d_o: mx.array,
    shape: CallShape,
    call: CallParams,
) -> list[mx.array]:
    """Return the gradients of k and v."""
    special = specialisation("backward_key", shape, call)
    return queue(
        "backward_key",
        [
            *(*arrays[:3], *map(in_device, (*outputs[1:], delta)), d_o),
            *(*_positions(arrays, shape, call, of_keys=True), *scalars(call)),
        ],
        output_shapes=[arrays.k.shape, arrays.v.shape],
        output_dtypes=[arrays.k.dtype, arrays.v.dtype],
        template=[*constants(special), ("CHUNK", special.tile.chunk)],
        grid=_grid(special, arrays, shape),
        threadgroup=(special.tile.threads, 1, 1),
    )


def _positions(arrays: Arrays, shape: CallShape, call: CallParams, of_keys: bool = False) -> list[mx.array]:
    """Return the arrays of `POSITIONS`; the lists are those of rows unless `of_keys`."""
    mask, slopes = arrays.mask, arrays.slopes
    if call.mask != "none":
        mask = in_device(mx.broadcast_to(mask, (shape.batch, shape.heads, shape.queries, shape.keys)))
    if call.alibi:
        slopes = _padded(slopes)
    of_lists = (arrays.key_lists, arrays.key_entries) if of_keys else (arrays.lists, arrays.entries)
    return [mask, slopes, *of_lists, arrays.bits]


def _ceil(n: int, of: int) -> int:
    return -(-n // of)
