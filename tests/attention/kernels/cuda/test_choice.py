"""Kernel selection on simulated GPUs, and the launch arguments of the portable kernels; needs no GPU."""

import math
import re

import pytest

mx = pytest.importorskip("mlx.core")

from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import Workload
from attention.kernels import cuda
from attention.kernels.cuda import choice, gradients, path, requirements
from attention.kernels.cuda.runtime import launcher
from benchmarks.cuda.measure_portable import portable_only
from tests.support.cuda_planted import planted, signature

MASKED = Needs(array_mask=True)


@pytest.fixture
def on(monkeypatch):
    yield from planted(monkeypatch)


def workload(**fields):
    return Workload(**{"dtype": "bfloat16", "seq": 512, "head_dim": 64, **fields})


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090", "B200"])
def test_without_hopper_the_general_kernel_takes_many_queries(on, gpu):
    on(gpu)
    for case in (workload(), workload(mask="causal", head_dim=256), workload(head_dim=192, value_dim=128)):
        assert path.route(case, NO_NEEDS).path == "CUDA kernel, general"


def test_on_hopper_its_own_kernel_comes_first(on):
    on("H100")
    assert path.route(workload(mask="window:100"), NO_NEEDS).path == "CUDA kernel, Hopper"
    assert path.route(workload(pass_="decode"), NO_NEEDS).path == "CUDA kernel, split K"


@pytest.mark.parametrize("fields", [{}, {"pass_": "decode"}, {"seq": 5, "kv_seq": 900}])
def test_on_hopper_array_masks_go_to_the_general_kernel(on, fields):
    on("H100")
    assert path.route(workload(**fields), MASKED).path == "CUDA kernel, general"
    assert path.route(workload(**fields, value_dim=80), NO_NEEDS).path == "CUDA kernel, general"


def test_a_distrusted_kernels_calls_go_to_the_general_one(on):
    on("H100").wrong["flash_forward"] = "its output disagrees with the reference by 0.3"
    route = path.route(workload(), NO_NEEDS)
    assert route.path == "CUDA kernel, general"
    assert "flash_forward: its output disagrees with the reference by 0.3" in route.reason


def test_with_no_trusted_kernel_route_and_call_say_why(on):
    on("H100").wrong.update(flash_forward="off by 3", flash_general="off by 2")
    route = path.route(workload(), NO_NEEDS)
    assert not route.supported
    assert route.reason == "flash_forward: off by 3; flash_general: off by 2"
    q = mx.zeros((1, 2, 300, 64), mx.float16)
    with pytest.raises(cuda.KernelUnavailable, match=f"^{route.reason}$"):
        cuda.flash_attention(q, q, q, scale=0.125)


def test_a_failed_check_sends_the_call_to_the_general_kernel(on):
    found = on("H100")
    found.wrong["flash_forward"] = "off by 3"
    q = mx.zeros((1, 2, 300, 64), mx.float16)
    cuda.flash_attention(q, q, q, scale=0.125)
    assert kernels(found) == ["flash_general"]


@pytest.mark.parametrize(
    ("fields", "reported"),
    [
        ({"dtype": "float32"}, "MLX's own float32 products may round to TF32"),
        ({"head_dim": 320}, "head dims up to 256, not 320"),
        ({"value_dim": 512}, "head dims up to 256, not 512"),
    ],
)
def test_what_is_not_taken_is_reported_in_a_line(on, fields, reported):
    on("A100")
    route = path.route(workload(**fields), NO_NEEDS)
    assert not route.supported
    assert reported in route.reason


def test_the_general_kernel_makes_gradients_that_hopper_lacks(on):
    found = on("H100")
    for case, needs in ((workload(), MASKED), (workload(value_dim=80), NO_NEEDS), (workload(head_dim=256), NO_NEEDS)):
        assert path.backward_refusal(case, needs) is None
    found.wrong["flash_general_backward"] = "off by 3"
    assert "the general kernel: off by 3" in path.backward_refusal(workload(), MASKED)
    assert path.backward_refusal(workload(), NO_NEEDS) is None


def test_a_training_pass_counts_dq_in_float32(on):
    on("A100")
    forward, training = workload(batch=16), workload(batch=16, pass_="training")
    rows = 16 * 8 * 512
    of_rows = 4 * rows * 3  # logsumexp, maximum and sum
    assert path.route(forward, NO_NEEDS).predicted_bytes == forward.output_bytes + of_rows
    extra = 4 * rows * (64 + 3)
    assert path.route(training, NO_NEEDS).predicted_bytes == training.output_bytes + of_rows + extra


@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_a_training_pass_counts_buffers_between_kernels(on, gpu, dim):
    found = on(gpu)
    case = workload(head_dim=dim, seq=300)
    both, forward = (path.route(workload(head_dim=dim, seq=300, pass_=p), NO_NEEDS) for p in ("training", "forward"))
    q = mx.zeros((1, 8, 300, dim), mx.bfloat16)
    output = [mx.zeros((1, 8, 300, dim)), mx.zeros((1, 8, 300)), mx.zeros((1, 8, 300, 2))]
    gradients.gradients([q, q, q], output[:1], output, *requirements.shape_and_call(case))
    backward = found.recorder.plans[-1]
    written = sum(math.prod(size) * of.size for size, of in zip(backward.shapes, backward.types, strict=True))
    assert both.predicted_bytes - forward.predicted_bytes == written


