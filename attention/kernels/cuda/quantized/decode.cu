// Split-K kernel for few queries and many quantized keys and values, which stay packed in shared memory and are unpacked in
// registers on their way to the tensor cores.
//
//                  16 keys of a warp                                a lane: quad r = lane / 4, member t = lane % 4
//                +---------------------+                            (rows of an accumulator: r and r + 8)
//   S^T = K Q^T  | K (16 x D): rows are| x Q^T (D x 8 queries)      keys r and r + 8; of every group a quarter, in order
//                | keys                |
//                +---------------------+
//   O^T += V^T P^T: V^T (D x 16 keys)    x P^T (16 keys x 8)        an eighth of a group's columns of keys 2 t, + 1, + 8, + 9
//
// Both products have the packed operand on the left, whose tiles have 16 rows, and the queries on the right, whose tiles have
// 8 columns: the heads that share a key head are rarely more. The order of the columns within a product is free, so each lane
// loads consecutive numbers of a row, unpacks them to pairs of float16 (quantized/numbers.cuh), and these are its operands.
// The queries are read in the same order; P^T is transposed by movmatrix.
//
//   scores     sum over groups of  scale * (q . n) + bias * sum of q     in float32, once for each key and group
//   output     n times (scale * weight), and the bias times the weight, which is added up apart; the groups of 32 or 16 values
//              would need too many products, so their values are dequantized: one multiplication for two of them
//
// Ranges of STEP keys, one or more tiles of 16, are dealt round-robin to the warps of a split. As in sm90/decode.cu, each warp
// has its own ring of STAGES buffers, filled by asynchronous copies, and never waits for another one. In the epilogue the
// warps' partial results are combined in shared memory, and those of several splits by the last block to finish: see
// sm90/decode_join.cuh.
//
// Weights are relative to a row's base, which is raised only when a score exceeds it by HEADROOM: most tiles need neither a
// maximum over lanes nor a rescaled output (FlashAttention 4). Queries are scaled to float16 by a power of two per row, and
// scales of values by one that follows the largest of them so far.

constexpr int STEP = 16 * TILES;  // keys per buffer
constexpr float BASE_BELOW = 6, HEADROOM = 14;  // a base is set BASE_BELOW below the maximum, in log2 units
constexpr float NO_BASE = -1e30f;               // below every score
static_assert(ROWS == 8 * QUERY_TILES);

using Key = Format<KEY_BITS, KEY_KIND, KEY_GROUP, KEY_SCALE>;
using Value = Format<VALUE_BITS, VALUE_KIND, VALUE_GROUP, VALUE_SCALE>;

// Keys: pieces of 4 * KEY_COUNT columns, KEY_COUNT for each lane of a quad; a piece is in one group.
constexpr int KEY_COUNT = KEY_GROUP < 64 ? KEY_GROUP / 4 : 16;
constexpr int PIECES = HEAD_DIM / (4 * KEY_COUNT), PIECE_STEPS = KEY_COUNT / 4;
constexpr int KEY_GROUPS = (HEAD_DIM + KEY_GROUP - 1) / KEY_GROUP, GROUP_PIECES = PIECES / KEY_GROUPS;
// Values: chunks of 8 * VALUE_COUNT columns, VALUE_COUNT for each quad. With SCALED_WEIGHTS a chunk is in one group, else each
// quad's numbers are.
constexpr bool SCALED_WEIGHTS = VALUE_GROUP >= 64;
constexpr int VALUE_COUNT = HEAD_DIM == 64 || VALUE_GROUP == 64 ? 8 : 16;
constexpr int CHUNKS = HEAD_DIM / (8 * VALUE_COUNT);
constexpr int VALUE_GROUPS = (HEAD_DIM + VALUE_GROUP - 1) / VALUE_GROUP;
static_assert(PIECES % KEY_GROUPS == 0);

// A warp's buffer of STEP keys and values: numbers of keys and of values, scales and biases of keys, then those of values; each
// array has rows without gaps, HEAD_DIM columns wide.
constexpr int KEY_ROW = HEAD_DIM * KEY_BITS / 8, KEY_SCALES = KEY_GROUPS * Key::SCALE_BYTES;  // bytes of a row
constexpr int VALUE_ROW = HEAD_DIM * VALUE_BITS / 8, VALUE_SCALES = VALUE_GROUPS * Value::SCALE_BYTES;
constexpr int VALUE_AT = STEP * KEY_ROW, KEY_SCALES_AT = VALUE_AT + STEP * VALUE_ROW;
constexpr int KEY_BIASES_AT = KEY_SCALES_AT + STEP * KEY_SCALES;
constexpr int VALUE_SCALES_AT = KEY_BIASES_AT + (Key::BIASED ? STEP * KEY_SCALES : 0);
constexpr int VALUE_BIASES_AT = VALUE_SCALES_AT + STEP * VALUE_SCALES;
constexpr int BUFFER = VALUE_BIASES_AT + (Value::BIASED ? STEP * VALUE_SCALES : 0);
constexpr int SCALE_UNITS = (BUFFER - KEY_SCALES_AT) / 16, SCALE_PASSES = (SCALE_UNITS + 31) / 32;

