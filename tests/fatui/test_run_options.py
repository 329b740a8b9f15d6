"""The options of a run in its four places: plan, preset, draft and command line."""

import argparse

import msgspec
import pytest

from attention.core.errors import UsageError
from attention.core.plan import MAX_CASES, RunOptions
from attention.measure import device
from fatui.cli import model
from fatui.cli.options import print_dtype_reason
from fatui.draft import DEFAULT_AXES, Draft, draft_of
from fatui.reproduce import model_command
from fatui.storage.presets import Preset, parse, to_toml
from fatui.storage.settings import SavedState

KEPT = b"""{"draft": {"axes": {"batch": [2], "seq": [512], "head_dim": [64], "heads": [8], "kv_heads": []},
 "implementations": ["baseline"], "seconds": 2.5, "precision": 0.02, "memory_limit_bytes": 5, "force": true,
 "seed": 3, "blas": "numpy", "hosts": ["a", "b:4000"], "hostfile": "hosts.json", "a_later_field": 1}}"""
OPTIONS = {
    "implementations": ("baseline",),
    "seconds": 2.5,
    "precision": 0.02,
    "memory_limit_bytes": 5,
    "seed": 3,
    "blas": "numpy",
    "hosts": ("a", "b:4000"),
    "hostfile": "hosts.json",
}


def test_a_state_of_another_version_keeps_its_options():
    draft = msgspec.json.decode(KEPT, type=SavedState).draft
    assert draft.plan().options() == {**OPTIONS, "force": True}


def test_options_survive_preset_and_draft():
    cases = Draft().workloads()
    preset = Preset(name="x", cases=cases, **OPTIONS)
    plan = draft_of(preset.plan(), "x").plan()
    assert plan.options() == preset.options() == {**OPTIONS, "force": False}


def sweep(count):
    return Draft(axes={**DEFAULT_AXES, "seq": tuple(range(1, count + 1))})


def test_the_app_sweeps_as_many_cases_as_a_preset():
    lengths = list(range(1, MAX_CASES + 1))
    assert len(parse(f"schema = 1\n[sweep]\nseq = {lengths}\n", None).cases) == MAX_CASES
    assert len(sweep(MAX_CASES).workloads()) == MAX_CASES
    with pytest.raises(UsageError, match="1,001 cases; a sweep takes 1,000 at most"):
        sweep(MAX_CASES + 1).workloads()


def request(*words):
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    return model.request(parser.parse_args(["tiny-llama", *words]))[0]


def test_a_models_run_has_its_own_defaults():
    assert request().seconds != RunOptions().seconds
    assert "mlx" in request().implementations


def test_models_multiply_by_numpys_blas_unless_it_is_named():
    assert (request().blas, request("--blas", "mlx").blas) == ("numpy", "mlx")
    with pytest.raises(UsageError, match="--blas: got 'mkl'; it takes mlx or numpy"):
        request("--blas", "mkl")
    assert "--blas mlx" in model_command(request("--blas", "mlx"))
    assert "--blas" not in model_command(request())


def test_models_run_in_float32_on_a_cpu_and_the_reason_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(device, "computes_on_cpu", lambda: True)
    assert request().cases[0].dtype == "float32"
    print_dtype_reason(None)
    assert "16-bit matrices" in capsys.readouterr().err
    assert request("--dtype", "bfloat16").cases[0].dtype == "bfloat16"
    print_dtype_reason("bfloat16")
    monkeypatch.setattr(device, "computes_on_cpu", lambda: False)
    assert request().cases[0].dtype == "bfloat16"
    print_dtype_reason(None)
    assert not capsys.readouterr().err


def test_a_presets_blas_is_read_written_and_checked():
    shortest = "schema = 1\n{}\n[workload]\nseq = 8\n"
    preset = parse(shortest.format('blas = "numpy"'), None)
    assert preset.plan().blas == parse(to_toml(preset), None).blas == "numpy"
    with pytest.raises(UsageError, match="blas: got 3; it takes mlx or numpy"):
        parse(shortest.format("blas = 3"), None)


def test_names_of_impl_may_have_blanks_for_models_too():
    assert request("--impl", "baseline, mlx", "--seconds", "2").implementations == ("baseline", "mlx")
