"""The verdict of a run says only what its rows support, and why."""

import pytest
from msgspec import structs

from attention.core.results import Case, Conditions, Interval, ModelCase, NoiseFloor, Ratio, Report
from attention.core.workload import Generation, Workload
from fatui.formatting import best_of, three, word
from fatui.trust import TrustFinding, trust, trust_line, worst
from fatui.verdict import (
    Verdict,
    confidence_text,
    group_verdicts,
    headline,
    loss_lines,
    verdict_of,
    verdicts,
)
from tests.support.sample_runs import ENVIRONMENT, plan_of, report_of

SWEEP = tuple(Workload(seq=seq) for seq in (64, 128, 256, 512))


def case_of(**fields: object) -> Case:
    """A case in which poc is 50 times as fast."""
    return structs.replace(report_of().cases[0], **fields)


def times(case: Case, name: str, factor: float) -> Case:
    """A case in which the calls of one implementation take a multiple of their time, its speedup included."""

    def scaled(row):
        if row.implementation != name:
            return row
        call, speedup = row.call_s, row.speedup
        call = Interval(median=call.median * factor, low=call.low * factor, high=call.high * factor)
        ends = {part: getattr(speedup, part) / factor for part in ("value", "low", "high")}
        far = abs(ends["value"] - 1) > 0.1
        return structs.replace(row, call_s=call, speedup=structs.replace(speedup, **ends, significant=far))

    return structs.replace(case, rows=tuple(scaled(row) for row in case.rows))


def row_with(case: Case, name: str, **fields: object) -> Case:
    rows = tuple(structs.replace(row, **fields) if row.implementation == name else row for row in case.rows)
    return structs.replace(case, rows=rows)


def floor_of(value: float) -> NoiseFloor:
    return NoiseFloor(value=1.0, low=1 / (1 + value), high=1 + value, floor=value)


def test_the_winner_has_its_interval_memory_and_accuracy():
    verdict = verdict_of([case_of()])
    assert (verdict.winner, verdict.reference, verdict.confidence) == ("poc", "baseline", "high")
    assert headline(verdict) == "Use poc · 50.0x baseline (95 %: 49 to 51) · 512 KiB · accurate"


@pytest.mark.parametrize(
    ("peak", "words"),
    [(2**18, "256 instead of 512 KiB"), (2**21, "2 MiB instead of 512 KiB"), (2**19 + 1, "512 KiB")],
)
def test_memory_stands_beside_that_of_the_reference(peak, words):
    found = headline(verdict_of([row_with(case_of(), "poc", peak_bytes=peak)]))
    assert found == f"Use poc · 50.0x baseline (95 %: 49 to 51) · {words} · accurate"


def test_the_others_lose_for_a_reason_and_in_order():
    case = row_with(case_of(), "demo", status="refused", reason="needs 41 GiB of 22", call_s=None, speedup=None)
    slow = row_with(case, "practical", fused=False)
    lines = loss_lines(verdict_of([slow]))
    assert lines[0].startswith("practical: 45") and lines[0].endswith(
        "x as long; unfused: blocks 256 x 512, as the test says"
    )
    assert lines[-1] == "demo: refused: needs 41 GiB of 22"
    (unknown,) = (
        line for line in loss_lines(verdict_of([row_with(case, "practical", fused=None)])) if "practical" in line
    )
    assert unknown.endswith("x as long"), "it is not called unfused if that is not known"


def test_a_row_loses_by_the_speedups_of_the_same_rounds():
    case = case_of()
    drifted = structs.replace(case.rows[0].call_s, median=2 * case.rows[0].call_s.median)
    lines = loss_lines(verdict_of([row_with(case, "baseline", call_s=drifted)]))
    assert next(line for line in lines if line.startswith("baseline")).startswith("baseline: 50.0x as long")


def test_a_tie_is_called_one():
    rows = case_of().rows
    twin = structs.replace(rows[1], implementation="demo", path="tuned: poc")
    lines = loss_lines(verdict_of([case_of(rows=(rows[0], rows[1], twin))]))
    assert "demo: tied, it ran poc" in lines


def test_the_same_kernel_by_another_name_is_not_slower():
    rows = case_of().rows
    slow = times(
        case_of(rows=(*rows[:2], structs.replace(rows[1], implementation="demo", path="tuned: poc"))), "demo", 1.3
    )
    wide = row_with(slow, "poc", call_s=Interval(median=1e-4, low=5e-5, high=3e-4))
    verdict = verdict_of([wide])
    assert "demo: tied, it ran poc" in loss_lines(verdict)
    assert verdict.doubts == ("its time is too uncertain to call it the fastest",)


