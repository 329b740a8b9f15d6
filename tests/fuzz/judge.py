"""Accuracy checks of one implementation on a problem, by FlashAttention 3's rule.

The accepted error of an output is twice that of plain attention in the same type, of a gradient three times, plus the
rounding of the result. A backward pass that recomputes the weights in float32 has an error that plain attention may
not have: that counts as well, see `reference.recomputed_results`. Plain attention in 16 bits clips a large mask; what
float32 loses beside it counts as well, and so does the error of plain attention with each row's largest mask value
subtracted. On CUDA the error of TF32 counts too: MLX multiplies float32 matrices in TF32 there if cuBLAS chooses to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import mlx.core as mx
import numpy as np

from attention import UnsupportedError, UsageError, attention
from attention.implementations.bounded.implementation import Practical
from attention.masks import alibi
from tests.fuzz import reference
from tests.fuzz.problem import Floats, Mode, Problem, exact

Verdict = Literal["ok", "unsupported", "inaccurate", "refused", "exception", "crashed"]
VERDICTS: Final[tuple[Verdict, ...]] = ("ok", "unsupported", "inaccurate", "refused", "exception", "crashed")
FAILURES: Final = ("inaccurate", "refused", "exception", "crashed")
PEERS: Final = ("mlx", "torch")
"""Implementations that are tested unmodified: their errors are not the project's."""
NAMES: Final = ("output", "dQ", "dK", "dV", "dMask")
NAMES_PACKED: Final = ("output", "dQ", "dMask")
"""Names of the results with quantized keys and values, whose gradients are not checked."""
TRANSFORMS: Final = ("plain", "compile", "checkpoint", "vmap", "vmap_q", "vmap_grad", "grad_compile")
"""Transformations of a call. `vmap`: mapped, and then differentiated; `vmap_q`: with q alone mapped; `vmap_grad`: the
gradient mapped; `grad_compile`: the gradient compiled."""
OUTPUT_FACTOR: Final = 2
GRADIENT_FACTOR: Final = 3
MAX_RECOMPUTED: Final = 1e-3
"""Largest error, relative to the largest number, that is put down to recomputed weights."""
SCORE_ROUNDING: Final = 2**-22
"""Relative error of a weight per unit of a score: a few roundings of float32."""


@dataclass
class Outcome:
    """The outcome of one implementation on a problem."""

    verdict: Verdict
    detail: str = ""
    """One line: the error, or the result that is off and by how much."""


def implementations(problem: Problem, mode: Mode, with_torch: bool, chosen: str | None = None) -> dict[str, Any]:
    """Return the implementations to be run: names, or `practical` with a given budget.

    Args:
        problem: the problem to run.
        mode: the mode; `demo` runs only that implementation.
        with_torch: whether torch is included, forward only.
        chosen: only these, comma-separated; FILE.py:CLASS is an external one.
    """
    if mode == "demo":
        return {"demo": "demo"}
    made: dict[str, Any] = {name: name for name in ("baseline", "poc", "practical", "mlx")}
    if problem.packed and mode == "gradient":
        del made["poc"]  # its kernels refuse it
    made |= {name: Practical(budget) for name, budget in problem.budgets.items()}
    if mode == "forward" and with_torch:
        made["torch"] = "torch"
    if chosen is None:
        return made
    return {name: made.get(name, name) for name in chosen.split(",") if name in made or ".py:" in name}


