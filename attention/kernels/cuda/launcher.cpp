// A plan of kernel launches as one MLX primitive: what mx.fast.precompiled_cuda_kernel does for one kernel, at less cost,
// with memory that passes from kernel to kernel, with tensor maps as arguments, and with strided arrays as they lie.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <random>

#include <mlx/ops.h>

#include "launcher_maps.hpp"

namespace nb = nanobind;

namespace fatui {
namespace {

using Arrays = std::vector<mx::array>;

constexpr int MAX_DYNAMIC_SHARED_SIZE = 8;  // the driver's number of this attribute
constexpr size_t MOST_ARGUMENTS = 48, MOST_MAPS = 8;

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

// ---- plans -------------------------------------------------------------------------------------------------------

// Of an argument: an array's address, its tensor map, the stride of one of its axes in elements, a number, a number that
// no two launches share, or a null pointer.
enum Kind { POINTER, MAP, STRIDE, NUMBER, SERIAL, NOTHING };

struct Argument {
  Kind kind;
  int64_t value;  // which array (inputs first, then outputs), or the number
  int axis;
  std::shared_ptr<Map> map;
};

struct Step {
  CUfunc_st* function;
  unsigned blocks, threads, shared;
  std::vector<int> reads, writes;
  std::vector<Argument> arguments;
};

// Launches for arrays of given shapes; `label` is what the gradient's function is told.
struct Plan {
  std::vector<Step> steps;
  std::vector<Layout> layouts;  // of the inputs
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  Arrays constants;  // inputs after the caller's own
  std::string label;
  std::shared_ptr<const Plan> untraced;  // what runs instead where no gradient can be asked for
};

// ---- memory ------------------------------------------------------------------------------------------------------

// Device memory from MLX's own allocator, which is not exported: a cast of no elements takes it, and launches nothing.
void allocate(mx::array& out, mx::Stream stream) {
  mx::array source({0}, mx::int8, nullptr, {});
  mx::array::Flags flags{};
  flags.contiguous = flags.row_contiguous = flags.col_contiguous = true;
  const size_t halves = (out.nbytes() + 1) / 2;
  source.set_data(mx::allocator::Data(mx::allocator::Buffer(nullptr), {}), halves, mx::Strides{1}, flags);
  Arrays made{mx::astype(source, mx::float16, stream)};
  made[0].primitive().eval_gpu({source}, made);
  if (made[0].buffer().ptr() == nullptr) throw std::runtime_error("MLX hands out no device memory");
  flags.col_contiguous = out.size() <= 1 || out.ndim() == 1;
  out.copy_shared_buffer(made[0], out.strides(), flags, out.size());
}

// A dense copy of an input, alive until the kernels have run.
mx::array copied(const mx::array& a, mx::Stream stream, mx::cu::CommandEncoder& encoder) {
  mx::array view(a.shape(), a.dtype(), nullptr, {});
  auto flags = a.flags();
  flags.row_contiguous = flags.col_contiguous = false;  // lest MLX share the memory, if it is only off the alignment
  view.copy_shared_buffer(a, a.strides(), flags, a.data_size());
  Arrays copy{mx::contiguous(view, false, stream)};
  copy[0].primitive().eval_gpu({view}, copy);
  encoder.add_completed_handler([kept = copy[0]] {});
  return copy[0];
}

// ---- the primitive -----------------------------------------------------------------------------------------------

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
    arrays.reserve(inputs.size() + outputs.size());
    for (size_t i = 0; i < inputs.size(); i++) {
      arrays.push_back(complies(inputs[i], plan_->layouts[i]) ? inputs[i] : copied(inputs[i], stream(), encoder));
    }
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
  static int64_t serial() {
    static std::atomic<int64_t> last{int64_t(std::random_device{}()) << 32};
    return ++last;
  }

  static void launch(const Step& step, const Arrays& arrays, mx::cu::CommandEncoder& encoder) {
    int64_t words[MOST_ARGUMENTS];
    TensorMap maps[MOST_MAPS];
    void* places[MOST_ARGUMENTS];
    size_t n = 0, map = 0;
    for (const Argument& argument : step.arguments) {
      places[n] = &words[n];
      switch (argument.kind) {
        case POINTER: words[n] = reinterpret_cast<int64_t>(pointer(arrays[argument.value])); break;
        case STRIDE: words[n] = arrays[argument.value].strides(argument.axis); break;
        case NUMBER: words[n] = argument.value; break;
        case SERIAL: words[n] = serial(); break;
        case NOTHING: words[n] = 0; break;
        case MAP:
          maps[map] = argument.map->of(arrays[argument.value]);
          places[n] = &maps[map++];
      }
      n++;
    }
    for (const int i : step.reads) encoder.set_input_array(arrays[i]);
    for (const int i : step.writes) encoder.set_output_array(arrays[i]);
    encoder.add_kernel_node_raw(step.function, {step.blocks, 1, 1}, {step.threads, 1, 1}, {1, 1, 1}, step.shared, places);
  }

