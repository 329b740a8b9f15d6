"""What an implementation is: a name, the route it would take, and the call."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from attention.device import Device
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

if TYPE_CHECKING:
    import mlx.core as mx

    from attention.masks import Mask


@runtime_checkable
class Implementation(Protocol):
    """An attention implementation. One of the user's own needs no more than this to be measured beside the others."""

    name: str

    def route(self, workload: Workload, device: Device, needs: Needs = PLAIN) -> Route:
        """Returns the path that would run, without running anything of the workload's size."""
        ...

    def __call__(
        self, q: "mx.array", k: "mx.array", v: "mx.array", *, scale: float, mask: "Mask", softcap: float | None = None
    ) -> "mx.array":
        """Attends.

        Args:
            q: query (B, H, Lq, D).
            k: key (B, Hkv, Lk, D), Hkv a divisor of H.
            v: value (B, Hkv, Lk, Dv).
            scale: factor of the scores.
            mask: what each query may see.
            softcap: squashes the scaled scores s to softcap * tanh(s / softcap), before the mask.

        Returns:
            (B, H, Lq, Dv) in the query's dtype; rows that may see nothing are 0.
        """
        ...


class Runner(Protocol):
    """A bound call that the clock can repeat: inputs made and converted, nothing queued yet."""

    def queue(self) -> object:
        """Queues one independent call and returns its outputs, unevaluated."""
        ...

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluates all outputs of the calls queued, and waits until the device has done so."""
        ...

    def results(self) -> "list[mx.array]":
        """Runs one call and returns what it computes, evaluated: the output, and in training dQ, dK and dV."""
        ...

    def peak_bytes(self) -> int | None:
        """Runs one call and returns the peak memory above the inputs, or None where it cannot be known."""
        ...


@runtime_checkable
class NeedsBuilding(Protocol):
    """An implementation that has to be made ready once on a machine, by compiling, say."""

    def needs_building(self, workload: Workload, device: Device) -> bool:
        """Whether a first call would have to build now; quick."""
        ...

    def build(self, tell: Callable[[str], None]) -> None:
        """Builds, telling in a line what takes the time; where that fails, the route says why from then on."""
        ...


@runtime_checkable
class BringsRunner(Protocol):
    """An implementation outside MLX, which brings its own way of being repeated."""

    def runner(self, workload: Workload, inputs: "Sequence[mx.array]", scale: float) -> Runner:
        """Converts the inputs (q, k, v, and in training the output's gradient), and returns the bound call."""
        ...


@runtime_checkable
class TellsPasses(Protocol):
    """An implementation that does otherwise in training, which no call can see of itself."""

    def for_training(self) -> Implementation:
        """The same for calls whose gradients are asked for."""
        ...
