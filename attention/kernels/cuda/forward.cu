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
// Switches, all compile-time:
//
//   OVERLAP   a consumer starts S of the next tile before it adds P V of this one, and does softmax while both run
//   TURNS     consumers take turns at starting products, so that one's softmax runs under another's products
//
// With OVERLAP, in each step of a consumer (n counts down):
//
//   tensor cores   [ S(n) = Q K(n)^T ][ O += P(n+1) V(n+1) ]
//   other units                        [ softmax of S(n)    ] then rescale O, pack P(n)

// ---- a consumer --------------------------------------------------------------------------------------------------

// A consumer's place in the rings, and its turns at starting products: `pass_turn` hands on to the next consumer.
struct Consumer {
  Memory memory;
  int index;
  Ring keys, values;

  DEVICE Consumer(const Memory& memory, int index) : memory(memory), index(index) {
    if (TURNS && index == CONSUMERS - 1) named_arrive(TURN_BARRIER, 2 * WARPGROUP);  // the first turn is consumer 0's
  }
  DEVICE u32 await_keys() const {
    barrier_wait(memory.key_full(keys.stage), keys.parity);
    return memory.key(keys.stage);
  }
  DEVICE u32 await_values() const {
    barrier_wait(memory.value_full(values.stage), values.parity);
    return memory.value(values.stage);
  }
  DEVICE void release_keys() {
    release(memory.key_empty(keys.stage));
    keys.advance();
  }
  DEVICE void release_values() {
    release(memory.value_empty(values.stage));
    values.advance();
  }
  DEVICE void wait_turn() const {
    if constexpr (TURNS) named_sync(TURN_BARRIER + index, 2 * WARPGROUP);
  }
  DEVICE void pass_turn() const {
    if constexpr (TURNS) named_arrive(TURN_BARRIER + (index + 1) % CONSUMERS, 2 * WARPGROUP);
  }
  // Lets a tile pass that none of this consumer's queries may see.
  DEVICE void skip() {
    if constexpr (OVERLAP) wait_turn(), pass_turn();
    else pass_turn(), wait_turn();
    await_keys();
    release_keys();
    await_values();
    release_values();
  }
};

// Attention of 64 queries to the tiles of keys [first, end), at least one, the last first. `mask` caps the scores and
// drops what may not be seen.
template <typename Mask>
DEVICE void attend_overlapping(Consumer& consumer, u32 query, int first, int end, const Mask& mask, float scale_log2,
                               Output& out, Rows& rows) {
  Scores scores;
  Weights weights;
  start_scores(scores, query, consumer.await_keys());
  wgmma_wait<0>();
  settle(scores);
  consumer.release_keys();
  mask(scores, end - 1);
  softmax(scores, rows, scale_log2);
  u32 value = consumer.await_values();
  pack_weights(weights, scores);
#pragma unroll 1
  for (int n = end - 2; n >= first; --n) {
    const u32 key = consumer.await_keys();
    consumer.wait_turn();
    start_scores(scores, query, key);
    start_output(out, weights, value);
    consumer.pass_turn();
    wgmma_wait<1>();
    settle(scores);
    consumer.release_keys();
    mask(scores, n);
    softmax(scores, rows, scale_log2);
    // The wait for the next V stands here to end the basic block. Without it the assembler moves the wait for P V up,
    // before the exponentials, and the softmax no longer runs beside the products.
    const u32 used = consumer.memory.value_empty(consumer.values.stage);
    consumer.values.advance();
    value = consumer.await_values();
    wgmma_wait<0>();
    settle(out);
    release(used);
    scale_output(out, rows.rescale);
    pack_weights(weights, scores);
  }
  start_output(out, weights, value);
  wgmma_wait<0>();
  settle(out);
  consumer.release_values();
}

