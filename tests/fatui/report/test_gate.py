"""The gate of `fatui compare`: outcomes of rows, thresholds, pairs of runs, exit codes and the Markdown table."""

import re
import shlex
from pathlib import Path

import msgspec
import pytest
import yaml
from msgspec import structs

from attention.core import events as on
from attention.core.errors import UsageError
from attention.core.files import parse_toml
from attention.core.results import NoiseFloor, Ratio, Report
from attention.core.statistics import MIN_FLOOR, repeated_floor, repeated_ratio
from attention.core.workload import Workload
from attention.engine.record import Record
from fatui.cli.main import COMMANDS, main
from fatui.report.comparison import compare, compare_pairs
from fatui.report.gate import Gate, Thresholds, judge, parse_criteria, parse_percent, thresholds_of, to_markdown
from tests.support import hostile
from tests.support.marks import slow
from tests.support.sample_runs import events_of, plan_of, report_of, run_of

NAMES = ("baseline", "poc", "practical")
Pairs = list[tuple[Report, Report]]
EXAMPLES = Path(__file__).parents[3] / "examples"
THREE = Thresholds(slower=0.03)
STRICT = Thresholds(slower=0.03, undecided="fail")


def run_with(factors: dict[str, float], seed: int, noise: float = 0.004, machine: float = 1.0) -> Report:
    """A run in which implementations take multiples of their time, on a machine slower by a factor."""
    plan = plan_of(names=NAMES)
    record = Record(plan)
    for event in events_of(plan, seed, noise):
        if isinstance(event, on.RoundsDone):
            for name, samples in event.samples.items():
                event.samples[name] = [each * machine * factors.get(name, 1.0) for each in samples]
        record.apply(event)
    return record.report(run_of(identity=f"run{seed}"))


def pairs_with(factors: dict[str, float], pairs: int, seed: int, noise: float = 0.004, drift: float = 1.0) -> Pairs:
    """Pairs of runs, with a change of some implementations and a machine that drifts."""
    return [
        (run_with({}, 1000 * seed + 2 * pair, noise), run_with(factors, 1000 * seed + 2 * pair + 1, noise, drift))
        for pair in range(pairs)
    ]


def judged(factors: dict[str, float], pairs: int, seed: int, noise: float = 0.004, drift: float = 1.0) -> Gate:
    """The gate over such pairs, which fails on rows that they leave undecided."""
    return judge(compare_pairs(pairs_with(factors, pairs, seed, noise, drift)), STRICT)


def in_turns(pairs: Pairs, spread: float = 0.0) -> Pairs:
    """Pairs as if measured in turns: each in the same rounds, on a machine whose runs differ by a factor."""
    made = []
    for number, (before, after) in enumerate(pairs):
        factor = 1 + spread * (number % 3 - 1)
        slowed = after
        for row in after.cases[0].rows:
            slowed = with_row(slowed, row.implementation, samples=tuple(factor * each for each in row.samples))
        first, second = (
            structs.replace(each, run=structs.replace(each.run, in_turns=f"t{number}")) for each in (before, slowed)
        )
        made.append((first, second))
    return made


def outcomes(gate: Gate) -> dict[str, str]:
    return {row.change.implementation: row.outcome for row in gate.rows}


@pytest.mark.parametrize("count", [8, slow(300)])
def test_the_same_code_passes_99_of_100_times(count):
    assert sum(judged({}, 5, seed).passed for seed in range(count)) >= 0.99 * count


@pytest.mark.parametrize(("noise", "count"), [(0.004, 8), slow(0.004, 100), slow(0.03, 100), slow(0.2, 100)])
def test_a_planted_slowdown_fails_whatever_the_noise(noise, count):
    assert not any(judged({"poc": 1.05}, 3, seed, noise).passed for seed in range(count))
    assert sum(judged({"poc": 1.03}, 3, seed, noise).passed for seed in range(count)) <= 0.1 * count


@pytest.mark.parametrize(("factor", "count"), [(1.05, 8), slow(1.03, 100), slow(1.05, 100)])
def test_runs_in_turns_show_a_planted_slowdown(factor, count):
    gates = [judge(compare_pairs(in_turns(pairs_with({"poc": factor}, 6, seed))), THREE) for seed in range(count)]
    assert sum(not gate.passed for gate in gates) >= 0.98 * count


