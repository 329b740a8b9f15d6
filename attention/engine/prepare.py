"""Preparation of one implementation before the rounds: first call, accuracy, memory, warm-up and latency."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Final, cast

import mlx.core as mx
from msgspec import Struct, structs

from attention.core import events as on
from attention.core.errors import InputsOverwrittenError
from attention.core.route import Route
from attention.core.workload import COUNTERPARTS, Counterpart, Workload
from attention.engine.progress import Progress
from attention.implementations.calls import MlxRunner, runner_for, take_path
from attention.implementations.protocol import Implementation, ProvidesRunner
from attention.measure.accuracy import NAMES, AccuracyChecker, AccuracyResult
from attention.measure.device import Device
from attention.measure.rounds import Arm, Runner, latency, warm_up
from attention.quantized_kv import KeyOrValue, arrays_of

SLOW_CALL_S: Final = 0.5
"""A call that takes this long needs no warm-up beyond the calls before it."""
WARM_UP_S: Final = {"cpu": 0.03, "metal": 0.25, "cuda": 0.25}
LATENCY_S: Final = 0.1
MAX_NEGATED_BYTES: Final = 1 << 26
"""Bytes of a case's inputs up to which a call after the rounds has values of its own."""
WORDS: Final = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
"""Dtype used to sum an array's bits, by item size in bytes."""


class SharedInputs:
    """The inputs of a case in memory shared by all implementations, with fingerprints to detect changes.

    Attributes:
        arrays: q, k, v (k and v may be quantized), and in training the output's gradient, evaluated.
    """

    def __init__(self, arrays: list[KeyOrValue]) -> None:
        self.arrays = arrays
        self._held = _fingerprints(arrays)

    def views(self) -> list[KeyOrValue]:
        """Return new arrays on the same memory: `q *= scale` in an implementation then rebinds only its own array."""
        return views_of(self.arrays)

    def check(self, views: Sequence[KeyOrValue]) -> None:
        """Check that an implementation has not changed its views or the shared memory.

        Raises:
            InputsOverwrittenError: the shared memory was written to.
            ValueError: only the views were changed.
        """
        text = "it wrote into its inputs; q, k and v must be left as they are"
        if self._held != _fingerprints(self.arrays):
            raise InputsOverwrittenError(text)
        if self._held != _fingerprints(views):
            raise ValueError(text)


def views_of(arrays: Sequence[KeyOrValue]) -> list[KeyOrValue]:
    """Return new arrays on the same memory."""
    views = [array[...] for array in arrays]
    mx.eval(arrays_of(*views))
    return views


def _fingerprints(arrays: Sequence[KeyOrValue]) -> list[tuple[int, int]]:
    return [_fingerprint(array) for array in arrays_of(*arrays)]


def _fingerprint(array: mx.array) -> tuple[int, int]:
    """Sum an array's words and its bytes modulo 2^32, on the device and without a copy.

    Doubling every float32 adds 2^23 to each word: 512 of them leave the sum of words as it was, but not that of bytes.
    """
    words = mx.view(array, WORDS[array.dtype.size])
    sums = mx.sum(words), mx.sum(mx.view(array, mx.uint8))
    mx.eval(sums)
    return cast("int", sums[0].item()), cast("int", sums[1].item())


class CaseSetting(Struct, frozen=True, kw_only=True, eq=False):
    """What all implementations of a case share."""

    workload: Workload
    device: Device
    inputs: "SharedInputs"
    unquantized: "SharedInputs | None" = None
    """The inputs before keys and values were quantized; None if they are not."""
    accuracy: AccuracyChecker
    sample_s: float
    """Seconds that one sample should last."""
    progress: Progress
    route: Callable[[Implementation], Route]
    """Returns an implementation's route on the case, validated."""
    bind: Callable[[str], Runner] | None = None
    """Binds an implementation on several ranks; None on one device."""
    latencies: bool = True
    """Whether the latency of a single call is measured, which comparisons in turns do not judge."""
    inaccurate: set[str] = set()
    """The implementations whose first call was; filled as they are prepared."""


