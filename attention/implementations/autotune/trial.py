"""A trial: successive halving among the candidates, the winner's accuracy, and the entry stored of both."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import mlx.core as mx
import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from attention import masks
from attention.core import events as on
from attention.core.results import Ratio
from attention.core.route import NO_NEEDS, Needs, Route, unsupported
from attention.core.workload import Workload
from attention.implementations.autotune.halving import Halving, HalvingResult
from attention.implementations.autotune.store import TrialResult, WorkloadClass, candidate_fingerprint
from attention.implementations.baseline import Baseline
from attention.implementations.bounded.blocks import MIB
from attention.implementations.bounded.implementation import Practical
from attention.implementations.calls import MlxRunner, make_inputs, needs_of
from attention.implementations.fp8 import PocFp8
from attention.implementations.fused import Poc, kernel_variants
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.implementations.protocol import Implementation
from attention.masks import Mask, Pattern
from attention.measure.accuracy import AccuracyChecker, choose_sample, judge_rows, row_tolerances
from attention.measure.device import Device
from attention.measure.reference import Rules, forward, sensitivity
from attention.measure.rounds import Clock
from attention.quantized_kv import KeyOrValue, QuantizedArray

Array = NDArray[np.float64]

MAX_EQUAL: Final = 0.5
"""Maximum share of an input that may be a single value such as zero: one-hot rows exceed it."""
SCORES: Final = 300_000
"""Number of scores checked against float64: some tens of milliseconds."""


class Task(Struct, frozen=True, kw_only=True, eq=False):
    """A call and its inputs."""

    workload: Workload
    inputs: Sequence[Any]
    """q (B, H, L, D), k and v (B, Hkv, Lk, D), and in training the output's gradient, all evaluated."""
    scale: float
    mask: Mask
    softcap: float | None = None
    max_error: float | None = None
    """The error budget: the largest relative error at which a result also counts as accurate."""

    @property
    def needs(self) -> Needs:
        """The features used that the workload does not describe."""
        return needs_of(self.softcap is not None, self.mask, (self.workload.batch, self.workload.heads))

    def with_cotangent(self) -> "Task":
        """Return the task with an output gradient added if one is needed and missing."""
        if self.workload.pass_ != "training" or len(self.inputs) > 3:
            return self
        q, _, v = self.inputs
        return structs.replace(self, inputs=[*self.inputs, mx.ones((*q.shape[:3], v.shape[3]), q.dtype)])

    def with_informative_inputs(self, max_bytes: int | None = None) -> "Task":
        """Return a task on random inputs if these inputs are unsuitable for measuring accuracy and speed, else self.

        The inputs of a warm-up call are zeros or constants, for which wrong weights give the right output; infinities
        and NaN make every candidate wrong; and a GPU computes zeros faster than random values. If new inputs would
        take more than max_bytes, the task stays as it is.
        """
        if max_bytes is not None and self.workload.input_bytes > max_bytes:
            return self
        if all(_is_informative(array) for array in self.inputs[:3]):
            return self
        return structs.replace(self, inputs=make_inputs(self.workload, 0))

    def synthetic(self, max_bytes: int) -> "Task | None":
        """Return a task of the same shapes on random inputs, for a call being traced; None if too large.

        MLX can evaluate unrelated arrays during tracing. The stand-in for an array mask hides nothing.
        """
        if self.workload.input_bytes > max_bytes:
            return None
        array = self.mask.array
        if array is not None:
            array = (mx.ones if array.dtype == mx.bool_ else mx.zeros)(array.shape, array.dtype)
            mx.eval(array)
        mask = structs.replace(self.mask, array=array)
        return structs.replace(self, inputs=make_inputs(self.workload, 0), mask=mask)


