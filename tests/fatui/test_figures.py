import io
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from rich.console import Console

from attention.core import events as on
from attention.core.errors import NoBackendError, Remedy, UsageError
from attention.core.results import Case, Interval, RankFigures, Ratio, Report, Row
from attention.core.workload import Workload
from attention.engine.record import Record
from fatui import formatting
from fatui.quantities import parse_size, size_text
from fatui.report.export import to_json, to_markdown
from fatui.report.table import report_table
from fatui.tui.view_models.sweep import speedup_cell
from fatui.verdict import finding, verdicts
from tests.support.sample_runs import plan_of, record_of, report_of, run_of


def ratio(value: float, half: float, significant: bool = True) -> Ratio:
    return Ratio(value=value, low=value - half, high=value + half, significant=significant)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.tokens_per_second(1.4e6), "1.40 M"),
        (formatting.tokens_per_second(28_000), "28.0 K"),
        (formatting.tokens_per_second(999.96), "1.00 K"),
        (formatting.tokens_per_second(None), "n/a"),
        (formatting.seconds(0.0362), "36.2 ms"),
        (formatting.seconds(0.00099999), "1.00 ms"),
        (formatting.seconds(1.21), "1.21 s"),
        (formatting.size(41 * 2**20), "41 MiB"),
        (formatting.size(1023 * 2**20), "0.999 GiB"),
        (formatting.size(0), "0 B"),
        (formatting.flops(2.68e8), "268 MFLOP"),
        (formatting.percent(0.623), "62 %"),
        (formatting.percent(0.008), "0.8 %"),
        (formatting.percent(6e-7), "<0.001 %"),
        (formatting.percent(None), "n/a"),
        (formatting.error(0.031), "3.1e-2"),
        (formatting.error(0.0), "0"),
        (formatting.duration(125), "2 min 05 s"),
        (formatting.interval_text(Interval(median=0.0362, low=0.0359, high=0.0364)), "36.2 ±0.3 ms"),
        (formatting.interval_text(Interval(median=0.0829, low=0.0612, high=0.1431)), "61 to 144 ms"),
        (formatting.interval_text(Interval(median=5.29)), "5.29 s"),
    ],
)
def test_a_figure_has_three_digits_and_a_unit(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (ratio(49.6, 0.4), "49.6 ±0.4x"),
        (ratio(1.09, 0.004), "1.09 ±0.01x"),
        (ratio(0.312, 0.01), "0.312 ±0.010x"),
        (ratio(1.002, 0.01, significant=False), "≈ 1"),
        (ratio(1.3, 0.8, significant=False), "0.50 to 2.1x?"),
        (Ratio(value=1.02, low=0.47, high=2.21, significant=False), "0.47 to 2.3x?"),
        (Ratio(value=40, low=30, high=52, significant=True), "30 to 52x"),
        (ratio(1.0, 0.0, significant=False), "1"),
        (None, "n/a"),
    ],
)
def test_a_speedup_is_reported_with_its_interval_or_not_at_all(speedup, expected):
    assert formatting.speedup_text(speedup) == expected


@given(st.floats(1e-12, 1e15))
def test_every_figure_is_within_half_a_percent_of_what_it_says(value):
    assert math.isclose(float(formatting.three(value).replace(",", "")), value, rel_tol=0.0051)


@given(st.integers(1, 2**60))
def test_a_size_is_written_so_that_it_reads_back(size):
    assert parse_size(size_text(size), "x") == size


@pytest.mark.parametrize("text", ["", "8 parsec", "-1", "1e9", "0", "9" * 30, None, 1.5, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="it takes a size"):
        parse_size(text, "memory_limit")


def test_verdicts_are_words():
    (case,) = report_of().cases
    assert [formatting.verdict(row, case) for row in case.rows] == [
        "reference",
        "fastest",
        "1.11x faster",
        "same as baseline",
    ]
    assert formatting.best_of(case) == ("poc",)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            on.RowEnded(case=0, implementation="poc", status="failed", reason="killed by signal 9"),
            "failed: killed by signal 9",
        ),
        (
            on.RowEnded(case=0, implementation="poc", status="refused", reason="needs 41 GiB of 22"),
            "refused: needs 41 GiB of 22",
        ),
        (
            on.AccuracyChecked(
                case=0, implementation="poc", max_error=0.031, rms_error=0.01, accurate=False, detail="output"
            ),
            "inaccurate: 3.1e-2",
        ),
    ],
)
def test_what_went_wrong_is_in_the_verdict_and_never_the_best(event, expected):
    record = record_of(plan_of())
    record.apply(event)
    case = record.case(0)
    assert formatting.verdict(case.rows[1], case) == expected
    assert "poc" not in formatting.best_of(case)


