"""The parts of the app that need no screen."""

import pytest

from attention.core.errors import UsageError
from attention.core.plan import Plan
from attention.core.results import Case, Environment, Interval, Peaks, Report, Row, Run
from attention.core.workload import MAX_SIZES, Workload
from fatui import quantities
from fatui.draft import Draft, draft_of
from fatui.formatting import histogram
from fatui.report.scaling import RatePoint, crossovers
from fatui.storage.settings import RunSpeed
from fatui.tui.terminal import plain
from fatui.tui.view_models.cost import estimate_s, learn
from fatui.tui.view_models.journal import Log
from fatui.tui.view_models.plot import stretched
from fatui.tui.view_models.session import Series
from fatui.tui.view_models.trends import ceiling


@pytest.mark.parametrize(("text", "number"), [("512", 512), ("8k", 8192), (" 1 M ", 2**20), ("1_000", 1000)])
def test_a_typed_number_may_have_a_suffix(text, number):
    assert quantities.parse_number(text, MAX_SIZES["seq"]) == number


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "999999999999", "k"])
def test_what_is_no_number_is_refused_with_what_is_taken(text):
    with pytest.raises(ValueError, match="whole number from 1 to"):
        quantities.parse_number(text, MAX_SIZES["seq"])


def test_a_range_doubles():
    assert quantities.parse_values("128, 256..2k", MAX_SIZES["seq"]) == (128, 256, 512, 1024, 2048)


def test_numbers_use_powers_of_1024_only_where_exact():
    assert [quantities.format_number(number) for number in (512, 1000, 1024, 8192, 2**20, 1536)] == [
        "512",
        "1,000",
        "1 K",
        "8 K",
        "1 M",
        "1,536",
    ]


def test_key_heads_follow_heads_until_they_are_set():
    draft = Draft().set_axis("heads", (32,))
    assert draft.workloads()[0].kv_heads == 32
    assert draft.set_axis("kv_heads", (8,)).workloads()[0].kv_heads == 8


def test_kv_heads_that_no_longer_divide_heads_follow_them():
    draft = Draft().set_axis("heads", (32,)).set_axis("kv_heads", (8,)).set_axis("heads", (12,))
    assert draft.workloads()[0].kv_heads == 12


def test_a_grid_of_cases_becomes_a_sweep_and_others_a_list():
    grid = tuple(Workload(seq=seq, batch=batch) for batch in (1, 2) for seq in (64, 128))
    swept = draft_of(Plan(cases=grid, implementations=("baseline",)), "grid")
    assert swept.sweeping and set(swept.workloads()) == set(grid)
    ragged = (Workload(seq=64), Workload(seq=128, head_dim=32))
    listed = draft_of(Plan(cases=ragged, implementations=("baseline",)), "ragged")
    assert listed.workloads() == ragged
    assert len(listed.set_axis("seq", (256,)).workloads()) == 1


@pytest.mark.parametrize(
    "case",
    [Workload(seq=4096, pass_="decode", heads=8, kv_heads=2), Workload(seq=64, kv_seq=512), Workload(value_dim=32)],
)
def test_a_preset_of_one_case_is_shown_as_it_is(case):
    assert draft_of(Plan(cases=(case,), implementations=("baseline",)), "x").workloads() == (case,)


def test_a_sweep_that_is_too_large_is_refused():
    many = tuple(range(1, 33))
    with pytest.raises(UsageError, match="1,024 cases"):
        Draft().set_axis("batch", many).set_axis("seq", many).workloads()


def test_a_series_keeps_its_bound_its_mean_and_its_extremes():
    series = Series(most=64)
    for value in range(10_000):
        series.add(float(value))
    assert len(series.points) < 64
    assert series.last == series.highest == 9999
    assert series.points == sorted(series.points)
    assert sum(series.points) / len(series.points) == pytest.approx(5000, rel=0.05)


@pytest.mark.thorough
def test_a_journal_keeps_the_last_lines_and_counts_all():
    journal = Log(most=1000)
    for number in range(100_000):
        journal.write(f"line {number}")
    assert (journal.count, len(journal)) == (100_000, 1000)
    assert [line.text for line in journal.since(99_998)] == ["line 99998", "line 99999"]
    assert len(list(journal.since(0))) == 1000


