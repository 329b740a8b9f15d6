// Writes one token's key and value rows into a slot of each head, in place. With ROPE also: rotates the key to the slot, and
// the query to VERSIONS positions, one for each run of slots (docs/streaming.md).
//
//   blocks   one for each K/V head of the batch: key (B, Hkv, 1, .) -> keys (B, Hkv, slots, .), value -> values
//            with ROPE, one more for each query head: query (B, H, 1, D) -> turned (B, H, VERSIONS, D)
//
// With QUANTIZES the rows are quantized here, with the bits of mx.quantize. Else PARTS arrays are copied: keys and values, or
// the parts of their quantized forms, whose keys come rotated; ROW_0 .. ROW_4 are bytes of a row.

using u16 = unsigned short;

#if ROPE
constexpr int PAIRS = ROPE_DIMS / 2;

// Rotates a row of HEAD_DIM elements by a number of positions. The angle is reduced in double: a slot may be far from 0.
DEVICE void rotate(const u16* from, u16* to, const float* radians, int positions) {
  constexpr double TURN = 6.283185307179586;
  for (int i = threadIdx.x; i < PAIRS; i += THREADS) {
    const int low = ADJACENT ? 2 * i : i, high = ADJACENT ? low + 1 : i + PAIRS;
    const double angle = static_cast<double>(positions) * radians[i];
    const float rest = static_cast<float>(angle - TURN * rint(angle / TURN));
    float sine, cosine;
    sincosf(rest, &sine, &cosine);
    const float x = low_of(from[low]), y = low_of(from[high]);
    const u32 made = pack(x * cosine - y * sine, x * sine + y * cosine);
    to[low] = positions == 0 ? from[low] : static_cast<u16>(made);
    to[high] = positions == 0 ? from[high] : static_cast<u16>(made >> 16);
  }
  for (int i = ROPE_DIMS + threadIdx.x; i < HEAD_DIM; i += THREADS) to[i] = from[i];
}
#endif

#if QUANTIZES
// The quantized rows of a plane: numbers of BITS bits, and a scale and a bias for each GROUP of them.
template <int BITS, int GROUP>
struct Rows {
  char* numbers;
  u16 *scales, *biases;

  // Quantizes a row of HEAD_DIM elements to row `to`. A warp has a group, as in MLX's CUDA kernel, whose results these are.
  DEVICE void write(const u16* row, u64 to) const {
    constexpr int OWN = GROUP / 32, GROUPS = HEAD_DIM / GROUP;
    constexpr float LAST = (1 << BITS) - 1;
    __shared__ unsigned char codes[HEAD_DIM];
    const int lane = threadIdx.x % 32;
    for (int group = threadIdx.x / 32; group < GROUPS; group += THREADS / 32) {
      const int first = group * GROUP + lane * OWN;
      float x[OWN], low = 3.402823466e+38f, high = 0;
      for (int i = 0; i < OWN; ++i) {
        x[i] = low_of(row[first + i]);
        low = fminf(low, x[i]), high = fmaxf(high, x[i]);
      }
      for (int step = 16; step > 0; step /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, step)), high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
      }
      const bool from_below = fabsf(low) > fabsf(high);
      const float edge = from_below ? low : high, width = fmaxf((high - low) / LAST, 1e-7f);
      const float step = from_below ? width : -width, steps = roundf(edge / step);
      const float scale = steps == 0 ? step : edge / steps, bias = steps == 0 ? 0 : edge;
      if (lane == 0) {
        scales[to * GROUPS + group] = static_cast<u16>(pack(scale, 0));
        biases[to * GROUPS + group] = static_cast<u16>(pack(bias, 0));
      }
      for (int i = 0; i < OWN; ++i) codes[first + i] = static_cast<unsigned char>(fminf(roundf((x[i] - bias) / scale), LAST));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HEAD_DIM / 8; i += THREADS) {  // eight numbers are BITS bytes
      u64 packed = 0;
      for (int j = 0; j < 8; ++j) packed |= static_cast<u64>(codes[8 * i + j]) << BITS * j;
      for (int j = 0; j < BITS; ++j) numbers[(to * (HEAD_DIM / 8) + i) * BITS + j] = static_cast<char>(packed >> 8 * j);
    }
    __syncthreads();
  }
};
#else
DEVICE void copy_row(const char* from, char* to, int plane, int bytes, int slots, int slot) {
  from += static_cast<u64>(plane) * bytes;
  to += (static_cast<u64>(plane) * slots + slot) * bytes;
  for (int i = threadIdx.x; i < bytes; i += THREADS) to[i] = from[i];
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME(
#if ROPE
    const u16* query,
#endif
#if QUANTIZES
    const u16* new_key, const u16* new_value, char* keys, u16* key_scales, u16* key_biases, char* values,
    u16* value_scales, u16* value_biases,
#endif
#if PARTS
    const char* new_0, char* slots_0, const char* new_1, char* slots_1,
#endif
#if PARTS > 2
    const char* new_2, char* slots_2, const char* new_3, char* slots_3,
#endif
#if PARTS > 4
    const char* new_4, char* slots_4,
#endif
#if ROPE
    const float* radians, u16* turned,
#endif
    int planes, int slots, int slot
#if ROPE
    , int this_lap, int lap_before, int first
#endif
) {
  const int plane = blockIdx.x;
#if ROPE
  if (plane >= planes) {
    const int row = plane - planes;
    const int positions[3] = {this_lap, lap_before, first};
    for (int i = 0; i < 3; ++i)
      rotate(query + static_cast<u64>(row) * HEAD_DIM, turned + (static_cast<u64>(row) * 3 + i) * HEAD_DIM, radians, positions[i]);
    return;
  }
#endif
#if QUANTIZES
  const u64 from = static_cast<u64>(plane) * HEAD_DIM, to = static_cast<u64>(plane) * slots + slot;
  const Rows<KEY_BITS, KEY_GROUP> key_rows{keys, key_scales, key_biases};
#if ROPE
  __shared__ u16 rotated[HEAD_DIM];
  rotate(new_key + from, rotated, radians, this_lap);
  __syncthreads();
  key_rows.write(rotated, to);
#else
  key_rows.write(new_key + from, to);
#endif
  Rows<VALUE_BITS, VALUE_GROUP>{values, value_scales, value_biases}.write(new_value + from, to);
#else
#if ROPE && PARTS == 2
  rotate(reinterpret_cast<const u16*>(new_0) + static_cast<u64>(plane) * HEAD_DIM,
         reinterpret_cast<u16*>(slots_0) + (static_cast<u64>(plane) * slots + slot) * HEAD_DIM, radians, this_lap);
#else
  copy_row(new_0, slots_0, plane, ROW_0, slots, slot);
#endif
  copy_row(new_1, slots_1, plane, ROW_1, slots, slot);
#if PARTS > 2
  copy_row(new_2, slots_2, plane, ROW_2, slots, slot);
  copy_row(new_3, slots_3, plane, ROW_3, slots, slot);
#endif
#if PARTS > 4
  copy_row(new_4, slots_4, plane, ROW_4, slots, slot);
#endif
#endif
}
