// Up to 128 columns: each consumer has 64 of the tile's 128 keys, and keeps their dK and dV in registers.
//
//                    queries: BLOCK_Q at a time, of every head that shares the key head
//                  +------+------+------+--
//   128 keys  wg 0 | S^T  |      |      |   64 keys    S^T = K Q^T, P^T = 2^(c S^T - logsumexp)    dV += P^T dO
//             wg 1 |      |      |      |   64 keys    dP^T = V dO^T, dS^T = P^T (dP^T - delta)    dK += dS^T Q
//                  +------+------+------+--
//                     |  dS through shared memory
//                     v
//                    dQ += dS K     each consumer makes half of it: of the columns, or of 128 queries
//
// P^T and dS^T are left operands in the very registers where they were made. A consumer's steps (n counts tiles of queries):
//
//   tensor cores   [ dP(n)  ][ dV(n)   ][ dK(n)   ][ dQ(n)   ][ S(n+1)                         ]
//   other units    [ P(n)   ][ dS(n)   ][ the consumers meet ][ dQ(n) to device memory         ]
//
// With LATE dV(n) waits for dS(n), and P^T need not be held in two forms.

constexpr bool BY_QUERIES = UNITS == CONSUMERS;  // which half of dQ: by columns, or by queries where there are enough
constexpr bool AHEAD = !SOFTCAP || HEAD_DIM < 128;  // whether there are registers for the next tile's logsumexps
using QueryGradient = float[QUERY_GRADIENTS];

// dV += P^T dO, or dK += dS^T Q.
DEVICE void start_gradient(Output& gradient, const Operand& left, u32 right) {
  const u64 right_tile = matrix_descriptor(right, QueryTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) wgmma_output(gradient, left[step], advance(right_tile, step * 2048), true);
  wgmma_commit();
}

// dQ = dS K, over all the tile's keys: dS lies as [keys][queries], so it is read transposed.
DEVICE void start_query_gradient(QueryGradient& gradient, u32 score_gradient, u32 key, int consumer) {
  constexpr int HALF_BYTES = HEAD_DIM == 64 ? 64 : HEAD_DIM / 128 * KeyTile::CHUNK_BYTES;
  const u64 left_tile = matrix_descriptor(score_gradient + (BY_QUERIES ? consumer * BLOCK_K * 128 : 0), 0);
  const u64 right_tile = matrix_descriptor(key + (BY_QUERIES ? 0 : consumer * HALF_BYTES), KeyTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_queries(gradient, advance(left_tile, step * 2048), advance(right_tile, step * 2048), step > 0);
  }
  wgmma_commit();
}

struct Consumer {
  Memory memory;
  int index;
  Ring ring;
  BufferRing current, last;
  Scores scores;  // S^T, then P^T
  RowNumbers logsumexps;
  Output key_gradient, value_gradient;
  KeyOperand held_key, held_value;
  u32 kept;                 // this warp's buffer for dQ
  float* last_sums;         // where dQ of the last tile of queries is added up
  float* kept_sums;         // where that which is kept is: null if none is

  DEVICE Consumer(const Memory& memory, int index)
      : memory(memory), index(index), kept(memory.query_gradient() + (threadIdx.x / 32 - 4) * QUERY_GRADIENTS * 128) {}

  DEVICE u32 own_rows() const { return index * WARPGROUP_ROWS * 128; }

  DEVICE void start_next_scores() {
    await_phase(memory.full(ring.stage), ring.parity);
    if constexpr (HELD) start_scores(scores, held_key, memory.query(ring.stage));
    else start_scores(scores, memory.key() + own_rows(), memory.query(ring.stage));
    // before dQ goes to device memory: what comes after that in the queue of loads and stores waits for it
    if constexpr (AHEAD) load_rows(logsumexps, memory.rows(ring.stage));
  }
  // Ends a step: the assembler lets no accumulators be read whose products were started before the loop came round.
  DEVICE void finish_scores() {
    wgmma_wait<0>();
    settle(scores);
  }
  // dQ of the last tile of queries, once all of its dS is there.
  DEVICE void start_last_query_gradient(QueryGradient& made) {
    start_query_gradient(made, memory.buffer(last.index), memory.key(), index);
  }
  DEVICE void add_made(QueryGradient& made) {
    settle(made);
    if constexpr (BULK) keep_query_gradient(kept, made), kept_sums = last_sums;
    else add_query_gradient(last_sums, made);
  }
  DEVICE void add_kept() {
    if (BULK && threadIdx.x % 32 == 0 && kept_sums != nullptr) add_kept_gradient(kept_sums, kept);
  }

