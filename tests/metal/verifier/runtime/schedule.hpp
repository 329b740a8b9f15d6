// Fibers: who runs next, and where the lanes of a simdgroup or the threads of a group wait for each other.
//
// Lanes of the running simdgroup come first, then the next thread in either direction: the two schedules. Where nobody
// can run, some threads wait at a barrier that others never reach, and that is a finding.
#pragma once
#include "state.hpp"

namespace {
void pick() {  // give the processor to another fiber; returns when this one runs again
  Fiber* me = cur;
  int n = nthr, s = me->tid;
  int base = me->sg * 32, m = S[me->sg].n;  // prefer lanes of the same simdgroup
  for (int i = 1; i < m; i++) {
    Fiber& f = F[base + (s - base + i) % m];
    if (f.st == RUN) {
      cur = &f;
      n_sw++;
      msl_switch(&me->sp, f.sp);
      return;
    }
  }
  for (int i = 1; i <= n; i++) {
    Fiber& f = F[sched_mode ? (s - i + 2 * n) % n : (s + i) % n];
    if (f.st == RUN) {
      if (&f == me) return;
      cur = &f;
      n_sw++;
      msl_switch(&me->sp, f.sp);
      return;
    }
  }
  // nobody can run: a barrier or a simdgroup operation that not all threads reach
  std::string d;
  for (int i = 0, j; i < n; i = j) {
    for (j = i + 1; j < n && F[j].st == F[i].st && F[j].line == F[i].line; j++) {
    }
    d += " threads " + std::to_string(i) + ".." + std::to_string(j - 1) +
         (F[i].st == DONE ? " ended"
                          : (F[i].st == WAIT_TG ? " at the barrier of line " : " at the simd operation of line ") +
                                std::to_string(F[i].line)) +
         ";";
    if (d.size() > 300) break;
  }
  report(4, nullptr, "threads never meet:%s", d.c_str());
  abort_run();
}
void trampoline() {
  entry(eb, &cur->at);
  cur->st = DONE;
  n_done++;
  S[cur->sg].done++;
  Sg& g = S[cur->sg];
  if (g.arrived) {
    report(4, nullptr, "a thread ended while others of its simdgroup wait at line %d", cur->line);
    abort_run();
  }
  if (n_done == nthr) {
    void* d;
    cur = nullptr;
    msl_switch(&d, main_sp);
  }
  pick();
  __builtin_unreachable();
}
int lockstep(int op, int line) {  // rendezvous of one simdgroup; returns the generation's parity
  Sg& g = S[cur->sg];
  cur->op = op;
  cur->line = line;
  if (g.done) {
    report(4, nullptr, "simdgroup operation at line %d after a thread of the simdgroup ended", line);
    abort_run();
  }
  int par = g.gen & 1;
  int b = cur->sg * 32;
  if (++g.arrived == g.n) {
    for (int i = 0; i < g.n; i++) {
      Fiber& f = F[b + i];
      if (f.op != op || f.line != line) {
        report(4, nullptr, "lanes of one simdgroup meet at different operations: lines %d and %d", f.line, line);
        abort_run();
      }
      f.st = RUN;
    }
    g.arrived = 0;
    g.gen++;
  } else {
    cur->st = WAIT_SG;
    pick();
  }
  return par;
}
}  // namespace
