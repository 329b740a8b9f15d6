// Runs one launch: lays out the buffers, makes a fiber for each thread of each threadgroup in turn, collects findings.
#include "hooks.hpp"
#include "operations.hpp"

extern "C" {
// spec per buffer: {data, nbytes, itemsize, flags(1 output, 2 initialised)}
int msl_run(void (*fn)(void**, const msl_attr*), int nb, void** data, const uint64_t* nbytes, const uint32_t* item,
            const uint32_t* flags, const char** names, const uint32_t* grid, const uint32_t* tg, int opts, char* err,
            size_t errlen, uint64_t* stats) {
  errs.clear();
  nerr = 0;
  seen.clear();
  cur = nullptr;
  aborting = false;
  n_acc = n_sw = n_mma = 0;
  sched_mode = opts & 1;
  size_t mis = (opts >> 8) & 255;
  entry = fn;
  G = 0;
  uint32_t t[3];
  for (int i = 0; i < 3; i++) t[i] = tg[i] < grid[i] ? tg[i] : grid[i];
  size_t nt = (size_t)t[0] * t[1] * t[2];
  if ((size_t)tg[0] * tg[1] * tg[2] > 1024) {
    snprintf(err, errlen, "limit|0|threadgroup of %u threads > 1024\n", tg[0] * tg[1] * tg[2]);
    return 1;
  }
  Dl_info di;
  dladdr((void*)fn, &di);
  img_lo = (uintptr_t)di.dli_fbase;
  img_hi = img_lo + (64 << 20);
  dev_len = PG * 64;
  for (int i = 0; i < nb; i++) dev_len += (nbytes[i] / PG + 2) * PG + PG * 64;
  dev = (unsigned char*)mmap(nullptr, dev_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  stk = (unsigned char*)mmap(nullptr, nt * STK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  tgm = (unsigned char*)mmap(nullptr, TG_ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  page2buf.assign(dev_len / PG, -1);
  bufs.clear();
  bufs.resize(nb);
  tgc.assign(TG_ARENA / 2, Cell{});
  std::vector<void*> ptr(nb);
  size_t o = PG * 64;
  for (int i = 0; i < nb; i++) {
    Buf& b = bufs[i];
    b.name = names[i];
    b.n = nbytes[i];
    b.item = item[i];
    b.w = flags[i] & 1;
    b.p = dev + o + (mis ? item[i] : 0);
    b.cell.assign(b.n / b.item + 1, Cell{});
    if (flags[i] & 2)
      for (auto& c : b.cell) c.init = 1;
    memcpy(b.p, data[i], b.n);
    if (!(flags[i] & 2)) memset(b.p, 0xff, b.n);
    for (size_t q = o / PG; q <= (o + b.n + b.item) / PG; q++) page2buf[q] = i;
    ptr[i] = b.p;
    o += (b.n / PG + 2) * PG + PG * 64;
  }
  eb = ptr.data();
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
        nthr = a[0] * a[1] * a[2];
        int nsg = (nthr + 31) / 32;
        F.assign(nthr, Fiber{});
        S.assign(nsg, Sg{});
        vars.clear();
        tg_used = 0;
        tg_arrived = n_done = 0;
        G++;
        E[0] = E[1] = 1;
        for (int i = 0; i < nsg; i++) {
          S[i].n = nthr - i * 32 < 32 ? nthr - i * 32 : 32;
          S[i].e[0] = S[i].e[1] = 1;
        }
        for (int i = 0; i < nthr; i++) {
          Fiber& f = F[i];
          f.tid = i;
          f.sg = i / 32;
          f.lane = i % 32;
          f.st = RUN;
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
          A.simdgroup_index_in_threadgroup = f.sg;
          A.thread_index_in_quadgroup = i & 3;
          A.quadgroup_index_in_threadgroup = i / 4;
          A.simdgroups_per_threadgroup = nsg;
          A.dispatch_simdgroups_per_threadgroup = (nt + 31) / 32;
          A.quadgroups_per_threadgroup = (nthr + 3) / 4;
          A.dispatch_quadgroups_per_threadgroup = (nt + 3) / 4;
          A.thread_execution_width = A.threads_per_simdgroup = 32;
          void** sp = (void**)(stk + (size_t)(i + 1) * STK - 256);
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
        cur = &F[sched_mode ? nthr - 1 : 0];
        void* to = cur->sp;
        msl_switch(&main_sp, to);
        cur = nullptr;
      }
  for (int i = 0; i < nb; i++)
    if (bufs[i].w) {
      memcpy(data[i], bufs[i].p, bufs[i].n);
      if (!aborting && !(flags[i] & 2)) {
        size_t bad = 0, first = 0;
        for (size_t k = 0; k < bufs[i].n / item[i]; k++)
          if (!bufs[i].cell[k].init) {
            if (!bad++) first = k;
          }
        if (bad) report(2, nullptr, "output %s: %zu elements never written (first: %zu)", names[i], bad, first);
      }
    }
  std::vector<Cell>().swap(tgc);
  munmap(dev, dev_len);
  munmap(stk, nt * STK);
  munmap(tgm, TG_ARENA);
  stats[0] = n_acc;
  stats[1] = n_sw;
  stats[2] = tg_used;
  stats[3] = n_mma / 32;
  for (int i = 0; i < nb; i++) {
    stats[4 + 2 * i] = bufs[i].nr;
    stats[5 + 2 * i] = bufs[i].nw;
  }
  snprintf(err, errlen, "%s", errs.c_str());
  return nerr;
}
}
