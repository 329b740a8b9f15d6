"""What attends in a model: its own attention, an implementation in its place, or nothing at all."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Final

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
    """Counts the calls of attention that an implementation gets from here on."""

    def __init__(self, name: str, *, training: bool = False) -> None:
        """Begins to count; the same arguments as those of `replaced`."""
        self._name = name
        self._patch = None if name == UNTOUCHED else _patch(name, training)
        self._before = self._counts()

    def _counts(self) -> tuple[int, int]:
        return (self._patch.calls_taken, self._patch.calls_handed) if self._patch else (0, 0)

    def event(self, case: int) -> CallsCounted:
        """What was counted; nothing for mlx-lm as it is."""
        taken, handed = (now - before for now, before in zip(self._counts(), self._before, strict=True))
        reasons = self._patch.handed.most_common(1) if self._patch and handed else []
        return CallsCounted(
            case=case,
            implementation=self._name,
            replaced=taken,
            passed_on=handed,
            reason=reasons[0][0] if reasons else None,
        )
