// Device memory from MLX's own allocator, which is not exported: a cast of no elements takes it, and launches nothing.
#pragma once
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/ops.h>

#include "launcher.hpp"

namespace fatui {

// MLX's cast to float16 on a stream, and an array of no elements for it: kept, since making them takes longer than what they do.
struct EmptyCast {
  std::shared_ptr<mx::Primitive> cast;
  std::vector<mx::array> source;

  explicit EmptyCast(mx::Stream stream) : source{mx::array({0}, mx::int8, nullptr, {})} {
    source[0].set_data(mx::allocator::Data(mx::allocator::Buffer(nullptr), {}));
    cast = mx::astype(source[0], mx::float16, stream).primitive_ptr();
  }
};

inline void allocate(mx::array& out, mx::Stream stream) {
  static thread_local std::map<int, EmptyCast> casts;  // by the stream's index
  auto& [cast, source] = casts.try_emplace(stream.index, stream).first->second;
  mx::array::Flags flags{};
  flags.contiguous = flags.row_contiguous = flags.col_contiguous = true;
  source[0].copy_shared_buffer(source[0], mx::Strides{1}, flags, (out.nbytes() + 1) / 2);
  std::vector<mx::array> made{mx::array({0}, mx::float16, cast, {})};
  cast->eval_gpu(source, made);
  if (made[0].buffer().ptr() == nullptr) throw std::runtime_error("MLX returned no device memory");
  flags.col_contiguous = out.size() <= 1 || out.ndim() == 1;
  out.copy_shared_buffer(made[0], out.strides(), flags, out.size());
}

}  // namespace fatui
