// FlashAttention backward kernel for Hopper: one producer warpgroup, two consumers. The consumer layouts are in
// sm90/backward_narrow.cuh (with backward_whole.cuh or backward_halves.cuh) and sm90/backward_wide.cuh, with figures. A block
// processes the key tiles that `schedule` assigns to it. dK and dV of a tile stay in registers while Q, dO and the row statistics
// are streamed. dQ is accumulated in float32 in device memory with atomics, in no fixed order; sm90/backward_rows.cu zeroes the
// accumulator or, with CLEARS, the first part of it (sm90/backward_sums.cuh), sm90/backward_finish.cu rounds it.
// With LISTS, the query tiles of a key tile are entries of a transposed block list: the producer reads them and leaves with
// each query tile what the consumers need.

constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// Tensor maps of the arrays loaded by TMA.
struct Maps {
  const TensorMap &query, &key, &value, &cotangent;
};

// Loads a listed query tile, its row statistics, and its bits if it is partially masked.
DEVICE void load_queries(const Memory& memory, const Problem& problem, Ring& ring, const Maps& maps, const float* rows,
                         int plane, int batch, int tile, const Lists& lists, int sight) {
  const int head = plane % problem.heads, row = tile * BLOCK_Q;
  const u64 place = static_cast<u64>(plane) * problem.query_tiles() + tile;
  const u32 full = memory.full(ring.stage);
  const int bits = SKIPS ? sight & WHOLLY_VISIBLE : sight;
  const bool partial = SKIPS ? bits != WHOLLY_VISIBLE : bits >= 0;
  await_phase(memory.empty(ring.stage), ring.parity ^ 1);
  leave_listed(memory.listed(ring.stage), place, tile, SKIPS ? sight >> SIGHT_BITS << SEEN | partial : partial);
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
// add to the same rows of dQ at the same time: at the first if it is partially masked, as those along a diagonal are.
DEVICE void load_listed(const Memory& memory, const Problem& problem, Ring& ring, const Maps& maps, const float* rows,
                        const Schedule& tile, int batch, const Lists& lists) {
  int plane = tile.plane * problem.heads_per_key;
  for (int left = tile.steps; left > 0; ++plane) {
    const int list = lists.plane(batch, plane % problem.heads) * tile.key_tiles + tile.key / BLOCK_K;
    const int begin = lists.offsets[list], count = lists.offsets[list + 1] - begin;
    const bool diagonal = SKIPS && count > 0 && (lists.entries[begin].y & WHOLLY_VISIBLE) != WHOLLY_VISIBLE;
    for (int i = 0, from = count > 0 && !diagonal ? tile.key / BLOCK_K % count : 0; i < count; ++i) {
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
    publish_plane(memory, tile.plane);
    await_cleared(memory, tile.plane);
    if constexpr (SKIPS) store_word(memory.tile_key(), tile.key);
    barrier_arrive_expecting(memory.keys_full(), 2 * KeyTile::BYTES);
    load_tile_expected<BLOCK_K>(memory.key(), maps.key, key_head, batch, tile.key, memory.keys_full());
    load_tile_expected<BLOCK_K>(memory.value(), maps.value, key_head, batch, tile.key, memory.keys_full());
#if LISTS
    load_listed(memory, problem, ring, maps, rows, tile, batch, lists);
#else
    for (Walk walk(problem, tile.plane, tile.key); walk.left > 0; walk.next(problem, tile.key)) {
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
  publish_plane(memory, ALL_BEGUN);
}

DEVICE void consume(const Memory& memory, const Problem& problem, Schedule tile, float* query_sums, char* key_gradient,
                    char* value_gradient) {
  const int warp = same_in_warp(threadIdx.x / 32) - 4;
  float* own_gradient = query_sums + warp * QUERY_GRADIENTS * 32;
#if SKIPS
  Consumer consumer(memory, warp / 4, own_gradient);
#else
  Consumer consumer(memory, warp / 4);
#endif
  for (u32 parity = 0; tile.next(); parity ^= 1) {
    await_phase(memory.keys_full(), parity);
    consumer.begin();
#if LISTS
    Walk walk{tile.steps};
    auto place = [&] { return load_word(memory.listed(consumer.ring.stage)); };
#elif SKIPS
    Walk walk(problem, tile.plane, tile.key);
    auto place = [&] {
      const int place = walk.place(problem);
      return with_seers(place, problem.seers(load_word(memory.tile_key()), walk.tile));
    };
#else
    Walk walk(problem, tile.plane, tile.key);
    auto place = [&] { return walk.place(problem); };
#endif
#if SKIPS
    if (walk.left > 0) consumer.run(problem, walk, [&] { return static_cast<int>(place()); });
#else
    auto sums = [&] { return own_gradient + static_cast<u64>(place()) * (BLOCK_Q * HEAD_DIM); };
    if (walk.left > 0) consumer.run(problem, tile.key, walk, sums);
#endif
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

// Clears what dQ takes as dS of keys that do not see a query tile, and what sums are cleared with.
DEVICE void clear_nothing(const Memory& memory) {
  for (u32 place = threadIdx.x * 16; place < NOTHING_BYTES; place += THREADS * 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(memory.nothing() + place), "r"(0) : "memory");
  }
  if constexpr (NOTHING_BYTES > 0) fence_shared_for_async();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value, const __grid_constant__ TensorMap cotangent, float* rows,
#if ALIBI
                const float* slopes,
#endif
                float* query_sums, const int* schedule,
#if LISTS
                const int* offsets, const int2* entries, const u32* bits,
#endif
                char* key_gradient, char* value_gradient, int heads, int heads_per_key, int queries, int keys, int columns,
                int key_planes, int cleared, int scale_bits, int scale_log2_bits, int into_cap_bits,
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
    store_word(memory.begun_plane(), 0), store_word(memory.cleared_planes(), cleared);
  }
  clear_nothing(memory);
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    const int warp = same_in_warp(threadIdx.x / 32);  // branches on threads instead would spill registers of the consumers
    if (warp == 0) {
      if (threadIdx.x == 0) {
        produce(memory, problem, Schedule(schedule, problem), {query, key, value, cotangent}, rows, lists);
      }
#if CLEARS
    } else if (warp == 1) {
      if (threadIdx.x == 32) clear_sums(memory, problem, {query_sums, reinterpret_cast<u32*>(rows), key_planes, cleared});
#endif
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(memory, problem, Schedule(schedule, problem), query_sums, key_gradient, value_gradient);
  }
}
