// FlashAttention forward kernel for Hopper (FlashAttention-3: Shah et al., 2024): one producer warpgroup, one to three
// consumers.
//
//                     keys: BLOCK_N at a time, the last tile first
//                   +--------+--------+--------+
//   BLOCK_M    wg 0 |  S, P  |  S, P  |  S, P  |  64 queries, S and P in registers   -> O, logsumexp
//   queries    wg 1 |        |        |        |  64 queries
//             (wg 2)|        |        |        |  64 queries
//                   +--------+--------+--------+
//
// Persistent kernel: one block per multiprocessor processes the tiles of BLOCK_M queries that `schedule` assigns to it.
//
//   OVERLAP    a consumer issues S of the next keys before P V of the current ones, and computes softmax while both run:
//
//     tensor cores   [ S(n) = Q K(n)^T ][ O += P(n+1) V(n+1) ]
//     other units                        [ softmax of S(n)    ] then rescale O, pack P(n)
//
//   otherwise  consumers take turns to issue wgmmas, P V of the current keys and S of the next, so that the softmax of one
//              overlaps with the wgmmas of another; P reuses the registers of S, so that larger tiles fit

// ---- a consumer --------------------------------------------------------------------------------------------------

struct Results {
  char* output;
  RowResults rows;
  Parts parts;
};

struct Consumer : Position {
  float slope = 0;  // with ALIBI: of the work item's head

  using Position::Position;
  DEVICE bool next_work(const Problem& problem) {
    if (!Position::next_work(problem)) return false;
    if constexpr (ALIBI) slope = problem.slopes[schedule.plane() % problem.heads];
    if constexpr (WINDOW) pass_unseen(skips);  // else later, which takes fewer registers
    return true;
  }

  // Caps, biases and masks the scores.
  DEVICE void mask(Scores& scores, const Problem& problem, const Listed& listed) const {
    if constexpr (SOFTCAP) cap_scores(scores, problem.into_cap);
    if constexpr (ALIBI) add_biases(scores, problem, slope, row(), (LISTS ? listed.tile() : n) * BLOCK_N);
    if constexpr (LISTS) return mask_listed(scores, problem, listed, row());
    mask_bounds(scores, problem);
  }

  // Waits for the scores of tile `n`, with at most PENDING later wgmma groups in flight, and converts them to weights.
  template <int PENDING>
  DEVICE void weigh(Scores& scores, const Problem& problem, Rows& rows) {
    Listed listed;
    if constexpr (LISTS) listed.read(memory.listed(keys.stage), memory.bits(keys.stage) + index * (BITS_BYTES / CONSUMERS));
    wgmma_wait<PENDING>();
    settle(scores);
    release_keys();
    mask(scores, problem, listed);
    softmax(scores, rows, problem.scale_log2);
  }

#if HALVES
  // Where the keys of key tile `tile` start of which this consumer sees any, if those are in one half: 0 or HALF_KEYS; else -1.
  DEVICE int seen_half(int tile, const Problem& problem) const {
    const int middle = tile * BLOCK_N + HALF_KEYS;
    if (problem.last_seen_by(top() + WARPGROUP_ROWS - 1) <= middle) return 0;
    return problem.first_seen_by(top()) >= middle ? HALF_KEYS : -1;
  }

  // Processes the half of tile `n` from key `from` on. `key` is its K tile, then that of the next tile.
  DEVICE void attend_half(int from, u32& key, const Problem& problem, Output& out, Rows& rows) {
    const u32 place = from == 0 ? 0 : HALF_BYTES;
    HalfScores scores;
    HalfWeights weights;
    start_half_scores(scores, query, key + place);
    pass_turn();
    wgmma_wait<0>();
    settle(scores);
    release_keys();
    mask_scores(scores, problem, row(), n * BLOCK_N + from);
    softmax(scores, rows, problem.scale_log2);
    rescale_output(out, rows);
    pack_weights(weights, scores);
    const u32 value = await_values();
    if (n > least()) key = await_keys();
    wait_turn();
    start_output(out, weights, value + place);
    wgmma_wait<0>();
    settle(out);
    release_values();
    --n;
  }
#endif

