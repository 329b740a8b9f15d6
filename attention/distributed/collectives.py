"""Collectives with the gradients that attention needs, on a stream of their own, and counts of what they sent.

MLX's all_gather gives each rank the gradient of its own slice only. Here the gradient of what was gathered is summed
over the ranks, each rank getting the sum of its own part: the gradient of the sum of all ranks' losses.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from typing import Any, Final, NamedTuple, cast

import mlx.core as mx
from msgspec import Struct

from attention.core.errors import UnsupportedError
from attention.distributed import peers
from attention.implementations.calls import current_backend

Group = mx.distributed.Group
_WIDE: Final = mx.float32
NO_ORDER: Final = (
    "distributed: a call over several ranks inside mx.compile, or mx.vmap; with mx.compile, call in `with "
    "distributed.in_sequence():` if each call depends on the one before, as layers do"
)


class Statistics(Struct):
    """What this rank's distributed calls sent and received since the start or a reset, computed from shapes."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    by_method: dict[str, int] = {}
    """Calls of each method."""


_lock = threading.Lock()
_counted = Statistics()


def count_call(method: str, sent: int = 0, received: int = 0) -> None:
    """Count a call of a method, and bytes of it."""
    with _lock:
        _counted.calls += 1
        _counted.bytes_sent += sent
        _counted.bytes_received += received
        _counted.by_method[method] = _counted.by_method.get(method, 0) + 1


def count_bytes(sent: int, received: int) -> None:
    """Count bytes of a collective."""
    with _lock:
        _counted.bytes_sent += sent
        _counted.bytes_received += received


def statistics() -> Statistics:
    """Return the counts of this process so far; under `mx.compile`, calls count once, when they are traced."""
    with _lock:
        return Statistics(_counted.calls, _counted.bytes_sent, _counted.bytes_received, dict(_counted.by_method))


def reset_statistics() -> None:
    """Set the counts to zero."""
    with _lock:
        _counted.calls = _counted.bytes_sent = _counted.bytes_received = 0
        _counted.by_method.clear()


class _Streams(threading.local):
    """The communication stream of a thread: MLX's streams belong to one."""

    gpu: mx.Stream | None = None


_streams = _Streams()


def communication_stream() -> mx.Stream:
    """Return this thread's stream for communication: a second one of the GPU for NCCL, otherwise the CPU's own.

    A program's other collectives run on the CPU's own stream too, as MLX chooses it. Ring's sockets are for one stream.
    """
    if transport() != "nccl":
        return mx.default_stream(mx.Device(mx.cpu))
    return gpu_stream()


@lru_cache(maxsize=1)
def transport() -> str:
    """Return the backend that groups of this process use, as mlx.launch starts it: nccl, jaccl, mpi or ring."""
    if current_backend() == "cuda" and "MLX_HOSTFILE" not in os.environ:
        return "nccl"
    if "MLX_JACCL_COORDINATOR" in os.environ:
        return "jaccl"
    return "mpi" if "OMPI_COMM_WORLD_SIZE" in os.environ else "ring"


class Gathered(NamedTuple):
    """Arrays of all ranks."""

    arrays: list[mx.array]
    """(ranks, *shape) each."""
    token: mx.array
    """Available once they all are; results are `tied` to it."""


def gathered(parts: Sequence[mx.array], group: Group) -> Gathered:
    """Return the arrays of all ranks; they are moved one after another, in this order.

    All ranks' arrays have the same shapes. The gradient is the sum over the ranks of what each of them adds.
    """
    size = sum(part.nbytes for part in parts)
    count_bytes((group.size() - 1) * size, (group.size() - 1) * size)
    *arrays, token = moved(parts, partial(_gather, group))
    return Gathered(arrays, token)


def moved(
    parts: Sequence[mx.array], make_move: Callable[[bool], Callable[[list[mx.array]], list[mx.array]]]
) -> list[mx.array]:
    """Return what a collective makes of parts, `submitted`.

    `make_move` returns the collective's function, for calls in sequence or not: its gradient may be computed after
    the context of `in_sequence`.
    """
    in_sequence = _order.given
    return submitted(make_move(in_sequence)(list(map(unmapped, parts))), in_sequence)


class _Order(threading.local):
    """What orders the collectives of a thread."""

    given: bool = False
    """Whether each call depends on the one before, so that every rank must meet them in one order."""


_order = _Order()


@contextlib.contextmanager
def in_sequence() -> Iterator[None]:
    """Leave collectives to a later evaluation: each call in this context depends on the one before, as layers do."""
    before, _order.given = _order.given, True
    try:
        yield
    finally:
        _order.given = before


def submitted(arrays: list[mx.array], in_sequence: bool) -> list[mx.array]:
    """Return the arrays of a collective, which is evaluated from now on unless calls are in sequence.

    Ranks then meet in collectives in the order of the calls. MLX would order what does not depend on each other by the
    shape of the graph, which differs from rank to rank, so that ranks would exchange parts of different calls. While a
    gradient is traced, it must be waited for.

    Raises:
        UnsupportedError: inside `mx.compile` nothing can be evaluated.
    """
    if not in_sequence:
        try:
            mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        except ValueError:  # inside a transformation
            try:
                mx.eval(arrays)
            except ValueError:
                raise UnsupportedError(NO_ORDER) from None
    return arrays


