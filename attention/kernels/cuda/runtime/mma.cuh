// Wrappers of the tensor-core instructions of Ampere and later, one short function each: a warp multiplies 16 x 16 by
// 16 x 8. Of an accumulator, lane l holds rows l / 4 and l / 4 + 8, and columns 2 (l % 4) and 2 (l % 4) + 1.
//
// Tiles in shared memory are rows of HEAD_DIM elements; the 16-byte unit u of row r is stored at unit u ^ (r % 8), so that
// the eight rows of an ldmatrix matrix are in different banks.

constexpr int ROW_UNITS = HEAD_DIM / 8;

DEVICE u32 unit_address(u32 tile, int row, int unit) { return tile + (row * ROW_UNITS + (unit ^ row % 8)) * 16; }

// Starts an asynchronous copy of 16 bytes from device to shared memory; zero-fills if not `valid`.
DEVICE void copy_16_bytes(u32 destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Loads four 8 x 8 matrices; lane l passes the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
DEVICE void load_matrices_transposed(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// c (16 x 8) += a (16 x 16) @ b (16 x 8)
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif
  asm("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#undef ELEMENT
}

// Atomically adds an accumulator to 128 floats in device memory, in register order: the four floats of a lane are adjacent
// with vectorised atomics (VECTOR_SUMS), else those of a warp are.
#ifdef VECTOR_SUMS
DEVICE void add_to_memory(float* sums, const float (&c)[4]) {
  const int lane = threadIdx.x % 32;
#if VECTOR_SUMS
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + 4 * lane), "f"(c[0]), "f"(c[1]), "f"(c[2]),
               "f"(c[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sums + 32 * i + lane), "f"(c[i]) : "memory");
#endif
}
#endif
