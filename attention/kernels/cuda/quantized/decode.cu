// Split-K kernel for few queries and many quantized keys and values, which are dequantized in registers on their way from
// device memory to the tensor cores.
//
//                  16 keys of a warp                                a lane: quad r = lane / 4, member t = lane % 4
//                +---------------------+                            (rows of an accumulator: r and r + 8)
//   S^T = K Q^T  | K (16 x D): rows are| x Q^T (D x 8 queries)      keys r and r + 8; of every 64 columns 16 t .. 16 t + 15
//                | keys                |
//                +---------------------+
//   O^T += V^T P^T: V^T (D x 16 keys)    x P^T (16 keys x 8)        columns 16 r .. 16 r + 15 of keys 2 t, + 1, + 8, + 9
//
// Both products have the packed operand on the left, whose tiles have 16 rows, and the queries on the right, whose tiles have
// 8 columns: the heads that share a key head are rarely more. The order of the columns within a product is free, so each lane
// loads 16 consecutive numbers of a row, dequantizes them to pairs of float16 (quantized/numbers.cuh), and these are its
// operands: nothing passes through shared memory but P^T, transposed by movmatrix. The queries are read in the same order.
//
// Tiles of 16 keys are dealt round-robin to the warps of a split. A warp loads its next tile before it uses the current one,
// and prefetches later ones to the L2 cache. In the epilogue the warps' partial results are combined in shared memory, and
// those of several splits by the last block to finish: see sm90/decode_join.cuh.
//
// Weights are relative to a row's base, which is raised only when a score exceeds it by HEADROOM: most tiles need neither a
// maximum over lanes nor a rescaled output (FlashAttention 4). Queries are scaled to float16 by a power of two per row.

constexpr int STEP = 16;  // keys per tile
constexpr int PIECES = HEAD_DIM / 64;                       // of a key's columns, 16 for each lane of a quad
constexpr int VALUE_COLUMNS = HEAD_DIM < 128 ? 8 : 16;      // of a chunk, for each quad
constexpr int CHUNKS = HEAD_DIM / (8 * VALUE_COLUMNS);
constexpr float BASE_BELOW = 6, HEADROOM = 14;  // a base is set BASE_BELOW below the maximum, in log2 units
constexpr float NO_BASE = -1e30f;               // below every score
static_assert(ROWS == 8 * QUERY_TILES);

using Key = Format<KEY_BITS, KEY_KIND, KEY_GROUP, KEY_SCALE>;
using Value = Format<VALUE_BITS, VALUE_KIND, VALUE_GROUP, VALUE_SCALE>;

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

// Numbers, scales and biases of a plane's keys or values; strides of rows in bytes.
struct Plane {
  const char *numbers, *scales, *biases;
  int number_row, scale_row, bias_row;
};

struct PlaneRow {
  const char *numbers, *scales, *biases;

  DEVICE PlaneRow(const Plane& plane, int row)
      : numbers(plane.numbers + static_cast<i64>(row) * plane.number_row),
        scales(plane.scales + static_cast<i64>(row) * plane.scale_row),
        biases(plane.biases + static_cast<i64>(row) * plane.bias_row) {}

  // Loads consecutive numbers from a column on, and their scale.
  template <typename F, int COUNT>
  DEVICE void load(Packed<F::BITS, COUNT>& packed, RawScale<F>& scale, int column, int columns) const {
    if (WHOLE || column < columns) {
      packed.load(numbers + column * F::BITS / 8);
      scale.load(scales, biases, column / F::GROUP * F::SCALE_BYTES);
    } else {
      packed.clear(), scale.clear();
    }
  }
};

// 16 keys as loaded: quad r has keys r and r + 8. Lanes of columns beyond the head dim have zeros.
struct Keys {
  Packed<KEY_BITS, 16> numbers[2][PIECES];
  RawScale<Key> scales[2][PIECES];

  // Loads the keys from `key` on; those beyond the last one are copies of it.
  DEVICE void load(const Plane& plane, int key, int last, int columns) {
    const int quad = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PlaneRow row(plane, min(key + quad + 8 * i, last));
#pragma unroll
      for (int p = 0; p < PIECES; ++p) row.load<Key>(numbers[i][p], scales[i][p], 64 * p + 16 * member, columns);
    }
  }
};

// The values of 16 keys as loaded: member t of a quad has those of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
struct Values {
  Packed<VALUE_BITS, VALUE_COLUMNS> numbers[4][CHUNKS];
  RawScale<Value> scales[4][CHUNKS];

