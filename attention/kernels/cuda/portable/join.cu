// Second pass of the general forward kernel with split keys: combines the partial results, one warp per output row.
//
//   sum    = sum over splits of 2^(c (maximum of the split - maximum of all)) * sum of the split
//   output = sum over splits of 2^(c (maximum of the split - maximum of all)) * sum of the split / sum * output of the split
//
// Maxima are stored before multiplication by c (`factor`), and separately from the sums: see RowResults.

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* outputs, const float2* maxima_and_sums, char* output, float* logsumexp, float2* stats, int rows,
                int columns, int splits, int factor_bits) {
  const float factor = __int_as_float(factor_bits);
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float largest = MINUS_INFINITY, total = 0;
  for (int s = lane; s < splits; s += 32) largest = fmaxf(largest, maxima_and_sums[static_cast<u64>(s) * rows + row].x);
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float base = largest == MINUS_INFINITY ? 0 : largest;
  const auto weight_of = [&](int split) {
    const float2 part = maxima_and_sums[static_cast<u64>(split) * rows + row];
    return exp2_fast((part.x - base) * factor) * part.y;
  };
  for (int s = lane; s < splits; s += 32) total += weight_of(s);
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const float inverse = total > 0 ? 1 / total : 0;

  for (int column = 2 * lane; column < columns; column += 64) {
    float x = 0, y = 0;
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float weight = weight_of(s);
      const float2 pair = *reinterpret_cast<const float2*>(outputs + (static_cast<u64>(s) * rows + row) * columns + column);
      x += weight * pair.x, y += weight * pair.y;
    }
    reinterpret_cast<u32*>(output)[(static_cast<u64>(row) * columns + column) / 2] = pack(x * inverse, y * inverse);
  }
  if (lane == 0) RowResults{logsumexp, stats}.write(row, largest, total, factor);
}
