// The functions that g++ calls at every access under -fsanitize=thread, and where -fsanitize=alignment,bounds,... finds
// something. No sanitizer's own library is linked; each call leads to the shadow memory, or is a finding itself.
#pragma once
#include "shadow.hpp"

#define PLACE __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define HOOKS_OF_SIZE(n)                                                                    \
  void __tsan_read##n(void* p) { accessed_whole(p, n, Access::read, PLACE); }               \
  void __tsan_write##n(void* p) { accessed_whole(p, n, Access::write, PLACE); }             \
  void __tsan_unaligned_read##n(void* p) { accessed(p, n, Access::read, PLACE); }           \
  void __tsan_unaligned_write##n(void* p) { accessed(p, n, Access::write, PLACE); }         \
  void __tsan_volatile_read##n(void* p) { accessed(p, n, Access::read, PLACE); }            \
  void __tsan_volatile_write##n(void* p) { accessed(p, n, Access::write, PLACE); }          \
  void __tsan_read_write##n(void* p) {                                                      \
    accessed(p, n, Access::read, PLACE);                                                    \
    accessed(p, n, Access::write, PLACE);                                                   \
  }
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)

void __tsan_read_range(void* p, size_t bytes) { accessed(p, bytes, Access::read, PLACE); }
void __tsan_write_range(void* p, size_t bytes) { accessed(p, bytes, Access::write, PLACE); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  accessed(from, bytes, Access::read, PLACE);
  accessed(to, bytes, Access::write, PLACE);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  accessed(from, bytes, Access::read, PLACE);
  accessed(to, bytes, Access::write, PLACE);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  accessed(to, bytes, Access::write, PLACE);
  return memset(to, value, bytes);
}

// What the other sanitizers call; their first argument describes the place in the source, which PLACE leads to as well.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log2_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* found, uintptr_t address) {
  const unsigned long alignment = 1ul << found->log2_alignment;
  if (address & (alignment - 1))
    report(Kind::misaligned, PLACE, formatted("address is not a multiple of %lu", alignment));
}
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) {
  report(Kind::out_of_bounds, PLACE, formatted("index %ld of an array that ends before", long(index)));
  abandon();
}
void __ubsan_handle_shift_out_of_bounds(void*, uintptr_t, uintptr_t by) {
  report(Kind::arithmetic, PLACE, formatted("shift by %ld", long(by)));
}
void __ubsan_handle_add_overflow(void*, uintptr_t a, uintptr_t b) {
  report(Kind::arithmetic, PLACE, formatted("integer overflow: %ld + %ld", long(a), long(b)));
}
void __ubsan_handle_sub_overflow(void*, uintptr_t a, uintptr_t b) {
  report(Kind::arithmetic, PLACE, formatted("integer overflow: %ld - %ld", long(a), long(b)));
}
void __ubsan_handle_mul_overflow(void*, uintptr_t a, uintptr_t b) {
  report(Kind::arithmetic, PLACE, formatted("integer overflow: %ld * %ld", long(a), long(b)));
}
void __ubsan_handle_negate_overflow(void*, uintptr_t a) {
  report(Kind::arithmetic, PLACE, formatted("integer overflow: -(%ld)", long(a)));
}
void __ubsan_handle_divrem_overflow(void*, uintptr_t a, uintptr_t b) {
  report(Kind::arithmetic, PLACE, formatted("division: %ld / %ld", long(a), long(b)));
  abandon();  // the processor would trap
}
}
