// The Python module. It shares MLX's array type through the nanobind ABI and domain of mlx.core.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <algorithm>

#include <mlx/array.h>

#include "measure.hpp"
#include "primitive.hpp"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace {

using MaybeArray = std::optional<mx::array>;

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, double scale, bool causal,
                    int64_t window, float softcap, const MaybeArray& mask, int64_t items, const MaybeArray& slopes,
                    const MaybeArray& offsets, const MaybeArray& entries, const MaybeArray& bits, int64_t list_batches,
                    int64_t list_heads) {
  const fatui::Options options{scale, softcap, causal, window, items, list_batches, list_heads};
  return fatui::flash_attention(q, k, v, options, {mask, offsets, entries, bits, slopes}, false)[0];
}

std::pair<mx::array, mx::array> with_logsumexp(const mx::array& q, const mx::array& k, const mx::array& v, double scale,
                                               bool causal, int64_t window, float softcap, const MaybeArray& mask,
                                               int64_t items, const MaybeArray& slopes, const MaybeArray& offsets,
                                               const MaybeArray& entries, const MaybeArray& bits, int64_t list_batches,
                                               int64_t list_heads) {
  const fatui::Options options{scale, softcap, causal, window, items, list_batches, list_heads};
  auto out = fatui::flash_attention(q, k, v, options, {mask, offsets, entries, bits, slopes}, true);
  return {out[0], out[1]};
}

double read_bandwidth(const mx::array& a, const mx::array& b) {
  const auto memory = [](const mx::array& x) {
    return fatui::Memory{x.data<char>(), int64_t(x.data_size() * x.itemsize())};
  };
  return fatui::read_bandwidth(memory(a), memory(b));
}

int64_t workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t head_dim,
                  int64_t value_dim, int element, bool training) {
  fatui::Problem p;
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.queries = queries, p.keys = keys;
  p.head_dim = head_dim, p.value_dim = value_dim, p.query.element = fatui::Element(element);
  const int64_t forward = fatui::forward_workspace(p);
  return training ? std::max(forward, fatui::backward_workspace(p)) : forward;
}
}  // namespace

NB_MODULE(fatui_cpu_kernel, m) {
  m.def("flash_attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg() = 0, nb::arg().none() = nb::none(), nb::arg().none() = nb::none(),
        nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg() = 0, nb::arg() = 0);
  m.def("flash_attention_with_logsumexp", &with_logsumexp, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg() = 0, nb::arg().none() = nb::none(),
        nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg() = 0,
        nb::arg() = 0);
  m.def("workspace_bytes", &workspace, "Bytes above inputs and outputs, for shapes alone.");
  m.def("fma_peak", &fatui::fma_peak, "FLOP/s of multiply-adds in registers, float32, on all threads.");
  m.def("read_bandwidth", &read_bandwidth, "Bytes/s of a plain loop that reads two evaluated arrays, all threads.");
}
