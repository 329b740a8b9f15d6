"""`fatui predict` and `bench --beside`."""

import io
import json

import pytest
from rich.console import Console

from attention.chips.table import find_chips
from fatui.cli.main import main
from fatui.report.predictions import beside_table, predictions_of
from tests.support.sample_runs import report_of

PREFILL = ["--seq", "2048", "--head-dim", "128", "--dtype", "bfloat16", "--mask", "causal"]


def test_the_table_says_predicted_and_what_it_was_calibrated_on(capsys):
    assert main(["predict", *PREFILL, "--impl", "poc,mlx", "--chip", "h200,m4-max"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "predicted, not measured" in out and "90 % interval" in out
    assert "NVIDIA H200 SXM: 132 cores" in out
    assert "the same chip" in out and "another vendor" in out


def test_a_table_of_80_columns_breaks_no_word(capsys, monkeypatch):
    """Why a time is not predicted stands below the table, once for all rows with the same reason."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["predict", *PREFILL, "--impl", "baseline,poc,demo", "--chip", "m4-max,epyc-9654"]) == 0
    table, _, notes = capsys.readouterr().out.partition("epyc-9654, ")
    assert "…" not in table and " matrix\n" in table and " products\n" in table
    assert "n/a" in table and "to calibrate on" not in table
    assert notes.startswith("baseline: no rows of baseline by the path 'unfused'")


def test_json_has_each_prediction_with_its_interval(capsys):
    assert main(["predict", *PREFILL, "--impl", "poc", "--chip", "h100,h200", "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)["predictions"]
    assert [each["chip"] for each in made] == ["h100", "h200"]
    for each in made:
        assert each["type"] == "Prediction"
        assert each["low_s"] < each["predicted_s"] < each["high_s"]
        assert "call_s" not in each  # the name of a measured time


def test_a_chip_named_twice_is_predicted_once(capsys):
    assert main(["predict", *PREFILL, "--impl", "poc", "--chip", "h200, h100,h200", "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)["predictions"]
    assert [each["chip"] for each in made] == ["h200", "h100"]


def test_more_cores_make_a_prompt_shorter(capsys):
    times = []
    for further in ([], ["--cores", "2"]):
        shape = ["--seq", "8192", "--head-dim", "128", "--dtype", "bfloat16", "--impl", "mlx"]
        assert main(["predict", *shape, "--chip", "h200", "--json", "-", *further]) == 0
        times.append(json.loads(capsys.readouterr().out)["predictions"][0]["predicted_s"])
    assert times[1] < 0.7 * times[0]


def test_a_launch_that_the_calibration_cannot_use_is_said(capsys):
    assert main(["predict", "--seq", "64", "--impl", "torch", "--chip", "h100", "--launch", "1us"]) == 0
    assert "--launch changes nothing for torch" in capsys.readouterr().err


def test_chips_are_listed_with_the_source_of_each_figure(capsys):
    assert main(["predict", "--chips"]) == 0
    out = capsys.readouterr().out
    assert "h200: NVIDIA H200 SXM, Hopper" in out and "https://" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--chip", "h20"], "chip: got 'h20'; it takes a100"),
        (["--bandwidth", "0"], "--bandwidth: got 0; it takes a factor from 0.01 to 100"),
        (["--rate", "nan"], "--rate: got nan"),
        (["--impl", "basline"], "implementations: got 'basline'"),
        (["--seq", "0"], "seq: got 0"),
        (["--launch", "12"], "--launch: got '12'; it takes a time"),
        (["--launch", "2s"], "--launch: got '2s'; it takes a time up to 1 s"),
    ],
)
def test_mistakes_are_one_line_each(arguments, problem, capsys):
    assert main(["predict", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and problem in captured.err and captured.err.count("\n") == 1


def test_nothing_predicted_is_a_failure(capsys):
    assert main(["predict", "--mask", "documents:16", "--chip", "h200"]) == 1
    assert "masks other than causal and a window are not predicted" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_chip_is_refused_before_anything_is_measured(capsys):
    assert main(["bench", "--beside", "h20"]) == 2
    assert "chip: got 'h20'" in capsys.readouterr().err


def test_measured_times_stand_apart_from_predicted_ones():
    report = report_of()
    chips = find_chips(["h200"])
    console = Console(file=io.StringIO(), width=120)
    console.print(beside_table(report, chips, predictions_of(report, chips)))
    out = console.file.getvalue()
    assert "here, measured" in out and "h200, predicted" in out and "│" in out
