"""Compilation of CUDA C++ to machine code with NVRTC; needs no GPU."""

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from attention.errors import KernelUnavailable

OLDEST = (12, 5)
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
    if version() < OLDEST:
        raise KernelUnavailable("NVRTC {}.{} or later is needed, not {}".format(*OLDEST, found))
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
