// Who runs next, and where threads wait for each other.
//
// Lanes of the running simdgroup come first, then the threads that follow: in order, or in the reversed schedule from
// the last to the first. Where nobody can run, some threads wait for others that never come, and that is a finding.
#pragma once
#include "threads.hpp"

// The first thread that can run, after the current one; null if none can.
inline Thread* next_to_run() {
  const int lanes = own_simdgroup().lanes, first = current->index - current->lane;
  for (int i = 1; i < lanes; i++) {
    const int lane = (current->lane + (is_reversed ? lanes - i : i)) % lanes;
    Thread& thread = group.threads[first + lane];
    if (thread.state == State::runs) return &thread;
  }
  const int count = int(group.threads.size());
  for (int i = 1; i <= count; i++) {
    Thread& thread = group.threads[(current->index + (is_reversed ? count - i : i)) % count];
    if (thread.state == State::runs) return &thread;
  }
  return nullptr;
}

// "threads 0..31 ended; threads 32..63 at the barrier of line 9", the first few.
inline std::string whereabouts() {
  std::string told;
  const std::vector<Thread>& threads = group.threads;
  for (size_t i = 0, next; i < threads.size() && told.size() < 300; i = next) {
    const auto is_alike = [&](const Thread& other) {
      return other.state == threads[i].state && other.line == threads[i].line;
    };
    for (next = i + 1; next < threads.size() && is_alike(threads[next]); next++) {
    }
    told += formatted("%s threads %zu..%zu ", told.empty() ? "" : ";", i, next - 1);
    told += threads[i].state == State::ended              ? "ended"
            : threads[i].state == State::waits_at_barrier ? formatted("at the barrier of line %d", threads[i].line)
                                                          : formatted("at the operation of line %d", threads[i].line);
  }
  return told;
}

// Lets others run until somebody sets the current thread's state to `runs`.
inline void wait() {
  Thread* const self = current;
  Thread* const next = next_to_run();
  if (!next) {
    report(Kind::divergence, nullptr, "threads never meet:" + whereabouts());
    abandon();
  }
  if (next == self) return;
  current = next;
  fiber_switch(&self->stack_pointer, next->stack_pointer);
}

// Finds fault with threads that have not all come to the same operation in the same line, and lets them go on.
inline void release(Thread* threads, int count, const char* what) {
  for (int i = 0; i < count; i++) {
    if (threads[i].waits_for != current->waits_for || threads[i].line != current->line) {
      report(Kind::divergence, nullptr, formatted("%s: lines %d and %d", what, threads[i].line, current->line));
      abandon();
    }
    threads[i].state = State::runs;
  }
}

// Waits for all lanes of the simdgroup to come to the same operation; the last to come does what is done `once`.
template <class Once>
void meet_simdgroup(int operation, int line, Once once) {
  Simdgroup& own = own_simdgroup();
  current->waits_for = operation;
  current->line = line;
  if (own.ended) {
    report(Kind::divergence, nullptr, formatted("operation of a simdgroup at line %d, after a lane has ended", line));
    abandon();
  }
  if (++own.waiting < own.lanes) {
    current->state = State::meets_its_simdgroup;
    wait();
    return;
  }
  Thread* const first = &group.threads[current->simdgroup * gpu::SIMD];
  release(first, own.lanes, "lanes of a simdgroup meet at different operations");
  own.waiting = 0;
  own.meetings++;
  once();
}

// The same for all threads of the threadgroup.
template <class Once>
void meet_threadgroup(int operation, int line, Once once) {
  current->waits_for = operation;
  current->line = line;
  if (group.ended) {
    report(Kind::divergence, nullptr, formatted("threadgroup_barrier at line %d, after a thread has ended", line));
    abandon();
  }
  if (++group.waiting < int(group.threads.size())) {
    current->state = State::waits_at_barrier;
    wait();
    return;
  }
  release(group.threads.data(), int(group.threads.size()), "threads meet at different barriers");
  group.waiting = 0;
  once();
}

// The current thread has come to the kernel's end.
[[noreturn]] inline void end_thread() {
  Simdgroup& own = own_simdgroup();
  current->state = State::ended;
  own.ended++;
  group.ended++;
  if (own.waiting) {
    report(Kind::divergence, nullptr, "a lane ended while others wait:" + whereabouts());
    abandon();
  }
  if (group.ended == int(group.threads.size())) {
    void* never_used_again;
    current = nullptr;
    fiber_switch(&never_used_again, launcher);
  }
  wait();
  __builtin_unreachable();
}
