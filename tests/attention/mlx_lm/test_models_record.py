"""Rows of models, made from events."""

import math
from typing import Any

import pytest

from attention.core import events as on
from attention.core.plan import FineTuningPlan, GenerationPlan, Plan
from attention.core.route import Route
from attention.core.workload import FineTuning, Generation, Workload
from attention.engine.record import FineTuningRecord, GenerationRecord, attention_share, loss_differences, record_of
from attention.mlx_lm.arms import Layers
from attention.mlx_lm.text import ByteTokenizer, sequences

NAMES = ("baseline", "poc")
WORK = Generation(model="tiny-llama", phase="prefill", prompt=100, layers=4)
TUNING = FineTuning(model="tiny-llama", seq=32, batch=2, layers=4, tuned_layers=4, dtype="float32")


def generation(samples: dict[str, list[float]]) -> GenerationRecord:
    record = GenerationRecord(GenerationPlan(cases=(WORK,), implementations=NAMES))
    record.apply(on.CaseStarted(case=0))
    record.apply(on.WeightsLoaded(case=0, weights_bytes=1000))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=0, peak_bytes=0))
    return record


def tuned(curves: dict[str, list[float | None]], seconds: dict[str, float] | None = None) -> FineTuningRecord:
    record = FineTuningRecord(FineTuningPlan(cases=(TUNING,), implementations=NAMES))
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    for name, losses in curves.items():
        for number, loss in enumerate(losses):
            took = (seconds or {}).get(name, 0.1) * (1 + 0.01 * (number % 3)) + (5.0 if number == 0 else 0.0)
            event = on.IterationDone(
                case=0, implementation=name, number=number + 1, loss=loss, seconds=took, active_bytes=0, peak_bytes=0
            )
            record.apply(event)
    return record


def test_a_plan_of_each_kind_has_its_record():
    assert isinstance(record_of(GenerationPlan(cases=(WORK,), implementations=NAMES)), GenerationRecord)
    assert isinstance(record_of(FineTuningPlan(cases=(TUNING,), implementations=NAMES)), FineTuningRecord)
    assert record_of(Plan(cases=(Workload(),), implementations=NAMES)).cases


def test_a_row_has_rate_speedup_and_the_share_of_attention():
    wave = [1 + 0.001 * (index % 4) for index in range(12)]
    samples = {"baseline": 2.0, "poc": 1.25, on.REPEATED_REFERENCE: 2.0, on.WITHOUT_ATTENTION: 1.0}
    case = generation({name: [time * each for each in wave] for name, time in samples.items()}).case(0)
    baseline, poc = case.rows
    assert case.weights_bytes == 1000
    assert baseline.tokens_per_second == pytest.approx(50, rel=0.01)
    assert poc.speedup.value == pytest.approx(1.6)
    assert poc.speedup.significant
    assert baseline.attention_share.value == pytest.approx(0.5)
    assert poc.attention_share.value == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("counted", "path", "reason"),
    [
        ({"replaced": 4, "passed_on": 0, "path": "blocks 32 x 32"}, "blocks 32 x 32", "as foretold"),
        (
            {"replaced": 0, "passed_on": 4, "reason": "sinks"},
            "passed on to MLX's own",
            "all calls went to MLX's own: sinks",
        ),
        ({"replaced": 0, "passed_on": 0}, "never called", "no call of attention reached it"),
    ],
)
def test_a_row_has_the_path_that_was_observed(counted: dict[str, Any], path: str, reason: str):
    record = generation({"baseline": [1.0] * 6, "poc": [1.0] * 6})
    route = Route(path="CPU kernel avx2", fused=True, reason="as foretold")
    record.apply(on.RouteFound(case=0, implementation="poc", route=route))
    assert record.case(0).rows[1].path == "CPU kernel avx2"
    record.apply(on.CallsCounted(case=0, implementation="poc", **counted))
    row = record.case(0).rows[1]
    assert (row.path, row.fused) == (path, None)
    assert row.reason.startswith(reason)


def test_a_share_needs_six_rounds_and_says_how_sure_it_is():
    assert attention_share([1.0] * 5, [0.5] * 5) is None
    share = attention_share([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0], [0.5] * 7)
    assert share.low <= share.value <= share.high
    assert share.value == pytest.approx(0.5)


