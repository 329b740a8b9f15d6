// Declarations only: lets clang's C++-for-OpenCL front end check MSL's address spaces. device=__global,
// threadgroup=__local, constant=__constant, thread=__private.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_non_portable_kernel_param_types : enable
#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
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
  ushort b;
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
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define VT(T)             \
  typedef vec<T, 2> T##2; \
  typedef vec<T, 3> T##3; \
  typedef vec<T, 4> T##4;
VT(float)
VT(half) VT(int) VT(uint) VT(short) VT(ushort) VT(long) VT(ulong) VT(uchar) template <bool B, class T = void>
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
#define F1(n)     \
  float n(float); \
  half n(half);   \
  bfloat n(bfloat);
#define MATH \
  F1(exp)    \
  F1(exp2) F1(log) F1(log2) F1(sqrt) F1(rsqrt) F1(floor) F1(ceil) F1(abs) F1(tanh) float fma(float, float, float);
MATH namespace fast {
  MATH
}
namespace precise {
MATH
}
#define MM(T)  \
  T max(T, T); \
  T min(T, T); \
  T clamp(T, T, T);
MM(int)
MM(uint) MM(short) MM(ushort) MM(long) MM(ulong) MM(float) MM(half) MM(bfloat) enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4
};
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
bool simd_any(bool);
bool simd_all(bool);
template <class T>
struct pair2 {
  T a[2];
  T& operator[](int);
  const T& operator[](int) const;
};
template <class T, int C, int R>
struct simdgroup_matrix {
  T t[2];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread pair2<T>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
#define LS(as)                                                                                          \
  template <class T>                                                                                    \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const as T* src, ulong ld = 8, ulong2 o = 0, \
                      bool tr = false);                                                                 \
  template <class T>                                                                                    \
  void simdgroup_store(simdgroup_matrix<T, 8, 8> d, as T* dst, ulong ld = 8, ulong2 o = 0, bool tr = false);
LS(device)
LS(threadgroup) template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&, thread simdgroup_matrix<A, 8, 8>&,
                                   thread simdgroup_matrix<B, 8, 8>&, thread simdgroup_matrix<C, 8, 8>&);
}  // namespace metal
using namespace metal;
template <class V, class... A>
V msl_make(A... a);
#define float2(...) msl_make<float2>(__VA_ARGS__)
#define float3(...) msl_make<float3>(__VA_ARGS__)
#define float4(...) msl_make<float4>(__VA_ARGS__)
#define half2(...) msl_make<half2>(__VA_ARGS__)
#define half3(...) msl_make<half3>(__VA_ARGS__)
#define half4(...) msl_make<half4>(__VA_ARGS__)
#define int2(...) msl_make<int2>(__VA_ARGS__)
#define int3(...) msl_make<int3>(__VA_ARGS__)
#define int4(...) msl_make<int4>(__VA_ARGS__)
#define uint2(...) msl_make<uint2>(__VA_ARGS__)
#define uint3(...) msl_make<uint3>(__VA_ARGS__)
#define uint4(...) msl_make<uint4>(__VA_ARGS__)
#define short2(...) msl_make<short2>(__VA_ARGS__)
#define short3(...) msl_make<short3>(__VA_ARGS__)
#define short4(...) msl_make<short4>(__VA_ARGS__)
#define ushort2(...) msl_make<ushort2>(__VA_ARGS__)
#define ushort3(...) msl_make<ushort3>(__VA_ARGS__)
#define ushort4(...) msl_make<ushort4>(__VA_ARGS__)
#define long2(...) msl_make<long2>(__VA_ARGS__)
#define long3(...) msl_make<long3>(__VA_ARGS__)
#define long4(...) msl_make<long4>(__VA_ARGS__)
#define ulong2(...) msl_make<ulong2>(__VA_ARGS__)
#define ulong3(...) msl_make<ulong3>(__VA_ARGS__)
#define ulong4(...) msl_make<ulong4>(__VA_ARGS__)
#define uchar2(...) msl_make<uchar2>(__VA_ARGS__)
#define uchar3(...) msl_make<uchar3>(__VA_ARGS__)
#define uchar4(...) msl_make<uchar4>(__VA_ARGS__)
typedef half float16_t;
typedef bfloat bfloat16_t;
