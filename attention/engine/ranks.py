"""Several ranks, processes with a device each, as one engine: rank 0 runs the cases and commands, the others obey.

    rank 0          take_sample(3)  ─▶ command ─┐               ┌─▶ 3 calls, evaluated ─┐              ┌─▶ the slowest
    rank 1, 2, ..   obey()          ─▶ wait    ─┴─ all_gather ──┴─▶ 3 calls, evaluated ─┴─ all_gather ─┘   rank's time

A command is five whole numbers that every rank gathers, so that all ranks leave it together. What a rank raises is
reported by the process that started it (`core.events.RankFailed`): the other ranks wait in MLX, which has no time-outs.
"""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from statistics import median
from typing import Any, Final, Protocol

import mlx.core as mx
from msgspec import Struct, structs

from attention import implementations
from attention.core import events as on
from attention.core.errors import UnsupportedError, UsageError, error_line, truncated
from attention.core.plan import Plan, RankSetting
from attention.core.results import Peaks, RankFigures
from attention.core.route import Needs, Route, unsupported, validated_route
from attention.core.workload import Workload
from attention.distributed.bound_call import BoundCall
from attention.distributed.collectives import communication_stream, peer_copies
from attention.distributed.decision import DEFAULT_FLOPS_PER_S, Decision, Link, decide
from attention.engine.peaks import measure_peaks
from attention.implementations.calls import peak_bytes_of
from attention.implementations.protocol import (
    Implementation,
    ProvidesRunner,
    ReturnsLogsumexp,
    build,
    missing_feature,
    needs_building,
)
from attention.measure.device import Device

COMPUTE_EVERY: Final = 4
"""One sample of this many is followed by the same calls without communication."""
SIGNATURE_BYTES: Final = 256
"""Bytes of the text by which ranks check that they prepare the same call."""
LOST_PEER: Final = ("connection to a peer was lost", "ncclremoteerror", "ncclsystemerror", "broken pipe")
"""Texts of MLX's errors when another rank has ended."""


PROBE_WORDS: Final = 2**16
"""float32 numbers that each rank sends first when the link is measured; four times as many until it takes PROBE_S."""
PROBE_S: Final = 0.05
MAX_PROBE_WORDS: Final = 2**22
LATENCIES: Final = 8
"""Multiple of the latency that a gather takes at least from which the bandwidth is computed."""
PROBE_REPEATS: Final = 3
PROBE_MERGES: Final = 50
PEAKS_S: Final = 0.3
"""Seconds in which a rank measures its best rate."""
UNEVEN: Final = 1.25
"""Ratio of the fastest rank's speed to the slowest's, above which the split of a call follows the speeds."""


class RankError(RuntimeError):
    """A rank cannot go on, and its group with it.

    Attributes:
        fatal: whether another attempt would fail alike.
    """

    def __init__(self, reason: str, *, fatal: bool = False) -> None:
        super().__init__(reason)
        self.fatal = fatal


class RankStatus:
    """What a rank does now, for its heartbeat; written by the main thread.

    Attributes:
        joined: whether the group has been formed.
        commands: number of commands begun.
        busy: whether one is being executed.
        running: the implementation of the current command, if any.
    """

    def __init__(self) -> None:
        self.joined = self.busy = False
        self.commands = 0
        self.running: str | None = None