def test_a_gate_ends_at_five_deciding_pairs_or_the_last():
    pairs = in_turns(pairs_with({}, 5, 1, 0.001))
    four, five = (judge(compare_pairs(pairs[:number]), THREE) for number in (4, 5))
    assert four.decided
    assert not four.ended(most=12)
    assert five.ended(most=12)
    noisy = judge(compare_pairs(in_turns(pairs_with({}, 6, 1, 0.2))), THREE)
    assert [noisy.ended(most) for most in (6, 7)] == [True, False]


@pytest.mark.parametrize(("noise", "count"), [(0.03, 8), slow(0.004, 300), slow(0.15, 300)])
def test_the_same_code_in_turns_passes_at_every_look(noise, count):
    for seed in range(count):
        pairs = in_turns(pairs_with({}, 12, seed, noise), spread=noise / 10)
        assert all(judge(compare_pairs(pairs[:number]), THREE).passed for number in range(3, 13, 3)), seed


def test_runs_in_turns_show_a_slower_baseline():
    pairs = pairs_with({"baseline": 1.05}, 6, seed=3)
    assert outcomes(judge(compare_pairs(in_turns(pairs)), THREE))["baseline"] == "SLOWER"
    assert outcomes(judge(compare_pairs(pairs), THREE))["baseline"] == "SAME"


def test_runs_of_different_turns_are_compared_by_the_baseline():
    (before, after), (other, _) = in_turns(pairs_with({}, 2, seed=3))
    assert compare(before, after).changes[1].in_turns
    assert not compare(before, other).changes[1].in_turns


def test_rows_that_skip_rounds_are_compared_by_their_medians():
    ((before, after),) = in_turns(pairs_with({}, 1, seed=3))
    (poc,) = (row for row in after.cases[0].rows if row.implementation == "poc")
    change = compare(before, with_row(after, "poc", samples=poc.samples[::2])).changes[1]
    assert change.ratio == change.times
    assert change.ratio and change.ratio.value == pytest.approx(change.before.call_s.median / poc.call_s.median)


def test_noise_makes_a_row_undecided_which_passes_by_default():
    runs = compare_pairs(pairs_with({}, 3, seed=1, noise=0.2))
    gate = judge(runs, THREE)
    assert outcomes(gate)["poc"] == "UNDECIDED"
    assert gate.passed and not gate.decided
    assert "measure longer" in gate.remarks[0] and gate.remarks[0] in to_markdown(gate)
    refused = judge(runs, STRICT)
    assert refused.problems == gate.remarks
    assert not refused.remarks


def test_more_pairs_decide_what_one_leaves_open():
    assert outcomes(judged({}, 1, seed=3, noise=0.02))["poc"] == "UNDECIDED"
    assert outcomes(judged({}, 12, seed=3, noise=0.02))["poc"] == "SAME"


@pytest.mark.parametrize(("factor", "word"), [(0.9, "FASTER"), (1.0, "SAME"), (1.1, "SLOWER"), (1.015, "SAME")])
def test_outcomes(factor, word):
    assert outcomes(judged({"poc": factor}, 8, seed=5))["poc"] == word


def test_a_slow_machine_is_not_slow_code():
    gate = judged({}, 5, seed=7, drift=1.4)
    assert gate.passed, gate.problems
    assert not judged({"poc": 1.05}, 3, seed=7, drift=1.4).passed


def test_the_reference_is_the_same_by_definition():
    assert outcomes(judged({"baseline": 1.5}, 3, seed=9))["baseline"] == "SAME"


def test_pairs_that_differ_widen_the_interval():
    factors = [1.0, 1.1, 0.95]
    pairs = [(run_with({}, 2 * n), run_with({"poc": each}, 2 * n + 1)) for n, each in enumerate(factors)]
    poc = compare_pairs(pairs).changes[1]
    assert poc.ratio and poc.ratio.high / poc.ratio.low > 1.15
    assert poc.outcome(0.03) == "UNDECIDED"


def test_one_pair_is_compared_as_ever():
    first, second = report_of(seed=1), report_of(seed=2)
    assert compare_pairs([(first, second)]) == compare(first, second)


def with_row(report: Report, name: str, **fields: object) -> Report:
    (case,) = report.cases
    rows = tuple(structs.replace(row, **fields) if row.implementation == name else row for row in case.rows)
    return structs.replace(report, cases=(structs.replace(case, rows=rows),))


def without_row(report: Report, name: str) -> Report:
    (case,) = report.cases
    rows = tuple(row for row in case.rows if row.implementation != name)
    return structs.replace(report, cases=(structs.replace(case, rows=rows),))


