"""`fatui model` and `fatui finetune`: options, output, and, in slow tests, measurements."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec import structs

from attention.core import events as on
from attention.core.plan import FineTuningPlan, GenerationPlan
from attention.core.results import Report
from attention.core.route import Route
from attention.core.workload import FineTuning, Generation
from attention.engine.record import record_of
from fatui.cli import main
from fatui.cli.run import MAX_QUIET_S, ProgressPrinter
from fatui.engine_process import Silence
from fatui.report import export
from fatui.report.table import report_table
from fatui.storage.history import RunHistory
from tests.support.patience import patient
from tests.support.sample_runs import ENVIRONMENT, run_of
from tests.support.streams import stream_plan

ROOT = Path(__file__).parents[3]
SPEED = {"baseline": 1.0, "poc": 0.5, on.REPEATED_REFERENCE: 1.0, on.WITHOUT_ATTENTION: 0.4}
GENERATIONS = tuple(
    Generation(model="tinyllama-1.1b", phase=phase, prompt=128, generate=8, layers=22, measured_layers=4)
    for phase in ("prefill", "decode")
)


def fatui(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fatui", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(timeout), check=False)


def shown(report: Report, width: int = 100) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(report_table(report, width=width))
    return out.getvalue()


def generation_report(kv_format: str = "none") -> Report:
    cases = tuple(structs.replace(case, kv_format=kv_format) for case in GENERATIONS)
    plan = GenerationPlan(cases=cases, implementations=("baseline", "poc"))
    record = record_of(plan)
    record.apply(on.RunStarted(environment=ENVIRONMENT))
    wave = [1 + 0.002 * (index % 5) for index in range(15)]
    for case in range(2):
        record.apply(on.CaseStarted(case=case))
        record.apply(on.WeightsLoaded(case=case, weights_bytes=2 * 2**30))
        record.apply(on.ReferenceChosen(case=case, implementation="baseline"))
        for name in plan.ordered:
            route = Route(path=f"path of {name}", fused=True, reason="as the test says")
            record.apply(on.RouteFound(case=case, implementation=name, route=route))
            record.apply(on.LayersTimed(case=case, implementation=name, layer_s=0.01, fixed_s=-0.002))
        record.apply(on.CallsCounted(case=case, implementation="poc", replaced=3, passed_on=1))
        if kv_format != "none":
            record.apply(on.CacheMeasured(case=case, kv_token_bytes=12_800, cache_bytes=5 * 2**20))
            error = {"max_error": 0.1, "rms_error": 0.01, "accurate": True, "detail": "logits", "kl_divergence": 0.0025}
            record.apply(on.AccuracyChecked(case=case, implementation="poc", **error))
        times = {name: [speed * each for each in wave] for name, speed in SPEED.items()}
        record.apply(on.RoundsDone(case=case, samples=times, active_bytes=0, peak_bytes=0))
        record.apply(on.CaseDone(case=case, stopped_by="time"))
    return record.report(run_of())


def tuning_report(off: float = 0.0) -> Report:
    work = FineTuning(model="tiny-llama", seq=64, iters=12, layers=4, tuned_layers=4)
    record = record_of(FineTuningPlan(cases=(work,), implementations=("baseline", "poc")))
    record.apply(on.CaseStarted(case=0))
    record.apply(on.ReferenceChosen(case=0, implementation="baseline"))
    for name in ("baseline", "poc", on.REPEATED_REFERENCE):
        for number in range(1, 13):
            loss = 5.0 - 0.25 * number + (off if name == "poc" else 0.0)
            seconds = SPEED[name] * (1 + 0.002 * (number % 5))
            event = on.IterationDone(
                case=0, implementation=name, number=number, loss=loss, seconds=seconds, active_bytes=0, peak_bytes=0
            )
            record.apply(event)
    record.apply(on.CaseDone(case=0, stopped_by="iterations"))
    return record.report(run_of())


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["model", "tinylama-1.1b"], "did you mean 'tinyllama-1.1b'?"),
        (["model", "tiny-llama", "--prompt", "12x"], "--prompt: got '12x'; it takes comma-separated whole numbers"),
        (["model", "tiny-llama", "--layers", "1"], "layers: got 1; it takes a whole number from 2"),
        (["model", "tiny-llama", "--impl", "basline"], "did you mean 'baseline'?"),
        (["model", "tiny-llama", "--kv-format", "int7"], "kv_format: got 'int7'; it takes int8, int6"),
        (["model", "tiny-llama", "--kv-format", "int4"], "do not divide the heads of tiny-llama, which are 32 wide"),
        (["bench", "--kv-format", "int4", "--head-dim", "80"], "head_dim: got 80; int4 takes multiples of"),
        (["bench", "--kv-format", "int4", "--pass", "training"], "kv_format: got int4 in a training pass"),
        (["explain", "--kv-format", "int8+"], "kv_format: got ''; it takes int8"),
        (["finetune", "tiny-llama", "--iters", "1,2"], "--iters: got '1,2'; it takes one whole number"),
        (["finetune", "tiny-llama", "--data", "nowhere.txt"], "data: nowhere.txt cannot be read"),
        (["finetune", "tiny-llama", "--rank", "0"], "rank: got 0"),
        (["model", "tiny-llama", "--prompt", "-1"], "prompt: got -1; it takes a whole number from 2"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_exits_2(arguments, reported, capsys):
    assert main.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert reported in lines[0]


@pytest.mark.parametrize("command", ["model", "finetune"])
def test_without_mlx_lm_it_says_how_to_get_it_and_exits_3(command, monkeypatch, capsys):
    monkeypatch.setattr("attention.mlx_lm.configuration.find_spec", lambda name: None)
    assert main.main([command, "tiny-llama"]) == 3
    assert "pip install 'fatui[models]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["model", "finetune"])
def test_the_help_names_the_models_that_need_no_download(command, capsys):
    assert main.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "tinyllama-1.1b, qwen2.5-1.5b, llama-7b-like, tiny-llama" in text


def test_the_table_marks_estimates_and_attentions_share():
    text = " ".join(shown(generation_report()).split())
    assert "tinyllama-1.1b prefill 128 B=1 bfloat16, estimated from 4 of 22 layers" in text
    assert "60.0 ±" in text, "the baseline's attention takes six tenths of its time"
    assert "2.00 ±" in text
    assert "4 of 22 layers ran; a layer takes: baseline 10.0 ms, poc 10.0 ms" in text
    assert "the rest takes: baseline too little to measure" in text
    assert "poc: 1 of 4 calls went to MLX's own" in text
    assert "tinyllama-1.1b prefill: Use poc · 2.00x baseline" in text


def test_a_quantized_cache_has_its_bytes_and_divergence():
    report = generation_report(kv_format="int4")
    text = " ".join(shown(report).split())
    assert "bfloat16 K/V int4, estimated" in text
    assert "K/V cache 5 MiB after the prompt, 12.5 KiB per token" in text
    line = next(line for line in shown(report).splitlines() if line.startswith("poc"))
    assert "2.5e-3" in line
    row = next(each for each in csv.DictReader(io.StringIO(export.to_csv(report))) if each["implementation"] == "poc")
    assert (row["kl_divergence"], row["cache_bytes"], row["kv_format"]) == ("0.0025", str(5 * 2**20), "int4")
    assert "| KL |" in export.to_markdown(report)
    assert "KL" not in shown(generation_report())


def test_the_table_shows_losses_and_marks_those_that_differ():
    text = " ".join(shown(tuning_report()).split())
    assert "4.750 → 2.000" in text
    assert "█▇▇▆▅▅▄▄▃▂▂▁" in text
    assert "inaccurate" in shown(tuning_report(off=0.5))


def test_every_format_has_the_rows():
    for report, name, column in (
        (generation_report(), "attention_share_value", "attention"),
        (tuning_report(), "iterations_per_second", "it/s"),
    ):
        lines = list(csv.DictReader(io.StringIO(export.to_csv(report))))
        assert {line["implementation"] for line in lines} == {"baseline", "poc"}
        assert all(float(line[name]) > 0 for line in lines)
        assert f"| {column} |" in export.to_markdown(report)
        assert json.loads(export.to_json(report))["models" if column == "attention" else "fine_tunings"]


def test_the_history_keeps_models(tmp_path):
    history = RunHistory(tmp_path / "history.sqlite")
    kept = generation_report()
    history.add(kept)
    (line,) = history.runs()
    assert (line.cases, line.implementations) == (2, ("baseline", "poc"))
    assert line.finding.startswith("tinyllama-1.1b prefill: Use poc · 2.00")
    assert history.get("last") == kept


@pytest.mark.parametrize("now", ["", "compiling what all share"])
def test_ten_seconds_without_a_line_are_the_most(now, monkeypatch, capsys):
    narrator = ProgressPrinter(GenerationPlan(cases=GENERATIONS, implementations=("baseline",)))
    if now:
        narrator.listen(on.Progress(done=0.0, remaining_s=9.0, now=now))
    later = time.monotonic() + MAX_QUIET_S
    monkeypatch.setattr("fatui.cli.run.time.monotonic", lambda: later)
    for _ in range(2):
        narrator.tick(Silence(clock=lambda: 0.0))
    assert capsys.readouterr().err == f"fatui: {now or 'starting the engine'}\n"


def test_the_estimate_is_reported_in_words(capsys):
    narrator = ProgressPrinter(GenerationPlan(cases=GENERATIONS, implementations=("baseline",)))
    narrator.listen(on.CaseTimeEstimated(case=0, seconds=260, implementations=5))
    assert capsys.readouterr().err == "fatui: about 4 min 20 s for 5 implementations\n"


def test_the_estimate_of_a_stream_counts_rows(capsys):
    narrator = ProgressPrinter(stream_plan())
    narrator.listen(on.CaseTimeEstimated(case=0, seconds=40, implementations=2))
    assert capsys.readouterr().err == "fatui: about 40 s for 2 rows\n"


@pytest.mark.slow
def test_what_will_not_fit_is_refused_with_advice():
    done = fatui("model", "tinyllama-1.1b", "--memory-limit", "1GiB", "--impl", "baseline", "--prompt", "16")
    assert done.returncode == 0
    assert " GiB of 1; --layers 8 would fit, and estimate the whole model" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_two_layers_of_tinyllama_take_less_than_two_minutes(tmp_path):
    began = time.monotonic()
    names = ["baseline", "practical", "poc", "demo"]
    options = ["--layers", "2", "--prompt", "128", "--generate", "8", "--impl", ",".join(names)]
    done = fatui("model", "tinyllama-1.1b", *options, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 120
    cases = json.loads(done.stdout)["models"]
    assert [case["workload"]["phase"] for case in cases] == ["prefill", "decode"]
    for case in cases:
        assert [row["implementation"] for row in case["rows"]] == names
        assert all(row["status"] == "ok" and row["tokens_per_second"] > 0 for row in case["rows"])
        assert all(row["replaced_calls"] > 0 and row["layer_s"] > 0 for row in case["rows"])
        assert case["noise_floor"]


@pytest.mark.slow
def test_loss_curves_of_twenty_iterations_agree():
    names = ["baseline", "practical", "poc", "demo"]
    options = ["--iters", "20", "--seq", "128", "--dtype", "float32", "--impl", ",".join(names)]
    done = fatui("finetune", "tiny-llama", *options, "--json", "-")
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["fine_tunings"]
    assert [row["implementation"] for row in case["rows"]] == names
    for row in case["rows"]:
        assert row["status"] == "ok"
        assert len(row["losses"]) == 20
        assert row["losses"][-1] < row["losses"][0] - 1
        assert row["loss_difference"] < 1e-4
        assert row["replaced_calls"] > 0


WAITS = """
import time
from pathlib import Path
from tests.support.planted import Planted

