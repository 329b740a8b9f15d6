// Shadow memory: for each granule who wrote and read it last, and in which epoch; findings are accesses without order.
//
// Two accesses of different threads to one granule, one of them a write, are ordered when a barrier that covers the
// address space stands between them: one of the threadgroup, or, within a simdgroup, one of its own.
#pragma once
#include "state.hpp"

namespace {
inline bool ordered(uint32_t g, uint32_t e0, uint32_t e1, int sgw, int sp) {  // is that access before ours?
  return g != G ? sp == 0                                                     /*threadgroup memory of an older group*/
                : (e0 < E[sp] || (sgw == cur->sg && e1 < S[cur->sg].e[sp]));
}
void touch(Cell& c, int sp, bool w, bool at, void* pc, const char* nm, long idx) {
  if (sp == 0 && c.wg != G && c.rg != G) c = Cell{};  // a new threadgroup: memory is undefined again
  if (!w && !at && !c.init) report(2, pc, "%s[%s%ld] read before it is written", nm, sp ? "" : "byte ", idx);
  int t = cur->tid;
  auto who = [&](uint16_t x) { return (int)x; };
  if (c.wg && !(at && c.watom)) {
    bool same = c.wg == G && c.wt == t;
    if (!same && !ordered(c.wg, c.wE, c.we, c.wt / 32, sp))
      report(0, pc, "%s[%s%ld] %s while thread %d%s wrote it with no barrier between", nm, sp ? "" : "byte ", idx,
             w ? "written" : "read", who(c.wt), c.wg == G ? "" : " of another threadgroup");
  }
  if (w) {
    if (c.rg && !(at && c.ratom)) {
      bool bad;
      if (c.rg != G)
        bad = sp == 1;
      else if (c.rE < E[sp])
        bad = false;
      else if (c.rmask & ~(1u << cur->sg))
        bad = true;
      else
        bad = c.re >= S[cur->sg].e[sp] && (c.rmulti || c.rt != t);
      if (bad)
        report(0, pc, "%s[%s%ld] written while thread %d%s read it with no barrier between", nm, sp ? "" : "byte ", idx,
               who(c.rt), c.rg == G ? "" : " of another threadgroup");
    }
    c.wg = G;
    c.wE = E[sp];
    c.we = S[cur->sg].e[sp];
    c.wt = t;
    c.init = 1;
    c.watom = at;
  } else {
    uint32_t bit = 1u << cur->sg;
    if (c.rg != G || c.rE != E[sp]) {
      c.rmask = 0;
      c.rmulti = 0;
    }
    if (c.rmask & bit) {
      if (c.re != S[cur->sg].e[sp] && c.rmask == bit)
        c.rmulti = 0;
      else if (c.rt != t)
        c.rmulti = 1;
    }
    c.rmask |= bit;
    c.rg = G;
    c.rE = E[sp];
    c.re = S[cur->sg].e[sp];
    c.rt = t;
    c.ratom = at;
  }
}
void slow(uintptr_t a, size_t n, bool w, bool at, void* pc) {
  n_acc++;
  if (a - (uintptr_t)tgm < TG_ARENA) {
    size_t o = a - (uintptr_t)tgm;
    for (auto& v : vars)
      if (o >= v.off && o + n <= v.off + v.size) {
        for (size_t g = o / 2; g <= (o + n - 1) / 2; g++)
          touch(tgc[g], 0, w, at, pc, v.name.c_str(), (long)(2 * g - v.off));
        return;
      }
    const TgVar* b = nullptr;
    long d = 1 << 30;
    for (auto& v : vars) {
      long q = o < v.off ? v.off - o : o - (v.off + v.size);
      if (q < d) d = q, b = &v;
    }
    report(1, pc, "threadgroup %s (%zu bytes): %s at byte offset %ld", b ? b->name.c_str() : "?", b ? b->size : 0,
           w ? "write" : "read", b ? (long)o - (long)b->off : 0);
    abort_run();
  }
  if (a - (uintptr_t)dev < dev_len) {
    int k = page2buf[(a - (uintptr_t)dev) / PG];
    if (k >= 0) {
      Buf& b = bufs[k];
      ptrdiff_t o = a - (uintptr_t)b.p;
      if (o >= 0 && o + n <= b.n) {
        if (w && !b.w) {
          report(6, pc, "write to the input %s", b.name.c_str());
          abort_run();
        }
        (w ? b.nw : b.nr) += n / b.item;
        for (size_t g = o / b.item; g <= (o + n - 1) / b.item; g++)
          touch(b.cell[g], 1, w, at, pc, b.name.c_str(), (long)g);
        return;
      }
      report(1, pc, "%s (%zu elements): %s of element %ld", b.name.c_str(), b.n / b.item, w ? "write" : "read",
             (long)(o / (ptrdiff_t)b.item));
      abort_run();
    }
    Buf* best = nullptr;
    size_t d = ~0ull;
    for (auto& b : bufs) {
      size_t lo = (uintptr_t)b.p, q = a < lo ? lo - a : a - lo - b.n;
      if (q < d) d = q, best = &b;
    }
    report(1, pc, "%s (%zu elements): %s of element %ld", best->name.c_str(), best->n / best->item,
           w ? "write" : "read", (long)(((ptrdiff_t)a - (ptrdiff_t)best->p) / (ptrdiff_t)best->item));
    abort_run();
  }
  if (a >= img_lo && a < img_hi && !w) return;  // program-scope constants
  if (a - (uintptr_t)stk < F.size() * STK) {
    size_t o = ((uintptr_t)stk + (cur->tid + 1) * STK) - a;
    report(6, pc, "%s through a pointer to another thread's private memory", w ? "write" : "read");
    (void)o;
    abort_run();
  }
  report(6, pc, "%s at a wild address %p", w ? "write" : "read", (void*)a);
  abort_run();
}
inline void acc(const void* p, size_t n, bool w, void* pc, bool al = false) {
  if (!cur) return;
  uintptr_t a = (uintptr_t)p;
  if (a - ((uintptr_t)stk + cur->tid * STK) < STK) return;
  if (al && (a & (n - 1))) report(3, pc, "%zu-byte access at an address that is not a multiple of %zu", n, n);
  slow(a, n, w, false, pc);
}

}  // namespace
