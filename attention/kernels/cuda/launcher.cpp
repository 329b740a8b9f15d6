// A plan of kernel launches as one MLX primitive: what mx.fast.precompiled_cuda_kernel does for one kernel, at less cost, and
// with memory that passes from kernel to kernel.
#include "launcher.hpp"

#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include <mlx/ops.h>

namespace nb = nanobind;

namespace fatui {
namespace {

using Arrays = std::vector<mx::array>;

constexpr int MAX_DYNAMIC_SHARED_SIZE = 8;  // the driver's number of this attribute
constexpr int ALIGNMENT = 16;               // bytes: kernels load so many at once

// ---- the driver --------------------------------------------------------------------------------------------------

template <typename F>
void find(F& function, const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW);
  void* found = library != nullptr ? dlsym(library, name) : nullptr;
  if (found == nullptr) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
  function = reinterpret_cast<F>(found);
}

const Driver& driver() {
  static const Driver made = [] {
    Driver d;
    find(d.load_module, "cuModuleLoadData");
    find(d.get_function, "cuModuleGetFunction");
    find(d.set_attribute, "cuFuncSetAttribute");
    return d;
  }();
  return made;
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + " failed: CUDA error " + std::to_string(status));
}

// A kernel of a cubin, loaded once a process; names tell them apart.
CUfunc_st* load(const std::string& name, const char* code, int shared) {
  static std::map<std::string, CUfunc_st*> loaded;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  CUfunc_st*& function = loaded[name];
  if (function == nullptr) {
    mx::cu::device(mx::default_device()).make_current();  // a thread of its own may have no context yet
    CUmod_st* module = nullptr;
    check(driver().load_module(&module, code), "cuModuleLoadData");
    check(driver().get_function(&function, module, name.c_str()), "cuModuleGetFunction");
    if (shared > 0) check(driver().set_attribute(function, MAX_DYNAMIC_SHARED_SIZE, shared), "cuFuncSetAttribute");
  }
  return function;
}

// ---- arrays ------------------------------------------------------------------------------------------------------

char* pointer(const mx::array& a) {
  auto buffer = a.buffer();
  return static_cast<char*>(static_cast<mx::cu::CudaBuffer*>(buffer.ptr())->data) + a.offset();
}

// Evaluates an operation of one input now, in the midst of another's evaluation.
void evaluate(mx::array& out, const mx::array& input) {
  Arrays outputs{out};
  out.primitive().eval_gpu({input}, outputs);
}

// Device memory from MLX's own allocator, which is not exported: a cast of no elements takes it, and launches nothing.
void allocate(mx::array& out, mx::Stream stream) {
  mx::array source({0}, mx::int8, nullptr, {});
  mx::array::Flags flags{};
  flags.contiguous = flags.row_contiguous = flags.col_contiguous = true;
  const size_t halves = (out.nbytes() + 1) / 2;
  source.set_data(mx::allocator::Data(mx::allocator::Buffer(nullptr), {}), halves, mx::Strides{1}, flags);
  mx::array made = mx::astype(source, mx::float16, stream);
  evaluate(made, source);
  if (made.buffer().ptr() == nullptr) throw std::runtime_error("MLX hands out no device memory");
  flags = out.flags();
  flags.contiguous = flags.row_contiguous = true;
  flags.col_contiguous = out.size() <= 1 || out.ndim() == 1;
  out.copy_shared_buffer(made, out.strides(), flags, out.size());
}

// Whether kernels can read an array as it lies: dense and, unless no kernel would load ALIGNMENT bytes of it, aligned.
bool is_ready(const mx::array& a) {
  const bool aligned = a.nbytes() < ALIGNMENT || reinterpret_cast<uintptr_t>(pointer(a)) % ALIGNMENT == 0;
  return a.flags().row_contiguous && aligned;
}

// ---- plans -------------------------------------------------------------------------------------------------------

enum Kind { READ, WRITE, UPDATE, NUMBER };
using Argument = std::tuple<int, int>;  // a kind, and an array (inputs first, then outputs) or the number

struct Step {
  CUfunc_st* function;
  unsigned blocks, threads, shared;
  std::vector<Argument> arguments;
};

// Launches for arrays of given shapes; `label` is what the gradient's function is told.
struct Plan {
  std::vector<Step> steps;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  Arrays constants;  // inputs after the caller's own
  std::string label;
};

nb::object& gradient_function() {
  static auto* function = new nb::object();  // never freed: Python may be gone by then
  return *function;
}

class Launches : public mx::Primitive {
 public:
  Launches(mx::Stream stream, std::shared_ptr<const Plan> plan) : mx::Primitive(stream), plan_(std::move(plan)) {}

