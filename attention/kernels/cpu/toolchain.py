"""What compiling the kernel needs, and whether this machine has it: compiler, headers, one ABI, processor."""

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from attention.device import processor_name
from attention.errors import KernelUnavailable

_MODEL = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part", "CPU revision")
"""Fields of /proc/cpuinfo: the first four on x86, the others on ARM."""


@dataclass(frozen=True)
class Toolchain:
    """Where everything is that the compilation reads."""

    compiler: tuple[str, ...]
    python_include: Path
    nanobind: Path
    mlx: Path

    @property
    def mlx_module(self) -> Path:
        """MLX's compiled Python module, mlx.core."""
        return next(self.mlx.glob("core.*.so"))


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _compiler() -> tuple[str, ...]:
    wished = os.environ.get("CXX")
    for command in [wished] if wished else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        found = shutil.which(words[0]) if words else None
        if found:
            return (found, *words[1:])
    raise KernelUnavailable(f"no C++ compiler found ({wished or 'c++, g++ or clang++'})")


def find() -> Toolchain:
    """Find compiler, headers and packages.

    Raises:
        KernelUnavailable: naming the first thing that is missing.
    """
    if sys.platform not in ("linux", "darwin"):
        raise KernelUnavailable(f"the kernel is built on Linux and macOS only, not on {sys.platform}")
    mlx = _package_folder("mlx")
    if mlx is None or next(mlx.glob("core.*.so"), None) is None:
        raise KernelUnavailable("MLX is not installed")
    if not (mlx / "include" / "mlx" / "primitives.h").exists():
        raise KernelUnavailable("this MLX ships no C++ headers")
    nanobind = _package_folder("nanobind")
    if nanobind is None:
        raise KernelUnavailable("nanobind is not installed (pip install nanobind)")
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise KernelUnavailable(f"no Python.h in {include} (install the Python development headers)")
    return Toolchain(_compiler(), include, nanobind, mlx)


def _abi_tag(module: Path) -> str:
    """Nanobind's mark in a compiled module: platform, C++ library and the number of its internals."""
    found = re.search(rb"nanobind_[a-z0-9_]+_v[0-9]+[a-z0-9_]*", module.read_bytes())
    return found[0].decode() if found else "unknown"


def check_abi(tools: Toolchain, module: Path | None = None) -> None:
    """Compare nanobind's ABI with the one that MLX was built with: types are shared only if they agree.

    Args:
        tools: where nanobind and MLX are.
        module: a module already built, whose whole mark must be MLX's; without one only the numbers are compared.

    Raises:
        KernelUnavailable: with both, if they differ.
    """
    theirs = _abi_tag(tools.mlx_module)
    if module is not None:
        ours, same = _abi_tag(module), _abi_tag(module) == theirs
    else:
        header = (tools.nanobind / "src" / "nb_internals.h").read_text()
        number = re.search(r"define NB_INTERNALS_VERSION (\d+)", header)
        ours = f"v{number[1]}" if number else "unknown"
        same = bool(re.search(rf"_{ours}(?![0-9])", theirs))
    if not same:
        raise KernelUnavailable(f"nanobind's ABI is {ours}, MLX was built with {theirs}")


@functools.cache
def _first_processor() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def cpu_features() -> frozenset[str]:
    """The processor's instruction sets, in Linux's names; of an ARM processor just `neon`."""
    if platform.machine() in ("arm64", "aarch64"):
        return frozenset({"neon"})
    return frozenset(_first_processor().get("flags", "").split())


@functools.cache
def cpu_name() -> str:
    """The processor's model, down to what its maker revises."""
    fields = _first_processor()
    return " ".join(fields[name] for name in _MODEL if name in fields) or processor_name()


def cpu_mark() -> str:
    """What code for this machine depends on: model, and instruction sets, of which a virtual machine may hide some."""
    fields = _first_processor()
    return f"{cpu_name()} {fields.get('flags') or fields.get('Features', '')}"


def variant() -> str:
    """Which of the kernel's texts this processor gets: amx, avx512_bf16, avx512, avx2, neon or plain."""
    features = cpu_features()
    for name, needed in (
        ("amx", {"amx_bf16", "avx512_bf16"}),
        ("avx512_bf16", {"avx512_bf16"}),
        ("avx512", {"avx512f"}),
        ("avx2", {"avx2"}),
        ("neon", {"neon"}),
    ):
        if needed <= features:
            return name
    return "plain"
