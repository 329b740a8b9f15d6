// How tiles travel: the schedule, the rings of buffers, and the warpgroup (the producer) that only copies.
//
//   producer        K V K V ...   through rings of STAGES buffers, a "full" and an "empty" mbarrier for each buffer
//   consumer 0      64 queries    \  of the same BLOCK_M queries: all consumers use every K and V tile
//   consumer 1, 2   64 queries    /
//
// Shared memory:  | barriers, maps: 1 KiB | Q of each consumer | K: STAGES tiles | V: STAGES tiles |

constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;
constexpr int MAPS = 3;
constexpr int TURN_BARRIER = 1;  // the named barriers from here on, one for each consumer

// Where things lie in shared memory: barriers and the maps' workshop in the first KiB, then the tiles.
struct Memory {
  u32 base;
  DEVICE u32 barrier(int index) const { return base + 8 * index; }
  DEVICE u32 query_full(int consumer) const { return barrier(consumer); }
  DEVICE u32 query_empty(int consumer) const { return barrier(CONSUMERS + consumer); }
  DEVICE u32 key_full(int stage) const { return barrier(2 * CONSUMERS + stage); }
  DEVICE u32 key_empty(int stage) const { return barrier(2 * CONSUMERS + STAGES + stage); }
  DEVICE u32 value_full(int stage) const { return barrier(2 * CONSUMERS + 2 * STAGES + stage); }
  DEVICE u32 value_empty(int stage) const { return barrier(2 * CONSUMERS + 3 * STAGES + stage); }
  DEVICE u32 maps() const { return base + 512; }
  DEVICE u32 query(int consumer) const { return base + 1024 + consumer * QueryTile::BYTES; }
  DEVICE u32 key(int stage) const { return query(CONSUMERS) + stage * KeyTile::BYTES; }
  DEVICE u32 value(int stage) const { return key(STAGES + stage); }
};

// This block's tiles: its column of the table (rounds x blocks) that the host made, up to the first negative entry.
struct Schedule {
  const int* entry;
  int row_blocks, upcoming, plane = 0, block = 0;
  u32 parity = 1;  // of the query barriers, used once a tile

  DEVICE Schedule(const int* table, const Problem& problem)
      : entry(table + blockIdx.x), row_blocks((problem.queries + BLOCK_M - 1) / BLOCK_M), upcoming(*entry) {}
  DEVICE bool next() {
    const int index = upcoming;
    if (index < 0) return false;
    upcoming = *(entry += gridDim.x);  // read ahead: nobody waits for it
    plane = index / row_blocks, block = index % row_blocks;
    parity ^= 1;
    return true;
  }
};

// ---- the producer ------------------------------------------------------------------------------------------------

// One thread's work: `maps` are the tensor maps of Q, K and V, MAP_BYTES apart.
DEVICE void produce(const Memory& memory, const Problem& problem, Schedule tile, const char* maps) {
  Ring keys, values;
  while (tile.next()) {
    const int key_plane = tile.plane / problem.planes_per_key;
    auto load_key = [&](int n) {
      barrier_wait(memory.key_empty(keys.stage), keys.parity ^ 1);
      load_tile<BLOCK_N>(memory.key(keys.stage), maps + MAP_BYTES, key_plane, n * BLOCK_N, memory.key_full(keys.stage));
      keys.advance();
    };
    auto load_value = [&](int n) {
      barrier_wait(memory.value_empty(values.stage), values.parity ^ 1);
      load_tile<BLOCK_N>(memory.value(values.stage), maps + 2 * MAP_BYTES, key_plane, n * BLOCK_N,
                         memory.value_full(values.stage));
      values.advance();
    };
    const int first = problem.first_key_block(tile.block), last = problem.key_blocks(tile.block) - 1;
    if (last >= 0) load_key(last);
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
      barrier_wait(memory.query_empty(consumer), tile.parity ^ 1);
      load_tile<WARPGROUP_ROWS>(memory.query(consumer), maps, tile.plane,
                                tile.block * BLOCK_M + consumer * WARPGROUP_ROWS, memory.query_full(consumer));
    }
    for (int n = last - 1; n >= first; --n) {  // the order in which consumers ask for them
      if constexpr (OVERLAP) load_key(n), load_value(n + 1);
      else load_value(n + 1), load_key(n);
    }
    if (last >= 0) load_value(first);
  }
}
