"""The meaning of each construct in the Metal emulation, in kernels of a few lines."""

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.metal import needs_verifier  # noqa: F401  skips where nothing can be compiled
from tests.support.metal.verifier import Finding, verify

COUNT = mx.arange(64).astype(mx.float32)
STORE = """
  threadgroup float s[64];
  simdgroup_float8x8 m = simdgroup_float8x8(3.0f);
  simdgroup_store(m, s, 8);
  {between}
  uint l = thread_index_in_simdgroup;
  y[l] = s[l * 2];
  y[l + 32] = s[l * 2 + 1];
"""
ATOMIC = "uint i = thread_position_in_grid.x; atomic_fetch_add_explicit(&y[i % 2], x[i], memory_order_relaxed);"
WIDE = (
    "uint i = thread_position_in_grid.x;"
    "if (i < 16) {{ float4 v = *(const device float4*)(x + 4 * i{at}); y[i] = v.x; }}"
)


def run(
    source: str, size: int, threads: int = 32, group: int = 32, made: Any = None, **call: Any
) -> np.ndarray[Any, Any]:
    kernel = mx.fast.metal_kernel(name="probe", input_names=["x"], output_names=["y"], source=source, **(made or {}))
    launched = verify(
        kernel,
        ["x"],
        [call.pop("x", COUNT)],
        output_names=["y"],
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        **call,
    )
    return np.array(launched.outputs[0])


def test_a_stored_matrix_is_there_after_a_simdgroup_s_barrier() -> None:
    output = run(STORE.format(between="simdgroup_barrier(mem_flags::mem_threadgroup);"), 64)
    diagonal = (3 * np.eye(8)).ravel()
    assert np.array_equal(output, np.concatenate([diagonal[0::2], diagonal[1::2]]))


def test_atomics_add_up_and_are_no_race() -> None:
    output = run(ATOMIC, 2, 64, made={"atomic_outputs": True}, init_value=0)
    assert output.tolist() == [sum(range(0, 64, 2)), sum(range(1, 64, 2))]


@pytest.mark.slow
def test_an_uneven_grid_ends_with_a_smaller_threadgroup() -> None:
    output = run("y[thread_position_in_grid.x] = threads_per_threadgroup.x;", 40, 40)
    assert output.tolist() == [32] * 32 + [8] * 8


@pytest.mark.slow
def test_sums_and_maxima_are_those_of_the_whole_simdgroup() -> None:
    output = run(
        "float v = x[thread_position_in_grid.x]; y[thread_position_in_grid.x] = simd_sum(v) + simd_max(v);", 32
    )
    assert output.tolist() == [496 + 31] * 32


@pytest.mark.slow
@pytest.mark.parametrize("x", [COUNT.reshape(8, 8).T, mx.broadcast_to(COUNT[:8], (8, 8))], ids=["turned", "stride 0"])
def test_strides_reach_the_kernel_as_they_are(x: mx.array) -> None:
    source = "uint e = thread_position_in_grid.x; y[e] = x[elem_to_loc(e, x_shape, x_strides, x_ndim)];"
    output = run(source, 64, 64, x=x, made={"ensure_row_contiguous": False})
    assert np.array_equal(output, np.array(x).ravel())


