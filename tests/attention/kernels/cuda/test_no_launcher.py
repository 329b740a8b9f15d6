"""Calls without a compiled launcher: each kernel through MLX's own operation; needs no GPU."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from attention.kernels import cuda
from attention.kernels.cuda.portable import launch
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import POINTER
from tests.support.cuda_planted import planted, signature


@pytest.fixture
def on(monkeypatch):
    yield from planted(monkeypatch)


@pytest.fixture
def launched(on, monkeypatch):
    """The arguments of MLX's own operation, one kernel at a time."""
    on("A100")
    made = []

    def operation(*, inputs, compiled_source, output_shapes, output_dtypes, scalars, **_):
        made.append(SimpleNamespace(program=compiled_source, arrays=len(inputs) + len(output_shapes), scalars=scalars))
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", operation, raising=False)
    for ask in ("known_obstacle", "unavailable_reason"):
        monkeypatch.setattr(launcher, ask, lambda: "there is no C++ compiler")
    return made


def arrays_of(queries):
    return [
        mx.zeros((2, heads, length, dim), mx.bfloat16)
        for heads, length, dim in ((4, queries, 64), (2, 300, 64), (2, 300, 128), (4, queries, 128))
    ]


@pytest.mark.parametrize("queries", [300, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_get_their_signatures_parameters(launched, queries, masked):
    *primals, cotangent = arrays_of(queries)
    mask = [mx.zeros((2, 4, queries, 300), mx.float16)] if masked else []

    def attend(q, k, v, *mask):
        return cuda.flash_attention(q, k, v, scale=0.1, mask=mask[0] if mask else None)

    outputs, made = mx.vjp(attend, [*primals, *mask], [cotangent])
    assert outputs[0].shape == cotangent.shape
    assert [x.shape for x in made] == [x.shape for x in (*primals, *mask)]
    backward = ["flash_general_rows", "flash_general_backward", "flash_general_finish"]
    names = [each.program.name for each in launched]
    assert (names[0], names[-3:]) == ("flash_general", backward)
    assert queries > 2 or names[1] == "flash_general_join"
    for each in launched:
        kinds = signature(each.program)
        assert kinds == [POINTER] * each.arrays + kinds[each.arrays :], each.program.name
        assert len(kinds) == each.arrays + len(each.scalars), each.program.name


@pytest.mark.compiles
def test_a_shape_is_replayed_from_its_third_call_on(launched):
    q, k, v, _ = arrays_of(300)
    for calls in (1, 2, 3, 3, 3):
        cuda.flash_attention(q, k, v, scale=0.1)
        assert len(launched) == calls


def test_strides_passed_to_kernels_are_those_of_dense_arrays():
    shape, call = CallShape(2, 4, 2, 30, 70, 64, "bf16", 128), CallParams(0.1, False, None, None, "bool")
    sizes = [(2, 4, 30, 64), (2, 2, 70, 64), (2, 2, 70, 128), (2, 4, 30, 128)]
    strides = [step for size in sizes for step in np.zeros(size, np.int8).strides[:3]]
    mask = np.zeros((2, 4, 30, 70), np.int8).strides
    assert launch.dense_strides(shape, call, "qkvo") == [*strides, *mask]
    with pytest.raises(cuda.KernelUnavailable, match="arrays this large"):
        launch.dense_strides(replace(shape, queries=2**16, keys=2**15), call, "qkv")
