"""How a kernel earns trust on first use; a made-up GPU, no compiler."""

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


def test_a_check_may_compile_what_it_checks():
    trust.ensure(PROGRAM, lambda: None if machine_code(PROGRAM) == b"machine code" else "wrong")
    assert trust.distrust(PROGRAM) is None


def test_a_second_process_does_not_check_again():
    trust.ensure(PROGRAM, lambda: machine_code(PROGRAM) and None)
    a_new_process()
    trust.ensure(PROGRAM, lambda: pytest.fail("checked again"))


def test_a_wrong_result_is_remembered_with_its_reason():
    with pytest.raises(KernelUnavailable, match="planted: off by 3"):
        trust.ensure(PROGRAM, lambda: "off by 3")
    a_new_process()
    assert trust.distrust(PROGRAM) == "off by 3"
    with pytest.raises(KernelUnavailable, match="off by 3"):
        trust.ensure(PROGRAM, lambda: None)


def test_a_failed_launch_is_a_failed_check():
    def launch():
        raise RuntimeError("cudaGraphLaunch failed: an illegal memory access\nmore")

    with pytest.raises(KernelUnavailable, match="illegal memory access"):
        trust.ensure(PROGRAM, launch)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_check_that_took_the_process_down_twice_is_a_failed_check(compiles):
    def crash():
        if compiles:
            machine_code(PROGRAM)
        raise SystemExit

    for _ in range(2):
        assert trust.distrust(PROGRAM) is None
        with pytest.raises(SystemExit):
            trust.ensure(PROGRAM, crash)
        a_new_process()
    assert "did not come to an end" in (trust.distrust(PROGRAM) or "")
    with pytest.raises(KernelUnavailable, match="did not come to an end"):
        trust.ensure(PROGRAM, lambda: pytest.fail("checked again"))


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
        trust.ensure(PROGRAM, launch)
    assert not isinstance(told.value, KernelUnavailable)  # which would have the call go on with another kernel
    a_new_process()
    assert trust.distrust(PROGRAM) == "an illegal memory access"


def test_another_gpu_checks_for_itself(monkeypatch):
    trust.ensure(PROGRAM, lambda: machine_code(PROGRAM) and None)
    a_new_process()
    monkeypatch.setattr(trust, "gpu", lambda: Gpu("Another GPU", (9, 0), 78, 232_448, 13000))
    checked = []
    trust.ensure(PROGRAM, lambda: checked.append(1))
    assert checked


def test_new_code_is_checked_anew():
    trust.ensure(PROGRAM, lambda: machine_code(PROGRAM) and None)
    (cache.folder() / f"{PROGRAM.key}.cubin").write_bytes(b"damaged")
    a_new_process()
    machine_code(PROGRAM)
    checked = []
    trust.ensure(PROGRAM, lambda: checked.append(1))
    assert checked


def test_a_check_under_way_elsewhere_is_no_failure():
    def look():
        trust.checks.forget()  # as another process sees it
        assert trust.distrust(PROGRAM) is None

    trust.ensure(PROGRAM, look)
    assert trust.distrust(PROGRAM) is None
