// What threads of the emulated GPU do together: barriers, exchanges and products of a simdgroup, threadgroup arrays.
#pragma once
#include "schedule.hpp"
#include "shadow.hpp"

static uint64_t products = 0;  // of 8 x 8 matrices, by a simdgroup
static uint64_t barriers = 0;  // that threadgroups passed

namespace gpu {

// Everything before a barrier is over for those who have passed it, in the memories that it orders.
static void order(Time (&ordered)[SPACES], unsigned flags) {
  if (flags & THREADGROUP_MEMORY) ordered[int(Space::threadgroup)] = now;
  if (flags & DEVICE_MEMORY) ordered[int(Space::device)] = now;
}

void threadgroup_barrier(unsigned flags, int line) {
  meet_threadgroup(int(flags), line, [flags] {
    now++;
    barriers++;
    order(group.ordered, flags);
    for (Simdgroup& simdgroup : group.simdgroups) order(simdgroup.ordered, flags);
  });
}

void simdgroup_barrier(unsigned flags, int line) {
  meet_simdgroup(int(Together::barrier), line, [flags] {
    now++;
    order(own_simdgroup().ordered, flags);
  });
}

int lane() { return current->lane; }
int lanes() { return own_simdgroup().lanes; }

void exchange(const void* mine, unsigned bytes, Together what, int line, void* all) {
  Simdgroup& own = own_simdgroup();
  auto& told = own.told[own.meetings & 1];
  memcpy(told[current->lane], mine, bytes);
  meet_simdgroup(int(what), line, [] {});
  for (int i = 0; i < SIMD; i++) {
    char* const to = static_cast<char*>(all) + size_t(i) * bytes;
    if (i < own.lanes) memcpy(to, told[i], bytes);
    else memset(to, 0, bytes);
  }
}

void meet_whole(Together what, int line) {
  if (lanes() != SIMD) {
    report(Kind::divergence, nullptr,
           formatted("operation on a matrix in a simdgroup of %d lanes, at line %d", lanes(), line));
    abandon();
  }
  meet_simdgroup(int(what), line, [] {});
}

// As the hardware is thought to do it: each element summed in order, rounded at every step.
static void multiply_all(Product& matrices) {
  for (int row = 0; row < 8; row++)
    for (int i = 0; i < 8; i++)
      for (int column = 0; column < 8; column++)
        matrices.sum[row * 8 + column] =
            __builtin_fmaf(matrices.a[row * 8 + i], matrices.b[i * 8 + column], matrices.sum[row * 8 + column]);
}

Elements multiply(Elements a, Elements b, Elements c, int line) {
  if (lanes() != SIMD) meet_whole(Together::matrix_product, line);
  Simdgroup& own = own_simdgroup();
  Product& matrices = own.products[own.meetings & 1];
  const int at = lane_row(current->lane) * 8 + lane_column(current->lane);
  memcpy(matrices.a + at, &a, sizeof a);
  memcpy(matrices.b + at, &b, sizeof b);
  memcpy(matrices.sum + at, &c, sizeof c);
  meet_simdgroup(int(Together::matrix_product), line, [&matrices] {
    products++;
    multiply_all(matrices);
  });
  return {matrices.sum[at], matrices.sum[at + 1]};
}

// The array, made anew for each threadgroup: what another one left in it is gone.
static Region& declared(const char* name, size_t bytes, size_t alignment, size_t granule, int line) {
  for (Region& region : memory->regions())
    if (region.space == Space::threadgroup && region.line == line && region.name == name) return region;
  if (!memory->has_room(bytes)) {
    report(Kind::limit, nullptr, formatted("threadgroup array %s of %zu bytes", name, bytes));
    abandon();
  }
  Region& made = memory->add(name, Space::threadgroup, bytes, granule, 0);
  made.line = line;
  if (alignment > PAGE)
    report(Kind::limit, nullptr, formatted("threadgroup array %s aligned to %zu bytes", name, alignment));
  const size_t all = threadgroup_bytes();
  if (all > THREADGROUP_LIMIT)
    report(Kind::limit, nullptr,
           formatted("threadgroup memory of %zu bytes, %zu at most (at %s)", all, THREADGROUP_LIMIT, name));
  return made;
}

void* threadgroup_array(const char* name, size_t bytes, size_t alignment, size_t granule, int line) {
  Region& region = declared(name, bytes, alignment, granule, line);
  if (region.declared < group.began) {
    region.declared = group.began;
    memset(region.begin, 0xff, bytes);  // NaN, to whoever reads it
  }
  return region.begin;
}

void atomic_access(const void* address, unsigned bytes, bool is_write) {
  follow(uintptr_t(address), bytes, is_write ? Access::write : Access::read, true, __builtin_return_address(0));
}

}  // namespace gpu
