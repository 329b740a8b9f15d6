// Thread pool of the kernels: one thread per CPU of the process, idle between calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fatui {

// CPUs in the affinity of the process, within the limit; maximum threads per call: FATUI_THREADS if set, else that number.
int processor_count();
int thread_count();

// Limits processor_count, as a quota of CPU time does: with more threads than that, all would be stopped for the rest of a period.
// 0: no limit.
void limit_threads(int most);

// Size of a core's L2, or 0 if the system does not say.
int64_t l2_bytes();

// Number of threads available out of `threads`, including the caller's: thread creation may fail.
int threads_granted(int threads);

// Runs work(0) ... work(items - 1), each once, in any order, on up to `threads` threads, including the caller's. Waking a
// helper takes longer than brief work, which therefore wakes helpers only if calls follow each other closely.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work, bool brief = false);

// Scratch memory of this thread, 64-byte aligned, of at least the given size; kept for the next call.
float* scratch(size_t bytes);

}  // namespace fatui
