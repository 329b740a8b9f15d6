// The sums of dQ, cleared by a thread of the producer's warpgroup ahead of the key tiles that add to them (CLEARS), beside the block's
// products; backward_rows.cu clears those of the first planes. A block takes query tiles from a counter, and then finishes them: none
// waits for what a block has not begun, so that blocks need not all run at the same time.

// Counters, words of the row numbers of a key plane's first query tile that are otherwise unused and which backward_rows.cu zeroes.
enum Counter {
  CLEARED = 1,  // runs of query tiles of the plane that are cleared
  TAKEN = 2,    // of plane 0: runs taken to be cleared; can exceed their number
};
constexpr int ALL_BEGUN = 1 << 30;  // in place of the plane of a block's key tile: there are no more key tiles

struct Sums {
  float* sums;
  u32* rows;
  int planes, cleared;  // key planes; how many of them backward_rows.cu clears, and how many a block clears ahead of its key tile

  DEVICE static int tiles(const Problem& problem) { return problem.heads_per_key * problem.query_tiles(); }
  DEVICE u32* counter(const Problem& problem, int plane, Counter which) const {
    return rows + static_cast<u64>(plane) * tiles(problem) * (ROWS_BYTES / 4) + REBASE / 4 + which;
  }
};

// ---- instructions ------------------------------------------------------------------------------------------------

DEVICE u32 load_relaxed(const u32* place) {
  u32 word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(place) : "memory");
  return word;
}
DEVICE u32 load_acquire(const u32* place) {
  u32 word;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(place) : "memory");
  return word;
}
DEVICE u32 take(u32* counter) {
  u32 word;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(word) : "l"(counter) : "memory");
  return word;
}
DEVICE void add(u32* counter, u32 count) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(count) : "memory");
}
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Orders bulk copies to device memory that are complete before later accesses.
DEVICE void fence_device_for_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
DEVICE void clear_bytes(void* place, u32 zeros, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(place), "r"(zeros), "r"(bytes) : "memory");
}
DEVICE void await_cleared_bytes() { asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group 0;" ::: "memory"); }
DEVICE u32 load_shared_acquire(u32 address) {
  u32 word;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
DEVICE void store_shared_release(u32 address, u32 word) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
DEVICE void back_off() { asm volatile("nanosleep.u32 500;" ::: "memory"); }

// ---- the producer's part -----------------------------------------------------------------------------------------

// Tells the clearing thread the plane of the key tile that the block begins, or ALL_BEGUN.
DEVICE void publish_plane(const Memory& memory, int plane) {
  if constexpr (CLEARS) store_shared_release(memory.begun_plane(), plane);
}
// Waits until the sums of a key plane are cleared.
DEVICE void await_cleared(const Memory& memory, int plane) {
  if constexpr (CLEARS) {
    while (load_shared_acquire(memory.cleared_planes()) <= plane) {
    }
  }
}

#if CLEARS

// ---- clearing ----------------------------------------------------------------------------------------------------

constexpr u32 SUMS_BYTES = BLOCK_Q * HEAD_DIM * 4;  // of a query tile
static_assert(SUMS_BYTES % NOTHING_BYTES == 0);
constexpr int RUN = 4;  // query tiles taken at a time: a device-wide fence takes as long as several steps of the consumers

// Clears sums of later key planes than that of the block's key tile, RUN query tiles at a time, and tells the producer how many planes
// are cleared; a single thread.
DEVICE void clear_sums(const Memory& memory, const Problem& problem, const Sums& sums) {
  const int tiles = Sums::tiles(problem), runs = (tiles + RUN - 1) / RUN;
  int taken = sums.cleared * runs;
#pragma unroll 1
  while (true) {
    const int begun = load_shared_acquire(memory.begun_plane()), ready = load_word(memory.cleared_planes());
    if (taken < min(begun + sums.cleared, sums.planes) * runs) {
      const int run = sums.cleared * runs + take(sums.counter(problem, 0, TAKEN)), plane = run / runs;
      taken = run + 1;
      if (plane >= sums.planes) continue;
      const int first = run % runs * RUN;
      char* place = reinterpret_cast<char*>(sums.sums) + (static_cast<u64>(plane) * tiles + first) * SUMS_BYTES;
#pragma unroll 1
      for (u32 left = min(RUN, tiles - first) * SUMS_BYTES; left > 0; left -= NOTHING_BYTES, place += NOTHING_BYTES) {
        clear_bytes(place, memory.nothing(), NOTHING_BYTES);
      }
      await_cleared_bytes();
      fence_device_for_async();
      fence_device();
      add(sums.counter(problem, plane, CLEARED), 1);
    } else if (begun == ALL_BEGUN) {
      return;
    } else if (ready < sums.planes && load_relaxed(sums.counter(problem, ready, CLEARED)) == runs) {
      load_acquire(sums.counter(problem, ready, CLEARED));
      store_shared_release(memory.cleared_planes(), ready + 1);
    } else {
      back_off();
    }
  }
}

#endif
