"""The cache key of a compiled CPU kernel: its source, flags and tools, and the exact processor."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attention.core.route import NO_NEEDS
from attention.core.workload import Workload
from attention.kernels import cpu
from attention.kernels.common import cache
from attention.kernels.cpu import build, library, path
from attention.measure import device

pytestmark = pytest.mark.usefixtures("compiled_kernel")


def test_the_key_changes_with_the_flags(monkeypatch):
    tools = build.find()
    before = build.key(tools)
    monkeypatch.setenv("FATUI_KERNEL_CXXFLAGS", "-DANYTHING")
    assert build.key(tools) != before


def test_an_object_changes_with_the_sources_that_it_includes(monkeypatch, tmp_path):
    shutil.copytree(build.SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpu")
    tools, text = build.find(), build.SOURCES / "shared.cpp"
    before = build._object_name((), text, tools)
    (tmp_path / "cpu" / "pool.cpp").write_text("// another")
    assert build._object_name((), text, tools) != before


X86 = "model name\t: Some CPU\nstepping\t: 1\nflags\t\t: fpu avx2{}\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd{}\nCPU implementer\t: 0x41\nCPU part\t: {}\n\nprocessor\t: 1\n"


@pytest.fixture
def places(monkeypatch):
    """Return the paths of the library and its first object for a processor, given its description by Linux."""
    read = Path.read_text
    cached = [known for known in vars(build).values() if hasattr(known, "cache_clear")]

    def found(cpuinfo: str, machine: str = "x86_64", tools: build.Toolchain | None = None) -> tuple[str, str]:
        for known in cached:
            known.cache_clear()
        monkeypatch.setattr(build.platform, "machine", lambda: machine)
        monkeypatch.setattr(
            Path, "read_text", lambda path, *a, **k: cpuinfo if str(path) == "/proc/cpuinfo" else read(path, *a, **k)
        )
        tools = tools or build.find()
        return build.key(tools), build._object_name((), build.SOURCES / "forward.cpp", tools)

    yield found
    monkeypatch.undo()
    for known in cached:
        known.cache_clear()


def test_hidden_instructions_make_another_processor(places):
    assert not set(places(X86.format(""))) & set(places(X86.format(" amx_bf16")))


def test_arm_processors_differ_by_part_and_by_features(places):
    one, other, more = (places(ARM.format(*x), "aarch64") for x in (("", "0xd0c"), ("", "0xd40"), (" sve", "0xd0c")))
    assert not set(one) & set(other)
    assert not set(one) & set(more)


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t: 17\n", "AMD EPYC (family 25, model 17)"),
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t: 1\n", "AMD EPYC (family 25, model 1)"),
        ("model name\t: AMD EPYC 7763\ncpu family\t: 25\nmodel\t: 1\n", "AMD EPYC 7763"),
        ("model name\t: AMD EPYC 9R14\ncpu family\t: 25\nmodel\t: 17\n", "AMD EPYC 9R14"),
        (
            "model name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\ncpu family\t: 6\nmodel\t: 79\n",
            "Intel(R) Xeon(R) CPU @ 2.20GHz (family 6, model 79)",
        ),
        (ARM.format("", "0xd40"), "aarch64 (implementer 0x41, part 0xd40)"),
        ("", "aarch64"),
    ],
)
def test_processors_of_one_name_are_told_apart(places, monkeypatch, cpuinfo, name):
    """A virtual machine may hide the product; what is measured on one is not another's."""
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.platform, "processor", lambda: "")
    places(cpuinfo, "aarch64")
    assert device.processor_name() == name


def test_another_nanobind_in_the_same_place_is_compiled_anew(places, tmp_path):
    tools = build.find()
    moved = replace(tools, nanobind=tmp_path)
    header = tmp_path / "src" / "nb_internals.h"
    header.parent.mkdir()
    header.write_text("one")
    before = places(X86.format(""), tools=moved)
    header.write_text("another")
    assert not set(before) & set(places(X86.format(""), tools=moved))


@pytest.mark.sampled(0.3)
@pytest.mark.skipif(build.platform.machine() != "x86_64", reason="these are x86's")
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("-march=x86-64", "plain"),
        ("-march=znver3", "avx2"),
        ("-march=skylake-avx512", "avx512"),
        ("-march=cooperlake", "avx512_bf16"),
        ("-march=cooperlake -mamx-tile -mamx-bf16", "amx"),
    ],
)
def test_flags_decide_which_text_is_compiled(fresh, monkeypatch, flags, name):
    monkeypatch.setenv("FATUI_KERNEL_CXXFLAGS", flags)
    assert cpu.availability() == (True, f"compiles at first use ({name})")
    assert path.route(Workload(dtype="float32"), NO_NEEDS).path == f"CPU kernel {name}"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FATUI_KERNEL_CXXFLAGS", "-fno-such-option", "no-such-option"),
        ("FATUI_KERNEL_CXXFLAGS", "'", r"\$FATUI_KERNEL_CXXFLAGS is no list of words: No closing quotation"),
        ("CXX", "'", r"\$CXX is no list of words: No closing quotation"),
        ("CXX", "true", "true is no C\\+\\+ compiler"),
        ("CXX", "false", "compiling failed: exit status 1"),
    ],
)
def test_no_path_is_named_for_a_compiler_that_cannot_make_it(fresh, monkeypatch, variable, value, reason):
    monkeypatch.setenv(variable, value)
    usable, why = cpu.availability()
    assert not usable
    assert re.search(reason, why)
    assert not path.route(Workload(dtype="float32"), NO_NEEDS).supported


@pytest.mark.thorough
def test_a_library_says_what_it_runs(own_folder, monkeypatch):
    requested = cpu.variant()
    assert requested in build.VARIANTS
    cpu.load()
    assert cpu.variant() == requested


@pytest.mark.thorough
def test_later_processes_read_what_a_library_is_compiled_for(own_folder, monkeypatch):
    cpu.load(parts={"float32"})
    name = cpu.variant()
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(build, "compiled_for", lambda tools: pytest.fail("a compiler was started"))
    assert cpu.variant() == name
    key = build.key_with(build.key(build.find()), frozenset({"float32"}))
    monkeypatch.setattr(build, "compiled_for", lambda tools: "plain")
    for hostile in ("\x1b[31mamx", ""):
        cache.write_record(key, {**cache.read_record(key), "variant": hostile})
        assert cpu.variant() == "plain"


@pytest.mark.thorough
def test_a_refused_matrix_unit_is_not_named():
    code = "from attention.kernels import cpu; print(cpu.variant()); cpu.load(); print(cpu.variant())"
    environment = {**os.environ, "FATUI_AMX": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, loaded = found.stdout.split()
    assert before == loaded != "amx"


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="flags of x86")
@pytest.mark.parametrize("pairs", [True, False])
def test_the_matrix_unit_is_used_where_its_name_is(pairs):
    flags = ("-march=skylake-avx512", "-mamx-tile", "-mamx-bf16", *(("-mavx512bf16",) if pairs else ()))
    command = (*build.compiler(), "-std=c++20", *flags, "-E", "-dM", str(build.SOURCES / "variant.cpp"))
    requested = subprocess.run(command, capture_output=True, text=True, check=False)
    if requested.returncode != 0:
        pytest.skip("the compiler has no AMX")
    assert ("#define FATUI_MATRIX_TILES" in requested.stdout) == pairs
