// Flash attention, forward, on Hopper (FlashAttention 3: Shah et al., 2024). One warpgroup copies, two or three compute.
//
//                     keys: BLOCK_N at a time, the last tile first
//                   +--------+--------+--------+
//   BLOCK_M    wg 0 |  S, P  |  S, P  |  S, P  |  64 queries, S and P in registers   -> O, logsumexp
//   queries    wg 1 |        |        |        |  64 queries
//             (wg 2)|        |        |        |  64 queries
//                   +--------+--------+--------+
//
// One block stays on each multiprocessor and works through the tiles of BLOCK_M queries that `schedule` gives it.
//
//   OVERLAP    a consumer starts S of the next keys before it adds P V of these, and does softmax while both run, from tile
//              to tile without a break: the first S of the next tile is made with the last P V of this one
//
//     tensor cores   [ S(n) = Q K(n)^T ][ O += P(n+1) V(n+1) ]
//     other units                        [ softmax of S(n)    ] then rescale O, pack P(n)
//
//   otherwise  consumers take turns at starting products, P V of these keys and S of the next, so that one's softmax runs
//              under another's products; P takes the registers of S, so that wider tiles fit

// ---- a consumer --------------------------------------------------------------------------------------------------

struct Results {
  char* output;
  float* logsumexp;
  Parts parts;
};

// A consumer's place in the rings, and in its work: step `n` of the keys that its queries see, counted down to `first`.
struct Consumer {
  const Memory memory;
  const int index;
  Ring keys, values;
  Schedule schedule;
  Work work;
  u32 query = 0;
  int n = 0, skips = 0;  // skips: tiles of the work's keys that none of this consumer's queries may see, at the end

  DEVICE Consumer(const Memory& memory, int index, const Schedule& schedule)
      : memory(memory), index(index), schedule(schedule) {
    if (index == CONSUMERS - 1) pass_turn();  // the first is consumer 0's
  }
  DEVICE u32 await_keys() const {
    barrier_wait(memory.key_full(keys.stage), keys.parity);
    return memory.key(keys.stage);
  }
  DEVICE u32 await_values() const {
    barrier_wait(memory.value_full(values.stage), values.parity);
    return memory.value(values.stage);
  }
  // The same, and not before the sums of a softmax are known. They are never negative; but the assembler, which does not
  // know that, would else put off the exponentials until after the wait for P V, and nothing would run beside the products.
  DEVICE u32 await_values_after(const Rows& rows) const {
    barrier_wait(memory.value_full(values.stage), values.parity | (rows.sum[0] < 0) | (rows.sum[1] < 0));
    return memory.value(values.stage);
  }
  DEVICE void release_query() const { release(memory.query_empty(work.query_buffer(index))); }
  DEVICE void release_keys() {
    release(memory.key_empty(keys.stage));
    keys.advance();
    if (n == work.first) release_query();  // those were the last scores
  }
  DEVICE void release_values() {
    release(memory.value_empty(values.stage));
    values.advance();
  }
  // Let a tile of keys, and its values, pass.
  DEVICE void skip_keys() {
    await_keys();
    release(memory.key_empty(keys.stage));
    keys.advance();
  }
  DEVICE void skip_values() {
    await_values();
    release_values();
  }
  DEVICE void wait_turn() const {
    if constexpr (TURNS) named_sync(TURN_BARRIER + index, 2 * WARPGROUP);
  }
  DEVICE void pass_turn() const {
    if constexpr (TURNS) named_arrive(TURN_BARRIER + (index + 1) % CONSUMERS, 2 * WARPGROUP);
  }

  // Takes up the next work, when its queries have come; false at the end of the list.
  DEVICE bool next_work(const Problem& problem) {
    if (!schedule.next(work, problem)) return false;
    const int buffer = work.query_buffer(index);
    barrier_wait(memory.query_full(buffer), work.query_parity());
    query = memory.query(buffer);
    n = problem.key_blocks_of_warpgroup(top(work), work.first, work.end) - 1;
    skips = work.end - 1 - n;
    return true;
  }
  DEVICE bool sees_nothing() const { return n < work.first; }

