"""Error budgets: approximate results are compared with float64 on the inputs of the call itself."""

from collections.abc import Callable, Sequence
from typing import Final

import mlx.core as mx

from attention.core.bounded_dict import BoundedDict
from attention.core.errors import UnsupportedError
from attention.core.workload import Workload
from attention.implementations.calls import try_evaluate
from attention.measure.accuracy import AccuracyChecker

SCORES: Final = 300_000
"""Largest number of scores in a comparison, which then takes some tens of milliseconds."""

Compare = Callable[[Workload, Sequence[mx.array], float, mx.array, int], float]
"""Returns the relative error of an output, see `relative_error`."""


class BudgetExceededError(UnsupportedError):
    """An approximate result whose error is above the caller's budget."""


class ErrorUnknownError(UnsupportedError):
    """An approximate result of a traced call, whose kind has not been compared with float64 yet."""


def relative_error(workload: Workload, inputs: Sequence[mx.array], scale: float, output: mx.array, seed: int) -> float:
    """Return the relative error of an output on rows chosen by a seed."""
    return AccuracyChecker(workload, inputs, scale, seed=seed, scores=SCORES).check([output]).relative_error


class ErrorBudget:
    """The largest relative error that the results of one implementation may have.

    The relative error of an output is RMS(output - exact) / RMS(exact) over sampled rows, the first and the last among
    them, where `exact` is float64 attention over the same inputs. It is measured in the first call of a kind, and in
    the 2nd, 4th, 8th and so on, since other inputs of the same shape may have another error.
    """

    def __init__(self, name: str, max_error: float, compare: Compare = relative_error) -> None:
        """Create it for an implementation's name; nothing has been measured."""
        self._name = name
        self._compare = compare
        self._max_error = max_error
        self._calls = BoundedDict[Workload, int](256)

    def check(self, workload: Workload, inputs: Sequence[mx.array], scale: float, output: mx.array) -> None:
        """Count a call, and compare its output with float64 if that is due, which evaluates the output.

        Args:
            workload: kind of the call.
            inputs: q, k and v.
            scale: factor of the scores.
            output: its result.

        Raises:
            BudgetExceededError: the error is above the budget.
            ErrorUnknownError: the call is traced and the first of its kind: there are no values to measure it on.
        """
        calls = self._calls.get(workload) or 0
        if calls and (calls + 1) & calls:
            self._calls[workload] = calls + 1
            return
        if not try_evaluate(*inputs):
            if not calls:
                raise ErrorUnknownError(
                    f"{self._name}: its error cannot be measured while a call is traced; call it once before"
                )
            return
        error = self._compare(workload, inputs, scale, output, calls)
        if not error <= self._max_error:
            self._calls.pop(workload, None)
            raise BudgetExceededError(
                f"{self._name}: its error on these inputs is {error:.2g}, above max_error {self._max_error:g}"
            )
        self._calls[workload] = calls + 1
