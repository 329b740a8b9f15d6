"""Shorter headers, from which the kernel compiles sooner: what they hold, and what follows if they are refused."""

import subprocess
from dataclasses import replace

import pytest

from attention.core.errors import KernelUnavailable
from attention.kernels.cpu import build
from tests.support.patience import patient

PRIMITIVES = """#include "mlx/array.h"
namespace mlx::core {
class MLX_API Primitive {
  virtual void eval_cpu() = 0;
};

class UnaryPrimitive : public Primitive {
};
class Abs : public UnaryPrimitive {};
} // namespace mlx::core
"""


@pytest.fixture
def mlx(tmp_path):
    """A folder of MLX's headers; the base class ends where the class of operations on one array begins."""

    def made(text: str):
        (tmp_path / "include" / "mlx").mkdir(parents=True)
        (tmp_path / "include" / "mlx" / "primitives.h").write_text(text)
        return tmp_path

    return made


@pytest.mark.parametrize("export", ["", " MLX_API"])
def test_of_primitives_the_base_class_is_left(mlx, export):
    short = build.short_headers(mlx(PRIMITIVES.replace("class Unary", f"class{export} Unary")) / "include")[
        "mlx/primitives.h"
    ]
    assert short.startswith(PRIMITIVES[: PRIMITIVES.index("\n\nclass")])
    assert short.endswith("};\n\n}\n") and "Unary" not in short


def test_primitives_that_are_not_known_stay_whole(mlx):
    assert "mlx/primitives.h" not in build.short_headers(mlx("class Other {};\n") / "include")


@pytest.fixture
def commands(monkeypatch):
    """Compilers' commands, of which those with an option are refused."""
    given: list[tuple[str, ...]] = []
    refused: list[str] = []

    def run(command):
        given.append(command)
        if any(option in command for option in refused):
            raise KernelUnavailable(f"compiling failed: error {len(given)}")

    monkeypatch.setattr(build, "run", run)
    return given, refused


def test_a_source_of_the_module_is_compiled_with_short_headers(mlx, commands, tmp_path):
    given, _ = commands
    build._run_shortened(("c++",), True, replace(build.find(), mlx=mlx(PRIMITIVES)), tmp_path / "short")
    assert given == [("c++", "-I", str(tmp_path / "short"))]
    assert (tmp_path / "short" / "mlx" / "primitives.h").exists()


def test_other_sources_find_the_headers_as_they_are(commands, tmp_path):
    given, _ = commands
    build._run_shortened(("c++",), False, build.find(), tmp_path / "short")
    assert given == [("c++",)] and not (tmp_path / "short").exists()


def test_refused_headers_are_replaced_by_whole_ones(mlx, commands, tmp_path):
    given, refused = commands
    refused.append("-I")
    build._run_shortened(("c++",), True, replace(build.find(), mlx=mlx(PRIMITIVES)), tmp_path / "short")
    assert given[1:] == [("c++", build._WHOLE)]


def test_a_mistake_in_the_sources_is_named(mlx, commands, tmp_path):
    _, refused = commands
    refused.append("c++")
    with pytest.raises(KernelUnavailable, match="error 2"):
        build._run_shortened(("c++",), False, build.find(), tmp_path)


GCC_OF_X86 = "#if !defined(__GNUC__) || defined(__clang__) || !defined(__x86_64__)\n#error\n#endif\n"
USED = "__m256 f(__m256 a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_fmadd_ps(a, a, a), 0)); }"


def preprocessed(text: str) -> str:
    command = (*build._kernel_command(build.find()), "-march=haswell", "-x", "c++", f"-I{build.SOURCES}", "-")
    subprocess.run(
        [*command, "-fsyntax-only"], input=text, check=True, text=True, timeout=patient(60), capture_output=True
    )
    return subprocess.run(
        [*command, "-E"], input=text, check=True, text=True, timeout=patient(60), capture_output=True
    ).stdout


def test_of_the_intrinsics_those_of_avx2_are_read():
    try:
        preprocessed(GCC_OF_X86)
    except subprocess.CalledProcessError:
        pytest.skip("the compiler is not GCC for x86")
    assert "_mm512_" not in preprocessed(f'#include "intrinsics.hpp"\n{USED}')
    assert "_mm512_" in preprocessed(f'#define FATUI_WHOLE_HEADERS\n#include "intrinsics.hpp"\n{USED}')


@pytest.mark.slow
@pytest.mark.parametrize("name", ["module", "caches", "forward_float16"])
def test_short_headers_are_accepted(monkeypatch, tmp_path, name):
    """Otherwise each is compiled twice, which nobody would notice but by the time."""
    monkeypatch.setattr(build, "_WHOLE", "-fno-such-option")
    tools, of_module = build.find(), name != "forward_float16"
    command = build._binding_command(tools) if of_module else build._kernel_command(tools)
    text = str(build.SOURCES / f"{name}.cpp")
    build._run_shortened((*command, "-fsyntax-only", text), of_module, tools, tmp_path)
