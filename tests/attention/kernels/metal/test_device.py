"""The fake of the Metal device: in the verifier here, and on a Mac the GPU itself."""

import mlx.core as mx
import pytest

from attention.kernels.metal import launch
from attention.kernels.metal import trust as metal_trust
from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.selfcheck import inputs
from tests.support.metal import device as kernels_device
from tests.support.metal.case import KINDS, problems
from tests.support.metal.device import Device, needs_verifier, on_a_mac

SHAPE = CallShape(1, 2, 1, 40, 37, 32, "float32")


def test_on_a_mac_the_gpu_runs_the_kernels(monkeypatch):
    """A simulated device shows that every launch reaches it as the launcher passes it."""
    seen = []

    def metal_kernel(**made):
        def call(*, inputs, output_shapes, output_dtypes, **keywords):
            seen.append((made["name"], len(inputs), keywords["threadgroup"]))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return call

    monkeypatch.setattr(kernels_device, "ON_A_GPU", True)
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    with on_a_mac(Device(is_reversed=True)) as device:
        assert problems(SHAPE, KINDS["full"])  # zeros are wrong
    assert seen == [
        ("fatui_forward", 13, (128, 1, 1)),
        ("fatui_backward_query", 16, (128, 1, 1)),
        ("fatui_backward_key", 15, (256, 1, 1)),
    ]
    assert [one.kernel for one in device.launches] == ["forward", "backward_query", "backward_key"]


@needs_verifier
def test_here_the_verifier_runs_them_and_counts():
    call = CallParams(1.0)
    with on_a_mac(Device()) as device:
        launch.forward(inputs(SHAPE, call).arrays(SHAPE), SHAPE, call)
    (one,) = device.launches
    assert "[[kernel]] void custom_kernel_fatui_forward" in one.text
    assert one.counts.products > 0


@pytest.mark.parametrize(("module", "name"), [(metal_trust, "machine_fingerprint"), (metal_trust, "checks")])
def test_the_made_up_machine_is_gone_afterwards(module, name):
    before = getattr(module, name)
    with on_a_mac(Device()):
        assert getattr(module, name) is not before
        assert metal_trust.machine_fingerprint() == kernels_device.MARK
    assert getattr(module, name) is before
