// The threads of the threadgroup that runs now, and the time that their accesses are stamped with.
//
// One thread of the GPU is one fiber; all fibers share one thread of the CPU and give way only where they wait for each
// other. So every run of a kernel is the same, and a race is found because nothing orders two accesses, not by luck.
#pragma once
#include <sys/mman.h>
#include <string>
#include <vector>
#include "fiber.hpp"
#include "findings.hpp"
#include "gpu.h"

constexpr size_t STACK_BYTES = 256 << 10;
constexpr int MOST_THREADS = 1024;

// Counts barriers. What happened before a barrier has an earlier time than what happens after it.
using Time = uint32_t;

// The memories that a barrier may order; an index of `ordered`.
enum class Space { threadgroup, device };
constexpr int SPACES = 2;

enum class State : uint8_t { runs, meets_its_simdgroup, waits_at_barrier, ended };

struct Thread {
  void* stack_pointer;
  unsigned char* stack;
  int index, simdgroup, lane;
  State state;
  int waits_for;  // what it has come to: flags of a barrier, or gpu::Together
  int line;       // and where
  gpu::Attributes attributes;
};

// Operands and result of a product of 8 x 8 matrices, row by row.
struct Product {
  float a[64], b[64], sum[64];
};

struct Simdgroup {
  int lanes, waiting = 0, ended = 0;
  Time ordered[SPACES] = {};  // when its last barrier was that ordered a memory: one of its own or of the threadgroup
  // Meetings alternate between two places for what is told: a lane may be at the next one while others still read.
  uint32_t meetings = 0;
  unsigned char told[2][gpu::SIMD][64];
  Product products[2];
};

struct Threadgroup {
  std::vector<Thread> threads;
  std::vector<Simdgroup> simdgroups;
  int waiting = 0, ended = 0;
  Time began = 0;
  Time ordered[SPACES] = {};  // when its last barrier was that ordered a memory
};

static Threadgroup group;
static Thread* current = nullptr;
static Time now = 0;
static Findings findings;
static void* launcher = nullptr;    // where the launch itself stands while threads run
static bool is_abandoned = false;   // whether a finding made it pointless to go on
static bool is_reversed = false;    // the schedule: threads in order, or reversed

inline Simdgroup& own_simdgroup() { return group.simdgroups[current->simdgroup]; }

// Adds a finding of the current thread, if one runs.
inline void report(Kind kind, const void* place, const std::string& sentence) {
  std::string thread;
  if (current) {
    const gpu::Position& at = current->attributes.threadgroup_position_in_grid;
    thread = formatted("threadgroup=(%u,%u,%u) thread=%d simdgroup=%d lane=%d", at.x, at.y, at.z, current->index,
                       current->simdgroup, current->lane);
  }
  findings.add(kind, place, sentence, thread);
}

// Goes back to the launch for good. Kernels hold nothing that would have to be given back.
[[noreturn]] inline void abandon() {
  is_abandoned = true;
  void* never_used_again;
  fiber_switch(&never_used_again, launcher);
  __builtin_unreachable();
}

// Stacks for as many threads as a threadgroup may have, kept from launch to launch.
inline unsigned char* stack_of(int thread) {
  static unsigned char* const all = static_cast<unsigned char*>(mmap(nullptr, MOST_THREADS * STACK_BYTES,
      PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return all + size_t(thread) * STACK_BYTES;
}
