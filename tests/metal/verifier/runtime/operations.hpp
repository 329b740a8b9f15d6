// What a kernel calls: barriers, simdgroup exchanges, 8 x 8 matrix products in Apple's lane layout, threadgroup arrays.
#pragma once
#include "schedule.hpp"
#include "shadow.hpp"

extern "C" {
void rt_tg_barrier(unsigned flags, int line) {
  current->line = line;
  current->op = 1000 + flags;
  if (ended_threads) {
    report(4, nullptr, "threadgroup_barrier at line %d after a thread of the group ended", line);
    abort_run();
  }
  if (++waiting_threads == threads) {
    for (int i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      if (f.line != line || f.op != current->op) {
        report(4, nullptr, "threads meet at different barriers: lines %d and %d", f.line, line);
        abort_run();
      }
      f.state = RUN;
    }
    waiting_threads = 0;
    for (int sp = 0; sp < 2; sp++)
      if (flags & (sp ? 1 : 2)) {
        epochs[sp]++;
        for (auto& g : simdgroups) g.e[sp]++;
      }
  } else {
    current->state = AT_BARRIER;
    switch_to_next();
  }
}
void rt_sg_barrier(unsigned flags, int line) {
  Simdgroup& g = simdgroups[current->simdgroup];
  uint32_t before = g.gen;
  meet(900 + flags, line);
  if (g.gen == before + 1 && (g.have[0] != g.gen)) {
    g.have[0] = g.gen;
    for (int sp = 0; sp < 2; sp++)
      if (flags & (sp ? 1 : 2)) g.e[sp]++;
  }
}
void rt_exchange(const void* in, unsigned n, int op, int line, void* out) {  // out: 32 * n bytes, lane-major
  Simdgroup& g = simdgroups[current->simdgroup];
  memcpy(g.slot[g.gen & 1][current->lane], in, n);
  int par = meet(op, line);
  for (int i = 0; i < g.n; i++) memcpy((char*)out + i * n, g.slot[par][i], n);
  if (g.n < 32) memset((char*)out + g.n * n, 0, (32 - g.n) * n);
}
int rt_lane() {
  return current->lane;
}
int rt_lanes() {
  return simdgroups[current->simdgroup].n;
}
void rt_collective(int line) {
  meet(800, line);
}
// The lane layout of Apple GPUs: which (row, column) of an 8x8 matrix a lane's two elements are.
static inline int lane_row(int l) {
  int q = l / 4;
  return (q & 4) + (l / 2) % 4;
}
static inline int lane_column(int l) {
  int q = l / 4;
  return (q & 2) * 2 + (l % 2) * 2;
}
void rt_mma(const float* a, const float* b, const float* c, float* d, int line) {
  Simdgroup& g = simdgroups[current->simdgroup];
  int l = current->lane, p = g.gen & 1, r = lane_row(l), k = lane_column(l);
  if (g.n != 32) {
    report(4, nullptr, "simdgroup_matrix operation in a partial simdgroup (%d lanes), line %d", g.n, line);
    abort_run();
  }
  g.A[p][r * 8 + k] = a[0];
  g.A[p][r * 8 + k + 1] = a[1];
  g.B[p][r * 8 + k] = b[0];
  g.B[p][r * 8 + k + 1] = b[1];
  products++;
  p = meet(700, line);
  float x = c[0], y = c[1];
  for (int i = 0; i < 8; i++) {
    float av = g.A[p][r * 8 + i];
    x = __builtin_fmaf(av, g.B[p][i * 8 + k], x);
    y = __builtin_fmaf(av, g.B[p][i * 8 + k + 1], y);
  }
  d[0] = x;
  d[1] = y;
}
void* rt_tg_alloc(const char* name, size_t bytes, size_t align, int line) {
  for (auto& v : arrays)
    if (v.line == line && v.name == name) return threadgroup_memory + v.off;
  threadgroup_used = (threadgroup_used + align - 1) / align * align + bytes;
  if (threadgroup_used > THREADGROUP_LIMIT)
    report(5, nullptr, "threadgroup memory %zu bytes > 32768 (at %s)", threadgroup_used, name);
  size_t off = 65536;
  for (auto& v : arrays) off = v.off + v.size + 65536;  // wide red zones
  off = (off + 15) / 16 * 16;
  if (off + bytes + 65536 > ARENA_BYTES) {
    report(5, nullptr, "threadgroup arrays are too large");
    abort_run();
  }
  arrays.push_back({name, line, off, bytes, group_serial});
  memset(threadgroup_memory + off, 0xff, bytes);
  return threadgroup_memory + off;
}
void rt_atomic(const void* p, unsigned n, int w) {
  locate((uintptr_t)p, n, w, true, __builtin_return_address(0));
}
}
