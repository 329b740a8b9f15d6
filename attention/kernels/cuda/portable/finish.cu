// Last kernel of the general backward pass: scales and rounds the float32 accumulator, in the layout of add_to_memory, to
// dQ. A warp converts 16 queries and 8 columns. `order` is an output of portable/backward.cu and only creates the dependency.

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* sums, const void* order, char* output, int planes, int queries, int padded_queries, int columns,
                int sum_columns, int scale_bits) {
  const int lane = threadIdx.x % 32, narrow = sum_columns / 8, tiles = padded_queries / 16;
  const i64 index = blockIdx.x * static_cast<i64>(THREADS / 32) + threadIdx.x / 32;  // index of a 16 x 8 tile
  if (index >= static_cast<i64>(planes) * tiles * narrow) return;
  const int column = index % narrow * 8 + lane % 4 * 2, row = index / narrow % tiles * 16 + lane / 4;
  const i64 plane = index / narrow / tiles;
  if (column >= columns) return;
  const float* own = sums + index * 128;
  const float scale = __int_as_float(scale_bits);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= queries) continue;
    const float x = own[VECTOR_SUMS ? 4 * lane + 2 * r : 32 * (2 * r) + lane];
    const float y = own[VECTOR_SUMS ? 4 * lane + 2 * r + 1 : 32 * (2 * r + 1) + lane];
    *reinterpret_cast<u32*>(output + ((plane * queries + row + 8 * r) * columns + column) * 2) = pack(x * scale, y * scale);
  }
}
