"""The check separates a good choice from a bad one."""

import math
import random
from pathlib import Path

import mlx.core as mx
import pytest
from msgspec import structs

from attention.core.workload import Workload
from attention.implementations.autotune.check import MAX_EXTENSION, ChoiceCheck, check_choice, holds, worst
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.store import Store
from tests.support.tuning_examples import FakeTime, Timed, Wrong

WORKLOAD = Workload(seq=16, heads=1, head_dim=4, dtype="float32")


class Machine:
    def __init__(self, path: Path, **among: float | Timed) -> None:
        self.clock = FakeTime()
        made = {name: one if isinstance(one, Timed) else Timed(name, one, self.clock) for name, one in among.items()}
        for one in made.values():
            one._clock = self.clock
        self.demo = Demo(store=Store(path / "tuning.toml"), among=made, clock=self.clock, budget_s=0.1)
        self.among = made

    def check(self) -> ChoiceCheck:
        return check_choice(self.demo, WORKLOAD, seconds=0.2)


def test_the_best_is_found_and_demo_is_as_fast(tmp_path: Path) -> None:
    checked = Machine(tmp_path, slow=1.3e-3, fast=1e-3).check()
    assert (checked.chosen, checked.best, checked.found) == ("fast", "fast", True)
    assert checked.share.value == pytest.approx(1.0)
    assert holds([checked])


def test_a_choice_that_is_no_longer_the_best_is_reported(tmp_path: Path) -> None:
    machine = Machine(tmp_path, a=1e-3, b=1.25e-3)
    assert machine.check().chosen == "a"
    machine.among["a"].seconds = 1.35e-3
    checked = machine.check()
    assert (checked.chosen, checked.best, checked.found) == ("a", "b", False)
    assert checked.share.value == pytest.approx(1.25 / 1.35)
    assert not holds([checked])


def test_what_is_inaccurate_is_not_the_best_whatever_its_speed(tmp_path: Path) -> None:
    wrong = Wrong("wrong", 0.5e-3)
    checked = Machine(tmp_path, right=1e-3, wrong=wrong).check()
    assert (checked.chosen, checked.best, checked.found) == ("right", "right", True)


def test_first_calls_are_outside_of_the_figures(tmp_path: Path) -> None:
    machine = Machine(tmp_path, a=1e-3, b=1.1e-3)
    began = dict.fromkeys(machine.among, 5.0)

    def slow_at_first(name: str, seconds: float) -> float:
        return began.pop(name, 0.0) + seconds

    for name, one in machine.among.items():
        seconds = one.seconds
        one.seconds = lambda name=name, seconds=seconds: slow_at_first(name, seconds)  # type: ignore[misc]
    machine.demo._budget_s = 30.0
    checked = machine.check()
    assert (checked.chosen, checked.found) == ("a", True)
    assert checked.share.value == pytest.approx(1.0)


@pytest.mark.thorough
def test_the_check_continues_while_demos_share_is_undecided(tmp_path: Path) -> None:
    def taken(spread: float, seed: int) -> float:
        draw, machine = random.Random(seed), Machine(tmp_path, a=1e-3)
        machine.check()
        machine.among["a"].seconds = lambda: 1e-3 * math.exp(draw.gauss(0, spread))
        before = machine.clock.now
        machine.check()
        return machine.clock.now - before

    assert max(taken(0.001, seed) for seed in range(5)) < 0.3
    noisy = [taken(0.3, seed) for seed in range(5)]
    assert max(noisy) > 0.7
    assert max(noisy) < 0.2 * MAX_EXTENSION + 0.2


def test_what_cannot_run_any_more_is_reported(tmp_path: Path) -> None:
    machine = Machine(tmp_path, a=1e-3, b=1.1e-3)
    machine.check()

    def broken(*arrays: mx.array, **more: object) -> mx.array:
        raise RuntimeError("out of memory")

    machine.among["a"]._sdpa = broken  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="a cannot be run any more: RuntimeError: out of memory"):
        machine.check()


def test_the_bound_is_097_of_the_best_in_95_percent_of_cases(tmp_path: Path) -> None:
    good = Machine(tmp_path, a=1e-3).check()
    short = structs.replace(good, share=structs.replace(good.share, value=0.969))
    missed = structs.replace(good, found=False)
    assert holds([good] * 20)
    assert not holds([good] * 19 + [short])
    assert worst([good, short]) is short
    assert holds([good] * 19 + [missed])
    assert not holds([good] * 18 + [missed])
