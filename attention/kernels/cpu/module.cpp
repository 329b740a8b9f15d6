// Attention as MLX primitives: lazy, on MLX's CPU stream, differentiable, without copies; and its Python module, which
// shares MLX's array type through the nanobind ABI and domain of mlx.core.
#include "binding.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <typeinfo>

#include "mask_lists.hpp"
#include "measure.hpp"
#include "pool.hpp"
#include "schedule.hpp"

namespace fatui {

const char* variant();  // in variant.cpp

// Inputs q, k, v, the scales and biases of quantized k and v, and optionally a 4-D mask, three arrays of block lists, 2-D
// slopes; outputs o and, if a gradient or the logsumexp may be requested, statistics (B, H, Lq, 3), which only the backward pass
// uses; and the logsumexp, if the call returns it.
class FlashForward : public CpuOperation {
 public:
  FlashForward(mx::Stream stream, Options options) : CpuOperation(stream), options_(options) {}
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const Axes& argnums, const Arrays& outputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const Axes& argnums) override;
  std::pair<Arrays, Axes> vmap(const Arrays& inputs, const Axes& axes) override;
  const char* name() const override { return "FatuiFlashAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;

 private:
  Options options_;
};

// Inputs q, k, v, o, statistics, the gradients of o and, if the call returns it, of the logsumexp, and the optional ones of the
// forward pass; outputs dq, dk, dv.
class FlashBackward : public CpuOperation {
 public:
  FlashBackward(mx::Stream stream, Options options) : CpuOperation(stream), options_(options) {}
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const Axes& argnums, const Arrays& outputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const Axes& argnums) override;
  std::pair<Arrays, Axes> vmap(const Arrays& inputs, const Axes& axes) override;
  const char* name() const override { return "FatuiFlashAttentionGradient"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;

 private:
  size_t optional() const { return options_.logsumexp ? 7 : 6; }  // index of the first optional input
  Options options_;
};

void require_forward(Element element, int64_t queries, bool quantized) {
  switch (element) {
    case Element::float16: require(forward_float16, "float16"); break;
    case Element::bfloat16: require(forward_widened, "bfloat16"); break;
    default: require(forward_float32, "float32");
  }
  if (has_few_rows(queries)) require(attend_few_float32, "few");
  if (quantized) require(quantize_into, "quantized");
}

bool is_floating(mx::Dtype type) { return type == mx::float32 || type == mx::float16 || type == mx::bfloat16; }

Element element_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return Element::float32;
  if (a.dtype() == mx::float16) return Element::float16;
  if (a.dtype() == mx::bfloat16) return Element::bfloat16;
  return Element::boolean;
}

// Strides of an array; an axis of length one is a broadcast.
Tensor tensor_of(const mx::array& a) {
  Tensor t;
  t.data = a.data<char>();
  t.element = element_of(a);
  for (size_t i = 0; i < a.ndim(); i++) t.stride[i] = a.shape(int(i)) == 1 ? 0 : a.strides()[i];
  if (a.ndim() == 4 && a.shape(3) == 1) t.stride[3] = 1;
  return t;
}

Packing packing_of(const Format& format, const Arrays& inputs, size_t& next) {
  Packing packing{format.mode, format.bits, format.group};
  if (format.parts() > 0) packing.scales = tensor_of(inputs[next++]);
  if (format.has_biases()) packing.biases = tensor_of(inputs[next++]);
  return packing;
}

// The inputs after q, k and v, or after those of the backward pass, begin at `next`.
Problem problem_of(const Options& options, const Arrays& inputs, size_t next) {
  const mx::array &q = inputs[0], &k = inputs[1], &v = inputs[2];
  Problem p;
  p.key_packing = packing_of(options.key, inputs, next);
  p.value_packing = packing_of(options.value, inputs, next);
  p.query = tensor_of(q), p.key = tensor_of(k), p.value = tensor_of(v);
  if (options.masked) {
    const mx::array& mask = inputs[next++];
    p.mask = tensor_of(mask);
    if (mask.shape(3) == 1) p.mask.stride[3] = 0;
  }
  if (options.list_batches > 0) {
    p.lists.offsets = inputs[next].data<int32_t>(), p.lists.entries = inputs[next + 1].data<int32_t>();
    p.lists.bits = inputs[next + 2].data<uint32_t>();
    p.lists.batches = options.list_batches, p.lists.heads = options.list_heads;
    next += 3;
  }
  if (options.sloped) p.slopes = tensor_of(inputs[next]);
  p.batch = q.shape(0), p.heads = q.shape(1), p.queries = q.shape(2), p.head_dim = q.shape(3);
  p.kv_heads = k.shape(1), p.keys = k.shape(2), p.value_dim = options.value.width(v);
  p.scale = options.scale, p.softcap = options.softcap, p.causal = options.causal, p.window = options.window;
  p.items = options.items;
  return p;
}

