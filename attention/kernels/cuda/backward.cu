// Flash attention, backward, on Hopper. One warpgroup copies, two compute; each of these has 64 of a tile's 128 keys.
//
//                    queries: 64 at a time, of every head that shares the key head
//                  +------+------+------+--
//   128 keys  wg 0 | S^T  |      |      |   64 keys    S^T = K Q^T, P^T = 2^(c S^T - logsumexp)    dV += P^T dO
//             wg 1 |      |      |      |   64 keys    dP^T = V dO^T, dS^T = P^T (dP^T - delta)    dK += dS^T Q
//                  +------+------+------+--
//                     |  dS through shared memory
//                     v
//                    dQ += dS K     64 queries: wg 0 makes the left half of the columns, wg 1 the right half
//
// dK and dV stay in registers; dQ is added up in device memory in float32, in no fixed order: an input that
// backward_rows.cu has cleared, and backward_finish.cu rounds. P^T and dS^T are left operands in the very registers where
// they were made.
//
// Shared memory:  | barriers, maps: 1 KiB | K | V | ring of STAGES: Q, dO | dS, twice | ring: logsumexps, deltas |

constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP, MAPS = 4;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int ROWS_BYTES = 2 * BLOCK_Q * 4;
constexpr int GRADIENT_BYTES = BLOCK_K * BLOCK_Q * 2;
constexpr int BOTH = 1;  // the named barrier of both consumers

struct Memory {
  u32 base;
  DEVICE u32 keys_full() const { return base; }
  DEVICE u32 keys_empty() const { return base + 8; }
  DEVICE u32 full(int stage) const { return base + 16 + 8 * stage; }
  DEVICE u32 empty(int stage) const { return base + 16 + 8 * (STAGES + stage); }
  DEVICE u32 maps() const { return base + 512; }
  DEVICE u32 key() const { return base + 1024; }
  DEVICE u32 value() const { return key() + KeyTile::BYTES; }
  DEVICE u32 query(int stage) const { return value() + KeyTile::BYTES + stage * 2 * QueryTile::BYTES; }
  DEVICE u32 cotangent(int stage) const { return query(stage) + QueryTile::BYTES; }
  DEVICE u32 score_gradient(int buffer) const { return query(STAGES) + buffer * GRADIENT_BYTES; }
  DEVICE u32 rows(int stage) const { return score_gradient(2) + stage * ROWS_BYTES; }
};

// This block's tiles of keys: its column of the table (rounds x blocks) that the host made.
struct Schedule {
  const int* entry;
  int key_tiles, plane = 0, key = 0;
  DEVICE Schedule(const int* table, const Problem& problem)
      : entry(table + blockIdx.x), key_tiles((problem.keys + BLOCK_K - 1) / BLOCK_K) {}
  DEVICE bool next() {
    const int index = *entry;
    if (index < 0) return false;
    entry += gridDim.x;
    plane = index / key_tiles, key = index % key_tiles * BLOCK_K;
    return true;
  }
};

// ---- the producer: one thread ------------------------------------------------------------------------------------

DEVICE void produce(const Memory& memory, const Problem& problem, Schedule tile, const char* maps, const float* rows) {
  Ring ring;
  for (u32 parity = 1; tile.next(); parity ^= 1) {
    barrier_wait(memory.keys_empty(), parity);
    barrier_arrive_expecting(memory.keys_full(), 2 * KeyTile::BYTES);
    load_tile_expected<BLOCK_K>(memory.key(), maps + MAP_BYTES, tile.plane, tile.key, memory.keys_full());
    load_tile_expected<BLOCK_K>(memory.value(), maps + 2 * MAP_BYTES, tile.plane, tile.key, memory.keys_full());
    const int first = problem.first_tile(tile.key), end = problem.end_tile(tile.key);
    for (int member = 0; member < problem.planes_per_key; ++member) {
      const int plane = tile.plane * problem.planes_per_key + member;
      for (int i = 0; i < end - first; ++i) {
        const int t = first + problem.turned(i, tile.key, end - first);
        const u32 full = memory.full(ring.stage);
        barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
        barrier_arrive_expecting(full, 2 * QueryTile::BYTES + ROWS_BYTES);
        load_tile_expected<BLOCK_Q>(memory.query(ring.stage), maps, plane, t * BLOCK_Q, full);
        load_tile_expected<BLOCK_Q>(memory.cotangent(ring.stage), maps + 3 * MAP_BYTES, plane, t * BLOCK_Q, full);
        load_bytes(memory.rows(ring.stage), rows + (static_cast<u64>(plane) * problem.query_tiles() + t) * 2 * BLOCK_Q,
                   ROWS_BYTES, full);
        ring.advance();
      }
    }
  }
}

// ---- a consumer --------------------------------------------------------------------------------------------------

struct Consumer {
  Memory memory;
  int index, buffer = 0;
  Ring ring;

