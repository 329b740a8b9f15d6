// What the machine can do, measured in the same process as the kernels.
#pragma once
#include <cstdint>

namespace fatui {

double fma_peak();                       // FLOP/s, float32 multiply-adds in registers, all threads
double read_bandwidth(int64_t bytes);    // bytes/s, a plain read loop, all threads

}  // namespace fatui
