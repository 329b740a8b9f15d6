// Shadow memory: what is wrong with an access, given what happened to its bytes before.
//
// Two accesses of different threads to a granule, one of them a write, need a barrier between them that orders that
// memory: one of the threadgroup, or, within a simdgroup, one of its own. Threadgroups are never ordered.
#pragma once
#include "memory.hpp"

#define RARE __attribute__((cold, noinline))  // keeps what is seldom run out of what runs at each access

enum class Access { read, write };

// Whether what a thread did at a time is over for certain, as the current thread sees it.
inline bool is_over(Space space, Time when, int thread) {
  if (when < group.ordered[int(space)])  // threadgroup memory of an earlier threadgroup is gone, device memory shared
    return space == Space::threadgroup || when >= group.began;
  return thread == current->index ||
         (thread / gpu::SIMD == current->simdgroup && when < own_simdgroup().ordered[int(space)]);
}

// "q[17]", or of a threadgroup array "tile[byte 34]".
inline std::string element(const Region& region, const Cell& cell) {
  const size_t index = &cell - region.cells.data();
  return region.space == Space::device ? formatted("%s[%zu]", region.name.c_str(), index)
                                       : formatted("%s[byte %zu]", region.name.c_str(), index << region.shift);
}

RARE inline void report_race(const Region& region, const Cell& cell, const char* done, int other, const char* did,
                        bool is_elsewhere, const void* place) {
  const std::string who = other >= 0 ? formatted("thread %d", other) : "other threads";
  report(Kind::race, place,
         formatted("%s %s while %s%s %s it, with no barrier between", element(region, cell).c_str(), done, who.c_str(),
                   is_elsewhere ? " of another threadgroup" : "", did));
}

// Whether somebody else may still be reading.
inline bool is_being_read(Space space, const Cell& cell) {
  if (cell.is_read_elsewhere) return true;
  if (cell.read == 0) return false;
  if (cell.read < group.began) return space == Space::device;
  if (cell.read < group.ordered[int(space)]) return false;
  if (cell.read_by & ~(1u << current->simdgroup)) return true;
  return cell.read >= own_simdgroup().ordered[int(space)] && cell.reader != current->index;
}

inline void remember_read(Space space, Cell& cell, bool is_atomic) {
  const uint32_t own = 1u << current->simdgroup;
  const bool is_known = cell.read == now && cell.reader == SEVERAL && (cell.read_by & own) != 0;
  if (is_known && !cell.are_reads_atomic) return;  // the usual case
  if (cell.read < group.began || cell.read < group.ordered[int(space)]) {
    cell.is_read_elsewhere |= space == Space::device && cell.read != 0 && cell.read < group.began;
    cell.read_by = 0;
  }
  const bool is_first = cell.read_by == 0 || (cell.read_by == own && cell.read < own_simdgroup().ordered[int(space)]);
  cell.reader = is_first || cell.reader == current->index ? current->index : SEVERAL;
  cell.are_reads_atomic = is_atomic && (is_first || cell.are_reads_atomic);
  cell.read_by |= own;
  cell.read = now;
}

RARE inline void report_unwritten(const Region& region, const Cell& cell, const void* place) {
  report(Kind::uninitialised_read, place, element(region, cell) + " read before it is written");
}

// Notes an access to one granule, and what is wrong with it.
inline void follow(Region& region, Cell& cell, Access access, bool is_atomic, const void* place) {
  const bool is_lost = region.space == Space::threadgroup && cell.written < group.began;  // written by earlier groups
  const bool is_written = cell.written != 0 && !is_lost;
  if (access == Access::read && !is_atomic && !is_written && !region.is_initialised)
    report_unwritten(region, cell, place);
  if (is_written && !(is_atomic && cell.is_write_atomic) && !is_over(region.space, cell.written, cell.writer))
    report_race(region, cell, access == Access::write ? "written" : "read", cell.writer, "wrote",
                cell.written < group.began, place);
  if (access == Access::read) return remember_read(region.space, cell, is_atomic);
  if (!(is_atomic && cell.are_reads_atomic) && is_being_read(region.space, cell))
    report_race(region, cell, "written", cell.reader, "read", cell.is_read_elsewhere || cell.read < group.began, place);
  cell.written = now;
  cell.writer = current->index;
  cell.is_write_atomic = is_atomic;
}

RARE [[noreturn]] inline void report_outside(const Region& region, uintptr_t at, Access access, const void* place) {
  const char *name = region.name.c_str(), *what = access == Access::write ? "write" : "read";
  const long long byte = (long long)at - (long long)uintptr_t(region.begin);
  const long long index = byte / (long long)region.granule();
  report(Kind::out_of_bounds, place,
         region.space == Space::device
             ? formatted("%s (%zu elements): %s of element %lld", name, region.bytes >> region.shift, what, index)
             : formatted("threadgroup %s (%zu bytes): %s at byte %lld", name, region.bytes, what, byte));
  abandon();
}

RARE [[noreturn]] inline void report_input(const Region& region, const void* place) {
  report(Kind::wild, place, "write to the input " + region.name);
  abandon();
}

// An access outside of all regions: to a constant of the program, or by a wrong pointer.
RARE inline void follow_elsewhere(uintptr_t at, Access access, const void* place) {
  if (at >= library_begin && at < library_end && access == Access::read) return;
  const bool is_private = at - uintptr_t(stack_of(0)) < MOST_THREADS * STACK_BYTES;
  report(Kind::wild, place,
         formatted(is_private ? "%s through a pointer to another thread's private memory" : "%s at a wild address",
                   access == Access::write ? "write" : "read"));
  abandon();
}

RARE inline void report_misaligned(size_t alignment, const void* place) {
  report(Kind::misaligned, place, formatted("access at an address that is not a multiple of %zu", alignment));
}

// Follows an access to memory that is not the thread's own.
inline void follow(uintptr_t at, size_t bytes, Access access, bool is_atomic, const void* place) {
  if (!memory->holds(at)) return follow_elsewhere(at, access, place);
  Region* const region = memory->on_page(at);
  if (!region) report_outside(memory->nearest(at), at, access, place);
  const size_t offset = at - uintptr_t(region->begin);
  if (offset >= region->bytes || bytes > region->bytes - offset) report_outside(*region, at, access, place);
  if (access == Access::write && !region->is_writable) report_input(*region, place);
  (access == Access::write ? region->writes : region->reads) += bytes >> region->shift;
  const size_t last = (offset + bytes - 1) >> region->shift;
  for (size_t i = offset >> region->shift; i <= last; i++) follow(*region, region->cells[i], access, is_atomic, place);
}

// An access of a kernel, told by the compiler's own instrumentation.
inline void accessed(const void* address, size_t bytes, Access access, const void* place) {
  const uintptr_t at = uintptr_t(address);
  if (at - uintptr_t(current->stack) >= STACK_BYTES) follow(at, bytes, access, false, place);
}

// The same, of a type that has to lie at a multiple of its size.
inline void accessed_whole(const void* address, size_t bytes, Access access, const void* place) {
  if (uintptr_t(address) & (bytes - 1)) report_misaligned(bytes, place);
  accessed(address, bytes, access, place);
}
