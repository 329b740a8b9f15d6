"""Kernel programs: source, constants and options, compiled to machine code on first use and cached on disk."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from attention.kernels import cache
from attention.kernels.cuda import nvrtc

TEXTS = Path(__file__).parent
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
        return (f"--gpu-architecture={nvrtc.target_for(self.architecture)}", "--std=c++17")

    @property
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
    whole = repr((program.source, program.options, nvrtc.version()))
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
                code = nvrtc.compile_program(f"#define KERNEL_NAME {program.entry}\n{program.source}", program.options)
                cache.write_code(program.key, code)
    return code
