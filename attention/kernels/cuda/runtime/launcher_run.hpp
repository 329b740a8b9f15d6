// A plan as one MLX primitive, and its call.
#pragma once
#include "launcher_layout.hpp"
#include "launcher_memory.hpp"
#include "launcher_plan.hpp"

namespace fatui {

// ---- the primitive -----------------------------------------------------------------------------------------------

// Python's functions for a plan's gradient, and for a plan under vmap.
struct Transforms {
  nb::object gradient, batched;
};

inline Transforms& transforms() {
  static auto* functions = new Transforms();  // never freed: Python may be gone by then
  return *functions;
}

// Calls whose inputs are there have nothing to wait for, but MLX starts launches by the hundred, or at the end of what is
// evaluated. The first ones of a queue are started earlier, 2, 4, 8, ... at a time: few starts, each of which takes the host
// time, and the same from queue to queue, since MLX keeps the graphs that it made.
class EarlyStarts {
 public:
  // A call was made: the next evaluation is that of a new queue.
  void note_call() { fresh_ = true; }
  // A call with its inputs there was evaluated.
  void note_evaluation(mx::cu::CommandEncoder& encoder) {
    if (fresh_) fresh_ = false, waiting_ = 0, at_once_ = FIRST;
    if (++waiting_ < at_once_) return;
    waiting_ = 0, at_once_ = std::min(2 * at_once_, MOST);
    encoder.commit();
  }

 private:
  static constexpr int FIRST = 2, MOST = 128;
  bool fresh_ = false;
  int waiting_ = 0, at_once_ = FIRST;
};

inline EarlyStarts& early_starts() {
  static thread_local EarlyStarts starts;
  return starts;
}

class Launches : public mx::Primitive {
 public:
  // `traced` are the shapes of the inputs if these are tracers, else empty; `passed` the numbers of this call; `ready` whether
  // its inputs are there.
  Launches(mx::Stream stream, std::shared_ptr<const Plan> plan, std::vector<mx::Shape> traced, std::vector<int64_t> passed,
           bool ready)
      : mx::Primitive(stream), plan_(std::move(plan)), traced_(std::move(traced)), passed_(std::move(passed)), ready_(ready) {}

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
    for (const Step& step : plan_->steps) launch(step, arrays, passed_, stream(), encoder);
    if (ready_) early_starts().note_evaluation(encoder);
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    const nb::gil_scoped_acquire held;
    const auto made = nb::cast<Arrays>(transforms().gradient(plan_->label, primals, cotangents, outputs));
    Arrays wanted;
    for (const int n : argnums) wanted.push_back(made.at(n));
    return wanted;
  }

  // The plan of a batch as many times as large, whose outputs get the new axis in front. What a plan writes for itself
  // alone is not among them, and nothing ever reads it.
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    const nb::gil_scoped_acquire held;
    const size_t own = inputs.size() - plan_->constants.size();
    const Arrays arrays(inputs.begin(), inputs.begin() + own);
    const std::vector<int> own_axes(axes.begin(), axes.begin() + own);
    auto made = nb::cast<Arrays>(transforms().batched(plan_->label, arrays, own_axes));
    std::vector<int> made_axes(made.size(), 0);
    made.resize(plan_->shapes.size(), mx::array(0.0f)), made_axes.resize(plan_->shapes.size(), -1);
    return {std::move(made), std::move(made_axes)};
  }

  const char* name() const override { return "FatuiCudaKernels"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto* same = dynamic_cast<const Launches*>(&other);
    return same != nullptr && same->plan_ == plan_ && same->passed_ == passed_;
  }
  // mx.compile(shapeless=True) calls it for inputs of other shapes than those traced, but a plan's launches are for these.
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    for (size_t i = 0; i < traced_.size(); i++) {
      if (inputs[i].shape() == traced_[i]) continue;
      throw std::invalid_argument(
          "[flash_attention] The kernels are prepared for arrays of the shapes traced; mx.compile without shapeless traces "
          "each.");
    }
    return plan_->shapes;
  }

 private:
  std::shared_ptr<const Plan> plan_;
  std::vector<mx::Shape> traced_;
  std::vector<int64_t> passed_;
  bool ready_;
};

inline Arrays run(std::shared_ptr<const Plan> plan, Arrays inputs, std::vector<int64_t> passed = {}) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  if (stream.device != mx::Device::gpu) throw std::invalid_argument("[flash_attention] The default device is not a GPU.");
  const bool traced = std::any_of(inputs.begin(), inputs.end(), [](const mx::array& a) { return a.is_tracer(); });
  if (plan->untraced != nullptr && !traced) plan = plan->untraced;
  const bool ready = !traced && std::all_of(inputs.begin(), inputs.end(), [](const mx::array& a) {
    return a.status() != mx::array::Status::unscheduled;
  });
  early_starts().note_call();
  std::vector<mx::Shape> shapes;
  if (traced) {
    for (const mx::array& a : inputs) shapes.push_back(a.shape());
  }
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  auto primitive = std::make_shared<Launches>(stream, plan, std::move(shapes), std::move(passed), ready);
  return mx::array::make_arrays(plan->shapes, plan->types, primitive, inputs);
}
}  // namespace fatui