def _is_informative(array: KeyOrValue) -> bool:
    """Return whether an input (B, H, L, D) is finite, its rows differ, and no value fills more than half of it."""
    if isinstance(array, QuantizedArray):
        scaled = [part for part in array.arrays[1:] if part.dtype != mx.uint8]
        return _is_informative(array.numbers) and all(bool(mx.isfinite(part).all()) for part in scaled)
    finite = mx.isfinite(array).all()
    differ = (array != array[:, :, :1]).any() if array.shape[2] > 1 else mx.array(True)
    mixed = mx.mean((array == array[:1, :1, :1, :1]).astype(mx.float32)) <= MAX_EQUAL
    empty = mx.mean((array == 0).astype(mx.float32)) <= MAX_EQUAL
    return bool(finite & differ & mixed & empty)


class BoundCall(MlxRunner):
    """A candidate bound to a task's inputs."""

    def __init__(self, candidate: Implementation, task: Task, inputs: Sequence[Any] | None = None) -> None:
        """Bind the candidate; `inputs` of the same shapes replace the task's."""
        super().__init__(candidate, task.workload, task.inputs if inputs is None else inputs, task.scale, task.mask)
        self._softcap = task.softcap

    def _attend(self, q: mx.array, k: Any, v: Any) -> mx.array:
        return self._implementation(q, k, v, scale=self._scale, mask=self._mask, softcap=self._softcap)


class AccuracyCheck:
    """Check candidates on one task by FlashAttention 3's error rule; the reference is computed once."""

    def __init__(self, task: Task) -> None:
        """Create it; unsuitable inputs are replaced by random ones, and the reference is computed on first use."""
        self._task = task.with_informative_inputs()
        self._checker: AccuracyChecker | None = None

    def error(self, candidate: Implementation) -> tuple[float, str]:
        """Return a candidate's largest error and what is wrong with it, empty if it is accurate."""
        task = self._task
        results = BoundCall(candidate, task).results()
        own, plain = task.mask.pattern, task.softcap is None and task.mask.array is None
        if own is not None and (not plain or task.workload.mask_spec.pattern is not None):
            return _against_visible(task, own, results[0])
        if not plain:
            return _against_reference(task, results[0])
        if self._checker is None:
            self._checker = AccuracyChecker(task.workload, task.inputs, task.scale, scores=SCORES)
        rows = self._checker.row_inputs
        of_rows = BoundCall(candidate, task, rows).results() if rows else None
        result = self._checker.check(results, of_rows)
        budget = task.max_error if candidate.name == APPROXIMATE else None
        within = budget is not None and result.relative_error <= budget
        return result.max_error, "" if result.accurate or within else result.detail


def _against_reference(task: Task, output: mx.array) -> tuple[float, str]:
    """Apply the same rule with a softcap or an array mask: on the heads of one group, and on the output only."""
    sample = choose_sample(task.workload, 0, SCORES)
    batch, group = sample.groups[0]
    share = task.workload.heads // task.workload.kv_heads
    heads = slice(group * share, (group + 1) * share)
    q, k, v = task.inputs[0][batch, heads], task.inputs[1][batch, group], task.inputs[2][batch, group]
    array = task.mask.array
    part = None
    if array is not None:
        whole = slice(None)
        part = masks.mask_tile(masks.as_4d(array), slice(batch, batch + 1), heads, whole, whole)
    mask = Mask(causal=task.mask.causal, window=task.mask.window, array=part)
    plain = Baseline()(q[None], k[None, None], v[None, None], scale=task.scale, mask=mask, softcap=task.softcap)[0]
    rows = mx.array(sample.rows)
    judged = _RowJudge()
    for head in range(share):
        per_head = None
        if part is not None:
            of_head = _numpy(part[0, head if part.shape[1] > 1 else 0])
            per_head = np.broadcast_to(of_head, (task.workload.seq, task.workload.kv_seq))
        rules = Rules(scale=task.scale, causal=mask.causal, window=mask.window, mask=per_head, softcap=task.softcap)
        judged.add(q[head], k, v, rules, sample.rows, output[batch, group * share + head][rows], plain[head][rows])
    return judged.verdict(output.dtype)