// MLX's allocator does not report a failure.
void check_memory(const mx::array& a, const std::string& operation) {
  if (a.nbytes() > 0 && a.data<char>() == nullptr)
    throw std::runtime_error("[" + operation + "] no memory for an array of " + std::to_string(a.nbytes()) + " bytes.");
}

void* allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  check_memory(out, "flash_attention");
  return out.data<char>();
}

namespace {

[[noreturn]] void refuse_second_derivative() {
  throw std::invalid_argument("flash_attention has no second derivative; implementation 'baseline' has.");
}

// mx.compile(shapeless=True) runs with other shapes than those traced; what stays as it was traced must fit them, because
// the kernel reads it by the shapes of q and k. The inputs after q, k and v begin at `next`.
void check_traced(const Options& options, const Arrays& inputs, size_t next) {
  const auto &q = inputs[0], &k = inputs[1];
  const std::array<int64_t, 4> scores{q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
  const auto stop = [](const std::string& what) {
    throw std::invalid_argument("[flash_attention] " + what + " of other lengths; mx.compile without shapeless traces each.");
  };
  for (const Format* format : {&options.key, &options.value})
    for (int i = 0; i < format->parts(); i++, next++)
      if (inputs[next].shape(2) != k.shape(2)) stop("the scales of quantized keys and values are those");
  if (options.masked) {
    for (int i = 0; i < 4; i++)
      if (inputs[next].shape(i) != 1 && inputs[next].shape(i) != scores[i]) stop("the mask is one");
    next++;
  }
  if (options.list_batches > 0) {
    if (options.listed != scores) stop("the block lists are those");
    next += 3;
  }
  if (options.sloped && inputs[next].shape(1) != scores[1]) stop("the slopes are those");
}

// Options of a call mapped by vmap: its lists are for a larger batch.
Options mapped(Options options, int count) {
  options.listed[0] *= count;
  return options;
}

// vmap: the mapped axis becomes part of the batch.
mx::array with_batch(const mx::array& a, int axis, int count, int batch, mx::Stream s) {
  mx::array x = axis >= 0 ? mx::moveaxis(a, axis, 0, s) : mx::expand_dims(a, 0, s);
  mx::Shape shape = x.shape();
  if (axis < 0 && batch == 1 && shape[1] == 1 && a.ndim() == 4 && count == 1) return mx::flatten(x, 0, 1, s);
  shape[0] = count, shape[1] = batch;
  return mx::flatten(mx::broadcast_to(x, shape, s), 0, 1, s);
}

int mapped_count(const Arrays& inputs, const Axes& axes) {
  for (size_t i = 0; i < inputs.size(); i++)
    if (axes[i] >= 0) return inputs[i].shape(axes[i]);
  return 1;
}

// Lists stay as they are: their planes repeat over the batch. Slopes (1 or B, H) follow the batch.
Arrays batched(const Arrays& inputs, const Axes& axes, int count, const Options& options, mx::Stream s) {
  const int batch = inputs[0].shape(axes[0] == 0 ? 1 : 0);
  const size_t slopes = inputs.size() - (options.sloped ? 1 : 0), lists = slopes - (options.list_batches > 0 ? 3 : 0);
  Arrays out;
  for (size_t i = 0; i < inputs.size(); i++) {
    if (i < lists) out.push_back(with_batch(inputs[i], axes[i], count, batch, s));
    else if (i >= slopes && axes[i] >= 0) out.push_back(with_batch(inputs[i], axes[i], count, batch, s));
    else if (i >= slopes && inputs[i].shape(0) > 1) out.push_back(with_batch(inputs[i], -1, count, batch, s));
    else if (i < slopes && axes[i] >= 0) throw std::invalid_argument("flash_attention has no vmap over block lists.");
    else out.push_back(inputs[i]);
  }
  return out;
}

std::pair<Arrays, Axes> unbatched(const Arrays& outputs, int count, mx::Stream s) {
  Arrays out;
  for (const auto& a : outputs) out.push_back(mx::unflatten(a, 0, {count, a.shape(0) / count}, s));
  return {out, std::vector<int>(out.size(), 0)};
}

Arrays make_forward(const Arrays& inputs, const Options& options, mx::Stream s) {
  auto primitive = std::make_shared<FlashForward>(s, options);
  const auto shapes = primitive->output_shapes(inputs);
  std::vector<mx::Dtype> types(shapes.size(), mx::float32);
  types[0] = inputs[0].dtype();
  return mx::array::make_arrays(shapes, types, primitive, inputs);
}

Arrays make_backward(const Arrays& inputs, const Options& options, mx::Stream s) {
  auto primitive = std::make_shared<FlashBackward>(s, options);
  return mx::array::make_arrays(primitive->output_shapes(inputs),
                                {inputs[0].dtype(), inputs[1].dtype(), inputs[2].dtype()}, primitive, inputs);
}
}  // namespace

void FlashForward::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  ForwardCall call;
  call.problem = problem_of(options_, inputs, 3);
  call.output = allocate(outputs[0]);
  if (outputs.size() > 1) call.statistics = static_cast<float*>(allocate(outputs[1]));
  if (outputs.size() > 2) call.logsumexp = static_cast<float*>(allocate(outputs[2]));
  mx::cpu::get_command_encoder(stream()).dispatch([call] { forward(call); });
}

