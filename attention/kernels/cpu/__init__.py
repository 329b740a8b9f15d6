"""FlashAttention for CPUs in C++, an MLX primitive compiled on first use for this machine's instruction set.

Importing this package imports neither MLX nor nanobind; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from attention.core.errors import KernelUnavailable
from attention.core.forking import check_not_forked
from attention.kernels.common import check_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import mlx.core as mx

    from attention.core.kv_format import KVFormat
    from attention.quantized_kv import QuantizedArray

__all__ = [
    "LIST_TILE",
    "KernelUnavailable",
    "Lists",
    "append_quantized",
    "availability",
    "flash_attention",
    "flash_attention_with_logsumexp",
    "fma_peak",
    "is_compiled",
    "is_loaded",
    "load",
    "load_compiled",
    "variant",
    "workspace_bytes",
]

LIST_TILE: Final = (64, 128)
"""Queries and keys of a tile of the block lists that the kernel walks."""

T = TypeVar("T")

_module: Any = None
_quantized_call: Any = None


class Lists(Protocol):
    """Block lists of a structured mask, as `attention.masks.BlockList`."""

    @property
    def block_q(self) -> int:
        """Queries of a tile."""
        ...

    @property
    def block_k(self) -> int:
        """Keys of a tile."""
        ...

    @property
    def batches(self) -> int:
        """Batch rows with lists of their own: 1 or B."""
        ...

    @property
    def heads(self) -> int:
        """Heads with lists of their own: 1 or H."""
        ...

    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return offsets (batches * heads * row tiles + 1,), entries (n, 2) and bits (m, block_q, block_k / 32)."""
        ...


def parts(dtype: str, queries: int, *, training: bool = False, quantized: bool = False) -> frozenset[str]:
    """Return the parts of the kernel that a call needs, each of which is compiled when one does first.

    Args:
        dtype: of the queries, by MLX's name.
        queries: number of queries, Lq.
        training: with gradients.
        quantized: over quantized keys and values.
    """
    few = 0 < queries % 64 <= 8  # rows of the last tile, as `has_few_rows` in schedule.hpp
    further = (("few", few), ("gradients", training), ("quantized", quantized))
    return frozenset({dtype, *(part for part, needed in further if needed)})


def availability(parts: Iterable[str] | None = None) -> tuple[bool, str]:
    """Return whether the kernel can be used on this machine, and the reason in one line; fast, compiles nothing.

    Args:
        parts: those that a call would need; by default those that calls have needed on this machine so far.
    """
    from attention.kernels.cpu import library

    return library.availability(parts)


def is_compiled(parts: Iterable[str] = ()) -> bool:
    """Return whether a library with these parts is cached for this machine and MLX, so that it loads at once."""
    from attention.kernels.cpu import library

    return library.is_compiled(parts)


def is_loaded(parts: Iterable[str] = ()) -> bool:
    """Return whether the kernel is loaded in this process, with these parts."""
    from attention.kernels.cpu import library

    return _module is not None and library.has(parts)


def is_traced(*arrays: mx.array) -> bool:
    """Return whether an array is part of a transformation of MLX; False if the kernel is not loaded."""
    return _module is not None and any(map(_module.is_tracer, arrays))


def load_compiled(parts: Iterable[str] = ()) -> bool:
    """Load the kernel with these parts if it is cached for this machine, in some milliseconds; compile nothing.

    Returns:
        Whether it is loaded.
    """
    from attention.kernels.cpu import library

    if not is_loaded(parts):
        if not library.load_compiled(parts):
            return False
        load(parts=parts)
    return True


def fma_peak() -> float:
    """Measure the FLOP/s of float32 multiply-adds in registers on all threads.

    Raises:
        KernelUnavailable: the kernel cannot run on this machine.
    """
    return float(_with_parts(lambda module: module.fma_peak()))


