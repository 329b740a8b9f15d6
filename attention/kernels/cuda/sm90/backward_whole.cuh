// Consumer of the narrow layout (backward_narrow.cuh) in which both consumers take part in every step.

// dQ = dS K, over all keys of the tile; dS is stored as [keys][queries] and read transposed.
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

// A position in the ring of buffers.
struct BufferRing {
  int index = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++index == BUFFERS) index = 0, parity ^= 1;
  }
};

struct Consumer : KeyHalf {
  BufferRing current, last;
  float* last_sums = nullptr;  // accumulator of dQ of the previous query tile

  DEVICE Consumer(const Memory& memory, int index) : KeyHalf(memory, index) {}

  // Computes dQ of the previous query tile, once all of its dS is available, and adds it in device memory.
  DEVICE void start_last_query_gradient(QueryGradient& made) {
    start_query_gradient(made, memory.buffer(last.index), memory.key(), index);
  }
  DEVICE void add_last_query_gradient(QueryGradient& made) {
    settle(made);
    add_query_gradient(last_sums, made);
  }

  // Processes a query tile whose S^T is complete: accumulates dK, dV and, unless FIRST, dQ of the previous tile, and issues
  // S^T of the next tile if there are MORE.
  template <bool FIRST, bool MORE>
  DEVICE void step(const Problem& problem, int key, int tile, float* sums) {
    const int stage = ring.stage;
    Scores weight_gradients;
    Operand weights, gradients;
    QueryGradient made;
    const bool based = has_bases(memory.rows(stage));
    if constexpr (HELD) start_scores(weight_gradients, held_value, memory.cotangent(stage));
    else start_scores(weight_gradients, memory.value() + own_rows(), memory.cotangent(stage));
    if constexpr (!AHEAD) load_rows(logsumexps, memory.rows(stage));
    if constexpr (ALIBI) {
      add_biases(scores, problem, key + index * WARPGROUP_ROWS, tile * BLOCK_Q, memory.listed(stage));
    }
    if (based) rebase(scores, memory.rows(stage));
    weigh<!LATE>(scores, weights, logsumexps, problem, key + index * WARPGROUP_ROWS, tile * BLOCK_Q, memory.listed(stage),
                 memory.bits(stage) + index * (WARPGROUP_ROWS / 8));
    if constexpr (!LATE) start_gradient(value_gradient, weights, memory.cotangent(stage));
    if constexpr (!FIRST) await_phase(memory.exchanged(last.index), last.parity);
    wgmma_wait<!LATE>();
    settle(weight_gradients);
    if (!SOFTCAP || always()) differentiate<LATE>(scores, weight_gradients, weights, gradients, memory.rows(stage));
    store_operand(memory.buffer(current.index) + own_rows(), gradients, 0);
    fence_shared_for_async();
    __syncwarp();
    release(memory.exchanged(current.index));
    if constexpr (LATE) start_gradient(value_gradient, weights, memory.cotangent(stage));
    start_gradient(key_gradient, gradients, memory.query(stage));
    if constexpr (!FIRST) start_last_query_gradient(made);
    wgmma_wait<!FIRST>();  // dV and dK
    release_read(memory.empty(stage));
    ring.advance();
    if constexpr (MORE) start_next_scores();
    if constexpr (!FIRST) {
      wgmma_wait<MORE>();
      add_last_query_gradient(made);
    }
    last = current, last_sums = sums;
    current.advance();
    if constexpr (MORE) finish_scores();
  }

  // Processes all query tiles of a key tile, at least one; `sums` returns the dQ accumulator of the current query tile.
  template <typename Sums>
  DEVICE void run(const Problem& problem, int key, Walk& walk, const Sums& sums) {
    start_next_scores();
    finish_scores();
    if (walk.left > 1) {
      step<true, true>(problem, key, walk.tile, sums());
      walk.next(problem, key);
#pragma unroll 1
      for (; walk.left > 1; walk.next(problem, key)) step<false, true>(problem, key, walk.tile, sums());
      step<false, false>(problem, key, walk.tile, sums());
    } else {
      step<true, false>(problem, key, walk.tile, sums());
    }
    QueryGradient made;
    await_phase(memory.exchanged(last.index), last.parity);
    start_last_query_gradient(made);
    wgmma_wait<0>();
    add_last_query_gradient(made);
  }
};
