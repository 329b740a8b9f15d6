"""First-use self-checks of the Metal kernels, and what follows from a failure; only the GPU is simulated."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from attention.core.errors import KernelUnavailable
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import fused
from attention.kernels import metal
from attention.kernels.common import cache
from attention.kernels.common.first_use import SelfChecks
from attention.kernels.metal import path
from attention.kernels.metal import trust as metal_trust
from attention.kernels.metal.call import CallParams, CallShape, specialisation
from attention.masks import Mask
from attention.measure.device import Device as Machine
from fatui import diagnosis
from tests.support.metal.device import MARK, ON_A_GPU, Device, forget, needs_verifier, on_a_mac

MAC = Machine(backend="metal", name="Planted GPU", cores=8, memory_bytes=2**34, available_bytes=2**33)
WORKLOAD = Workload(seq=40, heads=2, head_dim=32, dtype="float32", mask="causal")
METALS_ERROR = (
    "[metal::Device] Unable to build metal library from source\n"
    "program_source:12:3: error: use of undeclared identifier 'simd_shuffle_xor'\n  x = simd\n  ^"
)


@pytest.fixture(autouse=True)
def fresh_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused, "current_backend", lambda: "metal")


def arrays(seed=0):
    mx.random.seed(seed)
    return [mx.random.normal((1, 2, 40, 32)) for _ in range(3)]


def by_mlx(q, k, v):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal")


def close(a, b, by=1e-5):
    return np.allclose(np.array(a), np.array(b), atol=by)


class Refusing(Device):
    """A Metal compiler that accepts no source."""

    def metal_kernel(self, **made):
        def call(**keywords):
            raise RuntimeError(METALS_ERROR)

        return call


def wrong_output(kernel, text):
    return text.replace("* inverse)", "* inverse * 1.001f)") if kernel == "forward" else text


def wrong_gradient(kernel, text):
    return text.replace("float slope = scale;", "float slope = scale * 1.001f;") if kernel == "backward_key" else text


def test_a_kernel_is_checked_once_and_then_used():
    with on_a_mac(Device()) as device:
        q, k, v = arrays()
        for _ in range(2):
            assert close(metal.flash_attention(q, k, v, scale=0.2, causal=True), by_mlx(q, k, v))
        assert len(device.launches) == 1 + 2
        assert "checked on this Mac" in path.route(WORKLOAD, Needs()).reason
        forget()  # another process
        metal.flash_attention(q, k, v, scale=0.2, causal=True)
        assert len(device.launches) == 1 + 2 + 1


@needs_verifier
def test_a_wrong_kernel_is_refused_and_the_call_falls_back():
    with on_a_mac(Device(edit=wrong_output)):
        q, k, v = arrays()
        with pytest.raises(KernelUnavailable, match="forward float32 D=32 causal: its output disagrees"):
            metal.flash_attention(q, k, v, scale=0.2, causal=True)
        implementation = fused.Poc()
        assert close(implementation(q, k, v, scale=0.2, mask=Mask(causal=True)), by_mlx(q, k, v), 1e-6)
        route = implementation.route(WORKLOAD, MAC)
        assert route.fallback
        assert "its output disagrees with the reference by 0.001" in route.reason


def test_metals_own_error_is_told_by_route_doctor_and_report():
    with on_a_mac(Refusing()):
        q, k, v = arrays()
        implementation = fused.Poc()
        assert close(implementation(q, k, v, scale=0.2, mask=Mask(causal=True)), by_mlx(q, k, v), 1e-6)
        error = "use of undeclared identifier 'simd_shuffle_xor'"
        assert error in implementation.route(WORKLOAD, MAC).reason
        text, wrong = path.summary()
        assert "0 of 1 kernels" in text
        assert "Never measured" in text
        assert error in wrong
        report = diagnosis.make(pytest.fail, measure=False)
        assert METALS_ERROR in report
        assert f"forward float32 D=32 causal ({MARK}): FAILED" in report


@pytest.mark.slow
def test_a_report_checks_all_head_dims_and_hides_home_folders(monkeypatch, tmp_path):
    reported = []
    monkeypatch.setattr(diagnosis, "home", lambda: tmp_path)
    monkeypatch.setattr(diagnosis, "diagnose", lambda measure: [])
    with on_a_mac(Refusing()):
        report = diagnosis.make(reported.append, measure=True)
    kinds = {tuple(line.split()[1:4]) for line in reported}  # pass, dtype and head dim
    passes, dtypes, dims = map(set, zip(*kinds, strict=True))
    assert passes == {"forward", "decode", "backward"}
    assert len(dtypes) == 3
    assert len(kinds) == 3 * 3 * len(dims) == 63
    assert f"0 of {len(reported)} checks passed" in report
    assert diagnosis.without_home(f"{tmp_path}/x") == "~/x"


@needs_verifier
def test_a_wrong_backward_kernel_leaves_gradients_to_plain():
    with on_a_mac(Device(edit=wrong_gradient)):
        q, k, v = arrays()

        def loss(attend):
            return mx.grad(lambda *a: (attend(*a) * q).sum(), argnums=(0, 1, 2))(q, k, v)

        ours = loss(lambda *a: metal.flash_attention(*a, scale=0.2, causal=True))
        assert all(close(a, b) for a, b in zip(ours, loss(by_mlx), strict=True))
        training = Workload(seq=40, heads=2, head_dim=32, dtype="float32", mask="causal", pass_="training")
        reason = path.route(training, Needs()).reason
        assert "gradients go through the score matrix: backward float32 D=32 causal: its dK disagrees" in reason


def test_a_check_that_crashed_the_process_twice_has_failed():
    class Crashing(Refusing):
        def metal_kernel(self, **made):
            raise SystemExit

    q, k, v = arrays()
    for _ in range(2):
        with on_a_mac(Crashing()), pytest.raises(SystemExit):
            metal.flash_attention(q, k, v, scale=0.2)
    with on_a_mac(Device()), pytest.raises(KernelUnavailable, match="did not come to an end"):
        metal.flash_attention(q, k, v, scale=0.2)


def test_another_system_checks_for_itself(monkeypatch):
    special = specialisation("forward", CallShape(1, 1, 1, 40, 40, 32, "float16"), CallParams(1.0))
    with on_a_mac(Device()):
        with pytest.raises(KernelUnavailable):
            metal_trust.ensure(special, lambda: "off by 3")
        assert metal_trust.distrust_reason(special) == "forward float16 D=32: off by 3"
        monkeypatch.setattr(metal_trust, "checks", SelfChecks(lambda: "the next macOS"))
        assert metal_trust.distrust_reason(special) is None
        metal_trust.ensure(special, lambda: None)
        assert metal_trust.is_trusted(special)


@pytest.mark.parametrize(
    "changed", ["metal/forward.metal", "metal/common.metal", "metal/launch.py", "common/selfcheck.py"]
)
def test_new_code_is_checked_anew(monkeypatch, tmp_path, changed):
    special = specialisation("forward", CallShape(1, 1, 1, 40, 40, 32, "float16"), CallParams(1.0))
    folder = tmp_path / "kernels"
    for name in ("common", "metal"):
        shutil.copytree(Path(metal_trust.__file__).parents[1] / name, folder / name)
    before = key_in_a_new_process(special)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__file__", str(folder / "common" / "cache.py"))
        assert key_in_a_new_process(special) == before
        with (folder / changed).open("a") as file:
            file.write("\n")
        assert key_in_a_new_process(special) != before
    key_in_a_new_process(special)


def key_in_a_new_process(special):
    metal_trust.key_of.cache_clear()
    cache.code_fingerprint.cache_clear()
    return metal_trust.key_of(special)


@pytest.mark.skipif(ON_A_GPU, reason="there is one")
def test_without_a_mac_the_route_says_so():
    route = path.route(WORKLOAD, Needs())
    assert not route.supported
    assert "macOS only" in route.reason
    assert metal.availability()[0] is False


@pytest.mark.parametrize(
    ("has_metal", "macos", "reason"),
    [(False, "15.0", "no Metal backend, or finds no GPU"), (True, "13.6", "need macOS 14, and this is 13.6")],
)
def test_what_a_mac_lacks_is_named(monkeypatch, has_metal, macos, reason):
    monkeypatch.setattr(metal_trust.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(metal_trust.platform, "mac_ver", lambda: (macos, ("", "", ""), ""))
    monkeypatch.setattr(mx.metal, "is_available", lambda: has_metal)
    with pytest.raises(KernelUnavailable, match=reason):
        metal_trust.describe.__wrapped__()


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (Workload(seq=9, head_dim=72), "head dims 32, 64, 80, 96, 128, 192, 256, not 72"),
        (Workload(seq=9, head_dim=128, value_dim=64), "values as wide as keys"),
    ],
)
def test_what_is_not_taken_is_said(workload, reason):
    with on_a_mac(Device()):
        assert reason in path.route(workload, Needs()).reason
