import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.results import Conditions, Report
from attention.core.workload import Workload
from attention.engine.record import Record
from fatui.cli.main import main
from fatui.report.comparison import by_machine, compare
from fatui.storage.history import RunHistory
from tests.support.sample_runs import PATHS, plan_of, report_of, run_of

SMALL, LARGE = Workload(seq=64), Workload(seq=128)


def test_a_run_against_its_like_is_the_same():
    comparison = compare(report_of(seed=1), report_of(seed=2))
    assert len(comparison.changes) == 4
    assert not any(change.ratio.significant for change in comparison.changes)
    assert (comparison.only_before, comparison.only_after, comparison.differences) == ((), (), ())


@pytest.mark.parametrize(
    ("busy", "in_turns", "found"),
    [
        (0.1, (None, None), ["other load: 1.0 cores were busy, then 0.1"]),
        (0.8, (None, None), []),  # less than a quarter of the cores
        (0.1, ("turns", "turns"), []),
        (0.1, ("turns", None), ["other load: 1.0 cores were busy, then 0.1"]),
        (None, (None, None), []),
    ],
)
def test_runs_beside_unequal_load_are_said_to_be(busy, in_turns, found):
    before, after = (
        structs.replace(
            report_of(run=structs.replace(run_of(), in_turns=turns)), conditions=Conditions(cores=2, other_cores=cores)
        )
        for turns, cores in zip(in_turns, (1.0, busy), strict=True)
    )
    assert [text.partition(";")[0] for text in compare(before, after).differences] == found


def test_rows_are_matched_by_workload_and_implementation():
    first = report_of(plan_of([SMALL, LARGE], ["baseline", "poc"]))
    second = report_of(plan_of([LARGE], ["baseline", "demo"]))
    comparison = compare(first, second)
    assert [(change.workload, change.implementation) for change in comparison.changes] == [(LARGE, "baseline")]
    assert comparison.only_before == (f"baseline on {SMALL.label}", f"poc on {SMALL.label}", f"poc on {LARGE.label}")
    assert comparison.only_after == (f"demo on {LARGE.label}",)


def test_the_floor_is_at_least_the_larger_of_both():
    first, second = report_of(seed=1), report_of(seed=2)
    floors = [report.cases[0].noise_floor.floor for report in (first, second)]
    assert compare(first, second).changes[0].floor >= max(floors)


def under_load(report: Report, slower: dict[str, float]) -> Report:
    """A run in which each implementation took the given multiple of the time."""
    record = Record(plan_of(names=tuple(slower)))
    base = report.cases[0].rows
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    samples = {row.implementation: [slower[row.implementation] * time for time in row.samples] for row in base}
    samples[on.REPEATED_REFERENCE] = samples["baseline"][::-1]
    record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    return record.report(run_of(identity="loaded"))


def test_the_same_code_on_a_loaded_machine_is_not_faster():
    names = ("baseline", "poc", "practical")
    quiet = report_of(plan_of(names=names))
    loaded = under_load(quiet, {"baseline": 1.8, "poc": 1.7, "practical": 2.15})
    changes = compare(loaded, quiet).changes
    assert [round(change.times.value, 2) for change in changes] == [1.8, 1.7, 2.15]
    assert not any(change.ratio.significant for change in changes)
    assert changes[0].floor >= 0.79


def test_a_change_beyond_the_machines_own_counts():
    names = ("baseline", "poc", "practical")
    before = report_of(plan_of(names=names))
    after = under_load(before, {"baseline": 1.02, "poc": 0.51, "practical": 1.02})
    baseline, poc, practical = compare(before, after).changes
    assert (baseline.ratio.value, baseline.ratio.significant) == (1, False)
    assert poc.ratio.significant and abs(poc.ratio.value - 2) < 0.05
    assert not practical.ratio.significant


def test_the_shown_medians_and_their_ratio_agree():
    for change in compare(report_of(seed=1), report_of(seed=2)).changes:
        shown = change.before.call_s.median / change.after.call_s.median
        assert abs(change.times.value / shown - 1) < 1e-9
        assert change.times.low < shown < change.times.high


def test_without_a_common_baseline_nothing_is_faster(capsys):
    first = report_of(plan_of(names=("baseline", "poc")), run=run_of(identity="aaaa"))
    second = report_of(plan_of(names=("poc", "demo")), run=run_of(identity="bbbb"))
    (change,) = compare(first, second).changes
    assert (change.ratio, change.reference) == (None, None)
    for report in (first, second):
        RunHistory().add(report)
    assert main(["compare", "aaaa", "bbbb"]) == 0
    assert "no common baseline" in capsys.readouterr().out


def test_the_command_prints_ratios(capsys):
    for seed, identity in ((1, "aaaa"), (2, "bbbb")):
        RunHistory().add(report_of(run=run_of(identity=identity), seed=seed))
    assert main(["compare", "a", "last"]) == 0
    out = capsys.readouterr().out
    assert "≈ 1" in out and "same" in out
    assert main(["compare", "a", "zz"]) == 2
    assert "no run 'zz'" in capsys.readouterr().err


def with_row(report: Report, name: str, **fields: object) -> Report:
    """A run of one case in which a row has other values."""
    (case,) = report.cases
    rows = tuple(structs.replace(row, **fields) if row.implementation == name else row for row in case.rows)
    return structs.replace(report, cases=(structs.replace(case, rows=rows),))


def test_samples_from_before_a_failure_give_no_ratio():
    after = with_row(report_of(seed=2), "poc", status="failed", speedup=None)
    for before, second in ((report_of(seed=1), after), (after, report_of(seed=1))):
        poc = next(each for each in compare(before, second).changes if each.implementation == "poc")
        assert (poc.times, poc.ratio) == (None, None)
    elsewhere = structs.replace(after, environment=structs.replace(after.environment, device="Apple M4"))
    assert by_machine([report_of(), elsewhere]).rows[report_of().cases[0].workload, "poc"][1].across is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"path": "unfused TF32"}, "unfused, then unfused TF32"), ({"status": "inaccurate"}, "ok, then")],
)
def test_a_reference_of_other_code_is_said_to_be(fields, said):
    (text,) = compare(report_of(), with_row(report_of(), "baseline", **fields)).differences
    assert text.startswith(f"{next(iter(fields))} of baseline, which changes are relative to: ") and said in text
    assert compare(report_of(), with_row(report_of(), "poc", **fields)).differences == ()


def test_what_a_drift_hides_is_not_called_the_same(capsys):
    for identity, report in (("aaaa", report_of()), ("bbbb", under_load(report_of(), dict.fromkeys(PATHS, 1.0)))):
        RunHistory().add(structs.replace(report, run=run_of(identity=identity)))
    assert main(["compare", "aaaa", "bbbb"]) == 0
    assert "unclear" not in capsys.readouterr().out
    loaded = under_load(report_of(), {**dict.fromkeys(PATHS, 1.0), "baseline": 0.5})
    RunHistory().add(structs.replace(loaded, run=run_of(identity="cccc")))
    assert main(["compare", "aaaa", "cccc"]) == 0
    out = capsys.readouterr().out
    assert out.count("unclear") == 3 and "same" not in out  # a row half as fast is inside a drift of two
