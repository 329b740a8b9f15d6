// simdgroup_matrix, 8 x 8, two elements a lane in the lay-out of Apple's GPUs.
#pragma once
#include "simdgroups.h"

namespace metal {
template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "simdgroup_matrix is 8x8");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>, "simdgroup_matrix element type");
  vec<T, 2> t;
  simdgroup_matrix() { t = vec<T, 2>(T(NAN)); }  // undefined on the GPU; NaN here so that use shows
  explicit simdgroup_matrix(T v) {
    int l = rt_lane(), r = (l / 4 & 4) + l / 2 % 4, c = (l / 4 & 2) * 2 + l % 2 * 2;
    t = vec<T, 2>(r == c ? v : T(0), r == c + 1 ? v : T(0));
  }  // diagonal
  thread vec<T, 2>& thread_elements() { return t; }
  const thread vec<T, 2>& thread_elements() const { return t; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int C, int R>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> m;
  m.t = vec<T, 2>(v);
  return m;
}
template <class T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, const T* src, ulong ld = 8, ulong2 o = ulong2(0),
                               bool tr = false, int L = __builtin_LINE()) {
  rt_collective(L);
  int l = rt_lane(), r = (l / 4 & 4) + l / 2 % 4, c = (l / 4 & 2) * 2 + l % 2 * 2;
  if (!tr) {
    const T* p = src + (o.y + r) * ld + o.x + c;
    d.t = vec<T, 2>(p[0], p[1]);
  } else {
    const T* p = src + (o.x + c) * ld + o.y + r;
    d.t = vec<T, 2>(p[0], p[ld]);
  }
}
template <class T>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> a, T* dst, ulong ld = 8, ulong2 o = ulong2(0),
                                bool tr = false, int L = __builtin_LINE()) {
  rt_collective(L);
  int l = rt_lane(), r = (l / 4 & 4) + l / 2 % 4, c = (l / 4 & 2) * 2 + l % 2 * 2;
  if (!tr) {
    T* p = dst + (o.y + r) * ld + o.x + c;
    p[0] = a.t.x;
    p[1] = a.t.y;
  } else {
    T* p = dst + (o.x + c) * ld + o.y + r;
    p[0] = a.t.x;
    p[ld] = a.t.y;
  }
}
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                   int L = __builtin_LINE()) {
  static_assert(is_same_v<A, B> && is_same_v<C, D> && (is_same_v<D, float> || is_same_v<D, A>),
                "simdgroup_multiply_accumulate: only T,T->float and T,T->T are known to exist");
  float av[2] = {(float)a.t.x, (float)a.t.y}, bv[2] = {(float)b.t.x, (float)b.t.y},
        cv[2] = {(float)c.t.x, (float)c.t.y}, dv[2];
  rt_mma(av, bv, cv, dv, L);
  d.t = vec<D, 2>(D(dv[0]), D(dv[1]));
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                        const simdgroup_matrix<B, 8, 8>& b, int L = __builtin_LINE()) {
  simdgroup_matrix<D, 8, 8> z;
  z.t = vec<D, 2>(D(0));
  simdgroup_multiply_accumulate(d, a, b, z, L);
}
}  // namespace metal