  // One tile of queries: adds to dK and dV, and to dQ in device memory.
  DEVICE void step(const Problem& problem, int key, int plane, int t, Output& key_gradient, Output& value_gradient,
                   float* query_gradient) {
    const int first_key = key + index * WARPGROUP_ROWS, first_query = t * BLOCK_Q;
    const u32 rows = memory.rows(ring.stage), own_rows = index * WARPGROUP_ROWS * 128;
    Scores scores, weight_gradients;
    Operand weights, gradients;
    barrier_wait(memory.full(ring.stage), ring.parity);
    start_scores(scores, memory.key() + own_rows, memory.query(ring.stage));
    start_scores(weight_gradients, memory.value() + own_rows, memory.cotangent(ring.stage));
    wgmma_wait<1>();
    settle(scores);
    weigh(scores, rows, problem, first_key, first_query);
    pack_operand(weights, scores);
    start_gradient(value_gradient, weights, memory.cotangent(ring.stage));
    wgmma_wait<1>();
    settle(weight_gradients);
    differentiate(scores, weight_gradients, rows);
    pack_operand(gradients, scores);
    store_score_gradient(memory.score_gradient(buffer) + own_rows, gradients);
    fence_shared_for_async();
    start_gradient(key_gradient, gradients, memory.query(ring.stage));
    named_sync(BOTH, CONSUMERS * WARPGROUP);  // both halves of dS are there; two buffers, so once a step is enough
    QueryGradient made;
    start_query_gradient(made, memory.score_gradient(buffer), memory.key(), index);
    wgmma_wait<0>();
    settle(value_gradient);
    settle(key_gradient);
    settle(made);
    release(memory.empty(ring.stage));
    ring.advance();
    buffer ^= 1;
    const u64 row = static_cast<u64>(plane) * problem.queries + first_query;
    add_query_gradient(query_gradient + row * problem.columns, made, index, problem.queries - first_query, problem.columns);
  }
};

DEVICE void consume(const Memory& memory, const Problem& problem, Schedule tile, float* query_gradient, char* key_gradient,
                    char* value_gradient) {
  // The shuffle tells the compiler that the number is the same in the whole warp.
  Consumer consumer{memory, __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) - 1};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  for (u32 parity = 0; tile.next(); parity ^= 1) {
    Output for_keys = {}, for_values = {};
    barrier_wait(memory.keys_full(), parity);
    const int first = problem.first_tile(tile.key), end = problem.end_tile(tile.key);
    for (int member = 0; member < problem.planes_per_key; ++member) {
#pragma unroll 1
      for (int i = 0; i < end - first; ++i) {
        const int t = first + problem.turned(i, tile.key, end - first);
        consumer.step(problem, tile.key, tile.plane * problem.planes_per_key + member, t, for_keys, for_values,
                      query_gradient);
      }
    }
    release(memory.keys_empty());
    const int row = tile.key + consumer.index * WARPGROUP_ROWS + warp * 16 + lane / 4;
    const u64 place = (static_cast<u64>(tile.plane) * problem.keys + row) * problem.columns * 2;
    const float factors[2] = {problem.scale, problem.scale};
    scale_output(for_keys, factors);
    store_output(key_gradient + place, for_keys, problem.keys - row, problem.columns);
    store_output(value_gradient + place, for_values, problem.keys - row, problem.columns);
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

DEVICE void init_barriers(const Memory& memory) {
  barrier_init(memory.keys_full(), 1);
  barrier_init(memory.keys_empty(), CONSUMERS * CONSUMER_WARPS);
  for (int i = 0; i < STAGES; ++i) {
    barrier_init(memory.full(i), 1);
    barrier_init(memory.empty(i), CONSUMERS * CONSUMER_WARPS);
  }
  barrier_init_fence();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const char* query, const char* key, const char* value, const char* cotangent, const float* rows,
                float* query_gradient, const int* schedule, char* key_gradient, char* value_gradient, char* scratch,
                int planes, int planes_per_key, int queries, int keys, int columns, int scale_bits, int scale_log2_bits,
                int window) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const Problem problem{planes, planes_per_key, queries, keys, columns, __int_as_float(scale_bits),
                        __int_as_float(scale_log2_bits), window};
  char* maps = scratch + blockIdx.x * (MAPS * MAP_BYTES);

  const int warp = threadIdx.x / 32;
  if (warp < MAPS) {
    const char* base = warp == 0 ? query : warp == 1 ? key : warp == 2 ? value : cotangent;
    const bool of_queries = warp == 0 || warp == 3;
    build_map(memory.maps() + warp * MAP_BYTES, maps + warp * MAP_BYTES, base, columns, of_queries ? queries : keys,
              of_queries ? planes : planes / planes_per_key, of_queries ? BLOCK_Q : BLOCK_K);
  }
  if (threadIdx.x == MAPS * 32) init_barriers(memory);
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, Schedule(schedule, problem), maps, rows);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    consume(memory, problem, Schedule(schedule, problem), query_gradient, key_gradient, value_gradient);
  }
}