def prepare(name: str, implementation: Implementation, setting: CaseSetting) -> Arm:
    """Run an implementation through all steps before the rounds, and return its arm.

    Raises:
        Exception: whatever the implementation raises.
    """
    setting.progress.mark_running(name)  # an autotuning implementation runs its trial while it is bound
    inputs = setting.inputs.views()
    take_path()  # clear what an earlier call left
    runner = setting.bind(name) if setting.bind else _bind_runner(implementation, setting, inputs)
    results, call_s = _first_call(name, runner, setting)
    recorded = take_path()
    setting.inputs.check(inputs)
    _check(name, implementation, results, setting)
    del results
    route = _emit_final_route(name, implementation, setting, recorded)
    setting.progress.begin_step(name, "memory")
    started = time.perf_counter()
    peak = runner.peak_bytes()
    if peak is not None:
        peak += route.scratch_bytes
    call_s = min(call_s, time.perf_counter() - started)
    setting.progress.record_call_s(name, call_s)
    setting.progress.emit(on.MemoryMeasured(case=setting.progress.case, implementation=name, peak_bytes=peak))
    if call_s < SLOW_CALL_S:
        call_s = _warm_up_and_time(name, runner, call_s, setting)
        setting.progress.record_call_s(name, call_s)
    setting.inputs.check(inputs)
    lead_in = setting.device.backend != "cpu"
    return Arm(name=name, runner=runner, call_s=call_s, lead_in=lead_in, scratch_bytes=route.scratch_bytes)


def prepare_counterpart(
    name: str, implementation: Implementation, counterpart: Counterpart, setting: CaseSetting
) -> Arm:
    """Warm up an implementation on a counterpart of the case, and return its arm.

    Raises:
        Exception: whatever the implementation raises.
    """
    workload = setting.workload.counterparts[counterpart]
    setting.progress.begin_step(name, "warm up")
    setting.progress.emit_progress(f"{name}: {COUNTERPARTS[counterpart]}")
    shared = setting.unquantized if counterpart == "unquantized" else setting.inputs
    assert shared is not None
    inputs = shared.views()
    runner = runner_for(implementation, workload, inputs, workload.scale)
    started = time.perf_counter()
    _check_output(runner.results()[0], workload)
    call_s = time.perf_counter() - started
    shared.check(inputs)
    if call_s < SLOW_CALL_S:
        min_s = WARM_UP_S[setting.device.backend]
        call_s = warm_up(runner, call_s, min_s, setting.sample_s, workload.output_bytes)
    lead_in = setting.device.backend != "cpu"
    return Arm(name=name, runner=runner, call_s=call_s, lead_in=lead_in, counterpart=counterpart)


def _bind_runner(implementation: Implementation, setting: CaseSetting, inputs: list[KeyOrValue]) -> Runner:
    return runner_for(implementation, setting.workload, inputs, setting.workload.scale)


def _first_call(name: str, runner: Runner, setting: CaseSetting) -> tuple[list[mx.array], float]:
    """Return the results of the very first call and its seconds."""
    setting.progress.begin_step(name, "first call")
    started = time.perf_counter()
    results = runner.results()
    seconds = time.perf_counter() - started
    _check_output(results[0], setting.workload)
    setting.progress.emit(on.FirstCall(case=setting.progress.case, implementation=name, seconds=seconds))
    setting.progress.record_call_s(name, seconds)
    return results, seconds


def _check_output(output: object, workload: Workload) -> None:
    """Raise TypeError or ValueError, with a message of one line, if this cannot be an attention output."""
    if not isinstance(output, mx.array):
        raise TypeError(f"it returned {type(output).__name__}; an MLX array is expected")
    shape = (workload.batch, workload.heads, workload.seq, workload.value_dim)
    if output.shape != shape:
        raise ValueError(f"it returned an array of shape {output.shape}; {shape} is expected")