def gate_of(after: Report, thresholds: Thresholds) -> Gate:
    return judge(compare(run_with({}, 1), after), thresholds)


def test_memory_inaccurate_failed_and_missing_rows():
    same = run_with({}, 2)
    (poc,) = (row for row in same.cases[0].rows if row.implementation == "poc")
    grown = with_row(same, "poc", peak_bytes=int(1.2 * poc.peak_bytes))
    assert gate_of(grown, Thresholds(memory=0.25)).passed
    (problem,) = gate_of(grown, Thresholds(memory=0.1)).problems
    assert "memory grew by 20 %" in problem
    unknown = with_row(same, "poc", peak_bytes=None)
    assert not gate_of(unknown, Thresholds(memory=0.1, undecided="fail")).passed
    assert gate_of(unknown, Thresholds(memory=0.1)).passed

    wrong = with_row(same, "poc", status="inaccurate", reason="output 1 of 1e-3")
    assert gate_of(wrong, Thresholds(memory=0.1)).passed
    assert "inaccurate: output 1" in gate_of(wrong, Thresholds(inaccurate=True)).problems[0]

    failed = with_row(same, "poc", status="failed", reason="boom", call_s=None, speedup=None)
    assert "failed: boom" in gate_of(failed, Thresholds(memory=0.1, undecided="pass")).problems[0]

    gone = without_row(same, "poc")
    assert "only in the first run" in gate_of(gone, Thresholds(memory=0.1)).problems[0]
    assert gate_of(gone, Thresholds(memory=0.1, missing="pass")).passed
    assert judge(compare(gone, same), Thresholds(memory=0.1)).passed  # a new row


def test_runs_without_a_common_row_fail():
    other = report_of(plan_of([Workload(seq=999)], NAMES))
    gate = judge(compare(run_with({}, 1), other), Thresholds(slower=0.03, missing="pass"))
    assert gate.problems == ("the runs have no row in common",)


def test_limits_of_single_implementations():
    thresholds = thresholds_of(parse_toml((EXAMPLES / "gate.toml").read_text()))
    assert thresholds.of("demo") == (0.10, 0.10)
    assert thresholds.of("poc") == (0.03, 0.10)
    assert thresholds.inaccurate and thresholds.judging
    assert parse_criteria(["slower:1%"], thresholds).slower == 0.01


