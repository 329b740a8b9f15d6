// The emulated GPU as a kernel sees it: what the stand-in for Metal's library (shim/) calls.
//
// A `line` is the line of the kernel's text that the call stands in; it names the place in what is found.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace gpu {

constexpr int SIMD = 32;  // lanes of a simdgroup

struct Position {
  uint32_t x, y, z;
};

// What a kernel's parameters with an attribute are given, under the attributes' names.
struct Attributes {
  Position thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Position threadgroups_per_grid, threads_per_grid, grid_origin, grid_size;
  Position threads_per_threadgroup, dispatch_threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup;
  uint32_t simdgroup_index_in_threadgroup, quadgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  uint32_t thread_execution_width, threads_per_simdgroup;
};

// What the lanes of a simdgroup do together; all of them have to do the same, in the same line.
enum class Together { barrier, shuffle, reduce, matrix_memory, matrix_product };

// Bits of the flags of a barrier, as in metal::mem_flags: the memory that it orders.
constexpr unsigned DEVICE_MEMORY = 1, THREADGROUP_MEMORY = 2;

void threadgroup_barrier(unsigned flags, int line);
void simdgroup_barrier(unsigned flags, int line);

int lane();   // of the current thread
int lanes();  // of its simdgroup, of which the last may be partly filled

// Gives every lane what all lanes hold: `all` is SIMD values of `bytes` each, zeros where there is no lane.
void exchange(const void* mine, unsigned bytes, Together what, int line, void* all);

// Waits for all lanes, at an operation that only a whole simdgroup may do.
void meet_whole(Together what, int line);

// a b + c for 8 x 8 matrices, of which each lane holds the two elements at (lane_row, lane_column) and beside it.
// Values, not pointers, so that a kernel's matrices can stay in registers, where no access has to be followed.
struct Elements {
  float first, second;
};
Elements multiply(Elements a, Elements b, Elements c, int line);

// Where Apple's GPUs hold an element of a matrix (q: quad of lanes). Not specified; MLX's kernels rely on it too.
inline int lane_row(int lane) {
  const int q = lane / 4;
  return (q & 4) + (lane / 2) % 4;
}
inline int lane_column(int lane) {
  const int q = lane / 4;
  return (q & 2) * 2 + (lane % 2) * 2;
}

// The memory of an array that a kernel declares in threadgroup memory; the same for all threads of the group.
// Accesses are followed `granule` bytes at a time: the size of an element, if that is known.
void* threadgroup_array(const char* name, size_t bytes, size_t alignment, size_t granule, int line);

// Tells of an access that is atomic; the access itself is the caller's.
void atomic_access(const void* address, unsigned bytes, bool is_write);

}  // namespace gpu
