"""Every head dim and type, the features in turn, random lengths: clean, and right by FlashAttention 3's rule."""

import random
import zlib

import mlx.core as mx
import pytest
from kernels_case import KINDS, problems
from kernels_device import Device, needs_verifier, on_a_mac

from attention.kernels.metal import launch
from attention.kernels.metal.call import Call, Shape
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES
from attention.kernels.metal.traffic import traffic
from attention.measure.accuracy import Judge
from attention.workload import Workload

pytestmark = pytest.mark.slow

MOST = 200
"""Queries and keys at most; of wide heads fewer on average, since every thread of every tile is run."""
CASES = [
    (head_dim, dtype, list(KINDS)[(row + 3 * column + turn) % len(KINDS)])
    for row, head_dim in enumerate(HEAD_DIMS)
    for column, dtype in enumerate(SIZES)
    for turn in range(0, len(KINDS), 2)
]
"""Half of the kinds for each head dim and type, so chosen that each dim and each type meets them all."""


def lengths(name: str, head_dim: int) -> tuple[int, int]:
    """Random lengths from 1 to 200, the same in every run."""
    draw = random.Random(zlib.crc32(name.encode()))
    longest = MOST if draw.random() < 0.3 and head_dim <= 96 else 6400 // head_dim
    return draw.randint(1, min(MOST, longest)), draw.randint(1, min(MOST, longest))


@pytest.mark.parametrize(("head_dim", "dtype", "kind"), CASES)
def test_forward_and_gradients_are_right_and_clean(head_dim, dtype, kind):
    queries, keys = lengths(f"{head_dim} {dtype} {kind}", head_dim)
    shape = Shape(1, 2, 1, queries, keys, head_dim, dtype)
    turned = (queries + keys) % 2 == 1
    with on_a_mac(Device(reversed_schedule=turned, misaligned=turned)):
        assert problems(shape, KINDS[kind].call(head_dim)) == []


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", SIZES)
def test_few_queries_are_right_and_clean(head_dim, dtype):
    shape = Shape(1, 4, 2, 1 + head_dim // 32, 540, head_dim, dtype)
    kind = list(KINDS)[(head_dim // 8 + len(dtype)) % len(KINDS)]
    with on_a_mac(Device(reversed_schedule=True)) as device:
        assert problems(shape, KINDS[kind].call(head_dim), backward=False) == []
        assert [one.kernel for one in device.launches] == ["forward", "join"]


@needs_verifier
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_traffic_and_products_are_those_of_the_arithmetic(head_dim, dtype):
    call = Call(0.1, causal=True, window=21, mask="bool")
    for shape in (Shape(1, 2, 1, 34, 41, head_dim, dtype), Shape(1, 4, 2, 2, 530, head_dim, dtype)):
        with on_a_mac(Device()) as device:
            problems(shape, call)
        parts = launch.splitting(shape, call) if shape.few else (1, None)
        for one in (one for one in device.launches if one.kernel != "join"):
            few = shape.few and one.kernel == "forward"
            expected = traffic("decode", shape, call, *parts) if few else traffic(one.kernel, shape, call)
            assert {name: one.counts.reads[name] for name in expected.reads} == expected.reads
            assert one.counts.products == expected.products


@pytest.mark.parametrize("mask", ["none", "causal", "window:17"])
@pytest.mark.parametrize("dtype", SIZES)
def test_the_engines_own_judge_agrees(mask, dtype):
    workload = Workload(seq=70, kv_seq=83, heads=4, kv_heads=2, head_dim=64, dtype=dtype, mask=mask, pass_="training")
    shape = Shape(1, 4, 2, 70, 83, 64, dtype)
    call = Call(workload.scale, workload.causal, workload.window)
    mx.random.seed(2)
    sizes = ((1, 4, 70, 64), (1, 2, 83, 64), (1, 2, 83, 64), (1, 4, 70, 64))
    q, k, v, d_o = (mx.random.normal(size).astype(getattr(mx, dtype)) for size in sizes)
    with on_a_mac(Device()):
        outputs = launch.forward(q, k, v, launch.absent(4), launch.absent(1), shape, call)
        made = launch.backward((q, k, v), outputs, d_o, None, launch.absent(4), shape, call)
    assert Judge(workload, [q, k, v, d_o]).check([outputs[0], *made[:3]]).accurate
