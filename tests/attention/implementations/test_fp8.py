"""`poc-fp8`: what it refuses, in one line each, and error budgets."""

from typing import Any

import mlx.core as mx
import pytest
from msgspec import structs

from attention import UnsupportedError, attention
from attention.core.errors import KernelUnavailable
from attention.core.route import Needs, Route
from attention.core.workload import Workload
from attention.implementations import fp8, load_implementation
from attention.implementations.baseline import Baseline
from attention.implementations.error_budget import BudgetExceededError, ErrorBudget, ErrorUnknownError, relative_error
from attention.implementations.fp8 import PocFp8
from attention.masks import Mask
from tests.support.attention_examples import CPU

PREFILL = Workload(seq=256, heads=2, head_dim=128, dtype="bfloat16", mask="causal")
CUDA = structs.replace(CPU, backend="cuda")


@pytest.mark.parametrize(
    ("workload", "needs", "words"),
    [
        (PREFILL, Needs(), "needs a Hopper GPU, and MLX runs on the CPU"),
        (structs.replace(PREFILL, pass_="training"), Needs(), "has no gradients; poc has"),
        (PREFILL, Needs(softcap=True, array_mask=True), "has no softcap and no array masks; poc has"),
        (structs.replace(PREFILL, mask="documents:64"), Needs(), "no patterns"),
        (structs.replace(PREFILL, kv_format="int8"), Needs(), "quantizes keys and values itself"),
        (structs.replace(PREFILL, dtype="float32"), Needs(), "takes bfloat16 and float16, not float32"),
        (structs.replace(PREFILL, value_dim=64), Needs(), "values as wide as keys, not 64 beside 128"),
        (structs.replace(PREFILL, head_dim=192, value_dim=192), Needs(), "up to 128 in steps of 8, not 192"),
        (structs.replace(PREFILL, seq=1, kv_seq=256), Needs(), "128 queries or more, not 1"),
    ],
)
def test_a_route_says_in_one_line_what_it_refuses(workload: Workload, needs: Needs, words: str) -> None:
    route = load_implementation("poc-fp8").route(workload, CPU, needs)
    assert not route.supported
    assert words in route.reason
    assert "\n" not in route.reason


def test_a_call_that_the_route_refuses_raises_its_reason() -> None:
    q = mx.zeros((1, 2, 256, 128), mx.float32)
    with pytest.raises(UnsupportedError, match="poc-fp8: fp8 arithmetic takes bfloat16"):
        attention(q, q, q, implementation="poc-fp8")


def test_a_kernel_that_failed_its_check_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*_: object, **__: object) -> None:
        raise KernelUnavailable("flash_forward_fp8: its output is wrong")

    poc = PocFp8()
    monkeypatch.setattr(fp8, "_route", lambda *_: Route(path="fp8", fused=True, reason="here"))
    monkeypatch.setattr(fp8.fp8, "attend", attend)
    q = mx.zeros((1, 2, 256, 128), mx.bfloat16)
    with pytest.raises(UnsupportedError, match="poc-fp8: flash_forward_fp8: its output is wrong"):
        attention(q, q, q, implementation=poc)


WORKLOAD = Workload(seq=64, heads=1, head_dim=32)


class Counted:
    """Outputs with a relative error, compared by a budget of 0.1; counts the comparisons."""

    def __init__(self) -> None:
        self.inputs = [mx.random.normal((1, 1, 64, 32), key=key) for key in mx.random.split(mx.random.key(0), 3)]
        self.exact = Baseline()(*self.inputs, scale=WORKLOAD.scale, mask=Mask())
        self.budget, self.compared = ErrorBudget("it", 0.1, self.compare), 0

    def compare(self, *arguments: Any) -> float:
        self.compared += 1
        return relative_error(*arguments)

    def call(self, error: float) -> None:
        self.budget.check(WORKLOAD, self.inputs, WORKLOAD.scale, self.exact * (1 + error))


def test_a_budget_compares_in_the_1st_2nd_4th_8th_call() -> None:
    counted, compared = Counted(), []
    for _ in range(9):
        counted.call(0.05)
        compared.append(counted.compared)
    assert compared == [1, 2, 2, 3, 3, 3, 3, 4, 4]


def test_an_error_above_the_budget_is_raised_with_both() -> None:
    with pytest.raises(BudgetExceededError, match=r"it: its error on these inputs is 0\.2, above max_error 0\.1"):
        Counted().call(0.2)


def test_after_an_excess_the_next_call_is_compared() -> None:
    counted = Counted()
    for _ in range(2):
        with pytest.raises(BudgetExceededError):
            counted.call(0.2)
    assert counted.compared == 2


@pytest.mark.compiles
def test_a_first_traced_call_is_refused() -> None:
    counted = Counted()

    def traced(q: mx.array) -> mx.array:
        counted.budget.check(WORKLOAD, [q, *counted.inputs[1:]], WORKLOAD.scale, q)
        return q

    with pytest.raises(ErrorUnknownError, match="cannot be measured while a call is traced"):
        mx.compile(traced)(counted.inputs[0])
