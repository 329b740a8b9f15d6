// What the backward pass needs of each query row, a warp for each: a cleared row of dQ, its logsumexp in log2 units, and
//
//   delta = sum over columns of output * cotangent   (- the logsumexp's own cotangent, with LOGSUMEXP_COTANGENT)
//
// Rows come in tiles of 64, padded: | 64 logsumexps | 64 deltas |, so that one bulk copy brings a tile's. For rows that
// are padding or see no key the logsumexp is +inf, which makes their weights 0.

constexpr int THREADS = 128, TILE = 64;

DEVICE float2 unpack(u32 word) {
#if BFLOAT16
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#else
  float2 pair;
  asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const u32* output, const u32* cotangent, const float* logsumexp, const float* logsumexp_cotangent,
                float* rows, float* query_gradient, int planes, int queries, int columns) {
  const int tiles = (queries + TILE - 1) / TILE, lane = threadIdx.x % 32;
  const int index = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;  // of all padded rows
  if (index >= planes * tiles * TILE) return;
  const int plane = index / (tiles * TILE), row = index % (tiles * TILE);
  const u64 place = static_cast<u64>(plane) * queries + row;
  float largest = -MINUS_INFINITY, delta = 0;
  if (row < queries) {
    for (int i = lane; i < columns / 2; i += 32) {
      const float2 o = unpack(output[place * (columns / 2) + i]), c = unpack(cotangent[place * (columns / 2) + i]);
      delta += o.x * c.x + o.y * c.y;
      reinterpret_cast<float2*>(query_gradient)[place * (columns / 2) + i] = make_float2(0, 0);
    }
    for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
    if (LOGSUMEXP_COTANGENT) delta -= logsumexp_cotangent[place];
    if (logsumexp[place] != MINUS_INFINITY) largest = logsumexp[place] * 1.44269504f;
    else delta = 0;
  }
  if (lane == 0) {
    float* tile = rows + static_cast<u64>(index / TILE) * 2 * TILE;
    tile[index % TILE] = largest;
    tile[TILE + index % TILE] = delta;
  }
}