class Waits(Planted):
    def before_call(self):
        Path(__file__).with_name("reached").touch()
        time.sleep(3600)
"""


@pytest.mark.slow
def test_an_interrupted_fine_tuning_keeps_rows_and_exits_130(tmp_path):
    """Interrupted in the second row, whose first call does not return."""
    (tmp_path / "waits.py").write_text(WAITS)
    options = ["--seq", "16", "--batch", "1", "--iters", "3", "--impl", f"baseline,{tmp_path / 'waits.py'}:Waits"]
    command = [sys.executable, "-m", "fatui", "finetune", "tiny-llama", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "reached").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=patient(20))
    assert process.returncode == 130
    assert "interrupted" in error
    assert "it/s" in out
    assert RunHistory().get("last").fine_tunings[0].rows[0].losses


@pytest.mark.slow
@pytest.mark.parametrize("command", ["model", "finetune"])
def test_an_implementation_that_crashes_costs_its_own_row(command):
    names = f"baseline,{ROOT / 'tests' / 'support' / 'planted.py'}:KilledAtOnce,mlx"
    few = (
        ["--prompt", "16", "--seconds", "1"] if command == "model" else ["--seq", "16", "--batch", "1", "--iters", "3"]
    )
    done = fatui(command, "tiny-llama", "--impl", names, *few, "--json", "-")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    rows = (document["models"] or document["fine_tunings"])[0]["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "SIGSEGV" in rows[1]["reason"]
