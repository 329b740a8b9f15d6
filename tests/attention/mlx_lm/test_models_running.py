"""Small models that really run: their measurements, and detection of wrong implementations."""

import math
from pathlib import Path

import mlx.core as mx
import pytest

from attention.core import events as on
from attention.core.plan import Assignment, FineTuningPlan, GenerationPlan
from attention.core.workload import FineTuning, generations
from attention.engine.record import record_of
from attention.measure.rounds import take_sample
from attention.mlx_lm import configuration
from attention.mlx_lm.arms import SharedPass
from attention.mlx_lm.fine_tuning import FineTuningBench
from attention.mlx_lm.generation import GenerationBench, PrefillRun, Prompts, kl_divergence, read_by_mlx_lm
from attention.mlx_lm.network import Network
from attention.mlx_lm.patch import replace_attention
from fatui.report.table import model_notes

WRONG = f"{Path(__file__).parents[2] / 'support' / 'planted.py'}:Wrong"
NAMES = ("baseline", "mlx", WRONG)


def run(bench, plan):
    return watched(bench, plan)[0]


def watched(bench, plan):
    """The record of a run, and all its events."""
    record, reported = record_of(plan), []

    def listen(event):
        reported.append(event)
        record.apply(event)

    bench(Assignment(plan=plan), plan, listen).run()
    assert record.done
    return record, reported


def estimates_before(reported, kind):
    """Check that each case's estimate precedes its first event of a kind, and return the estimates."""
    estimates = {event.case: event for event in reported if isinstance(event, on.CaseTimeEstimated)}
    for case, estimate in estimates.items():
        first = next(event for event in reported if isinstance(event, kind) and event.case == case)
        assert reported.index(estimate) < reported.index(first)
    return estimates


def test_both_phases_are_measured_with_every_implementation():
    cases = generations(
        4, model="tiny-llama", prompts=[24], batches=[2], generate=3, measured_layers=2, dtype="float32"
    )
    record, reported = watched(GenerationBench, GenerationPlan(cases=cases, implementations=NAMES, seconds=0.2))
    estimates = estimates_before(reported, on.RoundsDone)
    assert [*estimates] == [0, 1]
    assert all(each.implementations == 3 and each.seconds >= 0.2 for each in estimates.values())
    for index, layers in ((0, 4), (1, 2)):
        case = record.case(index)
        baseline, ours, wrong = case.rows
        assert [baseline.status, ours.status, wrong.status] == ["ok", "ok", "inaccurate"]
        assert baseline.replaced_calls == layers, "a prompt takes two steps of two layers, a token one"
        assert ours.replaced_calls == layers, "of mlx-lm as it is the calls are counted too"
        assert (baseline.path, ours.path) == ("manual, unfused", "MLX SDPA, unfused")
        assert baseline.attention_share and baseline.layer_s and baseline.peak_bytes
        assert ours.logits_error < 1e-4 < wrong.logits_error
        assert "allowed" in wrong.reason
        assert case.noise_floor
    assert record.case(1).rows[0].tokens_per_second == pytest.approx(2 / record.case(1).rows[0].call_s.median)


@pytest.mark.slow
def test_a_quantized_cache_is_compared_with_an_unquantized_one():
    work = {"generate": 2, "measured_layers": 2, "dtype": "float32", "kv_formats": ["int8:32"]}
    cases = generations(4, model="tiny-llama", prompts=[12], batches=[1], **work)
    record = run(GenerationBench, GenerationPlan(cases=cases, implementations=("baseline", "mlx"), seconds=0.1))
    for case in (record.case(0), record.case(1)):
        assert case.kv_token_bytes == 4 * 2 * 2 * (32 + 8), "of 4 layers, 2 heads: 32 numbers, a scale and a bias"
        assert case.cache_bytes >= 12 * case.kv_token_bytes
        for row in case.rows:
            assert row.status == "ok"
            assert 0 < row.kl_divergence < 0.1
            assert 0.05 < row.over_unquantized.value < 20
            assert len(row.samples) >= 6


def test_mlx_lm_reads_one_int_format_alone():
    read = [text for text in ("none", "int4", "int8:32", "int8+int4", "mxfp4", "mxfp4+int8") if read_by_mlx_lm(text)]
    assert read == ["none", "int4", "int8:32"]


