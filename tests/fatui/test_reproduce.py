import shlex

import pytest
from msgspec import structs

from attention.core.errors import UsageError
from attention.core.plan import GenerationPlan, Plan
from attention.core.workload import Workload, generations
from fatui.cli import bench
from fatui.cli.main import Parser
from fatui.reproduce import RunIdentity, bench_command, command_for, model_command
from fatui.storage import presets

NAMES = ("baseline", "poc")


def plan_from(command: str) -> Plan:
    """Return the plan of a command line."""
    words = shlex.split(command)
    assert words[:2] == ["fatui", "bench"]
    parser = Parser(prog="fatui bench", allow_abbrev=False)
    bench.add_arguments(parser)
    return bench.request(parser.parse_all(words[2:]))[0]


@pytest.mark.parametrize(
    "cases",
    [
        (Workload(seq=64),),
        (Workload(seq=64, kv_seq=256, heads=8, kv_heads=2, value_dim=32, mask="window:16", dtype="float32"),),
        (Workload(seq=64, pass_="decode"),),
        (Workload(seq=64, pass_="training"), Workload(seq=128, pass_="training")),
        tuple(Workload(batch=batch, seq=seq) for batch in (1, 2) for seq in (64, 128)),
        tuple(Workload(kv_format=each) for each in ("none", "int4", "int8:32+mxfp4")),
        tuple(Workload(mask=mask) for mask in ("strided:8,2", "prefix:4+strided:9,3", "blocks:0.5", "causal")),
    ],
)
def test_the_command_of_a_plan_makes_that_plan_again(cases):
    plan = Plan(cases=cases, implementations=NAMES, seconds=2.5, memory_limit_bytes=3 * 2**30, force=True)
    assert plan_from(command_for(plan)) == plan


def test_a_preset_in_a_file_is_named_by_the_file(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(presets.to_toml(presets.load("scaling")))
    monkeypatch.chdir(tmp_path)
    preset = presets.load("mine.toml")
    command = command_for(preset.plan(), preset)
    monkeypatch.chdir("/")
    assert plan_from(command) == preset.plan()
    own = presets.load(presets.save(preset, "kept"))
    assert command_for(own.plan(), own) == "fatui bench kept"


def test_a_preset_is_named_with_what_differs_from_it():
    preset = presets.load("scaling")
    assert command_for(preset.plan(), preset) == "fatui bench scaling"
    plan = structs.replace(preset.plan(), implementations=NAMES, seconds=1.0)
    assert command_for(plan, preset) == "fatui bench scaling --impl baseline,poc --seconds 1"
    assert plan_from(command_for(plan, preset)) == plan


def test_unquantized_keys_and_values_are_no_option():
    plan = Plan(cases=(Workload(seq=64), Workload(seq=128)), implementations=NAMES)
    assert "kv-format" not in command_for(plan)


def test_the_command_of_a_model_names_its_formats():
    cases = generations(4, model="tiny-llama", prompts=[8], batches=[1], kv_formats=["none", "int8:32"])
    assert "--kv-format none,int8:32" in model_command(GenerationPlan(cases=cases))
    assert "--kv-format" not in model_command(GenerationPlan(cases=cases[:1]))


def test_cases_that_are_no_sweep_need_a_preset():
    plan = Plan(cases=(Workload(seq=64), Workload(seq=128, batch=2)), implementations=NAMES)
    with pytest.raises(UsageError, match="save"):
        command_for(plan)


def test_odd_names_are_quoted():
    command = bench_command("my preset.toml", {"seq": [1]}, {"impl": "a b.py:C", "force": False})
    assert command == "fatui bench 'my preset.toml' --seq 1 --impl 'a b.py:C'"


def test_two_runs_have_two_names():
    assert RunIdentity("c", None).run().id != RunIdentity("c", None).run().id