// c (16 x 8) += a (16 x 16) @ b (16 x 8) in float16
DEVICE void multiply_add_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c (16 x 8) += a (16 x 8) @ b (8 x 8) in bfloat16
DEVICE void multiply_add_biases(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
DEVICE u32 transpose_matrix(u32 word) {
  u32 made;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(made) : "r"(word));
  return made;
}

// ---- copies to a warp's buffers ----------------------------------------------------------------------------------

// Starts an asynchronous copy of BYTES bytes, 4, 8 or 16; zero-fills if not `valid`.
template <int BYTES>
DEVICE void copy_unit(u32 destination, const char* source, bool valid) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(BYTES),
                 "r"(valid ? BYTES : 0)
                 : "memory");
  }
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Copies one scale or bias of BYTES bytes, 1 or 2, which asynchronous copies do not do; zero if not `valid`.
template <int BYTES>
DEVICE void copy_scale(u32 destination, const char* source, bool valid) {
  const u32 x = valid ? load_scale<BYTES>(source) : 0;
  if constexpr (BYTES == 2) asm volatile("{.reg .u16 h; cvt.u16.u32 h, %1; st.shared.u16 [%0], h;}" ::"r"(destination), "r"(x) : "memory");
  else asm volatile("st.shared.u8 [%0], %1;" ::"r"(destination), "r"(x) : "memory");
}

// Copies STEP rows of an array, of PITCH bytes in the buffer and `width` in memory, in units of UNIT bytes, to which its rows are
// aligned; rows beyond the last one are copies of it.
template <int PITCH, int UNIT>
DEVICE void copy_rows(u32 destination, const char* from, int stride, int key, int last, int width) {
  constexpr int UNITS = PITCH / UNIT;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < STEP * UNITS; i += 32) {
    const int row = i / UNITS, place = i % UNITS * UNIT;
    const bool valid = WHOLE || place < width;
    const char* source = from + static_cast<i64>(min(key + row, last)) * stride + (valid ? place : 0);
    if constexpr (UNIT >= 4) copy_unit<UNIT>(destination + i * UNIT, source, valid);
    else copy_scale<UNIT>(destination + i * UNIT, source, valid);
  }
}
// Largest power of two that divides `bytes`, at most 16: rows of so many bytes are aligned to it.
constexpr DEVICE int unit_of(int bytes) { return (bytes & -bytes) < 16 ? bytes & -bytes : 16; }
// Units of numbers: a word at least, and 16 numbers at most.
constexpr DEVICE int number_unit(int bits) { return unit_of(2 * bits) < 4 ? 4 : unit_of(2 * bits); }

// Where a warp's tiles come from. If the rows of all arrays are adjacent in memory and aligned, a tile of an array is one
// range of bytes, of which a lane copies every 32nd unit of 16 bytes.
struct Source {
  Plane keys, values;
  const char *key_units, *value_units, *scales[SCALE_PASSES];  // the lane's first units of numbers, and those of scales
  int scale_rows[SCALE_PASSES];                                // bytes of a row of the scales' arrays
  bool adjacent;

  DEVICE Source(const Plane& k, const Plane& v) : keys(k), values(v) {
    const u64 places = address(k.numbers) | address(k.scales) | address(k.biases) | address(v.numbers) | address(v.scales) |
                       address(v.biases);
    adjacent = WHOLE && places % 16 == 0 && is_dense<Key>(k, KEY_ROW, KEY_SCALES) && is_dense<Value>(v, VALUE_ROW, VALUE_SCALES);
#pragma unroll
    for (int i = 0; i < SCALE_PASSES; ++i) {
      const int at = KEY_SCALES_AT + (threadIdx.x % 32 + 32 * i) * 16;
      const bool of_key = at < VALUE_SCALES_AT, bias = at >= (of_key ? KEY_BIASES_AT : VALUE_BIASES_AT);
      const char* array = of_key ? (bias ? k.biases : k.scales) : (bias ? v.biases : v.scales);
      const int first = of_key ? (bias ? KEY_BIASES_AT : KEY_SCALES_AT) : (bias ? VALUE_BIASES_AT : VALUE_SCALES_AT);
      scales[i] = opaque(array + (at - first)), scale_rows[i] = of_key ? KEY_SCALES : VALUE_SCALES;
    }
    key_units = opaque(k.numbers + threadIdx.x % 32 * 16), value_units = opaque(v.numbers + threadIdx.x % 32 * 16);
  }
  // Keeps the compiler from computing a place again in every tile.
  static DEVICE const char* opaque(const char* place) {
    asm volatile("" : "+l"(place));
    return place;
  }
  static DEVICE u64 address(const char* place) { return reinterpret_cast<u64>(place); }
  template <typename F>
  static DEVICE bool is_dense(const Plane& plane, int numbers, int scales) {
    return plane.number_row == numbers && plane.scale_row == scales && (!F::BIASED || plane.bias_row == scales);
  }

