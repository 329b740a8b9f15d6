// One launch: lays out the buffers, runs the threadgroups one after another, and tells what was found and counted.
#include <dlfcn.h>
#include <link.h>
#include <algorithm>
#include <memory>
#include "hooks.hpp"
#include "operations.hpp"

// The kernel, called with its buffers and the attributes of a thread.
using Kernel = void (*)(void** buffers, const gpu::Attributes*);

extern "C" {

// One buffer of a launch, as Python describes it (running.py has the same structure).
struct BufferOfLaunch {
  const char* name;
  void* data;
  uint64_t bytes, element_bytes;
  uint32_t is_output, is_initialised;
  uint64_t reads, writes;  // elements; told
};

// A launch, as Python describes it, and room for what it is told.
struct Launch {
  Kernel kernel;
  BufferOfLaunch* buffers;
  uint32_t buffer_count;
  uint32_t grid[3], threadgroup[3];  // threads
  uint32_t is_reversed, is_misaligned;
  char* findings;  // told
  uint64_t findings_bytes;
  uint64_t threadgroup_bytes, products, barriers;  // told
};
}

static Kernel kernel;
static std::vector<void*> addresses;  // of the buffers
static const size_t THREADGROUP_ROOM = 64;  // times the limit; what goes beyond that is not even run

static void run_thread() {
  kernel(addresses.data(), &current->attributes);
  end_thread();
}

// Finds where the kernel's library lies.
static void find_library(const void* inside) {
  Dl_info found;
  dladdr(inside, &found);
  library_begin = library_end = uintptr_t(found.dli_fbase);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        if (info->dlpi_addr == library_begin)
          for (int i = 0; i < info->dlpi_phnum; i++)
            if (info->dlpi_phdr[i].p_type == PT_LOAD)
              library_end = std::max(library_end, uintptr_t(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr +
                                                            info->dlpi_phdr[i].p_memsz));
        return 0;
      },
      nullptr);
}

static std::unique_ptr<Memory> lay_out(const Launch& launch) {
  size_t bytes = THREADGROUP_ROOM * THREADGROUP_LIMIT;
  for (uint32_t i = 0; i < launch.buffer_count; i++) bytes += launch.buffers[i].bytes + PAGE;
  auto made = std::make_unique<Memory>(bytes, launch.buffer_count + THREADGROUP_ROOM);
  addresses.clear();
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    const BufferOfLaunch& given = launch.buffers[i];
    const size_t offset = launch.is_misaligned ? given.element_bytes : 0;
    Region& region = made->add(given.name, Space::device, given.bytes, given.element_bytes, offset);
    region.is_writable = given.is_output;
    region.is_initialised = given.is_initialised;
    if (given.is_initialised) memcpy(region.begin, given.data, given.bytes);
    else memset(region.begin, 0xff, given.bytes);
    addresses.push_back(region.begin);
  }
  return made;
}

static gpu::Attributes attributes_of(int thread, const uint32_t* at, const uint32_t* size, const Launch& launch) {
  const uint32_t *whole = launch.threadgroup, *grid = launch.grid;
  const auto groups = [&](int axis) { return (grid[axis] + whole[axis] - 1) / whole[axis]; };
  const uint32_t index = uint32_t(thread), count = size[0] * size[1] * size[2], most = whole[0] * whole[1] * whole[2];
  const gpu::Position local = {index % size[0], index / size[0] % size[1], index / (size[0] * size[1])};
  gpu::Attributes made = {};
  made.thread_position_in_threadgroup = local;
  made.threadgroup_position_in_grid = {at[0], at[1], at[2]};
  made.thread_position_in_grid = {at[0] * whole[0] + local.x, at[1] * whole[1] + local.y, at[2] * whole[2] + local.z};
  made.threads_per_threadgroup = {size[0], size[1], size[2]};
  made.dispatch_threads_per_threadgroup = {whole[0], whole[1], whole[2]};
  made.threads_per_grid = made.grid_size = {grid[0], grid[1], grid[2]};
  made.threadgroups_per_grid = {groups(0), groups(1), groups(2)};
  made.thread_index_in_threadgroup = index;
  made.thread_index_in_simdgroup = index % gpu::SIMD;
  made.simdgroup_index_in_threadgroup = index / gpu::SIMD;
  made.thread_index_in_quadgroup = index % 4;
  made.quadgroup_index_in_threadgroup = index / 4;
  made.simdgroups_per_threadgroup = (count + gpu::SIMD - 1) / gpu::SIMD;
  made.dispatch_simdgroups_per_threadgroup = (most + gpu::SIMD - 1) / gpu::SIMD;
  made.quadgroups_per_threadgroup = (count + 3) / 4;
  made.dispatch_quadgroups_per_threadgroup = (most + 3) / 4;
  made.thread_execution_width = made.threads_per_simdgroup = gpu::SIMD;
  return made;
}

