"""Kernel programs: source, constants and options, compiled to machine code on first use and cached on disk."""

import ctypes
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache

MIN_VERSION = (12, 5)
"""Oldest version tested: it was required by tensor maps built in a kernel. Now the host builds them, but older versions
have not been tested."""


class CompileError(KernelUnavailable):
    """Compilation error; the message is NVRTC's log."""


def find() -> str:
    """Load NVRTC (from the system, MLX's CUDA build or PyTorch) and return its name and version.

    Raises:
        KernelUnavailable: NVRTC is missing or too old.
    """
    _library()
    found = "{}.{}".format(*version())
    if version() < MIN_VERSION:
        raise KernelUnavailable("NVRTC {}.{} or later is needed, not {}".format(*MIN_VERSION, found))
    return f"NVRTC {found}"


@functools.cache
def version() -> tuple[int, int]:
    """Return the major and minor version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library(), _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def targets() -> tuple[int, ...]:
    """Return the architectures that NVRTC supports, as numbers: 90 is sm_90."""
    count = ctypes.c_int()
    _check(_library(), _library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    made = (ctypes.c_int * count.value)()
    _check(_library(), _library().nvrtcGetSupportedArchs(made))
    return tuple(sorted(made))


def target_for(architecture: str) -> str:
    """Return the target for a GPU's architecture ("sm_86"): itself, or the nearest lower one of its family.

    If NVRTC supports no architecture of the family (a GPU newer than NVRTC), the target is a virtual architecture
    ("compute_120"), whose PTX the driver compiles.

    Raises:
        KernelUnavailable: every architecture that NVRTC supports is newer than this GPU.
    """
    number = int(architecture.removeprefix("sm_").rstrip("abcdef"))
    if number in targets():
        return architecture
    lower = [known for known in targets() if known < number]
    if not lower:
        raise KernelUnavailable(f"NVRTC {version()[0]}.{version()[1]} compiles for no GPU as old as {architecture}")
    return f"{'sm' if lower[-1] // 10 == number // 10 else 'compute'}_{lower[-1]}"


def compile_program(source: str, options: Sequence[str]) -> bytes:
    """Compile a program whose kernels are `extern "C"`; return its cubin, or PTX for a virtual architecture.

    Raises:
        CompileError: compilation failed; the message is NVRTC's log.
        KernelUnavailable: NVRTC is missing or too old.
    """
    return build(source, options)[0]


def build(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compile a program; return its code and NVRTC's log ("--ptxas-options=-v" adds registers and spills to it).

    Raises:
        CompileError: compilation failed; the message is NVRTC's log.
        KernelUnavailable: NVRTC is missing or too old.
    """
    find()
    nvrtc = _library()
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"flash.cu", 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), words)
        log = _text(nvrtc, "ProgramLog", program).decode(errors="replace").rstrip("\0\n")
        if failed:
            raise CompileError(log)
        virtual = any(option.startswith("--gpu-architecture=compute_") for option in options)
        return _text(nvrtc, "PTX" if virtual else "CUBIN", program), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc, nvrtc[f"nvrtcGet{what}"](program, text))
    return text.raw


@functools.cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelUnavailable("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


def _candidates() -> Iterator[str]:
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")
    spec = importlib.util.find_spec("nvidia")  # namespace package of NVIDIA's wheels
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from map(str, sorted(Path(place).glob("*/lib/libnvrtc.so.1[23]"), reverse=True))


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelUnavailable(f"NVRTC answers {nvrtc.nvrtcGetErrorString(status).decode()}")


Element = Literal["bf16", "f16"]


TEXTS = Path(__file__).parents[1]
SHARED_MEMORY_LIMIT = 232_448
"""Maximum shared memory per block on Hopper, in bytes."""


@dataclass(frozen=True)
class Program:
    """Everything that the machine code of a kernel depends on, and its launch parameters."""

    name: str
    """Name of the kernel; KERNEL_NAME in the source."""
    architecture: str
    """Architecture of the GPU, such as "sm_90a"."""
    constants: tuple[tuple[str, int], ...]
    """Compile-time integers; booleans are 0 and 1."""
    texts: tuple[str, ...]
    """Files in this folder, or C++ source, in order."""
    threads: int
    shared_memory: int

    @functools.cached_property
    def source(self) -> str:
        """The complete source, except for the definition of KERNEL_NAME."""
        constants = [f"#define {name} {value}" for name, value in self.constants]
        texts = [(TEXTS / text).read_text() if text.endswith((".cu", ".cuh")) else text for text in self.texts]
        return "\n".join([*constants, *texts])

    @property
    def options(self) -> tuple[str, ...]:
        """Options of NVRTC."""
        return (f"--gpu-architecture={target_for(self.architecture)}", "--std=c++17")

    @functools.cached_property
    def key(self) -> str:
        """Cache key of the machine code: a hash of source, options and compiler version."""
        return _key_of(self)

    @property
    def entry(self) -> str:
        """Name of the kernel in the machine code; unique per program, because MLX caches modules by it."""
        return self.key.replace("-", "_")


@functools.lru_cache(maxsize=256)
def _key_of(program: Program) -> str:
    """Return the key of a program; cached, because a decode loop requests an equal program at each key length."""
    whole = repr((program.source, program.options, version()))
    return f"{program.name}-{hashlib.sha256(whole.encode()).hexdigest()[:24]}"


@functools.lru_cache(maxsize=128)
def machine_code(program: Program) -> bytes:
    """Return the program's cubin from the cache folder, or compile it if it is missing or damaged there.

    Raises:
        KernelUnavailable: NVRTC is missing, the source does not compile, or the cache folder is unusable.
    """
    code = cache.read_code(program.key)
    if code is None:
        with cache.lock(program.key):
            code = cache.read_code(program.key)  # another process may have compiled it meanwhile
            if code is None:
                code = compile_program(f"#define KERNEL_NAME {program.entry}\n{program.source}", program.options)
                cache.write_code(program.key, code)
    return code
