"""The rows: what the table, the history and every export are made from. Unknown figures are None."""

from typing import Final, Literal, cast

from msgspec import Struct, structs

from attention.models.workloads import FineTuning, Generation
from attention.workload import Workload

SCHEMA: Final = 1
COMPLETE: Final = ("precision", "time", "iterations")
"""What stopped the rounds of a row that was not broken off."""
MIN_ROUNDS: Final = 6
"""The fewest samples whose range is a 95 % interval of their median; with fewer there is no interval and no verdict."""
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
    significant: bool = False
    """Whether the whole interval lies outside the noise floor."""


class NoiseFloor(Struct, frozen=True, kw_only=True):
    """The reference measured against itself in the same rounds, with a 99 % interval."""

    value: float
    """Median of the ratios; 1 but for noise."""
    low: float
    high: float
    floor: float
    """The largest relative deviation from 1 that the interval allows; a speedup inside it is printed as ≈ 1."""


class Row(Struct, frozen=True, kw_only=True):
    """One implementation on one case."""

    implementation: str
    status: Status
    path: str | None = None
    fused: bool | None = None
    reason: str | None = None
    """Why this path was taken, or why there are no figures."""
    tokens_per_second: float | None = None
    call_s: Interval | None = None
    """Seconds a call, from many calls queued and evaluated together."""
    latency_s: float | None = None
    """Seconds of one evaluated and synchronised call, median."""
    first_call_s: float | None = None
    """Seconds of the very first call; what was compiled before it is not in it."""
    speedup: Ratio | None = None
    """Against the case's reference."""
    flops_per_s: float | None = None
    efficiency: float | None = None
    """Achieved FLOP/s over the best rate measured in the same run; None beyond that rate, which is then no peak."""
    peak_bytes: int | None = None
    """Memory above the inputs while one call runs, outputs included, measured in a pass of its own, scratch too."""
    predicted_bytes: int | None = None
    """The same, as the route predicted it."""
    max_error: float | None = None
    """Largest absolute difference from the float64 reference."""
    rms_error: float | None = None
    samples: tuple[float, ...] = ()
    """Seconds a call, one sample a round, in the order they were taken."""
    stopped_by: str | None = None
    """"precision", "time", or what broke in: "interrupted", "failed"."""
    throttled: bool | None = None
    """Whether the reference slowed by more than the noise floor between the first rounds and the last."""

    def __post_init__(self) -> None:
        """Drop what fewer than MIN_ROUNDS samples cannot support, in rows read from a file too."""
        if self.too_few_rounds:
            structs.force_setattr(self, "speedup", None)
            if self.call_s is not None:
                structs.force_setattr(self, "call_s", Interval(median=self.call_s.median))

    @property
    def too_few_rounds(self) -> bool:
        """Whether the row has samples, but too few for an interval, a verdict or a star."""
        return 0 < len(self.samples) < MIN_ROUNDS

    @property
    def collecting(self) -> str | None:
        """What stands in place of a verdict while there are too few rounds for one; None once there are enough.

        "collecting 2 of 6" of a run that goes on or was broken off, "only 2 of 6" where no more were to be made.
        """
        if self.status not in ("ok", "inaccurate") or not self.too_few_rounds:
            return None
        word = "only" if self.stopped_by in COMPLETE else "collecting"
        return f"{word} {len(self.samples)} of {MIN_ROUNDS}"


class CaseRows(Struct, frozen=True, kw_only=True):
    """The root of all cases: keeps a noise floor only where the reference's samples support it."""

    def __post_init__(self) -> None:
        """Drop a noise floor of too few rounds, in cases read from a file too."""
        case = cast("AnyCase", self)
        if any(row.implementation == case.reference and row.too_few_rounds for row in case.rows):
            structs.force_setattr(self, "noise_floor", None)


class Case(CaseRows, frozen=True, kw_only=True):
    """All rows of one workload."""

    workload: Workload
    reference: str | None = None
    """What speedups are relative to: the baseline, or the first that ran where the baseline could not."""
    noise_floor: NoiseFloor | None = None
    rows: tuple[Row, ...] = ()


class Share(Struct, frozen=True, kw_only=True):
    """A part of a time, from 0 to 1, with a 95 % interval."""

    value: float
    low: float
    high: float