class _RowJudge:
    """The errors of a group's query heads, to be judged row by row."""

    def __init__(self) -> None:
        self._errors: list[Array] = []
        self._plain_errors: list[Array] = []
        self._sensitivities: list[Array] = []

    def add(
        self,
        q: mx.array,
        k: KeyOrValue,
        v: KeyOrValue,
        rules: Rules,
        rows: NDArray[np.intp],
        output: mx.array,
        plain: mx.array,
    ) -> None:
        """Add one query head: its inputs, and the output and plain attention's at some rows."""
        inputs = _numpy(q), _numpy(k), _numpy(v)
        exact = forward(*inputs, rules, rows)
        self._errors.append(np.abs(_numpy(output) - exact.output).max(axis=-1))
        self._plain_errors.append(np.abs(_numpy(plain) - exact.output).max(axis=-1))
        self._sensitivities.append(sensitivity(*inputs, rules, exact, rows))

    def verdict(self, dtype: mx.Dtype) -> tuple[float, str]:
        """Return the largest error, infinite for NaN, and what is wrong, empty if each row is accurate."""
        errors = np.stack(self._errors)
        allowed = row_tolerances(np.stack(self._plain_errors), np.stack(self._sensitivities))
        share, detail = judge_rows(errors, allowed + float(mx.finfo(dtype).eps))
        worst = float(errors.max())
        return worst if math.isfinite(worst) else math.inf, "" if share <= 1.0 else f"output: {detail}"


def _visible_rows(
    pattern: Pattern, lengths: tuple[int, int], batches: Sequence[int], heads: Sequence[int], rows: Sequence[int]
) -> mx.array:
    """Return the keys that a pattern shows to some query rows: bool, broadcasts to (batches, heads, rows, Lk)."""
    positions = [row + lengths[1] - lengths[0] for row in rows]
    index = [
        mx.array(list(at), mx.int32).reshape([-1 if axis == n else 1 for n in range(4)])
        for axis, at in enumerate((batches, heads, positions, range(lengths[1])))
    ]
    return pattern.visible(lengths, *index)


def _against_visible(task: Task, pattern: Pattern, output: mx.array) -> tuple[float, str]:
    """Apply the same rule with a pattern: on sampled rows of one group of heads, and on the output only."""
    sample = choose_sample(task.workload, 0, SCORES)
    batch, group = sample.groups[0]
    share = task.workload.heads // task.workload.kv_heads
    lengths, rows = (task.workload.seq, task.workload.kv_seq), mx.array(sample.rows)
    heads = slice(group * share, (group + 1) * share)
    visible = _visible_rows(pattern, lengths, [batch], range(heads.start, heads.stop), sample.rows.tolist())
    array = task.mask.array
    if array is not None:
        part = masks.mask_tile(masks.as_4d(array), slice(batch, batch + 1), heads, slice(None), slice(None))
        combined = masks.combine(visible, part[:, :, rows] if part.shape[2] > 1 else part)
        assert combined is not None
        visible = combined
    visible = mx.broadcast_to(visible, (1, share, len(sample.rows), lengths[1]))
    q = task.inputs[0][batch, heads][:, rows]
    k, v = task.inputs[1][batch, group], task.inputs[2][batch, group]
    plain = Baseline()(
        q[None], k[None, None], v[None, None], scale=task.scale, mask=Mask(array=visible), softcap=task.softcap
    )[0]
    found = output[batch, heads][:, rows]
    judged = _RowJudge()
    for head in range(share):
        rules = Rules(scale=task.scale, mask=_numpy(visible[0, head]), softcap=task.softcap)
        judged.add(q[head], k, v, rules, np.arange(len(sample.rows)), found[head], plain[head])
    return judged.verdict(output.dtype)


