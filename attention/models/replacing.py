"""What attends in a model: its own attention, an implementation in its place, or nothing at all."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import TracebackType
from typing import Any, Final, Self

import mlx.core as mx

from attention import implementations
from attention.events import WITHOUT, CallsCounted
from attention.implementations.protocol import TellsPasses
from attention.patch import seams
from attention.patch.model_patch import ModelPatch

UNTOUCHED: Final = "mlx"
"""The peer as it is: in a model that is mlx-lm as it is. Whatever a patch costs, only those who need one pay it."""


def replaced(name: str, *, training: bool = False) -> AbstractContextManager[object]:
    """A context in which models attend by an implementation; it may want to know that they are trained."""
    if name == UNTOUCHED:
        return nullcontext()
    return _nothing() if name == WITHOUT else _patch(name, training)


@cache
def _patch(name: str, training: bool) -> ModelPatch:
    """The same one each time, since it remembers its routes."""
    implementation = implementations.get(name)
    return ModelPatch(
        implementation.for_training() if training and isinstance(implementation, TellsPasses) else implementation
    )


@contextmanager
def _nothing() -> Iterator[None]:
    """Attention returns its query at once; key and value are computed as for all others, and not used."""
    places = seams.of_models(), seams.fast()
    for place in places:
        place.add(taker=_query_alone)
    try:
        yield
    finally:
        for place in places:
            place.remove(taker=_query_alone)


def _query_alone(q: mx.array, k: mx.array, v: mx.array, *rest: Any, **named: Any) -> mx.array:
    """The query (B, H, Lq, D) in the output's shape (B, H, Lq, Dv), once the key and the value are there."""
    width = v.shape[3]
    shaped = q if width == q.shape[3] else mx.broadcast_to(q[..., :1], (*q.shape[:3], width))
    kept: mx.array = mx.depends(shaped, [k, v])
    return kept


class Calls:
    """Counts the calls of attention that reach an implementation while it is entered; a context manager."""

    def __init__(self, name: str, *, training: bool = False) -> None:
        """Takes the same arguments as `replaced`."""
        self._name = name
        self._patch = None if name == UNTOUCHED else _patch(name, training)
        self._own = 0
        self._inside = False
        self._before: Counter[str] = Counter()
        self._handed_before: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Begins to count."""
        if self._patch:
            self._before, self._handed_before = self._patch.taken.copy(), self._patch.handed.copy()
        else:
            for place in (seams.of_models(), seams.fast()):
                place.add(watcher=self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it."""
        if self._patch is None:
            for place in (seams.of_models(), seams.fast()):
                place.remove(watcher=self._count)

    def _count(self, call: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Counts a call of mlx-lm's own; MLX's function inside of it is no second one."""
        if self._inside:
            return call(*args, **named)
        self._own += 1
        self._inside = True
        try:
            return call(*args, **named)
        finally:
            self._inside = False

    def event(self, case: int, path: str | None = None) -> CallsCounted:
        """What was counted; of mlx-lm as it is, `path` is what its calls take."""
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
