"""`fatui stream`: options, output, exports and history."""

import csv
import io
import json
from pathlib import Path

import pytest

from attention.core.results import Report
from fatui.cli import main
from fatui.cli.stream import request
from fatui.report import export
from fatui.report.table import report_table
from fatui.reproduce import stream_command
from fatui.storage import result_files
from fatui.storage.history import summary_of
from tests.support.streams import stream_plan, stream_report


def shown(report: Report, width: int = 100) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(report_table(report, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "0"], "window: got 0; it takes a whole number from 1"),
        (["--window", "8", "--first", "9"], "first: got 9; it takes a whole number from 0 to the window"),
        (["--first", "-1"], "first: got -1; it takes a whole number from 0 to the window, which is 1,024"),
        (["--tokens", "0"], "tokens: got 0; it takes a whole number from 1"),
        (["--tokens", "many"], "--tokens: got 'many'; it takes one whole number"),
        (["--rows", "window"], "--rows: got 'window'; it takes full, streaming without a model"),
        (["--text", "a.txt"], "--text: not taken here; there is no model to read it"),
        (["tiny-llama", "--text", "nowhere.txt"], "text: nowhere.txt cannot be read"),
        (["tiny-llama", "--heads", "4"], "--heads: not taken here; the model has its own"),
        (["nosuch"], "'nosuch': neither a model"),
        (["--kv-format", "int9"], "kv_format: got 'int9'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["stream", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert message in err


def test_a_preset_gives_the_shape_and_options_override_it() -> None:
    plan, _, preset = request(parsed("quantized", "--window", "64"))
    assert preset == "quantized"
    assert plan.cases[0].window == 64
    assert plan.cases[0].model is None


def parsed(*arguments: str):  # type: ignore[no-untyped-def]
    from fatui.cli import stream

    parser = main.Parser()
    stream.add_arguments(parser)
    return parser.parse_all(arguments)


@pytest.mark.parametrize("arguments", [["--kv-format", "int4", "--chunk", "3"], ["tiny-llama", "--rows", "window"]])
def test_the_command_of_a_run_makes_the_same_plan(arguments: list[str]) -> None:
    plan = request(parsed(*arguments))[0]
    again = request(parsed(*stream_command(plan).split()[2:]))[0]
    assert again == plan


def test_the_table_says_what_is_extrapolated() -> None:
    text = shown(stream_report(), width=120)
    assert "~ 1.02 ms" in text
    assert "measured up to 16,384 keys" in text
    assert "full, extrapolated: 1.02 ms" in text
    assert "10.2 times as long" in text
    assert "interrupted" not in text
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["climbs", "flat"]


@pytest.mark.parametrize("model", [None, "tiny-llama"])
def test_a_narrow_table_fits_and_keeps_the_times(model: str | None) -> None:
    text = shown(stream_report(model), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "time per token" in text


def test_slow_steps_are_shown_with_those_of_an_empty_loop() -> None:
    text = shown(stream_report())
    assert "0 of 4,500 steps took over 5 times the median" in text
    assert "a loop that does nothing for as long: 10 of 1,000" in " ".join(text.split())
    bare = next(line for line in text.splitlines() if line.startswith("  bare loop"))
    assert bare.rstrip()[-1] in "▂▃▄"
    assert bare.count("█") == 0


def test_losses_are_shown_for_models_only() -> None:
    assert "beyond" not in shown(stream_report()).split("time per token\n")[0]
    assert "loss per token" in shown(stream_report("tiny-llama"))


def test_json_comes_back_as_the_same_report(tmp_path: Path) -> None:
    report = stream_report("tiny-llama")
    (tmp_path / "run.json").write_text(export.to_json(report), encoding="utf-8")
    assert result_files.read(tmp_path / "run.json").streams == report.streams


def test_csv_has_a_line_for_each_row() -> None:
    lines = list(csv.DictReader(io.StringIO(export.to_csv(stream_report("tiny-llama")))))
    assert [line["implementation"] for line in lines] == ["full", "recomputed", "window", "streaming"]
    assert lines[0]["extrapolated"] == "true"
    assert lines[3]["tokens"] == lines[3]["seen_tokens"] == "100000"
    assert float(lines[3]["loss_beyond"]) == pytest.approx(1.4)


def test_markdown_is_a_table_without_the_drawing() -> None:
    text = export.to_markdown(stream_report())
    assert "| streaming |" in text
    assert "| flat |" in text
    assert "~ extrapolated" in text
    assert "┤" not in text


def test_an_impossible_time_in_a_file_is_refused() -> None:
    content = json.loads(export.to_json(stream_report()))
    content["streams"][0]["rows"][1]["blocks"][3]["seconds"] = -1
    with pytest.raises(ValueError, match=r"blocks\[3\]\.seconds: got -1"):
        result_files.decode(json.dumps(content).encode())


def test_the_history_lists_the_finding() -> None:
    summary = summary_of(stream_report())
    assert summary.implementations == ("full", "streaming")
    assert summary.finding.startswith("streaming takes 100 µs a token")


def test_a_plan_puts_full_attention_first() -> None:
    assert stream_plan("tiny-llama").ordered == ("full", "recomputed", "window", "streaming")
