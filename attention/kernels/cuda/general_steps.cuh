// How the strides of an array come: as 64-bit numbers of elements, or with NARROW_STEPS as 32-bit ones, which is what MLX's
// own operation can hand over.

#if NARROW_STEPS
using Step = int;
#else
using Step = i64;
#endif

DEVICE i64 steps(int count, i64 step) { return count * step; }
