"""Result rows, from which the table, the history and all exports are made. Unknown values are None.

For files there are the same rows as flat records, and digests, by which a file that was edited afterwards shows. A
digest guards against accidents and quiet corrections, not against forgery: anyone who edits a file can recompute it.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, cast

import msgspec
from msgspec import Struct, structs

from attention.core.stream import Stream, StreamBlock
from attention.core.workload import FineTuning, Generation, Workload

SCHEMA: Final = 1
COMPLETE: Final = ("precision", "time", "iterations")
"""Values of `stopped_by` of a row that was completed."""
MIN_ROUNDS: Final = 6
"""Minimum samples whose range is a 95 % interval of their median; below it there is no interval and no verdict."""
Status = Literal["ok", "failed", "refused", "unsupported", "inaccurate"]


class Interval(Struct, frozen=True, kw_only=True):
    """Seconds of one call: the median of the samples and a 95 % interval of it, None below MIN_ROUNDS samples."""

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def relative_half_width(self) -> float | None:
        """The larger distance from the median to an end of the interval, relative to the median; None without one."""
        if self.low is None or self.high is None or self.median <= 0:
            return None
        return max(self.high - self.median, self.median - self.low) / self.median


class Ratio(Struct, frozen=True, kw_only=True):
    """A speedup: median of paired ratios, or geometric mean of cases, with a 95 % interval; above 1 is faster."""

    value: float
    low: float
    high: float
    significant: bool | None = False
    """Whether the whole interval lies outside the noise floor; None: that is not known."""


class NoiseFloor(Struct, frozen=True, kw_only=True):
    """The reference measured against itself in the same rounds, with a 99 % interval."""

    value: float
    """Median of the ratios; 1 except for noise."""
    low: float
    high: float
    floor: float
    """The largest relative deviation from 1 that the interval allows; a speedup inside it is printed as ≈ 1."""


class RankFigures(Struct, frozen=True, kw_only=True):
    """One rank's part in the calls of a row; times are medians of the same samples on all ranks."""

    rank: int
    call_s: float
    """Seconds of one call on this rank, from the start common to all ranks."""
    compute_s: float | None = None
    """Seconds of the same call without communication."""
    sent_bytes: int | None = None
    """Bytes that this rank sends in one call."""
    peak_bytes: int | None = None

    @property
    def waiting_s(self) -> float | None:
        """Seconds of a call spent in communication that was not hidden, and in waiting for other ranks."""
        return None if self.compute_s is None else max(0.0, self.call_s - self.compute_s)


RATIOS: Final = ("speedup", "over_dense", "over_unquantized", "over_one_device")
"""The fields of a row that are ratios."""


