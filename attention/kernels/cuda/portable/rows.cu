// First kernel of the general backward pass, one warp per query: zeroes the accumulator of dQ, and computes Exponents and
//
//   delta = sum over columns of output * cotangent   (- the cotangent of the logsumexp, with LOGSUMEXP_COTANGENT)
//
// Results are stored per padded tile of 64 queries: | 64 exponent rests | 64 deltas | 64 bases |. For padding and fully
// masked rows the rest is +inf, which makes their weights 0.

constexpr int THREADS = 128, TILE = 64;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const uint4* output, const char* cotangent, const float2* stats, const float* logsumexp_cotangent,
                float* rows, float* sums, int planes, int heads, int queries, int columns, int sum_columns, int factor_bits,
                Step cotangent_batch, Step cotangent_head, Step cotangent_row) {
  const int tiles = (queries + TILE - 1) / TILE, lane = threadIdx.x % 32;
  const int index = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;  // index over all padded queries
  if (index >= planes * tiles * TILE) return;
  const int plane = index / (tiles * TILE), row = index % (tiles * TILE);
  for (int i = lane; i < sum_columns / 4; i += 32) {
    reinterpret_cast<float4*>(sums)[static_cast<i64>(index) * (sum_columns / 4) + i] = make_float4(0, 0, 0, 0);
  }
  Exponents exponents;
  float delta = 0;
  if (row < queries) {
    const i64 place = static_cast<i64>(plane) * queries + row;
    const uint4* own = reinterpret_cast<const uint4*>(
        cotangent +
        (steps(plane / heads, cotangent_batch) + steps(plane % heads, cotangent_head) + steps(row, cotangent_row)) * 2);
    for (int i = lane; i < columns / 8; i += 32) {
      const uint4 o = output[place * (columns / 8) + i], c = own[i];
      delta += product(o.x, c.x) + product(o.y, c.y) + product(o.z, c.z) + product(o.w, c.w);
    }
    for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
    if (LOGSUMEXP_COTANGENT) delta -= logsumexp_cotangent[place];
    exponents = Exponents(stats[place], __int_as_float(factor_bits));
  }
  if (lane == 0) {
    float* tile = rows + static_cast<i64>(index / TILE) * 3 * TILE;
    tile[index % TILE] = exponents.rest;
    tile[TILE + index % TILE] = exponents.sees() ? delta : 0;
    tile[2 * TILE + index % TILE] = exponents.base;
  }
}
