"""A function of the caller as an implementation."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx

from attention.core.errors import UnsupportedError
from attention.core.route import NO_NEEDS, Needs, Route, fitted, unsupported
from attention.core.workload import Workload
from attention.masks import Mask, scores_shape
from attention.measure.device import Device

MIN_PARAMETERS: Final = 3
"""Minimum of positional parameters of a function that computes attention: q, k and v."""


class FunctionImplementation:
    """A function `f(q, k, v)` of MLX arrays, which may also take the keywords `scale`, `mask` and `softcap`.

    `mask` is None, "causal", or a bool array that broadcasts to (B, H, Lq, Lk), True where a query attends to a key:
    what `mx.fast.scaled_dot_product_attention` takes. A function without it is not called for masked workloads. Without
    `scale` it is to scale by 1 / sqrt(D).
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        """Wrap a function; `name` is that of its rows."""
        self.name, self._function = name, function
        parameters = inspect.signature(function).parameters.values()
        anything = any(each.kind is each.VAR_KEYWORD for each in parameters)
        self._takes = {each.name for each in parameters} | ({"scale", "mask"} if anything else set())
        self.takes_patterns = "mask" in self._takes

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the function as the path; masked workloads need the keyword `mask`."""
        if (workload.mask != "none" or needs.array_mask) and "mask" not in self._takes:
            return unsupported("the function has no parameter `mask`")
        if needs.softcap and "softcap" not in self._takes:
            return unsupported("the function has no parameter `softcap`")
        return Route(
            path=fitted(self.name), fused=None, reason="a function of the caller; it is not known how it works"
        )

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> Any:
        """Call the function with the keywords that it has.

        Raises:
            UnsupportedError: the call has a mask or a softcap that the function does not take.
        """
        named = mask.bounds_only and mask.causal and mask.window is None
        shown: Any = "causal" if named else mask.dense(scores_shape(q, k))
        given = {"scale": scale, "mask": shown, "softcap": softcap}
        for name in ("mask", "softcap"):
            if given[name] is not None and name not in self._takes:
                raise UnsupportedError(f"{self.name}: the function has no parameter `{name}`")
        return self._function(q, k, v, **{name: value for name, value in given.items() if name in self._takes})


def computes_attention(candidate: object) -> bool:
    """Return whether an object is a function with parameters for q, k and v; a factory of implementations has none."""
    if isinstance(candidate, type) or not callable(candidate) or hasattr(candidate, "route"):
        return False
    try:
        parameters = inspect.signature(candidate).parameters.values()
    except (TypeError, ValueError):  # a built-in without a signature
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    several = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    return several or sum(each.kind in kinds for each in parameters) >= MIN_PARAMETERS
