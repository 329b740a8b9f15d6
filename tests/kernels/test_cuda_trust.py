"""First-use self-checks of kernels on a simulated GPU; needs no compiler."""

import pytest

from attention.kernels import cache
from attention.kernels.cuda import KernelUnavailable, nvrtc, program, trust
from attention.kernels.cuda.gpu import Gpu
from attention.kernels.cuda.program import Program, machine_code

GPU = Gpu("Planted GPU", (9, 0), 132, 232_448, 13000)
PROGRAM = Program("planted", "sm_90a", (), ("extern code;",), 32, 0)


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(trust, "gpu", lambda: GPU)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "targets", lambda: (90,))
    monkeypatch.setattr(program.nvrtc, "compile_program", lambda source, options: b"machine code")
    a_new_process()


def a_new_process():
    trust.checks.forget()
    machine_code.cache_clear()


def compile_only():
    machine_code(PROGRAM)


def test_a_check_may_compile_what_it_checks():
    assert trust.judged(PROGRAM, lambda: None if machine_code(PROGRAM) == b"machine code" else "wrong") is None
    assert trust.distrust(PROGRAM) is None


def test_a_second_process_does_not_check_again():
    assert trust.judged(PROGRAM, compile_only) is None
    a_new_process()
    assert trust.judged(PROGRAM, lambda: pytest.fail("checked again")) is None


def test_a_wrong_result_is_remembered_with_its_reason():
    assert trust.judged(PROGRAM, lambda: "off by 3") == "off by 3"
    a_new_process()
    assert trust.distrust(PROGRAM) == "off by 3"
    assert trust.judged(PROGRAM, lambda: None) == "off by 3"


def test_a_failed_launch_is_a_failed_check():
    def launch():
        raise RuntimeError("cudaGraphLaunch failed: an illegal memory access\nmore")

    assert trust.judged(PROGRAM, launch) == "cudaGraphLaunch failed: an illegal memory access"


@pytest.mark.parametrize("compiles", [False, True])
def test_a_check_that_crashed_the_process_twice_has_failed(compiles):
    def crash():
        if compiles:
            machine_code(PROGRAM)
        raise SystemExit

    for _ in range(2):
        assert trust.distrust(PROGRAM) is None
        with pytest.raises(SystemExit):
            trust.judged(PROGRAM, crash)
        a_new_process()
    assert "did not come to an end" in (trust.distrust(PROGRAM) or "")
    assert "did not come to an end" in (trust.judged(PROGRAM, lambda: pytest.fail("checked again")) or "")


def test_a_text_that_does_not_compile_is_compiled_once(monkeypatch):
    asked = []

    def refuse(source, options):
        asked.append(1)
        raise nvrtc.CompileError("flash.cu(3): error: nonsense\nmore")

    monkeypatch.setattr(program.nvrtc, "compile_program", refuse)
    for _ in range(2):
        a_new_process()
        assert trust.judged(PROGRAM, lambda: None) == "flash.cu(3): error: nonsense"
    assert len(asked) == 1


def test_a_gpu_that_no_longer_answers_is_told_as_such(monkeypatch):
    def launch():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(trust, "_gpu_answers", lambda: False)
    with pytest.raises(RuntimeError, match="broke this process's use of the GPU") as told:
        trust.judged(PROGRAM, launch)
    assert not isinstance(told.value, KernelUnavailable)  # which would let the call fall back to another kernel
    a_new_process()
    assert trust.distrust(PROGRAM) == "an illegal memory access"


def test_another_gpu_checks_for_itself(monkeypatch):
    assert trust.judged(PROGRAM, compile_only) is None
    a_new_process()
    monkeypatch.setattr(trust, "gpu", lambda: Gpu("Another GPU", (9, 0), 78, 232_448, 13000))
    checked = []
    trust.judged(PROGRAM, lambda: checked.append(1))
    assert checked


def test_new_code_is_checked_anew():
    assert trust.judged(PROGRAM, compile_only) is None
    (cache.folder() / f"{PROGRAM.key}.cubin").write_bytes(b"damaged")
    a_new_process()
    machine_code(PROGRAM)
    checked = []
    trust.judged(PROGRAM, lambda: checked.append(1))
    assert checked


def test_a_check_under_way_elsewhere_is_no_failure():
    def look():
        trust.checks.forget()  # as another process sees it
        assert trust.distrust(PROGRAM) is None

    trust.judged(PROGRAM, look)
    assert trust.distrust(PROGRAM) is None