Arrays FlashForward::vjp(const Arrays& primals, const Arrays& cotangents, const Axes& argnums,
                         const Arrays& outputs) {
  if (options_.parts() > 0)
    throw std::invalid_argument("flash_attention has no gradient for quantized keys and values; implementation 'baseline' has.");
  for (const int n : argnums)
    if (n > 2 && primals[n].dtype() != mx::bool_)
      throw std::invalid_argument(options_.sloped && n + 1 == int(primals.size())
                                      ? "flash_attention has no gradient for the slopes of alibi."
                                      : "flash_attention has no gradient for the mask; attention() has.");
  Arrays inputs(primals.begin(), primals.begin() + 3);
  inputs.insert(inputs.end(), {outputs[0], outputs[1], mx::astype(cotangents[0], outputs[0].dtype(), stream())});
  if (options_.logsumexp) inputs.push_back(mx::astype(cotangents[2], mx::float32, stream()));
  inputs.insert(inputs.end(), primals.begin() + 3, primals.end());
  const Arrays gradients = make_backward(inputs, options_, stream());
  Arrays wanted;
  for (const int n : argnums) wanted.push_back(n > 2 ? mx::zeros_like(primals[n], stream()) : gradients[n]);
  return wanted;
}

Arrays FlashForward::jvp(const Arrays&, const Arrays&, const Axes&) {
  throw std::invalid_argument("flash_attention has no forward-mode derivative (jvp); implementation 'baseline' has.");
}

std::pair<Arrays, Axes> FlashForward::vmap(const Arrays& inputs, const Axes& axes) {
  const int count = mapped_count(inputs, axes);
  const Arrays all = batched(inputs, axes, count, options_, stream());
  return unbatched(make_forward(all, mapped(options_, count), stream()), count, stream());
}

bool FlashForward::is_equivalent(const mx::Primitive& other) const {
  return typeid(other) == typeid(*this) && static_cast<const FlashForward&>(other).options_ == options_;
}

std::vector<mx::Shape> FlashForward::output_shapes(const Arrays& inputs) {
  check_traced(options_, inputs, 3);
  const auto& q = inputs[0];
  const mx::Shape rows{q.shape(0), q.shape(1), q.shape(2)};
  std::vector<mx::Shape> shapes{{rows[0], rows[1], rows[2], int(options_.value.width(inputs[2]))}, {rows[0], rows[1], rows[2], 3}};
  if (options_.logsumexp) shapes.push_back(rows);
  return shapes;
}

void FlashBackward::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  BackwardCall call;
  call.problem = problem_of(options_, inputs, optional());
  call.output = tensor_of(inputs[3]);
  call.statistics = tensor_of(inputs[4]);
  call.output_gradient = tensor_of(inputs[5]);
  if (options_.logsumexp) call.logsumexp_gradient = tensor_of(inputs[6]);
  call.query_gradient = allocate(outputs[0]);
  call.key_gradient = allocate(outputs[1]);
  call.value_gradient = allocate(outputs[2]);
  mx::cpu::get_command_encoder(stream()).dispatch([call] { backward(call); });
}

