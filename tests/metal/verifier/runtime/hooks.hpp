// The functions that g++'s -fsanitize=thread and -fsanitize=alignment,bounds,... call at every access (no sanitizer's
// own library is linked): each leads to the shadow memory, or to a finding.
#pragma once
#include "shadow.hpp"

extern "C" {
#define PC __builtin_return_address(0)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define H(n)                                \
  void __tsan_read##n(void* p) {            \
    access(p, n, false, PC, true);          \
  }                                         \
  void __tsan_write##n(void* p) {           \
    access(p, n, true, PC, true);           \
  }                                         \
  void __tsan_unaligned_read##n(void* p) {  \
    access(p, n, false, PC);                \
  }                                         \
  void __tsan_unaligned_write##n(void* p) { \
    access(p, n, true, PC);                 \
  }                                         \
  void __tsan_volatile_read##n(void* p) {   \
    access(p, n, false, PC);                \
  }                                         \
  void __tsan_volatile_write##n(void* p) {  \
    access(p, n, true, PC);                 \
  }                                         \
  void __tsan_read_write##n(void* p) {      \
    access(p, n, false, PC);                \
    access(p, n, true, PC);                 \
  }
H(1) H(2) H(4) H(8) H(16) void __tsan_read_range(void* p, size_t n) {
  access(p, n, false, PC);
}
void __tsan_write_range(void* p, size_t n) {
  access(p, n, true, PC);
}
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  access(s, n, false, PC);
  access(d, n, true, PC);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  access(s, n, false, PC);
  access(d, n, true, PC);
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int c, size_t n) {
  access(d, n, true, PC);
  return memset(d, c, n);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// -fsanitize=alignment,bounds,shift,signed-integer-overflow emit ----
struct Loc {
  const char* f;
  uint32_t line, col;
};
struct TMis {
  Loc l;
  const void* ty;
  unsigned char la, kind;
};
void __ubsan_handle_type_mismatch_v1(TMis* d, uintptr_t p) {
  if (current && (p & ((1ul << d->la) - 1))) report(3, PC, "address is not a multiple of %lu", 1ul << d->la);
}
void __ubsan_handle_out_of_bounds(Loc*, uintptr_t i) {
  if (current) {
    report(1, PC, "private array index %ld", (long)i);
    abort_run();
  }
}
void __ubsan_handle_shift_out_of_bounds(Loc*, uintptr_t, uintptr_t b) {
  if (current) report(7, PC, "shift by %ld", (long)b);
}
#define OV(n, o)                                                             \
  void __ubsan_handle_##n(Loc*, uintptr_t a, uintptr_t b) {                  \
    if (current) report(7, PC, "int overflow: %d " o " %d", (int)a, (int)b); \
  }
OV(add_overflow, "+")
OV(sub_overflow, "-")
OV(mul_overflow, "*") OV(negate_overflow, "neg") OV(divrem_overflow, "/") OV(pointer_overflow, "ptr")
}
