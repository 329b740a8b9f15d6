"""Each sentence of a report appears if and only if the rows support it."""

import re

import pytest
from msgspec import structs

from attention.core.results import Conditions, Interval, NoiseFloor, Ratio
from attention.core.workload import Workload
from fatui.report.compose import compose
from fatui.report.document import Card, Chart, Claim, MissingData, Paragraph, Table, to_html, to_markdown
from fatui.report.scaling import fit, sweeps
from tests.support.sample_runs import ENVIRONMENT, plan_of, report_of, run_of

SWEEP = tuple(Workload(seq=seq) for seq in (128, 256, 512, 1024))


def with_rows(report, change):
    """A report whose rows are transformed by `change`."""
    cases = [structs.replace(case, rows=tuple(change(row) for row in case.rows)) for case in report.cases]
    return structs.replace(report, cases=tuple(cases))


def blocks(document, kind, title=None):
    return [
        block
        for section in document.sections
        if title is None or title in section.title
        for block in section.blocks
        if isinstance(block, kind)
    ]


def texts(document, title=None):
    return [block.text for block in blocks(document, Claim, title)]


def ratio(value, low, high, *, significant):
    return Ratio(value=value, low=low, high=high, significant=significant)


def planted(value, low, high, *, significant):
    """A run in which `practical` has the given speedup."""
    wanted = ratio(value, low, high, significant=significant)

    def change(row):
        return structs.replace(row, speedup=wanted) if row.implementation == "practical" else row

    return with_rows(report_of(), change)


def test_a_significant_speedup_is_claimed_with_its_interval():
    reported = texts(compose([planted(1.5, 1.4, 1.6, significant=True)]), "Speedups")
    assert "practical is 1.50 ±0.10x as fast as baseline over 1 case (B=1 L=128 D=64 H=8 float16)." in reported


def test_a_slow_row_did_not_reach_a_noisy_best():
    def change(row):
        wide = Interval(median=1e-3, low=0.5e-3, high=4e-3)  # no row is called the best
        slow = Interval(median=50e-3, low=49e-3, high=51e-3)
        return structs.replace(row, **timed(wide if row.implementation == "poc" else slow))

    def timed(call_s):
        return {"call_s": call_s, "tokens_per_second": 128 / call_s.median}

    (claim,) = [text for text in texts(compose([with_rows(report_of(), change)])) if text.startswith("Highest")]
    assert claim.endswith(", by poc.")


def test_a_slowdown_is_reported_as_one():
    reported = texts(compose([planted(0.5, 0.49, 0.51, significant=True)]), "Where it pays")
    assert any(text.startswith("practical is slower than baseline in 1 of 1 case") for text in reported)


@pytest.mark.parametrize(("low", "high"), [(0.6, 1.9), (0.9, 1.6)])
def test_an_interval_that_spans_one_claims_no_difference(low, high):
    reported = texts(compose([planted(1.1, low, high, significant=False)]))
    assert not any(re.search(r"practical (is [\d.]+ ±|gains|is slower|is as fast)", text) for text in reported)


def test_a_mean_is_claimed_only_if_most_cases_agree():
    report = report_of(plan_of(SWEEP[:2]))
    unclear = ratio(1.6, 1.5, 1.7, significant=False)  # inside a wide noise floor
    doubtful = with_rows(
        report, lambda row: structs.replace(row, speedup=unclear) if row.implementation == "practical" else row
    )
    assert not any(text.startswith("practical is") for text in texts(compose([doubtful]), "Speedups"))


@pytest.mark.parametrize("status", ["failed", "refused", "inaccurate", "unsupported"])
def test_nothing_is_claimed_from_a_row_that_is_not_ok(status):
    report = with_rows(
        report_of(),
        lambda row: structs.replace(row, status=status, reason="of a test") if row.implementation == "poc" else row,
    )
    document = compose([report])
    assert not any(text.startswith("poc ") or "by poc" in text for text in texts(document))
    assert any(status in cell for table in blocks(document, Table, "not claimed") for row in table.rows for cell in row)
    assert any(f"1 {status}" in block.text for block in document.sections[-2].blocks if hasattr(block, "text"))


def test_a_run_in_which_all_failed_claims_nothing():
    document = compose([with_rows(report_of(), lambda row: structs.replace(row, status="failed", call_s=None))])
    assert texts(document) == []
    assert "fatui bench" in to_markdown(document)