  // Copies the lane's of COUNT units of 16 bytes.
  template <int COUNT>
  static DEVICE void copy_range(u32 destination, const char* from) {
#pragma unroll
    for (int i = 0; 32 * i < COUNT; ++i) {
      if (COUNT >= 32 * (i + 1) || threadIdx.x % 32 < COUNT - 32 * i) copy_unit<16>(destination + 512 * i, from + 512 * i, true);
    }
  }

  // Starts copying STEP keys and values from `key` on, a multiple of 16.
  DEVICE void copy(u32 buffer, int key, const Problem& problem) const {
    if (adjacent && key + STEP <= problem.keys) {
      const u32 unit = buffer + threadIdx.x % 32 * 16;
      copy_range<TILES * KEY_ROW>(unit, key_units + static_cast<i64>(key) * KEY_ROW);
      copy_range<TILES * VALUE_ROW>(unit + VALUE_AT, value_units + static_cast<i64>(key) * VALUE_ROW);
#pragma unroll
      for (int i = 0; i < SCALE_PASSES; ++i) {
        if (SCALE_UNITS >= 32 * (i + 1) || threadIdx.x % 32 < SCALE_UNITS - 32 * i) {
          copy_unit<16>(unit + KEY_SCALES_AT + 512 * i, scales[i] + static_cast<i64>(key) * scale_rows[i], true);
        }
      }
    } else {
      const int last = problem.keys - 1, columns = problem.columns;
      const int key_scales = columns / KEY_GROUP * Key::SCALE_BYTES, value_scales = columns / VALUE_GROUP * Value::SCALE_BYTES;
      copy_rows<KEY_ROW, number_unit(KEY_BITS)>(buffer, keys.numbers, keys.number_row, key, last, columns * KEY_BITS / 8);
      copy_rows<VALUE_ROW, number_unit(VALUE_BITS)>(buffer + VALUE_AT, values.numbers, values.number_row, key, last,
                                                    columns * VALUE_BITS / 8);
      constexpr int KEY_UNIT = SCALE_UNIT<Key, KEY_SCALES>, VALUE_UNIT = SCALE_UNIT<Value, VALUE_SCALES>;
      copy_rows<KEY_SCALES, KEY_UNIT>(buffer + KEY_SCALES_AT, keys.scales, keys.scale_row, key, last, key_scales);
      copy_rows<VALUE_SCALES, VALUE_UNIT>(buffer + VALUE_SCALES_AT, values.scales, values.scale_row, key, last, value_scales);
      if constexpr (Key::BIASED) {
        copy_rows<KEY_SCALES, KEY_UNIT>(buffer + KEY_BIASES_AT, keys.biases, keys.bias_row, key, last, key_scales);
      }
      if constexpr (Value::BIASED) {
        copy_rows<VALUE_SCALES, VALUE_UNIT>(buffer + VALUE_BIASES_AT, values.biases, values.bias_row, key, last, value_scales);
      }
    }
  }
  // Rows of scales are aligned to what divides their length; that of narrower heads is not known here.
  template <typename F, int SCALES>
  static constexpr int SCALE_UNIT = WHOLE ? unit_of(SCALES) : F::SCALE_BYTES;
};

// ---- a tile in registers -----------------------------------------------------------------------------------------

// A lane's places. Keys r of the tile are read by quad r ^ (r / 2 % 2), so that the rows which the members of a quad read as
// values, 2 t and 2 t + 1 exchanged for odd t, start in different banks if a row has 64 bytes.
struct Lane {
  int quad, member;
  int row;  // the quad's keys: row and row + 8
  u32 key_numbers, key_scales, value_numbers[2], value_scales[2];  // in the warp's first buffer

  DEVICE explicit Lane(u32 ring) {
    u32 lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));  // opaque, so that it is not read from the special register in every tile
    quad = lane / 4, member = lane % 4;
    row = quad ^ (quad >> 1 & 1);
    key_numbers = opaque(ring + row * KEY_ROW + KEY_COUNT * member * KEY_BITS / 8);
    key_scales = opaque(ring + row * KEY_SCALES);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int value = 2 * member + (i ^ (member & 1));
      value_numbers[i] = opaque(ring + VALUE_AT + value * VALUE_ROW + VALUE_COUNT * quad * VALUE_BITS / 8);
      value_scales[i] = SCALED_WEIGHTS ? 0 : opaque(ring + value * VALUE_SCALES + VALUE_COUNT * quad / VALUE_GROUP * Value::SCALE_BYTES);
    }
  }
  // Keeps the compiler from computing a place again in every tile.
  static DEVICE u32 opaque(u32 place) {
    asm volatile("" : "+r"(place));
    return place;
  }
};

