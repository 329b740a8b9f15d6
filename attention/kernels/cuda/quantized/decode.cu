// Split-K kernel for few queries and many quantized keys and values, which are unpacked in registers on their way from device
// memory to the tensor cores.
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
// loads consecutive numbers of a row, unpacks them to pairs of float16 (quantized/numbers.cuh), and these are its operands:
// nothing passes through shared memory but P^T, transposed by movmatrix. The queries are read in the same order.
//
//   scores     sum over groups of  scale * (q . n) + bias * sum of q     in float32, once for each key and group
//   output     n times (scale * weight), and the bias times the weight, which is added up apart; the groups of 32 or 16 values
//              would need too many products, so their values are dequantized: one multiplication for two of them
//
// Tiles of 16 keys are dealt round-robin to the warps of a split. A warp loads its next tile when it has used the current one,
// and prefetches later ones to the L2 cache. In the epilogue the warps' partial results are combined in shared memory, and
// those of several splits by the last block to finish: see sm90/decode_join.cuh.
//
// Weights are relative to a row's base, which is raised only when a score exceeds it by HEADROOM: most tiles need neither a
// maximum over lanes nor a rescaled output (FlashAttention 4). Queries are scaled to float16 by a power of two per row, and
// scales of values by one that follows the largest of them so far.

constexpr int STEP = 16;  // keys per tile
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

// c (16 x 8) += a (16 x 16) @ b (16 x 8) in float16
DEVICE void multiply_add_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 transpose_matrix(u32 word) {
  u32 made;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(made) : "r"(word));
  return made;
}
DEVICE void prefetch_l2(const char* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }

// A lane's place: planes of keys and values from its first column on, and what it asks for in advance.
struct Lane {
  int quad, member;
  Plane keys, values;
  const char *early_numbers, *early_scales;  // of keys or values: lanes share the rows of both out
  int early_number_row, early_scale_row;
  bool dense;  // rows of all parts are adjacent in memory

  DEVICE Lane(const Plane& k, const Plane& v) {
    u32 lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));  // opaque, so that it is not read from the special register in every tile
    quad = lane / 4, member = lane % 4;
    keys = k, values = v;
    keys.numbers += KEY_COUNT * member * KEY_BITS / 8;
    if constexpr (SCALED_WEIGHTS) values.numbers += VALUE_COUNT * quad * VALUE_BITS / 8;
    else values = from_column<Value>(v, VALUE_COUNT * quad);
    const bool first = lane < 16;
    early_numbers = first ? k.numbers : v.numbers, early_number_row = first ? k.number_row : v.number_row;
    const bool scale = lane % 16 < 8 || !(first ? Key::BIASED : Value::BIASED);
    early_scales = first ? (scale ? k.scales : k.biases) : (scale ? v.scales : v.biases);
    early_scale_row = first ? (scale ? k.scale_row : k.bias_row) : (scale ? v.scale_row : v.bias_row);
    dense = WHOLE && is_dense<Key>(k) && is_dense<Value>(v);
  }
  template <typename F>
  static DEVICE bool is_dense(const Plane& plane) {
    constexpr int SCALES = HEAD_DIM / F::GROUP * F::SCALE_BYTES;
    return plane.number_row == HEAD_DIM * F::BITS / 8 && plane.scale_row == SCALES && (!F::BIASED || plane.bias_row == SCALES);
  }
  DEVICE int index() const { return 4 * quad + member; }

  // Asks for the numbers, scales and biases of 16 keys and values to be brought to the L2 cache.
  DEVICE void prefetch(int key, int last) const {
    const PlaneRow row({early_numbers, early_scales, nullptr, early_number_row, early_scale_row, 0},
                       min(key + index() % 16, last));
    prefetch_l2(row.numbers);
    if constexpr (HEAD_DIM * KEY_BITS > 1024 || HEAD_DIM * VALUE_BITS > 1024) prefetch_l2(row.numbers + 128);
    prefetch_l2(row.scales);
  }
};

