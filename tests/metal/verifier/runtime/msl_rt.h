#pragma once
#include <stddef.h>
#include <stdint.h>
struct msl_u3 {
  uint32_t x, y, z;
};
struct msl_attr {
  msl_u3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup, dispatch_threads_per_threadgroup, grid_origin, grid_size;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup,
      simdgroup_index_in_threadgroup, quadgroup_index_in_threadgroup, simdgroups_per_threadgroup,
      quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup,
      thread_execution_width, threads_per_simdgroup;
};
extern "C" {
void rt_tg_barrier(unsigned flags, int line);
void rt_sg_barrier(unsigned flags, int line);
void rt_exchange(const void* in, unsigned n, int op, int line, void* out);
int rt_lane();
int rt_lanes();
void rt_collective(int line);
void rt_mma(const float* a, const float* b, const float* c, float* d, int line);
void* rt_tg_alloc(const char* name, size_t bytes, size_t align, int line);
void rt_atomic(const void* p, unsigned n, int write);
}