def test_the_divergence_is_that_of_distributions():
    first = mx.log(mx.array([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]))
    second = mx.log(mx.array([[0.25, 0.5, 0.25], [0.2, 0.4, 0.4]]))
    expected = (0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2
    assert kl_divergence(first, second + 7.0) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(first, first) == 0.0
    assert kl_divergence(first, second * mx.nan) is None


def test_what_will_not_fit_is_refused_before_weights_are_made():
    cases = generations(22, model="tinyllama-1.1b", prompts=[16], batches=[1], dtype="bfloat16")
    plan = GenerationPlan(cases=cases, implementations=("baseline",), memory_limit_bytes=2**30)
    (row,) = run(GenerationBench, plan).case(0).rows
    assert row.status == "refused"
    assert row.reason.endswith(" GiB of 1; --layers 8 would fit, and estimate the whole model")


def test_decoding_leaves_the_cache_as_it_found_it():
    from mlx_lm.models.cache import make_prompt_cache

    from attention.mlx_lm.configuration import find_model
    from attention.mlx_lm.generation import DecodeRun

    network = Network(find_model("tiny-llama"), "float32")
    (_, work) = generations(4, model="tiny-llama", prompts=[20], batches=[1], dtype="float32")
    prompts = Prompts(work, 512, seed=0)
    cache = make_prompt_cache(network.model)
    token = mx.argmax(prompts.prefill(network.model, cache), axis=-1)
    decode = DecodeRun(network, cache, token, steps=5, layers=4)
    first = decode.results()[0]
    tokens = [decode.queue()[0].tolist() for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert cache[0].offset == 20
    assert mx.allclose(first, decode.results()[0])


@pytest.mark.thorough
def test_every_implementation_learns_the_same():
    work = FineTuning(model="tiny-llama", seq=8, batch=1, iters=7, rank=2, layers=4, tuned_layers=1, dtype="float32")
    record, reported = watched(FineTuningBench, FineTuningPlan(cases=(work,), implementations=NAMES, seconds=60))
    (estimate,) = estimates_before(reported, on.IterationDone).values()
    assert estimate.implementations == 3 and 0 < estimate.seconds < 600
    case = record.case(0)
    baseline, ours, wrong = case.rows
    assert [baseline.status, ours.status, wrong.status] == ["ok", "ok", "inaccurate"]
    assert len(baseline.losses) == 7
    assert ours.loss_difference < 1e-4 < wrong.loss_difference
    again = [
        event.loss
        for event in reported
        if isinstance(event, on.IterationDone) and event.implementation == on.REPEATED_REFERENCE
    ]
    assert tuple(again) == baseline.losses, "the second fine-tuning of the reference is the first one again"
    assert baseline.peak_bytes > 0 and case.noise_floor


def test_a_fine_tuning_ends_with_its_time():
    work = FineTuning(model="tiny-llama", seq=8, batch=1, iters=500, layers=4, tuned_layers=1, dtype="float32")
    record = run(FineTuningBench, FineTuningPlan(cases=(work,), implementations=("mlx",), seconds=0.1))
    (row,) = record.case(0).rows
    assert 0 < len(row.losses) < 500
    assert row.stopped_by == "time"


@pytest.mark.slow
def test_demo_is_tuned_for_training_by_the_step_that_trains():
    work = FineTuning(model="tiny-llama", seq=24, batch=2, iters=2, rank=2, layers=4, tuned_layers=2, dtype="float32")
    record, reported = watched(
        FineTuningBench, FineTuningPlan(cases=(work,), implementations=("mlx", "demo"), seconds=60)
    )
    texts = [event.text for event in reported if isinstance(event, on.Message)]
    assert any("2 iterations are too few for a verdict" in text and "--iters 7" in text for text in texts), texts
    _, demo = record.case(0).rows
    assert demo.path.startswith("tuned: ")
    assert demo.loss_difference < 1e-4
    assert demo.replaced_calls == 4 * len(demo.losses)


def shared(arms, prompt=24, layers=4, **fields):
    """A shared pass of a tiny model's prefill, and the run that it samples."""
    configured = configuration.find_model("tiny-llama")
    network = Network(configured, "float32", layers)
    network.make()
    (work, _) = generations(layers, model="tiny-llama", prompts=[prompt], batches=[1], dtype="float32")
    sampled = PrefillRun(network, Prompts(work, 101, 0), layers)
    return SharedPass({"many": sampled}, {arm: arm for arm in arms}, seed=0, **fields), sampled


def test_in_a_shared_pass_every_arm_attends_in_every_call():
    """The last layer of the prompt's step leaves its keys and values alone, the last token runs through all."""
    at_work = []
    passes, _ = shared(["baseline", "mlx", "poc"], at_work=at_work.append)
    passes.warm_up()
    assert {name: at_work.count(name) for name in ("baseline", "mlx", "poc")} == dict.fromkeys(
        ("baseline", "mlx", "poc"), 3 + 4
    )


@pytest.mark.slow
def test_arms_of_a_shared_pass_differ_by_attention_alone():
    slow = f"{Path(__file__).parents[2] / 'support' / 'planted.py'}:Sleeps"
    passes, alone = shared(["mlx", slow, on.WITHOUT_ATTENTION])
    passes.warm_up()
    samples = {arm: [passes.sample(arm)[0]["many"] for _ in range(5)] for arm in ("mlx", slow, on.WITHOUT_ATTENTION)}
    times = {arm: min(each) for arm, each in samples.items()}
    slept_s = (3 + 4) * 0.02
    assert times[on.WITHOUT_ATTENTION] < times[slow]
    assert times[slow] - times["mlx"] > 0.8 * slept_s
    with replace_attention(slow):
        assert times[slow] < 10 * take_sample(alone, 1)


@pytest.mark.thorough
def test_a_shared_pass_goes_on_without_an_arm_that_fails():
    broken = f"{Path(__file__).parents[2] / 'support' / 'planted.py'}:Raises"
    for arms in ([broken, "mlx", "poc"], ["mlx", broken, "poc"]):
        passes, _ = shared(arms)
        passes.warm_up()
        assert passes.sample("mlx")[0]["many"] > 0
        assert passes.sample("poc")[1] > 0
        with pytest.raises(RuntimeError):
            passes.sample(broken)


@pytest.mark.slow
def test_long_passes_are_shared_and_give_six_rounds_a_row():
    cases = generations(4, model="tiny-llama", prompts=[64], batches=[1], generate=3, measured_layers=2)
    names = ("baseline", "mlx", "poc")
    record, reported = watched(GenerationBench, GenerationPlan(cases=cases, implementations=names, seconds=1e-4))
    said = [event.text for event in reported if isinstance(event, on.Message)]
    assert sum("all implementations attend in the same passes" in text for text in said) == 2
    for index in range(2):
        case = record.case(index)
        assert [row.status for row in case.rows] == ["ok"] * 3
        assert all(row.peak_bytes > 0 and not row.too_few_rounds for row in case.rows)
        assert all(row.replaced_calls > 0 and row.layer_s > 0 for row in case.rows)
        assert case.noise_floor
        assert case.shared_passes
        assert any("shared passes" in note for note in model_notes(case))
