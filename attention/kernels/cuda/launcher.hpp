// What launcher.cpp calls of MLX's CUDA backend and of the CUDA driver, declared here: MLX's own header of it asks for the
// CUDA toolkit's headers, which users of MLX's wheels do not have. Should the two ever disagree, the module does not load.
#pragma once
#include <cstdint>
#include <functional>

#include <mlx/array.h>
#include <mlx/primitives.h>

struct CUfunc_st;
struct CUmod_st;

struct dim3 {
  unsigned x, y, z;
};

namespace mlx::core::cu {

// Device memory as MLX keeps it behind allocator::Buffer.
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

// The driver's functions, found at run time. Each returns 0 or an error's number.
struct Driver {
  int (*load_module)(CUmod_st**, const void*);
  int (*get_function)(CUfunc_st**, CUmod_st*, const char*);
  int (*set_attribute)(CUfunc_st*, int, int);
};

}  // namespace fatui
