// Fibers: who runs next, and where the lanes of a simdgroup or the threads of a group wait for each other.
//
// Lanes of the running simdgroup come first, then the next thread in either direction: the two schedules. Where nobody
// can run, some threads wait at a barrier that others never reach, and that is a finding.
#pragma once
#include "state.hpp"

namespace {
void switch_to_next() {  // give the processor to another fiber; returns when this one runs again
  Fiber* me = current;
  int n = threads, s = me->tid;
  int base = me->simdgroup * 32, m = simdgroups[me->simdgroup].n;  // prefer lanes of the same simdgroup
  for (int i = 1; i < m; i++) {
    Fiber& f = fibers[base + (s - base + i) % m];
    if (f.state == RUN) {
      current = &f;
      switches++;
      msl_switch(&me->sp, f.sp);
      return;
    }
  }
  for (int i = 1; i <= n; i++) {
    Fiber& f = fibers[reversed_order ? (s - i + 2 * n) % n : (s + i) % n];
    if (f.state == RUN) {
      if (&f == me) return;
      current = &f;
      switches++;
      msl_switch(&me->sp, f.sp);
      return;
    }
  }
  // nobody can run: a barrier or a simdgroup operation that not all threads reach
  std::string d;
  for (int i = 0, j; i < n; i = j) {
    for (j = i + 1; j < n && fibers[j].state == fibers[i].state && fibers[j].line == fibers[i].line; j++) {
    }
    d += " threads " + std::to_string(i) + ".." + std::to_string(j - 1) +
         (fibers[i].state == DONE
              ? " ended"
              : (fibers[i].state == AT_BARRIER ? " at the barrier of line " : " at the simd operation of line ") +
                    std::to_string(fibers[i].line)) +
         ";";
    if (d.size() > 300) break;
  }
  report(4, nullptr, "threads never meet:%s", d.c_str());
  abort_run();
}
void trampoline() {
  entry(entry_buffers, &current->at);
  current->state = DONE;
  ended_threads++;
  simdgroups[current->simdgroup].done++;
  Simdgroup& g = simdgroups[current->simdgroup];
  if (g.arrived) {
    report(4, nullptr, "a thread ended while others of its simdgroup wait at line %d", current->line);
    abort_run();
  }
  if (ended_threads == threads) {
    void* d;
    current = nullptr;
    msl_switch(&d, main_sp);
  }
  switch_to_next();
  __builtin_unreachable();
}
int meet(int op, int line) {  // rendezvous of one simdgroup; returns the generation's parity
  Simdgroup& g = simdgroups[current->simdgroup];
  current->op = op;
  current->line = line;
  if (g.done) {
    report(4, nullptr, "simdgroup operation at line %d after a thread of the simdgroup ended", line);
    abort_run();
  }
  int par = g.gen & 1;
  int b = current->simdgroup * 32;
  if (++g.arrived == g.n) {
    for (int i = 0; i < g.n; i++) {
      Fiber& f = fibers[b + i];
      if (f.op != op || f.line != line) {
        report(4, nullptr, "lanes of one simdgroup meet at different operations: lines %d and %d", f.line, line);
        abort_run();
      }
      f.state = RUN;
    }
    g.arrived = 0;
    g.gen++;
  } else {
    current->state = AT_SIMDGROUP;
    switch_to_next();
  }
  return par;
}
}  // namespace
