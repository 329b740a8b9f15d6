// Shared by the files of the Python module: calls as MLX's arrays and options, and what they make of the kernel's types.
// They alone include MLX's headers, in place of some of which build.py has shorter ones (`short_headers`).
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "append.hpp"
#include "problem.hpp"

namespace fatui {

namespace mx = mlx::core;
namespace nb = nanobind;
using Arrays = std::vector<mx::array>;
using Axes = std::vector<int>;

// An operation of MLX on the CPU's stream alone.
class CpuOperation : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("The CPU attention kernel runs on MLX's CPU stream only.");
  }
};

// This library was linked without a part that a call needs. Python links one with it, and calls again.
struct MissingPart : std::runtime_error {
  using std::runtime_error::runtime_error;
};
template <class Function>
void require(Function* one_of_the_part, const char* part) {
  if (one_of_the_part == nullptr) throw MissingPart(part);
}

// How keys or values are quantized; none, if they are not.
struct Format {
  Mode mode = Mode::none;
  int32_t bits = 0, group = 0;
  bool has_biases() const { return mode == Mode::affine; }
  int parts() const { return mode == Mode::none ? 0 : has_biases() ? 2 : 1; }  // inputs besides the numbers
  int64_t width(const mx::array& a) const { return mode == Mode::none ? a.shape(3) : int64_t(a.shape(3)) * 32 / bits; }
  bool operator==(const Format&) const = default;
};

struct Options {
  double scale = 1.0;
  float softcap = 0.0f;
  bool causal = false;
  int64_t window = 0, items = 0;
  int64_t list_batches = 0, list_heads = 0;  // planes of the block lists; 0: there are none
  bool masked = false, sloped = false;       // whether there is a mask array, and slopes
  bool logsumexp = false;                    // whether the call returns it; otherwise it has no gradient
  std::array<int64_t, 4> listed{};           // (B, H, Lq, Lk) that the block lists are for
  Format key, value;                         // both quantized, or neither
  int parts() const { return key.parts() + value.parts(); }
  bool operator==(const Options&) const = default;
};

using MaybeArray = std::optional<mx::array>;

// Arrays that a call may have besides q, k and v.
struct Extras {
  MaybeArray mask;                    // broadcasts to (B, H, Lq, Lk)
  MaybeArray offsets, entries, bits;  // block lists, as in BlockLists
  MaybeArray slopes;                  // (H,)
  MaybeArray key_scales, key_biases, value_scales, value_biases;  // of quantized keys and values
};

inline Format format_of(const std::array<int32_t, 3>& f) { return {Mode(f[0]), f[1], f[2]}; }

bool is_floating(mx::Dtype type);
Element element_of(const mx::array& a);
Tensor tensor_of(const mx::array& a);  // strides of an array; an axis of length one is a broadcast
// Of the inputs from `next` on, which is advanced.
Packing packing_of(const Format& format, const Arrays& inputs, size_t& next);
// The inputs after q, k and v, or after those of the backward pass, begin at `next`.
Problem problem_of(const Options& options, const Arrays& inputs, size_t next);
// MLX's allocator does not report a failure.
void check_memory(const mx::array& a, const std::string& operation);
void* allocate(mx::array& out);
std::string text(const mx::Shape& shape);
void require_forward(Element element, int64_t queries, bool quantized);
// Throws std::invalid_argument if types and shapes of q, k and v are not those of a call.
void check(const mx::array& q, const mx::array& k, const mx::array& v, const Format& key, const Format& value);
// Appends the scales and biases of keys or values.
void add_parts(Arrays& inputs, const Format& format, const mx::array& numbers, const MaybeArray& scales,
               const MaybeArray& biases, const std::string& name);

// The operation: validates shapes and dtypes (throws std::invalid_argument); returns {o, statistics, logsumexp}, the last if it is
// requested, statistics if it is or a gradient may be.
std::vector<mx::array> flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, Options options,
                                       const Extras& extras, bool logsumexp);

// Adds the functions of caches.cpp to the Python module.
FATUI_PART void bind_caches(nb::module_& m);

}  // namespace fatui