def variant() -> str:
    """Return the instruction set that runs, or would: "amx", "avx512_bf16", "avx512", "avx2", "neon" or "plain".

    Raises:
        KernelUnavailable: the kernel is not loaded, and cannot be compiled.
    """
    from attention.kernels.cpu import library

    return library.variant()


def load(on_message: Callable[[str], None] | None = None, parts: Iterable[str] | None = None) -> None:
    """Load the kernel: compile it if necessary, verify its recorded hash, import it, run its self-check.

    Args:
        on_message: called with a line before a compilation and one after it.
        parts: those that calls will need; all by default. Others are compiled by the first call that needs them.

    Raises:
        KernelUnavailable: the kernel cannot be compiled, loaded or trusted; the message is the reason.
    """
    from attention.kernels.cpu import build, library

    global _module, _quantized_call  # noqa: PLW0603  one library a process
    if _quantized_call is None:
        from attention.kernels.cpu import quantized_call

        _quantized_call = quantized_call
    _module = library.load(on_message, build.ALL if parts is None else parts)


def _load_for(q: mx.array, k: mx.array | QuantizedArray, v: mx.array | QuantizedArray) -> None:
    """Load what a call needs, so that it is compiled in parallel; arguments are not checked yet."""
    from attention.kernels.cpu import build, quantized_call
    from attention.masks import dtype_name

    queries = q.shape[2] if q.ndim == 4 else 0
    needed = parts(dtype_name(q.dtype), queries, quantized=quantized_call.is_quantized(k, v))
    load(parts=needed & build.ALL)


def _with_parts(call: Callable[..., T], *arguments: object) -> T:
    """Return what a function makes of the module and arguments; parts that it lacks are compiled, and loaded first."""
    if _module is None:
        load(parts=())
    while True:
        module = _module
        try:
            return call(module, *arguments)
        except module.MissingPart as missing:
            load(parts=(str(missing),))
            if _module is module:
                raise KernelUnavailable(f"the compiled kernel lacks its part {missing}") from missing


def _bounds(window: int | None, softcap: float | None) -> tuple[int, float]:
    check_bounds(window, softcap)
    return window or 0, softcap or 0.0


def _list_arguments(lists: Lists | None) -> tuple[object, ...]:
    if lists is None:
        return None, None, None, 0, 0
    if (lists.block_q, lists.block_k) != LIST_TILE:
        wanted, got = ("{} x {}".format(*tile) for tile in (LIST_TILE, (lists.block_q, lists.block_k)))
        raise ValueError(f"lists: got tiles of {got}; the CPU kernel takes {wanted}")
    return *lists.arrays(), lists.batches, lists.heads


def flash_attention(
    q: mx.array,
    k: mx.array | QuantizedArray,
    v: mx.array | QuantizedArray,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    items: int = 0,
    lists: Lists | None = None,
    alibi: mx.array | None = None,
) -> mx.array:
    """Compute attention on the CPU; arguments and results as in `kernels.common.FlashAttention`.

    D and Dv are from 1 to 512, with any strides, in float32, float16 or bfloat16. Quantized k and v, of any formats,
    are read packed, tile by tile; such a call has no gradient. Further keywords:

    - `items`: minimum number of work items that a call is split into if possible: few items are taller and read keys
      and values less often, many occupy more threads. 0 chooses by the shape.
    - `lists`: block lists in tiles of `LIST_TILE`, the whole positional mask of the call: instead of causal and window,
      and beside mask if there is one. Only listed tiles are computed.
    - `alibi`: slopes (H,) in float32: slope * (key - position of the query) is added to the scores after the softcap,
      with query row i at position i + Lk - Lq.

    Raises:
        ValueError: shapes, dtypes or values are invalid.
        KernelUnavailable: the kernel cannot run on this machine.
        ForkedError: attention was computed before this process was forked.
    """
    check_not_forked()
    if _module is None:
        _load_for(q, k, v)
    if window is not None or softcap is not None:
        window, softcap = _bounds(window, softcap)
    listed = () if lists is None and alibi is None else (alibi, *_list_arguments(lists))
    options = (scale, causal, window or 0, softcap or 0.0, mask, items)
    if _quantized_call.is_quantized(k, v):
        attended: mx.array = _with_parts(_quantized_call.attend, q, k, v, options, *([listed] if listed else []))[0]
        return attended
    module = _module
    try:  # at once, and without a closure: its variables would take 0.2 us of each call
        out: mx.array = module.flash_attention(q, k, v, *options, *listed)
    except module.MissingPart:
        out = _with_parts(lambda module, *arguments: module.flash_attention(*arguments), q, k, v, *options, *listed)
    return out


