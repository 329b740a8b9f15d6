"""FlashAttention 3's rule in the kernels' tests accepts plain attention's error, and little more."""

import mlx.core as mx
import pytest

from attention.core.workload import Workload
from attention.kernels.metal import launch, selfcheck
from attention.kernels.metal.call import CallParams, CallShape
from attention.kernels.metal.tiles import SIZES
from attention.measure.accuracy import AccuracyChecker
from tests.support.metal.case import KINDS, Kind
from tests.support.metal.device import Device, on_a_mac
from tests.support.metal.judge import NAMES, plain_results, wrong


def results(kind: Kind, dtype: str):
    shape = CallShape(1, 4, 2, 21, 30, 32, dtype)
    call = kind.call(32, dtype)
    given = selfcheck.inputs(shape, call, logsumexp=kind.logsumexp)
    return given, call, plain_results(given, call)[: 5 if call.sinks else 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SIZES)
def test_plain_attention_passes(dtype, kind):
    given, call, plain = results(KINDS[kind], dtype)
    assert wrong(given, call, plain) == []


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", SIZES)
def test_what_is_off_by_a_few_roundings_does_not(dtype, index):
    given, call, found = results(KINDS["all at once"], dtype)
    found[index] = (
        found[index].astype(mx.float32) * (1 + 30 * 2.0 ** -{"float32": 23, "float16": 10, "bfloat16": 7}[dtype])
    ).astype(found[index].dtype)
    (problem,) = wrong(given, call, found)
    assert problem.startswith(NAMES[index])


def test_what_is_no_number_does_not():
    given, call, found = results(KINDS["causal"], "float16")
    found[2][0, 0, 3, 5] = float("nan")
    assert [problem.partition(":")[0] for problem in wrong(given, call, found)] == ["dK"]


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "causal", "window:17"])
@pytest.mark.parametrize("dtype", SIZES)
def test_the_engines_own_judge_agrees(mask, dtype):
    workload = Workload(seq=70, kv_seq=83, heads=4, kv_heads=2, head_dim=64, dtype=dtype, mask=mask, pass_="training")
    shape = CallShape(1, 4, 2, 70, 83, 64, dtype)
    call = CallParams(workload.scale, workload.causal, workload.window)
    mx.random.seed(2)
    sizes = ((1, 4, 70, 64), (1, 2, 83, 64), (1, 2, 83, 64), (1, 4, 70, 64))
    q, k, v, d_o = (mx.random.normal(size).astype(getattr(mx, dtype)) for size in sizes)
    with on_a_mac(Device()):
        arrays = launch.arrays_of(q, k, v)
        outputs = launch.forward(arrays, shape, call)
        made = launch.backward(arrays, outputs, d_o, None, shape, call)
    assert AccuracyChecker(workload, [q, k, v, d_o]).check([outputs[0], *made[:3]]).accurate