def test_unmeasured_findings_name_the_command_to_measure():
    commands = [block.command for block in blocks(compose([report_of()]), MissingData)]
    for wanted in ("fatui bench scaling", "fatui model tinyllama-1.1b", "fatui finetune", "fatui bench seed-table"):
        assert any(command.startswith(wanted) for command in commands), wanted


def test_figures_of_the_sentences_are_those_of_the_table():
    document = compose([report_of()])
    sentence = next(text for text in texts(document, "Speedups") if text.startswith("poc is"))
    (table,) = blocks(document, Table, "Speedups")
    assert f"poc is {table.rows[0][table.heads.index('poc')]} as fast" in sentence


def test_machines_stand_apart_and_no_mean_is_taken_over_both():
    other = structs.replace(ENVIRONMENT, device="Apple M3 Max", backend="metal")
    here, there = report_of(), structs.replace(report_of(run=run_of(identity="bbbb")), environment=other)
    document = compose([here, there])
    assert sum(section.title.endswith("Speedups") for section in document.sections) == 2
    assert all("over 1 case" in text for text in texts(document, "Speedups"))


def on_cores(cores, identity, started):
    """A run on a CPU that could use so many cores; None if it was stopped before it knew."""
    run = structs.replace(run_of(identity=identity), started=started)
    return structs.replace(report_of(run=run), conditions=Conditions(cores=cores) if cores else None)


def test_one_processor_with_other_cores_stands_apart():
    runs = [on_cores(2, "aaaa", "2026-01-01"), on_cores(4, "bbbb", "2026-01-02"), on_cores(None, "cccc", "2026-01-03")]
    document = compose(runs)
    titles = [section.title for section in document.sections if section.title.endswith("Speedups")]
    assert [title.split(", ")[2] for title in titles] == ["2 cores", "4 cores", "unknown cores"]
    assert all("over 1 case" in text for text in texts(document, "Speedups"))
    assert "measured again later" not in to_markdown(document)


def test_a_stopped_run_stays_with_its_machine():
    document = compose([on_cores(None, "aaaa", "2026-01-01"), on_cores(2, "bbbb", "2026-01-02")])
    assert sum(section.title == "Speedups" for section in document.sections) == 1
    assert "1 older case measured again later" in to_markdown(document)


def test_the_same_gpu_with_other_cores_is_one_machine():
    gpu = structs.replace(ENVIRONMENT, device="NVIDIA H200", backend="cuda")
    runs = [on_cores(16, "aaaa", "2026-01-01"), on_cores(32, "bbbb", "2026-01-02")]
    document = compose([structs.replace(run, environment=gpu) for run in runs])
    assert sum(section.title == "Speedups" for section in document.sections) == 1


def test_a_case_measured_again_counts_once():
    first = report_of()
    second = structs.replace(report_of(seed=1), run=structs.replace(run_of(identity="bbbb"), started="2026-02-01"))
    document = compose([second, first])
    assert "1 older case measured again later" in to_markdown(document)
    (table,) = blocks(document, Table, "Speedups")
    assert len(table.rows) == 1


def test_a_power_law_is_found_with_an_interval_that_holds_it():
    law = fit([1, 2, 4, 8, 16], [3.1, 11.8, 48.5, 190.0, 770.0])
    assert law.low < 2 < law.high
    assert law.high - law.low < 0.1


def test_two_points_make_no_trend():
    assert fit([1, 2, 2], [1, 2, 2.1]) is None


@pytest.mark.thorough
def test_the_growth_of_a_sweep_is_reported_with_its_power():
    reported = texts(compose([report_of(plan_of(SWEEP))]), "Head dim")
    grown = next(text for text in reported if "grows with length" in text)
    # The planted times go with the FLOPs, which go with the square of the length.
    assert "baseline as its power 2.00" in grown
    assert "Length 128 to 1024" in grown


@pytest.mark.thorough
def test_a_speedup_falling_with_length_is_called_diminishing():
    report = report_of(plan_of(SWEEP))
    cases = []
    for number, case in enumerate(report.cases):
        speedup = ratio(8.0 / 2**number, 7.9 / 2**number, 8.1 / 2**number, significant=True)
        rows = [structs.replace(row, speedup=speedup) if row.implementation == "poc" else row for row in case.rows]
        cases.append(structs.replace(case, rows=tuple(rows)))
    reported = texts(compose([structs.replace(report, cases=tuple(cases))]), "Head dim")
    assert any("speedup of poc over baseline diminishes: 0.50 times" in text for text in reported)