def test_points_are_averaged_or_repeated_to_fill_a_width():
    assert stretched([1, 2, 3], 6) == [1, 1, 2, 2, 3, 3]
    assert stretched([1, 1, 3, 3], 2) == [1, 3]
    assert stretched([], 4) == []


@pytest.mark.parametrize("value", [1, 3.2, 999, 28e3, 1.4e6])
def test_a_scale_is_round_and_holds_its_values(value):
    assert value * 0.999 <= ceiling(value) <= 2 * value


def test_a_histogram_shows_every_sample_and_fills_its_height():
    rows = histogram([1.0] * 500 + [2.0], width=10, height=2)
    assert rows[0][0] == rows[1][0] == "█"
    assert rows[1][-1] == "▁"
    assert len(histogram([1.0, 1.0], width=10, height=1)) == 1


def test_a_crossover_is_named_only_where_intervals_are_apart():
    def line(*rates):
        return [RatePoint(2**index, rate, rate * 0.99, rate * 1.01) for index, rate in enumerate(rates)]

    found = crossovers({"a": line(10, 10, 10), "b": line(5, 10.05, 20)})
    assert [(each.faster_before, each.faster_after, each.between) for each in found] == [("a", "b", (1, 4))]


def plan_of(**fields):
    return Plan(cases=(Workload(**fields),), implementations=("baseline",), seconds=2)


def paced(**fields):
    """Learn from a run with one call of 10 ms per workload."""
    return learn(RunSpeed(), report_of("baseline", 0.01, 2.5, **fields), 2.0)


def report_of(name, call_s, seconds, **fields):
    """Make a run of one row."""
    row = Row(implementation=name, status="ok", call_s=Interval(median=call_s, low=call_s, high=call_s))
    return Report(
        run=Run(id="a", started="", seconds=seconds, command=""),
        environment=Environment(device="x"),
        peaks=Peaks(),
        cases=(Case(workload=Workload(**fields), rows=(row,)),),
    )


def test_the_estimate_grows_with_slow_calls():
    pace = paced(seq=512)
    assert 2.5 <= estimate_s(plan_of(seq=64), pace, "x") < 3
    assert 13 <= estimate_s(plan_of(seq=4096), pace, "x") < 14
    assert estimate_s(plan_of(seq=64), pace, "y") is None


def test_a_training_run_says_nothing_of_decoding():
    pace = paced(seq=512, dtype="bfloat16", pass_="training")
    assert estimate_s(plan_of(seq=512, dtype="bfloat16", pass_="training"), pace, "x") is not None
    assert estimate_s(plan_of(seq=1, kv_seq=512, dtype="bfloat16", pass_="decode"), pace, "x") is None
    assert estimate_s(plan_of(seq=512, pass_="training"), pace, "x") is None


def test_an_estimate_far_beyond_all_known_sizes_is_none():
    assert estimate_s(plan_of(seq=8192), paced(seq=512), "x") is None


def test_a_run_adds_to_what_is_known_of_others():
    pace = paced(seq=512)
    report = report_of("poc", 0.1, 1, seq=1024, pass_="training")
    assert set(learn(pace, report, 1.0).calls) == {"baseline float16 forward", "poc float16 training"}


def test_ascii_keeps_every_width():
    text = "├──●──┤ 49.6 ±0.4x ★ ≈ 1 ▁▂█ … ☃"
    assert plain(text).isascii() and len(plain(text)) == len(text)


def test_a_grid_over_types_and_masks_becomes_a_sweep():
    grid = tuple(Workload(dtype=dtype, mask=mask) for dtype in ("float32", "float16") for mask in ("none", "causal"))
    swept = draft_of(Plan(cases=grid, implementations=("baseline",)), "grid")
    assert swept.sweeping and set(swept.workloads()) == set(grid)
    assert swept.several == {"dtype": ("float32", "float16"), "mask": ("none", "causal")}
