// Arrays in a layout that MLX's own CUDA code takes: passed on as they lie, or copied.
#pragma once
#include <vector>

#include <mlx/ops.h>

#include "launcher.hpp"

namespace fatui {

using Arrays = std::vector<mx::array>;

// A dense copy of an input, alive until the kernels have run.
inline mx::array copied(const mx::array& a, mx::Stream stream, mx::cu::CommandEncoder& encoder) {
  mx::array view(a.shape(), a.dtype(), nullptr, {});
  auto flags = a.flags();
  flags.row_contiguous = flags.col_contiguous = false;  // else MLX shares memory that is only off the alignment
  view.copy_shared_buffer(a, a.strides(), flags, a.data_size());
  Arrays copy{mx::contiguous(view, false, stream)};
  copy[0].primitive().eval_gpu({view}, copy);
  encoder.add_completed_handler([kept = copy[0]] {});
  return copy[0];
}

// Whether MLX's SDPA takes an array as it lies. cuDNN takes columns side by side and no axis backwards; outputs and gradients
// are laid out as the inputs are, whatever a stride of 0 makes of that; and decoding divides by the stride of the keys.
inline bool suits_sdpa(const mx::array& a) {
  const int last = int(a.ndim()) - 1;
  for (int axis = 0; axis <= last; axis++) {
    if (a.shape(axis) > 1 && (a.strides(axis) <= 0 || (axis == last && a.strides(axis) != 1))) return false;
  }
  return true;
}

// Returns an array, in memory of its own where `suits_sdpa` says no; its gradient is laid out too.
//
// Under vmap MLX replaces its fused attention by separate operations, whose scores overflow in float16. So what is `given` to
// it becomes float32 there, and what it returns becomes the type that it had.
class LaidOut : public mx::Primitive {
 public:
  LaidOut(mx::Stream stream, mx::Dtype type, bool given) : mx::Primitive(stream), type_(type), given_(given) {}

  static mx::array of(const mx::array& a, mx::Stream stream, bool given) {
    return mx::array(a.shape(), a.dtype(), std::make_shared<LaidOut>(stream, a.dtype(), given), {a});
  }

  void eval_cpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("Arrays are laid out on MLX's GPU streams only.");
  }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    const mx::array& a = inputs[0];
    outputs[0].copy_shared_buffer(suits_sdpa(a) ? a : copied(a, stream(), mx::cu::get_command_encoder(stream())));
  }

  Arrays vjp(const Arrays&, const Arrays& cotangents, const std::vector<int>&, const Arrays&) override {
    return {of(cotangents[0], stream(), !given_)};
  }

  Arrays jvp(const Arrays&, const Arrays& tangents, const std::vector<int>&) override { return tangents; }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    const bool widens = given_ && inputs[0].dtype() == mx::float16;
    return {{of(mx::astype(inputs[0], widens ? mx::float32 : type_, stream()), stream(), given_)}, axes};
  }

  const char* name() const override { return "FatuiLaidOut"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto* same = dynamic_cast<const LaidOut*>(&other);
    return same != nullptr && same->type_ == type_ && same->given_ == given_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override { return {inputs[0].shape()}; }

 private:
  mx::Dtype type_;
  bool given_;
};

inline Arrays laid_out(Arrays arrays, bool given) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  for (mx::array& a : arrays) {
    const bool known = a.status() == mx::array::Status::available && !a.is_tracer();
    if (!known || !suits_sdpa(a)) a = LaidOut::of(a, stream, given);
  }
  return arrays;
}

}  // namespace fatui
