// A plan of kernel launches as one MLX primitive: what mx.fast.precompiled_cuda_kernel does for one kernel, at less cost,
// with memory that passes from kernel to kernel, with tensor maps as arguments, and with strided arrays as they lie.
#include <nanobind/stl/optional.h>

#include "launcher_known.hpp"
#include "launcher_layout.hpp"
#include "launcher_memory.hpp"
#include "launcher_peers.hpp"
#include "launcher_plan.hpp"
#include "launcher_waiting.hpp"

namespace nb = nanobind;

namespace fatui {
namespace {

// ---- the primitive -----------------------------------------------------------------------------------------------

// Python's functions for a plan's gradient, and for a plan under vmap.
struct Transforms {
  nb::object gradient, batched;
};

Transforms& transforms() {
  static auto* functions = new Transforms();  // never freed: Python may be gone by then
  return *functions;
}

class Launches : public mx::Primitive {
 public:
  // `traced` are the shapes of the inputs if these are tracers, else empty; `passed` the numbers of this call.
  Launches(mx::Stream stream, std::shared_ptr<const Plan> plan, std::vector<mx::Shape> traced, std::vector<int64_t> passed)
      : mx::Primitive(stream), plan_(std::move(plan)), traced_(std::move(traced)), passed_(std::move(passed)) {}

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
    for (const Step& step : plan_->steps) launch(step, arrays, passed_, encoder);
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
          "[flash_attention] The kernels are prepared for arrays of the shapes traced; mx.compile without shapeless traces each.");
    }
    return plan_->shapes;
  }

 private:
  std::shared_ptr<const Plan> plan_;
  std::vector<mx::Shape> traced_;
  std::vector<int64_t> passed_;
};

Arrays run(std::shared_ptr<const Plan> plan, Arrays inputs, std::vector<int64_t> passed = {}) {
  const mx::Stream stream = mx::default_stream(mx::default_device());
  if (stream.device != mx::Device::gpu) throw std::invalid_argument("[flash_attention] The default device is not a GPU.");
  const bool traced = std::any_of(inputs.begin(), inputs.end(), [](const mx::array& a) { return a.is_tracer(); });
  if (plan->untraced != nullptr && !traced) plan = plan->untraced;
  std::vector<mx::Shape> shapes;
  if (traced) {
    for (const mx::array& a : inputs) shapes.push_back(a.shape());
  }
  inputs.insert(inputs.end(), plan->constants.begin(), plan->constants.end());
  auto primitive = std::make_shared<Launches>(stream, plan, std::move(shapes), std::move(passed));
  return mx::array::make_arrays(plan->shapes, plan->types, primitive, inputs);
}
}  // namespace
}  // namespace fatui

// A plan as Python holds it.
struct Handle {
  std::shared_ptr<const fatui::Plan> plan;
};

