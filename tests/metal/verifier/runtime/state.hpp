// What the runtime knows while a kernel runs: fibers, simdgroups, memory and its shadow, and what was found.
//
// One GPU thread is one fiber; all fibers of a threadgroup share one host thread, and give way only where they meet
// (barriers, simdgroup operations). So every run is the same, and a race is found by its lack of order, not by luck.
//
//   device memory       buffers, each with wide red zones, one shadow cell an element
//   threadgroup memory  one arena, arrays with wide red zones, one shadow cell for two bytes
//   epochs              counters for each address space: of the threadgroup (its barriers), of each simdgroup (its own)
#pragma once
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <dlfcn.h>
#include <string>
#include <vector>
#include "msl_rt.h"

#define STR2(x) #x
#define STR(x) STR2(x)
#define SYM(x) STR(__USER_LABEL_PREFIX__) #x
extern "C" void msl_switch(void** save_sp, void* to_sp);
#if defined(__x86_64__)
asm(".text\n.globl " SYM(msl_switch) "\n" SYM(msl_switch) ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif defined(__aarch64__)
asm(".text\n.globl " SYM(msl_switch) "\n.p2align 2\n" SYM(msl_switch) ":\n"
    "sub sp,sp,#160\nstp x19,x20,[sp,#0]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp,#0]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\n"
    "ldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\nadd sp,sp,#160\nret\n");
#else
#error "unsupported host"
#endif

namespace {
constexpr size_t STACK_BYTES = 256 << 10, THREADGROUP_LIMIT = 32768, ARENA_BYTES = 4 << 20, PAGE = 4096;
enum State : uint8_t { RUN, AT_SIMDGROUP, AT_BARRIER, DONE };
struct Fiber {
  void* sp;
  int tid, simdgroup, lane;
  State state;
  int op, line;
  msl_attr at;
};
struct Cell {  // shadow of one granule
  uint32_t write_group, write_epoch,
      write_own_epoch;  // last write: threadgroup serial, barrier epoch, simdgroup epoch (write_group==0: none)
  uint32_t read_group, read_epoch, read_own_epoch, read_simdgroups;  // reads of the newest epoch: simdgroups that read
  uint16_t writer, reader;
  uint8_t init, several_readers, atomic_write, atomic_read;
};
struct Simdgroup {
  int n, arrived, done;
  uint32_t gen;
  uint32_t e[2];
  unsigned char slot[2][32][64];
  uint32_t have[2];
  float A[2][64], B[2][64];
};
struct ThreadgroupArray {
  std::string name;
  int line;
  size_t off, size;
  uint32_t g;
};
struct Buffer {
  uint64_t nr = 0, nw = 0;
  std::string name;
  unsigned char* p;
  size_t n, item;
  bool w, atom;
  std::vector<Cell> cell;
};
std::vector<Fiber> fibers;
std::vector<Simdgroup> simdgroups;
std::vector<Buffer> buffers;
std::vector<ThreadgroupArray> arrays;
std::vector<int16_t> buffer_of_page;
unsigned char *stacks, *threadgroup_memory, *device_memory;
size_t device_bytes;
std::vector<Cell> threadgroup_cells;
uintptr_t image_begin, image_end;
Fiber* current;
void* main_sp;
uint32_t group_serial;
uint32_t epochs[2];
size_t threadgroup_used;
int threads, waiting_threads, ended_threads;
int reversed_order;
void (*entry)(void**, const msl_attr*);
void** entry_buffers;
std::string findings;
int findings_count;
uint64_t accesses, switches, products;
std::vector<std::pair<int, void*>> reported;
bool aborting;
const char* kind_names[] = {"race",  "out-of-bounds", "uninitialised read", "misaligned", "divergence",
                            "limit", "wild",          "arithmetic"};

void report(int kind, void* pc, const char* fmt, ...) {
  for (auto& s : reported)
    if (s.first == kind && s.second == pc) return;
  reported.push_back({kind, pc});
  if (++findings_count > 40) return;
  char b[700];
  int k =
      snprintf(b, sizeof b, "%s|%lx|", kind_names[kind], pc ? (unsigned long)((uintptr_t)pc - image_begin - 1) : 0ul);
  va_list ap;
  va_start(ap, fmt);
  k += vsnprintf(b + k, sizeof b - k, fmt, ap);
  va_end(ap);
  if (current)
    snprintf(b + k, sizeof b - k, "|tg=(%u,%u,%u) thread=%d simdgroup=%d lane=%d",
             current->at.threadgroup_position_in_grid.x, current->at.threadgroup_position_in_grid.y,
             current->at.threadgroup_position_in_grid.z, current->tid, current->simdgroup, current->lane);
  findings += b;
  findings += '\n';
}
[[noreturn]] void abort_run() {
  aborting = true;
  void* d;
  msl_switch(&d, main_sp);
  __builtin_unreachable();
}
}  // namespace