def test_a_lead_inside_the_noise_floor_is_a_tie():
    case = row_with(times(case_of(), "practical", 0.0235), "practical", fused=False)
    slow = next(row for row in case.rows if row.implementation == "practical").call_s
    wide = structs.replace(slow, low=slow.median * 0.97, high=slow.median * 1.9)
    noisy = structs.replace(row_with(case, "practical", call_s=wide), noise_floor=floor_of(0.23))
    assert {"poc", "practical"} <= set(best_of(noisy))
    assert "practical: tied" in loss_lines(verdict_of([noisy]))


def test_times_too_uncertain_to_lead_are_tied_inside_the_floor():
    case = times(case_of(), "practical", 0.028)
    for name in ("poc", "practical"):
        row = next(row for row in case.rows if row.implementation == name).call_s
        case = row_with(case, name, call_s=structs.replace(row, low=row.median * 0.5, high=row.median * 2))
    assert "practical: tied" in loss_lines(verdict_of([structs.replace(case, noise_floor=floor_of(0.73))]))


def test_a_lead_is_held_against_the_floor_of_its_own_case():
    quiet = times(structs.replace(case_of(), noise_floor=floor_of(0.005)), "poc", 38.0)
    noisy = structs.replace(report_of(plan_of(SWEEP)).cases[1], noise_floor=floor_of(0.23))
    assert verdict_of([quiet, noisy]).confidence == "high"


def test_the_confidence_follows_the_noisiest_cases():
    cases = list(report_of(plan_of(SWEEP)).cases)
    cases[0] = structs.replace(times(cases[0], "poc", 30.0), noise_floor=floor_of(0.9))
    tied = verdict_of(cases)
    assert (tied.winner, tied.confidence) == ("poc", "low")
    assert tied.doubts == ("too noisy at L 64, with a noise floor of 90 %",)
    cases[1] = structs.replace(cases[1], noise_floor=floor_of(0.9))
    assert "above" not in trust_line(trust(report_of(plan_of(SWEEP))))
    noisy = structs.replace(report_of(plan_of(SWEEP)), cases=tuple(cases))
    assert trust_line(trust(noisy)).startswith("noise floor at most 90 %, above 10 % at L 64, 128")
    assert verdict_of(cases).doubts == tied.doubts  # its lead of 50 times is clear of its own floor


def test_a_range_over_cases_is_called_one():
    cases = list(report_of(plan_of(SWEEP)).cases)
    assert " on average (4 cases: " in headline(verdict_of(cases)), "no interval of the mean, which a table has"
    cases[0] = structs.replace(cases[0], workload=structs.replace(cases[0].workload, kv_format="int4"))
    assert " on average (4 cases of 2 K/V formats: " in headline(verdict_of(cases))


def test_accurate_says_that_it_is_over_the_dequantized_kv():
    case = row_with(case_of(), "poc", kv_error=0.13)
    assert headline(verdict_of([case])).endswith("accurate for the dequantized K/V")


def test_a_sweep_says_where_the_winner_is_fastest():
    cases = list(report_of(plan_of(SWEEP)).cases)
    assert "fastest in all 4 cases" in headline(verdict_of(cases))
    cases[3] = times(cases[3], "practical", 0.01)
    verdict = verdict_of(cases)
    assert (verdict.winner, verdict.where) == ("poc", "fastest at L 64 to 256")
    assert any(line.startswith("practical") and "fastest at L 512" in line for line in loss_lines(verdict))


def test_axes_that_do_not_decide_alone_are_counted():
    cases = list(report_of(plan_of([Workload(seq=seq, batch=batch) for seq in (64, 128) for batch in (1, 2)])).cases)
    cases[0] = times(cases[0], "practical", 0.01)
    assert verdict_of(cases).where == "fastest in 3 of 4 cases"


def test_the_baseline_may_be_the_one_to_use():
    case = case_of()
    for name in ("poc", "practical", "demo"):
        case = times(case, name, 200.0)
    verdict = verdict_of([case])
    assert verdict.winner == "baseline" and "the others are slower" in headline(verdict)


@pytest.mark.parametrize(
    ("case", "doubt"),
    [
        (case_of(noise_floor=None), "no noise floor"),
        (row_with(case_of(), "baseline", samples=report_of().cases[0].rows[0].samples[:8]), "only 8 rounds"),
        (times(row_with(case_of(), "poc", throttled=True), "poc", 30.0), "slowed down"),
        (times(case_of(noise_floor=floor_of(0.08)), "poc", 38.0), "with a noise floor of 8.0 %"),
    ],
)
def test_each_doubt_lowers_the_confidence(case: Case, doubt: str):
    verdict = verdict_of([case])
    assert verdict.winner == "poc" and verdict.confidence == "low"
    assert doubt in confidence_text(verdict)


