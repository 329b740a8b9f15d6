"""Launch plans on a simulated Hopper GPU: stages, and kernel parameters; needs no GPU."""

import struct

import pytest

from attention.kernels.cuda.sm90 import launch as sm90_launch

mx = pytest.importorskip("mlx.core")

from attention.core.route import Needs
from attention.core.workload import Workload
from attention.kernels import cuda
from attention.kernels.cuda import KernelUnavailable, choice, packed_choice, path, peers
from attention.kernels.cuda.runtime import launch, launcher
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import LENGTH, MAP, NUMBER, POINTER, SCRATCH
from attention.kernels.cuda.runtime.program import Program
from attention.masks import Mask
from tests.support.cuda_planted import parameter_kinds, planted, signature


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Program, "entry", property(lambda program: program.name))
    for on in planted(monkeypatch):
        yield on("H100").recorder


def call(queries, keys, dim=64, heads=4, kv_heads=2, with_logsumexp=False):
    q, k = mx.zeros((1, heads, queries, dim), mx.bfloat16), mx.zeros((1, kv_heads, keys, dim), mx.bfloat16)
    function = cuda.flash_attention_with_logsumexp if with_logsumexp else cuda.flash_attention
    return (q, k, k), function(q, k, k, scale=0.125, causal=True)


def kernels(plan):
    return [step[0] for step in plan.steps]


def test_many_queries_take_one_launch(recorder):
    call(300, 300)
    assert kernels(recorder.plans[-1]) == ["flash_forward"]


def test_one_query_to_many_keys_takes_one_launch_of_many_blocks(recorder):
    call(1, 5000)
    assert kernels(recorder.plans[-1]) == ["flash_decode"]
    assert recorder.plans[-1].steps[0][2] > 2


@pytest.mark.parametrize(("queries", "lengths"), [(1, (4993, 5000, 5008)), (3, (4993, 5008)), (1, (1, 16))])
def test_lengths_of_as_many_steps_share_a_plan(recorder, queries, lengths):
    for keys in lengths:
        call(queries, keys)
    assert len(recorder.plans) == 2  # with and without what a gradient would need
    for plan in recorder.plans:
        (step,) = plan.steps
        assert [LENGTH, 1, 2] in step[7]
        assert [NUMBER, lengths[-1]] not in step[7]
    call(queries, lengths[-1] + 1)
    assert len(recorder.plans) == 4


@pytest.mark.parametrize("kv_format", ["none", "int4"])
def test_routes_of_like_lengths_make_launches_once(recorder, monkeypatch, kv_format):
    made = []
    for module in (choice, packed_choice):
        stages = module.stages
        monkeypatch.setattr(module, "stages", lambda *args, stages=stages: made.append(args) or stages(*args))
    lengths, bytes_of = (4993, 5000, 5008), set()
    for keys in lengths:
        case = Workload(
            batch=1, heads=4, kv_heads=2, seq=1, kv_seq=keys, head_dim=64, dtype="bfloat16", kv_format=kv_format
        )
        bytes_of.add(path.route(case, Needs()).predicted_bytes)
    assert (len(made), len(bytes_of)) == (1, 1)


def test_a_window_on_few_queries_has_a_plan_of_its_own(recorder):
    q, k = mx.zeros((1, 4, 1, 64), mx.bfloat16), mx.zeros((1, 2, 5000, 64), mx.bfloat16)
    for keys in (4999, 5000):
        cuda.flash_attention(q, k[:, :, :keys], k[:, :, :keys], scale=0.125, window=1000)
    firsts = [[a[1] for a in plan.steps[0][7] if a[0] == NUMBER][-3] for plan in recorder.plans]
    assert firsts == [3999, 3999, 4000, 4000]


def test_a_shared_plan_has_gradients_of_a_call_s_length(recorder):
    call(2, 5008)
    (q, k, v), output = call(2, 5000)
    label = recorder.plans[-1].label
    results = [output, mx.zeros((1, 4, 2)), mx.zeros((1, 4, 2, 2))]
    made = recorder.gradient(label, [q, k, v], [output, results[1]], results)
    assert [x.shape for x in made] == [x.shape for x in (q, k, v)]
    keys = mx.zeros((1, 2, 3, 5000, 64), mx.bfloat16)  # vmapped by the axis between heads and rows
    output, *_ = recorder.batched(label, [mx.stack([q] * 3), keys, keys], [0, 2, 2])
    assert output.shape == (3, 1, 4, 2, 64)
    assert [LENGTH, 1, 2] in recorder.plans[-1].steps[0][7]


