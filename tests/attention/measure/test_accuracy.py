"""The accuracy check accepts correct results and nothing else."""

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.calls import make_inputs, runner_for
from attention.measure.accuracy import AccuracyChecker, choose_sample
from tests.support.attention_examples import INSTALLED
from tests.support.marks import thorough

SMALL = Workload(batch=2, seq=40, kv_seq=56, heads=4, kv_heads=2, head_dim=16, value_dim=8, mask="causal")
TRAINING = Workload(seq=48, heads=2, head_dim=16, dtype="float16", mask="window:9", pass_="training")
LARGE = Workload(seq=3000, heads=1, head_dim=2, dtype="float32", mask="causal", pass_="training")


def results(name: str, workload: Workload, inputs: list[mx.array]) -> list[mx.array]:
    return runner_for(load_implementation(name), workload, inputs, workload.scale).results()


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("workload", [SMALL, TRAINING], ids=["forward", "training"])
@pytest.mark.parametrize("name", [thorough(name) if name == "torch" else name for name in INSTALLED if name != "demo"])
def test_right_results_pass(name: str, workload: Workload) -> None:
    inputs = make_inputs(workload, 0)
    verdict = AccuracyChecker(workload, inputs).check(results(name, workload, inputs))
    assert verdict.accurate, verdict.detail
    assert 0 < verdict.rms_error < verdict.max_error < 0.1


def test_an_error_of_a_few_roundings_is_found_in_any_tensor() -> None:
    inputs = make_inputs(TRAINING, 0)
    judge, right = AccuracyChecker(TRAINING, inputs), results("mlx", TRAINING, inputs)
    for index, name in enumerate(("output", "dQ", "dK", "dV")):
        wrong = list(right)
        wrong[index] = wrong[index] * 1.03
        verdict = judge.check(wrong)
        assert not verdict.accurate
        assert verdict.detail.startswith(name)


def test_an_ill_conditioned_row_does_not_excuse_the_others() -> None:
    workload = Workload(seq=64, heads=2, head_dim=16, mask="none", dtype="bfloat16")
    inputs = make_inputs(workload, 0)
    inputs[0][0, 0, 5] *= 300.0  # scores in the hundreds, which bfloat16 rounds by more than 1
    inputs[0][0, 1, 9] *= 300.0
    judge, right = AccuracyChecker(workload, inputs), results("poc", workload, inputs)
    verdict = judge.check(right)
    assert verdict.accurate, verdict.detail
    right[0][0, 0, 30] += 0.1
    assert not judge.check(right).accurate


@pytest.mark.parametrize("poison", [mx.nan, mx.inf])
def test_nan_and_infinity_never_pass(poison: float) -> None:
    inputs = make_inputs(SMALL, 0)
    out = results("mlx", SMALL, inputs)[0]
    out[1, 2, 3, 4] = poison
    verdict = AccuracyChecker(SMALL, inputs).check([out])
    assert not verdict.accurate
    assert verdict.detail == "output: NaN or infinity"


@pytest.mark.slow
def test_a_large_training_case_is_compared_on_rows_and_says_so() -> None:
    inputs = make_inputs(LARGE, 0)
    judge = AccuracyChecker(LARGE, inputs)
    assert judge.row_inputs is not None
    dense, rows = results("practical", LARGE, inputs), results("practical", LARGE, judge.row_inputs)
    assert judge.check(dense).accurate
    assert "dK and dV were not compared" in judge.check(dense).detail
    whole = judge.check(dense, rows)
    assert whole.accurate, whole.detail
    assert "not compared" not in whole.detail
    rows[3] = rows[3] * 1.01
    assert not judge.check(dense, rows).accurate


def test_a_sample_holds_first_and_last_row_and_is_bounded() -> None:
    sample = choose_sample(Workload(batch=64, seq=131072, heads=64, kv_heads=8), seed=0)
    assert {0, 131071} <= set(sample.rows.tolist())
    assert len(sample.rows) * len(sample.groups) * 8 * 131072 <= 8 * 131072 * 2 + 4_000_000
    assert len(np.unique(sample.rows)) == len(sample.rows)


def test_the_error_of_quantization_is_apart_from_the_verdict() -> None:
    quantized = Workload(seq=8, kv_seq=40, heads=4, kv_heads=2, head_dim=32, dtype="float32", kv_format="int3:32")
    plain = structs.replace(quantized, kv_format="none")
    inputs, before = make_inputs(quantized, 0), make_inputs(plain, 0)
    q, k, v = (np.array(array).astype(np.float64) for array in before)
    weights = np.exp(q @ k.repeat(2, axis=1).swapaxes(-1, -2) / np.sqrt(32))
    exact = (weights / weights.sum(axis=-1, keepdims=True)) @ v.repeat(2, axis=1)
    checker = AccuracyChecker(quantized, inputs, unquantized=before)
    found = runner_for(load_implementation("baseline"), quantized, inputs, quantized.scale).results()
    result = checker.check(found)
    off = np.array(found[0]).astype(np.float64) - exact
    assert result.accurate, "against what the three bits stand for"
    assert result.kv_error == pytest.approx(np.sqrt(np.mean(off**2) / np.mean(exact**2)), rel=1e-6)
    assert 0.05 < result.kv_error < 0.5
    unquantized = checker.check([mx.array(exact.astype(np.float32))])
    assert not unquantized.accurate, "it is not what the three bits stand for"
    assert unquantized.kv_error is not None
    assert unquantized.kv_error < 1e-6