def interrupted_after(rounds: int) -> Report:
    """A run of one case, stopped after a number of rounds."""
    names = ("baseline", "poc")
    record = Record(plan_of(names=names))
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    for number in range(rounds):
        samples = {"baseline": [0.9 + number / 100], on.REPEATED_REFERENCE: [0.91], "poc": [0.02]}
        record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    return record.report(run_of())


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_too_few_rounds_give_no_verdict_anywhere(rounds):
    report = interrupted_after(rounds)
    (case,) = report.cases
    text = f"collecting {rounds} of 6"
    assert case.noise_floor is None
    assert [formatting.verdict(row, case) for row in case.rows] == [text, text]
    assert [row.speedup for row in case.rows] == [None, None]
    assert formatting.best_of(case) == ()
    assert finding(report) == f"No winner · too few rounds for a verdict: {text}"
    printed = io.StringIO()
    Console(file=printed, width=120).print(report_table(report))
    for shown in (printed.getvalue(), to_markdown(report)):
        assert text in shown
        assert not any(word in shown for word in ("±", "★", "fastest", "noise floor 0", "accurate"))


def test_a_complete_run_of_too_few_rounds_collects_no_more():
    (case,) = interrupted_after(2).cases
    row = structs.replace(case.rows[1], stopped_by="iterations")
    assert formatting.verdict(row, case) == formatting.word(row, case) == "only 2 of 6"


def test_six_rounds_give_a_verdict():
    report = interrupted_after(6)
    (case,) = report.cases
    assert [formatting.word(row, case) for row in case.rows] == ["reference", "fastest"]


def test_a_saved_verdict_of_too_few_rounds_is_dropped_when_read():
    saved = to_json(interrupted_after(6))
    few = msgspec.json.decode(saved)
    for row in few["cases"][0]["rows"]:
        row["samples"] = row["samples"][:2]
    (case,) = msgspec.json.decode(msgspec.json.encode(few), type=Report).cases
    assert case.noise_floor is None
    assert [(row.collecting, row.speedup) for row in case.rows] == [("collecting 2 of 6", None)] * 2


def test_a_wide_interval_earns_no_star_and_equals_share_one():
    (case,) = report_of(plan_of(names=("baseline", "poc", "demo"))).cases
    base, poc, demo = case.rows
    wide = structs.replace(poc, call_s=Interval(median=1e-4, low=1e-5, high=1.0))
    assert formatting.best_of(structs.replace(case, rows=(base, wide, demo))) == ()
    slow = structs.replace(demo, call_s=Interval(median=1.0, low=1e-5, high=2.0))
    assert formatting.best_of(structs.replace(case, rows=(base, poc, slow))) == ("poc",)
    median = poc.call_s.median
    apart = Interval(median=median * 1.004, low=median * 1.0039, high=median * 1.0041)
    narrow = structs.replace(poc, call_s=Interval(median=median, low=median * 0.9999, high=median * 1.0001))
    equal = structs.replace(demo, call_s=apart)
    assert formatting.best_of(structs.replace(case, rows=(base, narrow, equal))) == ("poc", "demo")


def test_a_finding_says_who_won_and_what_it_takes():
    assert finding(report_of()) == "Use poc · 50.0x baseline (95 %: 49 to 51) · 512 KiB · accurate"
    several = report_of(plan_of([Workload(seq=64), Workload(seq=128)]))
    assert "x baseline on average (" in finding(several) and "fastest in all 2 cases" in finding(several)
    assert "nothing" in finding(report_of(plan_of(names=["baseline", "demo"])))
    empty = record_of(plan_of(cases=[])).report(run_of())
    assert finding(empty) == "nothing was measured"


