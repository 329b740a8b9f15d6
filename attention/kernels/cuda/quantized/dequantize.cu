// Dequantizes keys and values of some heads to a workspace, for the dense forward kernels.
//
//   blocks of keys     | piece of 16 numbers of a row | ...    a thread converts PIECES of them, THREADS apart
//   blocks of values   | piece                        | ...
//
// The workspace holds (batch, head, key, column), contiguous.

// Dequantizes a block's pieces of an array.
template <typename F>
DEVICE void dequantize(const Plane& first, i64 batch, i64 head, i64 scale_batch, i64 scale_head, i64 bias_batch, i64 bias_head,
                       char* made, int block, int rows, int heads, int keys, int columns) {
  const int row_pieces = columns / 16, pieces = rows * row_pieces, start = block * (PIECES * THREADS) + threadIdx.x;
  Packed<F::BITS, 16> numbers[PIECES];
  RawScale<F> scales[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int piece = min(start + i * THREADS, pieces - 1), row = piece / row_pieces, column = piece % row_pieces * 16;
    const int key = row % keys, of_head = row / keys % heads, of_batch = row / keys / heads;
    const Plane plane{first.numbers + of_batch * batch + of_head * head,
                      first.scales + of_batch * scale_batch + of_head * scale_head,
                      first.biases + of_batch * bias_batch + of_head * bias_head,
                      first.number_row, first.scale_row, first.bias_row};
    PlaneRow(plane, key).load<F>(numbers[i], scales[i], column, true);
  }
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int piece = start + i * THREADS;
    if (piece >= pieces) break;
    u32 pairs[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      convert_unit<F>(pairs[half], numbers[i].words, 8 * half * F::BITS, scales[i].scale, scales[i].bias);
    }
    uint4* place = reinterpret_cast<uint4*>(made + static_cast<i64>(piece) * 32);
    place[0] = make_uint4(pairs[0][0], pairs[0][1], pairs[0][2], pairs[0][3]);
    place[1] = make_uint4(pairs[1][0], pairs[1][1], pairs[1][2], pairs[1][3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const char* key, const char* key_scales, const char* key_biases, const char* value, const char* value_scales,
                const char* value_biases, char* keys_made, char* values_made, int rows, int heads, int keys, int columns,
                int value_columns, int key_blocks, i64 key_batch, i64 key_head, i64 key_row, i64 key_scale_batch,
                i64 key_scale_head, i64 key_scale_row, i64 key_bias_batch, i64 key_bias_head, i64 key_bias_row, i64 value_batch,
                i64 value_head, i64 value_row, i64 value_scale_batch, i64 value_scale_head, i64 value_scale_row,
                i64 value_bias_batch, i64 value_bias_head, i64 value_bias_row) {
  const int block = blockIdx.x;
  if (block < key_blocks) {
    constexpr int SCALE = Key::SCALE_BYTES;
    const Plane first{key, key_scales, key_biases, static_cast<int>(key_row) * 4, static_cast<int>(key_scale_row) * SCALE,
                      static_cast<int>(key_bias_row) * SCALE};
    dequantize<Key>(first, key_batch * 4, key_head * 4, key_scale_batch * SCALE, key_scale_head * SCALE, key_bias_batch * SCALE,
                    key_bias_head * SCALE, keys_made, block, rows, heads, keys, columns);
  } else {
    constexpr int SCALE = Value::SCALE_BYTES;
    const Plane first{value, value_scales, value_biases, static_cast<int>(value_row) * 4,
                      static_cast<int>(value_scale_row) * SCALE, static_cast<int>(value_bias_row) * SCALE};
    dequantize<Value>(first, value_batch * 4, value_head * 4, value_scale_batch * SCALE, value_scale_head * SCALE,
                      value_bias_batch * SCALE, value_bias_head * SCALE, values_made, block - key_blocks, rows, heads, keys,
                      value_columns);
  }
}