def pin_cores(setting: RankSetting) -> None:
    """Give each rank of a host its own cores, if there are enough: MLX's ring waits actively, as do the kernels."""
    if not hasattr(os, "sched_setaffinity") or setting.places < 2:
        return
    cores = sorted(os.sched_getaffinity(0))
    own = cores[setting.place * len(cores) // setting.places : (setting.place + 1) * len(cores) // setting.places]
    if own:
        for thread in Path("/proc/self/task").iterdir():  # those of libraries, too
            os.sched_setaffinity(int(thread.name), own)


def backend_of(setting: RankSetting, device: Device) -> str:
    """Return MLX's distributed backend for a group."""
    return setting.backend or ("nccl" if device.backend == "cuda" else "ring")


def join(setting: RankSetting, backend: str) -> mx.distributed.Group:
    """Form the group, through the environment variables that `mlx.launch` sets.

    Raises:
        RankError: the backend is missing, a port is in use, or another rank cannot be reached.
    """
    if not mx.distributed.is_available(backend):
        reason = f"this MLX has no distributed backend '{backend}'"
        remedy = "; mlx[cuda12] and mlx[cuda13] have NCCL" if backend == "nccl" else ""
        raise RankError(reason + remedy, fatal=True)
    os.environ.update(MLX_RANK=str(setting.rank), MLX_WORLD_SIZE=str(setting.ranks))
    host, _, port = setting.coordinator.rpartition(":")
    files = []
    if backend == "ring":
        files.append(_file_for("MLX_HOSTFILE", [[address] for address in setting.addresses]))
    elif backend == "nccl":
        os.environ.update(NCCL_HOST_IP=host, NCCL_PORT=port)
    else:
        os.environ["MLX_JACCL_COORDINATOR"] = setting.coordinator
        files.append(_file_for("MLX_IBV_DEVICES", setting.rdma))
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise RankError(_join_reason(str(error), setting, backend), fatal=True) from error
    finally:
        for file in files:
            Path(file).unlink()


def _file_for(variable: str, content: object) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(content, file)
    os.environ[variable] = file.name
    return file.name


def _join_reason(text: str, setting: RankSetting, backend: str) -> str:
    listens = setting.addresses[setting.rank] if backend == "ring" else setting.coordinator
    if "bind" in text or "error: 98" in text or "error: 48" in text:  # EADDRINUSE on Linux and on macOS
        return f"its address {listens} is in use, or is not this machine's; another port: --hosts HOST:PORT,..."
    return f"no {backend} group: {text}"


def failure(rank: int, error: BaseException, running: str | None = None) -> on.RankFailed:
    """Return the event of a rank that an exception has ended."""
    reason = str(error) if isinstance(error, RankError) else error_line(error)
    text = reason.lower()
    return on.RankFailed(
        rank=rank,
        reason=truncated(reason),
        running=running,
        lost_peer=any(part in text for part in LOST_PEER),
        fatal=isinstance(error, RankError) and error.fatal,
    )


def workload_of_one(workload: Workload) -> Workload:
    """Return the same call on one device."""
    return structs.replace(workload, ranks=1)


class Conditions(Struct, frozen=True, kw_only=True):
    """What was measured of a group, on which the division of calls depends; the same on every rank."""

    link: Link
    flops_per_s: float
    """The best rate of the slowest rank."""
    memory_bytes_per_s: float | None = None
    """Bytes read and written by the best copy of the rank whose memory is slowest."""
    weights: tuple[float, ...] | None = None
    """Speeds of the ranks relative to each other; None if they are alike."""

    @property
    def text(self) -> str:
        """The link, and the speeds if they differ, in words."""
        link = f"a link of {self.link.bytes_per_s / 1e9:.3g} GB/s and {self.link.latency_s * 1e6:.0f} µs"
        if self.weights is None:
            return link
        return f"{link}, speeds {' : '.join(f'{weight:.2f}' for weight in self.weights)}"


def gather(group: mx.distributed.Group, rows: list[list[Any]], dtype: mx.Dtype) -> Any:
    """Gather the same number of rows from every rank."""
    mine = mx.array(rows, dtype=dtype)
    return mx.distributed.all_gather(mine, group=group, stream=communication_stream()).tolist()


def measure_group(group: mx.distributed.Group, device: Device, peaks: Peaks | None, *, alike: bool) -> Conditions:
    """Measure a group's link and speeds; all ranks do so at the same time.

    Args:
        group: MLX's group.
        device: this rank's device.
        peaks: rates of such a device, if known.
        alike: whether all devices are of one machine, so that their speeds are taken as equal.
    """
    known = peaks if peaks and alike else measure_peaks(device, PEAKS_S)
    measured = gather(group, [[known.flops_per_s or 0.0, known.copy_bytes_per_s or 0.0]], mx.float32)
    rates, copies = zip(*measured, strict=True)
    uneven = not alike and min(rates) > 0 and max(rates) > UNEVEN * min(rates)
    return Conditions(
        link=_measure_link(group),
        flops_per_s=min(rates) or DEFAULT_FLOPS_PER_S,
        memory_bytes_per_s=min(copies) or None,
        weights=tuple(rate / max(rates) for rate in rates) if uneven else None,
    )


def _measure_link(group: mx.distributed.Group) -> Link:
    """Measure an all_gather of few numbers, and of so many that it takes a while; of each the median."""
    latency_s, words = _gather_s(group, 1), PROBE_WORDS
    enough_s = max(PROBE_S, LATENCIES * latency_s)
    while (seconds := _gather_s(group, words)) < enough_s and words < MAX_PROBE_WORDS:
        words *= 4
    received = 4 * words * (group.size() - 1)
    bytes_per_s = received / max(seconds - latency_s, seconds / 2)
    return Link(bytes_per_s=bytes_per_s, latency_s=latency_s, merge_s=_merge_s(group))


def _merge_s(group: mx.distributed.Group) -> float | None:
    """Return the seconds of a merge of partial results of a few rows by peer copies, or None without these."""
    peers, _ = peer_copies(group)
    if peers is None:
        return None
    partial = [mx.zeros((1, 32, 1, 128), mx.bfloat16), mx.zeros((1, 32, 1))]
    times = []
    for _ in range(PROBE_REPEATS + 1):
        gather(group, [[0.0]], mx.float32)
        started = time.perf_counter()
        for _ in range(PROBE_MERGES):
            partial = peers.merge(partial[0], partial[1], True)
        mx.eval(partial)
        times.append((time.perf_counter() - started) / PROBE_MERGES)
    return float(max(taken for (taken,) in gather(group, [[median(times[1:])]], mx.float32)))


def _gather_s(group: mx.distributed.Group, words: int) -> float:
    """Return the seconds of an all_gather of some float32 numbers, those of the slowest rank."""
    numbers, times = mx.zeros((1, words)), []
    mx.eval(numbers)
    for _ in range(PROBE_REPEATS + 1):
        started = time.perf_counter()
        mx.eval(mx.distributed.all_gather(numbers, group=group, stream=communication_stream()))
        times.append(time.perf_counter() - started)
    return float(max(taken for (taken,) in gather(group, [[median(times[1:])]], mx.float32)))


def divide(workload: Workload, conditions: Conditions | None) -> Decision:
    """Choose how the ranks share a call whose rows are sharded by sequence, as in a model.

    Raises:
        UsageError: it cannot be shared.
    """
    if conditions is None:
        return decide(workload, workload.ranks, sharded_by="sequence")
    return decide(
        workload,
        workload.ranks,
        sharded_by="sequence",
        link=conditions.link,
        flops_per_s=conditions.flops_per_s,
        memory_bytes_per_s=conditions.memory_bytes_per_s,
        weights=conditions.weights,
    )


def ranks_route(
    implementation: Implementation, workload: Workload, device: Device, conditions: Conditions | None = None
) -> Route:
    """Return the route of an implementation whose call is divided among ranks, each with such a device.

    `conditions`: what was measured of the group; before a run that is not known.
    """
    if missing := missing_feature(implementation, workload):
        return unsupported(missing)
    merges = isinstance(implementation, ReturnsLogsumexp)
    if isinstance(implementation, ProvidesRunner) and not merges:
        return unsupported(f"{implementation.name} computes outside MLX, on one device")
    alone = validated_route(implementation.route(workload_of_one(workload), device))
    if not alone.supported:
        return alone
    try:
        decision = divide(workload, conditions)
    except (UsageError, UnsupportedError) as error:
        return unsupported(str(error))
    if decision.method == "split keys" and not merges:
        return unsupported(f"{implementation.name} returns no logsumexp, by which ranks merge their parts of a step")
    if decision.method == "split keys":
        needs = Needs(logsumexp=True)
        alone = validated_route(implementation.route(workload_of_one(workload), device, needs))
        if not alone.supported:
            return alone
    part = None if alone.predicted_bytes is None else alone.predicted_bytes // workload.ranks
    return structs.replace(
        alone,
        path=f"x{workload.ranks} {alone.path}",
        reason=f"{decision.reason.removesuffix('.')}; each rank: {alone.reason}",
        predicted_bytes=None if part is None else part + workload.key_value_bytes,
    )


def route_here(implementation: Implementation, workload: Workload, device: Device) -> Route:
    """Return an implementation's route on this machine, whose devices are like the given one."""
    if workload.ranks == 1:
        route = implementation.route(workload, device)
        missing = missing_feature(implementation, workload) if route.supported else None
        return unsupported(missing) if missing else route
    if device.backend != "cpu" and workload.ranks > device.count:
        have = "one" if device.count == 1 else str(device.count)
        reason = f"{workload.ranks} ranks need as many GPUs, and this machine has {have}"
        return unsupported(f"{reason}; --hosts names others")
    return ranks_route(implementation, workload, device)


class LinkCheck:
    """Whether the rank before this one in the ring is reachable, by a datagram a second, apart from MLX.

    The datagrams go to the UDP port of the number on which the ring listens for TCP. Where none ever arrives, behind a
    firewall say, the check says nothing.
    """

    def __init__(self, addresses: Sequence[str], rank: int) -> None:
        self._next = _address(addresses[(rank + 1) % len(addresses)])
        self._heard: float | None = None
        self._socket: socket.socket | None = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(_address(addresses[rank]))
        except OSError:
            self._socket.close()
            self._socket = None

    def beat(self) -> float | None:
        """Send a datagram to the next rank; return the seconds since one came from the rank before."""
        if self._socket is None:
            return None
        now = time.monotonic()
        with contextlib.suppress(OSError):  # no route: the rank after this one will notice the silence
            self._socket.sendto(b"here", self._next)
        with contextlib.suppress(OSError):  # nothing more has come
            while self._socket.recv(16):
                self._heard = now
        return None if self._heard is None else now - self._heard


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


class RankCall(Protocol):
    """A call that all ranks make together, bound to its inputs on this rank."""

    steps: int
    """Steps of one call; times and bytes are those of a step."""

    def prepare(self) -> None:
        """Restore what a call uses up; not timed."""
        ...

    def queue(self) -> object:
        """Queue one call and return its outputs, unevaluated."""
        ...

    def queue_compute(self) -> object | None:
        """Queue the same computation without communication; None if there is no such thing."""
        ...

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the outputs of all queued calls."""
        ...

    def results(self) -> list[mx.array]:
        """Run one call and return its whole results, on every rank."""
        ...

    def sent_bytes(self) -> int:
        """Return the bytes that this rank sends in one call."""
        ...


class MakesCalls(Protocol):
    """What is run on several ranks: the calls of a plan's cases."""

    def signature(self, case: int, name: str) -> str:
        """Describe a call; ranks whose texts differ do not make the same."""
        ...

    def make(self, case: int, name: str) -> RankCall:
        """Bind an implementation to a case's inputs."""
        ...


class AttentionCall:
    """A call of attention."""

    steps = 1

    def __init__(self, bound: BoundCall) -> None:
        self._bound = bound
        self.queue, self.queue_compute, self.wait = bound.queue, bound.queue_compute, bound.wait

    def prepare(self) -> None:
        """Do nothing: inputs stay as they are."""

    def results(self) -> list[mx.array]:
        """Run one call and return the output, and in training dQ, dK and dV."""
        return self._bound.gather_results()

    def sent_bytes(self) -> int:
        """Return the bytes that this rank sends in one call."""
        return self._bound.bytes_sent


class AttentionCalls:
    """The calls of a plan over attention shapes."""

    def __init__(self, plan: Plan, group: mx.distributed.Group, device: Device, conditions: Conditions) -> None:
        self._plan, self._group, self._device, self._conditions = plan, group, device, conditions

    def signature(self, case: int, name: str) -> str:
        """Return the case and the path."""
        workload = self._plan.cases[case]
        route = ranks_route(implementations.load_implementation(name), workload, self._device, self._conditions)
        return f"{workload.label} by {route.path if route.supported else route.reason}"

    def make(self, case: int, name: str) -> RankCall:
        """Compile what is needed, and make this rank's part of the inputs."""
        workload, implementation = self._plan.cases[case], implementations.load_implementation(name)
        local = workload_of_one(workload)
        if needs_building(implementation, local, self._device):
            build(implementation, local, lambda text: None)
        decision = divide(workload, self._conditions)
        bound = BoundCall(workload, self._group, decision, implementation, seed=self._plan.seed)
        return AttentionCall(bound)


class Order(IntEnum):
    """What rank 0 commands."""

    BIND = 1
    RESULTS = 2
    MEMORY = 3
    SAMPLE = 4
    END = 5


class Command(Struct, frozen=True):
    """One command: what to do with which implementation of which case, and how many calls."""

    order: Order
    case: int = 0
    implementation: int = 0
    calls: int = 0
    compute: bool = False
    """Whether a sample is followed by one without communication."""


class Member:
    """One rank's part in a run: rank 0 commands, the others obey.

    Attributes:
        group: MLX's group.
        status: updated for the heartbeat.
        conditions: what was measured of the group.
        makes: makes this rank's calls.
    """

    def __init__(
        self,
        group: mx.distributed.Group,
        names: Sequence[str],
        makes: MakesCalls,
        status: RankStatus,
        conditions: Conditions,
    ) -> None:
        """Create it on each rank.

        Args:
            group: MLX's group.
            names: the implementations.
            makes: makes this rank's calls.
            status: updated for the heartbeat.
            conditions: what was measured of the group.
        """
        self.group, self.status, self.conditions = group, status, conditions
        self._names, self.makes = names, makes
        self._calls: dict[tuple[int, int], RankCall] = {}
        self._whole: list[mx.array] = []

    def obey(self) -> None:
        """Execute rank 0's commands until it ends the run."""
        while (command := self._meet(None)).order is not Order.END:
            self._execute(command)
            self.status.busy = False

    def command(self, command: Command) -> list[list[float]]:
        """Make all ranks execute a command; return what each has measured."""
        self._meet(command)
        measured = self._execute(command)
        self.status.busy = False
        return measured

    def results(self, case: int, implementation: int) -> list[mx.array]:
        """Make all ranks run one call; return its whole output, and in training the whole gradients."""
        self.command(Command(Order.RESULTS, case, implementation))
        return self._whole

    def end(self) -> None:
        """Let the other ranks end."""
        self._meet(Command(Order.END))

    def _meet(self, command: Command | None) -> Command:
        """Gather rank 0's command on all ranks."""
        if command is None:
            numbers = [0] * 5
        else:
            self._begin(command)
            numbers = [command.order, command.case, command.implementation, command.calls, command.compute]
        order, case, implementation, calls, compute = gather(self.group, [numbers], mx.int32)[0]
        command = Command(Order(order), case, implementation, calls, bool(compute))
        if self.group.rank():
            self._begin(command)
        return command

    def _begin(self, command: Command) -> None:
        self.status.commands += 1
        self.status.running = None if command.order is Order.END else self._names[command.implementation]
        self.status.busy = True

    def _execute(self, command: Command) -> list[list[float]]:
        key = command.case, command.implementation
        match command.order:
            case Order.BIND:
                self._bind(key)
            case Order.RESULTS:
                self._whole = self._calls[key].results()
            case Order.MEMORY:
                return self._share([self._peak_bytes(self._calls[key])])
            case Order.SAMPLE:
                return self._share(self._sample(self._calls[key], command.calls, command.compute))
        return []

    def _share(self, numbers: Sequence[float]) -> list[list[float]]:
        """Gather some numbers of every rank."""
        gathered: list[list[float]] = gather(self.group, [list(numbers)], mx.float32)
        return gathered

    def _bind(self, key: tuple[int, int]) -> None:
        """Prepare a call, forgetting those of earlier cases, after checking that all ranks prepare the same."""
        case, name = key[0], self._names[key[1]]
        self._calls = {known: call for known, call in self._calls.items() if known[0] == case}
        self._check_alike(self.makes.signature(case, name))
        self._calls[key] = self.makes.make(case, name)

    def _check_alike(self, text: str) -> None:
        """Raise RankError on each rank that prepares another call than rank 0."""
        own = text.encode()[:SIGNATURE_BYTES].ljust(SIGNATURE_BYTES)
        first = bytes(gather(self.group, [list(own)], mx.int32)[0])
        if first != own:
            raise RankError(f"it would run {own.decode(errors='replace').strip()}, rank 0 {first.decode().strip()}")

    @staticmethod
    def _peak_bytes(call: RankCall) -> int:
        call.prepare()
        return peak_bytes_of(lambda: call.wait([call.queue()]))

    def _sample(self, call: RankCall, calls: int, compute: bool) -> tuple[float, float, float]:
        """Return the seconds of a step with and without communication (0 if not measured), and the bytes sent."""
        call.prepare()
        self._share([0.0])  # what is not timed takes different times
        started = time.perf_counter()
        call.wait([call.queue() for _ in range(calls)])
        call_s, compute_s = (time.perf_counter() - started) / calls, 0.0
        if compute:
            self._share([0.0])
            started = time.perf_counter()
            outputs = [call.queue_compute() for _ in range(calls)]
            if outputs[0] is not None:
                call.wait(outputs)
                compute_s = (time.perf_counter() - started) / calls
        return call_s / call.steps, compute_s / call.steps, call.sent_bytes() / call.steps


class RankCalls:
    """Calls of one implementation on one case by all ranks, as rank 0 times them; `measure.rounds.Runner`."""

    def __init__(self, member: Member, case: int, name: str, names: Sequence[str]) -> None:
        self._member, self._case, self._number = member, case, names.index(name)
        self._samples: list[list[list[float]]] = []
        self._peaks: list[int] = []
        member.command(Command(Order.BIND, case, self._number))

    def results(self) -> list[mx.array]:
        """Run one call; return its whole output, and in training the whole gradients."""
        return self._member.results(self._case, self._number)

    def peak_bytes(self) -> int:
        """Run one call; return the largest peak memory above the inputs of any rank."""
        gathered = self._member.command(Command(Order.MEMORY, self._case, self._number))
        self._peaks = [int(peak) for (peak,) in gathered]
        return max(self._peaks)

    def take_sample(self, calls: int) -> float:
        """Run some calls on all ranks; return the slowest rank's seconds per call."""
        compute = len(self._samples) % COMPUTE_EVERY == 0
        command = Command(Order.SAMPLE, self._case, self._number, calls, compute)
        self._samples.append(self._member.command(command))
        return max(times[0] for times in self._samples[-1])

    def begin_rounds(self) -> None:
        """Forget the samples of the warm-up."""
        self._samples = []

    def figures(self) -> tuple[RankFigures, ...]:
        """Return the medians of each rank; empty before the first sample."""
        made = []
        for rank, samples in enumerate(zip(*self._samples, strict=True)):
            computing = [compute for _, compute, _ in samples if compute]
            made.append(
                RankFigures(
                    rank=rank,
                    call_s=median(call for call, _, _ in samples),
                    compute_s=median(computing) if computing else None,
                    sent_bytes=int(samples[-1][2]),
                    peak_bytes=self._peaks[rank] if self._peaks else None,
                )
            )
        return tuple(made)

    def queue(self) -> object:
        """Queue nothing: calls of a group are timed on all ranks at once."""
        raise TypeError("calls on several ranks are sampled by take_sample()")

    def wait(self, outputs: Sequence[object]) -> None:
        """See queue()."""
        self.queue()
