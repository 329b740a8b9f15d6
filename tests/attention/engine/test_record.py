"""Rows made from events."""

import msgspec
import pytest

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.plan import Assignment, Plan, expand
from attention.core.results import Environment, Peaks, Report, Run
from attention.core.route import Route
from attention.core.workload import COUNTERPARTS, Counterpart, Workload
from attention.engine.record import LOG_LINES, Record

CASE = Workload(seq=64, head_dim=32)
PLAN = Plan(cases=(CASE, Workload(seq=128, head_dim=32)), implementations=("mlx", "baseline", "poc"))
RUN = Run(id="r", started="2026-01-01T00:00:00+00:00", seconds=1, command="fatui bench")
FUSED = Route(path="kernel", fused=True, reason="there is one", predicted_bytes=100)


def measured(record: Record, case: int = 0, faster: float = 2.0) -> None:
    """Feed a record with one complete case in which mlx is faster than the baseline."""
    record.apply(on.CaseStarted(case=case))
    for name in ("baseline", "mlx"):
        record.apply(on.RouteFound(case=case, implementation=name, route=FUSED))
        record.apply(on.FirstCall(case=case, implementation=name, seconds=0.5))
        check = on.AccuracyChecked(
            case=case, implementation=name, max_error=1e-3, rms_error=1e-4, accurate=True, detail="output"
        )
        record.apply(check)
        record.apply(on.MemoryMeasured(case=case, implementation=name, peak_bytes=90))
    record.apply(on.RowEnded(case=case, implementation="poc", status="refused", reason="needs 9 GiB of 1"))
    record.apply(on.ReferenceChosen(case=case, implementation="baseline"))
    base = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0]
    samples = {"baseline": base, "mlx": [t / faster for t in base], on.REPEATED_REFERENCE: base[::-1]}
    record.apply(on.RoundsDone(case=case, samples=samples, active_bytes=1, peak_bytes=2))
    record.apply(on.CaseDone(case=case, stopped_by="time"))


def test_a_complete_case_gives_its_rows_reference_first() -> None:
    record = Record(PLAN)
    record.apply(on.PeaksMeasured(peaks=Peaks(matmul_flops_per_s=1e9, copy_bytes_per_s=1e9)))
    measured(record)
    case = record.case(0)
    baseline, mlx, poc = case.rows
    assert [row.implementation for row in case.rows] == ["baseline", "mlx", "poc"]
    assert case.reference == "baseline"
    assert baseline.speedup is not None
    assert baseline.speedup.value == 1
    assert mlx.speedup is not None
    assert mlx.speedup.value == pytest.approx(2)
    assert mlx.tokens_per_second == pytest.approx(64 / 0.5, rel=0.02)
    assert mlx.efficiency == pytest.approx(CASE.flops / 0.5 / 1e9, rel=0.02)
    assert (mlx.path, mlx.fused, mlx.peak_bytes, mlx.predicted_bytes) == ("kernel", True, 90, 100)
    assert (poc.status, poc.reason, poc.call_s) == ("refused", "needs 9 GiB of 1", None)


@pytest.mark.parametrize("counterpart", COUNTERPARTS)
def test_a_speedup_over_a_counterpart_is_paired(counterpart: Counterpart) -> None:
    record = Record(PLAN)
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    base = [1.0, 1.5, 0.9, 1.0, 2.0, 1.0]  # drifts, which pairs do not see
    samples = {"baseline": base, "mlx": base, on.REPEATED_REFERENCE: base}
    beside = {counterpart: {"mlx": [4 * seconds for seconds in base]}}
    record.apply(on.RoundsDone(case=0, samples=samples, counterparts=beside, active_bytes=1, peak_bytes=2))  # type: ignore[arg-type]
    baseline, mlx = record.case(0).rows
    assert getattr(baseline, f"over_{counterpart}") is None
    assert getattr(mlx, f"{counterpart}_s").median == pytest.approx(4)
    over = getattr(mlx, f"over_{counterpart}")
    assert (over.low, over.high) == (pytest.approx(4), pytest.approx(4))
    assert over.significant
    assert {name for name in COUNTERPARTS if getattr(mlx, f"over_{name}")} == {counterpart}
    record.apply(on.CaseStarted(case=0))
    assert record.cases[0].rows["mlx"].counterparts == {}


def test_a_report_survives_json() -> None:
    record = Record(PLAN)
    record.apply(on.RunStarted(environment=Environment(mlx="0.32.4")))
    measured(record)
    report = record.report(RUN)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    assert b'"pass":"forward"' in msgspec.json.encode(report)


def test_cases_that_were_not_reached_are_left_out() -> None:
    record = Record(PLAN)
    measured(record)
    assert len(record.report(RUN).cases) == 1


def test_what_was_interrupted_keeps_its_samples_and_says_so() -> None:
    record = Record(PLAN)
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    samples = {"baseline": [1.0, 1.0], "mlx": [0.5, 0.5], on.REPEATED_REFERENCE: [1.0, 1.0]}
    record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    rows = record.case(0).rows
    assert [row.implementation for row in rows] == ["baseline", "mlx"]
    assert {row.stopped_by for row in rows} == {"interrupted"}


def test_a_case_begun_again_forgets_times_but_not_failures() -> None:
    record = Record(PLAN)
    measured(record)
    record.apply(on.RowEnded(case=0, implementation="mlx", status="failed", reason="killed"))
    record.apply(on.CaseStarted(case=0))
    rows = {row.implementation: row for row in record.case(0).rows}
    assert "baseline" not in rows
    assert rows["mlx"].reason == "killed"


