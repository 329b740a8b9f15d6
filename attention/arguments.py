"""Validation of the arguments of `attention()`; each error names the argument, its value and what is accepted."""

import math
from functools import cache
from typing import TYPE_CHECKING, TypeGuard

from msgspec import structs

from attention import masks
from attention.core.errors import NoBackendError, UnsupportedError, UsageError, suggestion
from attention.core.numbers import is_number, shown_value
from attention.core.workload import DTYPES
from attention.implementations import found_implementation
from attention.implementations.protocol import Implementation, ReturnsLogsumexp
from attention.masks import Alibi, Mask, Pattern, Shape, dtype_name

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.quantized_kv import QuantizedArray
    from attention.streaming import StreamingKV


def find_implementation(implementation: object) -> Implementation:
    """Return the implementation with a name, or the given implementation itself.

    Raises:
        UsageError: the argument is neither.
        NoBackendError: MLX cannot be imported.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise NoBackendError(f"MLX cannot be imported: {error}") from error
    return found_implementation(implementation)


def check_shapes(q: object, k: object, v: object) -> bool:
    """Check that q, k and v are 4-D, with compatible shapes, and that dense ones have one floating dtype.

    Returns:
        Whether k and v are quantized; the dtype of their scales need not be q's.

    Raises:
        UsageError: they are not.
    """
    import mlx.core as mx

    problems: list[str] = []
    packed, shapes = False, []
    for name, array in (("q", q), ("k", k), ("v", v)):
        if isinstance(array, mx.array):
            accepted = array.dtype in _accepted_types()
        elif name == "q" or not isinstance(array, _quantized_type()):
            also = "" if name == "q" else ", or quantized(array)"
            problems.append(f"{name}: got {_kind(array)}; it takes an mlx.core.array{also}")
            continue
        else:
            packed = accepted = True
            if of_parts := array.problems():
                problems += [f"{name}: {problem}" for problem in of_parts]
                continue
        shapes.append(shape := array.shape)
        if len(shape) != 4 or 0 in shape:
            problems.append(f"{name}: got shape {tuple(shape)}; it takes (batch, heads, length, width), none of them 0")
        elif not accepted:
            problems.append(f"{name}: got {dtype_name(array.dtype)}; it takes {', '.join(DTYPES)}")
        elif name != "q" and isinstance(array, mx.array) and isinstance(q, mx.array) and array.dtype != q.dtype:
            problems.append(f"{name}: got {dtype_name(array.dtype)}; it takes q's type, {dtype_name(q.dtype)}")
    if packed and not problems and isinstance(k, mx.array) != isinstance(v, mx.array):
        dense, other = ("k", "v") if isinstance(k, mx.array) else ("v", "k")
        problems.append(f"{dense}: got an mlx.core.array, and {other} is quantized; it takes quantized(array) too")
    if not problems:
        problems = _shape_problems(*shapes)
    if problems:
        raise UsageError(*problems)
    return packed


@cache
def _quantized_type() -> "type[QuantizedArray]":
    from attention.quantized_kv import QuantizedArray

    return QuantizedArray


def _shape_problems(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> list[str]:
    problems = []
    if k[0] != q[0]:
        problems.append(f"k: got batch {k[0]}; it takes q's batch, {q[0]}")
    if q[1] % k[1]:
        problems.append(f"k: got {k[1]} heads; it takes a divisor of q's {q[1]} heads")
    if k[3] != q[3]:
        problems.append(f"k: got width {k[3]}; it takes q's width, {q[3]}")
    if v[:3] != k[:3]:
        problems.append(f"v: got batch, heads and length {tuple(v[:3])}; it takes k's, {tuple(k[:3])}")
    return problems


def check_mask(mask: object, window: object, q: "mx.array", k: "mx.array | QuantizedArray") -> Mask:
    """Return the mask of a call of q and k, see `check_mask_of_shape`."""
    return check_mask_of_shape(mask, window, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def check_mask_of_shape(mask: object, window: object, shape: Shape) -> Mask:
    """Return the mask of a call (B, H, Lq, Lk); with a pattern, `window` limits what the pattern shows.

    Raises:
        UsageError: the mask's kind, dtype or shape is invalid, or the window is not a whole number from 1.
    """
    problems = []
    if window is not None and (type(window) is not int or window < 1):
        problems.append(f"window: got {shown_value(window)}; it takes a whole number from 1, or None")
    array = None if mask is None or isinstance(mask, str | Pattern) else mask
    try:
        _check_kind(mask)
        if isinstance(mask, Pattern):
            mask.check(shape)
        if array is not None:
            masks.check_array(array, shape)  # type: ignore[arg-type]
    except UsageError as error:
        problems += error.problems
    if problems:
        raise UsageError(*problems)
    if isinstance(mask, Pattern):
        return masks.of_pattern(mask if window is None else mask & masks.window(window))  # type: ignore[arg-type]
    keys = min(window, masks.LONGEST) if isinstance(window, int) else None
    return Mask(causal=mask is not None and array is None, window=keys, array=array)  # type: ignore[arg-type]


def _check_kind(mask: object) -> None:
    import mlx.core as mx

    if isinstance(mask, str) and mask != "causal":
        hint = suggestion(mask, ["causal"])
        raise UsageError(
            f"mask: got {shown_value(mask)}; it takes None, 'causal', a mask of attention.masks or an array{hint}"
        )
    if mask is not None and not isinstance(mask, str | mx.array | Pattern):
        raise UsageError(
            f"mask: got {_kind(mask)}; it takes None, 'causal', a mask of attention.masks or an mlx.core.array"
        )


def check_score_mod(score_mod: object, mask: Mask, heads: int) -> Mask:
    """Return the mask of a call with the bias of `score_mod`.

    Raises:
        UsageError: it is no `alibi(slopes)`, or does not have one slope per head.
    """
    if score_mod is None:
        return mask
    if not isinstance(score_mod, Alibi):
        raise UsageError(f"score_mod: got {_kind(score_mod)}; it takes None or attention.masks.alibi(slopes)")
    if score_mod.slopes.shape[0] != heads:
        raise UsageError(
            f"score_mod: alibi got {score_mod.slopes.shape[0]} slopes; it takes one for each of {heads} heads"
        )
    return structs.replace(mask, alibi=score_mod.slopes)


def check_max_error(max_error: object, implementation: Implementation, return_lse: bool) -> dict[str, float]:
    """Return the error budget as a keyword of the call; exact implementations and calls with a logsumexp get none.

    Raises:
        UsageError: it is not a number above 0.
    """
    if not (is_number(max_error) and 0 < max_error < math.inf):  # type: ignore[operator]
        raise UsageError(f"max_error: got {shown_value(max_error)}; it takes a number above 0, or None")
    takes = getattr(implementation, "takes_max_error", False) and not return_lse
    return {"max_error": float(max_error)} if takes else {}  # type: ignore[arg-type]


def check_support(implementation: Implementation, mask: Mask, return_lse: bool, packed: bool) -> None:
    """Raise UnsupportedError unless an implementation takes what a call has beyond dense arrays, bounds and an array.

    `packed`: keys and values are quantized.
    """
    for needed, attribute, what in (
        (mask.pattern is not None, "takes_patterns", "patterns of attention.masks"),
        (mask.alibi is not None, "takes_alibi", "score_mod"),
        (packed, "takes_quantized", "quantized keys and values"),
    ):
        if needed and not getattr(implementation, attribute, False):
            raise UnsupportedError(f"{implementation.name}: it takes no {what}; practical does")
    if return_lse and not isinstance(implementation, ReturnsLogsumexp):
        raise UnsupportedError(f"{implementation.name}: it does not return the logsumexp; practical does")


def is_streaming(k: object) -> "TypeGuard[StreamingKV]":
    """Return whether keys are the state of a sequence without an end."""
    return isinstance(k, _streaming_type())


@cache
def _streaming_type() -> "type[StreamingKV]":
    from attention.streaming import StreamingKV

    return StreamingKV


def check_streaming(
    mask: object, window: object, score_mod: object, max_error: object, return_lse: bool, q: object
) -> None:
    """Raise UsageError unless a call over a StreamingKV has a query, the state's own mask and nothing else.

    Raises:
        UsageError: it has more.
    """
    given = {"window": window, "score_mod": score_mod, "max_error": max_error}
    problems = [
        f"{name}: got {shown_value(x)}; with a StreamingKV it takes None" for name, x in given.items() if x is not None
    ]
    problems += _query_problems(q)
    if return_lse:
        problems.append("return_lse: got True; with a StreamingKV it takes False")
    if mask is not None and not (isinstance(mask, str) and mask == "causal"):
        problems.append("mask: got one; with a StreamingKV it takes None or 'causal': the state says what is kept")
    if problems:
        raise UsageError(*problems)


def _query_problems(q: object) -> list[str]:
    import mlx.core as mx

    if not isinstance(q, mx.array):
        return [f"q: got {_kind(q)}; it takes an mlx.core.array"]
    return [] if q.ndim == 4 else [f"q: got shape {tuple(q.shape)}; it takes (batch, heads, length, width)"]


@cache
def _accepted_types() -> "frozenset[mx.Dtype]":
    import mlx.core as mx

    return frozenset(getattr(mx, name) for name in DTYPES)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