  void eval_cpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("The CUDA attention kernels run on MLX's GPU streams only.");
  }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cu::get_command_encoder(stream());
    Arrays arrays;
    for (const auto& a : inputs) arrays.push_back(is_ready(a) ? a : copied(a, encoder));
    for (auto& out : outputs) {
      allocate(out, stream());
      arrays.push_back(out);
    }
    for (const Step& step : plan_->steps) launch(step, arrays, encoder);
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const nb::gil_scoped_acquire held;
    if (plan_->label.empty()) throw std::invalid_argument("[flash_attention] There is no second derivative.");
    const auto made = nb::cast<Arrays>(gradient_function()(plan_->label, primals, cotangents, outputs));
    Arrays wanted;
    for (const int n : argnums) wanted.push_back(made.at(n));
    return wanted;
  }

  const char* name() const override { return "FatuiCudaKernels"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto* same = dynamic_cast<const Launches*>(&other);
    return same != nullptr && same->plan_ == plan_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays&) override { return plan_->shapes; }

 private:
  mx::array copied(const mx::array& a, mx::cu::CommandEncoder& encoder) {
    mx::array view(a.shape(), a.dtype(), nullptr, {});
    auto flags = a.flags();
    flags.row_contiguous = flags.col_contiguous = false;  // lest MLX share the memory, if it is only off the alignment
    view.copy_shared_buffer(a, a.strides(), flags, a.data_size());
    mx::array copy = mx::contiguous(view, false, stream());
    evaluate(copy, view);
    encoder.add_completed_handler([copy] {});  // alive until then
    return copy;
  }

  void launch(const Step& step, const Arrays& arrays, mx::cu::CommandEncoder& encoder) const {
    std::vector<void*> places(step.arguments.size()), arguments(step.arguments.size());
    std::vector<int> numbers(step.arguments.size());
    for (size_t i = 0; i < step.arguments.size(); i++) {
      const auto [kind, value] = step.arguments[i];
      if (kind == NUMBER) {
        numbers[i] = value;
        arguments[i] = &numbers[i];
        continue;
      }
      if (kind == READ) encoder.set_input_array(arrays[value]);
      else encoder.set_output_array(arrays[value]);
      places[i] = pointer(arrays[value]);
      arguments[i] = &places[i];
    }
    encoder.add_kernel_node_raw(step.function, {step.blocks, 1, 1}, {step.threads, 1, 1}, {1, 1, 1}, step.shared,
                                arguments.data());
  }

  std::shared_ptr<const Plan> plan_;
};

using StepText = std::tuple<std::string, nb::bytes, int, int, int, std::vector<Argument>>;

std::shared_ptr<Plan> make_plan(const std::vector<StepText>& steps, const std::vector<std::vector<int>>& shapes,
                                const std::vector<mx::Dtype>& types, const Arrays& constants, std::string label) {
  auto plan = std::make_shared<Plan>();
  for (const auto& [name, code, blocks, threads, shared, arguments] : steps) {
    CUfunc_st* function = load(name, code.c_str(), shared);
    plan->steps.push_back({function, unsigned(blocks), unsigned(threads), unsigned(shared), arguments});
  }
  for (const auto& shape : shapes) plan->shapes.emplace_back(shape.begin(), shape.end());
  plan->types = types, plan->constants = constants, plan->label = std::move(label);
  return plan;
}

Arrays run(const std::shared_ptr<Plan>& plan, Arrays inputs) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  if (stream.device != mx::Device::gpu) throw std::invalid_argument("[flash_attention] The default device is not a GPU.");
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  return mx::array::make_arrays(plan->shapes, plan->types, std::make_shared<Launches>(stream, plan), inputs);
}
}  // namespace
}  // namespace fatui

// A plan as Python holds it.
struct Handle {
  std::shared_ptr<fatui::Plan> plan;
};

NB_MODULE(fatui_cuda_launcher, m) {
  nb::class_<Handle>(m, "Plan")
      .def("__call__", [](const Handle& handle, std::vector<mlx::core::array> inputs) {
        return fatui::run(handle.plan, std::move(inputs));
      });
  m.def("make_plan", [](const std::vector<fatui::StepText>& steps, const std::vector<std::vector<int>>& shapes,
                        const std::vector<mlx::core::Dtype>& types, const std::vector<mlx::core::array>& constants,
                        std::string label) {
    return Handle{fatui::make_plan(steps, shapes, types, constants, std::move(label))};
  });
  m.def("set_gradient", [](nb::object function) { fatui::gradient_function() = std::move(function); },
        "Told label, primals, cotangents and outputs of a plan, it returns the inputs' gradients.");
}
