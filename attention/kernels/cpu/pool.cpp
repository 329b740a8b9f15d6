#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <pthread.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#include "locks.hpp"

namespace fatui {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Items that a thread has still to take, [begin, end), in one word, so that another thread can take some of them away.
class alignas(64) Range {
 public:
  void set(int64_t begin, int64_t end) { word_.store(word(begin, end), std::memory_order_release); }

  // The first item, or -1.
  int64_t take() {
    for (uint64_t seen = word_.load(std::memory_order_acquire); count(seen) > 0;)
      if (word_.compare_exchange_weak(seen, word(begin(seen) + 1, end(seen)), std::memory_order_acq_rel)) return begin(seen);
    return -1;
  }
  // Moves another thread's items here, where none is left: all of them, or the second half. Returns whether there were any.
  bool take_from(Range& other, bool all) {
    for (uint64_t seen = other.word_.load(std::memory_order_acquire); count(seen) > 0;) {
      const int64_t middle = begin(seen) + (all ? 0 : count(seen) / 2);
      if (!other.word_.compare_exchange_weak(seen, word(begin(seen), middle), std::memory_order_acq_rel)) continue;
      set(middle, end(seen));
      return true;
    }
    return false;
  }
  int64_t left() const { return count(word_.load(std::memory_order_relaxed)); }

 private:
  static uint64_t word(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  static int64_t begin(uint64_t word) { return int64_t(word >> 32); }
  static int64_t end(uint64_t word) { return int64_t(word & 0xffffffff); }
  static int64_t count(uint64_t word) { return end(word) - begin(word); }

  std::atomic<uint64_t> word_{0};
};

// A call opens its work to the helpers and takes items itself; when none is left it closes, and waits only for the helpers that
// had joined. Each thread begins with an equal share of neighbouring items, which read the same memory, in their order, and goes on
// with half of what the thread with most has left, or all of it if that one has not joined yet. The state is one word: generation (upper
// half), open (one bit), helpers inside (the rest).
class Pool {
 public:
  // Creates helpers up to `helpers`. If the system refuses a thread, creation is not retried for a second. Returns the
  // number of helpers available, at most `helpers`.
  int grow(int helpers) {
    if (size_ >= helpers) return helpers;
    Hold one_at_a_time(growing_);
    for (; size_ < helpers && Clock::now() >= try_again_; size_++)
      if (!start_thread(serve, this)) {  // earlier helpers remain usable
        try_again_ = Clock::now() + Clock::microseconds(1'000'000);
        break;
      }
    return std::min<int>(size_, helpers);
  }