// The same without overlap inside the consumer: several consumers overlap with each other. Weights may take the
// registers of the scores, so that wider tiles fit. Called, and left, with the turn at hand.
template <typename Mask>
DEVICE void attend_in_sequence(Consumer& consumer, u32 query, int first, int end, const Mask& mask, float scale_log2,
                               Output& out, Rows& rows) {
  Scores scores;
  Weights weights;
  u32 key = consumer.await_keys();
#pragma unroll 1
  for (int n = end - 1; n >= first; --n) {
    start_scores(scores, query, key);
    consumer.pass_turn();
    if (n < end - 1) consumer.release_values();
    wgmma_wait<0>();
    settle(scores);
    consumer.release_keys();
    mask(scores, n);
    softmax(scores, rows, scale_log2);
    scale_output(out, rows.rescale);
    pack_weights(weights, scores);
    const u32 value = consumer.await_values();
    if (n > first) key = consumer.await_keys();  // before the turn: nothing may delay the next scores
    consumer.wait_turn();
    start_output(out, weights, value);
    wgmma_wait<0>();
    settle(out);
  }
  consumer.release_values();
}

DEVICE void consume(const Memory& memory, const Problem& problem, Schedule tile, char* output, float* logsumexp) {
  // The shuffle tells the compiler that the number is the same in the whole warp: addresses stay in uniform registers.
  Consumer consumer(memory, __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) - 1);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;

  while (tile.next()) {
    const int first_row = tile.block * BLOCK_M + consumer.index * WARPGROUP_ROWS;
    const int row = first_row + warp * 16 + lane / 4;
    const int first_seen[2] = {problem.first_seen_by(row), problem.first_seen_by(row + 8)};
    const int last_seen[2] = {problem.last_seen_by(row), problem.last_seen_by(row + 8)};
    const int first_of_all = problem.first_seen_by(first_row + WARPGROUP_ROWS - 1);
    const int last_of_all = problem.last_seen_by(first_row);
    auto mask = [&](Scores& scores, int n) {
      if constexpr (SOFTCAP) cap_scores(scores, problem.into_cap);
      if ((n + 1) * BLOCK_N > last_of_all || n * BLOCK_N < first_of_all) {
        mask_scores(scores, first_seen, last_seen, n * BLOCK_N);
      }
    };
    Output out = {};
    Rows rows;

    barrier_wait(memory.query_full(consumer.index), tile.parity);
    const u32 query = memory.query(consumer.index);
    const int first = problem.first_key_block(tile.block), tile_end = problem.key_blocks(tile.block);
    const int end = problem.key_blocks_of_warpgroup(first_row, first, tile_end);
    if constexpr (!OVERLAP) consumer.wait_turn();
    for (int n = tile_end; n > end; --n) consumer.skip();
    if constexpr (OVERLAP) {
      if (end > first) attend_overlapping(consumer, query, first, end, mask, problem.scale_log2, out, rows);
    } else {
      if (end > first) attend_in_sequence(consumer, query, first, end, mask, problem.scale_log2, out, rows);
      consumer.pass_turn();
    }
    release(memory.query_empty(consumer.index));  // the next ones come while this tile is finished

    const u64 plane_rows = static_cast<u64>(tile.plane) * problem.queries;
    finish_rows(out, rows, logsumexp + plane_rows, row, problem);
    store_output(output + (plane_rows + row) * problem.columns * 2, out, problem.queries - row, problem.columns);
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

DEVICE void init_barriers(const Memory& memory) {
  for (int i = 0; i < CONSUMERS; ++i) {
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
    KERNEL_NAME(const char* query, const char* key, const char* value, const int* schedule, char* output,
                float* logsumexp, char* scratch, int planes, int planes_per_key, int queries, int keys, int columns,
                int scale_log2_bits, int into_cap_bits, int window) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const Problem problem{planes, planes_per_key, queries, keys, columns, __int_as_float(scale_log2_bits),
                        __int_as_float(into_cap_bits), window};
  char* maps = scratch + blockIdx.x * (MAPS * MAP_BYTES);

  const int warp = threadIdx.x / 32;
  if (warp < MAPS) {
    const char* base = warp == 0 ? query : warp == 1 ? key : value;
    build_map(memory.maps() + warp * MAP_BYTES, maps + warp * MAP_BYTES, base, columns, warp == 0 ? queries : keys,
              warp == 0 ? planes : planes / planes_per_key, warp == 0 ? WARPGROUP_ROWS : BLOCK_N);
  }
  if (threadIdx.x == MAPS * 32) init_barriers(memory);
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, Schedule(schedule, problem), maps);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(memory, problem, Schedule(schedule, problem), output, logsumexp);
  }
}
