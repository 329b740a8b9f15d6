"""Interfaces of implementations: name, route and call, and optional extensions."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from attention.core.route import NO_NEEDS, Needs, Route
from attention.core.workload import Workload
from attention.measure.device import Device
from attention.measure.rounds import Runner

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.masks import Mask

TAKES_NO_PATTERNS: Final = "it takes no patterns of attention.masks"
TAKES_NO_QUANTIZED: Final = "it takes no quantized keys and values"


@runtime_checkable
class Implementation(Protocol):
    """An attention implementation. A plugin needs no more than this to be measured beside the others.

    Calls with `mask.pattern` or `mask.alibi` set are only made if it has an attribute `takes_patterns` or `takes_alibi`
    that is true. `mask.dense` gives everything but the bias as one array. Calls with keys and values that are a
    `QuantizedArray` each, and workloads with a `kv_format`, need an attribute `takes_quantized`. If it has an attribute
    `takes_max_error` that is true, calls with an error budget have the keyword `max_error`.
    """

    name: str

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the path that a call would take, without running anything of the workload's size."""
        ...

    def __call__(
        self, q: "mx.array", k: "mx.array", v: "mx.array", *, scale: float, mask: "Mask", softcap: float | None = None
    ) -> "mx.array":
        """Compute attention.

        Args:
            q: query (B, H, Lq, D).
            k: key (B, Hkv, Lk, D), Hkv a divisor of H.
            v: value (B, Hkv, Lk, Dv).
            scale: factor of the scores.
            mask: the keys each query attends to.
            softcap: replaces scaled scores s by softcap * tanh(s / softcap), before the mask.

        Returns:
            (B, H, Lq, Dv) in the query's dtype; fully masked rows are 0.
        """
        ...


def needs_building(implementation: Implementation, workload: Workload, device: Device) -> bool:
    """Return whether a first call of the workload would have to build; quick."""
    if not isinstance(implementation, NeedsBuilding | NeedsBuildingPerCall):
        return False
    return implementation.needs_building(workload, device)


def build(implementation: Implementation, workload: Workload, on_message: Callable[[str], None]) -> None:
    """Build what an implementation of either kind needs for the workload's calls; others need nothing."""
    if isinstance(implementation, NeedsBuilding):
        implementation.build(on_message)
    elif isinstance(implementation, NeedsBuildingPerCall):
        implementation.build_for(workload, on_message)


def missing_feature(implementation: object, workload: Workload) -> str | None:
    """Return what a workload has that an implementation does not declare to take, or None; its route may not know."""
    if workload.structured and not getattr(implementation, "takes_patterns", False):
        return TAKES_NO_PATTERNS
    if workload.quantized and not getattr(implementation, "takes_quantized", False):
        return TAKES_NO_QUANTIZED
    return None


@runtime_checkable
class ReturnsLogsumexp(Protocol):
    """An implementation that can return the logsumexp of each row."""

    def with_logsumexp(
        self, q: "mx.array", k: "mx.array", v: "mx.array", *, scale: float, mask: "Mask", softcap: float | None = None
    ) -> "tuple[mx.array, mx.array]":
        """Compute attention as `__call__`, and the logsumexp of the scores of each row.

        The second array is (B, H, Lq) in float32, of the scaled, capped, biased and masked scores, -inf for fully
        masked rows; it is differentiable.
        """
        ...


@runtime_checkable
class NeedsBuilding(Protocol):
    """An implementation that must be built once per machine, for example compiled."""

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether a first call would have to build; quick."""
        ...

    def build(self, on_message: Callable[[str], None]) -> None:
        """Build; `on_message` receives a line before long steps. If it fails, routes report the reason from then on."""
        ...


@runtime_checkable
class NeedsBuildingPerCall(Protocol):
    """An implementation that must be built for each kind of call: in each process, or once per machine."""

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Return whether a first call of the workload would have to build; quick."""
        ...

    def build_for(self, workload: Workload, on_message: Callable[[str], None]) -> None:
        """Build for the workload's calls; if it fails, they raise the reason."""
        ...


@runtime_checkable
class TunesItself(Protocol):
    """An implementation that tries candidates at the first call of a kind, which takes seconds."""

    def is_tuned(self, workload: Workload, device: Device) -> bool:
        """Return whether a call would not have to try candidates first."""
        ...


@runtime_checkable
class ProvidesRunner(Protocol):
    """An implementation outside MLX with its own runner."""

    def runner(self, workload: Workload, inputs: "Sequence[mx.array]", scale: float) -> Runner:
        """Convert the inputs (q, k, v, and in training the output's gradient) and return the bound call."""
        ...


@runtime_checkable
class SupportsTraining(Protocol):
    """An implementation that behaves differently in training, which a call cannot detect."""

    def for_training(self) -> Implementation:
        """Return the implementation for calls whose gradients are needed."""
        ...