class Row(Struct, frozen=True, kw_only=True):
    """One implementation on one case."""

    implementation: str
    status: Status
    path: str | None = None
    fused: bool | None = None
    reason: str | None = None
    """Why this path was taken, or why there are no results."""
    tokens_per_second: float | None = None
    call_s: Interval | None = None
    """Seconds per call, from many calls queued and evaluated together."""
    latency_s: float | None = None
    """Seconds of one evaluated and synchronised call, median."""
    first_call_s: float | None = None
    """Seconds of the very first call; kernels compiled before it are excluded."""
    speedup: Ratio | None = None
    """Relative to the case's reference."""
    over_dense: Ratio | None = None
    """Relative to the implementation's own time with every pair visible, paired; for structured masks and windows."""
    dense_s: Interval | None = None
    """Seconds per call with every pair visible."""
    over_unquantized: Ratio | None = None
    """Relative to the implementation's own time with keys and values in the query's dtype, paired."""
    unquantized_s: Interval | None = None
    """Seconds per call with keys and values in the query's dtype."""
    over_one_device: Ratio | None = None
    """Of several ranks: relative to the implementation's own time on one device, paired."""
    one_device_s: Interval | None = None
    """Seconds per call on one device."""
    per_rank: tuple[RankFigures, ...] = ()
    """One entry for each rank, if there are several."""
    flops_per_s: float | None = None
    efficiency: float | None = None
    """Achieved FLOP/s over the best rate measured in the same run; None above that rate, which is then not a peak."""
    peak_bytes: int | None = None
    """Peak memory above the inputs during one call, outputs and scratch included, measured in a separate pass."""
    predicted_bytes: int | None = None
    """The route's prediction of `peak_bytes`."""
    max_error: float | None = None
    """Largest absolute difference from the float64 reference."""
    rms_error: float | None = None
    kv_error: float | None = None
    """RMS difference from float64 attention over keys and values before quantization, relative to the RMS of that."""
    joules_per_token: float | None = None
    """Energy of the device for one token, calls back to back, after the rounds; None without a counter."""
    approximate: str | None = None
    """Arithmetic coarser than the inputs' dtype, such as "fp8", by whose own tolerance the row was judged."""
    samples: tuple[float, ...] = ()
    """Seconds per call, one sample per round, in the order taken."""
    stopped_by: str | None = None
    """"precision", "time", or what broke in: "interrupted", "failed"."""
    throttled: bool | None = None
    """Whether the reference slowed by more than the noise floor between the first rounds and the last."""

    def __post_init__(self) -> None:
        """Drop values that fewer than MIN_ROUNDS samples cannot support, also in rows read from a file."""
        if self.too_few_rounds:
            for name in RATIOS:
                structs.force_setattr(self, name, None)
            for name in ("call_s", "dense_s", "unquantized_s", "one_device_s"):
                interval: Interval | None = getattr(self, name)
                if interval is not None:
                    structs.force_setattr(self, name, Interval(median=interval.median))

    @property
    def too_few_rounds(self) -> bool:
        """Whether the row has samples, but too few for an interval, a verdict or a star."""
        return 0 < len(self.samples) < MIN_ROUNDS

    @property
    def sent_bytes(self) -> int | None:
        """Bytes that all ranks send in one call; None if unknown."""
        sent = [each.sent_bytes for each in self.per_rank if each.sent_bytes is not None]
        return sum(sent) if sent and len(sent) == len(self.per_rank) else None

    @property
    def exposed_s(self) -> float | None:
        """Seconds of communication in one call that computing did not hide, from the slowest ranks of both kinds."""
        computing = [each.compute_s for each in self.per_rank if each.compute_s is not None]
        if not computing or len(computing) < len(self.per_rank):
            return None
        return max(0.0, max(each.call_s for each in self.per_rank) - max(computing))

    @property
    def share_of_ideal(self) -> Ratio | None:
        """The speedup over one device, over the number of ranks: 1 if each added its whole speed."""
        ratio, ranks = self.over_one_device, len(self.per_rank)
        if ratio is None or not ranks:
            return None
        return structs.replace(ratio, value=ratio.value / ranks, low=ratio.low / ranks, high=ratio.high / ranks)

    @property
    def collecting(self) -> str | None:
        """The text shown instead of a verdict while there are too few rounds; None once there are enough.

        "collecting 2 of 6" for a run in progress or interrupted, "only 2 of 6" if no more rounds were planned.
        """
        if self.status not in ("ok", "inaccurate") or not self.too_few_rounds:
            return None
        word = "only" if self.stopped_by in COMPLETE else "collecting"
        return f"{word} {len(self.samples)} of {MIN_ROUNDS}"


class CaseRows(Struct, frozen=True, kw_only=True):
    """Base class of cases: keeps a noise floor only if the reference's samples support it."""

    def __post_init__(self) -> None:
        """Drop a noise floor of too few rounds, and claims that need one, also in cases read from a file."""
        case = cast("AnyCase", self)
        if any(row.implementation == case.reference and row.too_few_rounds for row in case.rows):
            structs.force_setattr(self, "noise_floor", None)
        if case.noise_floor is not None:
            return
        for row in case.rows:
            for name in RATIOS:
                ratio: Ratio | None = getattr(row, name)
                if ratio is not None and ratio.significant is False:  # nothing says that it is inside one
                    structs.force_setattr(row, name, structs.replace(ratio, significant=None))


