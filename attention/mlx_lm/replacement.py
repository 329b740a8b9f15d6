"""Replacement of a model's attention by an implementation or by nothing, and counts of its calls."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

import mlx.core as mx

from attention import implementations
from attention.core.events import WITHOUT_ATTENTION, CallsCounted
from attention.implementations.protocol import SupportsTraining
from attention.mlx_lm.patch import ModelPatch
from attention.monitoring import patch_points

ORIGINAL: Final = "mlx"
"""The implementation for which mlx-lm runs unpatched, without any overhead of a patch."""


def replace_attention(name: str, *, training: bool = False) -> AbstractContextManager[object]:
    """Return a context in which models use an implementation; `training` selects its training variant."""
    if name == ORIGINAL:
        return nullcontext()
    return _without_attention() if name == WITHOUT_ATTENTION else _patch(name, training)


@cache
def _patch(name: str, training: bool) -> ModelPatch:
    """Return the cached patch, which caches routes."""
    implementation = implementations.load_implementation(name)
    return ModelPatch(
        implementation.for_training() if training and isinstance(implementation, SupportsTraining) else implementation
    )


@contextmanager
def _without_attention() -> Iterator[None]:
    """Make attention return its query unchanged; key and value are still computed."""
    places = patch_points.models_sdpa(), patch_points.fast_sdpa()
    for place in places:
        place.add(interceptor=_query_only)
    try:
        yield
    finally:
        for place in places:
            place.remove(interceptor=_query_only)


def _query_only(q: mx.array, k: mx.array, v: mx.array, *rest: Any, **named: Any) -> mx.array:
    """Return the query (B, H, Lq, D) in the output's shape (B, H, Lq, Dv), depending on key and value."""
    width = v.shape[3]
    shaped = q if width == q.shape[3] else mx.broadcast_to(q[..., :1], (*q.shape[:3], width))
    kept: mx.array = mx.depends(shaped, [k, v])
    return kept


class CallCounter:
    """Context manager that counts the attention calls that reach an implementation."""

    def __init__(self, name: str, *, training: bool = False) -> None:
        """Create it with the arguments of `replace_attention`."""
        self._name = name
        self._patch = None if name == ORIGINAL else _patch(name, training)
        self._own = 0
        self._inside = False
        self._before: Counter[str] = Counter()
        self._handed_before: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Start counting."""
        if self._patch:
            self._before, self._handed_before = self._patch.taken.copy(), self._patch.handed.copy()
        else:
            for place in (patch_points.models_sdpa(), patch_points.fast_sdpa()):
                place.add(observer=self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        if self._patch is None:
            for place in (patch_points.models_sdpa(), patch_points.fast_sdpa()):
                place.remove(observer=self._count)

    def _count(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Count a call of mlx-lm's function; the nested call of MLX's function does not count."""
        if self._inside:
            return call(*args, **named)
        self._own += 1
        self._inside = True
        try:
            return call(*args, **named)
        finally:
            self._inside = False

    def event(self, case: int, path: str | None = None) -> CallsCounted:
        """Return the counts as an event; `path` is the path of unpatched mlx-lm's calls."""
        if self._patch is None:
            return CallsCounted(
                case=case,
                implementation=self._name,
                replaced=self._own,
                passed_on=0,
                path=path if self._own else None,
            )
        taken, handed = self._patch.taken - self._before, self._patch.handed - self._handed_before
        return CallsCounted(
            case=case,
            implementation=self._name,
            replaced=taken.total(),
            passed_on=handed.total(),
            reason=next((reason for reason, _ in handed.most_common(1)), None),
            path=next((each for each, _ in taken.most_common(1)), None),
        )
