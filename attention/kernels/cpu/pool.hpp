// The kernels' own threads: as many as the process may use, asleep between calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace fatui {

// Processors that the process may run on; threads that a call may use: FATUI_THREADS if set, else as many.
int processor_count();
int thread_count();

// Of so many threads, the caller's among them, those that there are: the system may grant fewer than a call may use.
int threads_granted(int threads);

// Runs work(0) ... work(items - 1), each once, in any order, on up to `threads` threads, the caller's among them. Waking
// a helper takes longer than brief work: that wakes one only where calls follow each other closely, so that it stays.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work, bool brief = false);

// This thread's own scratch memory, 64-byte aligned, at least so many bytes; kept for the next call.
float* scratch(size_t bytes);

}  // namespace fatui
