// Scores, softmax and output of a consumer warpgroup of the Hopper forward kernel: 64 queries against tiles of BLOCK_N keys,
// in registers.
//
//   scores      S = Q K^T            64 x BLOCK_N   float32, BLOCK_N / 2 registers a thread
//   softmax     P = exp2(c S - max)  64 x BLOCK_N   packed to 2 bytes, BLOCK_N / 4 registers
//   output      O = O * rescale + P V  64 x HEAD_DIM  float32, HEAD_DIM / 2 registers

constexpr int BLOCK_M = WARPGROUP_ROWS * CONSUMERS;
using QueryTile = Tile<WARPGROUP_ROWS>;
using KeyTile = Tile<BLOCK_N>;
constexpr u32 QUERY_BUFFER = WARPGROUP_ROWS * HEAD_DIM * 2;  // FP8: as loaded, in 16 bits
#if FP8
struct ValueTile {  // transposed: HEAD_DIM rows of 128 keys, then 8 rows of ones in the buffer
  static constexpr u32 BYTES = HEAD_DIM * 128, BUFFER_BYTES = BYTES + 8 * 128;
};
static_assert(BLOCK_N == 128);
#else
struct ValueTile : KeyTile {
  static constexpr u32 BUFFER_BYTES = KeyTile::BYTES;
};
#endif

// With GATHERED: the queries are two runs of rows, each at its own place among the keys.
struct Runs {
  int second;                     // first row of the second run
  int first_shift, second_shift;  // position of a row less its number
};

struct Problem {
  int planes, heads;    // batch * heads, and heads
  int heads_per_key;    // query heads per key head
  int queries, keys;    // lengths
  int columns;          // head dimension of the inputs, at most HEAD_DIM; TMA zero-fills the rest
  float scale_log2;     // softmax scale, with SOFTCAP the cap, times log2(e)
  float into_cap;       // with SOFTCAP: softmax scale / cap
  int window;           // with WINDOW: maximum number of keys that a row attends to
  Slopes slopes;        // with ALIBI
  Runs runs;            // with GATHERED

  // Among the keys. Causal masks are lower-right aligned: the last query attends to every key.
  DEVICE int position_of(int row) const {
    if constexpr (GATHERED) return row + (row < runs.second ? runs.first_shift : runs.second_shift);
    return row + keys - queries;
  }
  // A row attends to the keys [first, last).
  DEVICE int last_seen_by(int row) const { return CAUSAL ? min(keys, position_of(row) + 1) : keys; }
  DEVICE int first_seen_by(int row) const { return WINDOW ? max(0, position_of(row) + 1 - window) : 0; }

  // End of the key tiles that a warpgroup needs, at least one past the first if there are any, which avoids a special case.
  DEVICE int key_blocks_of_warpgroup(int first_row, int first_block, int tile_blocks) const {
    if (!CAUSAL) return first_row < queries ? tile_blocks : min(tile_blocks, first_block + 1);
    const int seen = first_row < queries ? last_seen_by(min(queries, first_row + WARPGROUP_ROWS) - 1) : 0;
    return min(tile_blocks, max((seen + BLOCK_N - 1) / BLOCK_N, first_block + 1));
  }
  // First of the key tiles before `end_block` that a warpgroup needs.
  DEVICE int first_block_of_warpgroup(int first_row, int first_block, int end_block) const {
    return WINDOW ? min(end_block - 1, max(first_block, first_seen_by(first_row) / BLOCK_N)) : first_block;
  }
};

// Softmax state of a thread's two rows. Weights are relative to `max`: the maximum so far, or a little less (WEIGHT_HEADROOM). `sum`
// covers only the thread's columns until `finish_rows`.
struct Rows {
  float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
  float sum[2] = {0, 0};
  bool raised = true;         // whether the last softmax step raised the maximum of any row of the warp
  float rescale[2] = {1, 1};  // factor of the output; valid if `raised`
};

using Scores = float[BLOCK_N / 2];
using Weights = u32[BLOCK_N / 16][4];

DEVICE void start_scores(Scores& scores, u32 query, u32 key) {
  const u64 query_tile = matrix_descriptor(query, 0), key_tile = matrix_descriptor(key, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM * ELEMENT_BYTES / 32; ++step) {
    const int chunk = step / 4, offset = step % 4 * 32;
    wgmma_scores(scores, advance(query_tile, chunk * QueryTile::CHUNK_BYTES + offset),
                 advance(key_tile, chunk * KeyTile::CHUNK_BYTES + offset), step > 0);
  }
  wgmma_commit();
}