class ModelRow(Row, frozen=True, kw_only=True):
    """One implementation in a model that generates; `call_s` is one whole prompt, or one token of a decode.

    Where fewer layers ran than the model has, times, rates and memory are estimates of the whole model.
    """

    attention_share: Share | None = None
    """Time that the model is spared when attention returns its query at once, as a part of its whole time."""
    layer_s: float | None = None
    """Seconds of one layer, where two numbers of layers were measured."""
    fixed_s: float | None = None
    """Seconds of everything else, where two numbers of layers were measured."""
    replaced_calls: int | None = None
    """Calls of attention that the implementation computed in the first run; of `mlx` those that the model made."""
    passed_on_calls: int | None = None
    """Calls that it does not take, which went to MLX's own."""
    logits_error: float | None = None
    """Root mean square difference of the last logits from the reference's, relative to theirs."""

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
    """Of the whole model; a row's `peak_bytes` comes on top, with the cache of keys and values in it."""
    rows: tuple[ModelRow, ...] = ()


class FineTuningRow(Row, frozen=True, kw_only=True):
    """One implementation in a fine-tuning; `call_s` is one iteration, and the first one stands apart."""

    iterations_per_second: float | None = None
    losses: tuple[float | None, ...] = ()
    """The training loss of each iteration; None where it is no number."""
    loss_difference: float | None = None
    """The largest difference from the reference's losses, relative to theirs; a row beyond the tolerance is marked."""
    replaced_calls: int | None = None
    """Calls of attention that the implementation computed while the step was traced."""
    passed_on_calls: int | None = None
    """Calls that it does not take, which went to MLX's own."""


class FineTuningCase(CaseRows, frozen=True, kw_only=True):
    """All rows of one fine-tuning."""

    workload: FineTuning
    reference: str | None = None
    noise_floor: NoiseFloor | None = None
    """The reference's fine-tuning against its second one, after all others."""
    weights_bytes: int | None = None
    """Of the model; a row's `peak_bytes` comes on top."""
    rows: tuple[FineTuningRow, ...] = ()


class Summary(Struct, frozen=True, kw_only=True):
    """One implementation over all cases that it ran."""

    implementation: str
    cases: int
    """Cases with a speedup; the geometric mean is over these."""
    speedup: Ratio | None = None
    not_ok: int = 0
    """Cases whose status is not ok."""


class Peaks(Struct, frozen=True, kw_only=True):
    """The best rates that this machine reached in this run."""

    matmul_flops_per_s: float | None = None
    fma_flops_per_s: float | None = None
    """Float32 multiply-adds in registers, on a CPU whose kernel is compiled."""
    copy_bytes_per_s: float | None = None
    """Bytes read plus bytes written, over time."""

    @property
    def flops_per_s(self) -> float | None:
        """The best of the measured rates: what 100 % efficiency is."""
        return max(filter(None, (self.matmul_flops_per_s, self.fma_flops_per_s)), default=None)


class Environment(Struct, frozen=True, kw_only=True):
    """Where a run was made."""

    fatui: str | None = None
    mlx: str | None = None
    backend: str | None = None
    device: str | None = None
    memory_bytes: int | None = None
    blas: str | None = None
    os: str | None = None
    python: str | None = None


class Run(Struct, frozen=True, kw_only=True):
    """Which run it was."""

    id: str
    started: str
    """Local time with its offset from UTC, ISO 8601."""
    seconds: float
    command: str
    """The command that reproduces the run."""
    preset: str | None = None
    interrupted: bool = False


class Report(Struct, frozen=True, kw_only=True):
    """A whole run."""

    schema: int = SCHEMA
    run: Run
    environment: Environment
    peaks: Peaks
    cases: tuple[Case, ...] = ()
    summary: tuple[Summary, ...] = ()
    models: tuple[ModelCase, ...] = ()
    fine_tunings: tuple[FineTuningCase, ...] = ()

    @property
    def all_cases(self) -> "tuple[AnyCase, ...]":
        """The cases, of whatever kind the run was."""
        return (*self.cases, *self.models, *self.fine_tunings)


AnyCase = Case | ModelCase | FineTuningCase