  // The first row of a work that is this consumer's, and this thread's.
  DEVICE int top(const Work& of) const { return of.block * BLOCK_M + index * WARPGROUP_ROWS; }
  DEVICE int row(const Work& of) const { return top(of) + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  // Caps the scores and drops what may not be seen.
  DEVICE void mask(Scores& scores, const Problem& problem) const {
    if constexpr (SOFTCAP) cap_scores(scores, problem.into_cap);
    const int first_of_all = problem.first_seen_by(top(work) + WARPGROUP_ROWS - 1);
    if ((n + 1) * BLOCK_N > problem.last_seen_by(top(work)) || n * BLOCK_N < first_of_all) {
      mask_scores(scores, problem, row(work), n * BLOCK_N);
    }
  }

  // Writes the rows of a work, and clears the accumulators for the next.
  DEVICE void finish(Output& out, Rows& rows, const Work& of, const Problem& problem, const Results& results) const {
    const u64 plane_rows = static_cast<u64>(of.plane) * problem.queries;
    float* logsumexp = results.logsumexp != nullptr ? results.logsumexp + plane_rows : nullptr;
    finish_rows(out, rows, logsumexp, row(of), problem);
    store_output(results.output + (plane_rows + row(of)) * problem.columns * 2, out, problem.queries - row(of),
                 problem.columns);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) out[i] = 0;
  }
  // The same where the work may be a part of a tile's keys, which takes registers that are free after a break only.
  DEVICE void finish_any(Output& out, Rows& rows, const Work& of, const Problem& problem, const Results& results) const {
    const Part part(of.part);
    if (part.count > 0) {
      if (!leave_part(out, rows, results.parts, part)) return;
      join_parts(out, rows, results.parts, part, problem.scale_log2);
    }
    finish(out, rows, of, problem, results);
  }
};

// Attends to the keys of a consumer's work, at least one tile of them, and goes on with the next works while their products
// can be woven into one another. Finishes all of them but the last, `ending`, and leaves with the work after that, if any.
DEVICE bool attend_overlapping(Consumer& consumer, const Problem& problem, const Results& results, Output& out, Rows& rows,
                               Work& ending) {
#pragma unroll 1
  for (int i = 0; i < consumer.skips; ++i) {
    consumer.wait_turn();
    consumer.pass_turn();
    consumer.skip_keys();
    consumer.skip_values();
  }
  Scores scores;
  Weights weights;
  u32 key = consumer.await_keys();
  consumer.wait_turn();
  start_scores(scores, consumer.query, key);
  wgmma_wait<0>();
  settle(scores);
  consumer.pass_turn();
  consumer.release_keys();
  consumer.mask(scores, problem);
  softmax(scores, rows, problem.scale_log2);
  u32 value = consumer.await_values(), used;
  pack_weights(weights, scores);
  bool more = true;
#pragma unroll 1
  while (true) {  // P of step n is there, and its V
    used = consumer.memory.value_empty(consumer.values.stage);
    consumer.values.advance();
    const bool ends = consumer.n == consumer.work.first;
    bool skips = false;
    if (ends) {
      ending = consumer.work;
      more = consumer.next_work(problem);
      if (!more || ending.part != 0 || consumer.skips > 1 || consumer.sees_nothing()) break;
      skips = consumer.skips == 1;
      if (skips) {
        consumer.wait_turn();
        consumer.pass_turn();
        consumer.skip_keys();
      }
    } else {
      --consumer.n;
    }
    key = consumer.await_keys();
    consumer.wait_turn();
    start_scores(scores, consumer.query, key);
    start_output(out, weights, value);
    wgmma_wait<1>();
    settle(scores);
    consumer.pass_turn();
    consumer.release_keys();
    consumer.mask(scores, problem);
    Rows ended = rows;
    if (ends) rows = Rows();
    softmax(scores, rows, problem.scale_log2);
    value = consumer.await_values_after(rows);
    wgmma_wait<0>();
    settle(out);
    release(used);
    if (skips) consumer.release_values(), value = consumer.await_values();  // whose buffer was just released
    if (ends) consumer.finish(out, ended, ending, problem, results);
    else scale_output(out, rows.rescale);
    pack_weights(weights, scores);
  }
  start_output(out, weights, value);
  wgmma_wait<0>();
  settle(out);
  release(used);
  return more;
}