namespace {
using Array = mlx::core::array;
using Optional = std::optional<double>;
using Window = std::optional<int64_t>;

auto& known_calls() {
  static auto* known = new fatui::Known<std::shared_ptr<const fatui::Plan>>();  // never freed, as MLX's arrays may be gone
  return *known;
}

void define_plans(nb::module_& m) {
  nb::class_<Handle>(m, "Plan")
      .def("__call__", [](const Handle& handle, std::vector<Array> inputs) { return fatui::run(handle.plan, std::move(inputs)); })
      .def("with_numbers",
           [](const Handle& handle, std::vector<Array> inputs, std::vector<int64_t> passed) {
             return fatui::run(handle.plan, std::move(inputs), std::move(passed));
           })
      .def("__call__", [](const Handle& handle, nb::args arrays) {
        return fatui::run(handle.plan, nb::cast<std::vector<Array>>(arrays));
      });
  m.def("make_plan",
        [](const std::vector<fatui::StepText>& steps, size_t inputs, const std::vector<std::vector<int>>& shapes,
           const std::vector<mlx::core::Dtype>& types, const std::vector<Array>& constants, std::string label,
           const Handle* untraced) {
          return Handle{fatui::make_plan(steps, inputs, shapes, types, constants, std::move(label),
                                         untraced != nullptr ? untraced->plan : nullptr)};
        },
        nb::arg("steps"), nb::arg("inputs"), nb::arg("shapes"), nb::arg("types"), nb::arg("constants"), nb::arg("label"),
        nb::arg("untraced").none());
  m.def("is_queued", [](const Array& a) { return a.status() == Array::Status::unscheduled; },
        "Whether nothing has begun to evaluate an array.");
  m.def("set_transforms",
        [](nb::object gradient, nb::object batched) {
          fatui::transforms() = {std::move(gradient), std::move(batched)};
        },
        "The first gets label, primals, cotangents and outputs of a plan, and returns the gradients of its inputs. The second "
        "gets label, inputs and their vmapped axes (-1: none), and returns the outputs with that axis in front.");
}

void define_calls(nb::module_& m) {
  m.def("find_call",
        [](const Array& q, const Array& k, const Array& v, double scale, bool causal, Window window,
           Optional softcap) -> std::optional<Array> {
          const auto key = fatui::key_of({&q, &k, &v}, {scale, causal, window, softcap});
          const auto* plan = key ? known_calls().find(*key) : nullptr;
          if (plan == nullptr) return std::nullopt;
          return fatui::run(*plan, {q, k, v})[0];
        },
        "The first output of the plan that was kept for such a call, or None.");
  m.def("keep_call",
        [](const Array& q, const Array& k, const Array& v, double scale, bool causal, Window window, Optional softcap,
           const Handle& handle) {
          const auto key = fatui::key_of({&q, &k, &v}, {scale, causal, window, softcap});
          if (key) known_calls().keep(*key, handle.plan);
        });
  m.def("find_packed_call",
        [](const Array& q, const Array& k, const Array& k_scales, const Array* k_biases, const Array& v, const Array& v_scales,
           const Array* v_biases, int v_bits, double scale, bool causal, Window window, Optional softcap) -> std::optional<Array> {
          const auto key =
              fatui::key_of({&q, &k, &k_scales, k_biases, &v, &v_scales, v_biases}, {scale, causal, window, softcap});
          if (!key || int64_t(v.shape(3)) * 32 != int64_t(q.shape(3)) * v_bits) return std::nullopt;
          const auto* plan = known_calls().find(*key);
          if (plan == nullptr) return std::nullopt;
          std::vector<Array> inputs{q, k, k_scales};
          if (k_biases != nullptr) inputs.push_back(*k_biases);
          inputs.push_back(v), inputs.push_back(v_scales);
          if (v_biases != nullptr) inputs.push_back(*v_biases);
          return fatui::run(*plan, std::move(inputs))[0];
        },
        nb::arg("q"), nb::arg("k"), nb::arg("k_scales"), nb::arg("k_biases").none(), nb::arg("v"), nb::arg("v_scales"),
        nb::arg("v_biases").none(), nb::arg("v_bits"), nb::arg("scale"), nb::arg("causal"), nb::arg("window").none(), nb::arg("softcap").none(),
        "As find_call, with the parts of quantized keys and values, and the bits of a value's number; None if values are not as wide "
        "as queries.");
  m.def("keep_packed_call",
        [](const Array& q, const Array& k, const Array& k_scales, const Array* k_biases, const Array& v, const Array& v_scales,
           const Array* v_biases, double scale, bool causal, Window window, Optional softcap, const Handle& handle) {
          const auto key =
              fatui::key_of({&q, &k, &k_scales, k_biases, &v, &v_scales, v_biases}, {scale, causal, window, softcap});
          if (key) known_calls().keep(*key, handle.plan);
        },
        nb::arg("q"), nb::arg("k"), nb::arg("k_scales"), nb::arg("k_biases").none(), nb::arg("v"), nb::arg("v_scales"),
        nb::arg("v_biases").none(), nb::arg("scale"), nb::arg("causal"), nb::arg("window").none(), nb::arg("softcap").none(),
        nb::arg("plan"));
  m.def("forget_calls", [] { known_calls().clear(); });
}

void define_layout(nb::module_& m) {
  m.def("laid_out", &fatui::laid_out, nb::arg("arrays"), nb::arg("given"),
        "The arrays, which are given to MLX's SDPA or come from it, copied where MLX's SDPA does not take them as they lie; what is copied is decided when they are computed.");
}

// Peers as Python holds them.
struct PeersHandle {
  std::shared_ptr<fatui::Peers> peers;
};

using Runs = std::vector<std::tuple<int, int64_t, int64_t, int64_t>>;

fatui::RowPlan row_plan(const Runs& sent, const Runs& needed, std::vector<int64_t> contributed, int64_t rows) {
  fatui::RowPlan plan{{}, {}, std::move(contributed), rows};
  for (const auto& [rank, from, to, count] : sent) plan.sent.push_back({rank, from, to, count});
  for (const auto& [rank, from, to, count] : needed) plan.needed.push_back({rank, from, to, count});
  return plan;
}

void define_peers(nb::module_& m) {
  nb::class_<PeersHandle>(m, "Peers")
      .def("gather",
           [](const PeersHandle& handle, const Array& part, const Runs& sent, const Runs& needed, std::vector<int64_t> contributed,
              int64_t rows, mlx::core::Stream stream) {
             return fatui::gather_from_peers(handle.peers, part, row_plan(sent, needed, std::move(contributed), rows), stream);
           },
           "Rows of (B, heads, rows, width) of all ranks; runs of rows are (rank, first, place, count).")
      .def("attend",
           [](const PeersHandle& handle, const Handle& plan, std::vector<Array> inputs, std::vector<int64_t> planes, const Runs& sent,
              const Runs& needed, std::vector<int64_t> contributed, int64_t rows) {
             return fatui::attend_with_peers(handle.peers, plan.plan, std::move(inputs),
                                             row_plan(sent, needed, std::move(contributed), rows), std::move(planes));
           },
           "A plan of q, k, v and the other ranks' keys and values, with planes of keys for each launch; runs as for `gather`.")
      .def("merge",
           [](const PeersHandle& handle, const Handle& plan, std::vector<Array> inputs) {
             return fatui::merge_with_peers(handle.peers, plan.plan, std::move(inputs));
           },
           "A plan that ends with a merge, and its inputs; all ranks merge in the same order.");
  m.def("make_peers",
        [](int rank, std::vector<uint64_t> slots, uint64_t flags, size_t slot_bytes, int slot_count, Array merges) {
          return PeersHandle{std::make_shared<fatui::Peers>(rank, std::move(slots), flags, slot_bytes, slot_count, std::move(merges))};
        },
        nb::arg("rank"), nb::arg("slots"), nb::arg("flags"), nb::arg("slot_bytes"), nb::arg("slot_count"), nb::arg("merges"));
  m.def("is_traced",
        [](const std::vector<Array>& arrays) {
          return std::any_of(arrays.begin(), arrays.end(), [](const Array& a) { return a.is_tracer(); });
        },
        "Whether an array is part of a transformation, such as a gradient.");
}

void define_waiting(nb::module_& m) {
  m.def("passed", &fatui::passed, nb::arg("token"), nb::arg("behind"),
        "The token, there once the GPU has done what was queued before it, but for what the last `behind` tokens followed.");
}
}  // namespace

NB_MODULE(fatui_cuda_launcher, m) {
  define_plans(m);
  define_calls(m);
  define_layout(m);
  define_waiting(m);
  define_peers(m);
}
