// Plans (launches for arrays of given shapes), and their conversion from Python.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <random>

#include "launcher_maps.hpp"
#include "launcher_scratch.hpp"

namespace fatui {

namespace nb = nanobind;
using Arrays = std::vector<mx::array>;

constexpr int MAX_DYNAMIC_SHARED_SIZE = 8;  // CUfunction_attribute value
constexpr size_t MAX_ARGUMENTS = 64, MAX_MAPS = 8;

// A kernel of a cubin, loaded once per process and cached by name.
inline CUfunc_st* load(const std::string& name, const char* code, int shared) {
  static std::map<std::string, CUfunc_st*> loaded;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  CUfunc_st*& function = loaded[name];
  if (function == nullptr) {
    mx::cu::device(mx::default_device()).make_current();  // a new thread may have no current context
    CUmod_st* module = nullptr;
    check(driver().load_module(&module, code), "cuModuleLoadData");
    check(driver().get_function(&function, module, name.c_str()), "cuModuleGetFunction");
    if (shared > 0) check(driver().set_attribute(function, MAX_DYNAMIC_SHARED_SIZE, shared), "cuFuncSetAttribute");
  }
  return function;
}

// Kind of an argument: address of an array, its tensor map, the stride of one of its axes in elements, a number, the serial
// number of the launch, a null pointer, a number that each call passes, scratch of so many bytes, or the length of one of an
// array's axes.
enum Kind { POINTER, MAP, STRIDE, NUMBER, SERIAL, NOTHING, PASSED, SCRATCH, LENGTH };

struct Argument {
  Kind kind;
  int64_t value;  // index of the array (inputs first, then outputs), the number, its index among those passed, or bytes
  int axis;
  int alignment;  // of the rows of an array whose strides are passed, in bytes
  int batch, head;  // at which the array begins for the kernel
  std::shared_ptr<Map> map;
};

struct Step {
  CUfunc_st* function;
  unsigned blocks, threads, shared;
  std::vector<int> reads, writes;
  std::vector<Argument> arguments;
};

// Launches for arrays of given shapes; `label` identifies the plan in the Python callbacks for gradient and vmap.
struct Plan {
  std::vector<Step> steps;
  std::vector<Requirement> layouts;  // of the inputs
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> types;
  Arrays constants;  // inputs appended to the caller's
  std::string label;
  std::shared_ptr<const Plan> untraced;  // plan used instead where no gradient can be requested
};

// ---- launching ----------------------------------------------------------------------------------------------------

inline int64_t serial() {
  static std::atomic<int64_t> last{int64_t(std::random_device{}()) << 32};
  return ++last;
}

// Along an axis in elements: an axis of length 1, of which a kernel may take a longer one, broadcasts.
inline int64_t stride(const mx::array& a, int axis) { return a.shape(axis) == 1 ? 0 : a.strides(axis); }

// Where an array begins for a kernel; slopes have heads alone.
inline char* beginning(const mx::array& a, const Argument& argument) {
  if (argument.batch == 0 && argument.head == 0) return pointer(a);
  const int64_t elements = a.ndim() == 1 ? argument.head * stride(a, 0)
                                         : argument.batch * stride(a, 0) + argument.head * stride(a, 1);
  return pointer(a) + elements * int64_t(a.itemsize());
}

// Queues a kernel; `passed` are the numbers of this call.
inline void launch(const Step& step, const Arrays& arrays, const std::vector<int64_t>& passed, mx::Stream stream,
                   mx::cu::CommandEncoder& encoder) {
  int64_t words[MAX_ARGUMENTS];
  TensorMap maps[MAX_MAPS];
  void* places[MAX_ARGUMENTS];
  size_t n = 0, map = 0;
  for (const Argument& argument : step.arguments) {
    places[n] = &words[n];
    switch (argument.kind) {
      case POINTER: words[n] = reinterpret_cast<int64_t>(beginning(arrays[argument.value], argument)); break;
      case STRIDE: words[n] = stride(arrays[argument.value], argument.axis); break;
      case NUMBER: words[n] = argument.value; break;
      case SERIAL: words[n] = serial(); break;
      case NOTHING: words[n] = 0; break;
      case PASSED: words[n] = passed.at(argument.value); break;
      case LENGTH: words[n] = arrays[argument.value].shape(argument.axis); break;
      case SCRATCH: {
        const mx::array& room = scratch(size_t(argument.value), stream, encoder);
        encoder.set_output_array(room);
        words[n] = reinterpret_cast<int64_t>(pointer(room));
        break;
      }
      case MAP:
        maps[map] = argument.map->of(arrays[argument.value], beginning(arrays[argument.value], argument));
        places[n] = &maps[map++];
    }
    n++;
  }
  for (const int i : step.reads) encoder.set_input_array(arrays[i]);
  for (const int i : step.writes) encoder.set_output_array(arrays[i]);
  encoder.add_kernel_node_raw(step.function, {step.blocks, 1, 1}, {step.threads, 1, 1}, {1, 1, 1}, step.shared, places);
}

// ---- conversion from Python ---------------------------------------------------------------------------------------

using ArgumentText = std::vector<int64_t>;  // the kind and its operands: see `argument`
using StepText = std::tuple<std::string, nb::bytes, int, int, int, std::vector<int>, std::vector<int>,
                            std::vector<ArgumentText>>;

inline Argument argument(const ArgumentText& text) {
  Argument made{Kind(text.at(0)), text.size() > 1 ? text[1] : 0, 0, ALIGNMENT, 0, 0, nullptr};
  const size_t first = made.kind == MAP ? 5 : 2;  // operand, if there are so many
  if ((made.kind == POINTER || made.kind == MAP) && text.size() > first) {
    made.batch = int(text[first]), made.head = int(text.at(first + 1));
  }
  if (made.kind == STRIDE || made.kind == LENGTH) made.axis = int(text.at(2));
  if (made.kind == STRIDE && text.size() > 3) made.alignment = int(text[3]);
  if (made.kind == MAP) made.map = std::make_shared<Map>(Box{int(text.at(2)), int(text.at(3)), int(text.at(4))});
  return made;
}

inline Step step(const StepText& text) {
  const auto& [name, code, blocks, threads, shared, reads, writes, arguments] = text;
  Step made{load(name, code.c_str(), shared), unsigned(blocks), unsigned(threads), unsigned(shared), reads, writes, {}};
  for (const auto& words : arguments) made.arguments.push_back(argument(words));
  const auto maps = std::count_if(made.arguments.begin(), made.arguments.end(), [](auto& a) { return a.kind == MAP; });
  if (made.arguments.size() > MAX_ARGUMENTS || size_t(maps) > MAX_MAPS) {
    throw std::invalid_argument("[flash_attention] A kernel has too many arguments.");
  }
  return made;
}

// Layout that the steps require of each input. A pointer without strides requires a contiguous array.
inline std::vector<Requirement> layouts_of(const std::vector<Step>& steps, size_t inputs) {
  std::vector<Requirement> required(inputs, {Layout::ANY, 1});
  for (const Step& step : steps) {
    for (size_t i = 0; i < inputs; i++) {
      const auto has = [&](Kind kind) {
        return std::any_of(step.arguments.begin(), step.arguments.end(),
                           [&](const Argument& a) { return a.kind == kind && size_t(a.value) == i; });
      };
      const bool any = std::any_of(step.arguments.begin(), step.arguments.end(), [&](const Argument& a) {
        return a.kind == STRIDE && size_t(a.value) == i && a.axis == 3;  // a kernel that takes the stride of the last axis too
      });
      const Layout needed = has(MAP) ? Layout::MAPPED : any ? Layout::ANY : has(STRIDE) ? Layout::STRIDED : Layout::DENSE;
      if (!has(MAP) && !has(POINTER)) continue;
      int alignment = ALIGNMENT;
      for (const Argument& a : step.arguments) {
        if (a.kind == STRIDE && size_t(a.value) == i) alignment = a.alignment;
      }
      required[i] = {std::max(required[i].layout, needed), std::max(required[i].alignment, alignment)};
    }
  }
  return required;
}

inline std::shared_ptr<Plan> make_plan(const std::vector<StepText>& steps, size_t inputs,
                                const std::vector<std::vector<int>>& shapes, const std::vector<mx::Dtype>& types,
                                const Arrays& constants, std::string label, std::shared_ptr<const Plan> untraced) {
  auto plan = std::make_shared<Plan>();
  for (const auto& text : steps) plan->steps.push_back(step(text));
  plan->layouts = layouts_of(plan->steps, inputs + constants.size());
  for (const auto& shape : shapes) plan->shapes.emplace_back(shape.begin(), shape.end());
  plan->types = types, plan->constants = constants, plan->label = std::move(label), plan->untraced = std::move(untraced);
  return plan;
}

}  // namespace fatui
