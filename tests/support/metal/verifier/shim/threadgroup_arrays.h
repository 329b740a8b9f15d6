// Threadgroup arrays: source.py turns each declaration in a kernel's text into a call of the emulated GPU.
#pragma once
#include "types.h"

namespace metal {

// How finely accesses to an array are followed: one element at a time, or bytes where what it is made of is not known.
template <class T>
struct granule_of : std::integral_constant<size_t, std::is_arithmetic_v<T> ? sizeof(T) : 1> {};
template <>
struct granule_of<half> : std::integral_constant<size_t, sizeof(half)> {};
template <>
struct granule_of<bfloat> : std::integral_constant<size_t, sizeof(bfloat)> {};
template <class T, int N>
struct granule_of<vec<T, N>> : granule_of<T> {};

template <class Array>
Array& threadgroup_array(const char* name, int line) {
  constexpr size_t granule = granule_of<std::remove_all_extents_t<Array>>::value;
  return *static_cast<Array*>(gpu::threadgroup_array(name, sizeof(Array), alignof(Array), granule, line));
}

}  // namespace metal
