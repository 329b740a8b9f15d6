// Shadow memory: for each granule who wrote and read it last, and in which epoch; findings are accesses without order.
//
// Two accesses of different threads to one granule, one of them a write, are ordered when a barrier that covers the
// address space stands between them: one of the threadgroup, or, within a simdgroup, one of its own.
#pragma once
#include "state.hpp"

namespace {
inline bool ordered(uint32_t g, uint32_t e0, uint32_t e1, int sgw, int sp) {  // is that access before ours?
  return g != group_serial
             ? sp == 0 /*threadgroup memory of an older group*/
             : (e0 < epochs[sp] || (sgw == current->simdgroup && e1 < simdgroups[current->simdgroup].e[sp]));
}
void mark(Cell& c, int sp, bool w, bool at, void* pc, const char* name, long idx) {
  if (sp == 0 && c.write_group != group_serial && c.read_group != group_serial)
    c = Cell{};  // a new threadgroup: memory is undefined again
  if (!w && !at && !c.init) report(2, pc, "%s[%s%ld] read before it is written", name, sp ? "" : "byte ", idx);
  int t = current->tid;
  auto who = [&](uint16_t x) { return (int)x; };
  if (c.write_group && !(at && c.atomic_write)) {
    bool same = c.write_group == group_serial && c.writer == t;
    if (!same && !ordered(c.write_group, c.write_epoch, c.write_own_epoch, c.writer / 32, sp))
      report(0, pc, "%s[%s%ld] %s while thread %d%s wrote it with no barrier between", name, sp ? "" : "byte ", idx,
             w ? "written" : "read", who(c.writer), c.write_group == group_serial ? "" : " of another threadgroup");
  }
  if (w) {
    if (c.read_group && !(at && c.atomic_read)) {
      bool bad;
      if (c.read_group != group_serial)
        bad = sp == 1;
      else if (c.read_epoch < epochs[sp])
        bad = false;
      else if (c.read_simdgroups & ~(1u << current->simdgroup))
        bad = true;
      else
        bad = c.read_own_epoch >= simdgroups[current->simdgroup].e[sp] && (c.several_readers || c.reader != t);
      if (bad)
        report(0, pc, "%s[%s%ld] written while thread %d%s read it with no barrier between", name, sp ? "" : "byte ",
               idx, who(c.reader), c.read_group == group_serial ? "" : " of another threadgroup");
    }
    c.write_group = group_serial;
    c.write_epoch = epochs[sp];
    c.write_own_epoch = simdgroups[current->simdgroup].e[sp];
    c.writer = t;
    c.init = 1;
    c.atomic_write = at;
  } else {
    uint32_t bit = 1u << current->simdgroup;
    if (c.read_group != group_serial || c.read_epoch != epochs[sp]) {
      c.read_simdgroups = 0;
      c.several_readers = 0;
    }
    if (c.read_simdgroups & bit) {
      if (c.read_own_epoch != simdgroups[current->simdgroup].e[sp] && c.read_simdgroups == bit)
        c.several_readers = 0;
      else if (c.reader != t)
        c.several_readers = 1;
    }
    c.read_simdgroups |= bit;
    c.read_group = group_serial;
    c.read_epoch = epochs[sp];
    c.read_own_epoch = simdgroups[current->simdgroup].e[sp];
    c.reader = t;
    c.atomic_read = at;
  }
}
void locate(uintptr_t a, size_t n, bool w, bool at, void* pc) {
  accesses++;
  if (a - (uintptr_t)threadgroup_memory < ARENA_BYTES) {
    size_t o = a - (uintptr_t)threadgroup_memory;
    for (auto& v : arrays)
      if (o >= v.off && o + n <= v.off + v.size) {
        for (size_t g = o / 2; g <= (o + n - 1) / 2; g++)
          mark(threadgroup_cells[g], 0, w, at, pc, v.name.c_str(), (long)(2 * g - v.off));
        return;
      }
    const ThreadgroupArray* b = nullptr;
    long d = 1 << 30;
    for (auto& v : arrays) {
      long q = o < v.off ? v.off - o : o - (v.off + v.size);
      if (q < d) d = q, b = &v;
    }
    report(1, pc, "threadgroup %s (%zu bytes): %s at byte offset %ld", b ? b->name.c_str() : "?", b ? b->size : 0,
           w ? "write" : "read", b ? (long)o - (long)b->off : 0);
    abort_run();
  }
  if (a - (uintptr_t)device_memory < device_bytes) {
    int k = buffer_of_page[(a - (uintptr_t)device_memory) / PAGE];
    if (k >= 0) {
      Buffer& b = buffers[k];
      ptrdiff_t o = a - (uintptr_t)b.p;
      if (o >= 0 && o + n <= b.n) {
        if (w && !b.w) {
          report(6, pc, "write to the input %s", b.name.c_str());
          abort_run();
        }
        (w ? b.nw : b.nr) += n / b.item;
        for (size_t g = o / b.item; g <= (o + n - 1) / b.item; g++)
          mark(b.cell[g], 1, w, at, pc, b.name.c_str(), (long)g);
        return;
      }
      report(1, pc, "%s (%zu elements): %s of element %ld", b.name.c_str(), b.n / b.item, w ? "write" : "read",
             (long)(o / (ptrdiff_t)b.item));
      abort_run();
    }
    Buffer* best = nullptr;
    size_t d = ~0ull;
    for (auto& b : buffers) {
      size_t lo = (uintptr_t)b.p, q = a < lo ? lo - a : a - lo - b.n;
      if (q < d) d = q, best = &b;
    }
    report(1, pc, "%s (%zu elements): %s of element %ld", best->name.c_str(), best->n / best->item,
           w ? "write" : "read", (long)(((ptrdiff_t)a - (ptrdiff_t)best->p) / (ptrdiff_t)best->item));
    abort_run();
  }
  if (a >= image_begin && a < image_end && !w) return;  // program-scope constants
  if (a - (uintptr_t)stacks < fibers.size() * STACK_BYTES) {
    size_t o = ((uintptr_t)stacks + (current->tid + 1) * STACK_BYTES) - a;
    report(6, pc, "%s through a pointer to another thread's private memory", w ? "write" : "read");
    (void)o;
    abort_run();
  }
  report(6, pc, "%s at a wild address %p", w ? "write" : "read", (void*)a);
  abort_run();
}
inline void access(const void* p, size_t n, bool w, void* pc, bool al = false) {
  if (!current) return;
  uintptr_t a = (uintptr_t)p;
  if (a - ((uintptr_t)stacks + current->tid * STACK_BYTES) < STACK_BYTES) return;
  if (al && (a & (n - 1))) report(3, pc, "%zu-byte access at an address that is not a multiple of %zu", n, n);
  locate(a, n, w, false, pc);
}

}  // namespace