def unmapped(array: mx.array) -> mx.array:
    """Return an array that other ranks get, or that waits for theirs; under `mx.vmap` it is refused.

    MLX would mix the mapped axis with that of the ranks.
    """
    return cast("mx.array", _unmapped(array))


@mx.custom_function
def _unmapped(array: mx.array) -> mx.array:
    return mx.stop_gradient(array)


@_unmapped.vjp
def _unmapped_vjp(primal: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent


@_unmapped.vmap
def _refuse_vmap(array: mx.array, axis: int) -> tuple[mx.array, int]:
    raise UnsupportedError("distributed: mx.vmap of a call over several ranks; give the arrays a batch axis instead")


@mx.custom_function
def _tie(array: mx.array, token: mx.array) -> mx.array:
    return cast("mx.array", mx.depends(array, token))


@_tie.vjp
def _tie_vjp(primals: Any, cotangent: mx.array, output: Any) -> tuple[mx.array, mx.array]:
    return cotangent, cast("mx.array", mx.depends(mx.zeros_like(primals[1]), cotangent))


def tied(array: mx.array, token: mx.array) -> mx.array:
    """Return the array, and take part in the gather that the token is of, forward and backward.

    A collective waits for all ranks, so that a rank which needs nothing of the others must take part too.
    """
    return cast("mx.array", _tie(unmapped(array), token))


def peer_copies(group: Group) -> tuple[peers.PeerCopies | None, str]:
    """Return the group's peer copies, set up on first use by all ranks, or None and the reason."""
    if current_backend() != "cuda":
        return None, "peer copies are for NVIDIA GPUs"
    return _set_up_peers(group)


@cache
def _set_up_peers(group: Group) -> tuple[peers.PeerCopies | None, str]:
    return peers.set_up(group, communication_stream(), gpu_stream)


def gpu_stream() -> mx.Stream:
    """Return this thread's second stream of the GPU."""
    if _streams.gpu is None:
        _streams.gpu = mx.new_stream(mx.Device(mx.gpu))
    return _streams.gpu


@cache
def _gather(group: Group, in_sequence: bool) -> Callable[[list[mx.array]], list[mx.array]]:
    """Return the function of `gathered` for a group."""
    ranks = group.size()

    @mx.custom_function
    def gather(parts: list[mx.array]) -> list[mx.array]:
        made: list[mx.array] = []
        for part in parts:
            # the order of collectives must be the same on all ranks, whatever they compute in between
            whole = mx.distributed.all_gather(after(part, made), group=group, stream=communication_stream())
            made.append(whole.reshape(ranks, *part.shape))
        return [*made, cast("mx.array", mx.depends(mx.zeros(1), made))]

    def scatter(primals: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[mx.array]:
        made: list[mx.array] = []
        for cotangent in cotangents[:-1]:
            # after the gather, which a rank that uses nothing of it would not compute
            made.append(_sum_of_own(after(cotangent, made or outputs), group))
        size = sum(cotangent.nbytes for cotangent in cotangents[:-1]) // ranks
        count_bytes((ranks - 1) * size, (ranks - 1) * size)
        return submitted(all_or_none(made), in_sequence)

    gather.vjp(scatter)
    return cast("Callable[[list[mx.array]], list[mx.array]]", gather)


def together(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays; the gradients of all of them become available at once.

    Collectives that take these gradients then follow all collectives that computing them takes, on every rank.
    """
    return cast("list[mx.array]", _together(list(arrays)))


@mx.custom_function
def _together(arrays: list[mx.array]) -> list[mx.array]:
    return list(arrays)


@_together.vjp
def _together_vjp(primals: Any, cotangents: Sequence[mx.array], outputs: Any) -> list[mx.array]:
    return all_or_none(cotangents)


def after(array: mx.array, made: Sequence[mx.array]) -> mx.array:
    """Return the array, available once what was made before is."""
    return cast("mx.array", mx.depends(array, made[-1])) if made else array


def all_or_none(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays, each available once all are.

    A rank whose results need one of several collectives takes part in the others too, as ranks do that need these.
    """
    return [cast("mx.array", mx.depends(array, list(arrays))) for array in arrays]


def _sum_of_own(cotangent: mx.array, group: Group) -> mx.array:
    """Return the sum over the ranks of this rank's part of (ranks, *shape); half precision is added in float32."""
    stream, ranks = communication_stream(), group.size()
    wide = cotangent.astype(_WIDE) if ranks > 2 else cotangent
    if transport() in ("nccl", "jaccl"):
        flat = wide.reshape(ranks * wide.shape[1], *wide.shape[2:])
        mine = mx.distributed.sum_scatter(flat, group=group, stream=stream)
    else:
        mine = mx.distributed.all_sum(wide, group=group, stream=stream)[group.rank()]
    return mine.astype(cotangent.dtype)