def _numpy(array: KeyOrValue) -> Array:
    if isinstance(array, QuantizedArray):
        return array.exact()
    if array.dtype == mx.bool_:
        return np.array(array)
    return np.asarray(np.array(array.astype(mx.float32)), dtype=np.float64)


NAME: Final = "demo"


class Trial:
    """A trial of candidates on a task."""

    def __init__(
        self,
        workload: WorkloadClass,
        task: Task,
        *,
        budget_s: float,
        device: Device,
        clock: Clock,
        now: Callable[[], datetime],
    ) -> None:
        """Create a trial for a class, with a task of that class and the limits."""
        self._class = workload
        self._task = task
        self._clock = clock
        self._now = now
        self._halving = Halving(budget_s, task.workload.output_bytes, device.backend != "cpu", clock)

    def run(self, candidates: Mapping[str, Implementation]) -> TrialResult:
        """Find the fastest accurate candidate; events report start, end, and which candidates dropped out and why.

        Raises:
            RuntimeError: no candidate could be run.
        """
        on.emit_tuning(on.TrialStarted(implementation=NAME, workload=self._class.label, candidates=list(candidates)))
        started = self._clock()
        found = self._halving.run({name: BoundCall(each, self._task) for name, each in candidates.items()})
        for name, reason in found.failed.items():
            self._warn(f"{name} is out for {self._class.label}: {reason}")
        winner, error, inaccurate = self._accurate(found, candidates)
        entry = self._entry(found, winner, error, inaccurate)
        on.emit_tuning(
            on.Tuned(
                implementation=NAME,
                workload=self._class.label,
                winner=winner,
                runner_up=entry.runner_up,
                ratio=ratio_of(entry),
                seconds=max(0.0, self._clock() - started),
            )
        )
        return entry

    def _accurate(self, found: HalvingResult, candidates: Mapping[str, Implementation]) -> tuple[str, float, list[str]]:
        """Return the first accurate candidate, its error, and the inaccurate ones; or the least wrong."""
        check = AccuracyCheck(self._task)
        errors: dict[str, float] = {}
        for name in found.call_s:
            error, wrong = check.error(candidates[name])
            if not wrong:
                return name, error, list(errors)
            errors[name] = error if math.isfinite(error) else math.inf
            self._warn(f"{name} is out for {self._class.label}: inaccurate: {wrong}")
        least = min(errors, key=lambda name: errors[name])
        self._warn(f"no candidate is accurate for {self._class.label}; {least} is the least wrong")
        return least, errors[least], [name for name in errors if name != least]

    def _entry(self, found: HalvingResult, winner: str, error: float, inaccurate: list[str]) -> TrialResult:
        first = next(iter(found.call_s)) == winner
        ratio = found.ratio if first else None
        call_s = {winner: found.call_s[winner]} | {
            name: seconds for name, seconds in found.call_s.items() if name not in inaccurate
        }
        return TrialResult(
            winner=winner,
            tuned=self._now(),
            ratio=ratio.value if ratio else None,
            low=ratio.low if ratio else None,
            high=ratio.high if ratio else None,
            max_error=error if math.isfinite(error) else None,
            untried=[*found.untried, *found.failed, *inaccurate],
            call_s=call_s,
            alone_s={name: seconds for name, seconds in found.alone_s.items() if name in call_s},
            made_with=candidate_fingerprint(),
            workload=self._class,
        )

    @staticmethod
    def _warn(text: str) -> None:
        on.emit_tuning(on.Message(level="warning", text=f"{NAME}: {text}"))


def ratio_of(entry: TrialResult) -> Ratio | None:
    """Return the winner's speedup over the runner-up, with its interval."""
    if entry.ratio is None or entry.low is None or entry.high is None:
        return None
    return Ratio(value=entry.ratio, low=entry.low, high=entry.high, significant=entry.low > 1)


