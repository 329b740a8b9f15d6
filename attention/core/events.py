"""Events of a worker, one JSON line each; and the delivery of tuning events to a run or to the log."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final, Literal, get_args

import msgspec

from attention.core.errors import Remedy
from attention.core.results import Conditions, Environment, Fingerprint, MachineState, Peaks, RankFigures, Ratio
from attention.core.route import Route
from attention.core.stream import StreamBlock
from attention.core.workload import Counterpart

Step = Literal[
    "build", "first call", "accuracy", "memory", "warm up", "latency", "rounds", "energy", "training", "stream"
]
Ending = Literal["failed", "refused", "unsupported"]
REPEATED_REFERENCE = "(again)"
"""Name of the reference's second arm among the samples; it gives the noise floor."""
WITHOUT_ATTENTION = "(no attention)"
"""Name, among the samples, of the model whose attention returns its query unchanged."""


class Event(msgspec.Struct, kw_only=True, tag_field="event"):
    """Base class of all events."""


class RunStarted(Event, tag="run_started"):
    """The worker has started; carries its environment."""

    environment: Environment
    fingerprint: Fingerprint | None = None


class PeaksMeasured(Event, tag="peaks_measured"):
    """The best matmul and copy rates were measured."""

    peaks: Peaks


class ConditionsMeasured(Event, tag="conditions_measured"):
    """What else went on on this machine while a case was measured."""

    conditions: Conditions


class CaseStarted(Event, tag="case_started"):
    """A case begins; the implementations follow, one step after another."""

    case: int


class RouteFound(Event, tag="route_found"):
    """The path that an implementation will take."""

    case: int
    implementation: str
    route: Route


class StepStarted(Event, tag="step_started"):
    """An implementation begins a step; a crash of the worker is attributed to it."""

    case: int
    implementation: str
    step: Step


class RowEnded(Event, tag="row_ended"):
    """An implementation's row has ended without result: refused, unsupported, failed."""

    case: int
    implementation: str
    status: Ending
    reason: str


class FirstCall(Event, tag="first_call"):
    """The first call was timed."""

    case: int
    implementation: str
    seconds: float


class AccuracyChecked(Event, tag="checked"):
    """The result was compared with the float64 reference."""

    case: int
    implementation: str
    max_error: float | None
    """None if the result contains NaN or infinity."""
    rms_error: float | None
    accurate: bool
    detail: str
    """The tensor with the largest error, and its tolerance."""
    kv_error: float | None = None
    """RMS difference from attention over the keys and values before they were quantized, relative to its RMS."""
    kl_divergence: float | None = None
    """Of the distribution of a model's next token from that with an unquantized cache, in nats."""


class MemoryMeasured(Event, tag="memory_measured"):
    """Peak memory above the inputs, measured in a separate pass."""

    case: int
    implementation: str
    peak_bytes: int | None


class LatencyMeasured(Event, tag="latency_measured"):
    """Median time of one evaluated, synchronised call."""

    case: int
    implementation: str
    seconds: float


class CallTimed(Event, tag="call_timed"):
    """One call was timed, for an estimate of what a plan costs."""

    case: int
    implementation: str
    flops: int
    """Of the call: those of the case, or of a smaller one like it."""
    seconds: float


class EnergyMeasured(Event, tag="energy_measured"):
    """Energy of the device in one call, measured after the rounds."""

    case: int
    implementation: str
    joules: float


class RanksMeasured(Event, tag="ranks_measured"):
    """Time, waiting and bytes of each rank in an implementation's calls, up to now."""

    case: int
    implementation: str
    per_rank: tuple[RankFigures, ...]


class ReferenceChosen(Event, tag="reference_chosen"):
    """The reference of a case's speedups was chosen."""

    case: int
    implementation: str


class RoundsDone(Event, tag="rounds_done"):
    """New samples, in round order; the same number for every implementation still measured."""

    case: int
    samples: dict[str, list[float | None]]
    """Seconds per call, None for a round without a sample; the noise floor's arm is under REPEATED_REFERENCE."""
    active_bytes: int
    """MLX's active memory after the last round."""
    peak_bytes: int
    """MLX's peak memory since the rounds began."""
    counterparts: dict[Counterpart, dict[str, list[float | None]]] = {}
    """Samples of implementations on the case's counterparts."""


class WeightsLoaded(Event, tag="weights_made"):
    """The weights of a case's model are in memory."""

    case: int
    weights_bytes: int
    """Size of the whole model, even if only some layers run."""


class CacheMeasured(Event, tag="cache_measured"):
    """The caches of a case's model after its prompts."""

    case: int
    kv_token_bytes: int
    """Bytes of the keys and values of one token in all layers of the whole model."""
    cache_bytes: int
    """Bytes of the caches of all layers of the whole model, unused rows included."""