def test_two_numbers_of_layers_give_the_whole_model():
    layers = Layers(few=2, many=4, whole=22)
    assert layers.estimate(few=0.3, many=0.5) == pytest.approx(0.5 + 18 * 0.1)
    assert layers.rest(few=0.3, many=0.5) == pytest.approx(0.1)
    assert layers.estimate(few=0.5, many=0.4) == 0.4, "noise never makes a whole model faster than its part"


def test_a_last_layer_that_is_not_finished_counts_with_the_rest():
    layers = Layers(few=2, many=4, whole=22, unfinished=1)
    assert layers.rest(few=0.3, many=0.5) == pytest.approx(0.2)


def test_the_first_iteration_is_a_first_call_and_no_sample():
    losses = [3.0, 2.5, 2.0, 1.5, 1.2, 1.1, 1.0]
    row = tuned({"baseline": losses}).case(0).rows[0]
    assert row.first_call_s > 5
    assert row.call_s.high < 1
    assert row.losses == tuple(losses)
    assert row.iterations_per_second == pytest.approx(1 / row.call_s.median)


def test_losses_that_agree_leave_a_row_alone_and_others_mark_it():
    same = tuned({"baseline": [3.0, 2.0, 1.0], "poc": [3.0, 2.0001, 1.0]}).case(0)
    assert [row.status for row in same.rows] == ["ok", "ok"]
    assert same.rows[1].loss_difference == pytest.approx(5e-5)
    apart = tuned({"baseline": [3.0, 2.0, 1.0], "poc": [3.0, 2.0, 1.1]}).case(0).rows[1]
    assert apart.status == "inaccurate"
    assert apart.reason == "the loss of iteration 3 is 10.00% off the reference's; 0.04% is allowed"


def test_losses_may_differ_more_the_longer_rounding_has_gone_on():
    curve = [3.0] * 100
    late = tuned({"baseline": curve, "poc": [*curve[:99], 3.009]}).case(0).rows[1]
    early = tuned({"baseline": curve, "poc": [3.009, *curve[1:]]}).case(0).rows[1]
    assert (late.status, early.status) == ("ok", "inaccurate")


def test_a_loss_that_is_no_number_marks_a_row():
    row = tuned({"baseline": [3.0, 2.0], "poc": [3.0, None]}).case(0).rows[1]
    assert (row.status, row.losses, row.loss_difference) == ("inaccurate", (3.0, None), None)
    assert row.reason == "the loss of iteration 2 is no number; 0.03% is allowed"
    assert loss_differences([1.0], [None]) == [math.inf]
    assert loss_differences([], [1.0]) == []


def test_a_fine_tuning_is_faster_only_beyond_the_noise_floor():
    curve = [3.0 - 0.1 * index for index in range(12)]
    curves = {"baseline": curve, "poc": curve, on.REPEATED_REFERENCE: curve}
    near = tuned(curves, {"poc": 0.0999, on.REPEATED_REFERENCE: 0.1001}).case(0)
    assert not near.rows[1].speedup.significant
    far = tuned(curves, {"poc": 0.05}).case(0)
    assert far.rows[1].speedup.significant
    assert far.rows[1].speedup.value == pytest.approx(2, rel=0.05)


def test_a_case_that_begins_anew_forgets_its_iterations():
    record = tuned({"baseline": [3.0, 2.0, 1.0], on.REPEATED_REFERENCE: [3.0, 2.0]})
    record.apply(on.CaseStarted(case=0))
    assert record.cases[0].rows["baseline"].losses == []
    assert record.cases[0].repeated_reference == []


def test_bytes_are_tokens_and_come_back():
    tokens = ByteTokenizer().encode("né\n")
    assert tokens == [110, 195, 169, 10, 256]
    assert ByteTokenizer().decode(tokens) == "né\n"


def test_a_text_is_cut_into_enough_sequences_of_one_length():
    cut = sequences(list(range(100)), length=9, min_count=4)
    assert len(cut) == 10
    assert cut[0] == (list(range(10)), 0)
    assert cut[-1] == (list(range(90, 100)), 0)
    assert [len(tokens) for tokens, _ in sequences([1, 2, 3], length=20, min_count=4)] == [21] * 4
