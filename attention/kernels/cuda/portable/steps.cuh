// Strides of an array in elements: 64-bit or, with NARROW_STEPS, 32-bit, the scalar type of MLX's precompiled-kernel
// operation.

#if NARROW_STEPS
using Step = int;
#else
using Step = i64;
#endif

DEVICE i64 steps(int count, i64 step) { return count * step; }