class PassesShared(Event, tag="passes_shared"):
    """All implementations of a case attend in the same passes of its model, and share the time of the rest."""

    case: int


class CallsCounted(Event, tag="calls_counted"):
    """Number of attention calls in a model's first run or trace, by what computed them."""

    case: int
    implementation: str
    replaced: int
    """Calls computed by the implementation."""
    passed_on: int
    """Calls it does not support, computed by MLX's own function."""
    reason: str | None = None
    """Why calls were passed on."""
    path: str | None = None
    """The path of most of the computed calls; None without any."""


class CaseTimeEstimated(Event, tag="expected"):
    """Estimated time of a case from one timed call; emitted before its rounds."""

    case: int
    seconds: float
    """Seconds for all implementations, preparation and rounds."""
    implementations: int


class LayersTimed(Event, tag="layers_timed"):
    """Time of one layer and of everything else, from runs with two numbers of layers."""

    case: int
    implementation: str
    layer_s: float
    fixed_s: float


class IterationDone(Event, tag="iteration_done"):
    """One iteration of a fine-tuning."""

    case: int
    implementation: str
    """REPEATED_REFERENCE for the reference's second fine-tuning."""
    number: int
    """From 1; the first one compiles."""
    loss: float | None
    """None if it is not finite."""
    seconds: float
    active_bytes: int
    peak_bytes: int


class StreamAdvanced(Event, tag="stream_advanced"):
    """Further blocks of a stream's tokens."""

    case: int
    implementation: str
    blocks: list[StreamBlock]


class BoundMeasured(Event, tag="bound_measured"):
    """The shortest time in which the keys and values that a token attends to can be read."""

    case: int
    implementation: str
    seconds: float


class BareLoopMeasured(Event, tag="bare_loop_measured"):
    """Steps of a loop that does nothing for as long as a token takes: what the system interrupts."""

    case: int
    implementation: str
    bins: dict[int, int]
    """Number of steps by bin of their time, see `core.stream.bin_of`."""


class Progress(Event, tag="progress"):
    """Progress of the run."""

    done: float
    """From 0 to 1."""
    remaining_s: float
    now: str
    """What runs now, in words."""
    case_s: float | None = None
    """Seconds left of the current case."""
    least_s: float = 0.0
    """Seconds of what follows the current step, which remain however long it takes."""
    sure: bool = True
    """Whether a call of everything that is left has been timed, or something of its kind; else it is a guess."""

    def left_s(self, since_s: float) -> float:
        """Return the seconds left some time after the event; below zero if it takes longer than estimated."""
        left = self.remaining_s - since_s
        return max(left, self.least_s) if self.least_s > 0 else left

    def case_left_s(self, since_s: float) -> float | None:
        """Return the seconds left of the case, at least what follows its current step."""
        if self.case_s is None:
            return None
        return max(self.case_s - since_s, self.least_s - (self.remaining_s - self.case_s), 0.0)


class CaseDone(Event, tag="case_done"):
    """A case is complete."""

    case: int
    stopped_by: str


class Message(Event, tag="message"):
    """A log message."""

    level: Literal["info", "warning", "error"]
    text: str


class TrialStarted(Event, tag="trial_started"):
    """An autotuning implementation begins a trial."""

    implementation: str
    workload: str
    """The workload class of the trial, as text."""
    candidates: list[str]


class Tuned(Event, tag="tuned"):
    """A trial has ended."""

    implementation: str
    workload: str
    winner: str
    runner_up: str | None
    """None if nothing else ran."""
    ratio: Ratio | None
    """Speedup over the runner-up, from interleaved pairs."""
    seconds: float
    """Duration of the trial."""


class Switched(Event, tag="switched"):
    """A tuned choice was replaced in use."""

    implementation: str
    workload: str
    before: str
    after: str
    ratio: Ratio
    """Speedup over the former choice, from pairs of calls."""
    reason: str
    """Why the alternative was tried."""


class RankStarted(Event, tag="rank_started"):
    """A rank's process is ready; the ranks of a group must agree in `code`, `mlx` and `python`."""

    rank: int
    process_id: int
    host: str
    device: str
    backend: str
    code: str
    """Digest of the engine's source."""
    mlx: str
    python: str


class RankAlive(Event, tag="rank_alive"):
    """A rank's process runs; sent about once a second."""

    rank: int
    commands: int
    """Commands of rank 0 that it has begun."""
    busy: bool
    """Whether it executes one."""
    joined: bool = True
    """Whether its group has been formed."""
    running: str | None = None
    """The implementation of the latest command."""
    silent_link_s: float | None = None
    """Seconds since anything arrived from the rank before it, checked apart from MLX; None if that is not known."""
    active_bytes: int | None = None
    """MLX's active memory."""


