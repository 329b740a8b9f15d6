"""Correct kernels pass: a small one in both schedules, and MLX's own attention from the headers of its wheel."""

import ctypes
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.metal import (
    needs_verifier,  # noqa: F401  skips where nothing can be compiled
    verifier_example,
)
from tests.support.metal.verifier import address_spaces, generated_text
from tests.support.metal.verifier.building import FLAGS, MLX_HEADERS, build_source
from tests.support.metal.verifier.running import Buffer, launch
from tests.support.metal.verifier.source import place_threadgroup_arrays

KERNELS = MLX_HEADERS / "mlx" / "backend" / "metal" / "kernels"
needs_headers = pytest.mark.skipif(not KERNELS.is_dir(), reason="this build of MLX has no headers of its kernels")
QUIET = (*(flag for flag in FLAGS if not flag.startswith(("-W", "-fsanitize"))), "-w", "-fsanitize=thread")


@pytest.mark.parametrize("is_misaligned", [False, True])
@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize(
    ("shape", "keys", "causal", "dtype", "tolerance"),
    [
        ((1, 2, 77, 64), 77, True, mx.float32, 2e-6),
        pytest.param((1, 1, 45, 128), 70, True, mx.float32, 3e-6, marks=pytest.mark.slow),
        pytest.param((1, 1, 50, 128), 61, False, mx.float16, 1e-3, marks=pytest.mark.slow),
        pytest.param((1, 2, 77, 64), 77, True, mx.bfloat16, 2e-2, marks=pytest.mark.slow),
    ],
)
def test_a_right_kernel_passes_in_both_schedules(shape, keys, causal, dtype, tolerance, is_reversed, is_misaligned):
    arrays = verifier_example.inputs(shape, keys, dtype)
    output = verifier_example.run(arrays, causal, is_reversed=is_reversed, is_misaligned=is_misaligned)[0]
    assert np.abs(np.array(output.astype(mx.float32)) - verifier_example.reference(arrays, causal)).max() < tolerance


def test_address_spaces_are_checked():
    arrays = verifier_example.inputs()
    call = {name: value for name, value in verifier_example.call(arrays[0], True).items() if name != "output_names"}
    text = generated_text(verifier_example.make(), arrays, **call)
    assert address_spaces(text) == []
    assert address_spaces(text.replace("const device T* kp", "T* zz = KVs; const device T* kp"))
    assert address_spaces(text.replace("load_tile<T, BK, D, NT>(kp + k0 * D, KVs", "load_tile<T, BK, D, NT>(Qs, KVs"))


