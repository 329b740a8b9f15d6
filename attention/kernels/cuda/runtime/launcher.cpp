// A plan of kernel launches as one MLX primitive: what mx.fast.precompiled_cuda_kernel does for one kernel, at less cost,
// with memory that passes from kernel to kernel, with tensor maps as arguments, and with strided arrays as they lie.
#include <nanobind/stl/optional.h>

#include "launcher_known.hpp"
#include "launcher_layout.hpp"
#include "launcher_memory.hpp"
#include "launcher_peers.hpp"
#include "launcher_plan.hpp"
#include "launcher_run.hpp"
#include "launcher_steps.hpp"
#include "launcher_waiting.hpp"

namespace nb = nanobind;

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

// The key of a call with quantized keys and values; none if values are not as wide as queries, whose formats the shapes of the
// parts do not tell.
std::optional<fatui::CallKey> packed_key(std::initializer_list<const Array*> arrays, int value_bits,
                                         const fatui::Keywords& keywords) {
  const auto key = fatui::key_of(arrays, keywords);
  const Array &q = **arrays.begin(), &v = **(arrays.begin() + 4);
  if (!key || int64_t(v.shape(3)) * 32 != int64_t(q.shape(3)) * value_bits) return std::nullopt;
  return key;
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
  nb::class_<fatui::Steps>(m, "Steps")
      .def("__call__",
           [](fatui::Steps& steps, const Array& q, const Array& k, const Array& v, nb::object scale, nb::object softcap,
              nb::object rotated, nb::object implementation) {
             return steps.next(q, k, v, {scale, softcap, rotated, implementation});
           },
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale").none(), nb::arg("softcap").none(), nb::arg("rotated"),
           nb::arg("implementation"),
           "The output of the next step, or None if it is not like the ones before.");
  m.def("make_steps",
        [](const Handle& handle, const std::vector<Array>& like, std::vector<Array> fixed, const Array& latest, int64_t first,
           int64_t window, int64_t ring, int64_t seen, nb::object scale, nb::object softcap, nb::object rotated,
           nb::object implementation) {
          return fatui::Steps(handle.plan, like, std::move(fixed), latest, {first, window, ring}, seen,
                              {scale, softcap, rotated, implementation});
        },
        nb::arg("plan"), nb::arg("like"), nb::arg("fixed"), nb::arg("latest"), nb::arg("first"), nb::arg("window"),
        nb::arg("ring"), nb::arg("seen"), nb::arg("scale").none(), nb::arg("softcap").none(), nb::arg("rotated"),
        nb::arg("implementation"));
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
           const Array* v_biases, int v_bits, double scale, bool causal, Window window,
           Optional softcap) -> std::optional<Array> {
          const auto key =
              packed_key({&q, &k, &k_scales, k_biases, &v, &v_scales, v_biases}, v_bits, {scale, causal, window, softcap});
          const auto* plan = key ? known_calls().find(*key) : nullptr;
          if (plan == nullptr) return std::nullopt;
          std::vector<Array> inputs{q, k, k_scales};
          if (k_biases != nullptr) inputs.push_back(*k_biases);
          inputs.push_back(v), inputs.push_back(v_scales);
          if (v_biases != nullptr) inputs.push_back(*v_biases);
          return fatui::run(*plan, std::move(inputs))[0];
        },
        nb::arg("q"), nb::arg("k"), nb::arg("k_scales"), nb::arg("k_biases").none(), nb::arg("v"), nb::arg("v_scales"),
        nb::arg("v_biases").none(), nb::arg("v_bits"), nb::arg("scale"), nb::arg("causal"), nb::arg("window").none(),
        nb::arg("softcap").none(),
        "As find_call, with the parts of quantized keys and values, and the bits of a value's number.");
  m.def("keep_packed_call",
        [](const Array& q, const Array& k, const Array& k_scales, const Array* k_biases, const Array& v, const Array& v_scales,
           const Array* v_biases, int v_bits, double scale, bool causal, Window window, Optional softcap, const Handle& handle) {
          const auto key =
              packed_key({&q, &k, &k_scales, k_biases, &v, &v_scales, v_biases}, v_bits, {scale, causal, window, softcap});
          if (key) known_calls().keep(*key, handle.plan);
        },
        nb::arg("q"), nb::arg("k"), nb::arg("k_scales"), nb::arg("k_biases").none(), nb::arg("v"), nb::arg("v_scales"),
        nb::arg("v_biases").none(), nb::arg("v_bits"), nb::arg("scale"), nb::arg("causal"), nb::arg("window").none(),
        nb::arg("softcap").none(), nb::arg("plan"), "Not kept if values are not as wide as queries.");
  m.def("forget_calls", [] { known_calls().clear(); });
}

void define_layout(nb::module_& m) {
  m.def("laid_out", &fatui::laid_out, nb::arg("arrays"), nb::arg("given"),
        "The arrays, which are given to MLX's SDPA or come from it, copied where MLX's SDPA does not take them as they lie; what "
        "is copied is decided when they are computed.");
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
           [](const PeersHandle& handle, const Array& part, const Runs& sent, const Runs& needed,
              std::vector<int64_t> contributed, int64_t rows, mlx::core::Stream stream) {
             return fatui::gather_from_peers(handle.peers, part, row_plan(sent, needed, std::move(contributed), rows), stream);
           },
           "Rows of (B, heads, rows, width) of all ranks; runs of rows are (rank, first, place, count).")
      .def("attend",
           [](const PeersHandle& handle, const Handle& plan, std::vector<Array> inputs, std::vector<int64_t> planes,
              const Runs& sent, const Runs& needed, std::vector<int64_t> contributed, int64_t rows) {
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
          return PeersHandle{
              std::make_shared<fatui::Peers>(rank, std::move(slots), flags, slot_bytes, slot_count, std::move(merges))};
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
