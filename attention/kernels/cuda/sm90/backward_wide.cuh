// Backward consumers for head dims above 128: dK and dV of a tile of 64 keys are split by columns over both consumers.
//
//                 queries: 64 at a time, of every head that shares the key head
//               +------+------+------+--
//   64 keys     |wg0 wg1      |      |   S^T and dP^T: 32 queries each; P^T and dS^T through shared memory to both
//               +------+------+------+--
//
//   dV += P^T dO,  dK += dS^T Q,  dQ += dS K      each consumer computes half of the columns of each
//
// A step (n counts query tiles). The consumers run in lockstep, because each needs the other's half of P^T and dS^T:
//
//   tensor cores   [ dP(n) ]                       [ dV(n) ][ dK(n) ][ dQ(n) ][ S(n+1)                 ]
//   other units    [ P(n)  ][ dS(n) ][ barrier   ]                            [ dQ(n) to device memory ]

// A consumer's half of the columns: WHOLE of them in its own chunks of 64 and, with 192 columns, half of the middle chunk.
constexpr int WHOLE = HEAD_DIM == 192 ? 64 : 128;
constexpr bool MIDDLE = HEAD_DIM == 192;
struct Half {
  float whole[WHOLE / 2], middle[16];

  DEVICE static u32 whole_bytes(int consumer) { return consumer * 2 * QueryTile::CHUNK_BYTES; }
  DEVICE static u32 middle_bytes(int consumer) { return QueryTile::CHUNK_BYTES + consumer * 64; }
  DEVICE static int whole_column(int consumer) { return consumer * 128; }
  DEVICE static int middle_column(int consumer) { return 64 + consumer * 32; }
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < WHOLE / 2; ++i) whole[i] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) middle[i] = 0;
  }
};
static_assert(BLOCK_K == 64 && BLOCK_Q == 64);

DEVICE void settle(Half& half) {
  settle(half.whole);
  if constexpr (MIDDLE) settle(half.middle);
}

// dV += P^T dO, or dK += dS^T Q, for this consumer's columns.
DEVICE void start_gradient(Half& gradient, u32 left, u32 right, int consumer) {
  const u64 left_tile = matrix_descriptor(left, 0);
  const u64 whole_tile = matrix_descriptor(right + Half::whole_bytes(consumer), QueryTile::CHUNK_BYTES);
  const u64 middle_tile = matrix_descriptor(right + Half::middle_bytes(consumer), 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) {
    wgmma_output(gradient.whole, advance(left_tile, step * 32), advance(whole_tile, step * 2048), true);
    if constexpr (MIDDLE) {
      wgmma_output_middle(gradient.middle, advance(left_tile, step * 32), advance(middle_tile, step * 2048), true);
    }
  }
  wgmma_commit();
}

// dQ = dS K, for this consumer's columns; dS is stored as [keys][queries] and read transposed.
DEVICE void start_query_gradient(Half& gradient, u32 score_gradient, u32 key, int consumer) {
  const u64 left_tile = matrix_descriptor(score_gradient, 0);
  const u64 whole_tile = matrix_descriptor(key + Half::whole_bytes(consumer), KeyTile::CHUNK_BYTES);
  const u64 middle_tile = matrix_descriptor(key + Half::middle_bytes(consumer), 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    wgmma_queries(gradient.whole, advance(left_tile, step * 2048), advance(whole_tile, step * 2048), step > 0);
    if constexpr (MIDDLE) {
      wgmma_queries_middle(gradient.middle, advance(left_tile, step * 2048), advance(middle_tile, step * 2048), step > 0);
    }
  }
  wgmma_commit();
}

struct Consumer {
  Memory memory;
  int index, buffer = 0;
  Ring ring;
  Scores scores;  // S^T, then P^T
  RowNumbers logsumexps;
  Half key_gradient, value_gradient;

  DEVICE Consumer(const Memory& memory, int index) : memory(memory), index(index) {}

  DEVICE u32 own_queries() const { return index * SPAN * 128; }
  DEVICE u32 rows(int stage) const { return memory.rows(stage) + index * SPAN; }  // 8 bytes per lane and 8 queries

