// Wrappers of the Hopper instructions used by the kernels, one short function each.

// ---- mbarriers: a phase completes when all arrivals and all expected bytes are complete --------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA; a __syncthreads must follow.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE bool barrier_try_wait(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Waits for the phase of this parity to complete. With SPIN_LIMIT, in cycles, a deadlock ends in a trap.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
#ifdef SPIN_LIMIT
  const long long start = clock64();
  while (!barrier_try_wait(barrier, parity)) {
    if (clock64() - start > SPIN_LIMIT) __trap();
  }
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

// ---- ordinary accesses to shared memory ---------------------------------------------------------------------------

DEVICE void store_word(u32 address, u32 word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory"); }
DEVICE u32 load_word(u32 address) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
DEVICE void load_two(u32* words, u32 address) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
}

// ---- named barriers among whole warps ----------------------------------------------------------------------------

DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- copies ------------------------------------------------------------------------------------------------------

// Tensor map of an array (batch, head, row, column) for TMA; a `const __grid_constant__` parameter of the kernel.
struct alignas(64) TensorMap {
  char bytes[128];
};

// Prefetch a line of device memory, and a tensor map.
DEVICE void prefetch(const void* place) { asm volatile("prefetch.global.L1 [%0];" ::"l"(place) : "memory"); }
DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(&map)) : "memory");
}

// TMA copy of one box from device to shared memory; its bytes complete on `barrier`.
DEVICE void load_box(u32 destination, const TensorMap& map, int column, int row, int head, int batch, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          destination),
      "l"(reinterpret_cast<u64>(&map)), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Orders this thread's generic-proxy accesses to shared memory before later ones by wgmma and TMA.
DEVICE void fence_shared_for_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Bulk copy of `bytes` bytes, a multiple of 16, from device to shared memory; completes on `barrier`.
DEVICE void load_bytes(u32 destination, const void* source, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- warpgroup matrix multiply (wgmma itself is generated: see sm90/forward.py) -----------------------------------------

// Orders this warpgroup's register accesses before the wgmmas that follow.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING wgmma groups are in flight. Accumulators may be read only after `settle`.
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across this point.
template <int COUNT>
DEVICE void settle(float (&accumulators)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// wgmma descriptor of a tile of 128-byte-swizzled rows. `leading_bytes` is unused for tiles whose rows run along the
// contraction (Q, K); for V it is the distance to the next 64 columns.
DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes) {
  constexpr u64 EIGHT_ROWS = 1024, SWIZZLE_128 = 1ull << 62;
  return SWIZZLE_128 | (EIGHT_ROWS >> 4) << 32 | static_cast<u64>(leading_bytes >> 4) << 16 |
         static_cast<u64>((address & 0x3FFFF) >> 4);
}

// Descriptor of the tile that starts `bytes` bytes later.
DEVICE u64 advance(u64 descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
