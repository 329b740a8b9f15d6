"""Accuracy: FlashAttention 3's error rule against a float64 reference.

A result o passes if max|o - ref| <= 2 max|o_pt - ref| + atol, where ref is exact, o_pt is plain attention in the same
precision on the same inputs (quantized keys and values rounded to it), and atol = 2 max|ref + 0.3 - 0.3 - ref| in that
precision; for gradients 3 in place of the first 2 (hopper/test_flash_attn.py in Dao-AILab/flash-attention). NaN and
infinity never pass.

That rule takes the largest error over all rows, so that one ill-conditioned row would excuse an error in any other. An
output's rows are therefore judged one by one (`row_tolerances`): a row is allowed no more than its own condition gives.

Results in fp8 arithmetic cannot pass that rule. They pass if RMS(o - ref) <= 3 RMS(o_8 - ref), where o_8 is the output
of a published recipe for 8 bits on the same inputs (`recipe_output`).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import mlx.core as mx
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from attention.core.workload import Workload
from attention.measure.reference import Result, Rules, forward, gradients, recipe_output, sensitivity, visible
from attention.quantized_kv import KeyOrValue, QuantizedArray

FORWARD_FACTOR: Final = 2.0
FP8_FACTOR: Final = 3.0
GRADIENT_FACTOR: Final = 3.0
SCORES: Final = 4_000_000
"""Maximum number of scores computed by the reference; about half a second in float64."""
HEADS: Final = 64
"""Maximum number of query heads compared."""
NAMES: Final = ("output", "dQ", "dK", "dV")

Array = NDArray[np.float64]


class AccuracyResult(Struct, frozen=True, kw_only=True):
    """The result of a comparison."""

    max_error: float
    """Largest absolute difference from float64 over all compared tensors."""
    rms_error: float
    """Root mean square difference over all compared tensors."""
    accurate: bool
    detail: str
    """The tensor with the largest error relative to its tolerance, with both values."""
    relative_error: float
    """Root mean square difference of the output, relative to the root mean square of the reference."""
    kv_error: float | None = None
    """RMS difference from float64 attention over the keys and values before quantization, relative to its RMS."""


class SampledPart(Struct, frozen=True):
    """The part of a workload that is compared."""

    groups: tuple[tuple[int, int], ...]
    """(sequence, key head); all query heads that share the key head are compared."""
    rows: NDArray[np.intp]
    """Query rows in ascending order."""


class ReferenceTensor(Struct, frozen=True):
    """Reference values of one tensor of one group, with the tolerance."""

    exact: Array
    plain_errors: Array
    """Largest error of plain attention in each row: (heads or 1, rows)."""
    rounding: float
    sensitivity: Array | None
    """`reference.sensitivity` of the rows, in the same shape; None for gradients."""


class AccuracyChecker:
    """Compare the results of implementations on one case with a reference that is computed once.

    dK and dV depend on every query row. If a case is too large to compute all rows in float64, they can only be
    compared on inputs whose output gradient is zero outside the sampled rows: `row_inputs`, None if not needed.
    """

    def __init__(
        self,
        workload: Workload,
        inputs: Sequence[Any],
        scale: float | None = None,
        seed: int = 0,
        scores: int = SCORES,
        unquantized: Sequence[mx.array] | None = None,
    ) -> None:
        """Choose the sample and compute its reference.

        Args:
            workload: the case.
            inputs: q, k, v (k and v may be quantized), and in training the output's gradient.
            scale: factor of the scores, the workload's by default.
            seed: of the choice of rows and heads.
            scores: maximum number of scores the reference computes; it limits the rows compared.
            unquantized: the inputs before keys and values were quantized, for `kv_error`.
        """
        self.workload = workload
        self.sample = choose_sample(workload, seed, scores)
        self.row_inputs: list[Any] | None = None
        if workload.pass_ == "training" and len(self.sample.rows) < workload.seq:
            self.row_inputs = [*inputs[:3], _only_rows(inputs[3], self.sample.rows)]
        scale = workload.scale if scale is None else scale
        self._inputs, self._scale = list(inputs[:3]), scale
        self._expected = [self._of_group(inputs, group, scale) for group in self.sample.groups]
        self._unquantized = (
            None
            if unquantized is None
            else [self._exact_output(unquantized, group, scale) for group in self.sample.groups]
        )

    def check(
        self,
        results: Sequence[mx.array],
        row_results: Sequence[mx.array] | None = None,
        approximate: str | None = None,
    ) -> AccuracyResult:
        """Compare the results of an implementation.

        Args:
            results: the output, and in training dQ, dK and dV, from the inputs.
            row_results: the same from `row_inputs`; without them dK and dV of a large case are only checked
                for NaN and infinity, and the detail says so.
            approximate: the route's `approximate`; only the output of an approximate result is compared.
        """
        if approximate is not None:
            return self._check_approximate(results[0], approximate)
        compared = list(results)
        unseen = ""
        if self.row_inputs is not None:
            compared[2:] = [] if row_results is None else row_results[2:]
            unseen = "" if row_results is not None else "; dK and dV were not compared"
        shares, errors, details = [], [], []
        for index, result in enumerate(compared):
            difference, allowed = self._compare(index, result)
            share, detail = judge_rows(_of_rows(difference), allowed)
            shares.append(share)
            errors.append(difference.ravel())
            details.append(f"{NAMES[index]}: {detail}")
        broken = [NAMES[i] for i, x in enumerate(results) if not bool(mx.isfinite(x).all())]
        worst = int(np.argmax(shares))
        every = np.concatenate(errors)
        return AccuracyResult(
            max_error=_largest(every),
            rms_error=_rms(every),
            accurate=not broken and shares[worst] <= 1.0,
            detail=f"{', '.join(broken)}: NaN or infinity" if broken else details[worst] + unseen,
            kv_error=None if self._unquantized is None else self._kv_error(results[0], self._unquantized),
            relative_error=math.inf if broken else self._relative(_rms(errors[0])),
        )

    def _kv_error(self, output: mx.array, unquantized: Sequence[Array]) -> float | None:
        exact = np.concatenate([each.ravel() for each in unquantized])
        found = np.concatenate([self._part(0, output, group).ravel() for group in self.sample.groups])
        size = np.sqrt(np.mean(np.square(exact)))
        return float(np.sqrt(np.mean(np.square(found - exact))) / size) if size else None

    def _check_approximate(self, output: mx.array, arithmetic: str) -> AccuracyResult:
        difference = self._compare(0, output)[0].ravel()
        error, allowed = self._relative(_rms(difference)), FP8_FACTOR * self._recipe_error
        finite = bool(mx.isfinite(output).all())
        words = f"output: relative RMS error {error:.2g}, {allowed:.2g} allowed in {arithmetic}"
        return AccuracyResult(
            max_error=_largest(difference),
            rms_error=_rms(difference),
            accurate=finite and error <= allowed,
            detail=words if finite else "output: NaN or infinity",
            relative_error=error,
        )

    def _relative(self, rms: float) -> float:
        """Return an RMS difference of the output relative to the RMS of the reference."""
        whole = _rms(np.concatenate([group[0].exact.ravel() for group in self._expected]))
        return rms / whole if whole else math.inf if rms else 0.0

    @cached_property
    def _recipe_error(self) -> float:
        """The relative error of the published recipe for 8 bits."""
        differences = []
        for group, expected in zip(self.sample.groups, self._expected, strict=True):
            q, k, v = (_numpy(self._cut(index, array, group)) for index, array in enumerate(self._inputs))
            rules = self._rules(group, self._scale)
            made = [recipe_output(head, k[0], v[0], own, self.sample.rows) for head, own in zip(q, rules, strict=True)]
            differences.append((np.stack(made) - expected[0].exact).ravel())
        return self._relative(_rms(np.concatenate(differences)))

    def _compare(self, index: int, result: mx.array) -> tuple[Array, Array]:
        """Return the differences of one tensor's sample, (heads, rows, width), and the tolerances of its rows."""
        expected = [group[index] for group in self._expected]
        found = [self._part(index, result, group) for group in self.sample.groups]
        differences = [a - b.exact for a, b in zip(found, expected, strict=True)]
        return np.concatenate(differences), _allowed(expected, FORWARD_FACTOR if index == 0 else GRADIENT_FACTOR)

    def _of_group(self, inputs: Sequence[Any], group: tuple[int, int], scale: float) -> list[ReferenceTensor]:
        arrays = [self._cut(index, array, group) for index, array in enumerate(inputs)]
        rules = self._rules(group, scale)
        exact, sensitivities = _exact([_numpy(array) for array in arrays], rules, self.sample.rows)
        dtype = inputs[0].dtype
        rounded = [x.dequantized(dtype) if isinstance(x, QuantizedArray) else x for x in arrays]
        plain = _plain(rounded, scale, self._seen(rules), self.sample.rows)
        return [
            ReferenceTensor(a, _of_rows(_numpy(b) - a), _rounding(a, b.dtype), None if index else sensitivities)
            for index, (a, b) in enumerate(zip(exact, plain, strict=True))
        ]

    def _exact_output(self, inputs: Sequence[Any], group: tuple[int, int], scale: float) -> Array:
        arrays = [_numpy(self._cut(index, array, group)) for index, array in enumerate(inputs)]
        return _outputs(_forward(arrays, self._rules(group, scale), self.sample.rows))

    def _cut(self, index: int, array: KeyOrValue, group: tuple[int, int]) -> KeyOrValue:
        """Return an input's part in a group: (query heads or 1, length, width)."""
        share = self.workload.heads // self.workload.kv_heads if index in (0, 3) else 1
        return array[group[0], group[1] * share : (group[1] + 1) * share]

    def _part(self, index: int, result: mx.array, group: tuple[int, int]) -> Array:
        """Return a result's part in a group; of output and dQ only the sampled rows."""
        share = self.workload.heads // self.workload.kv_heads if index < 2 else 1
        part = result[group[0], group[1] * share : (group[1] + 1) * share]
        return _numpy(part[:, mx.array(self.sample.rows)] if index < 2 else part)

    def _rules(self, group: tuple[int, int], scale: float) -> list[Rules]:
        """Return the rules of each query head of a group."""
        share = self.workload.heads // self.workload.kv_heads
        spec = self.workload.mask_spec
        heads = range(group[1] * share, (group[1] + 1) * share)
        return [Rules(scale=scale, spec=spec, head=head) for head in heads]

    def _seen(self, rules: Sequence[Rules]) -> mx.array:
        """Return the visible pairs of a group's heads: (heads or 1, rows, Lk)."""
        lengths = self.workload.seq, self.workload.kv_seq
        own = rules if self.workload.mask_spec.per_head else rules[:1]
        return mx.array(np.stack([visible(each.spec, self.sample.rows, *lengths, each.head) for each in own]))


