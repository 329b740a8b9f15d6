"""The verifier's counts match the table of tiles: bytes from global memory, products, barriers, memory."""

from dataclasses import replace

import pytest

from attention.core.kv_format import parse_kv_format
from attention.kernels.metal import launch, selfcheck
from attention.kernels.metal.call import CallParams, CallShape, specialisation
from attention.kernels.metal.tiles import HEAD_DIMS, SIZES
from benchmarks.metal.traffic import traffic
from tests.support.block_lists import random_pairs
from tests.support.metal.case import KINDS, LISTED, Kind, problems, problems_of, with_lists
from tests.support.metal.device import Device, Launched, needs_verifier, on_a_mac

pytestmark = needs_verifier
SHAPES = {"many queries": (2, 4, 2, 45, 70), "few queries": (1, 4, 2, 2, 530)}
"""Batch, heads, key heads, queries, keys."""
WINDOW_AND_MASK = KINDS["all at once"]


def check(one: Launched, shape: CallShape, call: CallParams, seen: selfcheck.Bools | None = None) -> None:
    name = one.kernel.removesuffix("_quantized")
    few = shape.few and name == "forward"
    kind = "decode" if few else name
    expected = traffic(kind, shape, call, *(launch.key_split(shape, call) if few else ()), seen=seen)
    assert {name: one.counts.reads[name] for name in expected.reads} == expected.reads
    assert {name: n for name, n in one.counts.writes.items() if n} == expected.writes
    assert one.counts.products == expected.products
    assert one.counts.barriers == expected.barriers
    assert one.counts.threadgroup_bytes == specialisation(kind, shape, call).tile.threadgroup_bytes


def launches(shape: CallShape, kind: Kind) -> list[Launched]:
    with on_a_mac(Device()) as device:
        assert problems(shape, kind, backward=shape.kv_format is None) == []
    return [one for one in device.launches if one.kernel != "join"]


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("kind", [KINDS["full"], WINDOW_AND_MASK], ids=["full", "window and mask"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "float16"), pytest.param(256, "float32", marks=pytest.mark.slow)])
def test_counts_are_those_of_the_arithmetic(head_dim, dtype, shape, kind):
    whole = CallShape(*SHAPES[shape], head_dim, dtype)
    for one in launches(whole, kind):
        check(one, whole, kind.call(head_dim, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kv_format",
    ["int3:32+mxfp8", *(pytest.param(text, marks=pytest.mark.slow) for text in ("int6+int5:32", "nvfp4+int2"))],
)
def test_quantized_rows_are_read_in_words(shape, kv_format):
    whole, kind = CallShape(*SHAPES[shape], 64, "float16", parse_kv_format(kv_format)), KINDS["causal"]
    for one in launches(whole, kind):
        check(one, whole, kind.call(64, "float16"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", SIZES)
def test_so_they_are_at_every_head_dim_and_type(dtype, head_dim, shape):
    whole, kind = CallShape(*SHAPES[shape], head_dim, dtype), KINDS["window"]
    for one in launches(whole, kind):
        check(one, whole, kind.call(head_dim, dtype))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "planes", "head_dim", "dtype"),
    [
        ("lists of heads", (1, 4), 64, "float16"),
        pytest.param("lists of batches", (2, 1), 128, "float16", marks=pytest.mark.slow),
        pytest.param("lists", (1, 1), 256, "float32", marks=pytest.mark.slow),
        pytest.param("lists", (2, 4), 96, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_counts_with_block_lists_are_those_of_their_blocks(kind, planes, head_dim, dtype):
    """The lengths are multiples of every block: past the ends the bits are random, and could keep a block."""
    shape, call = CallShape(planes[0], 4, 2, 96, 160, head_dim, dtype), LISTED[kind].call(head_dim, dtype)
    seen = random_pairs((*planes, shape.queries, shape.keys))
    given = with_lists(selfcheck.inputs(shape, replace(call, lists=False)), seen)
    with on_a_mac(Device()) as device:
        assert problems_of(given, shape, call) == []
    for one in device.launches:
        check(one, shape, call, seen)
