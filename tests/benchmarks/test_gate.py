"""The gate's benchmark: what a simulated comparison is made of, and that results in its folder count."""

import random
import sys
from itertools import pairwise

import msgspec
import pytest
from msgspec import structs

from benchmarks import gate as benchmark
from tests.support.sample_runs import report_of, run_of


def pair_of(rounds=20):
    """Return two runs in turns whose samples name their round: 1000 in the first run, 2000 in the second."""
    made = []
    for side in (1000.0, 2000.0):
        report = report_of(run=structs.replace(run_of(), in_turns="t"))
        case = report.cases[0]
        rows = tuple(structs.replace(row, samples=tuple(side + i for i in range(rounds))) for row in case.rows)
        made.append(structs.replace(report, cases=(structs.replace(case, rows=rows),)))
    return tuple(made)


def samples_of(report):
    return {row.implementation: row.samples for row in report.cases[0].rows}


def test_a_drawn_pair_has_the_same_rounds_of_both_sides():
    first, second = benchmark.drawn(pair_of(), random.Random(1), None, None, 0.0)
    rounds = [{tuple(each % 1000 for each in row) for row in samples_of(side).values()} for side in (first, second)]
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 1


def test_drawn_rounds_are_blocks_of_successive_ones():
    first, _ = benchmark.drawn(pair_of(), random.Random(1), 40, None, 0.0)
    taken = [round(each % 1000) for each in first.cases[0].rows[0].samples]
    assert len(taken) == 40
    follows = sum((b - a) % 20 == 1 for a, b in pairwise(taken))
    assert follows >= 40 * (benchmark.BLOCK - 1) // benchmark.BLOCK


def test_base_and_new_change_places_at_random():
    draw = random.Random(1)
    firsts = {
        benchmark.drawn(pair_of(), draw, None, None, 0.0)[0].cases[0].rows[0].samples[0] // 1000 for _ in range(20)
    }
    assert firsts == {1, 2}


def test_a_planted_slowdown_is_of_one_row_of_the_second_run():
    plain = benchmark.drawn(pair_of(), random.Random(1), None, None, 0.0)
    slowed = benchmark.drawn(pair_of(), random.Random(1), None, "poc", 0.05)
    assert samples_of(slowed[0]) == samples_of(plain[0])
    ratios = {name: samples_of(slowed[1])[name][0] / row[0] for name, row in samples_of(plain[1]).items()}
    assert ratios.pop("poc") == pytest.approx(1.05)
    assert set(ratios.values()) == {1.0}


def test_pairs_that_skip_rounds_or_were_cut_short_are_left_out(tmp_path):
    whole = pair_of()
    case = whole[1].cases[0]
    rows = (*case.rows[:-1], structs.replace(case.rows[-1], samples=case.rows[-1].samples[:-1]))
    skipping = (whole[0], structs.replace(whole[1], cases=(structs.replace(case, rows=rows),)))
    interrupted = (whole[0], structs.replace(whole[1], cases=()))
    for number, pair in enumerate((whole, skipping, interrupted)):
        for side, report in zip(("base", "new"), pair, strict=True):
            (tmp_path / side).mkdir(exist_ok=True)
            (tmp_path / side / f"{number}.json").write_bytes(msgspec.json.encode(report))
    assert len(benchmark.kept_pairs(tmp_path)) == 1


def test_results_in_the_folder_are_not_measured_again(tmp_path, monkeypatch, capsys):
    measured = []

    def comparison(options, folder, cores, delay):
        folder.mkdir(parents=True)
        measured.append(folder.name)
        return benchmark.Result(outcome="passes", pairs=5)

    monkeypatch.setattr(benchmark, "_comparison", comparison)
    kept = tmp_path / "quick-own-s-0" / "001"
    kept.mkdir(parents=True)
    (kept / benchmark.RESULT).write_bytes(msgspec.json.encode(benchmark.Result(outcome="fails", slower=("poc",))))
    interrupted = tmp_path / "quick-own-s-0" / "002" / "base"
    interrupted.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["gate", "--count", "3", "--folder", str(tmp_path)])
    benchmark.main()
    assert measured == ["000", "002"]
    assert not interrupted.exists()
    printed = capsys.readouterr().out
    assert "quick-own-s-0 3 of 3: passes; 5 pairs; " in printed
    assert "so far 2 of 3 as asked" in printed
    assert "| quick-own-s-0 | 2 | 3 | 1 | 0 | 0 to 5, median 5 |" in printed


@pytest.mark.parametrize(
    ("kind", "outcome", "slower", "asked"),
    [
        ("quick-1.0-s-0", "passes", (), True),
        ("quick-1.0-s-0", "fails", ("poc",), False),
        ("quick-1.0-s-0.05", "fails", ("planted.py:Planted",), True),
        ("quick-1.0-s-0.05", "fails", ("poc",), False),
        ("quick-1.0-s-0.05", "passes", (), False),
        ("quick-1.0-s-0.05", "ended with 1: no run", (), False),
    ],
)
def test_only_the_planted_row_counts_as_found(kind, outcome, slower, asked):
    assert benchmark.as_asked(kind, benchmark.Result(outcome=outcome, slower=slower)) is asked


def test_a_comparison_that_was_stopped_is_not_kept(tmp_path, monkeypatch, capsys):
    def comparison(options, folder, cores, delay):
        folder.mkdir(parents=True)
        benchmark.STOPPED.set()
        return benchmark.Result(outcome="ended with -15: ")

    monkeypatch.setattr(benchmark, "_comparison", comparison)
    monkeypatch.setattr(sys, "argv", ["gate", "--count", "3", "--folder", str(tmp_path)])
    assert benchmark.main() == benchmark.INTERRUPTED
    assert not list(tmp_path.rglob(benchmark.RESULT))
    assert "| comparison | as asked |" in capsys.readouterr().out