def choose_sample(workload: Workload, seed: int, scores: int = SCORES) -> SampledPart:
    """Choose all of a small workload; of a large one the first, the last and random rows, of few heads."""
    random = np.random.default_rng(seed)
    share = workload.heads // workload.kv_heads
    pairs = [(b, h) for b in range(min(workload.batch, HEADS)) for h in range(min(workload.kv_heads, HEADS))]
    row_cost = share * workload.kv_seq
    most = max(1, min(len(pairs), HEADS // share, scores // (row_cost * min(workload.seq, 64))))
    picked = sorted(random.choice(len(pairs), most, replace=False))
    rows = max(2, min(workload.seq, scores // (row_cost * most)))
    if rows >= workload.seq:
        chosen = np.arange(workload.seq)
    else:
        inner = random.choice(np.arange(1, workload.seq - 1), rows - 2, replace=False)
        chosen = np.sort(np.concatenate([[0, workload.seq - 1], inner]))
    return SampledPart(tuple(pairs[i] for i in picked), chosen.astype(np.intp))


def _forward(arrays: Sequence[Array], rules: Sequence[Rules], rows: NDArray[np.intp]) -> list[Result]:
    """Return the reference of each query head of one group."""
    q, k, v = arrays[0], arrays[1][0], arrays[2][0]
    return [forward(head, k, v, own, rows) for head, own in zip(q, rules, strict=True)]


def _outputs(results: Sequence[Result]) -> Array:
    return np.stack([result.output for result in results])


def _exact(arrays: Sequence[Array], rules: Sequence[Rules], rows: NDArray[np.intp]) -> tuple[list[Array], Array]:
    """Return output, and in training dQ, dK, dV, of the query heads of one group, and the rows' sensitivities.

    The shapes are (heads or 1, rows or Lk, width) and (heads, rows).
    """
    q, k, v = arrays[0], arrays[1][0], arrays[2][0]
    results = _forward(arrays, rules, rows)
    output = _outputs(results)
    sensitivities = np.stack(
        [sensitivity(head, k, v, own, each, rows) for head, own, each in zip(q, rules, results, strict=True)]
    )
    if len(arrays) < 4:
        return [output], sensitivities
    made = [gradients(head, k, v, upstream, own, rows) for head, upstream, own in zip(q, arrays[3], rules, strict=True)]
    d_q, d_k, d_v = (list(column) for column in zip(*made, strict=True))
    return [output, np.stack(d_q), np.sum(d_k, axis=0)[None], np.sum(d_v, axis=0)[None]], sensitivities


def _plain(arrays: Sequence[mx.array], scale: float, seen: mx.array, rows: NDArray[np.intp]) -> list[mx.array]:
    """Return the same by unfused attention in the inputs' precision."""
    chosen = mx.array(rows)
    nonempty = seen.any(axis=-1, keepdims=True)
    opened = seen | ~nonempty

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scores = mx.where(opened, (q * scale) @ k.swapaxes(-1, -2), mx.array(-mx.inf, q.dtype))
        output = mx.softmax(scores, axis=-1, precise=True) @ v
        return mx.where(nonempty, output, mx.zeros((), output.dtype))

    primals = [arrays[0][:, chosen], arrays[1], arrays[2]]
    if len(arrays) < 4:
        made = [attend(*primals)]
    else:
        outputs, gradients = mx.vjp(attend, primals, [arrays[3][:, chosen]])
        made = [*outputs, *gradients]
    mx.eval(made)
    return made


def _only_rows(array: mx.array, rows: NDArray[np.intp]) -> mx.array:
    keep = np.zeros((array.shape[2], 1), dtype=np.bool_)
    keep[rows] = True
    kept = mx.where(mx.array(keep), array, mx.zeros((), array.dtype))
    mx.eval(kept)
    return kept


def row_tolerances(plain_errors: Array, sensitivities: Array, factor: float = FORWARD_FACTOR) -> Array:
    """Return the error that each row of an output is allowed, without the rounding of the result.

    It is the factor times plain attention's error, as a multiple of a row's sensitivity, in the row where that is
    largest; and never more than the factor times plain attention's largest error.

    Args:
        plain_errors: the largest error of plain attention in each row, any shape.
        sensitivities: `reference.sensitivity` of the rows, same shape.
        factor: of plain attention's error.
    """
    relative = np.divide(plain_errors, sensitivities, out=np.zeros_like(plain_errors), where=sensitivities > 0.0)
    own = np.multiply(relative.max(initial=0.0), sensitivities, out=np.zeros_like(relative), where=sensitivities > 0.0)
    allowed: Array = factor * np.minimum(own, _largest(plain_errors))
    return allowed


def judge_rows(errors: Array, allowed: Array) -> tuple[float, str]:
    """Return the largest ratio of a row's error to its tolerance, infinite for NaN, and both of that row in words."""
    shares = np.where(
        errors == 0.0, 0.0, np.divide(errors, allowed, out=np.full_like(errors, np.inf), where=allowed > 0.0)
    )
    shares = np.where(np.isfinite(errors), shares, np.inf).ravel()
    worst = int(np.argmax(shares))
    return float(shares[worst]), f"{errors.ravel()[worst]:.2g} off, {allowed.ravel()[worst]:.2g} allowed"


def _allowed(expected: Sequence[ReferenceTensor], factor: float) -> Array:
    """Return the tolerances of the rows, with all groups together treated as one tensor; one for all of a gradient."""
    plain = np.concatenate([e.plain_errors for e in expected])
    rounding = max(e.rounding for e in expected)
    sensitivities = [e.sensitivity for e in expected if e.sensitivity is not None]
    if not sensitivities:
        return np.full_like(plain, factor * _largest(plain) + rounding)
    return row_tolerances(plain, np.concatenate(sensitivities), factor) + rounding


def _of_rows(difference: Array) -> Array:
    """Return the largest difference in each row of (..., rows, width); NaN if a row has any."""
    largest: Array = np.abs(difference).max(axis=-1, initial=0.0)
    return largest


def _rounding(exact: Array, dtype: mx.Dtype) -> float:
    """Return atol: 2 max|ref + 0.3 - 0.3 - ref| in the given precision."""
    low = mx.array(exact.astype(np.float32)).astype(dtype)
    shifted = _numpy((low + mx.array(0.3, dtype)) - mx.array(0.3, dtype))
    return 2.0 * _largest(shifted - _numpy(low))


def _largest(difference: Array) -> float:
    return float(np.max(np.abs(difference), initial=0.0))  # NaN if any is NaN


def _rms(difference: Array) -> float:
    return float(np.sqrt(np.mean(np.square(difference))))


def _numpy(array: KeyOrValue) -> Array:
    if isinstance(array, QuantizedArray):
        return array.exact()
    return np.asarray(np.array(array.astype(mx.float32)), dtype=np.float64)
