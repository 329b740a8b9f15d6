// Thread pool of the kernels: one thread per CPU of the process, idle between calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fatui {

// CPUs in the affinity of the process; maximum threads per call: FATUI_THREADS if set, else the number of CPUs.
int processor_count();
int thread_count();

// Number of threads available out of `threads`, including the caller's: thread creation may fail.
int threads_granted(int threads);

// Runs work(0) ... work(items - 1), each once, in any order, on up to `threads` threads, including the caller's. Waking a
// helper takes longer than brief work, which therefore wakes helpers only if calls follow each other closely.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work, bool brief = false);

// Scratch memory of this thread, 64-byte aligned, of at least the given size; kept for the next call.
float* scratch(size_t bytes);

}  // namespace fatui
