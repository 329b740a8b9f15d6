// Declarations of the parts of MLX's CUDA backend and of the CUDA driver that launcher.cpp calls: MLX's own header requires
// the CUDA toolkit's headers, which MLX's wheels do not include. If the declarations diverge, the module fails to load.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include <mlx/array.h>
#include <mlx/primitives.h>

struct CUfunc_st;
struct CUmod_st;

struct dim3 {
  unsigned x, y, z;
};

namespace mlx::core::cu {

// Device memory that allocator::Buffer points to in MLX.
struct CudaBuffer {
  void* data;
  size_t size;
  int device;
};

class CommandEncoder {
 public:
  void set_input_array(const array& a);
  void set_output_array(const array& a);
  void add_kernel_node_raw(CUfunc_st* function, dim3 grid, dim3 block, dim3 cluster, uint32_t shared, void** arguments);
  void add_completed_handler(std::function<void()> task);
  void commit();
};

CommandEncoder& get_command_encoder(Stream stream);

class Device {
 public:
  void make_current();
};

Device& device(mlx::core::Device device);

}  // namespace mlx::core::cu

namespace fatui {

namespace mx = mlx::core;

// A CUtensorMap, the TMA descriptor of an array.
struct alignas(64) TensorMap {
  char bytes[128];
};

// Driver functions, resolved at run time. Each returns 0 or an error code.
struct Driver {
  int (*load_module)(CUmod_st**, const void*);
  int (*get_function)(CUfunc_st**, CUmod_st*, const char*);
  int (*set_attribute)(CUfunc_st*, int, int);
  int (*encode_map)(TensorMap*, int type, unsigned rank, void* start, const uint64_t* sizes, const uint64_t* strides,
                    const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill);
  int (*move_map)(TensorMap*, void* start);
  int (*synchronize)();
};

template <typename F>
void find(F& function, const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW);
  void* found = library != nullptr ? dlsym(library, name) : nullptr;
  if (found == nullptr) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
  function = reinterpret_cast<F>(found);
}

inline const Driver& driver() {
  static const Driver made = [] {
    Driver d;
    find(d.load_module, "cuModuleLoadData");
    find(d.get_function, "cuModuleGetFunction");
    find(d.set_attribute, "cuFuncSetAttribute");
    find(d.encode_map, "cuTensorMapEncodeTiled");
    find(d.move_map, "cuTensorMapReplaceAddress");
    find(d.synchronize, "cuCtxSynchronize");
    return d;
  }();
  return made;
}

inline void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + " failed: CUDA error " + std::to_string(status));
}

}  // namespace fatui