  // Writes the rows of the work item before `place`, or their part of a split tile; the last part to finish combines them.
  DEVICE void finish(Output& out, Rows& rows, const Schedule& place, const Problem& problem, const Results& results) const {
    const Part part(same_in_warp(place.part()));
    if (part.count > 0) {
      if (!same_in_warp(leave_part(out, rows, results.parts, part))) return;
      join_parts(out, rows, results.parts, part, problem.scale_log2);
    }
    const u64 plane_rows = static_cast<u64>(place.plane()) * problem.queries;
    const int row = row_of(WINDOW ? place.block() : work.block);
    finish_rows(out, rows, results.rows.from(plane_rows), row, problem);
    store_output(results.output + (plane_rows + row) * problem.columns * 2, out, problem.queries - row, problem.columns);
  }
};

// Processes the key tiles of a consumer's work, at least one, with overlap inside the consumer.
DEVICE void attend_overlapping(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  if constexpr (!WINDOW) consumer.pass_unseen(consumer.skips);
  int least = consumer.least();
#if HALVES
  u32 half_key = consumer.await_keys();
  const int first_half = consumer.seen_half(consumer.n, problem);
  if (first_half >= 0) consumer.attend_half(first_half, half_key, problem, out, rows);
  if (consumer.n < least) return;
  const int last_half = consumer.seen_half(least, problem);
  least += last_half >= 0;
  if (consumer.n >= least)
#endif
  {
    Scores scores;
    Weights weights;
    start_scores(scores, consumer.query, consumer.await_keys());
    consumer.weigh<0>(scores, problem, rows);
    if constexpr (HALVES) rescale_output(out, rows);  // of a half before
    u32 value = consumer.await_values();
    pack_weights(weights, scores);
#pragma unroll 1
    while (consumer.n > least) {
      --consumer.n;
      const u32 key = consumer.await_keys();
      start_scores(scores, consumer.query, key);
      start_output(out, weights, value);
      consumer.weigh<1>(scores, problem, rows);
      // Waiting for the next V here ends the basic block. Otherwise ptxas moves the wait for P V up, before the exponentials,
      // and the softmax no longer overlaps with the wgmmas.
      const u32 used = consumer.memory.value_empty(consumer.values.stage);
      consumer.values.advance();
      value = consumer.await_values();
      wgmma_wait<0>();
      settle(out);
      release(used);
      rescale_output(out, rows);
      pack_weights(weights, scores);
    }
    start_output(out, weights, value);
    wgmma_wait<0>();
    settle(out);
    consumer.release_values();
  }
#if HALVES
  if (last_half >= 0) {
    consumer.n = consumer.least();
    half_key = consumer.await_keys();
    consumer.attend_half(last_half, half_key, problem, out, rows);
  }
#endif
}

// Processes the key tiles of a consumer's work without overlap inside the consumer: consumers overlap with each other.
DEVICE void attend_in_turns(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  if constexpr (!WINDOW) consumer.pass_unseen(consumer.skips);
  consumer.wait_turn();
  u32 key = consumer.await_keys();
  int least = consumer.least();
#if HALVES
  const int first_half = consumer.seen_half(consumer.n, problem);
  if (first_half >= 0) consumer.attend_half(first_half, key, problem, out, rows);
  const int last_half = consumer.n < least ? -1 : consumer.seen_half(least, problem);
  least += last_half >= 0;
  if (consumer.n >= least)
#endif
  {
    Scores scores;
    Weights weights;
#pragma unroll 1
    for (const int last = consumer.n; consumer.n >= least; --consumer.n) {
      start_scores(scores, consumer.query, key);
      consumer.pass_turn();
      if (consumer.n < last) consumer.release_values();
      consumer.weigh<0>(scores, problem, rows);
      rescale_output(out, rows);
      pack_weights(weights, scores);
      const u32 value = consumer.await_values();
      // before the turn, so that nothing delays the next scores
      if (consumer.n > consumer.least()) key = consumer.await_keys();
      consumer.wait_turn();
      start_output(out, weights, value);
      wgmma_wait<0>();
      settle(out);
    }
    consumer.release_values();
  }
#if HALVES
  if (last_half >= 0) consumer.attend_half(last_half, key, problem, out, rows);
#endif
  consumer.pass_turn();
}

