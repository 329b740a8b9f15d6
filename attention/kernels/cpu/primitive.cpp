#include "primitive.hpp"

#include <memory>
#include <stdexcept>
#include <typeinfo>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

namespace fatui {
namespace {

using Arrays = std::vector<mx::array>;

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

// The optional inputs begin at `next`.
Problem problem_of(const Options& options, const Arrays& inputs, size_t next) {
  const mx::array &q = inputs[0], &k = inputs[1], &v = inputs[2];
  Problem p;
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
  p.kv_heads = k.shape(1), p.keys = k.shape(2), p.value_dim = v.shape(3);
  p.scale = options.scale, p.softcap = options.softcap, p.causal = options.causal, p.window = options.window;
  p.items = options.items;
  return p;
}

void* allocate(mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  if (out.nbytes() > 0 && out.data<char>() == nullptr)  // MLX's allocator does not report the failure
    throw std::runtime_error("[flash_attention] no memory for an array of " + std::to_string(out.nbytes()) + " bytes.");
  return out.data<char>();
}

[[noreturn]] void refuse_gpu() { throw std::runtime_error("The CPU attention kernel runs on MLX's CPU stream only."); }

[[noreturn]] void refuse_second_derivative() {
  throw std::invalid_argument("flash_attention has no second derivative; implementation 'baseline' has.");
}

// vmap: the mapped axis becomes part of the batch.
mx::array with_batch(const mx::array& a, int axis, int count, int batch, mx::Stream s) {
  mx::array x = axis >= 0 ? mx::moveaxis(a, axis, 0, s) : mx::expand_dims(a, 0, s);
  mx::Shape shape = x.shape();
  if (axis < 0 && batch == 1 && shape[1] == 1 && a.ndim() == 4 && count == 1) return mx::flatten(x, 0, 1, s);
  shape[0] = count, shape[1] = batch;
  return mx::flatten(mx::broadcast_to(x, shape, s), 0, 1, s);
}

int mapped_count(const Arrays& inputs, const std::vector<int>& axes) {
  for (size_t i = 0; i < inputs.size(); i++)
    if (axes[i] >= 0) return inputs[i].shape(axes[i]);
  return 1;
}

// Lists stay as they are: their planes repeat over the batch. Slopes (1 or B, H) follow the batch.
Arrays batched(const Arrays& inputs, const std::vector<int>& axes, int count, const Options& options, mx::Stream s) {
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

std::pair<Arrays, std::vector<int>> unbatched(const Arrays& outputs, int count, mx::Stream s) {
  Arrays out;
  for (const auto& a : outputs) out.push_back(mx::unflatten(a, 0, {count, a.shape(0) / count}, s));
  return {out, std::vector<int>(out.size(), 0)};
}

Arrays make_forward(const Arrays& inputs, const Options& options, mx::Stream s) {
  auto primitive = std::make_shared<FlashForward>(s, options);
  return mx::array::make_arrays(primitive->output_shapes(inputs), {inputs[0].dtype(), mx::float32, mx::float32},
                                primitive, inputs);
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
  if (outputs.size() > 1) {
    call.logsumexp = static_cast<float*>(allocate(outputs[1]));
    call.statistics = static_cast<float*>(allocate(outputs[2]));
  }
  mx::cpu::get_command_encoder(stream()).dispatch([call] { forward(call); });
}

void FlashForward::eval_gpu(const Arrays&, Arrays&) { refuse_gpu(); }

Arrays FlashForward::vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
                         const Arrays& outputs) {
  for (const int n : argnums)
    if (n > 2 && primals[n].dtype() != mx::bool_)
      throw std::invalid_argument(options_.sloped && n + 1 == int(primals.size())
                                      ? "flash_attention has no gradient for the slopes of alibi."
                                      : "flash_attention has no gradient for the mask; attention() has.");
  Arrays inputs(primals.begin(), primals.begin() + 3);
  inputs.insert(inputs.end(), {outputs[0], outputs[2], mx::astype(cotangents[0], outputs[0].dtype(), stream()),
                               mx::astype(cotangents[1], mx::float32, stream())});
  inputs.insert(inputs.end(), primals.begin() + 3, primals.end());
  const Arrays gradients = make_backward(inputs, options_, stream());
  Arrays wanted;
  for (const int n : argnums) wanted.push_back(n > 2 ? mx::zeros_like(primals[n], stream()) : gradients[n]);
  return wanted;
}

Arrays FlashForward::jvp(const Arrays&, const Arrays&, const std::vector<int>&) {
  throw std::invalid_argument("flash_attention has no forward-mode derivative (jvp); implementation 'baseline' has.");
}

std::pair<Arrays, std::vector<int>> FlashForward::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  const int count = mapped_count(inputs, axes);
  return unbatched(make_forward(batched(inputs, axes, count, options_, stream()), options_, stream()), count, stream());
}

bool FlashForward::is_equivalent(const mx::Primitive& other) const {
  return typeid(other) == typeid(*this) && static_cast<const FlashForward&>(other).options_ == options_;
}

std::vector<mx::Shape> FlashForward::output_shapes(const Arrays& inputs) {
  const auto& q = inputs[0];
  const mx::Shape rows{q.shape(0), q.shape(1), q.shape(2)};
  return {{rows[0], rows[1], rows[2], inputs[2].shape(3)}, rows, {rows[0], rows[1], rows[2], 3}};
}

void FlashBackward::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  BackwardCall call;
  call.problem = problem_of(options_, inputs, 7);
  call.output = tensor_of(inputs[3]);
  call.statistics = tensor_of(inputs[4]);
  call.output_gradient = tensor_of(inputs[5]);
  call.logsumexp_gradient = tensor_of(inputs[6]);
  call.query_gradient = allocate(outputs[0]);
  call.key_gradient = allocate(outputs[1]);
  call.value_gradient = allocate(outputs[2]);
  mx::cpu::get_command_encoder(stream()).dispatch([call] { backward(call); });
}

void FlashBackward::eval_gpu(const Arrays&, Arrays&) { refuse_gpu(); }

Arrays FlashBackward::vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) {
  refuse_second_derivative();
}

Arrays FlashBackward::jvp(const Arrays&, const Arrays&, const std::vector<int>&) { refuse_second_derivative(); }

std::pair<Arrays, std::vector<int>> FlashBackward::vmap(const Arrays& inputs, const std::vector<int>& axes) {
  const int count = mapped_count(inputs, axes);
  return unbatched(make_backward(batched(inputs, axes, count, options_, stream()), options_, stream()), count, stream());
}

bool FlashBackward::is_equivalent(const mx::Primitive& other) const {
  return typeid(other) == typeid(*this) && static_cast<const FlashBackward&>(other).options_ == options_;
}

std::vector<mx::Shape> FlashBackward::output_shapes(const Arrays& inputs) {
  return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
}

}  // namespace fatui
