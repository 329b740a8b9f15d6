"""A kernel as text, and the machine code made of it: compiled at first use, kept in the cache folder."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from attention.kernels import cache
from attention.kernels.cuda import nvrtc

TEXTS = Path(__file__).parent
SHARED_MEMORY_LIMIT = 232_448
"""Bytes of shared memory that a block may have on Hopper."""


@dataclass(frozen=True)
class Program:
    """All that machine code depends on, and what launching it takes."""

    name: str
    """Of the kernel; in the text it is KERNEL_NAME."""
    architecture: str
    """The GPU's: "sm_90a" """
    constants: tuple[tuple[str, int], ...]
    """Compile-time numbers; booleans are 0 and 1."""
    texts: tuple[str, ...]
    """Files in this folder, or C++ text, in their order."""
    threads: int
    shared_memory: int

    @functools.cached_property
    def source(self) -> str:
        """The whole program, but for the kernel's name."""
        constants = [f"#define {name} {value}" for name, value in self.constants]
        texts = [(TEXTS / text).read_text() if text.endswith((".cu", ".cuh")) else text for text in self.texts]
        return "\n".join([*constants, *texts])

    @property
    def options(self) -> tuple[str, ...]:
        """What NVRTC is told."""
        return (f"--gpu-architecture={nvrtc.target_for(self.architecture)}", "--std=c++17")

    @property
    def key(self) -> str:
        """Names the machine code: text, options and compiler."""
        return _key_of(self)

    @property
    def entry(self) -> str:
        """The kernel's name in the machine code. MLX keeps modules by it, so no two programs may share one."""
        return self.key.replace("-", "_")


@functools.lru_cache(maxsize=256)
def _key_of(program: Program) -> str:
    """Read and hashed once: a decoding loop asks for an equal program at each length."""
    whole = repr((program.source, program.options, nvrtc.version()))
    return f"{program.name}-{hashlib.sha256(whole.encode()).hexdigest()[:24]}"


@functools.lru_cache(maxsize=128)
def machine_code(program: Program) -> bytes:
    """The program's cubin, from the cache folder if it lies there unharmed, else compiled now.

    Raises:
        KernelUnavailable: no NVRTC, a text that it refuses, or a cache folder that cannot be used.
    """
    code = cache.read_code(program.key)
    if code is None:
        with cache.lock(program.key):
            code = cache.read_code(program.key)  # another process may have been faster
            if code is None:
                code = nvrtc.compile_program(f"#define KERNEL_NAME {program.entry}\n{program.source}", program.options)
                cache.write_code(program.key, code)
    return code