// 16 keys, a tile: a quad has keys `row` and `row` + 8.
struct Keys {
  Packed<KEY_BITS, KEY_COUNT> numbers[2][PIECES];
  RowScales<Key, KEY_GROUPS> scales[2], biases[2];

  // Loads tile `m` of a buffer.
  DEVICE void load(const Lane& lane, int buffer, int m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * m + 8 * i;
      scales[i].load_shared(buffer + lane.key_scales + KEY_SCALES_AT + row * KEY_SCALES);
      if constexpr (Key::BIASED) biases[i].load_shared(buffer + lane.key_scales + KEY_BIASES_AT + row * KEY_SCALES);
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        numbers[i][p].load_shared(buffer + lane.key_numbers + row * KEY_ROW + 4 * KEY_COUNT * p * KEY_BITS / 8);
      }
    }
  }
};

// The values of 16 keys: member t of a quad has numbers of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 (for odd t exchanged in
// pairs). Scales are those of the keys of the weights, the quad's, if the weights are scaled, else those of the numbers.
struct Values {
  Packed<VALUE_BITS, VALUE_COUNT> numbers[4][CHUNKS];
  RowScales<Value, VALUE_GROUPS> scales[2], biases[2];
  RawScale<Value> own[4][CHUNKS];

  // Loads what belongs to the weights' keys of tile `m` of a buffer.
  DEVICE void load_scales(const Lane& lane, int buffer, int m) {
    const u32 weight_scales = buffer + lane.key_scales + lane.row * (VALUE_SCALES - KEY_SCALES);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 16 * m + 8 * i;
      scales[i].load_shared(weight_scales + VALUE_SCALES_AT + row * VALUE_SCALES);
      if constexpr (Value::BIASED) biases[i].load_shared(weight_scales + VALUE_BIASES_AT + row * VALUE_SCALES);
    }
  }
  // Loads tile `m` of a buffer.
  DEVICE void load(const Lane& lane, int buffer, int m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int further = 16 * m + 8 * (i / 2), column = 8 * VALUE_COUNT * c;
        numbers[i][c].load_shared(buffer + lane.value_numbers[i % 2] + further * VALUE_ROW + column * VALUE_BITS / 8);
        if constexpr (!SCALED_WEIGHTS) {
          const u32 place = buffer + lane.value_scales[i % 2] + further * VALUE_SCALES + column / VALUE_GROUP * Value::SCALE_BYTES;
          own[i][c].load_shared(place + VALUE_SCALES_AT, place + VALUE_BIASES_AT);
        }
      }
    }
  }
};

// Whether the biases of keys are multiplied by the tensor cores: a row's biases, as loaded, are the columns 2 t and 2 t + 1 of
// a left operand for each member t, and the sums of q, in three parts of 8 bits, are its rows.
constexpr bool BIAS_PRODUCT = Key::BIASED && KEY_SCALE == BFLOAT && KEY_GROUPS == 2;

// What a warp keeps: queries, the output and the softmax state, for tiles of 8 queries.
struct State {
  u32 bias_query[QUERY_TILES];  // with BIAS_PRODUCT, part t of the sums of query lane / 4
  u32 query[QUERY_TILES][PIECES * PIECE_STEPS][2];
  float query_sum[QUERY_TILES][KEY_GROUPS][2];  // of a group's columns, of queries 2 t and 2 t + 1, times 2^-UNIT
  float out[QUERY_TILES][HEAD_DIM / 16][4];
  float bias[QUERY_TILES][VALUE_GROUPS][2];  // sums of weight times bias of the lane's keys
  float base[QUERY_TILES][2];                // of queries 2 t and 2 t + 1 of a tile
  float sum[QUERY_TILES][2];                 // of the lane's keys
  float factor[QUERY_TILES][2];              // turns sums of products into log2 units
  // of a quad, or of the warp if the weights are scaled: the product of both stays in the range of float16
  Factor<SCALED_WEIGHTS ? 1 : 15> value_factor;
};

// Fits the factor of the values to the largest scale of the lanes that share it, and rescales the output.
DEVICE void fit_values(State& state, float largest) {
#pragma unroll
  for (int step = 1; step < (SCALED_WEIGHTS ? 32 : 4); step *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  }
  const float ratio = state.value_factor.fit(largest);
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) state.out[n][i][j] *= ratio;
    }
  }
}