  std::shared_ptr<const Plan> plan_;
};

// ---- making and calling plans ------------------------------------------------------------------------------------

using ArgumentText = std::vector<int64_t>;  // the kind, and what it takes: see `argument`
using StepText = std::tuple<std::string, nb::bytes, int, int, int, std::vector<int>, std::vector<int>,
                            std::vector<ArgumentText>>;

Argument argument(const ArgumentText& text) {
  Argument made{Kind(text.at(0)), text.size() > 1 ? text[1] : 0, 0, nullptr};
  if (made.kind == STRIDE) made.axis = int(text.at(2));
  if (made.kind == MAP) made.map = std::make_shared<Map>(Box{int(text.at(2)), int(text.at(3)), int(text.at(4))});
  return made;
}

Step step(const StepText& text) {
  const auto& [name, code, blocks, threads, shared, reads, writes, arguments] = text;
  Step made{load(name, code.c_str(), shared), unsigned(blocks), unsigned(threads), unsigned(shared), reads, writes, {}};
  for (const auto& words : arguments) made.arguments.push_back(argument(words));
  const auto maps = std::count_if(made.arguments.begin(), made.arguments.end(), [](auto& a) { return a.kind == MAP; });
  if (made.arguments.size() > MOST_ARGUMENTS || size_t(maps) > MOST_MAPS) {
    throw std::invalid_argument("[flash_attention] A kernel has too many arguments.");
  }
  return made;
}

// What the steps ask of each input. A pointer without strides needs it dense.
std::vector<Layout> layouts_of(const std::vector<Step>& steps, size_t inputs) {
  std::vector<Layout> layouts(inputs, Layout::ANY);
  for (const Step& step : steps) {
    for (size_t i = 0; i < inputs; i++) {
      const auto has = [&](Kind kind) {
        return std::any_of(step.arguments.begin(), step.arguments.end(),
                           [&](const Argument& a) { return a.kind == kind && size_t(a.value) == i; });
      };
      const bool any = std::any_of(step.arguments.begin(), step.arguments.end(), [&](const Argument& a) {
        return a.kind == STRIDE && size_t(a.value) == i && a.axis == 3;  // a kernel that takes even this one
      });
      const Layout asked = has(MAP) ? Layout::MAPPED : any ? Layout::ANY : has(STRIDE) ? Layout::STRIDED : Layout::DENSE;
      if (has(MAP) || has(POINTER)) layouts[i] = std::max(layouts[i], asked);
    }
  }
  return layouts;
}

std::shared_ptr<Plan> make_plan(const std::vector<StepText>& steps, size_t inputs,
                                const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& types,
                                const Arrays& constants, std::string label, std::shared_ptr<const Plan> untraced) {
  auto plan = std::make_shared<Plan>();
  for (const auto& text : steps) plan->steps.push_back(step(text));
  plan->layouts = layouts_of(plan->steps, inputs + constants.size());
  for (const auto& shape : shapes) plan->shapes.emplace_back(shape.begin(), shape.end());
  plan->types = types, plan->constants = constants, plan->label = std::move(label), plan->untraced = std::move(untraced);
  return plan;
}

Arrays run(std::shared_ptr<const Plan> plan, Arrays inputs) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  if (stream.device != mx::Device::gpu) throw std::invalid_argument("[flash_attention] The default device is not a GPU.");
  const bool traced = std::any_of(inputs.begin(), inputs.end(), [](const mx::array& a) { return a.is_tracer(); });
  if (plan->untraced != nullptr && !traced) plan = plan->untraced;
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  return mx::array::make_arrays(plan->shapes, plan->types, std::make_shared<Launches>(stream, plan), inputs);
}
}  // namespace
}  // namespace fatui

// A plan as Python holds it.
struct Handle {
  std::shared_ptr<const fatui::Plan> plan;
};

NB_MODULE(fatui_cuda_launcher, m) {
  nb::class_<Handle>(m, "Plan")
      .def("__call__", [](const Handle& handle, std::vector<mlx::core::array> inputs) {
        return fatui::run(handle.plan, std::move(inputs));
      });
  m.def("make_plan",
        [](const std::vector<fatui::StepText>& steps, size_t inputs, const std::vector<std::vector<int>>& shapes,
           const std::vector<mlx::core::Dtype>& types, const std::vector<mlx::core::array>& constants, std::string label,
           const Handle* untraced) {
          return Handle{fatui::make_plan(steps, inputs, shapes, types, constants, std::move(label),
                                         untraced != nullptr ? untraced->plan : nullptr)};
        },
        nb::arg("steps"), nb::arg("inputs"), nb::arg("shapes"), nb::arg("types"), nb::arg("constants"), nb::arg("label"),
        nb::arg("untraced").none());
  m.def("set_gradient", [](nb::object function) { fatui::gradient_function() = std::move(function); },
        "Told label, primals, cotangents and outputs of a plan, it returns the inputs' gradients.");
}