  DEVICE void load(const Plane& plane, int key, int last, int columns) {
    const int quad = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const PlaneRow row(plane, min(key + 2 * member + i % 2 + i / 2 * 8, last));
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        row.load<Value>(numbers[i][c], scales[i][c], VALUE_COLUMNS * (8 * c + quad), columns);
      }
    }
  }
};

// Asks for the numbers, scales and biases of 16 keys and values to be brought to the L2 cache.
DEVICE void prefetch_tile(const Plane& k, const Plane& v, int key, int last) {
  const int lane = threadIdx.x % 32;
  const bool first = lane < 16;
  const i64 row = min(key + lane % 16, last);
  const char* numbers = (first ? k.numbers : v.numbers) + row * (first ? k.number_row : v.number_row);
  prefetch_l2(numbers);
  if constexpr (HEAD_DIM * KEY_BITS > 1024 || HEAD_DIM * VALUE_BITS > 1024) prefetch_l2(numbers + 128);
  if (lane % 16 == 0) prefetch_l2((first ? k.scales : v.scales) + row * (first ? k.scale_row : v.scale_row));
  if (lane % 16 == 8 && (first ? Key::BIASED : Value::BIASED)) {
    prefetch_l2((first ? k.biases : v.biases) + row * (first ? k.bias_row : v.bias_row));
  }
}

// What a warp keeps: queries, the output and the softmax state, for tiles of 8 queries.
struct State {
  u32 query[QUERY_TILES][PIECES * 4][2];
  float out[QUERY_TILES][HEAD_DIM / 16][4];
  float base[QUERY_TILES][2];                // of queries 2 t and 2 t + 1 of a tile
  float sum[QUERY_TILES][2];                 // of the lane's keys
  float row_factor[QUERY_TILES][2];          // turns products of scaled queries with keys into log2 units
  float score_factor[QUERY_TILES][2];        // the same with keys times the factor of the quad and 2^-UNIT
  Factor key_factor, value_factor;           // of a quad
};

DEVICE float max_in_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Fits the factor of a quad's keys to their largest scale.
DEVICE void fit_keys(State& state, float largest) {
  state.key_factor.fit(max_in_quad(largest));
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) state.score_factor[n][j] = state.row_factor[n][j] * (power_of_two(Key::UNIT) * state.key_factor.inverse());
  }
}

// Fits the factor of a quad's values to their largest scale, and rescales its output.
DEVICE void fit_values(State& state, float largest) {
  const float ratio = state.value_factor.fit(max_in_quad(largest));
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
    for (int i = 0; i < HEAD_DIM / 16; ++i) state.out[n][i][j] *= ratio, state.out[n][i][j + 2] *= ratio;
  }
}

// Converts products to scores in log2 units, capped and masked.
DEVICE void finish_scores(float (&scores)[4], const State& state, int n, const Problem& problem, int first_row, int key,
                          bool masked) {
  const int quad = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x = scores[i] * state.score_factor[n][i % 2];
    if (SOFTCAP) x = (1 - 2 * reciprocal_fast(1 + exp2_fast(x))) * problem.scale_log2;
    scores[i] = x;
  }
  if (masked) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 8 * n + 2 * member + i % 2, column = key + quad + i / 2 * 8;
      if (column >= problem.last_seen_by(row) || (WINDOW && column < problem.first_seen_by(row))) scores[i] = MINUS_INFINITY;
    }
  }
}

// Converted scales and biases of A rows with B scales each; returns the largest magnitude that a factor has to fit.
template <typename F, int A, int B>
DEVICE float convert(float (&scales)[A][B], float (&biases)[A][B], const RawScale<F> (&raw)[A][B]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < A; ++i) {
#pragma unroll
    for (int j = 0; j < B; ++j) {
      scales[i][j] = F::scale(raw[i][j].scale);
      largest = fmaxf(largest, fabsf(scales[i][j]));
      if constexpr (F::BIASED) {
        biases[i][j] = F::scale(raw[i][j].bias) * power_of_two(-F::UNIT);
        largest = fmaxf(largest, fabsf(biases[i][j]));
      } else {
        biases[i][j] = 0;
      }
    }
  }
  return largest;
}