class RankFailed(Event, tag="rank_failed"):
    """A rank cannot go on; the others wait for it, so that the whole group must be restarted."""

    rank: int
    reason: str
    running: str | None = None
    """The implementation whose call it was executing."""
    lost_peer: bool = False
    """Whether it only lost its connection to another rank, whose end is the cause."""
    fatal: bool = False
    """Whether no group can be formed, so that another attempt would fail alike."""


class RunDone(Event, tag="run_done"):
    """All cases are complete; the worker ends."""

    state: MachineState | None = None


class WorkerUnusable(Event, tag="worker_unusable"):
    """The device is in an undefined state after a failure; a new worker must continue."""

    case: int


class RunRefused(Event, tag="run_refused"):
    """Nothing can run here; carries the reason for the user."""

    kind: Literal["usage", "no backend", "cannot start"]
    reason: str
    why: str = ""
    """The cause of the reason, such as the text of an exception."""
    remedy: Remedy | None = None


StreamRowEvent = StreamAdvanced | BoundMeasured | BareLoopMeasured
RowEvent = (
    RouteFound
    | StepStarted
    | RowEnded
    | FirstCall
    | AccuracyChecked
    | MemoryMeasured
    | LatencyMeasured
    | EnergyMeasured
    | RanksMeasured
)
ModelRowEvent = CallsCounted | LayersTimed
CaseEvent = (
    CaseStarted
    | ReferenceChosen
    | RoundsDone
    | WeightsLoaded
    | CacheMeasured
    | PassesShared
    | CaseTimeEstimated
    | CallTimed
    | IterationDone
    | CaseDone
    | RowEvent
    | ModelRowEvent
    | StreamRowEvent
)
TuningEvent = TrialStarted | Tuned | Switched
RankEvent = RankStarted | RankAlive | RankFailed
AnyEvent = (
    RunStarted
    | PeaksMeasured
    | ConditionsMeasured
    | Progress
    | Message
    | WorkerUnusable
    | RunRefused
    | RunDone
    | TuningEvent
    | CaseEvent
    | RankEvent
)


class _Kind(msgspec.Struct):
    event: str


_KINDS = frozenset(str(kind.__struct_config__.tag) for kind in get_args(AnyEvent))
_kind_decoder = msgspec.json.Decoder(_Kind)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """Encode an event as one line of JSON; invalid text is replaced."""
    try:
        return _encoder.encode(event) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, in an exception's text, say
        return _encoder.encode(_valid_text(msgspec.to_builtins(event))) + b"\n"


def _valid_text(value: object) -> object:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_valid_text(name): _valid_text(each) for name, each in value.items()}
    return [_valid_text(each) for each in value] if isinstance(value, list) else value


def decode(line: bytes) -> AnyEvent:
    """Decode one line; an event of an unknown kind becomes a message saying so.

    Raises:
        msgspec.DecodeError: the line is not an event.
    """
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError:
        kind = _kind_decoder.decode(line).event
        if kind in _KINDS:
            raise
        return Message(level="info", text=f"unknown event '{kind}' from the engine")


TuningListener = Callable[[TuningEvent | Message], None]
LOG_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_listeners: list[TuningListener] = []


@contextlib.contextmanager
def listening_to_tuning(listener: TuningListener) -> Iterator[None]:
    """Send all tuning events of this process to a listener instead of the log."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def emit_tuning(event: TuningEvent | Message) -> None:
    """Send a tuning event to all listeners; without any, log it as a line to the logger `attention`."""
    for listener in _listeners:
        listener(event)
    if not _listeners:
        level = event.level if isinstance(event, Message) else "info"
        logging.getLogger("attention").log(LOG_LEVELS[level], "%s", tuning_log_line(event))


def tuning_log_line(event: TuningEvent | Message) -> str:
    """Return a tuning event as a line of a log."""
    match event:
        case TrialStarted():
            return f"{event.implementation} tries {', '.join(event.candidates)} for {event.workload}"
        case Tuned():
            alone = "" if event.runner_up is None or event.ratio is None else _margin(event.ratio, event.runner_up)
            return (
                f"{event.implementation} takes {event.winner} for {event.workload}{alone}, after {event.seconds:.2g} s"
            )
        case Switched():
            change = f"{event.implementation} goes from {event.before} to {event.after} for {event.workload}"
            return f"{change}{_margin(event.ratio, event.before)}: {event.reason}"
        case Message():
            return event.text


def _margin(ratio: Ratio, other: str) -> str:
    return f", {ratio.value:.3g}x {other} ({ratio.low:.3g} to {ratio.high:.3g})"
