// Last kernel of the Hopper backward pass: scales and rounds the float32 accumulator to dQ and restores row-major order.
// A thread converts 8 columns of rows r and r + 8, accumulated by four neighbouring threads of sm90/backward.cu in 16-byte
// units. `order` is an output of sm90/backward.cu and only creates the dependency on it.

constexpr int THREADS = 256, BLOCK_Q = 64;
constexpr int UNITS = HEAD_DIM / 8, WARPS = BLOCK_Q / 16;  // units of 8 columns per tile; warps of 16 rows
constexpr int OWN_UNITS = UNITS / 2;                       // each of the two consumers owns half of the columns

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float4* query_gradient, const void* order, uint4* output, int threads, int tiles, int queries,
                int columns, int scale_bits) {
  const int index = (gridDim.x - 1 - blockIdx.x) * THREADS + threadIdx.x;  // reverse order: the last writes may still be in L2
  const int unit = index % UNITS, row = index / UNITS % 8, warp = index / UNITS / 8 % WARPS;
  const int tile = index / UNITS / 8 / WARPS;
  if (index >= threads || unit * 8 >= columns) return;
  // With 192 columns the consumers share the middle chunk, which is the last one of each.
  const int consumer = HEAD_DIM == 192 ? (unit + 4) / 16 : unit / OWN_UNITS;
  const int own_unit = HEAD_DIM != 192 ? unit % OWN_UNITS : unit < 12 ? unit : unit < 16 ? unit - 4 : unit - 16;
  const float4* own = query_gradient + static_cast<u64>(tile) * (BLOCK_Q * HEAD_DIM / 4) +
                      ((consumer * WARPS + warp) * OWN_UNITS + own_unit) * 32 + row * 4;
  const float scale = __int_as_float(scale_bits);
  u32 upper[4], lower[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 x = own[i];
    upper[i] = pack(x.x * scale, x.y * scale), lower[i] = pack(x.z * scale, x.w * scale);
  }
  const int query = tile % tiles * BLOCK_Q + warp * 16 + row;
  uint4* place = output + (static_cast<u64>(tile / tiles) * queries + query) * (columns / 8) + unit;
  if (query < queries) *place = make_uint4(upper[0], upper[1], upper[2], upper[3]);
  if (query + 8 < queries) place[columns] = make_uint4(lower[0], lower[1], lower[2], lower[3]);
}
