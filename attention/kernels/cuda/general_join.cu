// Joins what the splits of general_forward.cu found: a warp for each row of the output.
//
//   output = sum over splits of 2^(logsumexp of the split - logsumexp of all) * output of the split

constexpr int THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* outputs, const float* logsumexps, char* output, float* logsumexp, int rows, int columns,
                int splits) {
  const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float largest = MINUS_INFINITY, total = 0;
  for (int s = lane; s < splits; s += 32) largest = fmaxf(largest, logsumexps[static_cast<u64>(s) * rows + row]);
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float shift = largest == MINUS_INFINITY ? 0 : largest;
  for (int s = lane; s < splits; s += 32) total += exp2_fast(logsumexps[static_cast<u64>(s) * rows + row] - shift);
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const float inverse = total > 0 ? 1 / total : 0;

  for (int column = 2 * lane; column < columns; column += 64) {
    float x = 0, y = 0;
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const u64 place = static_cast<u64>(s) * rows + row;
      const float factor = exp2_fast(logsumexps[place] - shift);
      const float2 pair = *reinterpret_cast<const float2*>(outputs + place * columns + column);
      x += factor * pair.x, y += factor * pair.y;
    }
    reinterpret_cast<u32*>(output)[(static_cast<u64>(row) * columns + column) / 2] = pack(x * inverse, y * inverse);
  }
  if (lane == 0) logsumexp[row] = total > 0 ? (shift + log2f(total)) * 0.693147180559945f : MINUS_INFINITY;
}