def test_one_query_to_few_keys_is_not_split(recorder):
    call(1, 50)
    assert recorder.plans[-1].steps[0][2] == 2  # blocks, one for each key head


@pytest.mark.parametrize(("batch", "keys", "blocks"), [(1, 8192, 2), (16, 8192, 1), (1, 131_072, 1)])
def test_a_block_with_many_keys_has_a_multiprocessor_for_itself(recorder, batch, keys, blocks):
    split = sm90_launch.make_key_split(
        CallShape(batch, 32, 8, 1, keys, 128, "bf16"), CallParams(0.1, False, None, None)
    )
    assert split.kernel.resident_blocks == blocks


def gradients(recorder, with_logsumexp):
    primals, outputs = call(300, 300, with_logsumexp=with_logsumexp)
    outputs = list(outputs) if with_logsumexp else [outputs, mx.zeros((1, 4, 300))]
    results = [*outputs, mx.zeros((1, 4, 300, 2))]
    made = recorder.gradient(recorder.plans[-1].label, list(primals), outputs, results)
    return primals, made


@pytest.mark.parametrize("with_logsumexp", [False, True])
def test_gradients_are_one_operation_of_three_launches(recorder, with_logsumexp):
    primals, made = gradients(recorder, with_logsumexp)
    assert kernels(recorder.plans[-1]) == ["flash_backward_rows", "flash_backward", "flash_backward_finish"]
    assert [x.shape for x in made] == [x.shape for x in primals]


def test_the_backward_kernel_adds_to_dq_in_place(recorder):
    gradients(recorder, False)
    outputs = len(recorder.plans[-1].shapes)
    assert [len(step[-2]) for step in recorder.plans[-1].steps] == [2, 4, 1]
    assert sum(len(step[-2]) for step in recorder.plans[-1].steps) == outputs + 2  # dQ's sums and the row numbers twice


def test_every_kernel_gets_the_parameters_of_its_signature(recorder):
    gradients(recorder, True)
    call(1, 5000)
    for _, program, *_, arguments in (step for plan in recorder.plans for step in plan.steps):
        assert parameter_kinds(arguments) == signature(program), program.name


