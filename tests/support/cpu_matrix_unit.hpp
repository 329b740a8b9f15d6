// The matrix unit (AMX) in software, for processors without one: included before the kernel's core, it takes the place of
// the instructions and of Linux's permission. Tiles are 16 rows of 16 words, as the core configures them.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace matrix_unit {

inline thread_local uint32_t tile[8][16][16];

inline void copy(int n, char* memory, int64_t stride, bool load) {
  for (int row = 0; row < 16; row++)
    if (load) std::memcpy(tile[n][row], memory + row * stride, 64);
    else std::memcpy(memory + row * stride, tile[n][row], 64);
}

inline float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// C[m][n] += A[m][k] . B[k][n], each word two bfloat16.
inline void multiply(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float sum = number(tile[c][m][n]);
      for (int k = 0; k < 16; k++) {
        const uint32_t x = tile[a][m][k], y = tile[b][k][n];
        sum += number(x << 16) * number(y << 16) + number(x & 0xffff0000u) * number(y & 0xffff0000u);
      }
      std::memcpy(&tile[c][m][n], &sum, 4);
    }
}
}  // namespace matrix_unit

#define __AMX_BF16__ 1
#define syscall(...) 0L
#define _tile_loadconfig(memory) (void)(memory)
#define _tile_release() std::memset(matrix_unit::tile, 0xff, sizeof matrix_unit::tile)
#define _tile_zero(n) std::memset(matrix_unit::tile[n], 0, sizeof matrix_unit::tile[n])
#define _tile_loadd(n, memory, stride) matrix_unit::copy(n, (char*)(memory), stride, true)
#define _tile_stored(n, memory, stride) matrix_unit::copy(n, (char*)(memory), stride, false)
#define _tile_dpbf16ps(c, a, b) matrix_unit::multiply(c, a, b)