def test_a_head_dim_is_padded_to_8_and_the_copy_counted(on):
    on("A100")
    narrow = workload(head_dim=60)
    wide = workload(head_dim=64)
    assert path.route(narrow, NO_NEEDS).predicted_bytes > path.route(wide, NO_NEEDS).predicted_bytes
    q = mx.zeros((1, 2, 300, 60), mx.float16)
    assert cuda.flash_attention(q, q, q, scale=0.125).shape == q.shape


def kernels(found):
    return [program.name for step in found.recorder.plans[-1].steps for program in [step[1]]]


@pytest.mark.parametrize("mask", [None, mx.zeros((1, 1, 300), mx.float16), mx.ones((300, 300)) > 0])
@pytest.mark.parametrize("queries", [300, 2])
def test_every_kernel_gets_the_parameters_of_its_signature(on, mask, queries):
    found = on("A100")
    q = mx.zeros((1, 4, queries, 64), mx.bfloat16)
    k, v = mx.zeros((1, 2, 300, 64), mx.bfloat16), mx.zeros((1, 2, 300, 128), mx.bfloat16)
    mask = mask if mask is None or queries == 300 else mask[..., :queries, :] if mask.ndim == 2 else mask
    outputs = cuda.flash_attention_with_logsumexp(q, k, v, scale=0.1, mask=mask)
    primals = [q, k, v, *([] if mask is None else [mx.broadcast_to(mask, (1, 4, queries, 300))])]
    label = found.recorder.plans[-1].label
    results = [*outputs, mx.zeros((*outputs[1].shape, 2))]
    made = found.recorder.gradient(label, primals, list(outputs), results)
    assert [x.shape for x in made] == [x.shape for x in primals]
    names = []
    for plan in found.recorder.plans:
        for _, program, *_, arguments in plan.steps:
            assert [argument[0] for argument in arguments] == signature(program), program.name
            names.append(program.name)
    assert names[-3:] == ["flash_general_rows", "flash_general_backward", "flash_general_finish"]
    assert names[0] == "flash_general"


@pytest.mark.parametrize(
    ("mask", "reported"),
    [
        (mx.zeros((3, 300)), "broadcasts to (1, 4, 200, 300)"),
        (mx.zeros((1, 1, 1, 1, 300)), "broadcasts to (1, 4, 200, 300)"),
        (mx.zeros((300,), mx.int32), "bool, bfloat16, float16, float32; got int32"),
    ],
)
def test_a_mask_that_does_not_fit_is_reported(on, mask, reported):
    on("A100")
    q, k = mx.zeros((1, 4, 200, 64), mx.float16), mx.zeros((1, 4, 300, 64), mx.float16)
    with pytest.raises(ValueError, match=re.escape(reported)):
        cuda.flash_attention(q, k, k, scale=0.1, mask=mask)


@pytest.mark.parametrize("softcap", [-1.0, 0.0, float("inf"), float("nan")])
def test_a_softcap_without_a_meaning_is_reported(on, softcap):
    on("A100")
    q = mx.zeros((1, 4, 200, 64), mx.float16)
    with pytest.raises(ValueError, match="softcap is positive and finite"):
        cuda.flash_attention(q, q, q, scale=0.1, softcap=softcap)


def test_few_rows_are_split_among_blocks_and_many_are_not(on):
    found = on("H100")
    mask = mx.ones((1, 1, 1, 8192)) > 0
    q, k = mx.zeros((1, 32, 1, 128), mx.bfloat16), mx.zeros((1, 8, 8192, 128), mx.bfloat16)
    cuda.flash_attention(q, k, k, scale=0.1, mask=mask)
    assert kernels(found) == ["flash_general", "flash_general_join"]
    q = mx.zeros((1, 32, 8192, 128), mx.bfloat16)
    cuda.flash_attention(q, k, k, scale=0.1, mask=mask)
    assert kernels(found) == ["flash_general"]


def test_without_the_launcher_hopper_uses_the_general_kernel(on, monkeypatch):
    on("H100")
    monkeypatch.setattr(launcher, "known_obstacle", lambda: "there is no C++ compiler")
    monkeypatch.setattr(launcher, "unavailable_reason", lambda: "there is no C++ compiler")
    route = path.route(workload(), NO_NEEDS)
    assert route.path == "CUDA kernel, general"
    assert "launched kernel by kernel, since there is no C++ compiler" in route.reason
    assert choice.work_division(*requirements.shape_and_call(workload())).kernel.narrow_steps


def test_the_general_kernels_can_be_requested_alone(on):
    found = on("H100")
    q = mx.zeros((1, 2, 300, 64), mx.float16)
    with portable_only():
        cuda.flash_attention(q, q, q, scale=0.125)
        assert kernels(found) == ["flash_general"]
        assert "to be used" in gradients._refusal_of_own(*requirements.shape_and_call(workload()))
    cuda.flash_attention(q, q, q, scale=0.125)
    assert kernels(found) == ["flash_forward"]
