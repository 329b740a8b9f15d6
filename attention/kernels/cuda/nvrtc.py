"""Compiles CUDA C++ to machine code with NVRTC, which needs no GPU."""

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from attention.errors import KernelUnavailable

OLDEST = (12, 5)
"""What tensor maps that a kernel made itself needed; no older version has been tried since the host makes them."""


class CompileError(KernelUnavailable):
    """NVRTC refuses a program; the message is its log."""


def find() -> str:
    """The library, as MLX's CUDA build or PyTorch brings it, or as it is installed; loads nothing but that.

    Raises:
        KernelUnavailable: there is none, or it is too old.
    """
    _library()
    found = "{}.{}".format(*version())
    if version() < OLDEST:
        raise KernelUnavailable("NVRTC {}.{} or later is needed, not {}".format(*OLDEST, found))
    return f"NVRTC {found}"


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor version of NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library(), _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def targets() -> tuple[int, ...]:
    """The architectures that NVRTC compiles for: 90 stands for sm_90."""
    count = ctypes.c_int()
    _check(_library(), _library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    made = (ctypes.c_int * count.value)()
    _check(_library(), _library().nvrtcGetSupportedArchs(made))
    return tuple(sorted(made))


def target_for(architecture: str) -> str:
    """What to compile for a GPU, "sm_86" say: itself, or the nearest lower that its machine code can be of.

    Where NVRTC knows none of its family, as with a GPU younger than it, that is a virtual architecture ("compute_120"),
    whose text the driver compiles.

    Raises:
        KernelUnavailable: NVRTC knows nothing as old as this GPU.
    """
    number = int(architecture.removeprefix("sm_").rstrip("abcdef"))
    if number in targets():
        return architecture
    lower = [known for known in targets() if known < number]
    if not lower:
        raise KernelUnavailable(f"NVRTC {version()[0]}.{version()[1]} compiles for no GPU as old as {architecture}")
    return f"{'sm' if lower[-1] // 10 == number // 10 else 'compute'}_{lower[-1]}"


def compile_program(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a program whose kernels are `extern "C"`, or PTX for a virtual architecture.

    Raises:
        CompileError: with NVRTC's log.
        KernelUnavailable: there is no NVRTC, or it is too old.
    """
    return build(source, options)[0]


def build(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The same, and NVRTC's log: with the option "--ptxas-options=-v" it tells registers and spills.

    Raises:
        CompileError: with NVRTC's log.
        KernelUnavailable: there is no NVRTC, or it is too old.
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
    spec = importlib.util.find_spec("nvidia")  # the folder that all of NVIDIA's packages share
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from map(str, sorted(Path(place).glob("*/lib/libnvrtc.so.1[23]"), reverse=True))


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelUnavailable(f"NVRTC answers {nvrtc.nvrtcGetErrorString(status).decode()}")
