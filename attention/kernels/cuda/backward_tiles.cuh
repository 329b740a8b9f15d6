// One warpgroup's share of the backward pass: 64 keys against a tile of 64 queries, everything in registers, where a
// thread holds two keys and of every 8 queries the two at 2 * (lane % 4).

constexpr int CONSUMERS = 2;
constexpr int BLOCK_K = 64 * CONSUMERS, BLOCK_Q = 64;
using QueryTile = Tile<BLOCK_Q>;
using KeyTile = Tile<BLOCK_K>;

struct Problem {
  int planes, planes_per_key, queries, keys, columns;
  float scale, scale_log2;
  int window;

  DEVICE int shift() const { return keys - queries; }
  DEVICE int query_tiles() const { return (queries + BLOCK_Q - 1) / BLOCK_Q; }
  // The tiles of queries that see any of a tile of keys are [first_tile, end_tile).
  DEVICE int first_tile(int key) const { return CAUSAL ? max(0, key - shift()) / BLOCK_Q : 0; }
  DEVICE int end_tile(int key) const {
    if (!WINDOW) return query_tiles();
    const int end = max(0, min(queries, key + BLOCK_K - 1 - shift() + window));
    return (end + BLOCK_Q - 1) / BLOCK_Q;
  }
  // Each tile of keys starts at another tile of queries, lest all of them add to the same rows of dQ at a time.
  DEVICE int turned(int i, int key, int count) const { return (i + key / BLOCK_K) % count; }
};

using Scores = float[BLOCK_Q / 2];           // 64 keys x 64 queries
using Operand = u32[BLOCK_Q / 16][4];        // the same as a left operand
using QueryGradient = float[HEAD_DIM / 4];   // 64 queries x half the columns

// S^T or dP^T: 64 rows of K or V against the tile of Q or dO.
DEVICE void start_scores(Scores& scores, u32 left, u32 right) {
  const u64 left_tile = matrix_descriptor(left, 0), right_tile = matrix_descriptor(right, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, offset = step % 4 * 32;
    wgmma_scores(scores, advance(left_tile, chunk * KeyTile::CHUNK_BYTES + offset),
                 advance(right_tile, chunk * QueryTile::CHUNK_BYTES + offset), step > 0);
  }
  wgmma_commit();
}

// dV += P^T dO, or dK += dS^T Q.
DEVICE void start_gradient(Output& gradient, const Operand& left, u32 right) {
  const u64 right_tile = matrix_descriptor(right, QueryTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) wgmma_output(gradient, left[step], advance(right_tile, step * 2048), true);
  wgmma_commit();
}

// dQ = dS K, over all 128 keys: dS lies as [keys][queries], so it is read transposed.
DEVICE void start_query_gradient(QueryGradient& gradient, u32 score_gradient, u32 key, int consumer) {
  constexpr int HALF_BYTES = HEAD_DIM == 64 ? 64 : HEAD_DIM / 128 * KeyTile::CHUNK_BYTES;
  const u64 left_tile = matrix_descriptor(score_gradient, 0);
  const u64 right_tile = matrix_descriptor(key + consumer * HALF_BYTES, KeyTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_queries(gradient, advance(left_tile, step * 2048), advance(right_tile, step * 2048), step > 0);
  }
  wgmma_commit();
}

DEVICE void pack_operand(Operand& operand, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < BLOCK_Q / 4; ++i) operand[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
}

// Of the two words of column pair i: word i of `operand` holds key row i % 2, queries 8 (i / 2) + 2 (lane % 4) and next.
DEVICE void store_score_gradient(u32 tile, const Operand& operand) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < BLOCK_Q / 4; ++i) {
    const int row = first + 8 * (i % 2), unit = i / 2;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(tile + row * 128 + ((unit ^ row % 8) << 4) + lane % 4 * 4),
                 "r"(operand[i / 4][i % 4])
                 : "memory");
  }
}

DEVICE float2 load_pair(u32 address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

// P^T = 2^(c S^T - logsumexp of the query); what may not be seen becomes 0.
DEVICE void weigh(Scores& scores, u32 rows, const Problem& problem, int first_key, int first_query) {
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < BLOCK_Q / 2; i += 4) {
    const float2 logsumexp = load_pair(rows + (2 * i + column) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      scores[i + j] = exp2_fast(scores[i + j] * problem.scale_log2 - (j % 2 ? logsumexp.y : logsumexp.x));
    }
  }
  const int late = first_key + 63 - problem.shift() - first_query, early = first_key - problem.shift() - first_query;
  const bool whole = first_key + 64 <= problem.keys && (!CAUSAL || late <= 0) &&
                     (!WINDOW || early + problem.window >= BLOCK_Q);
  if (whole) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * r;
    const int from = first_key + row >= problem.keys ? BLOCK_Q : CAUSAL ? early + row : 0;
    const int to = WINDOW ? early + row + problem.window : BLOCK_Q;
#pragma unroll
    for (int i = 2 * r; i < BLOCK_Q / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = 2 * (i - 2 * r) + column + j;
        if (query < from || query >= to) scores[i + j] = 0;
      }
    }
  }
}

// dS^T = P^T (dP^T - delta), in the place of P^T.
DEVICE void differentiate(Scores& weights, const Scores& weight_gradients, u32 rows) {
  const int column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < BLOCK_Q / 2; i += 4) {
    const float2 delta = load_pair(rows + (BLOCK_Q + 2 * i + column) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) weights[i + j] *= weight_gradients[i + j] - (j % 2 ? delta.y : delta.x);
  }
}

// Adds 64 queries x half the columns to dQ; `destination` is the tile's first row.
DEVICE void add_query_gradient(float* destination, const QueryGradient& gradient, int consumer, int rows_left, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * r;
    if (row >= rows_left) continue;
#pragma unroll
    for (int i = 2 * r; i < HEAD_DIM / 4; i += 4) {
      const int column = consumer * (HEAD_DIM / 2) + 2 * (i - 2 * r) + 2 * (lane % 4);
      if (column < columns) add_pair(destination + row * columns + column, gradient[i], gradient[i + 1]);
    }
  }
}