class AttnParams(ctypes.Structure):
    """MLX's steel/attn/params.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("B", "H", "D", "qL", "kL", "gqa_factor")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("NQ", "NK", "NQ_aligned", "NK_aligned", "qL_rem", "kL_rem", "qL_off")),
        *((name, ctypes.c_int64 * 3) for name in ("Q_strides", "K_strides", "V_strides", "O_strides")),
    )


def steel_library(kind: str, block_k: int, dim: int, flags: dict[str, bool]) -> Path:
    text = place_threadgroup_arrays((KERNELS / "steel/attn/kernels/steel_attention.h").read_text())
    attributes = ("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup", "threadgroup_position_in_grid")
    arguments = (
        f"(const {kind}*)B[0], (const {kind}*)B[1], (const {kind}*)B[2], ({kind}*)B[3], (const AttnParams*)B[4], "
    )
    arguments += f"(const AttnMaskParams*)nullptr, (const float*)nullptr, (const {kind}*)nullptr, (float*)B[5], "
    arguments += ", ".join(f"A->{name}" for name in (*attributes, "thread_position_in_threadgroup"))
    settings = " ".join(f"{name} = {str(value).lower()};" for name, value in flags.items())
    call = f"{settings} attention<{kind}, 32, {block_k}, {dim}, {dim}, 4, 1, float, float>({arguments});"
    return build_source(text, call, QUIET)


@needs_headers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kind", "heads", "queries", "keys", "dim", "causal", "tolerance"),
    [
        (np.float32, "float", 2, 128, 128, 64, False, 2e-6),
        (np.float32, "float", 2, 77, 77, 64, True, 2e-6),
        (np.float16, "half", 1, 77, 90, 128, True, 2e-3),
    ],
)
def test_mlx_s_own_steel_attention_passes(dtype, kind, heads, queries, keys, dim, causal, tolerance):
    draw = np.random.default_rng(0)
    sizes = ((heads, queries, dim), (heads, keys, dim), (heads, keys, dim))
    q, k, v = (draw.standard_normal(size).astype(dtype) for size in sizes)
    output, sums = np.zeros_like(q), np.zeros((heads, queries), np.float32)
    block_k = 32 if dim < 128 else 16
    tiles = -(-queries // 32)
    strides = [(heads * length * dim, length * dim, dim) for length in (queries, keys, keys, queries)]
    numbers = (-(-keys // block_k), queries // 32, keys // block_k, queries % 32, keys % block_k, keys - queries)
    params = AttnParams(1, heads, dim, queries, keys, 1, dim**-0.5, tiles, *numbers, *strides)
    aligned = {"align_Q": queries % 32 == 0, "align_K": keys % block_k == 0}
    flags = {**aligned, "do_causal": causal, "has_mask": False, "has_sinks": False, "save_lse": True}
    library = steel_library(kind, block_k, dim, flags)
    buffers = {name: Buffer(each) for name, each in (("Q", q), ("K", k), ("V", v))}
    buffers |= {
        "O": Buffer(output, is_output=True, is_initialised=False),
        "params": Buffer(np.frombuffer(bytes(params), np.uint8).copy()),
    }
    buffers["lse"] = Buffer(sums, is_output=True, is_initialised=False)
    launch(library, buffers, (32 * tiles, 4 * heads, 1), (32, 4, 1))
    arrays = [*(mx.array(each[None]) for each in (q, k, v)), mx.array(dim**-0.5)]
    assert np.abs(output - verifier_example.reference(arrays, causal)[0]).max() < tolerance


@needs_headers
@pytest.mark.slow
def test_mlx_s_own_sdpa_vector_passes():
    heads, keys, dim = 2, 77, 64
    text = place_threadgroup_arrays((KERNELS / "sdpa_vector.h").read_text())
    off = "has_mask = query_transposed = do_causal = bool_mask = float_mask = has_sinks = false;"
    sizes = "*(int*)B[4], *(int*)B[5], *(size_t*)B[6], *(size_t*)B[7], *(size_t*)B[6], *(size_t*)B[7], *(float*)B[8]"
    nothing = "nullptr, nullptr, *(int*)B[4], *(int*)B[4], *(int*)B[4], nullptr, *(int*)B[4]"
    place = "A->threadgroup_position_in_grid, A->threadgroups_per_grid, A->simdgroup_index_in_threadgroup, "
    place += "A->thread_index_in_simdgroup"
    arrays = "(float*)B[0], (float*)B[1], (float*)B[2], (float*)B[3]"
    call = f"{off} sdpa_vector<float, 64>({arrays}, {sizes}, {nothing}, {place});"
    library = build_source(text, call, QUIET)
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal(size).astype(np.float32) for size in ((heads, dim), *[(heads, keys, dim)] * 2))
    output = np.zeros_like(q)
    values = (np.array([1], np.int32), np.array([keys], np.int32), np.array([keys * dim]), np.array([dim]))
    held = [Buffer(q), Buffer(k), Buffer(v), Buffer(output, is_output=True, is_initialised=False)]
    held += [Buffer(each) for each in (*values, np.array([dim**-0.5], np.float32))]
    buffers = {f"b{number}": each for number, each in enumerate(held)}
    launch(library, buffers, (1024 * heads, 1, 1), (1024, 1, 1))
    scores = np.einsum("hd,hnd->hn", q, k) * dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hn,hnd->hd", weights / weights.sum(-1, keepdims=True), v)
    assert np.abs(output - expected).max() < 2e-6
