"""Several kernels launched as one operation: the launcher's arguments, and the fallback without it; needs no GPU."""

import errno
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

mx = pytest.importorskip("mlx.core")

from attention.core.errors import KernelUnavailable
from attention.kernels import cuda
from attention.kernels.cpu import build
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.launch import (
    MAP,
    NOTHING,
    NUMBER,
    POINTER,
    SERIAL,
    STRIDE,
    Stage,
    TensorBox,
    make_plan,
    prepare,
)
from attention.kernels.cuda.runtime.program import Program
from benchmarks.cuda import sanitize


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    forget()
    yield
    forget()


def forget():
    launcher.module.cache_clear()
    launcher._module.cache_clear()
    launcher.unavailable_reason.cache_clear()


class Recorder:
    """A fake of the compiled module, which records its calls."""

    def make_plan(self, steps, inputs, shapes, types, constants, label, untraced):
        self.arguments = [step[-1] for step in steps]
        self.reads, self.writes = [step[-3] for step in steps], [step[-2] for step in steps]
        self.blocks = [step[2] for step in steps]
        self.shapes, self.types, self.constants, self.label = shapes, types, constants, label


@pytest.fixture
def reported(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("attention.kernels.cuda.runtime.launch.launcher", SimpleNamespace(module=lambda: recorder))
    monkeypatch.setattr("attention.kernels.cuda.runtime.launch.machine_code", lambda program: b"code")
    monkeypatch.setattr(Program, "entry", "entry")
    table = mx.array([1, 2])
    first = prepare(Program("a", "sm_90a", (), (), 128, 64), 5, [((2, 3), mx.float32)], [7, 8], (table,))
    second = prepare(Program("b", "sm_90a", (), (), 32, 0), 9, [((4,), mx.bfloat16), ((1,), mx.uint8)], [])
    third = prepare(Program("c", "sm_90a", (), (), 32, 0), 1, [((1,), mx.uint8), ((5,), mx.uint8)], [])
    stages = [
        Stage(first, ("x", "y"), ("sums",)),
        Stage(second, ("y", "sums"), ("out", "more"), frozenset({"sums"})),
        Stage(
            third,
            ("x", "y"),
            ("last", "unwanted"),
            maps={"x": TensorBox(64)},
            strided=("y",),
            omitted={"unwanted"},
            serial=True,
        ),
    ]
    make_plan(("x", "y"), ("out",), stages, "label")
    return recorder


X, Y, CONSTANT, OUT, SUMS, MORE, LAST = range(7)


def test_arguments_are_inputs_constants_outputs_numbers(reported):
    addresses = [[POINTER, X], [POINTER, Y], [POINTER, CONSTANT], [POINTER, SUMS]]
    assert reported.arguments[0] == [*addresses, [NUMBER, 7], [NUMBER, 8]]
    assert reported.arguments[1] == [[POINTER, Y], [POINTER, SUMS], [POINTER, OUT], [POINTER, MORE]]


def test_arrays_are_passed_as_maps_with_strides_or_not_at_all(reported):
    map_of_x = [MAP, X, 64, 64, 128]
    strides = [[STRIDE, Y, axis] for axis in range(3)]
    assert reported.arguments[2] == [map_of_x, [POINTER, Y], [POINTER, LAST], [NOTHING], *strides, [SERIAL]]


def test_what_is_changed_in_place_counts_as_written(reported):
    assert reported.reads == [[X, Y], [Y], [X, Y]]
    assert reported.writes == [[SUMS], [SUMS, OUT, MORE], [LAST]]


def test_wanted_outputs_come_first_with_shapes_and_types(reported):
    assert reported.shapes == [[4], [2, 3], [1], [1]]
    assert reported.types == [mx.bfloat16, mx.float32, mx.uint8, mx.uint8]


def test_blocks_are_those_of_each_launch(reported):
    assert reported.blocks == [5, 9, 1]


def test_without_a_compiler_nothing_is_compiled_and_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert launcher.known_obstacle() == "no C++ compiler found (no-such-compiler)"
    assert launcher.unavailable_reason() == launcher.known_obstacle()
    assert launcher.is_settled()


def test_a_compilation_that_fails_is_not_tried_again(monkeypatch):
    def fail(command):
        raise KernelUnavailable("compiling failed: planted")

    monkeypatch.setattr(build, "run", fail)
    assert not launcher.is_settled()
    assert launcher.unavailable_reason() == "compiling failed: planted"
    forget()
    monkeypatch.setattr(build, "run", lambda command: pytest.fail("compiled again"))
    assert launcher.unavailable_reason() == launcher.known_obstacle() == "compiling failed: planted"


def test_a_day_later_it_is_tried_again(monkeypatch):
    def fail(command):
        raise KernelUnavailable("compiling failed: killed")

    monkeypatch.setattr(build, "run", fail)
    assert launcher.unavailable_reason() == launcher.known_obstacle() == "compiling failed: killed"
    forget()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86401)
    assert launcher.known_obstacle() is None
    assert not launcher.is_settled()


def test_a_full_disk_is_a_reason(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert "No space left" in (launcher.unavailable_reason() or "")
    assert launcher.known_obstacle() is None  # it may pass


@pytest.mark.slow
@pytest.mark.skipif(cuda.availability()[0], reason="this MLX computes on CUDA")
def test_without_mlx_cuda_it_compiles_and_says_it_cannot_load():
    assert "does not load" in (launcher.unavailable_reason() or "")
    assert "does not load" in (launcher.known_obstacle() or "")


def test_the_sanitizers_need_a_gpu_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "availability", lambda: (False, "there is no NVIDIA driver"))
    assert sanitize.main() == 3
    assert capsys.readouterr().err == "there is no NVIDIA driver\n"


def test_threads_that_need_it_first_share_one_module(monkeypatch):
    both, made = threading.Barrier(2), []

    def loaded(*_):
        time.sleep(0.02)
        made.append(SimpleNamespace())
        return made[-1]

    def use():
        both.wait()
        return launcher.module()

    monkeypatch.setattr(launcher, "_loaded", loaded)
    monkeypatch.setattr(build, "find", lambda: None)
    monkeypatch.setattr(launcher, "_key", lambda tools: "key")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(use), pool.submit(use)
        assert first.result() is second.result() is made[0]
    assert len(made) == 1