@pytest.mark.parametrize("largest", [sm90_launch.MAX_SCRATCH, 0])
def test_small_parts_of_few_queries_are_no_arrays(recorder, monkeypatch, largest):
    """They are memory of the launcher; large ones, and those that another launch reads, are arrays."""
    monkeypatch.setattr(sm90_launch, "MAX_SCRATCH", largest)
    call(1, 5000)
    plan = next(plan for plan in recorder.plans if not plan.label)  # the one of calls without a gradient
    (step,) = plan.steps
    sizes = [argument[1] for argument in step[7] if argument[0] == SCRATCH]
    blocks = step[2]
    parts = 4 * (blocks * sm90_launch.Decode(64, False, "bf16", False, False, "sm_90a").part_floats + 2 * 2)
    assert sizes == ([parts] if largest else [])
    assert plan.shapes == ([[1, 4, 1, 64]] if largest else [[1, 4, 1, 64], [parts // 4]])
    assert step[6] == ([3] if largest else [3, 4])
    call(300, 300)
    assert not [a for step in recorder.plans[-1].steps for a in step[7] if a[0] == SCRATCH]


@pytest.mark.parametrize("with_logsumexp", [False, True])
def test_under_vmap_the_axis_becomes_part_of_the_batch(recorder, with_logsumexp):
    call(300, 300, with_logsumexp=with_logsumexp)
    label = recorder.plans[-1].label
    q, k = mx.zeros((1, 4, 5, 300, 64), mx.bfloat16), mx.zeros((1, 2, 300, 64), mx.bfloat16)
    output, logsumexp, _ = recorder.batched(label, [q, k, k], [2, -1, -1])
    assert (output.shape, logsumexp.shape) == ((5, 1, 4, 300, 64), (5, 1, 4, 300))
    assert kernels(recorder.plans[-1]) == ["flash_forward"]
    assert recorder.plans[-1].shapes[0] == [5, 4, 300, 64]


def test_gradients_under_vmap_are_one_operation_too(recorder):
    gradients(recorder, False)
    rows = mx.zeros((5, 1, 4, 300))
    q, k = mx.zeros((5, 1, 4, 300, 64), mx.bfloat16), mx.zeros((1, 2, 300, 64), mx.bfloat16)
    made = recorder.batched(
        recorder.plans[-1].label, [q, k, k, q, q, mx.stack([rows, rows], -1), rows], [0, -1, -1, 0, 0, 0, 0]
    )
    assert [x.shape for x in made] == [(5, 1, 4, 300, 64), (5, 1, 2, 300, 64), (5, 1, 2, 300, 64)]
    assert kernels(recorder.plans[-1]) == ["flash_backward_rows", "flash_backward", "flash_backward_finish"]


def test_a_gradient_has_no_gradient(recorder):
    gradients(recorder, False)
    with pytest.raises(ValueError, match="no second derivative"):
        recorder.gradient(recorder.plans[-1].label, [], [], [])


@pytest.mark.parametrize("scale", [1e-300, 1e-46, 1e300])
def test_scales_outside_float32_become_the_nearest(scale):
    factor = struct.unpack("f", struct.pack("i", launch.scalars_of(CallParams(scale, False, None, None))[0]))[0]
    assert factor == (2.0**-126 if scale < 1 else 2.0**126)


def test_a_softcap_beyond_what_tanh_can_say_goes_elsewhere(recorder):
    q = mx.zeros((1, 2, 300, 64), mx.bfloat16)
    with pytest.raises(KernelUnavailable, match="softcap of up to 11000"):
        path.attend(q, q, q, scale=0.125, mask=Mask(), softcap=1e5)
    with pytest.raises(ValueError, match="softcap is at most 11000"):
        cuda.flash_attention(q, q, q, scale=0.125, softcap=1e5)


def test_a_shape_is_decided_once(recorder):
    for _ in range(3):
        call(300, 300)
    assert len(recorder.plans) == 2  # with and without what a gradient would need


def test_without_a_gradient_no_logsumexp_is_made(recorder):
    call(300, 300)
    whole = recorder.plans[-1]
    assert [len(plan.shapes) for plan in recorder.plans] == [1, 3]
    assert whole.untraced is not None


def test_the_launcher_keeps_calls_until_they_are_forgotten(recorder, monkeypatch):
    monkeypatch.setattr(launcher, "is_plan", lambda made: True)
    call(300, 300)
    monkeypatch.setattr(cuda, "_attend", lambda *_: pytest.fail("looked up again"))
    call(300, 300)
    cuda.forget_calls()
    assert recorder.calls == {}


def test_keys_in_two_arrays_take_two_launches(recorder):
    shape, groups = CallShape(1, 8, 4, 300, 512, 128, "bf16"), (1, 3)
    placement = peers.Placement(150, (0, 212), (0, peers.FAR, 128, peers.FAR + 128))
    peers.attend_plan(shape, CallParams(0.1, True, None, None), placement, groups, True)
    [plan] = recorder.plans
    assert plan.shapes == [[1, 8, 300, 128], [1, 8, 300]]
    outputs = [max(step[6]) for step in plan.steps]
    assert outputs[0] == outputs[1]  # both launches write the same arrays
    for first, heads, (_, program, *_, arguments) in zip((0, 1), groups, plan.steps, strict=True):
        assert dict(program.constants)["GATHERED"] == 1
        assert parameter_kinds(arguments) == signature(program)
        maps = [argument for argument in arguments if argument[0] == MAP]
        assert [one[1] for one in maps] == [0, 1, 2, 3, 4]  # q, own k and v, other ranks' k and v
        assert [one[6] for one in maps] == [2 * first, first, first, first, first]  # the head at which each begins
        written = [argument for argument in arguments if argument[0] == POINTER and len(argument) > 2]
        assert [one[3] for one in written] == [2 * first] * 2
        numbers = [argument[1] for argument in arguments if argument[0] == NUMBER]
        assert numbers[:5] == [2 * heads, 2 * heads, 2, 300, 512]
        assert numbers[-3:] == [150, 0, 212]
