// A fiber: a stack of its own, and the switch to another one. Nothing but registers that a call has to keep is saved.
#pragma once
#include <stdint.h>
#include <string.h>

// Saves where the running fiber stands in *save, and goes on where another was saved.
extern "C" void fiber_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl fiber_switch
.type fiber_switch, @function
fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// What fiber_switch finds on the stack of a fiber that has not run yet: six registers, and where to return to.
inline void* new_fiber(unsigned char* stack_end, void (*run)()) {
  void** top = reinterpret_cast<void**>(stack_end - 256);
  *--top = nullptr;  // what run would return to: keeps the stack aligned as a call would have left it
  *--top = reinterpret_cast<void*>(run);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

#elif defined(__aarch64__)
asm(R"(
.text
.globl fiber_switch
.type fiber_switch, %function
.p2align 2
fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

// The same: twenty registers, of which the twelfth is where to return to.
inline void* new_fiber(unsigned char* stack_end, void (*run)()) {
  void** top = reinterpret_cast<void**>(stack_end - 256) - 20;
  memset(top, 0, 160);
  top[11] = reinterpret_cast<void*>(run);
  return top;
}

#else
#error "fibers are written for x86_64 and aarch64 only"
#endif