@pytest.mark.thorough
def test_a_crossover_names_the_two_lengths_around_it():
    report = report_of(plan_of(SWEEP, ("baseline", "practical")))
    cases = []
    for number, case in enumerate(report.cases):
        fast, slow = Interval(median=1e-3, low=9e-4, high=1.1e-3), Interval(median=2e-3, low=1.9e-3, high=2.1e-3)
        calls = {"baseline": fast if number < 2 else slow, "practical": slow if number < 2 else fast}
        rows = tuple(structs.replace(row, call_s=calls[row.implementation]) for row in case.rows)
        cases.append(structs.replace(case, rows=rows))
    reported = texts(compose([structs.replace(report, cases=tuple(cases))]), "Head dim")
    assert any("baseline is the faster up to 256, practical from 512 on" in text for text in reported)


def test_sweeps_omit_cases_that_differ_in_several_axes():
    cases = (*SWEEP, Workload(seq=2048, head_dim=128))
    (sweep,) = sweeps(report_of(plan_of(cases)))
    assert len(sweep.cases) == len(SWEEP)


def test_the_studys_cold_start_is_shown():
    reported = texts(compose([report_of(plan_of((Workload(seq=64, head_dim=32),)))]), "study")
    assert len(reported) == 1
    assert reported[0].startswith(
        "The study's 32.2x (B=1 L=64 D=32 H=8 float16): here the baseline's first call took 200 ms"
    )


def test_memory_is_compared_with_inputs_and_reference():
    def change(row):
        return structs.replace(row, peak_bytes=2**20 if row.implementation == "poc" else 2**22)

    document = compose([with_rows(report_of(), change)])
    assert any(text.startswith("poc takes 4.00 times less memory") for text in texts(document, "Memory"))
    (table,) = blocks(document, Table, "Memory")
    assert table.rows[0][table.heads.index("poc")] == "1 MiB (2.67x)"


@pytest.mark.parametrize(
    ("poc", "expected"),
    [
        (2**22 - 20, []),  # 0.0005 % of 4 MiB is no finding
        (2**22 * 0.97, []),
        (2**22 * 0.75, ["poc takes 25 % less memory: 3 MiB instead of baseline's 4 MiB"]),
        (2**22 / 8, ["poc takes 8.00 times less memory: 512 KiB instead of baseline's 4 MiB"]),
        (2**22 * 34, []),
    ],
)
def test_a_saving_is_reported_by_its_consequence(poc, expected):
    def change(row):
        return structs.replace(row, peak_bytes=int(poc) if row.implementation == "poc" else 2**22)

    reported = texts(compose([with_rows(report_of(), change)]), "Memory")
    assert [text.partition(" (")[0] for text in reported] == expected


def test_memory_beyond_twice_the_references_is_a_factor():
    first, second = report_of(plan_of(SWEEP[:2])).cases

    def with_peaks(case, poc):
        peaks = {"baseline": 1000, "poc": poc}
        rows = (structs.replace(row, peak_bytes=peaks.get(row.implementation)) for row in case.rows)
        return structs.replace(case, rows=tuple(rows))

    report = structs.replace(report_of(), cases=(with_peaks(first, 500), with_peaks(second, 34_000)))
    (reported,) = texts(compose([report]), "Memory")
    assert reported.endswith("on B=1 L=256 D=64 H=8 float16 it takes 34.0 times as much.")


def test_more_memory_than_another_reference_names_it():
    first, second = report_of(plan_of(SWEEP[:2])).cases

    def with_peaks(case, reference, poc):
        peaks = {reference: 1000, "poc": poc}
        rows = (structs.replace(row, peak_bytes=peaks.get(row.implementation)) for row in case.rows)
        return structs.replace(case, reference=reference, rows=tuple(rows))

    cases = (with_peaks(first, "baseline", 500), with_peaks(second, "practical", 1500))
    reported = texts(compose([structs.replace(report_of(), cases=cases)]), "Memory")
    assert any(text.endswith("on B=1 L=256 D=64 H=8 float16 it takes 50 % more than practical.") for text in reported)


def test_one_row_without_a_claim_is_counted_in_the_singular():
    failed = with_rows(
        report_of(), lambda row: structs.replace(row, status="failed") if row.implementation == "poc" else row
    )
    found = [block.text for block in blocks(compose([failed]), Paragraph, "Summary")]
    assert "1 row of these runs supports no claim; see “What is not claimed”." in found