Arrays FlashBackward::vjp(const Arrays&, const Arrays&, const Axes&, const Arrays&) {
  refuse_second_derivative();
}

Arrays FlashBackward::jvp(const Arrays&, const Arrays&, const Axes&) { refuse_second_derivative(); }

std::pair<Arrays, Axes> FlashBackward::vmap(const Arrays& inputs, const Axes& axes) {
  const int count = mapped_count(inputs, axes);
  const Arrays all = batched(inputs, axes, count, options_, stream());
  return unbatched(make_backward(all, mapped(options_, count), stream()), count, stream());
}

bool FlashBackward::is_equivalent(const mx::Primitive& other) const {
  return typeid(other) == typeid(*this) && static_cast<const FlashBackward&>(other).options_ == options_;
}

std::vector<mx::Shape> FlashBackward::output_shapes(const Arrays& inputs) {
  check_traced(options_, inputs, optional());
  return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
}

// The operation called from Python: validation of shapes and dtypes, and its error messages.
namespace {

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument("[flash_attention] " + reason); }

}  // namespace

std::string text(const mx::Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

void check(const mx::array& q, const mx::array& k, const mx::array& v, const Format& key, const Format& value) {
  if (q.ndim() != 4 || k.ndim() != 4 || v.ndim() != 4)
    refuse("q, k and v have four dimensions; got " + text(q.shape()) + ", " + text(k.shape()) + ", " +
           text(v.shape()) + ".");
  const auto type = q.dtype();
  if (key.mode != Mode::none) {
    if (k.dtype() != mx::uint32 || v.dtype() != mx::uint32) refuse("numbers of quantized k and v are uint32.");
  } else if (k.dtype() != type || v.dtype() != type) {
    refuse("q, k and v have one type.");
  }
  if (!is_floating(type)) refuse("the type is float32, float16 or bfloat16.");
  const bool agree = k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) && k.shape(1) == v.shape(1) &&
                     k.shape(2) == v.shape(2) && key.width(k) == q.shape(3);
  if (!agree) {
    mx::Shape wide_k = k.shape(), wide_v = v.shape();
    wide_k[3] = int(key.width(k)), wide_v[3] = int(value.width(v));
    refuse("shapes do not agree: q " + text(q.shape()) + ", k " + text(wide_k) + ", v " + text(wide_v) + ".");
  }
  if (k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) refuse("the heads of q are a multiple of those of k.");
  for (const int64_t dim : {int64_t(q.shape(3)), value.width(v)})
    if (dim < 1 || dim > 512) refuse("head dimensions go from 1 to 512; got " + std::to_string(dim) + ".");
}

// Appends the scales and biases of keys or values.
void add_parts(Arrays& inputs, const Format& format, const mx::array& numbers, const MaybeArray& scales,
               const MaybeArray& biases, const std::string& name) {
  if (format.mode == Mode::none) return;
  mx::Shape shape = numbers.shape();
  shape[3] = int(format.width(numbers) / format.group);
  for (const auto& [part, what] : {std::pair(&scales, "scales"), std::pair(&biases, "biases")}) {
    if (part == &biases && !format.has_biases()) break;
    const auto refuse_part = [&](const std::string& got) {
      refuse(std::string(what) + " of quantized " + name + " are " + text(shape) + " of " +
             (format.has_biases() ? "one floating type" : "uint8") + "; got " + got + ".");
    };
    if (!part->has_value()) refuse_part("none");
    const mx::array& a = **part;
    const auto type = a.dtype();
    const bool known = format.has_biases() ? is_floating(type) && type == scales->dtype() : type == mx::uint8;
    const bool whole = format.width(numbers) % format.group == 0 && numbers.shape(3) * 32 % format.bits == 0;
    if (a.shape() != shape || !known || !whole) refuse_part(text(a.shape()));
    inputs.push_back(a);
  }
}