def test_a_lead_of_tens_of_times_needs_no_quiet_machine():
    noisy = row_with(case_of(noise_floor=floor_of(0.08)), "poc", throttled=True)
    assert verdict_of([noisy]).confidence == "high"


def undecided(floor: float) -> Verdict:
    rows = tuple(row for row in case_of().rows if row.implementation in ("baseline", "demo"))
    return verdict_of([case_of(rows=rows, noise_floor=floor_of(floor))])


def test_above_the_limit_nothing_is_ranked():
    assert undecided(0.2).too_noisy and headline(undecided(0.2)).startswith("Too noisy to rank")
    assert not undecided(0.02).too_noisy and undecided(0.02).confidence == "none"
    assert headline(undecided(0.02)) == "No winner · nothing is faster than baseline"


def noisier(case: Case) -> Case:
    """The case with a lead of a quarter, which is significant, and a noise floor of 15 %."""
    rows = tuple(row for row in times(case, "poc", 40.0).rows if row.implementation in ("baseline", "poc"))
    return structs.replace(case, rows=rows, noise_floor=floor_of(0.15))


def test_a_sweep_without_a_clear_case_is_not_ranked():
    cases = [noisier(case) for case in report_of(plan_of(SWEEP)).cases]
    assert all(word(case.rows[1], case) == "fastest" for case in cases)  # each alone, and so their mean
    verdict = verdict_of(cases)
    assert (verdict.winner, verdict.confidence, verdict.too_noisy) == (None, "none", True)
    assert headline(verdict) == "Too noisy to rank · no lead is 3 times its noise floor, which is at most 15 %"
    assert verdict_of(cases[:1]).too_noisy and "which is 15 %" in headline(verdict_of(cases[:1]))


def test_clear_cases_of_a_sweep_decide():
    cases = [noisier(case) for case in report_of(plan_of(SWEEP)).cases]
    cases[3] = report_of(plan_of(SWEEP)).cases[3]
    verdict = verdict_of(cases)
    assert (verdict.winner, verdict.confidence, verdict.too_noisy) == ("poc", "low", False)
    assert verdict.doubts == ("too noisy at L 64 to 256, with a noise floor of 15 %",)
    cases[3] = times(cases[3], "poc", 200.0)  # where practical is slower too, baseline is the one to use
    cases[3] = times(cases[3], "practical", 0.01)
    assert verdict_of(cases).winner == "practical" and verdict_of(cases).cases == 1


def test_others_lose_by_the_cases_that_decide():
    """The reference loses by the factor that the headline names, not by one of noisy cases too."""
    clear, noisy = report_of(plan_of(SWEEP[:2])).cases
    unsure = Ratio(value=1.2, low=0.6, high=2.4, significant=False)
    noisy = structs.replace(noisy, noise_floor=floor_of(1.15))
    for name in ("poc", "practical", "demo"):
        noisy = row_with(noisy, name, speedup=unsure)
    verdict = verdict_of([clear, noisy])
    assert verdict.speedup is not None and (verdict.winner, verdict.cases) == ("poc", 1)
    (line,) = (line for line in loss_lines(verdict, brief=True) if line.startswith("baseline"))
    assert line == f"baseline: {three(verdict.speedup.value)}x as long"


def test_a_factor_of_one_case_is_no_average():
    cases = [noisier(case) for case in report_of(plan_of(SWEEP)).cases]  # without practical
    cases[3] = times(times(report_of(plan_of(SWEEP)).cases[3], "poc", 200.0), "practical", 0.01)
    verdict = verdict_of(cases)
    assert verdict.winner == "practical"
    assert [line for line in loss_lines(verdict) if " on average" in line] == []


def test_a_reference_of_few_cases_is_not_mixed_into_the_mean():
    cases = list(report_of(plan_of(SWEEP)).cases)
    last = row_with(cases[3], "baseline", status="refused", reason="needs 41 GiB of 22", call_s=None, speedup=None)
    cases[3] = structs.replace(last, reference="practical")
    verdict = verdict_of(cases)
    assert verdict.reference == "baseline" and verdict.winner == "poc"
    assert verdict.doubts == ("baseline is the reference in 3 of 4 cases",)
    (line,) = (line for line in loss_lines(verdict) if line.startswith("baseline"))
    assert line.endswith("x as long on average, refused in 1 of 4 cases: needs 41 GiB of 22; unfused")


