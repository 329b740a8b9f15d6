#include "measure.hpp"

#include <chrono>
#include <vector>

#include "pool.hpp"
#include "vector.hpp"

namespace fatui {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Twelve independent chains: enough to fill two units whose latency is four to six cycles.
float multiply_adds(int64_t steps) {
  Vector x[12];
  FATUI_UNROLL for (int i = 0; i < 12; i++) x[i] = broadcast(0.1f * float(i));
  Vector a = broadcast(0.999f), b = broadcast(0.001f);
  for (int64_t n = 0; n < steps; n++) {
    FATUI_UNROLL for (int i = 0; i < 12; i++) x[i] = x[i] * a + b;
#if defined(__x86_64__)
    asm volatile("" : "+x"(a));
#endif
  }
  Vector total{};
  FATUI_UNROLL for (int i = 0; i < 12; i++) total += x[i];
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

double fma_peak() {
  const int threads = thread_count();
  const int64_t steps = 400000;
  std::vector<float> sink(threads * 16);
  const double start = seconds();
  parallel_for(threads, threads, [&](int64_t i) { sink[i * 16] = multiply_adds(steps); });
  return 2.0 * 12 * lanes * double(steps) * threads / (seconds() - start);
}

double read_bandwidth(int64_t bytes) {
  const int threads = thread_count();
  const int64_t pieces = threads * 8, count = bytes / 4 / pieces;
  static std::vector<float> data;
  if (int64_t(data.size()) < count * pieces) data.assign(count * pieces, 1.0f);
  std::vector<float> sink(pieces);
  const double start = seconds();
  parallel_for(pieces, threads, [&](int64_t i) { sink[i] = sum_of(read_all(data.data() + i * count, count)); });
  return double(count * pieces * 4) / (seconds() - start);
}

}  // namespace fatui