class Case(CaseRows, frozen=True, kw_only=True):
    """All rows of one workload."""

    workload: Workload
    reference: str | None = None
    """The reference of speedups: the baseline, or the first implementation that ran if the baseline could not."""
    noise_floor: NoiseFloor | None = None
    kv_token_bytes: int | None = None
    """Bytes of the keys and values of one token, scales and biases included."""
    rows: tuple[Row, ...] = ()


class Share(Struct, frozen=True, kw_only=True):
    """A share of a time, from 0 to 1, with a 95 % interval."""

    value: float
    low: float
    high: float


class ModelRow(Row, frozen=True, kw_only=True):
    """One implementation in a model that generates; `call_s` is one whole prompt, or one token of a decode.

    If fewer layers ran than the model has, times, rates and memory are estimates for the whole model.
    """

    attention_share: Share | None = None
    """Share of the model's time that is saved if attention returns its query unchanged."""
    layer_s: float | None = None
    """Seconds of one layer, if two numbers of layers were measured."""
    fixed_s: float | None = None
    """Seconds of everything else, if two numbers of layers were measured."""
    replaced_calls: int | None = None
    """Attention calls computed by the implementation in the first run; for `mlx` the calls made by the model."""
    passed_on_calls: int | None = None
    """Calls that it does not support, computed by MLX's own function."""
    logits_error: float | None = None
    """RMS difference of the last logits from the reference's, relative to the RMS of the reference's."""
    kl_divergence: float | None = None
    """Kullback-Leibler divergence, in nats, of the next token's distribution from that with an unquantized cache."""

    def __post_init__(self) -> None:
        """Drop what fewer than MIN_ROUNDS samples cannot support."""
        super().__post_init__()
        if self.too_few_rounds:
            structs.force_setattr(self, "attention_share", None)


class ModelCase(CaseRows, frozen=True, kw_only=True):
    """All rows of one phase of a model at one prompt length."""

    workload: Generation
    reference: str | None = None
    noise_floor: NoiseFloor | None = None
    weights_bytes: int | None = None
    """Size of the whole model; a row's `peak_bytes`, which includes the KV cache, is in addition."""
    kv_token_bytes: int | None = None
    """Bytes of the keys and values of one token in all layers, scales and biases included."""
    cache_bytes: int | None = None
    """Bytes of the caches of all layers after the prompts, unused rows included."""
    shared_passes: bool = False
    """Whether all rows attended in the same passes: their times share that of all else, and its noise."""
    rows: tuple[ModelRow, ...] = ()


class FineTuningRow(Row, frozen=True, kw_only=True):
    """One implementation in a fine-tuning; `call_s` is one iteration, the first one excluded."""

    iterations_per_second: float | None = None
    losses: tuple[float | None, ...] = ()
    """The training loss of each iteration; None if it is not finite."""
    loss_difference: float | None = None
    """The largest relative difference from the reference's losses; a row beyond the tolerance is inaccurate."""
    replaced_calls: int | None = None
    """Attention calls computed by the implementation while the step was traced."""
    passed_on_calls: int | None = None
    """Calls that it does not support, computed by MLX's own function."""


class FineTuningCase(CaseRows, frozen=True, kw_only=True):
    """All rows of one fine-tuning."""

    workload: FineTuning
    reference: str | None = None
    noise_floor: NoiseFloor | None = None
    """The reference's fine-tuning against a second one after all others."""
    weights_bytes: int | None = None
    """Size of the model; a row's `peak_bytes` is in addition."""
    rows: tuple[FineTuningRow, ...] = ()