@pytest.mark.parametrize(
    "text",
    ["slow:3%", "slower", "slower:", "slower:3", "slower:-3%", "slower:nan%", "memory:1e9%", "inaccurate:1%", ""],
)
def test_a_wrong_criterion_is_one_line(text, capsys):
    assert main(["compare", "a", "b", "--fail-on", text]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "schema = 2",
        "schema = true",
        "schema = 1\nundecided = 'maybe'",
        "schema = 1\nfail-on = 3",
        "schema = 1\n[fail-on]\nslower = 0.03",
        "schema = 1\n[fail-on]\nfaster = '3%'",
        "schema = 1\n[fail-on]\ninaccurate = 'yes'",
        "schema = 1\n[[row]]\nslower = '3%'",
        "schema = 1\n[row]\nslower = '3%'",
        "schema = 1\n[[row]]\nimplementation = 'poc'\ninaccurate = true",
        "\x1b = 1",
        "a = " + "[" * 100_000,
    ],
)
def test_wrong_thresholds_are_one_line_each(text, tmp_path, capsys):
    path = tmp_path / "gate.toml"
    path.write_text(text)
    assert main(["compare", "a", "b", "--thresholds", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and not hostile.unsafe_in(error)


def test_percentages():
    assert parse_percent("0.5 %", "x") == 0.005
    with pytest.raises(UsageError, match="x: got '3'"):
        parse_percent("3", "x")


def test_repeated_figures():
    ratio, floor = Ratio(value=2, low=1.9, high=2.1), NoiseFloor(value=1.0, low=0.98, high=1.02, floor=0.02)
    assert repeated_ratio([], 0.1) is None
    alone = repeated_ratio([ratio], 0.1)
    assert alone and (alone.value, alone.low, alone.high) == pytest.approx((2, 1.9, 2.1))
    many = repeated_ratio([ratio] * 9, 0.1)
    assert many and many.high - many.low == pytest.approx(0.2 / 3, rel=0.01)
    assert (repeated_floor([]), repeated_floor([floor])) == (MIN_FLOOR, 0.02)
    assert repeated_floor([floor] * 4) == pytest.approx(0.01, rel=0.02)
    assert repeated_floor([structs.replace(floor, low=-1.0)] * 2) == 0.02


@pytest.fixture
def folders(tmp_path):
    """Two folders with three runs each, the second with a planted slowdown in a third."""
    for name, factors in (("base", {}), ("new", {}), ("bad", {"poc": 1.08})):
        (tmp_path / name).mkdir()
        for number in range(3):
            content = msgspec.json.encode(run_with(factors, 100 * len(name) + number + ord(name[0])))
            (tmp_path / name / f"{number}.json").write_bytes(content)
    return tmp_path


def test_the_command_fails_with_code_4(folders, capsys):
    base, new, bad = (str(folders / name) for name in ("base", "new", "bad"))
    assert main(["compare", base, bad]) == 0
    assert main(["compare", base, new, "--fail-on", "slower:3%"]) == 0
    assert "the gate passes" in capsys.readouterr().out
    assert main(["compare", base, bad, "--fail-on", "slower:3%", "--markdown", str(folders / "gate.md")]) == 4
    captured = capsys.readouterr()
    assert "SLOWER" in captured.out and "the gate fails" in captured.out
    assert captured.err.startswith("fatui: poc on ") and captured.err.count("\n") == 1
    assert re.search(r"\| poc \| .* % \| \+0.0 % \| SLOWER \|", (folders / "gate.md").read_text())
    assert main(["compare", base, bad, "--thresholds", str(EXAMPLES / "gate.toml")]) == 4


def test_both_sides_need_as_many_runs(folders, capsys):
    (folders / "new" / "0.json").unlink()
    assert main(["compare", str(folders / "base"), str(folders / "new")]) == 2
    assert "BASE has 3 runs and NEW 2" in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["compare", str(tmp_path), "last"]) == 2
    assert "no file *.json" in capsys.readouterr().err


def test_without_a_criterion_no_gate_passes():
    pairs = compare_pairs(pairs_with({"poc": 1.5}, 2, 1))
    assert to_markdown(judge(pairs, Thresholds())).startswith("### Attention performance\n")
    assert to_markdown(judge(pairs, THREE)).startswith("### Attention performance: the gate fails\n")


def test_hostile_names_stay_in_their_cells():
    report = hostile.report("shapes", "a")
    text = to_markdown(judge(compare(report, report), THREE))
    assert not hostile.unsafe_in(text)
    assert all(line.startswith(("|", "#", "-", "\\", "a then")) or not line for line in text.splitlines())


def test_the_workflow_uses_commands_and_options_that_exist():
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    script = "\n".join(step.get("run", "") for step in steps)
    assert set(re.findall(r"\bfatui (\w+)", script)) == {"gate"} <= set(COMMANDS)
    gate = shlex.split(workflow["env"]["GATE"])
    assert gate[::2] == ["--fail-on"] * (len(gate) // 2)
    assert parse_criteria(gate[1::2]) == Thresholds(slower=0.03, memory=0.10, inaccurate=True)
    from fatui.cli.main import command_request

    (line,) = (line for line in script.splitlines() if line.startswith("fatui gate"))
    words = shlex.split(line.replace("$GATE", workflow["env"]["GATE"]))
    _, request = command_request("gate", [word.replace("$BENCH", workflow["env"]["BENCH"]) for word in words[2:]])
    assert request.markdown == "gate.md"
    _, measured = command_request("bench", shlex.split(request.bench))
    assert measured.preset == "quick"


@pytest.mark.parametrize("environment", [{"device": "Apple M4"}, {"backend": "cuda"}, {"blas": "MKL"}])
def test_times_of_two_machines_are_left_open(environment):
    before, after = run_with({}, 1), run_with({"poc": 0.5, "practical": 2.0}, 2)
    after = structs.replace(after, environment=structs.replace(after.environment, **environment))
    gate = judge(compare(before, after), THREE)
    assert gate.passed and {row.outcome for row in gate.rows} == {"UNDECIDED"} and len(gate.remarks) == 3
    assert "differ in device, backend or BLAS" in gate.remarks[0]
    assert not judge(compare(before, after), STRICT).passed
    failed = with_row(after, "poc", status="failed")
    assert [text.partition(" ")[0] for text in judge(compare(before, failed), THREE).problems] == ["poc"]
    unknown = structs.replace(after, environment=structs.replace(after.environment, **dict.fromkeys(environment)))
    assert not judge(compare(before, unknown), THREE).passed