#if HALVES
// Scores of the half of a key tile that starts at `key`.
constexpr int HALF_KEYS = BLOCK_N / 2;
constexpr u32 HALF_BYTES = HALF_KEYS * 128;  // from the first half to the second, in each chunk of a tile
using HalfScores = float[HALF_KEYS / 2];
using HalfWeights = u32[HALF_KEYS / 16][4];

DEVICE void start_half_scores(HalfScores& scores, u32 query, u32 key) {
  const u64 query_tile = matrix_descriptor(query, 0), key_tile = matrix_descriptor(key, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, offset = step % 4 * 32;
    wgmma_half_scores(scores, advance(query_tile, chunk * QueryTile::CHUNK_BYTES + offset),
                      advance(key_tile, chunk * KeyTile::CHUNK_BYTES + offset), step > 0);
  }
  wgmma_commit();
}
#endif

#if !FP8
template <int STEPS>
DEVICE void start_output(Output& output, const u32 (&weights)[STEPS][4], u32 value) {
  const u64 value_tile = matrix_descriptor(value, KeyTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    wgmma_output(output, weights[step], advance(value_tile, step * 2048), true);
  }
  wgmma_commit();
}
#endif

// Softcap: scores become tanh(s / cap); the softmax applies the factor cap. The hardware tanh is accurate to 11 bits only,
// too few for float16.
DEVICE void cap_scores(Scores& scores, float into_cap) {
  const float factor = 2 * 1.44269504f * into_cap;
#pragma unroll
  for (int i = 0; i < BLOCK_N / 2; ++i) scores[i] = 1 - 2 * reciprocal_fast(1 + exp2_fast(scores[i] * factor));
}

// Adds slope * (key - position) to the scores of the thread's rows, `row` and `row` + 8. `first_key` is the first of the tile.
DEVICE void add_biases(Scores& scores, const Problem& problem, float slope, int row, int first_key) {
  const int column = first_key + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float distance = column - problem.position_of(row + 8 * r);
#pragma unroll
    for (int i = 2 * r; i < BLOCK_N / 2; i += i % 2 ? 3 : 1) scores[i] += slope * (distance + (8 * (i / 4) + i % 2));
  }
}

// Masks scores of the thread's rows, `row` and `row` + 8, by causality and window. `first_key` is the first of the tile.
template <int COUNT>
DEVICE void mask_scores(float (&scores)[COUNT], const Problem& problem, int row, int first_key) {
  static_assert(BLOCK_N <= 128);
  constexpr bool BY_BITS = CAUSAL && !SOFTCAP;  // with a softcap the bits can be registers too many; else masked tiles are rare
  const int column = first_key + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int first = WINDOW ? problem.first_seen_by(row + 8 * r) - column : 0;
    const int last = problem.last_seen_by(row + 8 * r) - column;
    const u32 seen = BY_BITS ? elements_within(first, last) : 0;
#pragma unroll
    for (int i = 2 * r; i < COUNT; i += i % 2 ? 3 : 1) {
      const int key = 8 * (i / 4) + i % 2;
      const bool hidden = BY_BITS ? !(seen & 1u << (i / 4 * 2 + i % 2)) : key >= last || (WINDOW && key < first);
      if (hidden) scores[i] = MINUS_INFINITY;
    }
  }
}

// What a thread needs to mask a tile of a block list: the tile and, if some pairs are masked, the bits of the thread's rows,
// shifted so that the bit of element i is at 8 * (i / 4) + i % 2.
struct Listed {
  static constexpr int WORDS = BLOCK_N / 32;
  u32 word = 0;
  u32 bits[2][WORDS];

  // `rows` is the address of the bits of the warpgroup's rows.
  DEVICE void read(u32 place, u32 rows) {
    word = load_word(place);
    if (!partial()) return;
    const u32 own = rows + (threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4) * (4 * WORDS);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; i += 2) load_two(&bits[i / WORDS][i % WORDS], own + (i / WORDS * 8 * WORDS + i % WORDS) * 4);
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) bits[i / WORDS][i % WORDS] >>= 2 * (threadIdx.x % 4);
  }
  DEVICE bool partial() const { return word & 1; }
  DEVICE int tile() const { return word >> 1; }
};

