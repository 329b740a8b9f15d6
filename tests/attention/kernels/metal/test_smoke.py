"""A few kernels of each kind, run thread by thread: the part that every test run can afford."""

import time

import mlx.core as mx
import pytest

from attention.core.kv_format import parse_kv_format
from attention.kernels.metal import launch, selfcheck
from attention.kernels.metal.call import CallShape
from tests.support.metal.case import KINDS, Kind, problems
from tests.support.metal.device import Device, needs_verifier, on_a_mac

IN_ALL = ("window", "softcap", "additive mask", "sinks")
"""Kinds whose feature "all at once" has too; each is a text of its own to compile."""


@pytest.fixture
def device():
    with on_a_mac(Device()) as made:
        yield made


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in IN_ALL else kind for kind in KINDS]
)
def test_forward_and_gradients_are_right_and_clean(device, kind):
    assert problems(CallShape(1, 4, 2, 37, 51, 64, "float16"), KINDS[kind]) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_are_right_too(device, dtype):
    assert problems(CallShape(1, 2, 1, 35, 40, 32, dtype), KINDS["causal"]) == []


@pytest.mark.slow
def test_the_largest_head_dim_in_the_largest_type_is_right(device):
    assert problems(CallShape(1, 1, 1, 34, 19, 256, "float32"), KINDS["causal"]) == []


def test_few_queries_have_their_keys_split_and_joined(device):
    shape = CallShape(1, 4, 2, 3, 600, 64, "bfloat16")
    assert problems(shape, KINDS["all at once"], backward=False) == []
    assert [one.kernel for one in device.launches] == ["forward", "join"]


def test_forward_of_128_queries_takes_less_than_a_second(device):
    shape = CallShape(1, 1, 1, 128, 128, 64, "float16")
    assert problems(shape, Kind(), backward=False) == []  # and the text is compiled now
    started = time.process_time()
    assert problems(shape, Kind(), backward=False) == []
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        pytest.param(192, "float32", marks=pytest.mark.slow),
        (64, "float16"),
        pytest.param(96, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_queries_of_a_single_key_have_no_gradient(device, head_dim, dtype):
    shape = CallShape(1, 2, 1, 41, 50, head_dim, dtype)
    call = Kind(causal=True, window=1).call(head_dim, dtype)
    given = selfcheck.inputs(shape, call)
    arrays = given.arrays(shape)
    outputs = launch.forward(arrays, shape, call)
    d_q, d_k, d_v, _ = launch.backward(arrays, outputs, given.cotangent, None, shape, call)
    assert not mx.any(d_q != 0)
    assert not mx.any(d_k != 0)
    assert mx.all(mx.any(d_v[:, :, 9:] != 0, axis=-1))


@needs_verifier
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float16", "all at once"),
        *(pytest.param(dtype, "all at once", marks=pytest.mark.slow) for dtype in ("float32", "bfloat16")),
        pytest.param("float16", "full", marks=pytest.mark.slow),
    ],
)
def test_address_spaces_are_right_and_buffers_few_enough(device, dtype, kind):
    """For arguments that a call lacks, fewest for the kind "full", the source has a number in constant memory."""
    from tests.support.metal.needs_verifier import address_spaces

    for queries in (40, 2):
        problems(CallShape(1, 4, 2, queries, 530, 64, dtype), KINDS[kind])
    problems(CallShape(1, 4, 2, 2, 40, 64, dtype, parse_kv_format("int4+mxfp8")), KINDS[kind], backward=False)
    assert {one.kernel for one in device.launches} == set(launch.INPUTS)
    for one in device.launches:
        assert address_spaces(one.text) == []
        assert one.text.count("[[buffer(") <= 31  # as many as Metal has
    dense = device.launches[0].text
    assert address_spaces(dense.replace("const device T* data", "threadgroup T* data"))


@pytest.mark.thorough
def test_no_launch_is_cut_off_at_the_grids_edge(device):
    problems(CallShape(2, 4, 2, 45, 70, 64, "float16"), KINDS["full"])
    problems(CallShape(2, 4, 2, 1, 520, 64, "float16"), KINDS["full"], backward=False)
    assert len(device.launches) == 5
    for one in device.launches:
        pairs = zip(one.keywords["grid"], one.keywords["threadgroup"], strict=True)
        assert all(size % part == 0 for size, part in pairs)


def test_texts_are_ascii_as_mlx_needs_them():
    texts = {"common"}.union(*(launch.SOURCES.get(name, (name,)) for name in launch.INPUTS))
    assert all(launch.source(text).isascii() for text in texts)