def flash_attention_with_logsumexp(
    q: mx.array,
    k: mx.array | QuantizedArray,
    v: mx.array | QuantizedArray,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    mask: mx.array | None = None,
    softcap: float | None = None,
    items: int = 0,
    lists: Lists | None = None,
    alibi: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute `flash_attention` and the natural logarithm of each row's sum of exponentials.

    Returns:
        The output (B, H, Lq, Dv), and the logsumexp (B, H, Lq) in float32, -inf for a fully masked row. Both are
        differentiable, unless k and v are quantized.

    Raises:
        ValueError: shapes, dtypes or values are invalid.
        KernelUnavailable: the kernel cannot run on this machine.
        ForkedError: attention was computed before this process was forked.
    """
    check_not_forked()
    if _module is None:
        _load_for(q, k, v)
    window, softcap = _bounds(window, softcap)
    listed = (alibi, *_list_arguments(lists))
    options = (scale, causal, window, softcap, mask, items)

    def call(module: Any) -> tuple[mx.array, mx.array]:
        if _quantized_call.is_quantized(k, v):
            found: tuple[mx.array, mx.array] = _quantized_call.attend(module, q, k, v, options, listed, logsumexp=True)
        else:
            found = module.flash_attention_with_logsumexp(q, k, v, *options, *listed)
        return found

    return _with_parts(call)


def append_quantized(
    buffers: Sequence[mx.array], keys: mx.array, values: mx.array, kv_format: KVFormat, row: int, used: int
) -> list[mx.array]:
    """Quantize new keys and values into a cache's buffers as one operation; `kernels.append` has the contract.

    Buffers are numbers, scales and biases of the keys, and those of the values, in one sequence; so is the result, in
    which views of the rows in use follow where there are other rows.

    Raises:
        ValueError: shapes, dtypes or rows do not fit.
        KernelUnavailable: the kernel cannot run on this machine.
        ForkedError: attention was computed before this process was forked.
    """
    check_not_forked()
    if _module is None:
        load(parts=("quantized",))
    codes = _quantized_call.code(kv_format.key), _quantized_call.code(kv_format.value)
    made: list[mx.array] = _with_parts(lambda module: module.append_quantized(buffers, keys, values, *codes, row, used))
    return made


class StreamOptions(NamedTuple):
    """What stays the same from step to step of a stream."""

    key: tuple[int, int, int]
    """Format as mode, bits and group size, all 0 if keys are dense."""
    value: tuple[int, int, int]
    first: int
    window: int
    ring: int


def stream_options(kv_format: KVFormat | None, first: int, window: int, ring: int) -> StreamOptions:
    """Return the options of a stream's steps."""
    if kv_format is None:
        return StreamOptions((0, 0, 0), (0, 0, 0), first, window, ring)
    from attention.kernels.cpu.quantized_call import code

    return StreamOptions(code(kv_format.key), code(kv_format.value), first, window, ring)


def stream_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    slots: list[mx.array],
    options: StreamOptions,
    rows: list[tuple[int, int]],
    scale: float,
    *,
    softcap: float | None = None,
    radians: mx.array | None = None,
    adjacent: bool = False,
    rotated: bool = False,
) -> mx.array:
    """Write one token into the slots of a stream, in place, and attend with its query; at once, on this thread.

    Args:
        q: query (B, H, 1, D); it, k and v are evaluated first.
        k: key (B, Hkv, 1, D).
        v: value (B, Hkv, 1, Dv).
        slots: keys and values (B, Hkv, first + ring, ·), quantized ones in the parts of `mx.quantize`. An array that
            something else refers to, or that is not contiguous, is replaced in the list by a copy.
        options: of `stream_options`.
        rows: of each batch row the tokens seen before this one, and the position of the oldest in the ring.
        scale: factor of the scores.
        softcap: as in `flash_attention`.
        radians: (pairs,) in float32: angle of one rotary position; None without positions.
        adjacent: pairs are adjacent dims.
        rotated: q and k are rotated to the token's slot already.

    Raises:
        ValueError: shapes or dtypes do not fit, or q, k or v is part of a transformation of MLX.
        KernelUnavailable: the kernel cannot run on this machine.
    """
    rest = (*options, rows, scale, softcap or 0.0, radians, adjacent, rotated)

    def step(module: Any) -> mx.array | None:
        made: mx.array | None = module.stream_step(q, k, v, slots, *rest)
        return made

    out = _with_parts(step)
    if out is None:
        import mlx.core

        mlx.core.eval(q, k, v, slots)
        out = _with_parts(step)
    if out is None:  # something else refers to the slots
        slots[:] = map(_module.own_copy, slots)
        out = _with_parts(step)
        assert out is not None
    return out