def with_an_inaccurate_reference(report):
    """Return a report whose first case has one."""
    case, *rest = report.cases
    rows = (structs.replace(case.rows[0], status="inaccurate", reason="error 0.5"), *case.rows[1:])
    return structs.replace(report, cases=(structs.replace(case, rows=rows), *rest))


def test_a_finding_says_that_its_reference_is_inaccurate():
    text = finding(with_an_inaccurate_reference(report_of()))
    assert "x baseline, which is inaccurate (95 %: 49 to 51)" in text
    plan = plan_of(names=["baseline", "demo"])
    assert "faster than baseline, which is inaccurate" in finding(with_an_inaccurate_reference(report_of(plan)))
    several = with_an_inaccurate_reference(report_of(plan_of([Workload(seq=64), Workload(seq=128)])))
    (verdict,) = verdicts(several)
    assert verdict.doubts == ("baseline, which is inaccurate in 1 of 2 cases",)


def test_a_reference_other_than_the_baseline_is_explained():
    record = Record(plan_of(names=("baseline", "poc", "demo")))
    record.apply(on.CaseStarted(case=0))
    record.apply(on.RowEnded(case=0, implementation="baseline", status="failed", reason="planted"))
    record.apply(on.ReferenceChosen(case=0, implementation="poc"))
    samples = {"poc": [1.0] * 6, on.REPEATED_REFERENCE: [1.0] * 6, "demo": [2.0] * 6}
    record.apply(on.RoundsDone(case=0, samples=samples, active_bytes=1, peak_bytes=2))
    report = record.report(run_of())
    note = "baseline failed: speedups are relative to poc"
    assert formatting.reference_change(report.cases[0]) == note
    assert formatting.reference_change(report_of().cases[0]) is None
    printed = io.StringIO()
    Console(file=printed, width=120).print(report_table(report))
    assert note in printed.getvalue()


def test_rows_of_the_same_implementation_share_a_star():
    report = report_of(plan_of(names=("baseline", "poc", "demo")))
    (case,) = report.cases
    base, poc, demo = case.rows
    faster = structs.replace(
        demo, path="tuned: poc", call_s=Interval(median=poc.call_s.median / 2, low=1e-9, high=poc.call_s.median / 1.9)
    )
    faster = structs.replace(faster, call_s=structs.replace(faster.call_s, low=faster.call_s.median * 0.99))
    case = structs.replace(case, rows=(base, poc, structs.replace(faster, speedup=poc.speedup)))
    assert formatting.best_of(case) == ("poc", "demo")
    assert [formatting.word(row, case) for row in case.rows] == ["reference", "fastest", "fastest"]
    note = "demo ran poc: the difference between their times is noise or dispatch"
    printed = io.StringIO()
    Console(file=printed, width=140).print(report_table(structs.replace(report, cases=(case,))))
    assert note in printed.getvalue()
    assert note in to_markdown(structs.replace(report, cases=(case,)))
    other = structs.replace(case, rows=(base, poc, structs.replace(case.rows[2], path="MLX SDPA, unfused")))
    assert formatting.best_of(other) == ("demo",)
    assert formatting.same_paths(other) == []


INSTALL = "pip install 'fatui[cpu]', 'fatui[cuda12]' or 'fatui[cuda13]' on Linux, 'fatui' on macOS"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NoBackendError("MLX cannot be imported"), "MLX cannot be imported"),
        (
            NoBackendError("MLX has no backend", "no libmlx.so", Remedy.INSTALL_BACKEND),
            f"MLX has no backend; install one: {INSTALL} (no libmlx.so)",
        ),
        (NoBackendError("models need it", remedy=Remedy.INSTALL_MLX_LM), "models need it: pip install 'fatui[models]'"),
    ],
)
def test_an_error_says_what_to_do_here_and_from_a_worker(error: NoBackendError, text: str) -> None:
    refusal = on.RunRefused(kind="no backend", reason=error.what, why=error.why, remedy=error.remedy)
    received = on.decode(on.encode(refusal))
    assert isinstance(received, on.RunRefused)
    assert formatting.problem_text(error) == formatting.problem_text(received) == text