// Raises the bases of 8 queries to their largest scores.
DEVICE void raise_bases(State& state, int n, const float (&largest)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float x = largest[j];
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    const float base = fmaxf(state.base[n][j], x - BASE_BELOW);
    const float ratio = exp2_fast(state.base[n][j] - base);
    state.base[n][j] = base;
    state.sum[n][j] *= ratio;
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; ++g) state.bias[n][g][j] *= ratio;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; ++i) state.out[n][i][j] *= ratio, state.out[n][i][j + 2] *= ratio;
  }
}

// S^T = K Q^T for 16 keys: (q . n) of each group, times its scale, plus its bias times the sum of q.
DEVICE void score(float (&scores)[QUERY_TILES][4], const State& state, const Keys& keys) {
#pragma unroll
  for (int g = 0; g < KEY_GROUPS; ++g) {
    if constexpr (BIAS_PRODUCT) {
      if (g == 0) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[n][i] = 0;
          multiply_add_biases(scores[n], keys.biases[0].words[0], keys.biases[1].words[0], state.bias_query[n]);
        }
      }
    }
    float products[QUERY_TILES][4] = {};
#pragma unroll
    for (int p = g * GROUP_PIECES; p < (g + 1) * GROUP_PIECES; ++p) {
      u32 pairs[2][KEY_COUNT / 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) unpack_key<Key, KEY_COUNT>(pairs[i], keys.numbers[i][p]);
#pragma unroll
      for (int step = 0; step < PIECE_STEPS; ++step) {
#pragma unroll
        for (int n = 0; n < QUERY_TILES; ++n) {
          const u32(&query)[2] = state.query[n][PIECE_STEPS * p + step];
          multiply_add_f16(products[n], pairs[0][2 * step], pairs[1][2 * step], pairs[0][2 * step + 1],
                           pairs[1][2 * step + 1], query[0], query[1]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = scores[n][i];
        s = g == 0 && !BIAS_PRODUCT ? keys.scales[i / 2][g] * products[n][i] : keys.scales[i / 2][g] * products[n][i] + s;
        if constexpr (Key::BIASED && !BIAS_PRODUCT) s += keys.biases[i / 2][g] * state.query_sum[n][g][i % 2];
      }
    }
  }
}

// Caps and masks the scores of 16 keys. With a softcap they are in log2 units then, else times the row's factor.
DEVICE void limit(float (&scores)[4], const State& state, int n, const Lane& lane, const Problem& problem, int first_row,
                  int key, bool masked) {
  if constexpr (SOFTCAP) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = (1 - 2 * reciprocal_fast(1 + exp2_fast(scores[i] * state.factor[n][i % 2]))) * problem.scale_log2;
    }
  }
  if (masked) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * n + 2 * lane.member + i % 2, column = key + lane.row + i / 2 * 8;
      if (column >= problem.last_seen_by(row) || column < (WINDOW || SPANS ? problem.first_seen_by(row) : problem.first_seen_by_all())) {
        scores[i] = MINUS_INFINITY;
      }
    }
  }
}

// Converts the scores of a buffer's keys to weights; updates sums and, if needed, bases.
DEVICE void softmax(float (&scores)[TILES][QUERY_TILES][4], State& state, const Lane& lane, const Problem& problem,
                    int first_row, int key, bool masked) {
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
    float exponents[TILES][4], highest = MINUS_INFINITY;
    auto exponent = [&](float score, int j) {
      return SOFTCAP ? score - state.base[n][j] : score * state.factor[n][j] - state.base[n][j];
    };
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      limit(scores[m][n], state, n, lane, problem, first_row, key + 16 * m, masked);
#pragma unroll
      for (int i = 0; i < 4; ++i) highest = fmaxf(highest, exponents[m][i] = exponent(scores[m][n][i], i % 2));
    }
    if (__any_sync(~0u, highest > HEADROOM)) {
      float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest[i % 2] = fmaxf(largest[i % 2], scores[m][n][i] * (SOFTCAP ? 1 : state.factor[n][i % 2]));
        }
      }
      raise_bases(state, n, largest);
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) exponents[m][i] = exponent(scores[m][n][i], i % 2);
      }
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state.sum[n][i % 2] += scores[m][n][i] = exp2_fast(exponents[m][i]);
    }
  }
}

// Adds a chunk of the output, of which `pairs` are the numbers or values of keys 2 t and 2 t + 1, and 2 t + 8 and 2 t + 9.
DEVICE void add_chunk(State& state, int chunk, const u32 (&pairs)[2][VALUE_COUNT], const u32 (&weights)[QUERY_TILES][2]) {
#pragma unroll
  for (int m = 0; m < VALUE_COUNT / 2; ++m) {
#pragma unroll
    for (int n = 0; n < QUERY_TILES; ++n) {
      multiply_add_f16(state.out[n][chunk * VALUE_COUNT / 2 + m], pairs[0][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m],
                       pairs[1][2 * m + 1], weights[n][0], weights[n][1]);
    }
  }
}