// Runs the threadgroup at a place of the grid, whose edge may cut it off.
static void run_threadgroup(const uint32_t* at, const Launch& launch) {
  uint32_t size[3];
  for (int axis = 0; axis < 3; axis++)
    size[axis] = std::min(launch.threadgroup[axis], launch.grid[axis] - at[axis] * launch.threadgroup[axis]);
  const int count = int(size[0] * size[1] * size[2]);
  group.waiting = group.ended = 0;
  group.began = ++now;
  std::fill(group.ordered, group.ordered + SPACES, now);
  group.simdgroups.assign((count + gpu::SIMD - 1) / gpu::SIMD, Simdgroup{});
  for (size_t i = 0; i < group.simdgroups.size(); i++)
    group.simdgroups[i].lanes = std::min(gpu::SIMD, count - int(i) * gpu::SIMD);
  group.threads.clear();
  for (int i = 0; i < count; i++) {
    unsigned char* const stack = stack_of(i);
    group.threads.push_back({new_fiber(stack + STACK_BYTES, run_thread), stack, i, i / gpu::SIMD, i % gpu::SIMD,
                             State::runs, 0, 0, attributes_of(i, at, size, launch)});
  }
  current = &group.threads[is_reversed ? count - 1 : 0];
  fiber_switch(&launcher, current->stack_pointer);
  current = nullptr;
}

static void run_all(const Launch& launch) {
  uint32_t groups[3], at[3];
  for (int axis = 0; axis < 3; axis++)
    groups[axis] = (launch.grid[axis] + launch.threadgroup[axis] - 1) / launch.threadgroup[axis];
  for (at[2] = 0; at[2] < groups[2]; at[2]++)
    for (at[1] = 0; at[1] < groups[1]; at[1]++)
      for (at[0] = 0; at[0] < groups[0]; at[0]++) {
        run_threadgroup(at, launch);
        if (is_abandoned) return;
      }
}

// Gives the outputs back, and finds those elements that were never written.
static void collect(Launch& launch) {
  for (uint32_t i = 0; i < launch.buffer_count; i++) {
    BufferOfLaunch& given = launch.buffers[i];
    const Region& region = memory->regions()[i];
    given.reads = region.reads;
    given.writes = region.writes;
    if (!given.is_output) continue;
    memcpy(given.data, region.begin, given.bytes);
    if (is_abandoned || given.is_initialised) continue;
    const auto end = region.cells.end() - 1;  // the last cell stands for a rest of a granule
    const auto is_unwritten = [](const Cell& cell) { return cell.written == 0; };
    const auto first = std::find_if(region.cells.begin(), end, is_unwritten);
    if (first != end)
      report(Kind::uninitialised_read, nullptr,
             formatted("output %s: %ld elements never written (first: %ld)", given.name,
                       long(std::count_if(first, end, is_unwritten)), long(first - region.cells.begin())));
  }
}

// Runs a launch; returns whether anything was found.
extern "C" int run_launch(Launch* launch) {
  find_library(reinterpret_cast<const void*>(launch->kernel));
  findings.begin(library_begin);
  kernel = launch->kernel;
  is_reversed = launch->is_reversed;
  is_abandoned = false;
  now = 0;
  products = barriers = 0;
  const uint64_t threads = uint64_t(launch->threadgroup[0]) * launch->threadgroup[1] * launch->threadgroup[2];
  if (threads > MOST_THREADS) {
    report(Kind::limit, nullptr,
           formatted("threadgroup of %lu threads, %d at most", (unsigned long)threads, MOST_THREADS));
  } else {
    const std::unique_ptr<Memory> held = lay_out(*launch);
    memory = held.get();
    run_all(*launch);
    collect(*launch);
    launch->threadgroup_bytes = threadgroup_bytes();
    launch->products = products;
    launch->barriers = barriers;
    memory = nullptr;
  }
  snprintf(launch->findings, launch->findings_bytes, "%s", findings.text().c_str());
  return !findings.text().empty();
}
