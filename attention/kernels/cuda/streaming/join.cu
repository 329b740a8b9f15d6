// Joins the three softmaxes of a query, each over one run of slots, by their logsumexps.
//
//   versions (B, H, 3, D), logsumexp (B, H, 3)  ->  output (B, H, 1, D)      one block for each query head of the batch

using u16 = unsigned short;

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const u16* versions, const float* logsumexp, u16* output) {
  constexpr float LOG2_E = 1.44269504f;
  const u64 row = blockIdx.x;
  const float a = logsumexp[row * 3], b = logsumexp[row * 3 + 1], c = logsumexp[row * 3 + 2];
  const float top = fmaxf(a, fmaxf(b, c)), base = top == MINUS_INFINITY ? 0 : top;
  const float x = exp2_fast((a - base) * LOG2_E), y = exp2_fast((b - base) * LOG2_E), z = exp2_fast((c - base) * LOG2_E);
  const float total = x + y + z, inverse = total > 0 ? 1 / total : 0;
  const u16* from = versions + row * 3 * HEAD_DIM;
  for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
    const float sum = x * low_of(from[i]) + y * low_of(from[HEAD_DIM + i]) + z * low_of(from[2 * HEAD_DIM + i]);
    output[row * HEAD_DIM + i] = static_cast<u16>(pack(sum * inverse, 0));
  }
}