def _check(name: str, implementation: Implementation, results: list[mx.array], setting: CaseSetting) -> None:
    """Compare the results with float64 and emit the outcome."""
    progress, checker = setting.progress, setting.accuracy
    progress.begin_step(name, "accuracy")
    of_rows = None
    if checker.row_inputs and setting.bind is None:  # ranks make their inputs themselves, from the seed
        of_rows = _bind_runner(implementation, setting, views_of(checker.row_inputs)).results()
    result = checker.check(results, of_rows, setting.route(implementation).approximate)
    if not result.accurate:
        setting.inaccurate.add(name)
    _emit_outcome(name, result, setting)


def check_again(name: str, implementation: Implementation, runner: Runner, setting: CaseSetting) -> None:
    """Compare a call after the rounds with float64, and emit the outcome if it is inaccurate.

    The first call says nothing of those that were timed: results may be kept by shape or by the arrays' identity, and
    a race or memory that is used twice shows in some calls. The call has the negated values where the inputs are
    dense and small, whose results are those of the case with other signs; elsewhere it has the case's inputs.

    Raises:
        Exception: whatever the implementation raises.
    """
    setting.progress.begin_step(name, "accuracy")
    inputs = setting.inputs.views()
    dense = all(isinstance(x, mx.array) for x in inputs)
    size = sum(x.nbytes for x in inputs)
    negated = dense and size <= MAX_NEGATED_BYTES and setting.bind is None
    if not negated or (isinstance(implementation, ProvidesRunner) and not isinstance(runner, MlxRunner)):
        results = runner.results()
    else:
        inputs[2] = -cast("mx.array", inputs[2])
        mx.eval(inputs[2])
        made = _bind_runner(implementation, setting, inputs).results()
        _check_output(made[0], setting.workload)
        results = [x if NAMES[i] == "dV" else -x for i, x in enumerate(made)]
    result = setting.accuracy.check(results, approximate=setting.route(implementation).approximate)
    if not result.accurate:
        detail = f"not in the first call, but in one after the rounds: {result.detail}"
        _emit_outcome(name, structs.replace(result, detail=detail), setting)


def _emit_outcome(name: str, result: AccuracyResult, setting: CaseSetting) -> None:
    setting.progress.emit(
        on.AccuracyChecked(
            case=setting.progress.case,
            implementation=name,
            max_error=_finite(result.max_error),
            rms_error=_finite(result.rms_error),
            accurate=result.accurate,
            detail=result.detail,
            kv_error=None if result.kv_error is None else _finite(result.kv_error),
        )
    )


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def _emit_final_route(name: str, implementation: Implementation, setting: CaseSetting, recorded: str | None) -> Route:
    """Emit the route again: an autotuning implementation knows its path only after the first call.

    `recorded`: the path that the first call recorded. On several ranks it is shown: a rank's part of the call has a
    shape of its own, with a choice of its own, of which the route of the whole call knows nothing.
    """
    route = setting.route(implementation)
    if recorded is not None and setting.workload.ranks > 1:
        route = structs.replace(route, path=f"x{setting.workload.ranks} {recorded}")
    setting.progress.emit(on.RouteFound(case=setting.progress.case, implementation=name, route=route))
    return route


def _warm_up_and_time(name: str, runner: Runner, call_s: float, setting: CaseSetting) -> float:
    """Warm up, measure latency, and return the seconds per call."""
    progress, workload = setting.progress, setting.workload
    progress.begin_step(name, "warm up")
    min_s = WARM_UP_S[setting.device.backend]
    call_s = warm_up(runner, call_s, min_s, setting.sample_s, workload.output_bytes)
    if not setting.latencies:
        return call_s
    progress.begin_step(name, "latency")
    seconds = latency(runner, LATENCY_S)
    progress.emit(on.LatencyMeasured(case=progress.case, implementation=name, seconds=seconds))
    return call_s
