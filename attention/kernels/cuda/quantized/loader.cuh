// Loads of quantized keys and values for the general forward kernel (portable/forward.cu): a thread dequantizes pieces of 16
// numbers, which share a scale, to two units of a tile in shared memory.

// Loads rows from `first` on to a tile; elements beyond `rows` and `columns` are zero-filled.
template <typename F, class Tile>
DEVICE void dequantize_tile(u32 tile, const Plane& plane, int first, int rows, int columns) {
  constexpr int ROW_PIECES = Tile::UNITS / 2, PIECES = Tile::ROWS * ROW_PIECES;
  constexpr int BATCH = F::BITS > 4 ? 2 : 4;  // pieces in flight
#pragma unroll 1
  for (int start = threadIdx.x; start < PIECES; start += BATCH * THREADS) {
    Packed<F::BITS, 16> numbers[BATCH];
    RawScale<F> scales[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int piece = start + i * THREADS, row = first + piece / ROW_PIECES, column = piece % ROW_PIECES * 16;
      PlaneRow(plane, min(row, rows - 1)).load<F>(numbers[i], scales[i], column, piece < PIECES && row < rows && column < columns);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const int piece = start + i * THREADS, row = piece / ROW_PIECES, unit = piece % ROW_PIECES * 2;
      if (piece >= PIECES) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 pairs[4];
        convert_unit<F>(pairs, numbers[i].words, 8 * half * F::BITS, scales[i].scale, scales[i].bias);
        store_unit(tile + row * Tile::PITCH + (unit + half) * 16, pairs);
      }
    }
  }
}

template <class Tile>
DEVICE void load_keys(u32 tile, const Plane& keys, int first, int rows, int columns) {
  dequantize_tile<Key, Tile>(tile, keys, first, rows, columns);
}
template <class Tile>
DEVICE void load_values(u32 tile, const Plane& values, int first, int rows, int columns) {
  dequantize_tile<Value, Tile>(tile, values, first, rows, columns);
}
