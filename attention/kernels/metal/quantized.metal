// Quantized keys and values, as mx.quantize makes them: numbers packed into 32-bit words, the first in the lowest bits; the
// values of a group share a scale, and in mode affine a bias. Prepended to the forward kernel after common.metal.
//
//   a row of 8 numbers of 3 bits            |  word 0                        |  word 1  ...
//   eight neighbours, one thread            | .. 7 6 5 4 3 2 1 0 | .. 7 6 5 4|3 2 1 0 | ..
//
// A thread dequantizes eight values of a row, which lie in at most two words, on their way into the tile; products are those
// of dense keys and values.
#define QUANTIZED

constant constexpr int AFFINE = 0, MXFP8 = 1, MXFP4 = 2, NVFP4 = 3;

// The rows of one head.
template <int MODE, int BITS, int GROUP, typename Scales, typename Biases>
struct PackedRows {
  const device uint* numbers;
  Scales scales;
  Biases biases;
  int64_t number_row, number_column, scale_row, scale_column, bias_row, bias_column;  // strides
};

template <int MODE, int BITS, int GROUP, typename Scales, typename Biases, typename Strides>
METAL_FUNC PackedRows<MODE, BITS, GROUP, Scales, Biases> packed_rows(
    const device uint* numbers, Strides number_strides, Scales scales, Strides scale_strides, Biases biases,
    Strides bias_strides, int batch, int head) {
  const int64_t biases_at = MODE == AFFINE ? batch * bias_strides[0] + head * bias_strides[1] : 0;
  return {
      numbers + batch * number_strides[0] + head * number_strides[1],
      scales + batch * scale_strides[0] + head * scale_strides[1],
      biases + biases_at,
      number_strides[2], number_strides[3], scale_strides[2], scale_strides[3], bias_strides[2], bias_strides[3]};
}

// A small float: e4m3 has the exponent's width of float16 less one, e2m1 less three, which a power of two makes up for.
METAL_FUNC float from_e4m3(uint bits) {
  const float size = float(as_type<half>(ushort((bits & 127) << 7))) * 256.0f;
  return (bits & 127) == 127 ? NAN : (bits & 128) != 0 ? -size : size;
}

METAL_FUNC float from_e2m1(uint bits) {
  const float size = float(as_type<half>(ushort((bits & 7) << 9))) * 16384.0f;
  return (bits & 8) != 0 ? -size : size;
}

METAL_FUNC float from_e8m0(uint bits) { return as_type<float>(bits == 0 ? 0x00400000u : bits << 23); }

template <int MODE, typename Scale>
METAL_FUNC float scale_of(Scale scale) {
  return MODE == AFFINE ? float(scale) : MODE == NVFP4 ? from_e4m3(uint(scale)) : from_e8m0(uint(scale));
}

template <int MODE>
METAL_FUNC float value_of(uint number, float scale, float bias) {
  if (MODE == AFFINE) {
    return metal::fma(float(number), scale, bias);
  }
  return scale * (MODE == MXFP8 ? from_e4m3(number) : from_e2m1(number));
}

// Loads ROWS x WIDTH values into a tile with all threads of the group, from row `from` on; rows from `end` on are zero.
template <
    typename T, int ROWS, int WIDTH, int PITCH, int THREADS, int MODE, int BITS, int GROUP, typename Scales,
    typename Biases>
METAL_FUNC void load_rows(
    PackedRows<MODE, BITS, GROUP, Scales, Biases> rows, int from, int end, threadgroup T* tile, uint thread_id) {
  constexpr uint LOWEST = (1u << BITS) - 1;
  for (int i = int(thread_id) * 8; i < ROWS * WIDTH; i += THREADS * 8) {
    const int row = i / WIDTH;
    const int column = i % WIDTH;
    Four<T> moved[2] = {{{T(0.0f), T(0.0f), T(0.0f), T(0.0f)}}, {{T(0.0f), T(0.0f), T(0.0f), T(0.0f)}}};
    if (from + row < end) {
      const int64_t at = from + row;
      const int64_t bit = column * BITS;
      const uint shift = uint(bit % 32);
      const device uint* words = rows.numbers + at * rows.number_row + bit / 32 * rows.number_column;
      uint low = words[0];
      uint high = shift + 8 * BITS > 32 ? words[rows.number_column] : 0;
      if (shift != 0) {
        low = low >> shift | high << (32 - shift);
        high >>= shift;
      }
      const int group = column / GROUP;
      const float scale = scale_of<MODE>(rows.scales[at * rows.scale_row + group * rows.scale_column]);
      const float bias = MODE == AFFINE ? float(rows.biases[at * rows.bias_row + group * rows.bias_column]) : 0.0f;
      UNROLL
      for (int j = 0; j < 8; j++) {
        const int place = j * BITS;
        const uint bits = place >= 32 ? high >> (place % 32)
            : place + BITS > 32           ? low >> place | high << (32 - place) % 32
                                          : low >> place;
        moved[j / 4].of[j % 4] = T(value_of<MODE>(bits & LOWEST, scale, bias));
      }
    }
    *(threadgroup Four<T>*)(tile + row * PITCH + column) = moved[0];
    *(threadgroup Four<T>*)(tile + row * PITCH + column + 4) = moved[1];
  }
}
