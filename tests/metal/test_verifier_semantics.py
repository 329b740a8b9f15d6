"""What the stand-in for Metal means by each construct, in kernels of a few lines."""

from typing import Any

import kernels_verifier  # noqa: F401  skips where nothing can be compiled
import mlx.core as mx
import numpy as np
import pytest
from verifier import Finding, verify

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
def test_a_grid_that_is_no_multiple_of_the_threadgroup_ends_with_a_smaller_one() -> None:
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
    ],
)
def test_a_broken_rule_is_found(kind: str, source: str, size: int, call: dict[str, Any]) -> None:
    with pytest.raises(Finding) as found:
        run(source, size, **call)
    assert any(item.startswith(kind) for item in found.value.items), found.value.items
