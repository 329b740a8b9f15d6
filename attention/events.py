"""What a worker tells while it runs: one JSON line for each event."""

from typing import Literal, get_args

import msgspec

from attention.report import Environment, Peaks, Ratio
from attention.route import Route

Step = Literal["build", "first call", "accuracy", "memory", "warm up", "latency", "rounds", "training"]
Ending = Literal["failed", "refused", "unsupported"]
AGAIN = "(again)"
"""The name under which the reference's second arm, the noise floor, stands among the samples."""
WITHOUT = "(no attention)"
"""The name under which a model whose attention does nothing stands among the samples."""


class Event(msgspec.Struct, kw_only=True, tag_field="event"):
    """The root of all events."""


class RunStarted(Event, tag="run_started"):
    """The worker is up, and says where."""

    environment: Environment


class PeaksMeasured(Event, tag="peaks_measured"):
    """The best matmul and copy rates were measured."""

    peaks: Peaks


class CaseStarted(Event, tag="case_started"):
    """A case begins; the implementations follow, one step after another."""

    case: int


class RouteFound(Event, tag="route_found"):
    """The path that an implementation will take."""

    case: int
    implementation: str
    route: Route


class StepStarted(Event, tag="step_started"):
    """An implementation begins a step; if the worker dies now, this is where."""

    case: int
    implementation: str
    step: Step


class RowEnded(Event, tag="row_ended"):
    """An implementation is out of the case: refused, unsupported, failed."""

    case: int
    implementation: str
    status: Ending
    reason: str


class FirstCall(Event, tag="first_call"):
    """The first call was timed."""

    case: int
    implementation: str
    seconds: float


class Checked(Event, tag="checked"):
    """The result was compared with the float64 reference."""

    case: int
    implementation: str
    max_error: float | None
    """None where the result holds NaN or infinity."""
    rms_error: float | None
    accurate: bool
    detail: str
    """Which tensor was worst, and what it was allowed."""


class MemoryMeasured(Event, tag="memory_measured"):
    """Peak memory above the inputs in a pass of its own."""

    case: int
    implementation: str
    peak_bytes: int | None


class LatencyMeasured(Event, tag="latency_measured"):
    """Median time of one evaluated, synchronised call."""

    case: int
    implementation: str
    seconds: float


class ReferenceChosen(Event, tag="reference_chosen"):
    """What the speedups of a case are relative to."""

    case: int
    implementation: str


class RoundsDone(Event, tag="rounds_done"):
    """New samples, in round order; the same number for every implementation that is still in."""

    case: int
    samples: dict[str, list[float | None]]
    """Seconds a call, None for a round that was sat out; the noise floor's arm under AGAIN."""
    active_bytes: int
    """MLX's active memory after the last round."""
    peak_bytes: int
    """MLX's peak memory since the rounds began."""


class WeightsMade(Event, tag="weights_made"):
    """The model of a case is there."""

    case: int
    weights_bytes: int
    """Of the whole model, whatever part of it runs."""


class CallsCounted(Event, tag="calls_counted"):
    """How often a model called attention in its first run or trace, and who computed it."""

    case: int
    implementation: str
    replaced: int
    """Computed by the implementation."""
    passed_on: int
    """Not taken by it, and computed by MLX's own."""
    reason: str | None = None
    """Why calls were passed on."""
    path: str | None = None
    """The path that most of the computed calls took; None where none was computed."""


class Expected(Event, tag="expected"):
    """How long a case will take from here, by what one timed call took; told before its rounds."""

    case: int
    seconds: float
    """Of all implementations, preparation and rounds."""
    implementations: int


class LayersTimed(Event, tag="layers_timed"):
    """What two numbers of layers say: the time of one layer, and of everything else."""

    case: int
    implementation: str
    layer_s: float
    fixed_s: float


class IterationDone(Event, tag="iteration_done"):
    """One iteration of a fine-tuning."""

    case: int
    implementation: str
    """AGAIN for the reference's second fine-tuning."""
    number: int
    """From 1; the first one compiles."""
    loss: float | None
    """None where it is no number."""
    seconds: float
    active_bytes: int
    peak_bytes: int


class Progress(Event, tag="progress"):
    """How far the run is."""

    done: float
    """From 0 to 1."""
    remaining_s: float
    now: str
    """What runs now, in words."""


class CaseDone(Event, tag="case_done"):
    """A case is complete."""

    case: int
    stopped_by: str


class Message(Event, tag="message"):
    """Something worth a line in the log."""

    level: Literal["info", "warning", "error"]
    text: str


class TrialStarted(Event, tag="trial_started"):
    """An implementation that chooses among others begins to try them."""

    implementation: str
    workload: str
    """What the choice will hold for, in words."""
    candidates: list[str]


class Tuned(Event, tag="tuned"):
    """A trial is over."""

    implementation: str
    workload: str
    winner: str
    runner_up: str | None
    """None where nothing else ran."""
    ratio: Ratio | None
    """How many times as fast as the runner-up, from interleaved pairs."""
    seconds: float
    """What the trial took."""


class Switched(Event, tag="switched"):
    """A choice was changed while calls were running."""

    implementation: str
    workload: str
    before: str
    after: str
    ratio: Ratio
    """How many times as fast as before, from pairs of calls."""
    reason: str
    """Why it was tried at all."""


class RunDone(Event, tag="run_done"):
    """All cases are complete; the worker ends."""


class WorkerUnusable(Event, tag="worker_unusable"):
    """The device is in an unknown state after a failure; a new worker must go on."""

    case: int


class RunRefused(Event, tag="run_refused"):
    """Nothing can run here; the reason is the user's to read."""

    kind: Literal["usage", "no backend", "cannot start"]
    reason: str


RowEvent = RouteFound | StepStarted | RowEnded | FirstCall | Checked | MemoryMeasured | LatencyMeasured
ModelRowEvent = CallsCounted | LayersTimed
CaseEvent = (
    CaseStarted
    | ReferenceChosen
    | RoundsDone
    | WeightsMade
    | Expected
    | IterationDone
    | CaseDone
    | RowEvent
    | ModelRowEvent
)
TuningEvent = TrialStarted | Tuned | Switched
AnyEvent = (
    RunStarted | PeaksMeasured | Progress | Message | WorkerUnusable | RunRefused | RunDone | TuningEvent | CaseEvent
)


class _Kind(msgspec.Struct):
    event: str


_KINDS = frozenset(str(kind.__struct_config__.tag) for kind in get_args(AnyEvent))
_kind_decoder = msgspec.json.Decoder(_Kind)
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: AnyEvent) -> bytes:
    """Writes an event as one line of JSON; what is no valid text in it is replaced."""
    try:
        return _encoder.encode(event) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, in an exception's text, say
        return _encoder.encode(_valid(msgspec.to_builtins(event))) + b"\n"


def _valid(value: object) -> object:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {_valid(name): _valid(each) for name, each in value.items()}
    return [_valid(each) for each in value] if isinstance(value, list) else value


def decode(line: bytes) -> AnyEvent:
    """Reads one line; an event of a kind that is not known here becomes a message that says so.

    Raises:
        msgspec.DecodeError: the line is no event.
    """
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError:
        kind = _kind_decoder.decode(line).event
        if kind in _KINDS:
            raise
        return Message(level="info", text=f"the engine tells of '{kind}', which is not known here")