SMALLEST_CANDIDATE: Final = "practical"
"""The candidate used where no other is predicted to fit in memory."""
BUDGETS: Final = (32 * MIB, 8 * MIB)
"""Memory budgets of `practical`, in bytes, beside its default: smaller ones give smaller blocks."""


class CompiledSdpa(MlxSdpa):
    """MLX's SDPA inside mx.compile; with a pattern it would be `mlx`, whose mask is an array.

    With quantized keys and values it is `mlx` too: compiling would save two of a dozen operations.
    """

    def route(self, workload: Workload, device: Device, needs: Needs = NO_NEEDS) -> Route:
        """Return the route of MLX's SDPA; a pattern and quantized keys and values are unsupported."""
        if workload.quantized:
            return unsupported("with quantized keys and values it is `mlx`")
        if workload.structured or needs.pattern:
            return unsupported("with a pattern it is MLX's SDPA")
        return super().route(workload, device, needs)

    def __call__(
        self, q: mx.array, k: KeyOrValue, v: KeyOrValue, *, scale: float, mask: Mask, softcap: float | None = None
    ) -> mx.array:
        """Compute attention; an array mask is an input of the compiled function, not a captured constant."""
        compiled = _compiled(scale, mask.causal, mask.window)
        return compiled(q, k, v) if mask.array is None else compiled(q, k, v, mask.array)


@lru_cache(maxsize=256)
def _compiled(scale: float, causal: bool, window: int | None) -> Callable[..., mx.array]:
    sdpa = MlxSdpa()

    def attend(q: mx.array, k: mx.array, v: mx.array, array: mx.array | None = None) -> mx.array:
        return sdpa(q, k, v, scale=scale, mask=Mask(causal=causal, window=window, array=array))

    return mx.compile(attend)


APPROXIMATE: Final = PocFp8.name
"""The candidate that is tried only within an error budget."""


def candidates() -> dict[str, Implementation]:
    """Return all candidates by name: the custom kernel's variants, practical's block sizes, MLX's SDPA, baseline."""
    kernels = {f"poc {variant}": Poc(variant) for variant in kernel_variants()}
    blocks = {f"practical {budget // MIB} MiB": Practical(budget) for budget in BUDGETS}
    return {
        "poc": Poc(),
        **kernels,
        SMALLEST_CANDIDATE: Practical(),
        **blocks,
        "mlx": MlxSdpa(),
        "mlx compiled": CompiledSdpa(),
        "baseline": Baseline(),
    }


def fitting_candidates(
    all_of_them: Mapping[str, Implementation], workload: Workload, device: Device, needs: Needs
) -> list[str]:
    """Return the names of candidates that support a workload and are predicted to fit in memory, fused ones first.

    If none fits, the list holds the leanest alone. Candidates that would fall back are left out, because the fallback
    is itself a candidate, and so are duplicates of another candidate's path: smaller budgets that change nothing, and
    `practical` where it is MLX's SDPA. With quantized keys and values `mlx` is no candidate on CUDA, where MLX compiles
    its packed products for half a minute.
    """
    routes = {name: candidate.route(workload, device, needs) for name, candidate in all_of_them.items()}
    fit = [
        name
        for name, route in routes.items()
        if route.supported and not route.fallback and (route.predicted_bytes or 0) <= device.available_bytes
    ]
    if workload.quantized and device.backend == "cuda":
        fit = [name for name in fit if name != "mlx"]
    known = {(routes["mlx"].path, routes["mlx"].predicted_bytes)} if "mlx" in fit else set()
    chosen = []
    for name in fit:
        path = (routes[name].path, routes[name].predicted_bytes)
        if not name.startswith(SMALLEST_CANDIDATE) or path not in known:
            chosen.append(name)
            known.add(path)
    if not chosen and SMALLEST_CANDIDATE in routes:
        return [SMALLEST_CANDIDATE]
    return sorted(chosen, key=lambda name: not routes[name].fused)
