// Writes one token's key and value rows into a slot of each head, in place. With ROPE also: rotates the key to the slot, and
// the query to VERSIONS positions, one for each run of slots (docs/streaming.md).
//
//   blocks   one for each K/V head of the batch: key (B, Hkv, 1, .) -> keys (B, Hkv, slots, .), value -> values
//            with ROPE, one more for each query head: query (B, H, 1, D) -> turned (B, H, VERSIONS, D)
//
// PARTS arrays are written: keys and values, or those of their quantized forms; ROW_0 .. ROW_5 are bytes of a row.

#if ROPE
constexpr int PAIRS = ROPE_DIMS / 2;

using u16 = unsigned short;

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

DEVICE void copy_row(const char* from, char* to, int plane, int bytes, int slots, int slot) {
  from += static_cast<u64>(plane) * bytes;
  to += (static_cast<u64>(plane) * slots + slot) * bytes;
  for (int i = threadIdx.x; i < bytes; i += THREADS) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME(
#if ROPE
    const u16* query,
#endif
    const char* new_0, char* slots_0, const char* new_1, char* slots_1,
#if PARTS > 2
    const char* new_2, char* slots_2, const char* new_3, char* slots_3,
#endif
#if PARTS > 4
    const char* new_4, char* slots_4,
#endif
#if PARTS > 5
    const char* new_5, char* slots_5,
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
#if PARTS > 5
  copy_row(new_5, slots_5, plane, ROW_5, slots, slot);
#endif
}
