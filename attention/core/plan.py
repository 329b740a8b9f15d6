"""The plan of a run: cases, implementations and limits."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from msgspec import Struct

from attention.core.errors import UsageError
from attention.core.results import Peaks
from attention.core.stream import ATTENTION_ROWS, STREAM_ROWS, Stream
from attention.core.workload import FineTuning, Generation, Workload

REFERENCE: Final = "baseline"
MAX_CASES: Final = 1_000
"""Maximum cases of a sweep."""
Blas = Literal["mlx", "numpy"]
BLAS: Final[tuple[Blas, ...]] = ("mlx", "numpy")


class RunOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of every kind of run, with their defaults: the implementations and the limits.

    Plans, presets and the app's draft have them as fields; the command line overrides those of a preset or a plan.
    """

    implementations: tuple[str, ...] = ("baseline", "poc", "practical", "demo")
    """Names from the catalogue, or "FILE.py:NAME" and "package.module:NAME" for a plugin."""
    seconds: float = 6.0
    """Time limit of the rounds of one case, in seconds."""
    precision: float = 0.01
    """Rounds stop early when every speedup's interval is narrower than this, relative (0.01 is 1 %)."""
    memory_limit_bytes: int | None = None
    """Cases predicted to need more are refused; None uses the device's free memory."""
    force: bool = False
    """Run cases even if they are predicted not to fit."""
    seed: int = 0
    """Seed of the random inputs."""
    blas: Blas = "mlx"
    """What multiplies float32 matrices on a CPU: MLX's BLAS, or numpy's in its place."""
    hosts: tuple[str, ...] = ()
    """Machines for the ranks, as names for ssh or "HOST:PORT"; empty: all ranks run on this machine."""
    hostfile: str | None = None
    """A hostfile of `mlx.launch` instead of `hosts`."""

    @property
    def ordered(self) -> tuple[str, ...]:
        """Return the implementations, the reference first."""
        return tuple(sorted(dict.fromkeys(self.implementations), key=lambda name: name != REFERENCE))

    def options(self) -> dict[str, Any]:
        """Return the options by name, as arguments of another plan, preset or draft."""
        return {name: getattr(self, name) for name in RunOptions.__struct_fields__}


DEFAULTS: Final = RunOptions()
MODEL_IMPLEMENTATIONS: Final = ("baseline", "mlx", "practical", "poc", "demo")
"""Default implementations of models' runs."""


class Plan(RunOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="attention"):
    """One run: every implementation on every case."""

    cases: tuple[Workload, ...]
    """The workloads, measured one after the other."""


class GenerationPlan(RunOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="generation"):
    """One model generating with every implementation, at every prompt length."""

    cases: tuple[Generation, ...]
    """All of one model, measured one after the other."""
    implementations: tuple[str, ...] = MODEL_IMPLEMENTATIONS
    seconds: float = 10.0
    """Time limit of the rounds of one phase at one prompt length, in seconds."""
    blas: Blas = "numpy"


class FineTuningPlan(RunOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="fine-tuning"):
    """One model fine-tuned with every implementation."""

    cases: tuple[FineTuning, ...]
    """All of one model, one after the other."""
    implementations: tuple[str, ...] = MODEL_IMPLEMENTATIONS
    seconds: float = 300.0
    """Time limit of each fine-tuning, in seconds."""
    blas: Blas = "numpy"


class StreamPlan(RunOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stream"):
    """One stream of tokens, with every way of keeping them; `implementations` names these, as in `STREAM_ROWS`."""

    cases: tuple[Stream, ...]
    implementations: tuple[str, ...] = ATTENTION_ROWS
    seconds: float = 600.0
    """Time limit of each row, in seconds."""

    @property
    def ordered(self) -> tuple[str, ...]:
        """Return the rows, those that are measured first in front."""
        return tuple(name for name in STREAM_ROWS if name in self.implementations)


ModelPlan = GenerationPlan | FineTuningPlan | StreamPlan
AnyPlan = Plan | ModelPlan


def ranks_of(case: Workload | Generation | FineTuning | Stream) -> int:
    """Return the number of ranks among which a case is divided."""
    return case.ranks if isinstance(case, Workload | Generation) else 1


class RankSetting(Struct, frozen=True, kw_only=True):
    """What makes a worker process one rank of a group: the arguments of MLX's own environment variables.

    It is one word of JSON on the worker's command line.
    """

    rank: int
    ranks: int
    addresses: tuple[str, ...] = ()
    """"IP:PORT" of each rank, for the ring backend: MLX_HOSTFILE."""
    coordinator: str = ""
    """"IP:PORT" at which rank 0 of the NCCL and JACCL backends listens: NCCL_HOST_IP and NCCL_PORT."""
    backend: str | None = None
    """"ring", "nccl" or "jaccl"; None chooses NCCL on CUDA and the ring elsewhere."""
    rdma: tuple[tuple[str | None, ...], ...] = ()
    """JACCL: the RDMA device from each rank to each other: MLX_IBV_DEVICES."""
    place: int = 0
    """Number of the rank among those of its host: which GPU it takes, and which cores."""
    places: int = 1
    """Number of ranks of its host."""
    blas: Blas = "mlx"
    orphan_s: float | None = None
    """Seconds without a line on stdin after which the process ends, on a host that may lose its link; None: never."""


class KnownTimes(Struct, frozen=True, kw_only=True):
    """Times on this device that are known before a run, from earlier runs and from single timed calls."""

    calls: dict[str, list[tuple[float, float]]] = {}
    """(FLOPs, seconds) of calls by implementation, dtype and pass: "poc float16 forward"."""
    set_up_s: float | None = None
    """Seconds per case and implementation outside the rounds."""


class Assignment(Struct, frozen=True, kw_only=True):
    """The assignment of one worker: a plan, and how far an earlier worker got."""

    plan: AnyPlan
    first_case: int = 0
    """Index of the first case to run; earlier ones are complete."""
    skip: dict[int, tuple[str, ...]] = {}
    """Implementations to skip per case, because they crashed an earlier worker."""
    peaks: Peaks | None = None
    """The machine's peak rates, if an earlier worker measured them."""
    known: KnownTimes = KnownTimes()
    """Times from which the time left is estimated before calls are timed."""
    cost_only: bool = False
    """Time one call of each implementation, for an estimate of what the plan costs, instead of running it."""

    def remaining(self, case: int) -> tuple[str, ...]:
        """Return the implementations to run on one case, the reference first."""
        return tuple(name for name in self.plan.ordered if name not in self.skip.get(case, ()))


def expand(base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> tuple[Workload, ...]:
    """Return a workload for each combination of the axes' values, the last axis varying fastest.

    Args:
        base: fields common to all cases.
        axes: the values of each swept field.

    Raises:
        UsageError: the mistakes of all combinations, each reported once.
    """
    cases: list[Workload] = []
    problems: dict[str, None] = {}
    for values in itertools.product(*axes.values()):
        fields = {**base, **dict(zip(axes, values, strict=True))}
        fields = {"pass_" if name == "pass" else name: value for name, value in fields.items()}
        try:
            workload = Workload(**fields)
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
        else:
            if workload not in cases:
                cases.append(workload)
    if problems:
        raise UsageError(*problems)
    return tuple(cases)