def stream_steps(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    slots: list[mx.array],
    options: StreamOptions,
    seen: int,
    scale: float,
    given: tuple[object, object, bool, object],
    *,
    softcap: float | None = None,
    radians: mx.array | None = None,
    adjacent: bool = False,
    rotated: bool = False,
) -> Callable[..., mx.array | None]:
    """Return a function that makes the steps after one of `stream_step` over full rings, without most of its checks.

    Args:
        q, k, v, slots: of that step.
        options, scale, softcap, radians, adjacent, rotated: as in `stream_step`.
        seen: tokens after that step, of each row of the batch; the rings have the latest of them.
        given: scale, softcap, whether q and k are rotated, and implementation, as given by the caller.

    Returns:
        A function of q, k, v and the arguments of `given`: the output, or None, with nothing done, unless all are as
        before, q, k and v are evaluated, and nothing else refers to the slots.
    """
    rest = (*options, seen, scale, softcap or 0.0, radians, adjacent, rotated, given)
    made: Callable[..., mx.array | None] = _with_parts(lambda module: module.stream_steps(q, k, v, slots, *rest))
    return made


def workspace_bytes(
    q_shape: tuple[int, int, int, int],
    k_shape: tuple[int, int, int, int],
    v_shape: tuple[int, int, int, int],
    *,
    dtype: mx.Dtype,
    training: bool = False,
    quantized: bool = False,
) -> int:
    """Return the bytes that a call allocates beyond inputs and outputs, all threads together.

    Args:
        q_shape: (B, H, Lq, D).
        k_shape: (B, Hkv, Lk, D).
        v_shape: (B, Hkv, Lk, Dv).
        dtype: of all three; of the queries, if keys and values are quantized.
        training: the maximum of forward and backward; the 16 bytes kept per row are outputs and not counted.
        quantized: whether keys and values are quantized; their shapes are those of the values.

    Raises:
        KernelUnavailable: the kernel cannot run on this machine.
    """
    import mlx.core

    element = [mlx.core.float32, mlx.core.float16, mlx.core.bfloat16].index(dtype)
    batch, heads, queries, head_dim = q_shape
    sizes = (batch, heads, k_shape[1], queries, k_shape[2], head_dim, v_shape[3])
    return int(_with_parts(lambda module: module.workspace_bytes(*sizes, element, training, quantized)))