// Fits the factor of the values to the scales of a buffer.
DEVICE void fit_scales(State& state, const Values (&values)[TILES]) {
  float largest = 0;
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; ++g) largest = fmaxf(largest, fabsf(values[m].scales[i][g]));
    }
  }
  if (!__all_sync(~0u, state.value_factor.fits(largest))) fit_values(state, largest);
}

// O^T += V^T P^T for 16 keys, whose scales and biases are those of the weights' keys.
DEVICE void add_scaled(State& state, const Values& values, const float (&scores)[QUERY_TILES][4]) {
#pragma unroll
  for (int g = 0; g < VALUE_GROUPS; ++g) {
    u32 weights[QUERY_TILES][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = values.scales[i][g] * state.value_factor.value;
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n) {
        weights[n][i] = transpose_matrix(pack_half(scores[n][2 * i] * scale, scores[n][2 * i + 1] * scale));
        if constexpr (Value::BIASED) {
          state.bias[n][g][0] += scores[n][2 * i] * values.biases[i][g];
          state.bias[n][g][1] += scores[n][2 * i + 1] * values.biases[i][g];
        }
      }
    }
    constexpr int GROUP_CHUNKS = CHUNKS / VALUE_GROUPS;
#pragma unroll
    for (int c = g * GROUP_CHUNKS; c < (g + 1) * GROUP_CHUNKS; ++c) {
      u32 pairs[2][VALUE_COUNT];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unpack_values<Value, VALUE_COUNT>(pairs[i], values.numbers[2 * i][c], values.numbers[2 * i + 1][c]);
      }
      add_chunk(state, c, pairs, weights);
    }
  }
}

// O^T += V^T P^T for 16 keys, whose values are dequantized.
DEVICE void add_dequantized(State& state, const Values& values, const float (&scores)[QUERY_TILES][4]) {
  float s[4][CHUNKS], b[4][CHUNKS], largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      s[i][c] = Value::scale(values.own[i][c].scale);
      b[i][c] = Value::BIASED ? Value::scale(values.own[i][c].bias) * power_of_two(-Value::UNIT) : 0;
      largest = fmaxf(largest, fmaxf(fabsf(s[i][c]), fabsf(b[i][c])));
    }
  }
  if (!__all_sync(~0u, state.value_factor.fits(largest))) fit_values(state, largest);
  const float f = state.value_factor.value;
  u32 weights[QUERY_TILES][2];
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[n][i] = transpose_matrix(pack_half(scores[n][2 * i], scores[n][2 * i + 1]));
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    u32 pairs[2][VALUE_COUNT];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int x = 2 * i, y = 2 * i + 1;
      const HalfScales<Value> scales(s[x][c] * f, s[y][c] * f, b[x][c] * f, b[y][c] * f);
      unpack_values<Value, VALUE_COUNT>(pairs[i], values.numbers[x][c], values.numbers[y][c]);
#pragma unroll
      for (int j = 0; j < VALUE_COUNT; ++j) pairs[i][j] = scales.apply(pairs[i][j], j % Value::FIELDS);
    }
    add_chunk(state, c, pairs, weights);
  }
}

// A warp's share of a split: every WARPS-th STEP keys of [begin, end). The copies of its first ones are under way.
DEVICE void attend(State& state, const Lane& lane, const Source& source, const Problem& problem, u32 ring, int first_row,
                   int begin, int end) {
  constexpr int ROUND = WARPS * STEP;
  // rows see different keys from here on, and up to there
  const int masked_from = SPANS ? 0 : CAUSAL ? problem.keys - problem.queries + 1 : problem.keys;
  const int masked_below = WINDOW ? problem.keys - problem.window : problem.first_seen_by_all();
  int stage = 0;
#pragma unroll 1
  for (int key = begin + threadIdx.x / 32 * STEP; key < end; key += ROUND) {
    wait_copies<STAGES - 2>();
    __syncwarp();  // the copies of all lanes are complete, and no lane reads the buffer that is filled next
    const int early = key + (STAGES - 1) * ROUND;
    if (early < end) source.copy(ring + (stage == 0 ? STAGES - 1 : stage - 1) * BUFFER, early, problem);
    commit_copies();
    const int buffer = stage * BUFFER;
    float scores[TILES][QUERY_TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      Keys keys;
      keys.load(lane, buffer, m);
      score(scores[m], state, keys);
    }
    softmax(scores, state, lane, problem, first_row, key, key + STEP > masked_from || key < masked_below);
    Values values[TILES];
    if constexpr (SCALED_WEIGHTS) {
#pragma unroll
      for (int m = 0; m < TILES; ++m) values[m].load_scales(lane, buffer, m);
      fit_scales(state, values);
    }
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      values[m].load(lane, buffer, m);
      if constexpr (SCALED_WEIGHTS) add_scaled(state, values[m], scores[m]);
      else add_dequantized(state, values[m], scores[m]);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
}

// Starts the copies to a warp's first buffers.
DEVICE void start(const Source& source, const Problem& problem, u32 ring, int begin, int end) {
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) {
    const int key = begin + (i * WARPS + threadIdx.x / 32) * STEP;
    if (key < end) source.copy(ring + i * BUFFER, key, problem);
    commit_copies();
  }
}

