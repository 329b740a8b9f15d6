"""The toolchain for compiling the kernel: compiler, headers, a matching ABI, processor."""

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
    """Paths of everything that a compilation reads."""

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
        KernelUnavailable: names the first missing one.
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
    """Return nanobind's ABI tag of a compiled module: platform, C++ library and the version of its internals."""
    found = re.search(rb"nanobind_[a-z0-9_]+_v[0-9]+[a-z0-9_]*", module.read_bytes())
    return found[0].decode() if found else "unknown"


def check_abi(tools: Toolchain, module: Path | None = None) -> None:
    """Compare nanobind's ABI with that of MLX's build: types are shared only if they agree.

    Args:
        tools: paths of nanobind and MLX.
        module: a compiled module, whose whole tag must equal MLX's; without it only the versions are compared.

    Raises:
        KernelUnavailable: they differ; the message has both.
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
    """Return the first processor's entry of /proc/cpuinfo; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def cpu_features() -> frozenset[str]:
    """Return the processor's instruction sets by Linux's names; on ARM just `neon`."""
    if platform.machine() in ("arm64", "aarch64"):
        return frozenset({"neon"})
    return frozenset(_first_processor().get("flags", "").split())


@functools.cache
def cpu_name() -> str:
    """Return the processor's model, down to the stepping."""
    fields = _first_processor()
    return " ".join(fields[name] for name in _MODEL if name in fields) or processor_name()


def cpu_mark() -> str:
    """Return what machine code depends on: the model, and the instruction sets (a virtual machine may hide some)."""
    fields = _first_processor()
    return f"{cpu_name()} {fields.get('flags') or fields.get('Features', '')}"


def variant() -> str:
    """Return the source variant for this processor: amx, avx512_bf16, avx512, avx2, neon or plain."""
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