def test_an_inaccurate_row_says_what_was_wrong() -> None:
    record = Record(PLAN)
    measured(record)
    record.apply(
        on.AccuracyChecked(
            case=0, implementation="mlx", max_error=1.0, rms_error=0.1, accurate=False, detail="output off by 1"
        )
    )
    row = record.case(0).rows[1]
    assert (row.status, row.reason) == ("inaccurate", "output off by 1")
    assert record.report(RUN).summary[1].speedup is None


def test_the_summary_is_a_geometric_mean_over_the_cases() -> None:
    record = Record(PLAN)
    measured(record, 0, faster=2)
    measured(record, 1, faster=8)
    _, mlx, poc = record.report(RUN).summary
    assert mlx.speedup is not None
    assert mlx.speedup.value == pytest.approx(4)
    assert (mlx.cases, mlx.not_ok) == (2, 0)
    assert (poc.cases, poc.not_ok, poc.speedup) == (0, 2, None)


def test_a_slowing_reference_is_reported_on_the_rows() -> None:
    record = Record(PLAN)
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    slowing = [1 + i / 20 + (i % 2) / 500 for i in range(30)]
    samples = {
        "baseline": slowing,
        "mlx": slowing,
        on.REPEATED_REFERENCE: [t * (1.001 if i % 2 else 1) for i, t in enumerate(slowing)],
    }
    record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    assert all(row.throttled for row in record.case(0).rows)


def test_the_log_is_bounded() -> None:
    record = Record(PLAN)
    for number in range(LOG_LINES + 5):
        record.apply(on.Message(level="info", text=str(number)))
    assert len(record.log) == LOG_LINES
    assert record.log[-1].text == str(LOG_LINES + 4)


def test_every_event_survives_its_line() -> None:
    record_of_all = [
        on.RunDone(),
        on.Progress(done=0.5, remaining_s=1, now="x"),
        on.RouteFound(case=0, implementation="poc", route=FUSED),
        on.RunRefused(kind="no backend", reason="none"),
    ]
    for event in record_of_all:
        line = on.encode(event)
        assert line.endswith(b"\n")
        assert on.decode(line) == event


def test_an_assignment_leaves_out_what_took_a_worker_down() -> None:
    assignment = Assignment(plan=PLAN, skip={1: ("mlx",)})
    assert assignment.remaining(0) == ("baseline", "mlx", "poc")
    assert assignment.remaining(1) == ("baseline", "poc")
    assert msgspec.json.decode(msgspec.json.encode(assignment), type=Assignment) == assignment


def test_axes_expand_to_every_combination_once() -> None:
    cases = expand({"head_dim": 8}, {"seq": [1, 2, 1], "pass": ["forward", "training"]})
    assert [(case.seq, case.pass_) for case in cases] == [
        (1, "forward"),
        (1, "training"),
        (2, "forward"),
        (2, "training"),
    ]


def test_mistakes_of_all_combinations_are_reported_once_each() -> None:
    with pytest.raises(UsageError) as raised:
        expand({"heads": 8, "kv_heads": 3}, {"seq": [0, 4], "head_dim": [8, -1]})
    assert len(raised.value.problems) == 3


def test_a_round_that_was_sat_out_gives_no_sample_and_no_pair() -> None:
    record = Record(PLAN)
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    base = [1.0 + n / 100 for n in range(12)]
    slow = [4 * base[n] if n % 2 == 0 else None for n in range(12)]
    event = on.RoundsDone(
        case=0, samples={"baseline": base, "mlx": slow, on.REPEATED_REFERENCE: base}, active_bytes=1, peak_bytes=2
    )
    reported = on.decode(on.encode(event))
    assert reported == event
    record.apply(reported)
    mlx = record.case(0).rows[1]
    assert len(mlx.samples) == 6
    assert mlx.speedup is not None
    assert mlx.speedup.value == pytest.approx(0.25)
    assert mlx.speedup.significant


def test_an_approximate_row_says_by_what_it_was_judged() -> None:
    record = Record(PLAN)
    measured(record)
    route = Route(path="fp8 kernel", fused=True, reason="8 bits", approximate="fp8")
    record.apply(on.RouteFound(case=0, implementation="mlx", route=route))
    row = record.case(0).rows[1]
    assert (row.status, row.approximate, row.reason) == ("ok", "fp8", "8 bits; output")


def test_rounds_of_two_runs_of_a_case_count_together() -> None:
    plan = Plan(cases=(Workload(seq=64),), implementations=("baseline", "poc"))
    records = [Record(plan), Record(plan)]
    for record, rounds in zip(records, (6, 8), strict=True):
        record.apply(on.CaseStarted(case=0))
        record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
        samples: dict[str, list[float | None]] = {
            "baseline": [1.0] * rounds,
            on.REPEATED_REFERENCE: [1.0] * rounds,
            "poc": [0.5] * (rounds - 1),  # the last round without a sample
        }
        record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    first, second = records
    second.extend(first)
    baseline, poc = second.case(0).rows
    assert (len(baseline.samples), len(poc.samples)) == (14, 12)
    assert poc.speedup is not None and poc.speedup.value == 2.0
    third = Record(plan)
    third.extend(second)
    assert len(third.case(0).rows[0].samples) == 14
