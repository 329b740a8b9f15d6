// Consumer of the narrow layout (backward_narrow.cuh) with SKIPS: causal masks, windows and lists. A consumer whose keys do not see a
// query tile passes by: it has no products of its own in that step, and dQ takes zeros for its part of dS. Along a diagonal this
// leaves out half of every second tile. It has code of its own, between runs of steps: within a step, branches around wgmmas would
// serialise them. What a step keeps is packed into few registers, which would make calls without a mask take 1.09 to 1.11 of the time at
// 128 columns: they have backward_whole.cuh.

// dQ = dS K, over all keys of the tile; dS is stored as [keys][queries] and read transposed. `seers` are the consumers (bits) whose
// keys see the tile: the others have left no dS.
DEVICE void start_query_gradient(QueryGradient& gradient, const Memory& memory, u32 score_gradient, int consumer, int seers) {
  constexpr int HALF_BYTES = HEAD_DIM == 64 ? 64 : HEAD_DIM / 128 * KeyTile::CHUNK_BYTES;
  const u64 right_tile = matrix_descriptor(memory.key() + consumer * HALF_BYTES, KeyTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int half = 0; half < CONSUMERS; ++half) {
    const bool seen = seers >> half & 1;
    const u64 left_tile = matrix_descriptor(seen ? score_gradient + half * (WARPGROUP_ROWS * 128) : memory.nothing(), 0);
#pragma unroll
    for (int step = 0; step < WARPGROUP_ROWS / 16; ++step) {
      wgmma_queries(gradient, advance(left_tile, step * 2048),
                    advance(right_tile, (half * (WARPGROUP_ROWS / 16) + step) * 2048), half + step > 0);
    }
  }
  wgmma_commit();
}

// A position in the ring of buffers, in two rounds: in the second the parity is 1. One register.
struct BufferRing {
  int place = 0;
  DEVICE int index() const { return place < BUFFERS ? place : place - BUFFERS; }
  DEVICE u32 parity() const { return place >= BUFFERS; }
  DEVICE void advance() { place = place == 2 * BUFFERS - 1 ? 0 : place + 1; }
  DEVICE BufferRing before() const { return {place == 0 ? 2 * BUFFERS - 1 : place - 1}; }
};

struct Consumer : KeyHalf {
  BufferRing current;
  int last_sums = -1;  // of the previous query tile, whose dQ is yet to be added: its index with_seers; negative if there is none
  float* own_sums;     // this warp's part of the sums of dQ

  DEVICE Consumer(const Memory& memory, int index, float* own_sums) : KeyHalf(memory, index), own_sums(own_sums) {}

  // First key of the tile; not in a register.
  DEVICE int key() const { return load_word(memory.tile_key()); }

  DEVICE bool is_pending() const { return last_sums >= 0; }
  // Waits for dS of the previous query tile, by both consumers.
  DEVICE void await_last() const {
    const BufferRing last = current.before();
    await_phase(memory.exchanged(last.index()), last.parity());
  }
  // Computes dQ of the previous query tile, once all of its dS is available, and adds it in device memory.
  DEVICE void start_last_query_gradient(QueryGradient& made) {
    start_query_gradient(made, memory, memory.buffer(current.before().index()), index, last_sums);
  }
  DEVICE void add_last_query_gradient(QueryGradient& made) {
    settle(made);
    add_query_gradient(own_sums + static_cast<u64>(last_sums >> CONSUMERS) * (BLOCK_Q * HEAD_DIM), made);
  }

  // Processes a query tile whose S^T is complete: accumulates dK, dV and, unless FIRST, dQ of the previous tile, and issues
  // S^T of the next tile if there are MORE.
  template <bool FIRST, bool MORE>
  DEVICE void step(const Problem& problem, int tile, int sums) {
    const int stage = ring.stage;
    Scores weight_gradients;
    Operand weights, gradients;
    QueryGradient made;
    const bool based = has_bases(memory.rows(stage));
    if constexpr (HELD) start_scores(weight_gradients, held_value, memory.cotangent(stage));
    else start_scores(weight_gradients, memory.value() + own_rows(), memory.cotangent(stage));
    if (based) rebase(scores, memory.rows(stage));
    weigh<!LATE>(scores, weights, logsumexps, problem, key() + index * WARPGROUP_ROWS, tile * BLOCK_Q, memory.listed(stage),
                 memory.bits(stage) + index * (WARPGROUP_ROWS / 8));
    if constexpr (!LATE) start_gradient(value_gradient, weights, memory.cotangent(stage));
    if constexpr (!FIRST) await_last();
    wgmma_wait<!LATE>();
    settle(weight_gradients);
    differentiate<LATE>(scores, weight_gradients, weights, gradients, memory.rows(stage));
    store_operand(memory.buffer(current.index()) + own_rows(), gradients, 0);
    fence_shared_for_async();
    __syncwarp();
    release(memory.exchanged(current.index()));
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
    last_sums = sums;
    current.advance();
    if constexpr (MORE) finish_scores();
  }

  // Whether this consumer's keys see the walk's query tile, which has arrived.
  DEVICE bool sees(const Problem& problem, int tile) const {
    if constexpr (LISTS) return load_word(memory.listed(ring.stage) + 8) >> SEEN + index & 1;
    return problem.seers(key(), tile) >> index & 1;
  }
  // Whether it sees the one after it, too.
  DEVICE bool continues(const Problem& problem, const Walk& walk) const {
    if constexpr (LISTS) return walk.left > 1 && load_word(memory.listed(ring.stage) + 8) >> NEXT_SEEN + index & 1;
    return walk.left > 1 && sees(problem, walk.following(problem, key()));
  }

  // Takes part in a step whose query tile this consumer's keys do not see: its part of dS is 0.
  DEVICE void pass(int sums) {
    if (is_pending()) await_last();
    __syncwarp();
    release(memory.exchanged(current.index()));
    release_read(memory.empty(ring.stage));
    ring.advance();
    if (is_pending()) finish_last_query_gradient();
    last_sums = sums;
    current.advance();
  }
  DEVICE void finish_last_query_gradient() {
    QueryGradient made;
    start_last_query_gradient(made);
    wgmma_wait<0>();
    add_last_query_gradient(made);
  }

  // Processes all query tiles of a key tile, at least one; `sums` returns the index of the current one with_seers.
  template <typename Sums>
  DEVICE void run(const Problem& problem, Walk& walk, const Sums& sums) {
    for (; walk.left > 0; walk.next(problem, key())) {
      await_phase(memory.full(ring.stage), ring.parity);
      if (!sees(problem, walk.tile)) {
        pass(sums());
        continue;
      }
      start_next_scores();
      finish_scores();
      bool more = continues(problem, walk);
      if (!is_pending()) {
        if (!more) {
          step<true, false>(problem, walk.tile, sums());
          continue;
        }
        step<true, true>(problem, walk.tile, sums());
        walk.next(problem, key());
        more = continues(problem, walk);
      }
#pragma unroll 1
      while (more) {
        step<false, true>(problem, walk.tile, sums());
        walk.next(problem, key());
        more = continues(problem, walk);
      }
      step<false, false>(problem, walk.tile, sums());
    }
    await_last();
    finish_last_query_gradient();
    last_sums = -1;
  }
};