  DEVICE void start_next_scores() {
    await_phase(memory.full(ring.stage), ring.parity);
    start_scores(scores, memory.key(), memory.query(ring.stage) + own_queries());
    // before dQ is added in device memory: later loads and stores queue after those atomics
    load_rows(logsumexps, rows(ring.stage));
  }
  // Ends a step. ptxas does not permit reading accumulators of wgmmas issued before the loop's back edge.
  DEVICE void finish_scores() {
    wgmma_wait<0>();
    settle(scores);
  }

  // Processes a query tile whose S^T is complete: accumulates dK, dV, and dQ in device memory; issues S^T of the next tile.
  template <bool MORE>
  DEVICE void step(const Problem& problem, int key, int tile, float* sums) {
    const int stage = ring.stage, first_unit = index * SPAN / 8;
    const u32 weight_tile = memory.buffer(2 * buffer), gradient_tile = memory.buffer(2 * buffer + 1);
    Scores weight_gradients;
    Operand packed;
    Half made;
    const bool based = has_bases(memory.rows(stage));
    start_scores(weight_gradients, memory.value(), memory.cotangent(stage) + own_queries());
    const int first_query = tile * BLOCK_Q + index * SPAN;
    if constexpr (ALIBI) add_biases(scores, problem, key, first_query, memory.listed(stage));
    if (based) rebase(scores, rows(stage));
    weigh<true>(scores, packed, logsumexps, problem, key, first_query, memory.listed(stage),
                memory.bits(stage) + index * SPAN * (BLOCK_K / 8));
    store_operand(weight_tile, packed, first_unit);
    wgmma_wait<0>();
    settle(weight_gradients);
    differentiate<false>(scores, weight_gradients, packed, packed, rows(stage));
    store_operand(gradient_tile, packed, first_unit);
    fence_shared_for_async();
    meet();  // P and dS of both consumers are complete; with two buffers of each, one barrier per step suffices
    start_gradient(value_gradient, weight_tile, memory.cotangent(stage), index);
    start_gradient(key_gradient, gradient_tile, memory.query(stage), index);
    start_query_gradient(made, gradient_tile, memory.key(), index);
    buffer ^= 1;
    wgmma_wait<1>();  // dV and dK
    release_read(memory.empty(stage));
    ring.advance();
    if constexpr (MORE) start_next_scores();
    wgmma_wait<MORE>();
    settle(made);
    add_query_gradient(sums, made.whole);
    if constexpr (MIDDLE) add_query_gradient(sums + WHOLE * 16, made.middle);
    if constexpr (MORE) finish_scores();
  }

  // Processes all query tiles of a key tile, at least one; `sums` returns the dQ accumulator of the current query tile.
  template <typename Sums>
  DEVICE void run(const Problem& problem, int key, Walk& walk, const Sums& sums) {
    start_next_scores();
    finish_scores();
#pragma unroll 1
    for (; walk.left > 1; walk.next(problem, key)) step<true>(problem, key, walk.tile, sums());
    step<false>(problem, key, walk.tile, sums());
  }

  DEVICE void begin() {
    key_gradient.clear();
    value_gradient.clear();
  }
  DEVICE void store(char* for_keys, char* for_values, const Problem& problem, int plane, int key) {
    store_half(for_keys, key_gradient, problem.scale, problem, plane, key);
    store_half(for_values, value_gradient, 1, problem, plane, key);
  }
  DEVICE void store_half(char* destination, Half& half, float factor, const Problem& problem, int plane, int key) const {
    settle(half);
    const int row = key + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    char* place = destination + (static_cast<u64>(plane) * problem.keys + row) * problem.columns * 2;
    store_part(place, half.whole, factor, problem, row, Half::whole_column(index));
    if constexpr (MIDDLE) store_part(place, half.middle, factor, problem, row, Half::middle_column(index));
  }
  template <int COUNT>
  DEVICE static void store_part(char* place, const float (&part)[COUNT], float factor, const Problem& problem, int row,
                                int column) {
    store_gradient(place + column * 2, part, factor, problem.keys - row, problem.columns - column, problem.columns * 2);
  }
};
