"""First-use self-checks of kernels on a simulated GPU; needs no compiler."""

import pytest

from attention.kernels.common import cache
from attention.kernels.cuda import KernelUnavailable
from attention.kernels.cuda.runtime import program as runtime_program
from attention.kernels.cuda.runtime import selfcheck
from attention.kernels.cuda.runtime.gpu import GpuProperties
from attention.kernels.cuda.runtime.program import Program, machine_code

GPU = GpuProperties("Planted GPU", (9, 0), 132, 232_448, 13000)
PROGRAM = Program("planted", "sm_90a", (), ("extern code;",), 32, 0)


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(selfcheck, "gpu", lambda: GPU)
    monkeypatch.setattr(runtime_program, "version", lambda: (13, 0))
    monkeypatch.setattr(runtime_program, "targets", lambda: (90,))
    monkeypatch.setattr(runtime_program, "compile_program", lambda source, options: b"machine code")
    a_new_process()


def a_new_process():
    selfcheck.checks.forget()
    machine_code.cache_clear()


def compile_only():
    machine_code(PROGRAM)


def test_a_check_may_compile_what_it_checks():
    assert selfcheck.check(PROGRAM, lambda: None if machine_code(PROGRAM) == b"machine code" else "wrong") is None
    assert selfcheck.distrust_reason(PROGRAM) is None


def test_a_second_process_does_not_check_again():
    assert selfcheck.check(PROGRAM, compile_only) is None
    a_new_process()
    assert selfcheck.check(PROGRAM, lambda: pytest.fail("checked again")) is None


def test_a_wrong_result_is_remembered_with_its_reason():
    assert selfcheck.check(PROGRAM, lambda: "off by 3") == "off by 3"
    a_new_process()
    assert selfcheck.distrust_reason(PROGRAM) == "off by 3"
    assert selfcheck.check(PROGRAM, lambda: None) == "off by 3"


def test_a_failed_launch_is_a_failed_check():
    def launch():
        raise RuntimeError("cudaGraphLaunch failed: an illegal memory access\nmore")

    assert selfcheck.check(PROGRAM, launch) == "cudaGraphLaunch failed: an illegal memory access"


@pytest.mark.parametrize("compiles", [False, True])
def test_a_check_that_crashed_the_process_twice_has_failed(compiles):
    def crash():
        if compiles:
            machine_code(PROGRAM)
        raise SystemExit

    for _ in range(2):
        assert selfcheck.distrust_reason(PROGRAM) is None
        with pytest.raises(SystemExit):
            selfcheck.check(PROGRAM, crash)
        a_new_process()
    assert "did not come to an end" in (selfcheck.distrust_reason(PROGRAM) or "")
    assert "did not come to an end" in (selfcheck.check(PROGRAM, lambda: pytest.fail("checked again")) or "")


def test_a_text_that_does_not_compile_is_compiled_once(monkeypatch):
    requested = []

    def refuse(source, options):
        requested.append(1)
        raise runtime_program.CompileError("flash.cu(3): error: nonsense\nmore")

    monkeypatch.setattr(runtime_program, "compile_program", refuse)
    for _ in range(2):
        a_new_process()
        assert selfcheck.check(PROGRAM, lambda: None) == "flash.cu(3): error: nonsense"
    assert len(requested) == 1


def test_a_gpu_that_no_longer_answers_is_reported_as_such(monkeypatch):
    def launch():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(selfcheck, "_gpu_responds", lambda: False)
    with pytest.raises(RuntimeError, match="broke this process's use of the GPU") as reported:
        selfcheck.check(PROGRAM, launch)
    assert not isinstance(reported.value, KernelUnavailable)  # which would let the call fall back to another kernel
    a_new_process()
    assert selfcheck.distrust_reason(PROGRAM) == "an illegal memory access"


def test_another_gpu_checks_for_itself(monkeypatch):
    assert selfcheck.check(PROGRAM, compile_only) is None
    a_new_process()
    monkeypatch.setattr(selfcheck, "gpu", lambda: GpuProperties("Another GPU", (9, 0), 78, 232_448, 13000))
    checked = []
    selfcheck.check(PROGRAM, lambda: checked.append(1))
    assert checked


def test_new_code_is_checked_anew():
    assert selfcheck.check(PROGRAM, compile_only) is None
    (cache.folder() / f"{PROGRAM.key}.cubin").write_bytes(b"damaged")
    a_new_process()
    machine_code(PROGRAM)
    checked = []
    selfcheck.check(PROGRAM, lambda: checked.append(1))
    assert checked


def test_a_check_under_way_elsewhere_is_no_failure():
    def look():
        selfcheck.checks.forget()  # as another process sees it
        assert selfcheck.distrust_reason(PROGRAM) is None

    selfcheck.check(PROGRAM, look)
    assert selfcheck.distrust_reason(PROGRAM) is None
