// The machine's intrinsics. Of GCC's, without AVX-512, only those of AVX2: the headers of AVX-512 take longer to read than a file
// of the kernel to compile. If that fails, build.py compiles again with FATUI_WHOLE_HEADERS.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__) && defined(__FMA__) && \
    defined(__F16C__) && !defined(__AVX512F__) && !defined(FATUI_WHOLE_HEADERS)
#define _IMMINTRIN_H_INCLUDED  // which the headers that <immintrin.h> consists of ask for
#include <smmintrin.h>
#include <avxintrin.h>
#include <avx2intrin.h>
#if defined(__AVXVNNI__)
#include <avxvnniintrin.h>
#endif
#include <f16cintrin.h>
#include <fmaintrin.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