namespace {

mx::array four_dimensional(const mx::array& mask, const mx::Shape& scores, mx::Stream s) {
  if (mask.dtype() != mx::bool_ && !is_floating(mask.dtype()))
    refuse("a mask is boolean (true = attend) or of a floating type (added to the scores).");
  mx::Shape shape(4 - std::min<size_t>(4, mask.ndim()), 1);
  shape.insert(shape.end(), mask.shape().begin(), mask.shape().end());
  bool fits = shape.size() == 4;
  for (size_t i = 0; fits && i < 4; i++) fits = shape[i] == 1 || shape[i] == scores[i];
  if (!fits) refuse("the mask " + text(mask.shape()) + " does not broadcast to " + text(scores) + ".");
  return mask.ndim() == 4 ? mask : mx::reshape(mask, shape, s);
}

// The arrays of block lists; their values are not checked.
void add_lists(std::vector<mx::array>& inputs, const Options& options, const Extras& extras, mx::Stream s) {
  const auto& q = inputs[0];
  const auto fits = [](int64_t planes, int size) { return planes == 1 || planes == size; };
  if (!fits(options.list_batches, q.shape(0)) || !fits(options.list_heads, q.shape(1)))
    refuse("block lists have planes for 1 or B batch rows and 1 or H heads; got " + std::to_string(options.list_batches) +
           " and " + std::to_string(options.list_heads) + " for q " + text(q.shape()) + ".");
  const auto &offsets = *extras.offsets, &entries = *extras.entries, &bits = *extras.bits;
  const int64_t lists = options.list_batches * options.list_heads * ceil_div(q.shape(2), query_tile);
  if (offsets.dtype() != mx::int32 || offsets.ndim() != 1 || offsets.shape(0) != lists + 1)
    refuse("offsets of block lists are int32 (" + std::to_string(lists + 1) + "); got " + text(offsets.shape()) + ".");
  if (entries.dtype() != mx::int32 || entries.ndim() != 2 || entries.shape(1) != 2)
    refuse("entries of block lists are int32 (n, 2); got " + text(entries.shape()) + ".");
  if (bits.dtype() != mx::uint32 || bits.ndim() != 3 || bits.shape(1) != query_tile || bits.shape(2) != key_tile / 32)
    refuse("bits of block lists are uint32 (m, 64, 4); got " + text(bits.shape()) + ".");
  if (options.causal || options.window > 0) refuse("block lists contain the whole positional mask: no causal, no window.");
  for (const auto* a : {&offsets, &entries, &bits})
    inputs.push_back(a->is_available() && a->flags().row_contiguous ? *a : mx::contiguous(*a, false, s));
}
}  // namespace

std::vector<mx::array> flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, Options options,
                                       const Extras& extras, bool logsumexp) {
  check(q, k, v, options.key, options.value);
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{q, k, v};
  add_parts(inputs, options.key, k, extras.key_scales, extras.key_biases, "k");
  add_parts(inputs, options.value, v, extras.value_scales, extras.value_biases, "v");
  options.masked = extras.mask.has_value(), options.sloped = extras.slopes.has_value();
  if (options.masked) inputs.push_back(four_dimensional(*extras.mask, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, s));
  if (options.list_batches > 0) {
    add_lists(inputs, options, extras, s);
    options.listed = {q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
  }
  if (options.sloped) {
    if (extras.slopes->dtype() != mx::float32 || extras.slopes->shape() != mx::Shape{q.shape(1)})
      refuse("slopes are float32 (" + std::to_string(q.shape(1)) + "); got " + text(extras.slopes->shape()) + ".");
    inputs.push_back(mx::reshape(*extras.slopes, {1, q.shape(1)}, s));
  }
  const bool traced = q.is_tracer() || k.is_tracer() || v.is_tracer();
  require_forward(element_of(q), q.shape(2), options.parts() > 0);
  if (traced && options.parts() == 0) require(backward, "gradients");
  options.logsumexp = logsumexp;
  if (logsumexp || (traced && options.parts() == 0)) return make_forward(inputs, options, s);  // a gradient may be requested
  const mx::Shape shape{q.shape(0), q.shape(1), q.shape(2), int(options.value.width(v))};
  auto primitive = std::make_shared<FlashForward>(s, options);
  return {mx::array(shape, q.dtype(), std::move(primitive), std::move(inputs))};
}

}  // namespace fatui

namespace mx = mlx::core;
namespace nb = nanobind;

namespace {

using fatui::MaybeArray;

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
  return {out[0], out[2]};
}

double read_bandwidth(const mx::array& a, const mx::array& b) {
  const auto memory = [](const mx::array& x) {
    return fatui::Memory{x.data<char>(), int64_t(x.data_size() * x.itemsize())};
  };
  return fatui::read_bandwidth(memory(a), memory(b));
}

