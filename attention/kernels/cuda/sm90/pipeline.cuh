// Pipeline of the Hopper forward kernel: schedule, rings of buffers, and the producer warpgroup, which only issues copies.
//
//   producer        Q, and K V K V ...   through rings of buffers, a "full" and an "empty" mbarrier for each buffer
//   consumer 0      64 queries    \  of the same BLOCK_M queries: all consumers use every K and V tile
//   consumer 1, 2   64 queries    /
//
// With LISTS, a work item's key tiles are entries of a block list instead of a range: the producer reads the entries and, with
// each K tile, leaves what the consumers need to mask it, so that these read nothing from device memory.
//
// Shared memory:  | barriers: 1 KiB | Q: QUERY_STAGES x consumers | K: STAGES tiles | V: STAGES tiles | bits: STAGES |

constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
// A block starts with 255 registers per thread with one consumer, 168 with two, 128 with three; the consumers can allocate
// only the registers that the producer releases.
constexpr int START_REGISTERS = CONSUMERS == 1 ? 255 : CONSUMERS == 2 ? 168 : 128;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 24;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 240;
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= (CONSUMERS + 1) * START_REGISTERS);
constexpr int TURN_BARRIER = 1;  // first named barrier, one per consumer
constexpr int BITS_BYTES = BLOCK_M * BLOCK_N / 8;  // visible pairs of a partially masked tile, with LISTS

// Shared-memory layout: barriers in the first KiB, then the tiles.
struct Memory {
  u32 base;
  DEVICE u32 barrier(int index) const { return base + 8 * index; }
  DEVICE u32 query_full(int buffer) const { return barrier(buffer); }
  DEVICE u32 query_empty(int buffer) const { return barrier(QUERY_STAGES * CONSUMERS + buffer); }
  DEVICE u32 key_full(int stage) const { return barrier(2 * QUERY_STAGES * CONSUMERS + stage); }
  DEVICE u32 key_empty(int stage) const { return key_full(STAGES + stage); }
  DEVICE u32 value_full(int stage) const { return key_full(2 * STAGES + stage); }
  DEVICE u32 value_empty(int stage) const { return key_full(3 * STAGES + stage); }
  DEVICE u32 query(int buffer) const { return base + 1024 + buffer * QUERY_BUFFER; }
  DEVICE u32 key(int stage) const { return query(QUERY_STAGES * CONSUMERS) + stage * KeyTile::BYTES; }
  DEVICE u32 value(int stage) const { return key(STAGES) + stage * ValueTile::BUFFER_BYTES; }
  // With LISTS: the key tile in a K buffer, times two, plus one if it is partially masked; and then its bits.
  DEVICE u32 listed(int stage) const { return base + 512 + 4 * stage; }
  DEVICE u32 bits(int stage) const { return value(STAGES) + stage * BITS_BYTES; }
  // With FP8: exponents of the scales of the tiles in the buffers, and a consumer's room for a number of each warp, 16 bytes
  // aligned, before the exponent of its queries.
  DEVICE u32 key_exponent(int stage) const { return base + 512 + 4 * stage; }
  DEVICE u32 value_exponent(int stage) const { return key_exponent(STAGES + stage); }
  DEVICE u32 exchange(int consumer) const { return base + 768 + 32 * consumer; }
  DEVICE u32 query_exponent(int consumer) const { return exchange(consumer) + 4 * CONSUMER_WARPS; }
};
static_assert(8 * (2 * QUERY_STAGES * CONSUMERS + 4 * STAGES) <= 512);

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

// Block lists: (key tile, bits tile or -1 if every pair is visible), and bits [query][key] of the bits tiles.
struct Lists {
  const int2* entries;
  const u32* bits;
};

// With GATHERED: keys and values are in two arrays each, the device's own and those of other devices. `tiles` has for each key
// tile its first row in one of them, plus FAR if it is in the second.
struct Gathered {
  const TensorMap *key, *value;
  const int* tiles;
};
constexpr int FAR = 1 << 30;

// With FP8: exponents of the scales of 128 keys of K and V (in this order).
struct Scales {
  const int2* key;
};

// A unit of work: a query tile against the key tiles, with LISTS the entries, [first, end).
struct Work {
  int block = 0, first = 0, end = 0;
  int index = -1;  // index among the work items of this block

  // Query buffer of a consumer, and the parity of its barriers.
  DEVICE int query_buffer(int consumer) const { return index % QUERY_STAGES * CONSUMERS + consumer; }
  DEVICE u32 query_parity() const { return index / QUERY_STAGES % 2; }
};

// Work items of this block: its row of the host's table (blocks x rounds x 8 integers) of plane, query tile, first, end and
// part; a negative plane ends it.
struct Schedule {
  const int4* entry;

  DEVICE bool next(Work& work) {
    const int4 next = *entry;
    ++work.index;
    if (next.x < 0) return false;
    work.block = next.y, work.first = next.z, work.end = next.w;
    entry += 2;
    return true;
  }
  // Fields of the work item that need not stay in registers: its plane, its query tile, and its part if the keys of the tile
  // are split over several blocks (see sm90/join.cuh), else 0.
  DEVICE int plane() const { return entry[-2].x; }
  DEVICE int block() const { return entry[-2].y; }
  DEVICE int part() const { return entry[-1].x; }
};

