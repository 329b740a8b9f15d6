// Attention as MLX primitives: lazy, on MLX's CPU stream, differentiable, without copies.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/primitives.h>

#include "problem.hpp"

namespace fatui {

namespace mx = mlx::core;

struct Options {
  double scale = 1.0;
  float softcap = 0.0f;
  bool causal = false;
  int64_t window = 0, items = 0;
  int64_t list_batches = 0, list_heads = 0;  // planes of the block lists; 0: there are none
  bool masked = false, sloped = false;       // whether there is a mask array, and slopes
  bool operator==(const Options&) const = default;
};

// Arrays that a call may have besides q, k and v.
struct Extras {
  std::optional<mx::array> mask;                   // broadcasts to (B, H, Lq, Lk)
  std::optional<mx::array> offsets, entries, bits;  // block lists, as in BlockLists
  std::optional<mx::array> slopes;                 // (H,)
};

// Inputs q, k, v and optionally a 4-D mask, three arrays of block lists, 2-D slopes; outputs o and, if a gradient may be requested, logsumexp and statistics
// (B, H, Lq, 3), which only the backward pass uses.
class FlashForward : public mx::Primitive {
 public:
  FlashForward(mx::Stream stream, Options options) : mx::Primitive(stream), options_(options) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "FatuiFlashAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  Options options_;
};

// Inputs q, k, v, o, statistics, the gradients of o and logsumexp, and the optional ones of the forward pass; outputs dq, dk, dv.
class FlashBackward : public mx::Primitive {
 public:
  FlashBackward(mx::Stream stream, Options options) : mx::Primitive(stream), options_(options) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "FatuiFlashAttentionGradient"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  Options options_;
};

// The operation: validates shapes and dtypes (throws std::invalid_argument); returns {o, logsumexp, statistics}, or only {o}
// if neither the logsumexp nor a gradient is requested.
std::vector<mx::array> flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, Options options,
                                       const Extras& extras, bool logsumexp);

}  // namespace fatui
