#include "measure.hpp"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

namespace fatui {
namespace {

// POSIX's clock: the header of C++'s takes longer to compile than this file.
double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// A barrier of all threads: no work item ends before all have begun, so that each thread takes exactly one.
class Meeting {
 public:
  explicit Meeting(int threads) : missing_(threads) {}
  void arrive() { missing_.fetch_sub(1); }
  bool complete() const { return missing_.load() <= 0; }
  void wait() const { while (!complete()) sched_yield(); }

 private:
  std::atomic<int> missing_;
};

// Independent chains: enough to fill the units, two to four of them with a latency of four cycles.
constexpr int chains = registers == 32 ? 16 : 12;

float multiply_adds(int64_t steps) {
  static volatile float factor = 0.999f;  // volatile, so that the compiler cannot fold the chain
  const Vector a = broadcast(factor), b = 1.0f - a;
  Vector x[chains];
  FATUI_UNROLL for (int i = 0; i < chains; i++) x[i] = broadcast(factor * float(i));
  for (int64_t n = 0; n < steps; n++) FATUI_UNROLL for (int i = 0; i < chains; i++) x[i] = x[i] * a + b;
  Vector total{};
  FATUI_UNROLL for (int i = 0; i < chains; i++) total += x[i];
  return sum_of(total);
}

Vector read_all(const float* data, int64_t count) {
  Vector x[8] = {};
  for (int64_t i = 0; i + 8 * lanes <= count; i += 8 * lanes)
    FATUI_UNROLL for (int v = 0; v < 8; v++) x[v] += load(data + i + v * lanes);
  FATUI_UNROLL for (int v = 1; v < 8; v++) x[0] += x[v];
  return x[0];
}
}  // namespace

// Best of several short runs of each thread while all others run too, so that a brief preemption does not count.
double fma_peak() {
  constexpr int runs = 8;
  constexpr int64_t steps = 400000;
  // At most one thread per CPU, and only threads that were created, because all of them meet at the barrier.
  const int threads = threads_granted(std::min(thread_count(), processor_count()));
  std::vector<double> fastest(threads, 1e9);
  std::vector<float> sink(threads);
  Meeting begun(threads), measured(threads);
  parallel_for(threads, threads, [&](int64_t i) {
    begun.arrive(), begun.wait();
    for (int run = 0; run < runs; run++) {
      const double start = seconds();
      sink[i] += multiply_adds(steps);
      fastest[i] = std::min(fastest[i], seconds() - start);
    }
    for (measured.arrive(); !measured.complete();) sink[i] += multiply_adds(steps / 16);
  });
  double sum = 0;
  for (const double time : fastest) sum += 2.0 * chains * lanes * double(steps) / time;
  return sum;
}

double read_bandwidth(Memory a, Memory b) {
  constexpr int64_t piece = 64 << 10;  // floats
  struct Piece {
    const float* data;
    int64_t count;
  };
  std::vector<Piece> pieces;
  for (const Memory& m : {a, b})
    for (int64_t i = 0, count = m.bytes / 4; i < count; i += piece)
      pieces.push_back({static_cast<const float*>(m.data) + i, std::min(piece, count - i)});
  std::vector<float> sink(pieces.size());
  const double start = seconds();
  parallel_for(int64_t(pieces.size()), thread_count(),
               [&](int64_t i) { sink[i] = sum_of(read_all(pieces[i].data, pieces[i].count)); });
  return double(a.bytes + b.bytes) / (seconds() - start);
}

}  // namespace fatui
