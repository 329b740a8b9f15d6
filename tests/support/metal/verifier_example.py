"""A small flash attention forward in MSL to test the verifier: one simdgroup for eight query rows."""

from typing import Any

import mlx.core as mx
import numpy as np

from tests.support.metal import verifier

NAMES = ("q", "k", "v", "scale")
HEADER = r"""
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

template <typename T, int ROWS, int D, int NT>
METAL_FUNC void load_tile(const device T* src, threadgroup T* dst, int valid, uint tid) {
  for (int i = tid; i < ROWS * D; i += NT) {
    dst[i] = (i / D) < valid ? src[i] : T(0);
  }
}
METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}
METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}
"""
SOURCE = r"""
  constexpr int NSG = BQ / 8;          // one simdgroup per 8 query rows
  constexpr int NT = NSG * 32;
  constexpr int TD = D / 8;
  constexpr int TK = BK / 8;
  const int Lq = q_shape[2];
  const int Lk = k_shape[2];
  const uint lane = thread_index_in_simdgroup;
  const uint sg = simdgroup_index_in_threadgroup;
  const uint tid = thread_index_in_threadgroup;
  const int q0 = threadgroup_position_in_grid.x * BQ;
  const int head = threadgroup_position_in_grid.y;
  const short fm = ((lane / 4) & 4) + ((lane / 2) % 4);
  const short fn = ((lane / 4) & 2) * 2 + (lane % 2) * 2;

  threadgroup T Qs[BQ * D];
  threadgroup T KVs[BK * D];

  const device T* kp = k + size_t(head) * Lk * D;
  const device T* vp = v + size_t(head) * Lk * D;
  load_tile<T, BQ, D, NT>(q + (size_t(head) * Lq + q0) * D, Qs, Lq - q0, tid);

  simdgroup_matrix<float, 8, 8> O[TD];
  for (int d = 0; d < TD; d++) O[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  float m = -INFINITY;
  float l = 0.0f;
  const int row = q0 + sg * 8 + fm;
  const int kend = CAUSAL ? metal::min(Lk, q0 + BQ + Lk - Lq) : Lk;

  for (int k0 = 0; k0 < kend; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);   // B1: everyone is done with V
    load_tile<T, BK, D, NT>(kp + k0 * D, KVs, Lk - k0, tid);
    threadgroup_barrier(mem_flags::mem_threadgroup);   // B2: K (and Q) are in place

    simdgroup_matrix<float, 8, 8> S[TK];
    for (int j = 0; j < TK; j++) {
      S[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int d = 0; d < TD; d++) {
        simdgroup_matrix<T, 8, 8> a, b;
        simdgroup_load(a, Qs + sg * 8 * D + d * 8, D);
        simdgroup_load(b, KVs + j * 8 * D + d * 8, D, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(S[j], a, b, S[j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);   // B3: everyone is done with K
    load_tile<T, BK, D, NT>(vp + k0 * D, KVs, Lk - k0, tid);

    float mx = m;
    for (int j = 0; j < TK; j++) {
      for (int e = 0; e < 2; e++) {
        const int col = k0 + j * 8 + fn + e;
        float s = S[j].thread_elements()[e] * scale;
        if (col >= Lk || (CAUSAL && col > row + Lk - Lq)) s = -INFINITY;
        S[j].thread_elements()[e] = s;
        mx = metal::max(mx, s);
      }
    }
    mx = row_max(mx);
    const float base = mx == -INFINITY ? 0.0f : mx;
    const float alpha = metal::exp(m - base);
    float sum = 0.0f;
    simdgroup_matrix<T, 8, 8> P[TK];
    for (int j = 0; j < TK; j++) {
      for (int e = 0; e < 2; e++) {
        const float p = metal::exp(S[j].thread_elements()[e] - base);
        sum += p;
        P[j].thread_elements()[e] = T(p);
      }
    }
    l = l * alpha + row_sum(sum);
    m = mx;
    for (int d = 0; d < TD; d++) {
      O[d].thread_elements()[0] *= alpha;
      O[d].thread_elements()[1] *= alpha;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);   // B4: V is in place
    for (int d = 0; d < TD; d++) {
      for (int j = 0; j < TK; j++) {
        simdgroup_matrix<T, 8, 8> b;
        simdgroup_load(b, KVs + j * 8 * D + d * 8, D);
        simdgroup_multiply_accumulate(O[d], P[j], b, O[d]);
      }
    }
  }
  if (row < Lq) {
    device T* op = o + (size_t(head) * Lq + row) * D + fn;
    const float inv = l > 0.0f ? 1.0f / l : 0.0f;
    for (int d = 0; d < TD; d++) {
      op[d * 8] = T(O[d].thread_elements()[0] * inv);
      op[d * 8 + 1] = T(O[d].thread_elements()[1] * inv);
    }
    if (fn == 0) lse[size_t(head) * Lq + row] = m + metal::log(l);
  }
"""


def make() -> Any:
    """Return the kernel as made by MLX."""
    return mx.fast.metal_kernel(
        name="flash_forward", input_names=list(NAMES), output_names=["o", "lse"], header=HEADER, source=SOURCE
    )


def call(q: mx.array, causal: bool, block_q: int = 32, block_k: int = 16) -> dict[str, Any]:
    """Return the launch for a query (B, H, L, D)."""
    batch, heads, length, dim = q.shape
    return {
        "output_names": ["o", "lse"],
        "output_shapes": [q.shape, q.shape[:3]],
        "output_dtypes": [q.dtype, mx.float32],
        "template": [("T", q.dtype), ("BQ", block_q), ("BK", block_k), ("D", dim), ("CAUSAL", causal)],
        "grid": (-(-length // block_q) * block_q * 4, batch * heads, 1),
        "threadgroup": (block_q * 4, 1, 1),
    }


def inputs(
    shape: tuple[int, int, int, int] = (1, 2, 77, 64), keys: int | None = None, dtype: mx.Dtype = mx.float32
) -> list[mx.array]:
    """Return random query, key and value, and the scale."""
    batch, heads, length, dim = shape
    mx.random.seed(0)
    q, k, v = (mx.random.normal((batch, heads, n, dim)).astype(dtype) for n in (length, keys or length, keys or length))
    return [q, k, v, mx.array(dim**-0.5)]


def run(arrays: list[mx.array], causal: bool, **changed: Any) -> list[mx.array]:
    """Run the kernel in the verifier, with some launch arguments changed."""
    return verifier.verify(make(), NAMES, arrays, **{**call(arrays[0], causal), **changed}).outputs


def reference(arrays: list[mx.array], causal: bool) -> np.ndarray[Any, Any]:
    """Attention in float64."""
    q, k, v = (np.array(each.astype(mx.float32), np.float64) for each in arrays[:3])
    scores = q @ k.swapaxes(-1, -2) * float(arrays[3])
    if causal:
        rows, columns = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None]
        scores = np.where(columns > rows + k.shape[2] - q.shape[2], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)
