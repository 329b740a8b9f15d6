// More than 128 columns: dK and dV of a tile of 64 keys take the registers of both consumers, half of the columns each.
//
//                 queries: 64 at a time, of every head that shares the key head
//               +------+------+------+--
//   64 keys     |wg0 wg1      |      |   S^T and dP^T: 32 queries each; P^T and dS^T through shared memory to both
//               +------+------+------+--
//
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K      each consumer makes half of the columns of each
//
// A consumer's steps (n counts tiles of queries):
//
//   tensor cores   [ dP(n)  ]                       [ dV(n)  ][ dK(n)  ][ dQ(n)  ][ S(n+1)                 ]
//   other units    [ P(n)   ][ dS(n) ][ they meet ]                               [ dQ(n) to device memory ]

constexpr int HALF = HEAD_DIM / 2;
constexpr int HALF_BYTES = HALF / 64 * QueryTile::CHUNK_BYTES;
using HalfOutput = float[HALF / 2];
static_assert(HEAD_DIM == 256 && BLOCK_K == 64 && BLOCK_Q == 64);

// dV += P^T dO, or dK += dS^T Q: half of the columns.
DEVICE void start_gradient(HalfOutput& gradient, u32 left, u32 right) {
  const u64 left_tile = matrix_descriptor(left, 0), right_tile = matrix_descriptor(right, QueryTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) {
    wgmma_output(gradient, advance(left_tile, step * 32), advance(right_tile, step * 2048), true);
  }
  wgmma_commit();
}

// dQ = dS K, half of the columns: dS lies as [keys][queries], so it is read transposed.
DEVICE void start_query_gradient(QueryGradient& gradient, u32 score_gradient, u32 key) {
  const u64 left_tile = matrix_descriptor(score_gradient, 0), right_tile = matrix_descriptor(key, KeyTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_queries(gradient, advance(left_tile, step * 2048), advance(right_tile, step * 2048), step > 0);
  }
  wgmma_commit();
}

struct Consumer {
  Memory memory;
  int index, buffer = 0;
  Ring ring;
  Scores scores;  // S^T, then P^T
  HalfOutput key_gradient, value_gradient;

  DEVICE Consumer(const Memory& memory, int index) : memory(memory), index(index) {}

  DEVICE u32 own_queries() const { return index * SPAN * 128; }
  DEVICE u32 own_columns() const { return index * HALF_BYTES; }

  DEVICE void start_next_scores() {
    barrier_wait(memory.full(ring.stage), ring.parity);
    start_scores(scores, memory.key(), memory.query(ring.stage) + own_queries());
  }
  // Ends a step: the assembler lets no accumulators be read whose products were started before the loop came round.
  DEVICE void finish_scores() {
    wgmma_wait<0>();
    settle(scores);
  }

  // One tile of queries, whose S^T has been made: adds to dK, dV, and dQ in device memory, and makes S^T of the next tile.
  template <bool MORE>
  DEVICE void step(const Problem& problem, int key, int tile, float* query_gradient) {
    const int stage = ring.stage, first_unit = index * SPAN / 8;
    const u32 rows = memory.rows(stage) + index * SPAN;  // 8 bytes of each lane's for 8 queries
    const u32 weight_tile = memory.buffer(2 * buffer), gradient_tile = memory.buffer(2 * buffer + 1);
    Scores weight_gradients;
    Operand packed;
    QueryGradient made;
    start_scores(weight_gradients, memory.value(), memory.cotangent(stage) + own_queries());
    weigh<true>(scores, packed, rows, problem, key, tile * BLOCK_Q + index * SPAN);
    store_operand(weight_tile, packed, first_unit);
    wgmma_wait<0>();
    settle(weight_gradients);
    differentiate<false>(scores, weight_gradients, packed, packed, rows);
    store_operand(gradient_tile, packed, first_unit);
    fence_shared_for_async();
    meet();  // all of P and dS is there; two buffers of each, so once a step is enough
    start_gradient(value_gradient, weight_tile, memory.cotangent(stage) + own_columns());
    start_gradient(key_gradient, gradient_tile, memory.query(stage) + own_columns());
    start_query_gradient(made, gradient_tile, memory.key() + own_columns());
    buffer ^= 1;
    wgmma_wait<1>();  // dV and dK
    release_read(memory.empty(stage));
    ring.advance();
    if constexpr (MORE) start_next_scores();
    wgmma_wait<MORE>();
    settle(made);
    add_query_gradient(query_gradient, made, memory.query_gradient());
    if constexpr (MORE) finish_scores();
  }

  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < HALF / 2; ++i) key_gradient[i] = value_gradient[i] = 0;
  }
  DEVICE void store(char* for_keys, char* for_values, const Problem& problem, int plane, int key) {
    settle(key_gradient);
    settle(value_gradient);
    const int row = key + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column = index * HALF;
    const u64 place = ((static_cast<u64>(plane) * problem.keys + row) * problem.columns + column) * 2;
    const int rows_left = problem.keys - row, columns_left = problem.columns - column, row_bytes = problem.columns * 2;
    store_gradient(for_keys + place, key_gradient, problem.scale, rows_left, columns_left, row_bytes);
    store_gradient(for_values + place, value_gradient, 1, rows_left, columns_left, row_bytes);
  }
};