def test_every_remedy_has_words() -> None:
    assert set(formatting.REMEDIES) == {None, *Remedy}


def test_an_approximate_row_is_marked_everywhere() -> None:
    report = report_of(plan_of(names=("baseline", "mlx")))
    (case,) = report.cases
    plain, coarse = (
        case.rows[0],
        structs.replace(case.rows[1], approximate="fp8", max_error=0.012, reason="8 bits; so far off"),
    )
    case = structs.replace(case, rows=(plain, coarse))
    report = structs.replace(report, cases=(case,))
    assert formatting.row_error(coarse) == "1.2e-2 fp8"
    assert formatting.verdict(coarse, case).endswith(" in fp8")
    fast = structs.replace(report_of(plan_of(names=("baseline", "poc"))).cases[0].rows[1], approximate="fp8")
    assert finding(structs.replace(report, cases=(structs.replace(case, rows=(plain, fast)),))).endswith(
        "accurate by the tolerance of fp8"
    )
    out = io.StringIO()
    Console(file=out, width=200).print(report_table(report))
    assert "8 bits; so far off" in out.getvalue()
    assert all("1.2e-2 fp8" in text for text in (out.getvalue(), to_markdown(report)))


def test_the_share_of_ideal_is_of_all_ranks() -> None:
    ranks = tuple(RankFigures(rank=rank, call_s=0.004 + rank / 1000, compute_s=0.004, sent_bytes=8) for rank in (0, 1))
    row = Row(
        implementation="poc",
        status="ok",
        over_one_device=Ratio(value=1.8, low=1.78, high=1.82, significant=True),
        per_rank=ranks,
        samples=(0.005,) * 6,
    )
    assert formatting.over_text(row, "one_device") == "90.0 ±1.0 %"
    assert formatting.sent_text(row) == "16 B"
    assert formatting.exposed_text(row) == "1.00 ms"
    assert formatting.rank_notes(row)[1] == "rank 1: 5.00 ms per call, 1.00 ms of it waiting, 8 B sent"


def test_without_a_noise_floor_nothing_is_called_the_same() -> None:
    plan = plan_of(names=("baseline", "poc"))
    (case,) = report_of(plan).cases
    unknown = structs.replace(case.rows[0], speedup=ratio(2.0, 0.01, significant=False))
    known = structs.replace(case, rows=(unknown, *case.rows[1:]), reference="poc")
    assert formatting.speedup_text(known.rows[0].speedup) == "≈ 1"
    read = msgspec.json.decode(msgspec.json.encode(structs.replace(known, noise_floor=None)), type=Case)
    assert formatting.speedup_text(read.rows[0].speedup) == "2.00 ±0.01x?"
    assert formatting.word(read.rows[0], read) == "unclear"


def test_a_map_marks_what_is_too_uncertain() -> None:
    row = structs.replace(report_of().cases[0].rows[0], speedup=ratio(1.2, 0.7, significant=False))
    assert speedup_cell(row).text == "?"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("practical", "practical"),
        ("folder/mine.py:Fast", "…Fast"),
        ("/a/b/m.py:Fast", "m.py:Fast"),
        ("package.module:Fast", "…Fast"),
        ("mine.py:MuchFasterStill", "…sterStill"),
        ("a name of the library", "…e library"),
    ],
)
def test_a_name_without_room_keeps_what_tells_it_from_others(name, shown):
    assert formatting.short_name(name, 10) == shown


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (1.0142, 1.0158, "1.01 to 1.02"),
        (1.0052, 1.3, "1.005 to 1.300"),
        (0.9, 0.996, "0.900 to 0.996"),
        (0.98, 1.02, "0.98 to 1.1"),
        (1.31, 1.62, "1.3 to 1.7"),
        (0.4, 0.93, "0.40 to 0.93"),
        (1234, 5678, "1,234 to 5,678"),
    ],
)
def test_the_interval_of_a_ratio_leaves_1_out_if_it_does(low, high, shown):
    assert formatting.ratio_span(low, high) == shown
