// simdgroup_matrix, 8 x 8: each lane holds two elements of a row, where Apple's GPUs hold them.
#pragma once
#include "simdgroups.h"

namespace metal {

template <class T, int COLUMNS, int ROWS>
struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "simdgroup_matrix is 8 x 8");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>, "simdgroup_matrix element type");

  simdgroup_matrix() : elements(T(NAN)) {}  // undefined on the GPU; here whoever reads it sees NaN
  explicit simdgroup_matrix(T diagonal) {
    const int row = gpu::lane_row(gpu::lane()), column = gpu::lane_column(gpu::lane());
    elements = vec<T, 2>(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }
  thread vec<T, 2>& thread_elements() { return elements; }
  const thread vec<T, 2>& thread_elements() const { return elements; }

  vec<T, 2> elements;
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int COLUMNS, int ROWS>
simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, COLUMNS, ROWS> made;
  made.elements = vec<T, 2>(value);
  return made;
}

// Where a lane's first element of a matrix lies in memory, and how far the second lies behind it.
struct InMemory {
  size_t first, step;
  InMemory(ulong pitch, ulong2 origin, bool is_transposed) {
    const size_t row = gpu::lane_row(gpu::lane()), column = gpu::lane_column(gpu::lane());
    first = is_transposed ? (origin.x + column) * pitch + origin.y + row : (origin.y + row) * pitch + origin.x + column;
    step = is_transposed ? pitch : 1;
  }
};

template <class T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& to, const T* from, ulong pitch = 8, ulong2 origin = ulong2(0),
                               bool is_transposed = false, int line = __builtin_LINE()) {
  gpu::meet_whole(gpu::Together::matrix_memory, line);
  const InMemory at(pitch, origin, is_transposed);
  to.elements = vec<T, 2>(from[at.first], from[at.first + at.step]);
}

template <class T>
METAL_FUNC void simdgroup_store(simdgroup_matrix<T, 8, 8> from, T* to, ulong pitch = 8, ulong2 origin = ulong2(0),
                                bool is_transposed = false, int line = __builtin_LINE()) {
  gpu::meet_whole(gpu::Together::matrix_memory, line);
  const InMemory at(pitch, origin, is_transposed);
  to[at.first] = from.elements.x;
  to[at.first + at.step] = from.elements.y;
}

// d = a b + c
template <class D, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c,
                                              int line = __builtin_LINE()) {
  static_assert(is_same_v<A, B> && is_same_v<C, D> && (is_same_v<D, float> || is_same_v<D, A>),
                "simdgroup_multiply_accumulate: only T,T->float and T,T->T are known to exist");
  const gpu::Elements made = gpu::multiply({float(a.elements.x), float(a.elements.y)},
                                           {float(b.elements.x), float(b.elements.y)},
                                           {float(c.elements.x), float(c.elements.y)}, line);
  d.elements = vec<D, 2>(D(made.first), D(made.second));
}
template <class D, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), line);
}

}  // namespace metal
