"""Resource usage of compiled kernels, reported by NVRTC's assembler without a GPU; mark for tests that need NVRTC."""

import re
from dataclasses import dataclass

import pytest

from attention.core.errors import KernelUnavailable
from attention.kernels.cuda.runtime import program as runtime_program

REGISTERS = 65_536
"""Per multiprocessor."""


def _is_there():
    try:
        return bool(runtime_program.find())
    except KernelUnavailable:
        return False


needs_nvrtc = pytest.mark.skipif(not _is_there(), reason="NVRTC is not installed")


@dataclass(frozen=True)
class Report:
    """Per thread: registers, bytes of stack, and bytes of registers spilled, stored and loaded."""

    registers: int
    stack: int
    spilled: int
    log: str


def report(program):
    _, log = runtime_program.build(
        f"#define KERNEL_NAME kernel\n{program.source}", (*program.options, "--ptxas-options=-v")
    )
    [(stack, stored, loaded)] = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    return Report(int(re.search(r"Used (\d+) registers", log)[1]), int(stack), max(int(stored), int(loaded)), log)