// Element of a pair.
DEVICE float element(u32 pair, int half) { return half == 0 ? low_of(pair) : high_of(pair); }

DEVICE float upper_half(float x) { return __uint_as_float(__float_as_uint(x) & 0xffff0000u); }
DEVICE float sum_in_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Elements of 8 queries, as loaded, in the columns' order of the keys; a lane has columns of query lane / 4.
struct Queries {
  Packed<16, KEY_COUNT> elements[PIECES];

  DEVICE Queries(const Lane& lane, const char* place, bool valid, int columns) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      const int column = 4 * KEY_COUNT * p + KEY_COUNT * lane.member;
      if (valid && column < columns) elements[p].load(place + 2 * column);
      else elements[p].clear();
    }
  }
};

// Converts 8 queries, scaled to float16. A column is divided by what the field of its number is multiplied by.
DEVICE void take_queries(State& state, int n, const Lane& lane, const Queries& queries, const Problem& problem) {
  constexpr int PAIRS = KEY_COUNT / 2;
  float x[PIECES * PAIRS][2], largest = 0;
#pragma unroll
  for (int i = 0; i < PIECES * PAIRS; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_piece = Key::template key_column<KEY_COUNT>(i % PAIRS, half);
      x[i][half] = element(queries.elements[i / PAIRS].words[of_piece / 2], of_piece % 2);
      largest = fmaxf(largest, fabsf(x[i][half]));
    }
  }
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  // below 2^14 in float16; a row of zeros or subnormals keeps a factor that is a normal number
  const int exponent = max(exponent_of(largest), -100);
  const float factor = power_of_two(13 - exponent);
  float sums[KEY_GROUPS] = {};
#pragma unroll
  for (int i = 0; i < PIECES * PAIRS; ++i) {
    sums[i / PAIRS / GROUP_PIECES] += (x[i][0] + x[i][1]) * factor;
    const float of_field = factor * power_of_two(-Key::field_shift(Key::template key_field<KEY_COUNT>(i % PAIRS)));
    state.query[n][i / 2][i % 2] = pack_half(x[i][0] * of_field, x[i][1] * of_field);
  }
  const float into_log2 = SOFTCAP ? 2 * 1.44269504f * problem.into_cap : problem.scale_log2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row_lane = 4 * (2 * lane.member + j);
    state.factor[n][j] = into_log2 * power_of_two(__shfl_sync(~0u, exponent, row_lane) - 13 + Key::UNIT);
    state.base[n][j] = NO_BASE, state.sum[n][j] = 0;
  }
  u32 rest[KEY_GROUPS];
#pragma unroll
  for (int g = 0; g < KEY_GROUPS; ++g) {
    const float sum = sum_in_quad(sums[g]) * power_of_two(-Key::UNIT);
    if constexpr (BIAS_PRODUCT) {  // bits of the first, second or third 8 of the sum: what is cut off is exact
      const float first = upper_half(sum), second = upper_half(sum - first);
      const float part = lane.member == 0 ? first : lane.member == 1 ? second : lane.member == 2 ? sum - first - second : 0;
      rest[g] = __float_as_uint(part) >> 16;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) state.query_sum[n][g][j] = __shfl_sync(~0u, sum, 4 * (2 * lane.member + j));
  }
  if constexpr (BIAS_PRODUCT) state.bias_query[n] = rest[0] | rest[1] << 16;
}