class Judge:
    """The references of a problem, computed once for all implementations."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._names = NAMES_PACKED if problem.packed else NAMES
        keep, added = reference.visible(problem)
        with np.errstate(all="ignore"):
            self.expected = reference.expected(problem, keep, added)
            self.plain = reference.plain_results(problem, keep, added)
            self.largest_on_gpu = 0.0
            if mx.default_device() == mx.Device(mx.gpu):  # MLX's fused kernels there keep scores in float32
                self.largest_on_gpu = reference.largest_score(problem)
            self.in_tf32 = self.expected
            if reference.multiplies_in_tf32(problem):
                self.in_tf32 = reference.expected(problem, keep, added, is_product_in_tf32=True)
            self.recomputed: list[list[Floats]] = []
            if problem.cotangent is not None and problem.q.dtype == mx.float32:
                self.recomputed = [
                    reference.recomputed_results(problem, keep, added, order) for order in reference.ORDERS
                ]
            self.in_float32, self.shifted = self.expected, self.plain
            if added is not None and problem.q.dtype != mx.float32:
                self.shifted = reference.plain_results(problem, keep, added, is_shifted=True)
            if added is not None:
                self.in_float32 = reference.expected(problem, keep, added, is_sum_in_float32=True)

    def outcome(self, name: str, implementation: Any) -> Outcome:
        """Run an implementation and check its result; an exception is an outcome."""
        try:
            results = run(self.problem, implementation)
            mx.eval(results)
            found = [exact(result) for result in results]
        except UnsupportedError as error:
            return _one_line("unsupported", error)
        except UsageError as error:
            return _one_line("unsupported" if self.problem.may_be_refused else "refused", error)
        except Exception as error:
            return Outcome("exception", f"{type(error).__name__}: {str(error)[:300]}")
        return self._judged(name, found)

    def _judged(self, name: str, found: list[Floats]) -> Outcome:
        for i, (result, expected, plain) in enumerate(zip(found, self.expected, self.plain, strict=True)):
            name_of = self._names[i]
            if result.shape != expected.shape:
                return Outcome("inaccurate", f"{name_of}: shape {result.shape}, not {expected.shape}")
            if not np.isfinite(expected).all():
                continue
            allowed = self._allowed(name, i, expected, plain)
            error = float(np.abs(result - expected).max(initial=0))
            if not error <= allowed:
                largest = float(np.abs(expected).max(initial=0))
                return Outcome("inaccurate", f"{name_of}: {error:.3g} off, {allowed:.3g} allowed, max {largest:.3g}")
        return Outcome("ok")

    def _allowed(self, name: str, index: int, expected: Floats, plain: Floats) -> float:
        """Return the largest error that is accepted of a result."""
        largest = float(np.abs(expected).max(initial=0))
        of_plain, of_float32, of_tf32, of_shifted = (
            np.abs(rounded - expected).max(initial=0)
            for rounded in (plain, *(each[index] for each in (self.in_float32, self.in_tf32, self.shifted)))
        )
        of_plain = np.maximum.reduce([of_plain, of_float32, of_tf32, of_shifted])  # NaN stays NaN
        for results in self.recomputed:
            if 0 < index < len(results):
                error = np.abs(results[index] - expected).max(initial=0)
                of_plain = np.maximum(of_plain, min(np.nan_to_num(error, posinf=0.0), MAX_RECOMPUTED * largest))
        if not np.isfinite(of_plain):  # plain attention overflowed in its type; float32 inside would not have
            if name in PEERS:
                return np.inf
            of_plain = np.fmax.reduce([0.05 * largest + 0.05, of_float32, of_tf32])
        dtype = self._result_dtype(index)
        slack = (2e-6 if dtype == mx.float32 else 2e-3) * (largest + 1)
        slack += SCORE_ROUNDING * max(self.problem.largest_score, self.largest_on_gpu) * largest
        return (GRADIENT_FACTOR if index else OUTPUT_FACTOR) * of_plain + rounding(expected, dtype) + slack

    def _result_dtype(self, index: int) -> mx.Dtype:
        """Return the dtype that a result is rounded to; a mask's may have fewer bits than that of the inputs."""
        mask, dtype = self.problem.mask, self.problem.q.dtype
        is_of_mask = self._names[index] == "dMask" and isinstance(mask, mx.array) and dtype == mx.float32
        return mask.dtype if is_of_mask else dtype


def _one_line(verdict: Verdict, error: Exception) -> Outcome:
    """Whether a refusal is one line."""
    text = str(error)
    return Outcome("exception", f"a refusal of several lines: {text!r}") if "\n" in text else Outcome(verdict, text)