// ---- the producer ------------------------------------------------------------------------------------------------

// Loads the queries of a work item, once the buffers are free; with FP8 in 16 bits, of which the consumers make 8.
DEVICE void load_queries(const Memory& memory, const Work& work, const TensorMap& map, int head, int batch) {
  for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
    const int buffer = work.query_buffer(consumer), row = work.block * BLOCK_M + consumer * WARPGROUP_ROWS;
    const u32 full = memory.query_full(buffer);
    barrier_wait(memory.query_empty(buffer), work.query_parity() ^ 1);
#if FP8
    barrier_arrive_expecting(full, WARPGROUP_ROWS * HEAD_DIM * 2);
    for (int column = 0; column < HEAD_DIM; column += 64) {
      load_box(memory.query(buffer) + column * (WARPGROUP_ROWS * 2), map, column, row, head, batch, full);
    }
#else
    load_tile<WARPGROUP_ROWS>(memory.query(buffer), map, head, batch, row, full);
#endif
  }
}

// Loads the K tile of an entry, with its bits.
DEVICE void load_listed_key(const Memory& memory, int stage, const Lists& lists, int2 entry, const TensorMap& map, int head,
                            int batch) {
  const u32 full = memory.key_full(stage);
  const bool partial = entry.y >= 0;
  store_word(memory.listed(stage), 2 * entry.x + partial);
  barrier_arrive_expecting(full, KeyTile::BYTES + (partial ? BITS_BYTES : 0));
  load_tile_expected<BLOCK_N>(memory.key(stage), map, head, batch, entry.x * BLOCK_N, full);
  if (partial) load_bytes(memory.bits(stage), lists.bits + static_cast<u64>(entry.y) * (BITS_BYTES / 4), BITS_BYTES, full);
}

// Loads a V tile.
DEVICE void load_value_tile(u32 tile, const TensorMap& map, int head, int batch, int key, u32 full) {
#if FP8
  barrier_arrive_expecting(full, ValueTile::BYTES);
  load_box(tile, map, key, 0, head, batch, full);
#else
  load_tile<BLOCK_N>(tile, map, head, batch, key, full);
#endif
}

// The producer, a single thread.
DEVICE void produce(const Memory& memory, const Problem& problem, Schedule schedule, const Lists& lists,
                    const TensorMap& query_map, const TensorMap& key_map, const TensorMap& value_map,
                    const Scales& scales = {}, const Gathered& gathered = {}) {
  Ring keys, values;
  Work work;
  while (schedule.next(work)) {
    const int batch = schedule.plane() / problem.heads, head = schedule.plane() % problem.heads;
    const int key_head = head / problem.heads_per_key;
    const int2* key_scales = scales.key + (batch * (problem.heads / problem.heads_per_key) + key_head) * ((problem.keys + 127) / 128);
    if constexpr (LISTS) prefetch(schedule.entry);  // the next work item
    auto load_key = [&](int n) {
      int2 entry;
      if constexpr (LISTS) entry = lists.entries[n];
      int exponent = 0;
      if constexpr (FP8) exponent = key_scales[n * BLOCK_N / 128].x;
      barrier_wait(memory.key_empty(keys.stage), keys.parity ^ 1);
      if constexpr (FP8) store_word(memory.key_exponent(keys.stage), exponent);
      if constexpr (LISTS) load_listed_key(memory, keys.stage, lists, entry, key_map, key_head, batch);
      else if constexpr (GATHERED) {
        const int row = gathered.tiles[n];
        load_tile<BLOCK_N>(memory.key(keys.stage), row & FAR ? *gathered.key : key_map, key_head, batch, row & ~FAR,
                           memory.key_full(keys.stage));
      } else load_tile<BLOCK_N>(memory.key(keys.stage), key_map, key_head, batch, n * BLOCK_N, memory.key_full(keys.stage));
      keys.advance();
    };
    auto load_value = [&](int n) {
      const int tile = LISTS ? lists.entries[n].x : n;
      int exponent = 0;
      if constexpr (FP8) exponent = key_scales[n * BLOCK_N / 128].y;
      barrier_wait(memory.value_empty(values.stage), values.parity ^ 1);
      if constexpr (FP8) store_word(memory.value_exponent(values.stage), exponent);
      const int row = GATHERED ? gathered.tiles[n] : tile * BLOCK_N;
      const bool far = GATHERED && row & FAR;
      load_value_tile(memory.value(values.stage), far ? *gathered.value : value_map, key_head, batch, far ? row & ~FAR : row,
                      memory.value_full(values.stage));
      values.advance();
    };
    const int last = work.end - 1;
    if (last >= work.first) load_key(last);
    load_queries(memory, work, query_map, head, batch);
    for (int n = last - 1; n >= work.first; --n) {  // in the order of the consumers
      if constexpr (OVERLAP) load_key(n), load_value(n + 1);
      else load_value(n + 1), load_key(n);
    }
    if (last >= work.first) load_value(work.first);
  }
}
