// Measured peaks of the machine (FLOP/s and bandwidth), in the same process as the kernels.
#pragma once
#include <cstdint>

namespace fatui {

struct Memory {
  const void* data;
  int64_t bytes;
};

double fma_peak();                            // FLOP/s, float32 multiply-adds in registers, all threads at once
double read_bandwidth(Memory a, Memory b);    // bytes/s of a plain read loop over both, all threads

}  // namespace fatui
