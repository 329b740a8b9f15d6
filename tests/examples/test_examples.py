"""The examples, in short form."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from fatui.storage import result_files
from tests.support.marks import slow

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """Import an example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_the_sensor_stream_finds_faults_in_constant_memory() -> None:
    sensors = example("sensor_stream")
    seen = sensors.follow(1800, first=64, window=448)
    assert (seen.faults, seen.found, seen.false_alarms) == (1, 1, 0)
    assert seen.error < seen.naive_error / 4
    assert seen.state_bytes == sensors.follow(700, first=64, window=448).state_bytes


def test_products_in_numpy_have_the_gradients_of_mlx() -> None:
    pytest.importorskip("mlx_lm")
    product = example("tiny_model").product
    x, weight, up = (
        mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate([(2, 3, 4), (5, 4), (2, 3, 5)])
    )
    own = mx.vjp(product, [x, weight], [up])
    theirs = mx.vjp(lambda a, b: a @ b.T, [x, weight], [up])
    for made, expected in zip([*own[0], *own[1]], [*theirs[0], *theirs[1]], strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def test_a_training_sequence_follows_its_marker() -> None:
    pytest.importorskip("mlx_lm")
    tiny = example("tiny_model")
    inputs, targets = next(tiny.batches(b"0123456789" * 10, 8, 3, seed=0))
    assert inputs.shape == targets.shape == (3, 8)
    assert set(inputs[:, 0].tolist()) == {tiny.BEGIN}
    assert inputs[:, 1:].tolist() == targets[:, :-1].tolist()


@pytest.mark.slow
def test_a_trained_model_chats_without_an_end(tmp_path: Path) -> None:
    tiny, chatting = example("tiny_model"), example("endless_chat")
    from mlx_lm.models import llama

    fields = tiny.configuration(context=32, layers=2, width=64)
    model = llama.Model(llama.ModelArgs.from_dict(fields))
    settings = argparse.Namespace(context=32, batch=4, steps=3, seconds=60.0, rate=1e-3, decay=0.01, seed=0)
    with tiny.products_in_numpy():
        tiny.train(model, tiny.text()[:10_000], settings)
    tiny.write(model, fields, b"held out", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == tiny.VOCABULARY
    turns = chatting.chat(tmp_path, first=2, window=24, turns=6, most=10)
    assert len(turns) == 6
    assert turns[-1].position > 60
    assert turns[-1].cache_bytes == turns[1].cache_bytes


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "mine"),
    [
        ("bench_lambda", "mine"),
        slow("bench_function", "fused"),
        slow("bench_decorator", "kernel"),
        slow("bench_async", "poc"),
    ],
)
def test_an_example_of_bench_prints_its_rows(name: str, mine: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "B=1" in line]
    assert any("baseline" in line for line in lines)
    assert any(mine in line for line in lines)
    assert not any(word in done.stdout for word in ("failed", "unsupported", "inaccurate"))
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 25
    if name == "bench_lambda":
        assert result_files.read(tmp_path / "mine.json").cases
