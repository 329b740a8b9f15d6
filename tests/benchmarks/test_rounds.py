"""Benchmarks of kernels take the engine's interleaved rounds: a fixed number, each sample after a lead-in."""

from collections.abc import Sequence

import pytest

mx = pytest.importorskip("mlx.core")

from attention.measure.rounds import Arm
from benchmarks import rounds
from benchmarks.rounds import ChainedCalls, EagerMlxCalls, EvaluatedCalls, MlxCalls, TorchCalls, UntilEvaluated, sample


class Counted:
    """Record what is queued and waited for."""

    def __init__(self, name: str, log: list[str], failing: bool = False) -> None:
        self.name, self.log, self.failing = name, log, failing

    def queue(self) -> object:
        if self.failing:
            raise RuntimeError("out of memory")
        self.log.append(self.name)
        return None

    def wait(self, outputs: Sequence[object]) -> None:
        self.log.append(f"{len(outputs)} of {self.name}")


def test_every_round_samples_each_after_a_lead_in() -> None:
    log: list[str] = []
    arms = [Arm(name=name, runner=Counted(name, log), call_s=1, calls=2, lead_in=True) for name in "ab"]
    times = sample(arms, 3, lambda arm: log.append(f"before {arm.name}"), lambda: log.append("round"))
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}
    taken = {name: [f"before {name}", *[name, name, f"2 of {name}"] * 2] for name in "ab"}
    assert [sorted(log[n : n + 15]) for n in (0, 15, 30)] == [sorted([*taken["a"], *taken["b"], "round"])] * 3


def test_a_peer_that_fails_ends_the_benchmark() -> None:
    arms = [Arm(name=name, runner=Counted(name, [], failing=name == "b"), call_s=1) for name in "ab"]
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(arms, 2)


@pytest.mark.parametrize("kind", [MlxCalls, EagerMlxCalls, EvaluatedCalls])
def test_mlx_calls_cycle_through_their_inputs_and_are_computed(kind: type[MlxCalls]) -> None:
    made: list[mx.array] = []

    def call_of(number: int) -> mx.array:
        made.append(mx.array(number) + 1)
        return made[-1]

    calls = kind(lambda: call_of(1), lambda: call_of(2))
    calls.wait([calls.queue() for _ in range(3)])
    assert [array.item() for array in made] == [2, 3, 2]


def test_chained_calls_take_the_output_before_them() -> None:
    chain = ChainedCalls(mx.array(1), lambda x: 2 * x, lambda x: x + 1)
    outputs = [chain.queue() for _ in range(4)]
    chain.wait(outputs)
    assert outputs[-1].item() == 7
    assert chain.queue().item() == 2  # a new chain, whose calls go on in turn
    chain.wait([])
    long = [chain.queue() for _ in range(2 * ChainedCalls.LAYERS)]
    chain.wait(long)
    assert [x.item() for x in long[:3]] == [2, 4, 5]


def test_calls_until_evaluated_do_not_wait_for_the_runner() -> None:
    log: list[str] = []
    calls = UntilEvaluated(Counted("a", log))
    calls.wait([calls.queue(), mx.array(1) + 1])
    assert log == ["a"]


def test_medians_are_of_samples_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "SAMPLE_S", 1e-4)
    pytest.importorskip("torch")
    found = rounds.medians({"mlx": MlxCalls(lambda: mx.array(1) + 1), "torch": TorchCalls(lambda: None)})
    assert found.keys() == {"mlx", "torch"} and min(found.values()) > 0
    assert rounds.one_at_a_time({"mlx": MlxCalls(lambda: mx.array(1) + 1)}, 3)["mlx"] > 0