// S^T = K Q^T for 16 keys.
DEVICE void score(float (&scores)[QUERY_TILES][4], State& state, const Keys& keys) {
  float s[2][PIECES], b[2][PIECES];
  const float largest = convert<Key>(s, b, keys.scales);
  if (__any_sync(~0u, largest * state.key_factor.value > Factor::LIMIT)) fit_keys(state, largest);
  const float factor = state.key_factor.value;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    u32 pairs[2][8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = s[i][p] * factor, bias = b[i][p] * factor;
      dequantize_key<Key>(pairs[i], keys.numbers[i][p], Scales<Key>(scale, scale, bias, bias));
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n) {
        multiply_add_f16(scores[n], pairs[0][2 * step], pairs[1][2 * step], pairs[0][2 * step + 1], pairs[1][2 * step + 1],
                         state.query[n][4 * p + step][0], state.query[n][4 * p + step][1]);
      }
    }
  }
}

// Converts scores to weights P^T, as right operands; updates sums and, if needed, bases.
DEVICE void softmax(u32 (&weights)[QUERY_TILES][2], float (&scores)[QUERY_TILES][4], State& state, const Problem& problem,
                    int first_row, int key, bool masked) {
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
    finish_scores(scores[n], state, n, problem, first_row, key, masked);
    const float largest[2] = {fmaxf(scores[n][0], scores[n][2]), fmaxf(scores[n][1], scores[n][3])};
    const bool above = largest[0] > state.base[n][0] + HEADROOM || largest[1] > state.base[n][1] + HEADROOM;
    if (__any_sync(~0u, above)) raise_bases(state, n, largest);
#pragma unroll
    for (int i = 0; i < 4; ++i) state.sum[n][i % 2] += scores[n][i] = exp2_fast(scores[n][i] - state.base[n][i % 2]);
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[n][i] = transpose_matrix(pack_half(scores[n][2 * i], scores[n][2 * i + 1]));
  }
}

// O^T += V^T P^T for 16 keys.
DEVICE void add_values(State& state, const Values& values, const u32 (&weights)[QUERY_TILES][2]) {
  float s[4][CHUNKS], b[4][CHUNKS];
  const float largest = convert<Value>(s, b, values.scales);
  if (__any_sync(~0u, largest * state.value_factor.value > Factor::LIMIT)) fit_values(state, largest);
  const float f = state.value_factor.value;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    u32 pairs[2][VALUE_COLUMNS];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int x = 2 * i, y = 2 * i + 1;
      dequantize_values<Value, VALUE_COLUMNS>(pairs[i], values.numbers[x][c], values.numbers[y][c],
                                              Scales<Value>(s[x][c] * f, s[y][c] * f, b[x][c] * f, b[y][c] * f));
    }
#pragma unroll
    for (int m = 0; m < VALUE_COLUMNS / 2; ++m) {
#pragma unroll
      for (int n = 0; n < QUERY_TILES; ++n) {
        multiply_add_f16(state.out[n][c * VALUE_COLUMNS / 2 + m], pairs[0][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m],
                         pairs[1][2 * m + 1], weights[n][0], weights[n][1]);
      }
    }
  }
}

// A warp's share of a split: every WARPS-th tile of 16 keys of [begin, end).
DEVICE void attend(State& state, const Plane& k, const Plane& v, const Problem& problem, int first_row, int begin, int end) {
  constexpr int ROUND = WARPS * STEP;
  const int last = problem.keys - 1;
  // rows see different keys from here on, and up to there
  const int masked_from = CAUSAL ? problem.keys - problem.queries + 1 : problem.keys;
  const int masked_below = WINDOW ? problem.keys - problem.window : 0;
  int key = begin + threadIdx.x / 32 * STEP;
  if (key >= end) return;
  Keys keys[BUFFERS];
  Values values[BUFFERS];
  keys[0].load(k, key, last, problem.columns);
  values[0].load(v, key, last, problem.columns);
#pragma unroll
  for (int i = 1; i < PREFETCH; ++i) {
    if (key + i * ROUND < end) prefetch_tile(k, v, key + i * ROUND, last);
  }
#pragma unroll 1
  while (true) {
#pragma unroll
    for (int i = 0; i < BUFFERS; ++i) {
      const int next = key + ROUND, other = (i + 1) % BUFFERS;
      if (PREFETCH > 0 && key + PREFETCH * ROUND < end) prefetch_tile(k, v, key + PREFETCH * ROUND, last);
      if (BUFFERS > 1 && next < end) {
        keys[other].load(k, next, last, problem.columns);
        values[other].load(v, next, last, problem.columns);
      }
      float scores[QUERY_TILES][4] = {};
      score(scores, state, keys[i]);
      if (BUFFERS == 1 && next < end) keys[0].load(k, next, last, problem.columns);
      u32 weights[QUERY_TILES][2];
      softmax(weights, scores, state, problem, first_row, key,
              key + STEP > masked_from || (WINDOW && key < masked_below));
      add_values(state, values[i], weights);
      if (BUFFERS == 1 && next < end) values[0].load(v, next, last, problem.columns);
      key = next;
      if (key >= end) return;
    }
  }
}