// Processes a work item, of which every consumer has the key tiles that it sees.
DEVICE void attend(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  if (consumer.sees_nothing()) consumer.release_query();
  else if constexpr (OVERLAP) attend_overlapping(consumer, problem, out, rows);
  else attend_in_turns(consumer, problem, out, rows);
}

#if WINDOW
// Rows are written while other consumers compute: before the turns for tiles of this work item that only others see or, if
// there are none, after those for tiles of the next work item.
DEVICE void consume(Consumer& consumer, const Problem& problem, const Results& results) {
  bool more = consumer.next_work(problem);
  while (more) {
    Output out = {};
    Rows rows;
    attend(consumer, problem, out, rows);
    const Schedule place = consumer.schedule;
    const bool early = consumer.earlier() > 0;
    if (!early) more = consumer.next_work(problem);
    consumer.finish(out, rows, place, problem, results);
    if (early) {
      consumer.pass_unseen(consumer.earlier());
      more = consumer.next_work(problem);
    }
  }
}
#else
DEVICE void consume(Consumer& consumer, const Problem& problem, const Results& results) {
  while (consumer.next_work(problem)) {
    Output out = {};
    Rows rows;
    attend(consumer, problem, out, rows);
    consumer.finish(out, rows, consumer.schedule, problem, results);
  }
}
#endif

// ---- the kernel --------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value,
#if GATHERED
                const __grid_constant__ TensorMap far_key, const __grid_constant__ TensorMap far_value,
#endif
#if ALIBI
                const float* slopes,
#endif
                const int4* table,
#if GATHERED
                const int* tiles,
#endif
#if LISTS
                const int2* entries, const u32* bits,
#endif
                char* output, float* logsumexp,
                float2* stats, float4* parts, u64* marks, int planes, int heads, int heads_per_key, int queries, int keys, int columns,
                int scale_log2_bits, int into_cap_bits,
#if ALIBI
                int slope_factor_bits,
#endif
                int window, int rounds,
#if GATHERED
                int second_run, int first_shift, int second_shift,
#endif
                u64 serial) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
#if ALIBI
  const Slopes alibi{slopes, __int_as_float(slope_factor_bits)};
#else
  const Slopes alibi;
#endif
#if GATHERED
  const Runs runs{second_run, first_shift, second_shift};
  const Gathered gathered{&far_key, &far_value, tiles};
#else
  const Runs runs{};
  const Gathered gathered{};
#endif
  const Problem problem{planes, heads, heads_per_key, queries, keys, columns, __int_as_float(scale_log2_bits),
                        __int_as_float(into_cap_bits), window, alibi, runs};
  const Schedule schedule{table + 2 * rounds * blockIdx.x};
#if LISTS
  const Lists lists{entries, bits};
#else
  const Lists lists{};
#endif
  if (threadIdx.x == 0) {
    prefetch(schedule.entry);  // the longest latency of the prologue
    prefetch_map(query), prefetch_map(key), prefetch_map(value);
    init_barriers(memory);
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, schedule, lists, query, key, value, {}, gathered);
  } else {
    if constexpr (CONSUMERS == 1) give_registers<CONSUMER_REGISTERS>();
    else take_registers<CONSUMER_REGISTERS>();
    Consumer consumer(memory, same_in_warp(threadIdx.x / WARPGROUP) - 1, schedule);
    const Results results{output, {logsumexp, stats}, {parts, marks, serial}};
    consume(consumer, problem, results);
  }
}