// Row `key` + `offset` of a plane, or the last one if that is beyond it. With DENSE all such rows exist, at constant distances.
template <typename F, bool DENSE>
DEVICE PlaneRow row_at(const Plane& plane, int key, int offset, int last) {
  if constexpr (!DENSE) return PlaneRow(plane, min(key + offset, last));
  constexpr int NUMBERS = HEAD_DIM * F::BITS / 8, SCALES = HEAD_DIM / F::GROUP * F::SCALE_BYTES;
  const PlaneRow first({plane.numbers, plane.scales, plane.biases, NUMBERS, SCALES, SCALES}, key);
  return PlaneRow(first, offset * NUMBERS, offset * SCALES);
}

// 16 keys as loaded: quad r has keys r and r + 8. Lanes of columns beyond the head dim have zeros.
struct Keys {
  Packed<KEY_BITS, KEY_COUNT> numbers[2][PIECES];
  RowScales<Key, KEY_GROUPS> scales[2], biases[2];

  // Loads the keys from `key` on; those beyond the last one are copies of it.
  template <bool DENSE>
  DEVICE void load(const Lane& lane, int key, int last, int columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PlaneRow row = row_at<Key, DENSE>(lane.keys, key + lane.quad, 8 * i, last);
      scales[i].load(row.scales, columns / KEY_GROUP);
      if constexpr (Key::BIASED) biases[i].load(row.biases, columns / KEY_GROUP);
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        const int column = 4 * KEY_COUNT * p;
        if (WHOLE || column + KEY_COUNT * lane.member < columns) numbers[i][p].load(row.numbers + column * KEY_BITS / 8);
        else numbers[i][p].clear();
      }
    }
  }
};

// The values of 16 keys as loaded: member t of a quad has numbers of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Scales are those
// of the keys of the weights, quad r's r and r + 8, if the weights are scaled, else those of the numbers.
struct Values {
  Packed<VALUE_BITS, VALUE_COUNT> numbers[4][CHUNKS];
  RowScales<Value, VALUE_GROUPS> scales[2], biases[2];
  RawScale<Value> own[4][CHUNKS];

  template <bool DENSE>
  DEVICE void load(const Lane& lane, int key, int last, int columns) {
    if constexpr (SCALED_WEIGHTS) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const PlaneRow row = row_at<Value, DENSE>(lane.values, key + lane.quad, 8 * i, last);
        scales[i].load(row.scales, columns / VALUE_GROUP);
        if constexpr (Value::BIASED) biases[i].load(row.biases, columns / VALUE_GROUP);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const PlaneRow row = row_at<Value, DENSE>(lane.values, key + 2 * lane.member, i % 2 + i / 2 * 8, last);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = 8 * VALUE_COUNT * c;
        const bool valid = WHOLE || column + VALUE_COUNT * lane.quad < columns;
        if constexpr (!SCALED_WEIGHTS) row.load<Value>(numbers[i][c], own[i][c], column, valid);
        else if (valid) numbers[i][c].load(row.numbers + column * VALUE_BITS / 8);
        else numbers[i][c].clear();
      }
    }
  }
};

// What a warp keeps: queries, the output and the softmax state, for tiles of 8 queries.
struct State {
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
        s = g == 0 ? keys.scales[i / 2][g] * products[n][i] : keys.scales[i / 2][g] * products[n][i] + s;
        if constexpr (Key::BIASED) s += keys.biases[i / 2][g] * state.query_sum[n][g][i % 2];
      }
    }
  }
}

// Converts products to scores in log2 units, capped and masked.
DEVICE void finish_scores(float (&scores)[4], const State& state, int n, const Lane& lane, const Problem& problem,
                          int first_row, int key, bool masked) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x = scores[i] * state.factor[n][i % 2];
    if (SOFTCAP) x = (1 - 2 * reciprocal_fast(1 + exp2_fast(x))) * problem.scale_log2;
    scores[i] = x;
  }
  if (masked) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * n + 2 * lane.member + i % 2, column = key + lane.quad + i / 2 * 8;
      if (column >= problem.last_seen_by(row) || (WINDOW && column < problem.first_seen_by(row))) scores[i] = MINUS_INFINITY;
    }
  }
}

