// Declarations of Metal's library for clang's front end of C++ for OpenCL, so that it checks address spaces: nothing here
// is defined or run. device is __global there, threadgroup __local, constant __constant, and thread __private.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_non_portable_kernel_param_types : enable
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef ulong size_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;

struct bfloat {
  ushort bits;
  bfloat() = default;
  explicit bfloat(float);
  explicit bfloat(half);
  explicit bfloat(int);
  explicit bfloat(uint);
  operator float() const;
  operator float() const __global;
  operator float() const __local;
  operator float() const __constant;
};
bfloat operator+(bfloat, bfloat);
bfloat operator-(bfloat, bfloat);
bfloat operator*(bfloat, bfloat);
bfloat operator/(bfloat, bfloat);
typedef half float16_t;
typedef bfloat bfloat16_t;

template <class To, class From>
To as_type(From);

namespace metal {

template <bool CONDITION, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <class A, class B>
struct is_same {
  enum { value = 0 };
};
template <class A>
struct is_same<A, A> {
  enum { value = 1 };
};
#define is_same_v(...) is_same<__VA_ARGS__>::value

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define NAMED(T)             \
  typedef vec<T, 2> T##2;    \
  typedef vec<T, 3> T##3;    \
  typedef vec<T, 4> T##4;
NAMED(float)
NAMED(half)
NAMED(int)
NAMED(uint)
NAMED(short)
NAMED(ushort)
NAMED(long)
NAMED(ulong)
NAMED(uchar)
#undef NAMED

#define OF_ONE(name)   \
  float name(float);   \
  half name(half);     \
  bfloat name(bfloat);
#define FUNCTIONS                  \
  OF_ONE(exp)                      \
  OF_ONE(exp2)                     \
  OF_ONE(log)                      \
  OF_ONE(log2)                     \
  OF_ONE(sqrt)                     \
  OF_ONE(rsqrt)                    \
  OF_ONE(floor)                    \
  OF_ONE(ceil)                     \
  OF_ONE(abs)                      \
  OF_ONE(tanh)                     \
  float fma(float, float, float);
FUNCTIONS
namespace fast {
FUNCTIONS
}
namespace precise {
FUNCTIONS
}
#undef OF_ONE
#undef FUNCTIONS

#define OF_NUMBERS(T)  \
  T max(T, T);         \
  T min(T, T);         \
  T clamp(T, T, T);
OF_NUMBERS(int)
OF_NUMBERS(uint)
OF_NUMBERS(short)
OF_NUMBERS(ushort)
OF_NUMBERS(long)
OF_NUMBERS(ulong)
OF_NUMBERS(float)
OF_NUMBERS(half)
OF_NUMBERS(bfloat)
#undef OF_NUMBERS

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T>
T simd_shuffle(T, ushort);
template <class T>
T simd_shuffle_xor(T, ushort);
template <class T>
T simd_shuffle_down(T, ushort);
template <class T>
T simd_shuffle_up(T, ushort);
template <class T>
T simd_broadcast(T, ushort);
template <class T>
T simd_broadcast_first(T);
template <class T>
T simd_sum(T);
template <class T>
T simd_max(T);
template <class T>
T simd_min(T);
template <class T>
T simd_and(T);
template <class T>
T simd_or(T);
bool simd_any(bool);
bool simd_all(bool);

template <class T>
struct Elements {
  T of[2];
  T& operator[](int);
  const T& operator[](int) const;
};
template <class T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
  T elements[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread Elements<T>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;

template <class T, int COLUMNS, int ROWS>
simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T);

#define IN_MEMORY(space)                                                                                             \
  template <class T>                                                                                                 \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& to, const space T* from, ulong pitch = 8, ulong2 origin = 0, \
                      bool is_transposed = false);                                                                   \
  template <class T>                                                                                                 \
  void simdgroup_store(simdgroup_matrix<T, 8, 8> from, space T* to, ulong pitch = 8, ulong2 origin = 0,              \
                       bool is_transposed = false);
IN_MEMORY(device)
IN_MEMORY(threadgroup)
#undef IN_MEMORY

template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&, thread simdgroup_matrix<A, 8, 8>&,
                                   thread simdgroup_matrix<B, 8, 8>&, thread simdgroup_matrix<C, 8, 8>&);

}  // namespace metal
using namespace metal;

// MSL makes a vector as float2(x, y), which OpenCL takes for a cast of (x, y).
template <class Vector, class... Values>
Vector vector_of(Values... values);
#define float2(...) vector_of<float2>(__VA_ARGS__)
#define float3(...) vector_of<float3>(__VA_ARGS__)
#define float4(...) vector_of<float4>(__VA_ARGS__)
#define half2(...) vector_of<half2>(__VA_ARGS__)
#define half3(...) vector_of<half3>(__VA_ARGS__)
#define half4(...) vector_of<half4>(__VA_ARGS__)
#define int2(...) vector_of<int2>(__VA_ARGS__)
#define int3(...) vector_of<int3>(__VA_ARGS__)
#define int4(...) vector_of<int4>(__VA_ARGS__)
#define uint2(...) vector_of<uint2>(__VA_ARGS__)
#define uint3(...) vector_of<uint3>(__VA_ARGS__)
#define uint4(...) vector_of<uint4>(__VA_ARGS__)
#define ulong2(...) vector_of<ulong2>(__VA_ARGS__)