class StreamRow(Row, frozen=True, kw_only=True):
    """One way of keeping the tokens of a stream; `call_s` is one token, `samples` are the medians of its blocks.

    For `full`, whose cost climbs, `call_s` is a token at the longest cache that was measured, and there are no samples.
    """

    tokens: int = 0
    """Tokens seen, or for `full` the longest cache that was measured."""
    blocks: tuple[StreamBlock, ...] = ()
    """What was measured, in the order of the tokens."""
    p99_s: float | None = None
    """Seconds that 99 % of the tokens do not exceed, to 2 %."""
    slowest_s: float | None = None
    slow_tokens: int | None = None
    """Steps that took more than five times the median."""
    bare_bins: dict[int, int] = {}
    """Steps by bin of their time of a loop that does nothing for as long as the median: the system's own pauses."""
    tenth_s: tuple[float, ...] = ()
    """Median seconds of a token in each tenth of the stream."""
    spread: float | None = None
    """The largest difference of a tenth from the first one in which the window was full throughout, relative to it."""
    start_bytes: int | None = None
    """Resident memory of the process once the window was full."""
    end_bytes: int | None = None
    """Resident memory of the process after the last token."""
    device_start_bytes: int | None = None
    """MLX's active memory once the window was full."""
    device_end_bytes: int | None = None
    """MLX's active memory after the last token."""
    end_s: float | None = None
    """Seconds of a token at the end of the stream."""
    extrapolated: bool = False
    """Whether `end_s` lies beyond what was measured, on a straight line through it."""
    bound_s: float | None = None
    """Seconds in which the window's keys and values can be read at the rate measured in the same run."""
    bound_share: float | None = None
    """`bound_s` over the median time of a token."""
    loss_inside: float | None = None
    """Mean loss of the tokens up to the first that falls out of the window, in nats."""
    loss_beyond: float | None = None
    """Mean loss of the tokens after that, as far as they were measured, in nats."""


class StreamCase(CaseRows, frozen=True, kw_only=True):
    """All rows of one stream."""

    workload: Stream
    reference: str | None = None
    """None: each row is measured by itself, against its own beginning."""
    noise_floor: NoiseFloor | None = None
    weights_bytes: int | None = None
    """Size of the model's weights."""
    rows: tuple[StreamRow, ...] = ()


class Summary(Struct, frozen=True, kw_only=True):
    """Summary of one implementation over all cases that it ran."""

    implementation: str
    cases: int
    """Number of cases with a speedup, over which the geometric mean is taken."""
    speedup: Ratio | None = None
    not_ok: int = 0
    """Number of cases whose status is not ok."""


class Peaks(Struct, frozen=True, kw_only=True):
    """The best rates measured on this machine in this run."""

    matmul_flops_per_s: float | None = None
    fma_flops_per_s: float | None = None
    """Rate of float32 multiply-adds in registers, on a CPU whose kernel is compiled."""
    copy_bytes_per_s: float | None = None
    """Bytes read plus bytes written per second."""
    launch_s: float | None = None
    """Seconds of the shortest evaluated call, of an operation on one number."""
    queued_launch_s: float | None = None
    """Seconds a call of many such operations that are evaluated together: how fast the host launches work."""

    @property
    def flops_per_s(self) -> float | None:
        """The best measured rate, which defines 100 % efficiency."""
        return max(filter(None, (self.matmul_flops_per_s, self.fma_flops_per_s)), default=None)


class Environment(Struct, frozen=True, kw_only=True):
    """The machine and the software of a run."""

    fatui: str | None = None
    mlx: str | None = None
    backend: str | None = None
    device: str | None = None
    memory_bytes: int | None = None
    blas: str | None = None
    os: str | None = None
    python: str | None = None
    host: str | None = None
    """The machine's name for ssh, if the engine ran on another than the one that kept the results."""

    @property
    def machine(self) -> str | None:
        """The device, with the name of its host if that is another: "NVIDIA H200 on gpu-box"."""
        return f"{self.device} on {self.host}" if self.device and self.host else self.device