def rounding(expected: Floats, dtype: mx.Dtype) -> float:
    """Return 2 max|x + 0.3 - 0.3 - x| in a type, as in FlashAttention's tests."""
    low = mx.array(expected.astype(np.float32)).astype(dtype)
    return float(2 * np.abs(exact((low + mx.array(0.3, dtype)) - mx.array(0.3, dtype)) - exact(low)).max(initial=0))


def run(problem: Problem, implementation: Any) -> list[mx.array]:
    """Return the output and, with a cotangent, the gradients, computed under the problem's transformation."""
    primals = [problem.q, *(() if problem.packed else (problem.k, problem.v))]
    differentiable = problem.has_mask_gradient and isinstance(problem.mask, mx.array)
    is_mapped = problem.cotangent is None and problem.transform == "vmap" and isinstance(problem.mask, mx.array)
    if differentiable or is_mapped:
        primals.append(problem.mask)

    def attend(q: mx.array, *given: mx.array) -> mx.array:
        k, v, *mask = (problem.k, problem.v, *given) if problem.packed else given
        return attention(
            q,
            k,
            v,
            scale=problem.scale,
            mask=mask[0] if mask else problem.mask,
            window=problem.window,
            softcap=problem.softcap,
            score_mod=None if problem.slopes is None else alibi(problem.slopes),
            implementation=implementation,
        )

    if problem.cotangent is None:
        return [_forward(problem.transform, attend, primals)]
    return _with_gradients(problem.transform, attend, primals, problem.cotangent)


def _forward(transform: str, attend: Callable[..., mx.array], primals: list[mx.array]) -> mx.array:
    if transform == "compile":
        return mx.compile(attend)(*primals)
    if transform == "vmap":
        mapped: mx.array = mx.vmap(attend)(*_pairs(primals))
        return mapped[0]
    if transform == "vmap_q":
        axes = (0, *(None for _ in primals[1:]))
        only_q: mx.array = mx.vmap(attend, in_axes=axes)(mx.stack([primals[0], primals[0] * 0.5]), *primals[1:])
        return only_q[0]
    return attend(*primals)


def _with_gradients(
    transform: str, attend: Callable[..., mx.array], primals: list[mx.array], cotangent: mx.array
) -> list[mx.array]:

    def gradient_of(function: Callable[..., mx.array]) -> Callable[..., list[mx.array]]:
        made = mx.grad(function, argnums=tuple(range(len(primals))))
        return made if len(primals) > 1 else lambda *given: [made(*given)]  # MLX returns an only gradient itself

    def loss(*given: mx.array) -> mx.array:
        return (attend(*given).astype(mx.float32) * cotangent.astype(mx.float32)).sum()

    def loss_of_pairs(*given: mx.array) -> mx.array:
        return (mx.vmap(attend)(*given)[0].astype(mx.float32) * cotangent.astype(mx.float32)).sum()

    if transform == "vmap":
        pairs = _pairs(primals)
        return [mx.vmap(attend)(*pairs)[0], *(x[0] for x in gradient_of(loss_of_pairs)(*pairs))]
    if transform == "vmap_grad":
        return [attend(*primals), *(x[0] for x in mx.vmap(gradient_of(loss))(*_pairs(primals)))]
    if transform == "vmap_q":
        q = mx.stack([primals[0], primals[0] * 0.5])
        axes = (0, *(None for _ in primals[1:]))
        mapped = mx.vmap(gradient_of(loss), in_axes=axes)(q, *primals[1:])
        return [attend(*primals), *(x[0] for x in mapped)]
    if transform == "grad_compile":
        return [attend(*primals), *mx.compile(gradient_of(loss))(*primals)]
    function = {"compile": mx.compile, "checkpoint": mx.checkpoint}.get(transform, lambda f: f)(attend)
    outputs, gradients = mx.vjp(function, primals, [cotangent])
    return [*outputs, *gradients]


def _pairs(primals: list[mx.array]) -> list[mx.array]:
    """Return two of each array along a new axis, the second one halved, to be mapped over."""
    return [mx.stack([x, x if x.dtype == mx.bool_ else x * 0.5]) for x in primals]