  // One tile of queries, whose S^T has been made: adds to dK, dV and, but for the FIRST, to dQ of the tile before, and makes
  // S^T of the next tile if there are MORE.
  template <bool FIRST, bool MORE>
  DEVICE void step(const Problem& problem, int key, int tile, float* sums) {
    const int stage = ring.stage;
    Scores weight_gradients;
    Operand weights, gradients;
    QueryGradient made;
    if constexpr (HELD) start_scores(weight_gradients, held_value, memory.cotangent(stage));
    else start_scores(weight_gradients, memory.value() + own_rows(), memory.cotangent(stage));
    if constexpr (!AHEAD) load_rows(logsumexps, memory.rows(stage));
    weigh<!LATE>(scores, weights, logsumexps, problem, key + index * WARPGROUP_ROWS, tile * BLOCK_Q);
    if constexpr (!LATE) start_gradient(value_gradient, weights, memory.cotangent(stage));
    if constexpr (!FIRST) await_phase(memory.exchanged(last.index), last.parity);
    wgmma_wait<!LATE>();
    settle(weight_gradients);
    differentiate<LATE>(scores, weight_gradients, weights, gradients, memory.rows(stage));
    store_operand(memory.buffer(current.index) + own_rows(), gradients, 0);
    fence_shared_for_async();
    __syncwarp();
    release(memory.exchanged(current.index));
    if constexpr (!FIRST) add_kept();
    if constexpr (LATE) start_gradient(value_gradient, weights, memory.cotangent(stage));
    start_gradient(key_gradient, gradients, memory.query(stage));
    if constexpr (!FIRST) start_last_query_gradient(made);
    wgmma_wait<!FIRST>();  // dV and dK
    release_read(memory.empty(stage));
    ring.advance();
    if constexpr (MORE) start_next_scores();
    if constexpr (!FIRST) {
      wgmma_wait<MORE>();
      add_made(made);
    }
    last = current, last_sums = sums;
    current.advance();
    if constexpr (MORE) finish_scores();
  }

  // All tiles of queries that a tile of keys meets, at least one; `sums` tells where dQ of the one at hand is added up.
  template <typename Sums>
  DEVICE void run(const Problem& problem, int key, Walk& walk, const Sums& sums) {
    if constexpr (BULK) kept_sums = nullptr;
    start_next_scores();
    finish_scores();
    if (walk.left > 1) {
      step<true, true>(problem, key, walk.tile, sums());
      walk.next();
#pragma unroll 1
      for (; walk.left > 1; walk.next()) step<false, true>(problem, key, walk.tile, sums());
      step<false, false>(problem, key, walk.tile, sums());
    } else {
      step<true, false>(problem, key, walk.tile, sums());
    }
    if constexpr (BULK) {
      fence_shared_for_async();
      __syncwarp();
      add_kept();
    }
    QueryGradient made;
    await_phase(memory.exchanged(last.index), last.parity);
    start_last_query_gradient(made);
    wgmma_wait<0>();
    add_made(made);
    if constexpr (BULK) {
      fence_shared_for_async();
      __syncwarp();
      add_kept();
    }
  }

  DEVICE void begin() {
    if constexpr (HELD) load_operand(held_key, memory.key() + own_rows()), load_operand(held_value, memory.value() + own_rows());
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) key_gradient[i] = value_gradient[i] = 0;
  }
  DEVICE void store(char* for_keys, char* for_values, const Problem& problem, int plane, int key) {
    settle(key_gradient);
    settle(value_gradient);
    const int row = key + index * WARPGROUP_ROWS + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const u64 place = (static_cast<u64>(plane) * problem.keys + row) * problem.columns * 2;
    const int rows_left = problem.keys - row, row_bytes = problem.columns * 2;
    store_gradient(for_keys + place, key_gradient, problem.scale, rows_left, problem.columns, row_bytes);
    store_gradient(for_values + place, value_gradient, 1, rows_left, problem.columns, row_bytes);
  }
};