// Arrays of NumPy come by address, whose lengths attention/kernels/cpu/mask_lists.py checks.
fatui::BlockFlags block_flags(uintptr_t flags, const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& block,
                              const std::array<int64_t, 2>& tiles) {
  fatui::require(fatui::count_blocks, "lists");
  return {reinterpret_cast<const uint8_t*>(flags), shape[0], shape[1], shape[2], block[0], block[1], tiles[0], tiles[1]};
}

template <class T>
nb::object bytes_of(const std::vector<T>& numbers) {
  return nb::bytearray(numbers.data(), numbers.size() * sizeof(T));
}

nb::tuple intervals(uintptr_t low, uintptr_t high, const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& tile) {
  fatui::require(fatui::list_intervals, "lists");
  const auto made = fatui::list_intervals({reinterpret_cast<const int32_t*>(low), reinterpret_cast<const int32_t*>(high),
                                           shape[0], shape[1], shape[2], tile[0], tile[1]});
  return nb::make_tuple(bytes_of(made.offsets), bytes_of(made.entries), bytes_of(made.bits), made.pairs);
}

int64_t workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t head_dim,
                  int64_t value_dim, int element, bool training, bool quantized) {
  fatui::Problem p;
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.queries = queries, p.keys = keys;
  p.head_dim = head_dim, p.value_dim = value_dim, p.query.element = fatui::Element(element);
  fatui::require_forward(p.query.element, queries, quantized);
  if (training) fatui::require(fatui::backward, "gradients");
  if (quantized) p.key_packing.mode = fatui::Mode::affine, p.key_packing.bits = 8;  // of any format: most bytes, most threads
  const int64_t forward = fatui::forward_workspace(p);
  return training ? std::max(forward, fatui::backward_workspace(p)) : forward;
}
}  // namespace

NB_MODULE(fatui_cpu_kernel, m) {
  nb::exception<fatui::MissingPart>(m, "MissingPart", PyExc_RuntimeError);
  m.def("flash_attention", &attention, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg() = 0, nb::arg().none() = nb::none(), nb::arg().none() = nb::none(),
        nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg() = 0, nb::arg() = 0);
  m.def("flash_attention_with_logsumexp", &with_logsumexp, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg() = 0, nb::arg().none() = nb::none(),
        nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg().none() = nb::none(), nb::arg() = 0,
        nb::arg() = 0);
  if (fatui::bind_caches != nullptr) fatui::bind_caches(m);
  else {
    for (const char* name : {"flash_attention_quantized", "append_quantized"})
      m.def(name, [](nb::args, nb::kwargs) { throw fatui::MissingPart("quantized"); });
    for (const char* name : {"own_copy", "stream_step", "stream_steps"})
      m.def(name, [](nb::args, nb::kwargs) { throw fatui::MissingPart("streams"); });
  }
  m.def("count_blocks", [](uintptr_t flags, const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& block,
                           const std::array<int64_t, 2>& tiles, uintptr_t offsets) {
    fatui::count_blocks(block_flags(flags, shape, block, tiles), reinterpret_cast<int32_t*>(offsets));
  }, nb::call_guard<nb::gil_scoped_release>());
  m.def("list_blocks", [](uintptr_t flags, const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& block,
                          const std::array<int64_t, 2>& tiles, uintptr_t offsets, uintptr_t entries) {
    fatui::list_blocks(block_flags(flags, shape, block, tiles), reinterpret_cast<const int32_t*>(offsets),
                       reinterpret_cast<int64_t*>(entries));
  }, nb::call_guard<nb::gil_scoped_release>());
  m.def("list_intervals", &intervals);
  m.def("workspace_bytes", &workspace, "Bytes above inputs and outputs, for shapes alone.");
  m.def("fma_peak", &fatui::fma_peak, "FLOP/s of multiply-adds in registers, float32, on all threads.");
  m.def("limit_threads", &fatui::limit_threads, "Limit the threads of calls, as a quota of CPU time does; 0: no limit.");
  m.def("variant", &fatui::variant, "The instruction set that runs.");
  m.def("is_tracer", [](const mx::array& a) { return a.is_tracer(); }, "Whether an array is part of a transformation of MLX.");
  m.def("read_bandwidth", &read_bandwidth, "Bytes/s of a plain loop that reads two evaluated arrays, all threads.");
}