DEVICE float element(unsigned short bits) {
#if BFLOAT16
  return __uint_as_float(static_cast<u32>(bits) << 16);
#else
  return from_half(bits);
#endif
}

// Loads 8 queries in the columns' order of the keys, scaled to float16; a lane has columns of query lane / 4.
DEVICE void load_queries(State& state, int n, const char* place, bool valid, const Problem& problem) {
  const int member = threadIdx.x % 4;
  float x[PIECES * 8][2], largest = 0;
#pragma unroll
  for (int i = 0; i < PIECES * 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = 64 * (i / 8) + 16 * member + Key::key_column(i % 8, half);
      x[i][half] = valid && column < problem.columns ? element(reinterpret_cast<const unsigned short*>(place)[column]) : 0;
      largest = fmaxf(largest, fabsf(x[i][half]));
    }
  }
  largest = max_in_quad(largest);
  // below 2^9 in float16; a row of zeros or subnormals keeps a factor that is a normal number
  const int exponent = max(exponent_of(largest), -100);
  const float factor = power_of_two(8 - exponent);
#pragma unroll
  for (int i = 0; i < PIECES * 8; ++i) state.query[n][i / 2][i % 2] = pack_half(x[i][0] * factor, x[i][1] * factor);
  const float into_log2 = SOFTCAP ? 2 * 1.44269504f * problem.into_cap : problem.scale_log2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int of_row = __shfl_sync(~0u, exponent, 4 * (2 * member + j));
    state.row_factor[n][j] = into_log2 * power_of_two(of_row - 8);
    state.score_factor[n][j] = state.row_factor[n][j] * (power_of_two(Key::UNIT) * state.key_factor.inverse());
    state.base[n][j] = NO_BASE, state.sum[n][j] = 0;
  }
}

// Writes a warp's result of `count` rows to shared memory: output [ROWS][HEAD_DIM], then bases and sums.
DEVICE void leave_warp(float* place, State& state, int count) {
  const int quad = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const float unscale = power_of_two(Value::UNIT) * state.value_factor.inverse();
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = 8 * n + 2 * member + j;
      float sum = state.sum[n][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (row >= count) continue;
      if (quad == 0) {
        place[ROWS * HEAD_DIM + row] = sum > 0 ? state.base[n][j] : MINUS_INFINITY;
        place[ROWS * HEAD_DIM + ROWS + row] = sum;
      }
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 16; ++i) {
        const int chunk = i / (VALUE_COLUMNS / 2), pair = i % (VALUE_COLUMNS / 2);
        *reinterpret_cast<float2*>(place + row * HEAD_DIM + VALUE_COLUMNS * (8 * chunk + quad) + 2 * pair) =
            make_float2(state.out[n][i][j] * unscale, state.out[n][i][j + 2] * unscale);
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
                        window};
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

  State state = {};
#pragma unroll
  for (int n = 0; n < QUERY_TILES; ++n) {
    const int row = first_row + 8 * n + threadIdx.x % 32 / 4;
    const bool valid = row < problem.rows();
    const int of_head = valid ? row / queries : 0, of_query = valid ? row % queries : 0;
    load_queries(state, n, query + (batch * query_batch + (head * group + of_head) * query_head + of_query * query_row) * 2,
                 valid, problem);
  }
  const int begin = first_key + split * split_keys;
  attend(state, k, v, problem, first_row, begin, min(keys, begin + split_keys));

  const u64 place = static_cast<u64>(plane) * problem.rows() + first_row;
  const Results results{output + place * columns * 2, RowResults{logsumexp, stats}.from(place), 1, columns,
                        min(ROWS, problem.rows() - first_row)};
  float* left = reinterpret_cast<float*>(shared);
  leave_warp(left + threadIdx.x / 32 * WARP_RESULT, state, results.rows);
  join_block(left, results, {parts, marks, serial, tile * splits, split, splits});
}