class Conditions(Struct, frozen=True, kw_only=True):
    """What else went on while a run measured, at its worst over the cases; None where that cannot be known."""

    cores: int | None = None
    """Cores that the run may use."""
    other_cores: float | None = None
    """Mean number of cores that other processes kept busy."""
    busiest: tuple[str, ...] = ()
    """Names of the other processes with the most processor time, at most three."""
    stolen_cores: float | None = None
    """Mean number of cores that the hypervisor gave to other machines."""
    other_engines: int = 0
    """Engines of other runs on this machine."""
    governor: str | None = None
    """Linux's scaling governor of the processor's clock."""
    on_battery: bool | None = None
    tf32: bool | None = None
    """Whether MLX multiplies float32 matrices in TF32."""

    def worst(self, other: "Conditions") -> "Conditions":
        """Return the worse of two measurements in each field."""
        busier = max(self, other, key=lambda each: each.other_cores or 0.0)
        return structs.replace(
            other,
            other_cores=busier.other_cores,
            busiest=busier.busiest,
            stolen_cores=max(
                (each for each in (self.stolen_cores, other.stolen_cores) if each is not None), default=None
            ),
            other_engines=max(self.other_engines, other.other_engines),
            on_battery=other.on_battery if self.on_battery is None else self.on_battery or other.on_battery,
        )


class MachineState(Struct, frozen=True, kw_only=True):
    """What changes of a machine while it works."""

    clock_hz: float | None = None
    temperature_c: float | None = None
    """Of the hottest core."""
    load: float | None = None
    """Mean number of processes that ran or waited for a core, over a minute."""
    throttle_events: int | None = None
    """How often the first core has slowed for heat since the system started."""
    gpu_clock_hz: float | None = None
    gpu_temperature_c: float | None = None


class Fingerprint(Struct, frozen=True, kw_only=True):
    """What a run's figures depend on beside code, device, backend and conditions."""

    versions: dict[str, str] = {}
    """Versions of the libraries that take part, by package."""
    architecture: str | None = None
    """As MLX names it: "sm_90a"."""
    max_clock_hz: float | None = None
    driver: str | None = None
    """Version of NVIDIA's driver."""
    before: MachineState = MachineState()
    """When the engine started."""
    after: MachineState | None = None
    """When the last case was complete."""


def instant(started: str) -> float:
    """Return an ISO time as seconds since 1970, to order runs of several time zones; -inf for any other text."""
    try:
        return datetime.fromisoformat(started).timestamp()
    except (ValueError, OverflowError, OSError):
        return -math.inf


class Run(Struct, frozen=True, kw_only=True):
    """The identity of a run."""

    id: str
    started: str
    """Local time with its offset from UTC, ISO 8601."""
    seconds: float
    command: str
    """The command that reproduces the run."""
    preset: str | None = None
    interrupted: bool = False
    in_turns: str | None = None
    """Runs with the same text here were measured in turns, round by round."""


class Report(Struct, frozen=True, kw_only=True):
    """The results of a whole run."""

    schema: int = SCHEMA
    run: Run
    environment: Environment
    peaks: Peaks
    conditions: Conditions | None = None
    """None in results of versions that did not record them."""
    cases: tuple[Case, ...] = ()
    summary: tuple[Summary, ...] = ()
    models: tuple[ModelCase, ...] = ()
    fine_tunings: tuple[FineTuningCase, ...] = ()
    streams: tuple[StreamCase, ...] = ()
    fingerprint: Fingerprint | None = None
    digest: str | None = None
    """Digest of a file (`core.digest`), written and checked with it; older files have none."""
    edited: bool = False
    """Whether that file was changed after it had been written."""

    @property
    def all_cases(self) -> "tuple[AnyCase, ...]":
        """All cases, for any kind of run."""
        return (*self.cases, *self.models, *self.fine_tunings, *self.streams)


AnyCase = Case | ModelCase | FineTuningCase | StreamCase


def in_order(reports: Iterable[Report]) -> list[Report]:
    """Return runs in the order in which they were started, those of several time zones too."""
    return sorted(reports, key=lambda report: instant(report.run.started))