// Converts scores to weights; updates sums and, if needed, bases.
DEVICE void softmax(float (&scores)[QUERY_TILES][4], State& state, const Lane& lane, const Problem& problem, int first_row,
                    int key, bool masked) {
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
    finish_scores(scores[n], state, n, lane, problem, first_row, key, masked);
    const float largest[2] = {fmaxf(scores[n][0], scores[n][2]), fmaxf(scores[n][1], scores[n][3])};
    const bool above = largest[0] > state.base[n][0] + HEADROOM || largest[1] > state.base[n][1] + HEADROOM;
    if (__any_sync(~0u, above)) raise_bases(state, n, largest);
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sum[n][i % 2] += scores[n][i] = exp2_fast(scores[n][i] - state.base[n][i % 2]);
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

// O^T += V^T P^T for 16 keys, whose scales and biases are those of the weights' keys.
DEVICE void add_scaled(State& state, const Values& values, const float (&scores)[QUERY_TILES][4]) {
  float s[2][VALUE_GROUPS], largest = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS; ++g) {
      s[i][g] = values.scales[i][g];
      largest = fmaxf(largest, fabsf(s[i][g]));
    }
  }
  if (!__all_sync(~0u, state.value_factor.fits(largest))) fit_values(state, largest);
#pragma unroll
  for (int g = 0; g < VALUE_GROUPS; ++g) {
    u32 weights[QUERY_TILES][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = s[i][g] * state.value_factor.value;
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

// A warp's share of a split: every WARPS-th tile of 16 keys of [begin, end).
DEVICE void attend(State& state, const Lane& lane, const Problem& problem, int first_row, int begin, int end) {
  constexpr int ROUND = WARPS * STEP;
  const int last = problem.keys - 1;
  // rows see different keys from here on, and up to there
  const int masked_from = CAUSAL ? problem.keys - problem.queries + 1 : problem.keys;
  const int masked_below = WINDOW ? problem.keys - problem.window : 0;
  int key = begin + threadIdx.x / 32 * STEP;
  if (key >= end) return;
  Keys keys;
  Values values;
  auto load_keys = [&](int key) {
    if (lane.dense && key + STEP <= problem.keys) keys.load<true>(lane, key, last, problem.columns);
    else keys.load<false>(lane, key, last, problem.columns);
  };
  auto load_values = [&](int key) {
    if (lane.dense && key + STEP <= problem.keys) values.load<true>(lane, key, last, problem.columns);
    else values.load<false>(lane, key, last, problem.columns);
  };
  load_keys(key);
  load_values(key);
#pragma unroll
  for (int i = 1; i < PREFETCH; ++i) {
    if (key + i * ROUND < end) lane.prefetch(key + i * ROUND, last);
  }
#pragma unroll 1
  while (true) {
    const int next = key + ROUND;
    if (PREFETCH > 0 && key + PREFETCH * ROUND < end) lane.prefetch(key + PREFETCH * ROUND, last);
    float scores[QUERY_TILES][4];
    score(scores, state, keys);
    if (next < end) load_keys(next);
    softmax(scores, state, lane, problem, first_row, key, key + STEP > masked_from || (WINDOW && key < masked_below));
    if constexpr (SCALED_WEIGHTS) add_scaled(state, values, scores);
    else add_dequantized(state, values, scores);
    if (next >= end) return;
    load_values(next);
    key = next;
  }
}

DEVICE float element(unsigned short bits) {
#if BFLOAT16
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  return from_half(bits);
#endif
}

DEVICE float sum_in_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Loads 8 queries in the columns' order of the keys, scaled to float16; a lane has columns of query lane / 4. A column is
// divided by what the field of its number is multiplied by.
DEVICE void load_queries(State& state, int n, const Lane& lane, const char* place, bool valid, const Problem& problem) {
  constexpr int PAIRS = KEY_COUNT / 2;
  float x[PIECES * PAIRS][2], largest = 0;
#pragma unroll
  for (int i = 0; i < PIECES * PAIRS; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_piece = Key::template key_column<KEY_COUNT>(i % PAIRS, half);
      const int column = 4 * KEY_COUNT * (i / PAIRS) + KEY_COUNT * lane.member + of_piece;
      x[i][half] = valid && column < problem.columns ? element(reinterpret_cast<const unsigned short*>(place)[column]) : 0;
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
#pragma unroll
  for (int g = 0; g < KEY_GROUPS; ++g) {
    const float sum = sum_in_quad(sums[g]) * power_of_two(-Key::UNIT);
#pragma unroll
    for (int j = 0; j < 2; ++j) state.query_sum[n][g][j] = __shfl_sync(~0u, sum, 4 * (2 * lane.member + j));
  }
}

// Writes a warp's result of `count` rows to shared memory: output [ROWS][HEAD_DIM], then bases and sums.
DEVICE void leave_warp(float* place, const State& state, const Lane& lane, int count) {
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
      if (lane.quad == 0) {
        place[ROWS * HEAD_DIM + row] = sum > 0 ? state.base[n][j] : MINUS_INFINITY;
        place[ROWS * HEAD_DIM + ROWS + row] = sum;
      }
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        const int chunk = i / (VALUE_COUNT / 2), of_chunk = 2 * (i % (VALUE_COUNT / 2));
        float made[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          made[k] = state.out[n][i][j + 2 * k] * unscale;
          // numbers in higher fields are larger; what is dequantized is not
          if constexpr (SCALED_WEIGHTS) {
            made[k] = made[k] * power_of_two(-Value::field_shift((of_chunk + k) % Value::FIELDS)) +
                      bias[8 * VALUE_COUNT * chunk / VALUE_GROUP];
          }
        }
        *reinterpret_cast<float2*>(place + row * HEAD_DIM + VALUE_COUNT * (8 * chunk + lane.quad) + of_chunk) =
            make_float2(made[0], made[1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key, const char* key_scales, const char* key_biases, const char* value,
                const char* value_scales, const char* value_biases, char* output, float* logsumexp, float2* stats,
                float* parts, u64* marks, int heads, int group, int queries, int keys, int columns, int scale_log2_bits,
                int into_cap_bits, int window, int first_key, int split_keys, int splits, i64 query_batch, i64 query_head,
                i64 query_row, i64 key_batch, i64 key_head, i64 key_row, i64 key_scale_batch, i64 key_scale_head,
                i64 key_scale_row, i64 key_bias_batch, i64 key_bias_head, i64 key_bias_row, i64 value_batch, i64 value_head,
                i64 value_row, i64 value_scale_batch, i64 value_scale_head, i64 value_scale_row, i64 value_bias_batch,
                i64 value_bias_head, i64 value_bias_row, u64 serial) {
  extern __shared__ __align__(1024) char shared[];
  const Problem problem{group, queries, keys, columns, __int_as_float(scale_log2_bits), __int_as_float(into_cap_bits),
                        window, Slopes()};
  const int row_tiles = (problem.rows() + ROWS - 1) / ROWS;
  const int split = blockIdx.x % splits, tile = blockIdx.x / splits, first_row = tile % row_tiles * ROWS;
  const int plane = tile / row_tiles, batch = plane / (heads / group), head = plane % (heads / group);
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

  const Lane lane(k, v);
  State state = {};
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
    const int row = first_row + 8 * n + threadIdx.x % 32 / 4;
    const bool valid = row < problem.rows();
    const int of_head = valid ? row / queries : 0, of_query = valid ? row % queries : 0;
    load_queries(state, n, lane, query + (batch * query_batch + (head * group + of_head) * query_head + of_query * query_row) * 2,
                 valid, problem);
  }
  const int begin = first_key + split * split_keys;
  attend(state, lane, problem, first_row, begin, min(keys, begin + split_keys));

  const u64 place = static_cast<u64>(plane) * problem.rows() + first_row;
  const Results results{output + place * columns * 2, RowResults{logsumexp, stats}.from(place), 1, columns,
                        min(ROWS, problem.rows() - first_row)};
  float* left = reinterpret_cast<float*>(shared);
  leave_warp(left + threadIdx.x / 32 * WARP_RESULT, state, lane, results.rows);
  join_block(left, results, {parts, marks, serial, tile * splits, split, splits});
}
