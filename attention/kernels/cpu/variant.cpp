// The name of the instruction set that the kernel is compiled for. build.py preprocesses this file, with FATUI_NAME_ONLY
// defined, to know it before a compilation: flags and compiler decide, not the processor alone.
namespace fatui {
constexpr char compiled_for[] =
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
    "amx";
#elif defined(__AVX512BF16__)
    "avx512_bf16";
#elif defined(__AVX512F__)
    "avx512";
#elif defined(__AVX2__)
    "avx2";
#elif defined(__ARM_NEON)
    "neon";
#else
    "plain";
#endif
}  // namespace fatui

#if !defined(FATUI_NAME_ONLY)
#include "matrix_tiles.hpp"

namespace fatui {

// The instruction set that runs: Linux may refuse the matrix unit, and FATUI_AMX=0 does.
const char* variant() {
#if defined(FATUI_MATRIX_TILES)
  if (!matrix_tiles_granted()) return "avx512_bf16";
#endif
  return compiled_for;
}
}  // namespace fatui
#endif