// Writes a warp's result of `count` rows to the block's shared memory: the maxima are bases.
DEVICE void leave_warp(float* block, const State& state, const Lane& lane, int count) {
  const float unscale = power_of_two(Value::UNIT) * state.value_factor.inverse();
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = 8 * n + 2 * lane.member + j;
      float sum = state.sum[n][j], bias[VALUE_GROUPS];
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; ++g) bias[g] = state.bias[n][g][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
        if constexpr (SCALED_WEIGHTS && Value::BIASED) {
#pragma unroll
          for (int g = 0; g < VALUE_GROUPS; ++g) bias[g] += __shfl_xor_sync(~0u, bias[g], step);
        }
      }
      if (row >= count) continue;
      if (lane.quad == 0) leave_row(block, row, sum > 0 ? state.base[n][j] : MINUS_INFINITY, sum);
      float* place = block + threadIdx.x / 32 * WARP_RESULT + result_place(row);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; i += 2) {
        const int chunk = i / (VALUE_COUNT / 2), of_chunk = 2 * (i % (VALUE_COUNT / 2));
        float made[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          made[k] = state.out[n][i + k / 2][j + 2 * (k % 2)] * unscale;
          // numbers in higher fields are larger; what is dequantized is not
          if constexpr (SCALED_WEIGHTS) {
            made[k] = made[k] * power_of_two(-Value::field_shift((of_chunk + k) % Value::FIELDS)) +
                      bias[8 * VALUE_COUNT * chunk / VALUE_GROUP];
          }
        }
        *reinterpret_cast<float4*>(place + VALUE_COUNT * (8 * chunk + lane.quad) + of_chunk) =
            make_float4(made[0], made[1], made[2], made[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key, const char* key_scales, const char* key_biases, const char* value,
                const char* value_scales, const char* value_biases, char* output, float* logsumexp, float2* stats,
                float* parts, int kv_heads, int group, int queries, int keys, int columns, int scale_log2_bits,
                int into_cap_bits, int window, int first_key, int split_keys, int splits, i64 query_batch, i64 query_head,
                i64 query_row, i64 key_batch, i64 key_head, i64 key_row, i64 key_scale_batch, i64 key_scale_head,
                i64 key_scale_row, i64 key_bias_batch, i64 key_bias_head, i64 key_bias_row, i64 value_batch, i64 value_head,
                i64 value_row, i64 value_scale_batch, i64 value_scale_head, i64 value_scale_row, i64 value_bias_batch,
                i64 value_bias_head, i64 value_bias_row, u64 serial
#if SPANS
                , int first_0, int last_0, int first_1, int last_1, int first_2, int last_2
#endif
                ) {
  extern __shared__ __align__(1024) char shared[];
  const Problem problem{group, queries, keys, columns, __int_as_float(scale_log2_bits), __int_as_float(into_cap_bits),
                        window, Slopes()
#if SPANS
                        , {first_0, first_1, first_2}, {last_0, last_1, last_2}
#endif
  };
  const Block place(problem, kv_heads, splits);
  const int batch = place.batch, head = place.head, first_row = place.first_row;
  constexpr int KS = Key::SCALE_BYTES, VS = Value::SCALE_BYTES;
  const Plane k{key + (batch * key_batch + head * key_head) * 4,
                key_scales + (batch * key_scale_batch + head * key_scale_head) * KS,
                key_biases + (batch * key_bias_batch + head * key_bias_head) * KS,
                static_cast<int>(key_row) * 4, static_cast<int>(key_scale_row) * KS, static_cast<int>(key_bias_row) * KS};
  const Plane v{value + (batch * value_batch + head * value_head) * 4,
                value_scales + (batch * value_scale_batch + head * value_scale_head) * VS,
                value_biases + (batch * value_bias_batch + head * value_bias_head) * VS,
                static_cast<int>(value_row) * 4, static_cast<int>(value_scale_row) * VS,
                static_cast<int>(value_bias_row) * VS};

  const Source source(k, v);
  const int begin = first_key + place.split * split_keys, end = min(keys, begin + split_keys);
  const u32 ring = Lane::opaque(shared_address(shared) + threadIdx.x / 32 * STAGES * BUFFER);
  const Lane lane(ring);
  const auto load = [&](int n) {
    const int row = first_row + 8 * n + threadIdx.x % 32 / 4;
    const bool valid = row < problem.rows();
    const int of_head = valid ? problem.head_of(row) : 0, of_query = valid ? problem.query_of(row) : 0;
    const i64 place = batch * query_batch + (head * group + of_head) * query_head + of_query * query_row;
    return Queries(lane, query + place * 2, valid, columns);
  };
  const Queries first = load(0);  // before the copies, behind which it would wait
  start(source, problem, ring, begin, end);
  const Parts own(parts, place.tile, place.split, splits, serial);
  const Counter counter(own);
  State state = {};
  take_queries(state, 0, lane, first, problem);
#pragma unroll
  for (int n = 1; n < QUERY_TILES; ++n) take_queries(state, n, lane, load(n), problem);
  counter.reset(own);
  attend(state, lane, source, problem, ring, first_row, begin, end);

  const u64 row = static_cast<u64>(place.plane) * problem.rows() + first_row;
  const Results results{output + row * columns * 2, RowResults{logsumexp, stats}.from(row), 1, columns,
                        min(ROWS, problem.rows() - first_row)};
  float* block = reinterpret_cast<float*>(shared);
  __syncthreads();  // no warp reads its buffers any more
  leave_warp(block, state, lane, results.rows);
  join_block(block, results, own);
}