  void run(int64_t items, int helpers, const std::function<void(int64_t)>& work, bool brief) {
    Hold one_call_at_a_time(calls_);
    work_ = &work;
    if (int(ranges_.size()) <= helpers) ranges_ = std::vector<Range>(helpers + 1);
    threads_ = helpers + 1;
    for (int i = 0; i < threads_; i++) ranges_[i].set(items * i / threads_, items * (i + 1) / threads_);
    arrived_.store(0, std::memory_order_relaxed);
    open(helpers, !brief || Clock::now() - ended_ < spinning);
    take_items(0);
    state_.fetch_and(~open_bit, std::memory_order_acq_rel);
    await_helpers();
    ended_ = Clock::now();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr auto spinning = Clock::microseconds(30);  // for the next call, and for a helper's last item
  static constexpr uint64_t open_bit = uint64_t(1) << 31, inside_mask = open_bit - 1, one_generation = open_bit << 1;

  void open(int helpers, bool wake) {
    {
      Hold hold(mutex_);
      state_.store(((state_.load(std::memory_order_relaxed) & ~inside_mask) + one_generation) | open_bit,
                   std::memory_order_release);
    }
    if (!wake || sleepers_.load(std::memory_order_seq_cst) == 0) return;
    if (helpers < size_) for (int i = 0; i < helpers; i++) wake_.notify_one();
    else wake_.notify_all();
  }

  void take_items(int thread) {
    try {
      Range& own = ranges_[thread];
      do
        for (int64_t i; (i = own.take()) >= 0;) (*work_)(i);
      while (take_from_others(own));
    } catch (...) {
      Hold hold(mutex_);
      failure_ = std::current_exception();
    }
  }

  bool take_from_others(Range& own) {
    for (;;) {
      const auto most = std::max_element(ranges_.begin(), ranges_.begin() + threads_,
                                         [](const Range& a, const Range& b) { return a.left() < b.left(); });
      if (most->left() <= 0) return false;
      if (own.take_from(*most, most - ranges_.begin() > arrived_.load(std::memory_order_relaxed))) return true;
    }
  }

  bool join(uint64_t& state) {
    while ((state & open_bit) != 0)
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  bool all_left() const { return (state_.load(std::memory_order_seq_cst) & inside_mask) == 0; }

  // Waits for the helpers that are still at an item. One that has lost its CPU to another process is waited for asleep: spinning
  // would take from this thread's share of the CPUs, and thus delay the next call too.
  void await_helpers() {
    for (const auto sleep_at = Clock::now() + spinning; Clock::now() < sleep_at;)
      for (int i = 0; i < 16; i++, pause())
        if (all_left()) return;
    Hold hold(mutex_);
    awaited_.store(true, std::memory_order_seq_cst);
    left_.wait(hold, [&] { return all_left(); });
    awaited_.store(false, std::memory_order_relaxed);
  }

  void leave() {
    state_.fetch_sub(1, std::memory_order_seq_cst);
    if (!awaited_.load(std::memory_order_seq_cst)) return;
    Hold hold(mutex_);
    left_.notify_one();
  }

  // Spins for a few microseconds, so that queued calls find the helper awake, and then sleeps.
  uint64_t await_change(uint64_t seen) {
    const auto generation = [this] { return state_.load(std::memory_order_acquire) / one_generation; };
    const auto sleep_at = Clock::now() + spinning;
    while (Clock::now() < sleep_at)
      for (int i = 0; i < 16; i++, pause())
        if (generation() != seen) return generation();
    Hold hold(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(hold, [&] { return generation() != seen; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    return generation();
  }

  static void* serve(void* pool) noexcept {
    static_cast<Pool*>(pool)->serve();
    return nullptr;
  }

  [[noreturn]] void serve() {
    for (uint64_t seen = 0;;) {
      seen = await_change(seen);
      uint64_t state = state_.load(std::memory_order_acquire);
      if (!join(state)) continue;
      if (const int thread = 1 + arrived_.fetch_add(1, std::memory_order_relaxed); thread < threads_) take_items(thread);
      leave();
    }
  }

  Mutex calls_, mutex_, growing_;
  std::atomic<int> size_{0};
  int64_t try_again_ = 0;
  Condition wake_, left_;
  std::atomic<bool> awaited_{false};  // whether the caller sleeps until all helpers have left
  std::atomic<uint64_t> state_{0};
  std::atomic<int> arrived_{0};  // helpers that have joined the call
  std::vector<Range> ranges_;
  std::atomic<int> sleepers_{0};
  const std::function<void(int64_t)>* work_ = nullptr;
  int threads_ = 0;  // of the call
  int64_t ended_ = -Clock::microseconds(1'000'000);  // end of the previous call
  std::exception_ptr failure_;
};

Pool* pool = nullptr;  // never destroyed: its threads may outlive everything else
alignas(Mutex) unsigned char guard_memory[sizeof(Mutex)];
Mutex& guard() { return *reinterpret_cast<Mutex*>(guard_memory); }

// After a fork the threads do not exist: the child discards the pool and creates its own.
void forget() {
  pool = nullptr;
  new (guard_memory) Mutex;
}

const bool prepared = [] {
  forget();
  pthread_atfork(nullptr, nullptr, forget);
  return true;
}();

Pool& the_pool() {
  Hold hold(guard());
  if (pool == nullptr) pool = new Pool;
  return *pool;
}

struct Aligned {
  void* data = nullptr;
  size_t bytes = 0;
  ~Aligned() { std::free(data); }
};
}  // namespace

static std::atomic<int> most_threads{0};

void limit_threads(int most) { most_threads = most; }

// Each call asks this. For the number of all CPUs the C library opens and reads a file, which takes 20 us.
static int affinity() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return int(sysconf(_SC_NPROCESSORS_ONLN));
}

int processor_count() {
  int count = affinity();
  if (const int most = most_threads; most > 0) count = std::min(count, most);
  return std::max(1, count);
}

int thread_count() {
  if (const char* wish = std::getenv("FATUI_THREADS"))
    if (const int count = std::atoi(wish); count > 0) return std::min(count, 1024);
  return processor_count();
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = std::max<int64_t>(0, sysconf(_SC_LEVEL2_CACHE_SIZE));
  return bytes;
#else
  return 0;
#endif
}

int threads_granted(int threads) { return threads > 1 ? 1 + the_pool().grow(threads - 1) : 1; }

void parallel_for(int64_t items, int threads, const std::function<void(int64_t)>& work, bool brief) {
  if (const int wanted = int(std::min<int64_t>(items, threads)) - 1; wanted > 0)
    if (const int helpers = the_pool().grow(wanted); helpers > 0)
      return the_pool().run(items, helpers, work, brief);
  for (int64_t i = 0; i < items; i++) work(i);
}

float* scratch(size_t bytes) {
  static thread_local Aligned memory;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.bytes = 0;
    memory.data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory.data == nullptr)
      throw std::runtime_error("[flash_attention] no memory for " + std::to_string(bytes) + " bytes of tiles.");
    memory.bytes = bytes;
  }
  return static_cast<float*>(memory.data);
}

}  // namespace fatui
