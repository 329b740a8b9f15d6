"""Rows appended to quantized buffers are those of mx.quantize, and are written in place where nobody else looks."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from attention.core.kv_format import Format, parse_kv_format
from attention.kernels import append
from attention.kernels.append import append_quantized, quantize
from tests.support.cpu_calls import laid_out
from tests.support.quantized_values import FORMATS

pytestmark = pytest.mark.usefixtures("kernel")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def buffers_for(x, form, capacity):
    parts = quantize(x, form)
    return [mx.random.randint(0, 99, (*p.shape[:2], capacity, p.shape[3])).astype(p.dtype) for p in parts]


def values(kind, shape, seed=0):
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        return x * np.exp2(random.integers(-12, 12, shape)).astype(np.float32)
    if kind == "ties":
        return random.integers(-9, 9, shape).astype(np.float32) / 4
    if kind == "zero and tiny":
        return x * np.float32([[0], [1e-36]])
    return x


def same_bits(a, b):
    return np.array_equal(np.array(mx.contiguous(a).view(mx.uint8)), np.array(mx.contiguous(b).view(mx.uint8)))


@pytest.mark.sampled(0.2)
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "zero and tiny"])
def test_rows_are_those_of_mx_quantize(text, kind):
    form = parse_kv_format(text)
    for dtype in DTYPES:
        keys = mx.array(values(kind, (2, 3, 2, 128))).astype(dtype)
        rows = mx.array(values(kind, (2, 3, 2, 256), seed=1)).astype(dtype)
        buffers = buffers_for(keys, form.key, 9), buffers_for(rows, form.value, 9)
        before = [[mx.array(part) for part in parts] for parts in buffers]
        assert append._is_fused(form, keys, rows, buffers)
        (whole, views) = append_quantized(buffers, keys, rows, form, row=4, used=7)
        for x, old, full, view in zip((keys, rows), before, whole, views, strict=True):
            for new, held, one, seen in zip(quantize(x, form.key), old, full, view, strict=True):
                held[:, :, 4:6] = new
                assert same_bits(one, held)
                assert same_bits(seen, held[:, :, :7])


@pytest.mark.parametrize("layout", [1, 2, 3])
def test_rows_in_any_layout(layout):
    form = parse_kv_format("int6:32+nvfp4")
    keys, rows = (mx.array(values("normal", (2, 3, 40, 64), seed)) for seed in (0, 1))
    buffers = buffers_for(keys, form.key, 64), buffers_for(rows, form.value, 64)
    given = laid_out(keys, layout), laid_out(rows, layout)
    whole, _ = append_quantized(buffers, *given, form, row=24, used=64)
    for x, one, full in zip((keys, rows), (form.key, form.value), whole, strict=True):
        assert all(same_bits(a[:, :, 24:], b) for a, b in zip(full, quantize(x, one), strict=True))


def step(buffers, row, form, seed=0):
    keys, rows = (mx.random.normal((1, 8, 1, 128), key=mx.random.key(seed + i)) for i in range(2))
    return append_quantized(buffers, keys, rows, form, row=row, used=row + 1)


@pytest.fixture
def large():
    form = parse_kv_format("int8:32")
    x = mx.zeros((1, 8, 1, 128))
    buffers = [mx.contiguous(part + 1) for part in buffers_for(x, form.key, 8000)]
    mx.eval(buffers)
    return [*buffers], [*map(mx.array, buffers)], form


def test_buffers_are_overwritten_in_place(large):
    *buffers, form = large
    size = sum(part.nbytes for parts in buffers for part in parts)
    buffers = step(buffers, 4, form)[0]  # copies: the fixture has the buffers, too
    mx.eval(buffers)
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for row in range(5, 9):
        buffers, views = step(buffers, row, form)
        mx.eval(buffers, views)
        del views
    assert mx.get_peak_memory() - start < size / 10


def test_a_view_of_old_rows_keeps_them(large):
    *buffers, form = large
    buffers, views = step(buffers, 5, form)
    mx.eval(buffers, views)
    old = views[0][0]
    before = np.array(old)
    buffers, views = step(buffers, 5, form, seed=7)
    mx.eval(buffers, views)
    assert np.array_equal(np.array(old), before)
    assert not np.array_equal(np.array(views[0][0]), before)


def test_another_array_of_the_buffer_keeps_its_rows(large):
    *buffers, form = large
    old = buffers[0][0]
    before = np.array(old)
    buffers, _ = step(buffers, 5, form)
    mx.eval(buffers)
    assert np.array_equal(np.array(old), before)


def test_steps_in_one_evaluation(large):
    *buffers, form = large
    expected = []
    for row in range(3):
        buffers, views = step(buffers, row, form, seed=row)
        expected.append([part[:, :, row : row + 1] for parts in views for part in parts])
    made = [part for parts in buffers for part in parts]
    mx.eval(made, expected)
    for row, parts in enumerate(expected):
        assert all(same_bits(a[:, :, row : row + 1], b) for a, b in zip(made, parts, strict=True))


def test_it_is_one_operation(large, tmp_path: Path):
    *buffers, form = large
    _, views = step(buffers, 5, form)
    made = [part.sum() for parts in views for part in parts]
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), *made)
    assert file.read_text().count('label ="FatuiAppendQuantized"') == 1
    assert "Slice" not in file.read_text()


def test_mlx_operations_where_mlx_rounds_otherwise(large, monkeypatch):
    *buffers, form = large
    fused, _ = step(buffers, 5, form)
    mx.eval(fused)
    monkeypatch.setattr(append, "_rounds_alike", lambda *_: False)
    *buffers, form = large
    copies = [[mx.array(part) for part in parts] for parts in buffers]
    plain, views = step(copies, 5, form)
    assert all(
        same_bits(a[:, :, 5], b[:, :, 5]) for x, y in zip(fused, plain, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert views[0][0].shape[2] == 6


def test_rows_that_do_not_fit(large):
    *buffers, form = large
    with pytest.raises(ValueError, match="rows 8000 to 8001 of 8000"):
        step(buffers, 8000, form)
    narrow = [mx.zeros((1, 8, 1, 64))] * 2
    with pytest.raises(ValueError, match="do not fit a buffer"):
        append_quantized(buffers, *narrow, form, row=0, used=1)


def test_vmap_is_refused(large):
    *buffers, form = large
    with pytest.raises(ValueError, match="no vmap"):
        mx.eval(
            mx.vmap(lambda x: append_quantized(buffers, x, x, form, row=0, used=1)[0][0][0])(
                mx.zeros((2, 1, 8, 1, 128))
            )
        )


def test_scales_of_another_dtype_take_mlx_operations(large):
    *buffers, form = large
    x = mx.zeros((1, 8, 1, 128), mx.bfloat16)
    whole, _ = append_quantized(buffers, x, x, form, row=0, used=1)
    assert whole[0][1].dtype == mx.float32


def test_formats_are_tried_once():
    assert append._rounds_alike(Format("affine", 4, 64), mx.float16)
    before = append._rounds_alike.cache_info().misses
    append._rounds_alike(Format("affine", 4, 64), mx.float16)
    assert append._rounds_alike.cache_info().misses == before
