// Arrays as kernel arguments: pointers, strides, and tensor maps encoded by the driver on the host.
#pragma once
#include <array>
#include <mutex>

#include "launcher.hpp"

namespace fatui {

constexpr int ALIGNMENT = 16;  // bytes: width of the kernels' vector loads, and required by TMA

inline char* pointer(const mx::array& a) {
  auto buffer = a.buffer();
  return static_cast<char*>(static_cast<mx::cu::CudaBuffer*>(buffer.ptr())->data) + a.offset();
}

// Layout requirements of a kernel on an array, in increasing order: none; contiguous rows, each aligned; for a tensor map also
// no stride of 0; contiguous. An array that does not satisfy them is copied.
enum class Layout { ANY, STRIDED, MAPPED, DENSE };

struct Requirement {
  Layout layout = Layout::ANY;
  int alignment = ALIGNMENT;  // bytes
};

inline bool complies(const mx::array& a, const Requirement& required) {
  if (required.layout == Layout::ANY) return true;
  const bool aligned = reinterpret_cast<uintptr_t>(pointer(a)) % required.alignment == 0;
  if (required.layout == Layout::DENSE) return a.flags().row_contiguous && (a.nbytes() < ALIGNMENT || aligned);
  if (a.ndim() != 4 || (a.shape(3) > 1 && a.strides(3) != 1) || !aligned) return false;
  const int64_t least = required.layout == Layout::MAPPED ? required.alignment : 0;
  for (int axis = 0; axis < 3; axis++) {
    const int64_t bytes = a.strides(axis) * int64_t(a.itemsize());
    if (a.shape(axis) > 1 && (bytes < least || bytes % required.alignment != 0)) return false;
  }
  return true;
}

// TMA box of a (batch, heads, rows, columns) array: rows x columns of one head.
struct Box {
  int rows, columns, swizzle;  // swizzle: 128 bytes, or 0 for none
};

// The tensor map of an argument. It is re-encoded if the strides change, which is rare; otherwise only its address is
// replaced.
class Map {
 public:
  explicit Map(Box box) : box_(box) {}

  // The map of an array whose rows begin at `start`.
  TensorMap of(const mx::array& a, char* start) {
    const std::lock_guard lock(mutex_);
    const std::array<int64_t, 3> strides{a.strides(2), a.strides(1), a.strides(0)};
    if (!made_ || strides != strides_) encode(a, start), strides_ = strides, made_ = true;
    else check(driver().move_map(&map_, start), "cuTensorMapReplaceAddress");
    return map_;
  }

 private:
  static int type_of(const mx::array& a) {  // CUtensorMapDataType values
    if (a.dtype() == mx::bfloat16) return 9;
    if (a.dtype() == mx::float16) return 6;
    if (a.dtype() == mx::float32) return 7;
    if (a.dtype() == mx::uint8) return 0;
    throw std::invalid_argument("[flash_attention] There is no tensor map of this type.");
  }

  void encode(const mx::array& a, char* start) {
    constexpr int NO_INTERLEAVE = 0, SWIZZLE_128 = 3, PROMOTE_128 = 2, FILL_ZEROS = 0;
    const uint64_t sizes[4] = {uint64_t(a.shape(3)), uint64_t(a.shape(2)), uint64_t(a.shape(1)), uint64_t(a.shape(0))};
    const uint32_t box[4] = {uint32_t(box_.columns), uint32_t(box_.rows), 1, 1}, steps[4] = {1, 1, 1, 1};
    uint64_t strides[3];  // bytes, of rows, heads and batch; the driver validates those of axes of length 1 too
    for (int i = 0; i < 3; i++) {
      const uint64_t dense = i == 0 ? sizes[0] * a.itemsize() : strides[i - 1] * sizes[i];
      strides[i] = sizes[i + 1] > 1 ? uint64_t(a.strides(2 - i)) * a.itemsize() : dense;
    }
    check(driver().encode_map(&map_, type_of(a), 4, start, sizes, strides, box, steps, NO_INTERLEAVE,
                              box_.swizzle == 128 ? SWIZZLE_128 : 0, PROMOTE_128, FILL_ZEROS),
          "cuTensorMapEncodeTiled");
  }

  Box box_;
  std::mutex mutex_;
  bool made_ = false;
  std::array<int64_t, 3> strides_{};
  TensorMap map_;
};

}  // namespace fatui
