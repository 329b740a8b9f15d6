// A consumer warpgroup's part of the pipeline: its waits, releases and turns, and its work.

// A consumer's position in the rings and in its work item: key tile `n`, counted down to `least()`, the first that it sees.
struct Position {
  const Memory memory;
  const int index;
  Ring keys, values;
  Schedule schedule;
  Work work;
  u32 query = 0;
  int n = 0, first = 0;
  int skips = 0;  // trailing key tiles of the work item, which come first, that are masked for all queries of this consumer

  DEVICE Position(const Memory& memory, int index, const Schedule& schedule)
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
  DEVICE void release_query() const { release(memory.query_empty(work.query_buffer(index))); }
  DEVICE void release_keys() {
    if constexpr (LISTS) __syncwarp();  // every lane has read what masks the tile
    release(memory.key_empty(keys.stage));
    keys.advance();
    if (n == least()) release_query();  // after the last scores
  }
  DEVICE void release_values() {
    release(memory.value_empty(values.stage));
    values.advance();
  }
  DEVICE void wait_turn() const {
    if constexpr (!OVERLAP) named_sync(TURN_BARRIER + index, 2 * WARPGROUP);
  }
  DEVICE void pass_turn() const {
    if constexpr (!OVERLAP) named_arrive(TURN_BARRIER + (index + 1) % CONSUMERS, 2 * WARPGROUP);
  }
  // Skips key tiles that are masked for all queries of this consumer, with a turn for each.
  DEVICE void pass_unseen(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      wait_turn();
      pass_turn();
      await_keys();
      release(memory.key_empty(keys.stage));
      keys.advance();
      await_values();
      release_values();
    }
  }
  // Number of leading key tiles of the work item that are masked for all queries of this consumer.
  DEVICE int earlier() const { return least() - work.first; }

  // Starts the next work item once its queries are loaded; returns false at the end of the list.
  DEVICE bool next_work(const Problem& problem) {
    if (!schedule.next(work)) return false;
    const int buffer = work.query_buffer(index);
    barrier_wait(memory.query_full(buffer), work.query_parity());
    query = memory.query(buffer);
    asm volatile("" : "+r"(query));  // opaque, so that with a single buffer derived values do not stay in vector registers
    const int end = LISTS ? work.end : problem.key_blocks_of_warpgroup(top(), work.first, work.end);
    n = end - 1;
    skips = work.end - 1 - n;
    if constexpr (WINDOW) first = problem.first_block_of_warpgroup(top(), work.first, end);
    return true;
  }
  // First key tile that this consumer sees.
  DEVICE int least() const { return WINDOW ? first : work.first; }
  DEVICE bool sees_nothing() const { return n < work.first; }

  // First row of this consumer, and of this thread.
  DEVICE int top() const { return work.block * BLOCK_M + index * WARPGROUP_ROWS; }
  DEVICE int row() const { return row_of(work.block); }
  DEVICE int row_of(int block) const {
    return block * BLOCK_M + index * WARPGROUP_ROWS + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  // Masks the scores by causality, window and the end of the keys.
  DEVICE void mask_bounds(Scores& scores, const Problem& problem) const {
    const int first_of_all = problem.first_seen_by(top() + WARPGROUP_ROWS - 1);
    if ((n + 1) * BLOCK_N > problem.last_seen_by(top()) || n * BLOCK_N < first_of_all) {
      mask_scores(scores, problem, row(), n * BLOCK_N);
    }
  }
};