// Masks the scores whose bits are 0, and those of keys beyond the end.
DEVICE void mask_listed(Scores& scores, const Problem& problem, const Listed& listed, int row) {
  if (listed.partial()) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      const int key = 8 * (i / 4) + i % 2;
      if (!(listed.bits[i / 2 % 2][key / 32] & 1u << key % 32)) scores[i] = MINUS_INFINITY;
    }
  }
  const int first_key = listed.tile() * BLOCK_N;
  if (first_key + BLOCK_N > problem.keys) mask_scores(scores, problem, row, first_key);
}

// Weights may reach 2 to this power before their row's maximum is raised (FlashAttention 4): most tiles need neither maxima over lanes
// nor a rescaled output.
constexpr float WEIGHT_HEADROOM = 8;
constexpr bool LAZY = HEAD_DIM < 256 || CONSUMERS > 1;  // otherwise maxima are raised in every tile: the lazy form would spill two registers

// The larger of 0 and a thread's largest score, for each row. The bits of floats that are not negative compare as signed integers do,
// for which one instruction takes the maximum of three; negative scores are only known to be below 0.
template <int COUNT>
DEVICE void largest_or_zero(float (&largest)[2], const float (&scores)[COUNT]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int found[2] = {0, 0};  // two chains take less time
#pragma unroll
    for (int i = 2 * r; i < COUNT; i += 4) {
      int& of = found[i / 4 % 2];
      of = max(of, max(__float_as_int(scores[i]), __float_as_int(scores[i + 1])));
    }
    largest[r] = __int_as_float(max(found[0], found[1]));
  }
}

// Raises the running maxima of a thread's rows. A large maximum (LARGE_EXPONENT) is subtracted from the scores here, and `shift` is
// then 0.
template <int COUNT>
DEVICE void raise_maxima(float (&scores)[COUNT], Rows& rows, float (&shift)[2], float scale_log2) {
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = rows.max[r];
#pragma unroll
    for (int i = 2 * r; i < COUNT; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    base[r] = largest == MINUS_INFINITY ? 0 : largest;  // fully masked so far
    rows.rescale[r] = exp2_fast((rows.max[r] - base[r]) * scale_log2);
    rows.sum[r] *= rows.rescale[r];
    rows.max[r] = largest;
    shift[r] = base[r] * scale_log2;
  }
  const bool large = fmaxf(fabsf(shift[0]), fabsf(shift[1])) > LARGE_EXPONENT;
  if ((!SOFTCAP || ALIBI) && __builtin_expect(__any_sync(~0u, large), 0)) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scores[i] -= base[i / 2 % 2];
    shift[0] = shift[1] = 0;
  }
}

// Online softmax: converts scores to weights; updates the rows. Above LARGE_EXPONENT a row's maximum has to be exact, also once the
// parts of split keys are merged, since the backward pass assumes that no score exceeds it; hence half of it here.
template <int COUNT>
DEVICE void softmax(float (&scores)[COUNT], Rows& rows, float scale_log2) {
  float largest[2], shift[2];
  largest_or_zero(largest, scores);
  bool within = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] = rows.max[r] * scale_log2;
    const float excess = (largest[r] - rows.max[r]) * scale_log2;
    within = within && excess <= WEIGHT_HEADROOM && fabsf(shift[r]) <= LARGE_EXPONENT / 2;  // not if either is NaN
  }
  rows.raised = !LAZY || !__all_sync(~0u, within);
  if (rows.raised) raise_maxima(scores, rows, shift, scale_log2);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 2 * r; i < COUNT; i += 4) {
      even += scores[i] = exp2_fast(scores[i] * scale_log2 - shift[r]);
      odd += scores[i + 1] = exp2_fast(scores[i + 1] * scale_log2 - shift[r]);
    }
    rows.sum[r] += even + odd;
  }
}

// Multiplies the output by the factors of the last softmax step.
DEVICE void rescale_output(Output& output, const Rows& rows) {
  if (rows.raised) scale_output(output, rows.rescale);
}

// Accumulators of S already have the layout of a wgmma left operand in registers and only need packing.
template <int COUNT>
DEVICE void pack_weights(u32 (&weights)[COUNT / 8][4], const float (&scores)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
}

// Divides by the row sums (fully masked rows are 0), and writes the rows' logsumexp and stats if requested.
DEVICE void finish_rows(Output& output, Rows& rows, const RowResults& results, int first_row, const Problem& problem) {
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    inverse[r] = sum > 0 ? 1 / sum : 0;
    const int row = first_row + 8 * r;
    if (threadIdx.x % 4 == 0 && row < problem.queries) results.write(row, rows.max[r], sum, problem.scale_log2);
  }
  scale_output(output, inverse);
}
