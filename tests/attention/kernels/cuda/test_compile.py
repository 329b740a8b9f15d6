"""Compilation of the CUDA kernels; needs NVRTC, no GPU."""

from dataclasses import replace

import mlx.core as mx
import pytest

from attention.kernels.common import cache
from attention.kernels.cuda import KernelUnavailable
from attention.kernels.cuda.peers import merge_program
from attention.kernels.cuda.runtime import program as runtime_program
from attention.kernels.cuda.runtime.program import SHARED_MEMORY_LIMIT, Program, machine_code
from attention.kernels.cuda.sm90.decode import Decode
from attention.kernels.cuda.sm90.forward import fewer_consumers, specialise, specialise_lists
from tests.support.cuda_compiled import REGISTERS, needs_nvrtc, report

KINDS = [(False, False, False), (True, False, False), (True, True, False), (True, False, True), (True, True, True)]
MAX_PROGRAMS = [
    specialise(dim, causal, "bf16", window, softcap) for dim in (64, 128, 192, 256) for causal, window, softcap in KINDS
]
FORWARD = [kernel for largest in MAX_PROGRAMS for kernel in (largest, *fewer_consumers(largest))]
FORWARD += [
    specialise_lists(dim, "bf16", softcap, few)
    for dim in (64, 128, 192, 256)
    for softcap, few in ((False, False), (True, False), (False, True))
]
FORWARD += [specialise_lists(dim, "bf16", most=True) for dim in (64, 128)]
FORWARD += [
    replace(kernel, gathered=True)
    for largest in (specialise(64, True, "bf16", True), specialise(128, True, "bf16", True))
    for kernel in (largest, *fewer_consumers(largest))
]
SHARED = [
    Decode(dim, True, "f16", True, True, architecture, limit)
    for architecture, limit in (("sm_90a", 232_448), ("sm_80", 166_912), ("sm_89", 101_376))
    for dim in (64, 128, 256)
]
DECODE = [variant for kernel in SHARED for variant in (kernel, kernel.alone)]

SMALL = Program("small", "sm_90a", (), ('extern "C" __global__ void KERNEL_NAME() {}',), 32, 0)
PROGRAMS = [kernel.program for kernel in (*FORWARD, *DECODE)]
PROGRAMS += [merge_program(ranks, mx.bfloat16) for ranks in (2, 8)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cuda"))
    machine_code.cache_clear()


@pytest.mark.parametrize("kernel", FORWARD, ids=str)
def test_forward_fits_shared_memory_and_registers(kernel):
    assert kernel.program.shared_memory <= SHARED_MEMORY_LIMIT
    accumulators = kernel.head_dim // 2 + kernel.block_n // 2 + (kernel.block_n // 4 if kernel.overlap else 0)
    assert accumulators <= (132 if kernel.consumers == 3 else 208)


@pytest.mark.parametrize("kernel", DECODE, ids=str)
def test_decode_fits_shared_memory(kernel):
    assert kernel.program.shared_memory <= kernel.shared_memory_limit


@needs_nvrtc
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_programs_spill_nothing_and_overlap_products(program):
    found = report(program)
    assert found.stack == found.spilled == 0, found.log
    assert "serialized" not in found.log
    assert found.registers * program.threads <= REGISTERS


@needs_nvrtc
def test_a_second_process_finds_the_code(monkeypatch):
    program = SMALL
    code = machine_code(program)
    machine_code.cache_clear()
    monkeypatch.setattr(runtime_program, "compile_program", lambda *_: pytest.fail("compiled again"))
    assert machine_code(program) == code


@needs_nvrtc
def test_damaged_code_is_compiled_again():
    program = replace(SMALL, name="damaged")
    code = machine_code(program)
    machine_code.cache_clear()
    path = cache.folder() / f"{program.key}.cubin"
    path.write_bytes(code[:-1] + b"?")
    assert cache.read_code(program.key) is None
    assert machine_code(program) == code
    assert path.read_bytes() == code


@needs_nvrtc
def test_the_cache_folder_is_its_owners_alone():
    machine_code(SMALL)
    assert cache.folder().stat().st_mode & 0o777 == 0o700


@needs_nvrtc
def test_a_text_that_does_not_compile_is_reported_with_the_log():
    with pytest.raises(runtime_program.CompileError, match="identifier"):
        runtime_program.compile_program("extern __global__ void f() { nonsense; }", ["--gpu-architecture=sm_80"])


@needs_nvrtc
def test_no_two_programs_share_a_name():
    assert len({program.entry for program in PROGRAMS}) == len(PROGRAMS)


def test_an_old_nvrtc_is_reported_before_compiling(monkeypatch):
    monkeypatch.setattr(runtime_program, "_library", lambda: None)
    monkeypatch.setattr(runtime_program, "version", lambda: (12, 4))
    for ask in (runtime_program.find, lambda: runtime_program.compile_program("", [])):
        with pytest.raises(KernelUnavailable, match=r"NVRTC 12\.5 or later is needed, not 12\.4"):
            ask()
