// Runs one launch: lays out the buffers, makes a fiber for each thread of each threadgroup in turn, collects findings.
#include "hooks.hpp"
#include "operations.hpp"

extern "C" {
// spec per buffer: {data, nbytes, itemsize, flags(1 output, 2 initialised)}
int msl_run(void (*fn)(void**, const msl_attr*), int nb, void** data, const uint64_t* nbytes, const uint32_t* item,
            const uint32_t* flags, const char** names, const uint32_t* grid, const uint32_t* tg, int opts, char* err,
            size_t errlen, uint64_t* stats) {
  findings.clear();
  findings_count = 0;
  reported.clear();
  current = nullptr;
  aborting = false;
  accesses = switches = products = 0;
  reversed_order = opts & 1;
  size_t mis = (opts >> 8) & 255;
  entry = fn;
  group_serial = 0;
  uint32_t t[3];
  for (int i = 0; i < 3; i++) t[i] = tg[i] < grid[i] ? tg[i] : grid[i];
  size_t nt = (size_t)t[0] * t[1] * t[2];
  if ((size_t)tg[0] * tg[1] * tg[2] > 1024) {
    snprintf(err, errlen, "limit|0|threadgroup of %u threads > 1024\n", tg[0] * tg[1] * tg[2]);
    return 1;
  }
  Dl_info di;
  dladdr((void*)fn, &di);
  image_begin = (uintptr_t)di.dli_fbase;
  image_end = image_begin + (64 << 20);
  device_bytes = PAGE * 64;
  for (int i = 0; i < nb; i++) device_bytes += (nbytes[i] / PAGE + 2) * PAGE + PAGE * 64;
  device_memory = (unsigned char*)mmap(nullptr, device_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  stacks = (unsigned char*)mmap(nullptr, nt * STACK_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  threadgroup_memory =
      (unsigned char*)mmap(nullptr, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  buffer_of_page.assign(device_bytes / PAGE, -1);
  buffers.clear();
  buffers.resize(nb);
  threadgroup_cells.assign(ARENA_BYTES / 2, Cell{});
  std::vector<void*> ptr(nb);
  size_t o = PAGE * 64;
  for (int i = 0; i < nb; i++) {
    Buffer& b = buffers[i];
    b.name = names[i];
    b.n = nbytes[i];
    b.item = item[i];
    b.w = flags[i] & 1;
    b.p = device_memory + o + (mis ? item[i] : 0);
    b.cell.assign(b.n / b.item + 1, Cell{});
    if (flags[i] & 2)
      for (auto& c : b.cell) c.init = 1;
    memcpy(b.p, data[i], b.n);
    if (!(flags[i] & 2)) memset(b.p, 0xff, b.n);
    for (size_t q = o / PAGE; q <= (o + b.n + b.item) / PAGE; q++) buffer_of_page[q] = i;
    ptr[i] = b.p;
    o += (b.n / PAGE + 2) * PAGE + PAGE * 64;
  }
  entry_buffers = ptr.data();
  uint32_t ng[3];
  for (int i = 0; i < 3; i++) ng[i] = (grid[i] + t[i] - 1) / t[i];
  for (uint32_t gz = 0; gz < ng[2] && !aborting; gz++)
    for (uint32_t gy = 0; gy < ng[1] && !aborting; gy++)
      for (uint32_t gx = 0; gx < ng[0] && !aborting; gx++) {
        uint32_t gp[3] = {gx, gy, gz}, a[3];
        for (int i = 0; i < 3; i++) {
          a[i] = grid[i] - gp[i] * t[i];
          if (a[i] > t[i]) a[i] = t[i];
        }
        threads = a[0] * a[1] * a[2];
        int nsg = (threads + 31) / 32;
        fibers.assign(threads, Fiber{});
        simdgroups.assign(nsg, Simdgroup{});
        arrays.clear();
        threadgroup_used = 0;
        waiting_threads = ended_threads = 0;
        group_serial++;
        epochs[0] = epochs[1] = 1;
        for (int i = 0; i < nsg; i++) {
          simdgroups[i].n = threads - i * 32 < 32 ? threads - i * 32 : 32;
          simdgroups[i].e[0] = simdgroups[i].e[1] = 1;
        }
        for (int i = 0; i < threads; i++) {
          Fiber& f = fibers[i];
          f.tid = i;
          f.simdgroup = i / 32;
          f.lane = i % 32;
          f.state = RUN;
          msl_attr& A = f.at;
          msl_u3 l = {i % a[0], (i / a[0]) % a[1], i / (a[0] * a[1])};
          A.thread_position_in_threadgroup = l;
          A.threadgroup_position_in_grid = {gx, gy, gz};
          A.thread_position_in_grid = {gx * t[0] + l.x, gy * t[1] + l.y, gz * t[2] + l.z};
          A.threads_per_threadgroup = {a[0], a[1], a[2]};
          A.dispatch_threads_per_threadgroup = {t[0], t[1], t[2]};
          A.threads_per_grid = A.grid_size = {grid[0], grid[1], grid[2]};
          A.threadgroups_per_grid = {ng[0], ng[1], ng[2]};
          A.grid_origin = {0, 0, 0};
          A.thread_index_in_threadgroup = i;
          A.thread_index_in_simdgroup = f.lane;
          A.simdgroup_index_in_threadgroup = f.simdgroup;
          A.thread_index_in_quadgroup = i & 3;
          A.quadgroup_index_in_threadgroup = i / 4;
          A.simdgroups_per_threadgroup = nsg;
          A.dispatch_simdgroups_per_threadgroup = (nt + 31) / 32;
          A.quadgroups_per_threadgroup = (threads + 3) / 4;
          A.dispatch_quadgroups_per_threadgroup = (nt + 3) / 4;
          A.thread_execution_width = A.threads_per_simdgroup = 32;
          void** sp = (void**)(stacks + (size_t)(i + 1) * STACK_BYTES - 256);
#if defined(__x86_64__)
          *--sp = nullptr;
          *--sp = (void*)trampoline;
          for (int k = 0; k < 6; k++) *--sp = nullptr;
#else
          sp -= 20;
          memset(sp, 0, 160);
          sp[11] = (void*)trampoline;
#endif
          f.sp = sp;
        }
        current = &fibers[reversed_order ? threads - 1 : 0];
        void* to = current->sp;
        msl_switch(&main_sp, to);
        current = nullptr;
      }
  for (int i = 0; i < nb; i++)
    if (buffers[i].w) {
      memcpy(data[i], buffers[i].p, buffers[i].n);
      if (!aborting && !(flags[i] & 2)) {
        size_t bad = 0, first = 0;
        for (size_t k = 0; k < buffers[i].n / item[i]; k++)
          if (!buffers[i].cell[k].init) {
            if (!bad++) first = k;
          }
        if (bad) report(2, nullptr, "output %s: %zu elements never written (first: %zu)", names[i], bad, first);
      }
    }
  std::vector<Cell>().swap(threadgroup_cells);
  munmap(device_memory, device_bytes);
  munmap(stacks, nt * STACK_BYTES);
  munmap(threadgroup_memory, ARENA_BYTES);
  stats[0] = accesses;
  stats[1] = switches;
  stats[2] = threadgroup_used;
  stats[3] = products / 32;
  for (int i = 0; i < nb; i++) {
    stats[4 + 2 * i] = buffers[i].nr;
    stats[5 + 2 * i] = buffers[i].nw;
  }
  snprintf(err, errlen, "%s", findings.c_str());
  return findings_count;
}
}
