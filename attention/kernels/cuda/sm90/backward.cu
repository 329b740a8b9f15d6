// FlashAttention backward kernel for Hopper: one producer warpgroup, two consumers. The consumer layouts are in
// sm90/backward_narrow.cuh and sm90/backward_wide.cuh, with figures. A block processes the key tiles that `schedule` assigns to it.
// dK and dV of a tile stay in registers while Q, dO and the row statistics are streamed. dQ is accumulated in float32 in
// device memory with atomics, in no fixed order; sm90/backward_rows.cu zeroes the accumulator, sm90/backward_finish.cu rounds it.
// With LISTS, the query tiles of a key tile are entries of a transposed block list: the producer reads them and leaves with
// each query tile what the consumers need.

constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// Key tiles of this block: its column of the host's schedule table (rounds x blocks), with LISTS also their steps (rounds x
// 2 x blocks).
struct Schedule {
  const int* entry;
  int key_tiles, plane = 0, key = 0, steps = 0;
  DEVICE Schedule(const int* table, const Problem& problem)
      : entry(table + blockIdx.x), key_tiles((problem.keys + BLOCK_K - 1) / BLOCK_K) {}
  DEVICE bool next() {
    const int index = *entry;
    if (index < 0) return false;
    if constexpr (LISTS) steps = entry[gridDim.x];
    entry += LISTS ? 2 * gridDim.x : gridDim.x;
    plane = index / key_tiles, key = index % key_tiles * BLOCK_K;
    return true;
  }
};

// Tensor maps of the arrays loaded by TMA.
struct Maps {
  const TensorMap &query, &key, &value, &cotangent;
};

// Loads a listed query tile, its row statistics, and its bits if it is partially masked (`bits` is not negative).
DEVICE void load_queries(const Memory& memory, const Problem& problem, Ring& ring, const Maps& maps, const float* rows,
                         int plane, int batch, int tile, const Lists& lists, int bits) {
  const int head = plane % problem.heads, row = tile * BLOCK_Q;
  const u64 place = static_cast<u64>(plane) * problem.query_tiles() + tile;
  const u32 full = memory.full(ring.stage);
  const bool partial = bits >= 0;
  await_phase(memory.empty(ring.stage), ring.parity ^ 1);
  leave_listed(memory.listed(ring.stage), place, tile, partial);
  if constexpr (ALIBI) leave_slope(memory.listed(ring.stage), problem.slopes[head]);
  barrier_arrive_expecting(full, 2 * QueryTile::BYTES + ROWS_BYTES + (partial ? BITS_BYTES : 0));
  load_tile_expected<BLOCK_Q>(memory.query(ring.stage), maps.query, head, batch, row, full);
  load_tile_expected<BLOCK_Q>(memory.cotangent(ring.stage), maps.cotangent, head, batch, row, full);
  load_bytes(memory.rows(ring.stage), rows + place * (ROWS_BYTES / 4), ROWS_BYTES, full);
  if (partial) {
    load_bytes(memory.bits(ring.stage), lists.bits + static_cast<u64>(bits) * (BITS_BYTES / 4), BITS_BYTES, full);
  }
  ring.advance();
}

// Loads the query tiles listed for a key tile, head by head. Key tiles start at different entries, so that they do not all
// add to the same rows of dQ at the same time.
DEVICE void load_listed(const Memory& memory, const Problem& problem, Ring& ring, const Maps& maps, const float* rows,
                        const Schedule& tile, int batch, const Lists& lists) {
  int plane = tile.plane * problem.heads_per_key;
  for (int left = tile.steps; left > 0; ++plane) {
    const int list = lists.plane(batch, plane % problem.heads) * tile.key_tiles + tile.key / BLOCK_K;
    const int begin = lists.offsets[list], count = lists.offsets[list + 1] - begin;
    for (int i = 0, from = count > 0 ? tile.key / BLOCK_K % count : 0; i < count; ++i) {
      const int2 entry = lists.entries[begin + from];
      load_queries(memory, problem, ring, maps, rows, plane, batch, entry.x, lists, entry.y);
      if (++from == count) from = 0;
    }
    left -= count;
  }
}