DEVICE void consume_overlapping(Consumer& consumer, const Problem& problem, const Results& results) {
  bool more = consumer.next_work(problem);
  while (more) {
    Output out = {};
    Rows rows;
    Work ending = consumer.work;
    if (consumer.sees_nothing()) {
      consumer.release_query();
      more = consumer.next_work(problem);
    } else {
      more = attend_overlapping(consumer, problem, results, out, rows, ending);
    }
    consumer.finish_any(out, rows, ending, problem, results);
  }
}

// Attends to the keys of a consumer's work, at least one tile of them.
DEVICE void attend_in_turns(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  consumer.wait_turn();
#pragma unroll 1
  for (int i = 0; i < consumer.skips; ++i) {
    consumer.pass_turn();
    consumer.skip_keys();
    consumer.skip_values();
    consumer.wait_turn();
  }
  Scores scores;
  Weights weights;
  u32 key = consumer.await_keys();
#pragma unroll 1
  for (const int last = consumer.n; consumer.n >= consumer.work.first; --consumer.n) {
    start_scores(scores, consumer.query, key);
    consumer.pass_turn();
    if (consumer.n < last) consumer.release_values();
    wgmma_wait<0>();
    settle(scores);
    consumer.release_keys();
    consumer.mask(scores, problem);
    softmax(scores, rows, problem.scale_log2);
    scale_output(out, rows.rescale);
    pack_weights(weights, scores);
    const u32 value = consumer.await_values();
    // before the turn: nothing may delay the next scores
    if (consumer.n > consumer.work.first) key = consumer.await_keys();
    consumer.wait_turn();
    start_output(out, weights, value);
    wgmma_wait<0>();
    settle(out);
  }
  consumer.release_values();
  consumer.pass_turn();
}

DEVICE void consume_in_turns(Consumer& consumer, const Problem& problem, const Results& results) {
  while (consumer.next_work(problem)) {
    Output out = {};
    Rows rows;
    if (consumer.sees_nothing()) consumer.release_query();
    else attend_in_turns(consumer, problem, out, rows);
    consumer.finish_any(out, rows, consumer.work, problem, results);
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

DEVICE void init_barriers(const Memory& memory) {
  for (int i = 0; i < CONSUMERS * QUERY_STAGES; ++i) {
    barrier_init(memory.query_full(i), 1);
    barrier_init(memory.query_empty(i), CONSUMER_WARPS);
  }
  for (int i = 0; i < STAGES; ++i) {
    barrier_init(memory.key_full(i), 1);
    barrier_init(memory.value_full(i), 1);
    barrier_init(memory.key_empty(i), CONSUMERS * CONSUMER_WARPS);
    barrier_init(memory.value_empty(i), CONSUMERS * CONSUMER_WARPS);
  }
  barrier_init_fence();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value, const int4* table, char* output, float* logsumexp,
                float4* parts, u64* marks, int planes, int heads, int heads_per_key, int queries, int keys, int columns,
                int scale_log2_bits, int into_cap_bits, int window, int rounds, u64 serial) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const Problem problem{planes, heads, heads_per_key, queries, keys, columns, __int_as_float(scale_log2_bits),
                        __int_as_float(into_cap_bits), window};
  const Schedule schedule{table + blockIdx.x * rounds};
  if (threadIdx.x == 0) {
    prefetch(schedule.entry);  // what takes longest at the start
    prefetch_map(query), prefetch_map(key), prefetch_map(value);
    init_barriers(memory);
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    if constexpr (CONSUMERS > 1) give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, schedule, query, key, value);
  } else {
    if constexpr (CONSUMERS > 1) take_registers<CONSUMER_REGISTERS>();
    Consumer consumer(memory, same_in_warp(threadIdx.x / WARPGROUP) - 1, schedule);
    const Results results{output, logsumexp, {parts, marks, serial}};
    if constexpr (OVERLAP) consume_overlapping(consumer, problem, results);
    else consume_in_turns(consumer, problem, results);
  }
}