ORIGIN: Final = ("run_id", "started", "fatui", "mlx", "backend", "device", "host")
INTERVALS: Final = (
    *("call_s", "speedup", "over_dense", "dense_s", "over_unquantized", "unquantized_s"),
    *("over_one_device", "one_device_s", "attention_share"),
)


def origin(report: Report) -> dict[str, object]:
    """Return what all rows of a run have in common."""
    where = report.environment
    identity = {"run_id": report.run.id, "started": report.run.started}
    return {name: identity.get(name) or getattr(where, name) for name in ORIGIN}


def flat_row(number: int, case: AnyCase, row: Row) -> dict[str, object]:
    """Return a row with its case: the parts of intervals are named "call_s_median", samples are counted.

    Args:
        number: of the case in its run, from 1.
        case: the case.
        row: one of its rows.
    """
    fields: dict[str, Any] = msgspec.to_builtins(row)
    samples = fields.pop("samples")
    if isinstance(row, StreamRow):
        del fields["blocks"], fields["bare_bins"]  # in the JSON
        fields["seen_tokens"] = fields.pop("tokens")  # the workload's are those requested
    fields.update(_rank_fields(row))
    del fields["per_rank"]
    for name in INTERVALS:
        parts = fields.pop(name, None) or {}
        fields.update({f"{name}_{part}": value for part, value in parts.items()})
    return {
        "case": number,
        **msgspec.to_builtins(case.workload),
        "reference": case.reference,
        "noise_floor": case.noise_floor.floor if case.noise_floor else None,
        **_sizes(case),
        "sample_count": len(samples),
        **fields,
    }


def flat_rows(report: Report) -> list[dict[str, object]]:
    """Return all rows of a run, each with the run's origin."""
    shared = origin(report)
    return [
        {**shared, **flat_row(number, case, row)}
        for number, case in enumerate(report.all_cases, start=1)
        for row in case.rows
    ]


def _rank_fields(row: Row) -> dict[str, object]:
    """Return what the ranks sent and waited, with one value for each rank where they differ."""
    ranks = row.per_rank
    return {
        "sent_bytes": row.sent_bytes,
        "exposed_s": row.exposed_s,
        "rank_call_s": [rank.call_s for rank in ranks],
        "rank_waiting_s": [rank.waiting_s for rank in ranks],
        "rank_sent_bytes": [rank.sent_bytes for rank in ranks],
    }


def _sizes(case: AnyCase) -> dict[str, object]:
    match case:
        case Case():
            return {"kv_token_bytes": case.workload.kv_token_bytes}
        case ModelCase():
            return {name: getattr(case, name) for name in ("weights_bytes", "kv_token_bytes", "cache_bytes")}
        case FineTuningCase() | StreamCase():
            return {"weights_bytes": case.weights_bytes}


ALGORITHM: Final = "sha256"


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the digest of a result file's document: of all but its own digest, without nulls, with sorted keys."""
    content = _without_nulls({name: value for name, value in document.items() if name != "digest"})
    encoded = msgspec.json.encode(content, order="deterministic")
    return f"{ALGORITHM}:{hashlib.sha256(encoded).hexdigest()}"


def sealed(report: Report, further: Mapping[str, Any] | None = None) -> bytes:
    """Encode a report as JSON with its digest; unknown and infinite figures are null.

    Args:
        report: the report.
        further: keys beside those of the report.
    """
    encoded = msgspec.json.encode({**msgspec.to_builtins(report), **(further or {})})
    document = msgspec.json.decode(encoded)
    return msgspec.json.encode({**document, "digest": digest_of(document)})


def is_edited(content: bytes) -> bool:
    """Return whether a file with a digest does not have it; one without is not known to be edited.

    Args:
        content: a JSON document that is a report.
    """
    document = msgspec.json.decode(content)
    stored = document.get("digest") if isinstance(document, dict) else None
    if stored is None:
        return False
    try:
        return bool(stored != digest_of(document))
    except (OverflowError, ValueError, msgspec.MsgspecError):  # a number that cannot be written again
        return True


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
