// First kernel of the Hopper backward pass. Computes the Exponents of each query row and
//
//   delta = sum over columns of output * cotangent   (- the cotangent of the logsumexp, with LOGSUMEXP_COTANGENT)
//
// and zeroes the accumulator of dQ in the first `cleared` tiles. A block processes 64 rows of a plane, padded, and writes | 64 exponent
// rests | 64 deltas | 64 bases | whether any base is nonzero | three zeros, counters of sm90/backward_sums.cuh |, in the order of
// sm90/backward_tiles.cuh, so that one bulk copy loads a tile. For padding and fully masked rows the rest is +inf, which makes their
// weights 0.

constexpr int THREADS = 256, ROWS = 64;
constexpr int NUMBERS = 3 * ROWS + 4;  // floats per tile
constexpr int LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;  // lanes per row, 8 columns each
constexpr int ROUNDS = ROWS * LANES / THREADS;

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

DEVICE float dot(u32 a, u32 b) {
  const float2 x = unpack(a), y = unpack(b);
  return x.x * y.x + x.y * y.y;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const uint4* output, const uint4* cotangent, const float2* stats, const float* logsumexp_cotangent,
                float* rows, float4* query_gradient, int tiles, int heads, int queries, int columns, int factor_bits, int cleared,
                u64 cotangent_batch_stride, u64 cotangent_head_stride, u64 cotangent_row_stride) {
  const int plane = blockIdx.x / tiles, first = blockIdx.x % tiles * ROWS, lane = threadIdx.x % LANES;
  cotangent += (plane / heads * cotangent_batch_stride + plane % heads * cotangent_head_stride) / 8;
  uint4 o[ROUNDS] = {}, c[ROUNDS] = {};
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int row = first + (i * THREADS + threadIdx.x) / LANES;
    if (row >= queries || lane >= columns / 8) continue;
    o[i] = output[(static_cast<u64>(plane) * queries + row) * (columns / 8) + lane];
    c[i] = cotangent[row * cotangent_row_stride / 8 + lane];
  }
  float2 row_stats[ROUNDS] = {};  // before anything waits
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int row = first + (i * THREADS + threadIdx.x) / LANES;
    if (lane == 0 && row < queries) row_stats[i] = stats[static_cast<u64>(plane) * queries + row];
  }
  if (blockIdx.x < cleared) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 4; i += THREADS) {
      query_gradient[static_cast<u64>(blockIdx.x) * (ROWS * HEAD_DIM / 4) + i] = make_float4(0, 0, 0, 0);
    }
  }
  float* numbers = rows + static_cast<u64>(blockIdx.x) * NUMBERS;
  bool rebase = false;
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int index = (i * THREADS + threadIdx.x) / LANES, row = first + index;
    float delta = dot(o[i].x, c[i].x) + dot(o[i].y, c[i].y) + dot(o[i].z, c[i].z) + dot(o[i].w, c[i].w);
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
    if (lane != 0) continue;
    const u64 place = static_cast<u64>(plane) * queries + row;
    const Exponents exponents = row < queries ? Exponents(row_stats[i], __int_as_float(factor_bits)) : Exponents();
    if (LOGSUMEXP_COTANGENT && exponents.sees()) delta -= logsumexp_cotangent[place];
    float* own = numbers + index % 8 / 2 * 16 + index / 8 * 2 + index % 2;
    own[0] = exponents.rest;
    own[ROWS] = exponents.sees() ? delta : 0;
    own[2 * ROWS] = exponents.base;
    rebase = rebase || exponents.base != 0;
  }
  rebase = __syncthreads_or(rebase);
  if (threadIdx.x == 0) reinterpret_cast<float4*>(numbers)[3 * ROWS / 4] = make_float4(rebase, 0, 0, 0);
}
