from sample_runs import plan_of, report_of, run_of

from attention.workload import Workload
from fatui.cli import main
from fatui.compare import compare
from fatui.history import History

SMALL, LARGE = Workload(seq=64), Workload(seq=128)


def test_a_run_against_its_like_is_the_same():
    comparison = compare(report_of(seed=1), report_of(seed=2))
    assert len(comparison.changes) == 4
    assert not any(change.ratio.significant for change in comparison.changes)
    assert (comparison.only_before, comparison.only_after, comparison.differences) == ((), (), ())


def test_rows_are_matched_by_workload_and_implementation():
    first = report_of(plan_of([SMALL, LARGE], ["baseline", "poc"]))
    second = report_of(plan_of([LARGE], ["baseline", "demo"]))
    comparison = compare(first, second)
    assert [(change.workload, change.implementation) for change in comparison.changes] == [(LARGE, "baseline")]
    assert comparison.only_before == (f"baseline on {SMALL.label}", f"poc on {SMALL.label}", f"poc on {LARGE.label}")
    assert comparison.only_after == (f"demo on {LARGE.label}",)


def test_the_floor_is_the_larger_of_both():
    first, second = report_of(seed=1), report_of(seed=2)
    floors = [report.cases[0].noise_floor.floor for report in (first, second)]
    assert compare(first, second).changes[0].floor == max(floors)


def test_the_command_prints_ratios(capsys):
    for seed, identity in ((1, "aaaa"), (2, "bbbb")):
        History().add(report_of(run=run_of(identity=identity), seed=seed))
    assert main(["compare", "a", "last"]) == 0
    out = capsys.readouterr().out
    assert "≈ 1" in out and "same" in out
    assert main(["compare", "a", "zz"]) == 2
    assert "no run 'zz'" in capsys.readouterr().err