// The producer, a single thread.
DEVICE void produce(const Memory& memory, const Problem& problem, Schedule tile, const Maps& maps, const float* rows,
                    const Lists& lists) {
  const int key_heads = problem.heads / problem.heads_per_key;
  Ring ring;
  for (u32 parity = 1; tile.next(); parity ^= 1) {
    const int batch = tile.plane / key_heads, key_head = tile.plane % key_heads;
    await_phase(memory.keys_empty(), parity);
    barrier_arrive_expecting(memory.keys_full(), 2 * KeyTile::BYTES);
    load_tile_expected<BLOCK_K>(memory.key(), maps.key, key_head, batch, tile.key, memory.keys_full());
    load_tile_expected<BLOCK_K>(memory.value(), maps.value, key_head, batch, tile.key, memory.keys_full());
#if LISTS
    load_listed(memory, problem, ring, maps, rows, tile, batch, lists);
#else
    for (Walk walk(problem, tile.plane, tile.key); walk.left > 0; walk.next()) {
      const int head = walk.plane % problem.heads, row = walk.tile * BLOCK_Q;
      const u32 full = memory.full(ring.stage);
      await_phase(memory.empty(ring.stage), ring.parity ^ 1);
      if constexpr (ALIBI) leave_slope(memory.listed(ring.stage), problem.slopes[head]);
      barrier_arrive_expecting(full, 2 * QueryTile::BYTES + ROWS_BYTES);
      load_tile_expected<BLOCK_Q>(memory.query(ring.stage), maps.query, head, batch, row, full);
      load_tile_expected<BLOCK_Q>(memory.cotangent(ring.stage), maps.cotangent, head, batch, row, full);
      load_bytes(memory.rows(ring.stage), rows + walk.place(problem) * (ROWS_BYTES / 4), ROWS_BYTES, full);
      ring.advance();
    }
#endif
  }
}

DEVICE void consume(const Memory& memory, const Problem& problem, Schedule tile, float* query_gradient, char* key_gradient,
                    char* value_gradient) {
  const int warp = same_in_warp(threadIdx.x / 32) - 4;
  Consumer consumer(memory, warp / 4);
  float* own_gradient = query_gradient + warp * QUERY_GRADIENTS * 32;
  for (u32 parity = 0; tile.next(); parity ^= 1) {
    await_phase(memory.keys_full(), parity);
    consumer.begin();
#if LISTS
    Walk walk{tile.steps};
    auto sums = [&] {
      return own_gradient + static_cast<u64>(load_word(memory.listed(consumer.ring.stage))) * (BLOCK_Q * HEAD_DIM);
    };
#else
    Walk walk(problem, tile.plane, tile.key);
    auto sums = [&] { return own_gradient + walk.place(problem) * (BLOCK_Q * HEAD_DIM); };
#endif
    if (walk.left > 0) consumer.run(problem, tile.key, walk, sums);
    release_read(memory.keys_empty());
    consumer.store(key_gradient, value_gradient, problem, tile.plane, tile.key);
  }
}

DEVICE void init_barriers(const Memory& memory) {
  barrier_init(memory.keys_full(), 1);
  barrier_init(memory.keys_empty(), READ_ARRIVALS);
  for (int i = 0; i < STAGES; ++i) {
    barrier_init(memory.full(i), 1);
    barrier_init(memory.empty(i), READ_ARRIVALS);
  }
  for (int i = 0; i < BUFFERS; ++i) barrier_init(memory.exchanged(i), CONSUMERS * CONSUMER_WARPS);
  barrier_init_fence();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value, const __grid_constant__ TensorMap cotangent, const float* rows,
#if ALIBI
                const float* slopes,
#endif
                float* query_gradient, const int* schedule,
#if LISTS
                const int* offsets, const int2* entries, const u32* bits,
#endif
                char* key_gradient, char* value_gradient, int heads, int heads_per_key, int queries, int keys, int columns,
                int scale_bits, int scale_log2_bits, int into_cap_bits,
#if ALIBI
                int slope_factor_bits,
#endif
                int window
#if LISTS
                , int batch_step, int head_step
#endif
    ) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
#if ALIBI
  const Slopes alibi{slopes, __int_as_float(slope_factor_bits)};
#else
  const Slopes alibi;
#endif
  const Problem problem{heads,
                        heads_per_key,
                        queries,
                        keys,
                        columns,
                        __int_as_float(scale_bits),
                        __int_as_float(scale_log2_bits),
                        __int_as_float(into_cap_bits),
                        window,
                        alibi};
#if LISTS
  const Lists lists{offsets, entries, bits, batch_step, head_step};
#else
  const Lists lists{};
#endif
  if (threadIdx.x == 0) {
    prefetch_map(query), prefetch_map(key), prefetch_map(value), prefetch_map(cotangent);
    init_barriers(memory);
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, Schedule(schedule, problem), {query, key, value, cotangent}, rows, lists);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(memory, problem, Schedule(schedule, problem), query_gradient, key_gradient, value_gradient);
  }
}
