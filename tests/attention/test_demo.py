"""Demo tries what fits, keeps the fastest, and says so."""

import time
from collections.abc import Callable

import mlx.core as mx
import pytest
from attention_examples import CPU
from msgspec import structs

from attention.implementations.demo import Demo, fastest
from attention.implementations.runner import make_inputs, runner_for
from attention.masks import Mask
from attention.route import PLAIN
from attention.workload import Workload

WORKLOAD = Workload(seq=32, heads=2, head_dim=8, dtype="float32")


def sleeping(seconds: float, calls: list[float]) -> Callable[[], None]:
    def call() -> None:
        calls.append(seconds)
        time.sleep(seconds)

    return call


def failing() -> None:
    raise RuntimeError("out of memory")


def test_the_fastest_wins_and_the_hopeless_is_called_once() -> None:
    calls: list[float] = []
    chosen = fastest({"slow": sleeping(0.05, calls), "fast": sleeping(0.005, calls), "broken": failing})
    assert chosen == "fast"
    assert calls.count(0.05) == 1


def test_when_nothing_runs_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="none of a, b could be run"):
        fastest({"a": failing, "b": failing})


def test_the_route_tells_before_and_after_the_trial() -> None:
    demo = Demo()
    assert demo.route(WORKLOAD, CPU).path == "not tried yet"
    q, k, v = make_inputs(WORKLOAD, 0)
    demo(q, k, v, scale=0.5, mask=Mask())
    route = demo.route(WORKLOAD, CPU)
    assert route.path.startswith("tuned: ")
    assert len(route.path) <= 22


def test_the_runner_tries_the_pass_that_it_runs() -> None:
    demo = Demo()
    training = structs.replace(WORKLOAD, pass_="training")
    runner = runner_for(demo, training, make_inputs(training, 0), 0.5)
    assert demo.route(training, CPU).path == "not tried yet"
    assert len(runner.results()) == 4
    assert demo.route(training, CPU).path.startswith("tuned: ")
    assert demo.route(WORKLOAD, CPU).path == "not tried yet"


def test_what_is_predicted_not_to_fit_is_never_tried() -> None:
    tight = structs.replace(CPU, available_bytes=1)
    assert Demo()._fitting(WORKLOAD, tight, PLAIN) == ["practical"]


def test_while_a_function_is_traced_the_routes_decide() -> None:
    demo = Demo()
    q, k, v = make_inputs(WORKLOAD, 0)
    traced = mx.compile(lambda q, k, v: demo(q, k, v, scale=0.5, mask=Mask()))
    mx.eval(traced(q, k, v))
    assert demo.route(WORKLOAD, CPU).path == "not tried yet"
