"""The cache key of a compiled CPU kernel: its source, flags and tools, and the exact processor."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from attention.kernels import cpu
from attention.kernels.cpu import build

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


def test_another_nanobind_in_the_same_place_is_compiled_anew(places, tmp_path):
    tools = build.find()
    moved = replace(tools, nanobind=tmp_path)
    header = tmp_path / "src" / "nb_internals.h"
    header.parent.mkdir()
    header.write_text("one")
    before = places(X86.format(""), tools=moved)
    header.write_text("another")
    assert not set(before) & set(places(X86.format(""), tools=moved))


def test_the_processor_gets_its_own_text(monkeypatch):
    for features, name in (
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "amx"),
        ({"avx2", "avx512f", "avx512_bf16"}, "avx512_bf16"),
        ({"avx2", "avx512f"}, "avx512"),
        ({"avx2"}, "avx2"),
        ({"neon"}, "neon"),
        (set(), "plain"),
    ):
        monkeypatch.setattr(build, "cpu_features", lambda features=features: frozenset(features))
        assert cpu.variant() == name
