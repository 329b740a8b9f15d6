"""The kernels, a few of each kind, run thread by thread: the part of the whole that every run affords."""

import time

import pytest
from kernels_case import KINDS, problems
from kernels_device import Device, needs_verifier, on_a_mac

from attention.kernels.metal import launch
from attention.kernels.metal.call import Call, Shape
from attention.kernels.metal.traffic import traffic


@pytest.fixture
def device():
    with on_a_mac(Device()) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_right_and_clean(device, kind):
    assert problems(Shape(1, 4, 2, 37, 51, 64, "float16"), KINDS[kind].call(64)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_are_right_too(device, dtype):
    assert problems(Shape(1, 2, 1, 35, 40, 32, dtype), KINDS["causal"].call(32)) == []


def test_the_largest_head_dim_in_the_largest_type_is_right(device):
    assert problems(Shape(1, 1, 1, 34, 19, 256, "float32"), KINDS["causal"].call(256)) == []


def test_few_queries_have_their_keys_split_and_joined(device):
    shape = Shape(1, 4, 2, 3, 600, 64, "bfloat16")
    assert problems(shape, KINDS["all at once"].call(64), backward=False) == []
    assert [one.kernel for one in device.launches] == ["forward", "join"]


def test_forward_of_128_queries_takes_less_than_a_second(device):
    shape, call = Shape(1, 1, 1, 128, 128, 64, "float16"), Call(0.125)
    assert problems(shape, call, backward=False) == []  # and the text is compiled now
    started = time.perf_counter()
    assert problems(shape, call, backward=False) == []
    assert time.perf_counter() - started < 1


@needs_verifier
@pytest.mark.parametrize("kind", ["full", "window", "bool mask"])
def test_traffic_and_products_are_those_of_the_arithmetic(device, kind):
    shape = Shape(2, 4, 2, 45, 70, 64, "float16")
    call = KINDS[kind].call(64)
    problems(shape, call)
    for one in device.launches:
        expected = traffic(one.kernel, shape, call)
        assert {name: one.counts.reads[name] for name in expected.reads} == expected.reads
        assert {name: n for name, n in one.counts.writes.items() if n} == expected.writes
        assert one.counts.products == expected.products


@needs_verifier
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_pointer_is_in_the_wrong_address_space_and_no_buffer_too_many(device, dtype):
    from kernels_verifier import address_space_errors

    for queries in (40, 2):
        problems(Shape(1, 4, 2, queries, 530, 32, dtype), KINDS["all at once"].call(32))
    assert {one.kernel for one in device.launches} == set(launch.INPUTS)
    for one in device.launches:
        assert address_space_errors(one.text) == []
        assert one.text.count("[[buffer(") <= 31  # as many as Metal has
    assert address_space_errors(device.launches[0].text.replace("const device T* keys_at", "threadgroup T* keys_at"))


def test_no_launch_is_cut_off_at_the_grids_edge(device):
    problems(Shape(2, 4, 2, 45, 70, 64, "float16"), KINDS["full"].call(64))
    problems(Shape(2, 4, 2, 1, 520, 64, "float16"), KINDS["full"].call(64), backward=False)
    assert len(device.launches) == 5
    for one in device.launches:
        pairs = zip(one.keywords["grid"], one.keywords["threadgroup"], strict=True)
        assert all(size % part == 0 for size, part in pairs)


def test_texts_are_ascii_as_mlx_needs_them():
    assert all(launch.source(text).isascii() for text in ("common", *launch.INPUTS))