BYTES = """
  threadgroup uchar b[64];
  uint i = thread_index_in_threadgroup;
  b[i] = uchar(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = b[63 - i];
"""
HALVES = """
  threadgroup half2 h[32];
  uint i = thread_index_in_threadgroup;
  if (i % 2 == 0) h[i / 2].x = half(i); else h[i / 2].y = half(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = i % 2 == 0 ? h[i / 2].y : h[i / 2].x;
"""
TABLE = "constant constexpr float TABLE[4] = {3, 1, 4, 1};"
OTHERS = """
  threadgroup float s[64];
  uint i = thread_index_in_threadgroup;
  s[i] = x[i];
  {barrier}(mem_flags::mem_threadgroup);
  y[i] = s[{read}];
"""
"""A value from another thread: of the same simdgroup or of the other."""
AGAIN = """
  threadgroup float s[32];
  uint i = thread_index_in_threadgroup;
  if (threadgroup_position_in_grid.x == 0) s[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[thread_position_in_grid.x] = s[31 - i];
"""
POINTER = "threadgroup float s[64]; threadgroup float* p = s; uint i = thread_index_in_threadgroup; y[i] = p[i + 64];"
PLAIN = "if (i == 0) atomic_store_explicit(&y[2], *(device float*)&y[0], memory_order_relaxed);"
FROM_EACH = "uint g = threadgroup_position_in_grid.x; float v = y[0]; y[1 + g] = v; if (g == 2) y[0] = v + 1;"
WHOLE = {"threads": 64, "group": 64}
ATOMICS = {"threads": 64, "made": {"atomic_outputs": True}, "init_value": 0}
PEEK = "uint i = thread_position_in_grid.x; "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "header", "expected"),
    [
        (BYTES, "", list(range(63, -1, -1))),
        (HALVES, "", [i ^ 1 for i in range(64)]),
        (f"{PEEK} y[i] = TABLE[i % 4];", TABLE, [3, 1, 4, 1] * 16),
        (OTHERS.replace("{barrier}", "simdgroup_barrier").replace("{read}", "i ^ 31"), "", [i ^ 31 for i in range(64)]),
        (OTHERS.replace("{barrier}", "threadgroup_barrier").replace("{read}", "63 - i"), "", list(range(63, -1, -1))),
        (f"{PEEK} y[i] = simd_prefix_inclusive_sum(1.0f) + simd_shuffle_up(x[i], 1);", "", None),
    ],
    ids=["bytes", "parts of vectors", "a table", "within a simdgroup", "across simdgroups", "scans and shuffles"],
)
def test_what_is_allowed_is_not_found(source, header, expected):
    output = run(source, 64, 64, 64, made={"header": header})
    if expected is None:
        lanes = [i % 32 for i in range(64)]
        expected = [lane + 1 + i - (1 if lane else 0) for i, lane in enumerate(lanes)]
    assert output.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "source", "size", "call"),
    [
        ("race", STORE.format(between=""), 64, {}),
        ("race", STORE.format(between="simdgroup_barrier(mem_flags::mem_none);"), 64, {}),
        ("race", "uint i = thread_position_in_grid.x; y[i % 2] += x[i];", 2, {"threads": 64, "init_value": 0}),
        ("uninitialised read", "uint i = thread_position_in_grid.x; y[i] += x[i];", 64, {"threads": 64}),
        ("misaligned", WIDE.format(at=" + 1"), 16, {"x": mx.zeros((128,))}),
        ("misaligned", WIDE.format(at=""), 16, {"is_misaligned": True}),
        (
            "divergence",
            "if (simdgroup_index_in_threadgroup == 0) threadgroup_barrier(mem_flags::mem_threadgroup);"
            "y[thread_position_in_grid.x] = 1;",
            64,
            {"threads": 64, "group": 64},
        ),
        (
            "divergence",
            "simdgroup_float8x8 m = simdgroup_float8x8(1.0f); simdgroup_multiply_accumulate(m, m, m, m);"
            "y[thread_position_in_grid.x] = m.thread_elements()[0];",
            40,
            {"threads": 40},
        ),
        (
            "out-of-bounds",
            "float t[4]; for (int i = 0; i < 4; i++) t[i] = i;"
            "y[thread_position_in_grid.x] = t[int(x[thread_position_in_grid.x])];",
            32,
            {},
        ),
        ("race", OTHERS.replace("{barrier}", "simdgroup_barrier").replace("{read}", "63 - i"), 64, WHOLE),
        ("race", FROM_EACH, 4, {"threads": 3, "group": 1, "init_value": 0}),
        ("race", ATOMIC + PLAIN, 3, ATOMICS),
        ("uninitialised read", AGAIN, 64, {"threads": 64}),
        ("out-of-bounds: threadgroup s", POINTER, 64, WHOLE),
        ("out-of-bounds: x", PEEK + "y[i] = x[i + 64];", 64, WHOLE),
        ("out-of-bounds: y", PEEK + "y[int(i) - 1] = 1;", 64, WHOLE),
        ("wild", PEEK + "((device float*)x)[i] = 1; y[i] = 1;", 64, WHOLE),
        ("arithmetic: integer overflow", PEEK + "y[i] = 2147483600 + int(i);", 64, WHOLE),
        ("arithmetic: division", PEEK + "y[i] = 5 / int(x[i]);", 64, WHOLE),
        ("arithmetic: shift", PEEK + "y[i] = 1 << int(i);", 64, WHOLE),
    ],
)
def test_a_broken_rule_is_found(kind: str, source: str, size: int, call: dict[str, Any]) -> None:
    with pytest.raises(Finding) as found:
        run(source, size, **call)
    assert any(item.startswith(kind) for item in found.value.items), found.value.items


@pytest.mark.slow
def test_a_divergent_operation_is_reported_with_both_lines():
    source = "if (thread_index_in_simdgroup < 9) y[0] = simd_sum(x[0]);\nelse y[1] = simd_max(x[1]);"
    with pytest.raises(Finding) as found:
        run(source, 2)
    (item,) = (item for item in found.value.items if item.startswith("divergence"))
    assert re.search(r"line \d+: `if \(thread_index_in_simdgroup < 9\) .*` and line \d+: `else y\[1\] = ", item)


@pytest.mark.slow
def test_more_buffers_than_metal_has_are_found():
    names = [f"x{n}" for n in range(32)]
    kernel = mx.fast.metal_kernel(
        name="probe", input_names=names, output_names=["y"], source=f"y[0] = {' + '.join(f'{n}[0]' for n in names)};"
    )
    with pytest.raises(Finding, match="33 buffers, Metal takes 31"):
        verify(
            kernel,
            names,
            [COUNT] * 32,
            output_names=["y"],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