def test_an_inaccurate_row_never_wins():
    assert verdict_of([row_with(case_of(), "poc", status="inaccurate")]).winner == "practical"


@pytest.mark.parametrize(
    ("models", "title"),
    [
        (["m", "m"], "m prefill"),
        (["hub/first", "second", "third"], "first, second, third prefill"),
        (["hub/m", "other/m"], "hub/m, other/m prefill"),
        (["a/m", "b/m", "c/m", "d/m"], "4 models' prefill"),
    ],
)
def test_the_title_of_a_verdict_is_of_all_its_models(models: list[str], title: str):
    cases = [ModelCase(workload=Generation(model=each, phase="prefill", prompt=8, layers=2)) for each in models]
    assert [verdict.title for _, verdict in group_verdicts([], cases, [])] == [title]


def test_an_interrupted_run_is_doubted():
    report = report_of()
    (verdict,) = verdicts(structs.replace(report, run=structs.replace(report.run, interrupted=True)))
    assert verdict.doubts == ("interrupted",)


def trusted(report: Report | None = None, **conditions: object) -> tuple[TrustFinding, ...]:
    return trust(structs.replace(report or report_of(), conditions=Conditions(cores=2, **conditions)))


def test_a_quiet_run_has_only_notes():
    found = trusted(other_cores=0.01, stolen_cores=0.0, governor="performance")
    assert worst(found) == "note" and trust_line(found) == "noise floor 0.5 % · OpenBLAS"


@pytest.mark.parametrize(
    ("conditions", "severity", "text"),
    [
        ({"other_cores": 0.2, "busiest": ("cc1plus",)}, "warning", "others used 0.2 cores (cc1plus)"),
        ({"other_cores": 1.0}, "serious", "others used 1.0 core"),
        ({"other_engines": 1}, "serious", "another fatui measures too"),
        ({"stolen_cores": 0.3}, "warning", "the host took 0.3 cores"),
        ({"governor": "powersave"}, "warning", "governor powersave"),
        ({"on_battery": True}, "warning", "on battery"),
    ],
)
def test_what_disturbs_a_run_is_found(conditions: dict[str, object], severity: str, text: str):
    first = trusted(**conditions)[0]
    assert (first.severity, first.text) == (severity, text)
    assert first.detail.endswith((".", "power."))


def test_a_slow_blas_is_reported_with_its_cost():
    report = report_of()
    peaks = structs.replace(report.peaks, matmul_flops_per_s=5e9, fma_flops_per_s=1e11)
    where = structs.replace(ENVIRONMENT, blas="reference BLAS")
    first = trusted(structs.replace(report, peaks=peaks, environment=where))[0]
    assert first.text == "reference BLAS: products 20 times below the cores"
    assert "LD_PRELOAD" in first.detail


def test_noise_throttling_and_tf32_are_found():
    report = report_of()
    loud = structs.replace(report, cases=(row_with(case_of(noise_floor=floor_of(0.3)), "poc", throttled=True),))
    assert [each.text for each in trusted(loud)[:2]] == ["noise floor 30 %", "slowed down"]
    gpu = structs.replace(
        report_of(plan_of([Workload(dtype="float32")])), environment=structs.replace(ENVIRONMENT, backend="cuda")
    )
    assert trusted(gpu, tf32=True)[0].topic == "TF32"
    assert not any(each.topic == "TF32" for each in trusted(report, tf32=True))


def test_a_run_without_a_record_of_conditions_says_so():
    assert any(each.topic == "conditions" for each in trust(report_of()))


def test_one_implementation_alone_is_not_too_noisy_to_rank():
    case = case_of(noise_floor=floor_of(0.4), rows=case_of().rows[:1])
    assert headline(verdict_of([case])) == "No winner · nothing was compared"


def test_rows_that_are_inaccurate_were_measured():
    case = case_of()
    for row in case.rows:
        case = row_with(case, row.implementation, status="inaccurate")
    assert headline(verdict_of([case])) == "No winner · nothing is accurate"


def test_an_interval_that_excludes_1_is_shown_without_it():
    ratio = Ratio(value=1.0152, low=1.0142, high=1.0158, significant=True)
    found = headline(verdict_of([row_with(case_of(rows=case_of().rows[:2]), "poc", speedup=ratio)]))
    assert found.startswith("Use poc · 1.02x baseline (95 %: 1.01 to 1.02)")