def test_nothing_is_claimed_of_too_few_rounds():
    few = with_rows(report_of(plan_of(SWEEP)), lambda row: structs.replace(row, samples=row.samples[:3]))
    document = compose([few])
    assert texts(document) == []
    (table,) = blocks(document, Table, "not claimed")
    assert len(table.rows) == 4 * len(SWEEP)
    assert {row[-1] for row in table.rows} == {"only 3 of 6"}


def test_nothing_is_claimed_without_reference_or_of_failures():
    report = report_of(plan_of(SWEEP))
    failed = with_rows(report, lambda row: structs.replace(row, status="failed", reason="it broke", speedup=None))
    assert texts(compose([failed])) == []
    cases = tuple(
        structs.replace(case, reference=None, noise_floor=None, rows=(structs.replace(case.rows[1], speedup=None),))
        for case in report.cases
    )
    reported = texts(compose([structs.replace(report, cases=cases)]))
    assert not [text for text in reported if "baseline" in text or "faster" in text or "Choose" in text]


def test_names_and_paths_cannot_put_markup_into_the_page():
    evil = "<script>alert(1)</script>"
    report = with_rows(report_of(), lambda row: structs.replace(row, path=evil, reason=evil))
    page = to_html(compose([report]))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.thorough
def test_a_sweep_is_drawn_in_the_page_s_own_colours_and_markers():
    _, *charts = blocks(compose([report_of(plan_of(SWEEP))]), Chart)  # the first is the verdict's
    assert [chart.title.partition(",")[0] for chart in charts] == [
        "Throughput by length",
        "Speedup over baseline by length",
    ]
    for chart in charts:
        assert "currentColor" in chart.svg
        assert re.search(r"var\(--series-\d\)", chart.svg)
        assert not re.search(r"#0102|#11a1", chart.svg)
        assert "poc" in chart.svg


def test_without_matplotlib_the_report_says_how_to_get_charts(monkeypatch):
    monkeypatch.setattr("fatui.report.charts.available", lambda: False)
    document = compose([report_of(plan_of(SWEEP))])
    assert len(blocks(document, Chart)) == len(blocks(document, Chart, "Verdict")) == 1
    assert any(block.command == "pip install 'fatui[report]'" for block in blocks(document, MissingData))


def test_a_noise_floor_stands_beside_each_line_of_the_speedups():
    report = report_of()
    floor = NoiseFloor(value=1.0, low=0.99, high=1.01, floor=0.0123)
    report = structs.replace(report, cases=tuple(structs.replace(case, noise_floor=floor) for case in report.cases))
    (table,) = blocks(compose([report]), Table, "Speedups")
    assert table.rows[0][-1] == "1.2 %"


def test_the_verdict_and_the_first_chart_come_before_any_prose():
    document = compose([report_of(plan_of(SWEEP))])
    assert document.sections[0].title == "Verdict"
    card, chart = document.sections[0].blocks
    assert isinstance(card, Card) and card.head.startswith("Use poc · 50") and "fastest in all 4 cases" in card.head
    assert isinstance(chart, Chart) and chart.svg.count("<rect") == 4
    page = to_html(document)
    assert page.index('class="card"') < page.index("<figure>") < page.index("<nav") < page.index("Measured on")
    text = to_markdown(document)
    assert text.index("Use poc") < text.index("█") < text.index("Measured on")


def test_a_verdict_has_the_noise_of_all_its_cases_alone():
    def run(run_id, length, value):
        floor = NoiseFloor(value=1.0, low=1 / (1 + value), high=1 + value, floor=value)
        report = report_of(plan_of([Workload(seq=length)]))
        cases = tuple(structs.replace(case, noise_floor=floor) for case in report.cases)
        return structs.replace(report, cases=cases, run=structs.replace(report.run, id=run_id))

    (card,) = blocks(compose([run("a", 64, 0.79), run("b", 128, 0.19)]), Card, "Verdict")
    assert "noise floor at most 79 %" in " ".join(card.grounds)


def test_a_report_without_a_verdict_says_what_to_run():
    (block,) = compose([structs.replace(report_of(), cases=())]).sections[0].blocks
    assert isinstance(block, MissingData) and block.command


def test_a_run_without_a_known_backend_is_titled_as_one():
    elsewhere = structs.replace(ENVIRONMENT, device=None, backend=None)
    document = compose([report_of(), structs.replace(report_of(), environment=elsewhere)])
    titles = [section.title for section in document.sections]
    assert any(title.startswith("unknown device, unknown backend: ") for title in titles)
    assert not any("None" in title for title in titles)
