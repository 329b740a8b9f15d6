// The Python module's functions for quantized keys and values, and for streams. Apart from the others, because a first call of
// attention needs none of them.
#include "binding.hpp"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <typeinfo>

#include "streaming.hpp"

namespace fatui {

// Quantizes new rows and writes them into a cache's buffers. Inputs: numbers, scales and biases of keys, those of values, new
// keys, new values. Outputs: the buffers, in the memory of the inputs where nobody else has these; and, where fewer than all
// rows are in use, the rows in use of each, without a copy.
class AppendQuantized : public CpuOperation {
 public:
  AppendQuantized(mx::Stream stream, Format key, Format value, int row, int used)
      : CpuOperation(stream), key_(key), value_(value), row_(row), used_(used) {}
  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const Axes& argnums, const Arrays& outputs) override;
  Arrays jvp(const Arrays& primals, const Arrays& tangents, const Axes& argnums) override;
  std::pair<Arrays, Axes> vmap(const Arrays& inputs, const Axes& axes) override;
  const char* name() const override { return "FatuiAppendQuantized"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;

 private:
  Format key_, value_;
  int row_, used_;
};

namespace {

// A copy in rows that are side by side, of an array with any strides.
struct Copy {
  const char* from;
  char* to;
  std::array<int64_t, 4> shape, stride;  // in elements
  int64_t size;                          // bytes of an element

  void run() const {
    char* out = to;
    const auto [b, h, r, c] = shape;
    for (int64_t i = 0; i < b * h * r; i++) {
      const char* row = from + size * (i / r / h * stride[0] + i / r % h * stride[1] + i % r * stride[2]);
      if (stride[3] == 1) std::memcpy(out, row, c * size);
      else for (int64_t j = 0; j < c; j++) std::memcpy(out + j * size, row + j * stride[3] * size, size);
      out += c * size;
    }
  }
};

Copy copy_of(const mx::array& from, void* to) {
  Copy copy{from.data<char>(), static_cast<char*>(to), {}, {}, int64_t(from.itemsize())};
  for (int i = 0; i < 4; i++) copy.shape[i] = from.shape(i), copy.stride[i] = from.strides()[i];
  return copy;
}

// The first rows of each head of a buffer.
void view_rows(const mx::array& buffer, mx::array& view) {
  const int64_t heads = int64_t(buffer.shape(0)) * buffer.shape(1), row = buffer.shape(3);
  const bool contiguous = heads == 1;
  const auto size = size_t((heads - 1) * buffer.shape(2) * row + view.shape(2) * row);
  view.copy_shared_buffer(buffer, buffer.strides(), {contiguous, contiguous, contiguous && view.size() == 1}, size);
}

NewRows new_rows(const mx::array& rows, const Format& format, const Arrays& buffers, size_t& next, int first) {
  NewRows x;
  x.rows = tensor_of(rows), x.numbers = tensor_of(buffers[next++]);
  x.packing = packing_of(format, buffers, next);
  x.batch = rows.shape(0), x.heads = rows.shape(1), x.count = rows.shape(2), x.width = rows.shape(3), x.first = first;
  return x;
}
}  // namespace

void AppendQuantized::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  // MLX keeps the inputs once for each output of a primitive, so that none of them seems to be at its last use. They are
  // cleared after this call, unless a transformation keeps the graph; the other outputs' are cleared before it.
  if (!outputs[0].is_tracer())
    for (mx::array& out : outputs)
      if (&out.inputs() != &inputs) out.inputs().clear();
  const size_t count = inputs.size() - 2;
  std::vector<Copy> copies;
  for (size_t i = 0; i < count; i++) {
    if (inputs[i].is_donatable() && inputs[i].flags().row_contiguous) outputs[i].copy_shared_buffer(inputs[i]);
    else copies.push_back(copy_of(inputs[i], allocate(outputs[i])));
    if (outputs.size() > count) view_rows(outputs[i], outputs[count + i]);
  }
  size_t next = 0;
  const NewRows keys = new_rows(inputs[count], key_, outputs, next, row_);
  const NewRows values = new_rows(inputs[count + 1], value_, outputs, next, row_);
  mx::cpu::get_command_encoder(stream()).dispatch([copies = std::move(copies), keys, values] {
    for (const Copy& copy : copies) copy.run();
    quantize_into(keys, values);
  });
}

Arrays AppendQuantized::vjp(const Arrays&, const Arrays&, const Axes&, const Arrays&) {
  throw std::invalid_argument("Writing into a quantized cache has no gradient.");
}

Arrays AppendQuantized::jvp(const Arrays&, const Arrays&, const Axes&) {
  throw std::invalid_argument("Writing into a quantized cache has no gradient.");
}

std::pair<Arrays, Axes> AppendQuantized::vmap(const Arrays&, const Axes&) {
  throw std::invalid_argument("Writing into a quantized cache has no vmap.");
}

bool AppendQuantized::is_equivalent(const mx::Primitive& other) const {
  if (typeid(other) != typeid(*this)) return false;
  const auto& o = static_cast<const AppendQuantized&>(other);
  return o.key_ == key_ && o.value_ == value_ && o.row_ == row_ && o.used_ == used_;
}

std::vector<mx::Shape> AppendQuantized::output_shapes(const Arrays& inputs) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i + 2 < inputs.size(); i++) shapes.push_back(inputs[i].shape());
  if (used_ == inputs[0].shape(2)) return shapes;
  for (size_t i = 0, count = shapes.size(); i < count; i++) shapes.push_back(shapes[i]), shapes.back()[2] = used_;
  return shapes;
}

// The operation: validates shapes and dtypes (throws std::invalid_argument).
std::vector<mx::array> append_quantized(const Arrays& buffers, const mx::array& keys, const mx::array& values,
                                        const Format& key, const Format& value, int row, int used) {
  require(quantize_into, "quantized");
  const auto stop = [](const std::string& reason) { throw std::invalid_argument("[append_quantized] " + reason); };
  if (int(buffers.size()) != 2 + key.parts() + value.parts()) stop("numbers, scales and biases of keys and values are needed.");
  const int capacity = buffers[0].ndim() == 4 ? buffers[0].shape(2) : 0;
  if (keys.ndim() != 4 || values.ndim() != 4 || keys.shape(2) != values.shape(2) || row < 0 ||
      row + keys.shape(2) > used || used > capacity)
    stop("rows of keys " + text(keys.shape()) + " and values " + text(values.shape()) + " do not fit in rows " +
         std::to_string(row) + " to " + std::to_string(used) + " of " + std::to_string(capacity) + ".");
  size_t next = 0;
  for (const auto& [rows, format] : {std::pair(&keys, &key), std::pair(&values, &value)}) {
    for (int i = 0; i < 1 + format->parts(); i++, next++) {
      mx::Shape shape = rows->shape();
      const int width = shape[3];
      shape[2] = capacity, shape[3] = i == 0 ? width * format->bits / 32 : width / format->group;
      const auto type = i == 0 ? mx::uint32 : format->has_biases() ? rows->dtype() : mx::uint8;
      if (!is_floating(rows->dtype()) || width % format->group != 0 || buffers[next].shape() != shape ||
          buffers[next].dtype() != type)
        stop("rows " + text(rows->shape()) + " do not fit a buffer " + text(buffers[next].shape()) + ", or their types differ.");
    }
  }
  Arrays inputs = buffers;
  inputs.push_back(keys), inputs.push_back(values);
  auto primitive = std::make_shared<AppendQuantized>(mx::default_stream(mx::Device::cpu), key, value, row, used);
  const std::vector<mx::Shape> shapes = primitive->output_shapes(inputs);
  std::vector<mx::Dtype> types;
  for (size_t i = 0; i < shapes.size(); i++) types.push_back(buffers[i % buffers.size()].dtype());
  return mx::array::make_arrays(shapes, types, primitive, inputs);
}

// An array that needs no evaluation, for what is written to it now.
mx::array evaluated(const mx::Shape& shape, mx::Dtype type) {
  size_t bytes = type.size();
  for (const auto n : shape) bytes *= size_t(n);
  mx::array made(mx::allocator::malloc(bytes), shape, type);
  check_memory(made, "stream_step");
  return made;
}

// A step whose arguments fit. Inputs: query, keys, values, and their parts.
mx::array run_step(const Arrays& inputs, const mx::array& k, const mx::array& v, StreamStep& step, const Format& key,
                   const Format& value) {
  const mx::array& q = inputs[0];
  Options options{step.call.problem.scale, step.call.problem.softcap};
  options.key = key, options.value = value;
  step.call.problem = problem_of(options, inputs, 3);
  step.new_key = tensor_of(k), step.new_value = tensor_of(v);
  mx::array out = evaluated({q.shape(0), q.shape(1), 1, v.shape(3)}, q.dtype());
  step.call.output = out.data<char>();
  stream_step(step);
  return out;
}

// One token of an endless sequence, computed at once on the calling thread: its key and value are written into the slots in
// place, which nothing else may refer to. None unless all arrays are evaluated and that is so.
MaybeArray stream_step(const mx::array& q, const mx::array& k, const mx::array& v, const Arrays& slots, StreamStep& step,
                       const Format& key, const Format& value) {
  const size_t count = 2 + key.parts() + value.parts();
  const auto stop = [](const std::string& what) { throw std::invalid_argument("[stream_step] " + what); };
  if (slots.size() != count) stop("slots of keys and values are needed, with all their parts.");
  const size_t first_value = 1 + key.parts();
  check(q, slots[0], slots[first_value], key, value);
  require_forward(element_of(q), 1, count > 2);
  require<void(const StreamStep&)>(stream_step, "streams");
  mx::Shape key_shape = slots[0].shape(), value_shape = slots[first_value].shape();
  key_shape[2] = value_shape[2] = 1;
  key_shape[3] = int(key.width(slots[0])), value_shape[3] = int(value.width(slots[first_value]));
  if (q.shape(2) != 1 || k.shape() != key_shape || v.shape() != value_shape || k.dtype() != q.dtype() || v.dtype() != q.dtype())
    stop("one token of q " + text(q.shape()) + ", k " + text(k.shape()) + " and v " + text(v.shape()) +
         " does not fit the slots.");
  Arrays inputs{q, slots[0], slots[first_value]};
  add_parts(inputs, key, slots[0], key.parts() > 0 ? MaybeArray(slots[1]) : std::nullopt,
            key.has_biases() ? MaybeArray(slots[2]) : std::nullopt, "k");
  add_parts(inputs, value, slots[first_value], value.parts() > 0 ? MaybeArray(slots[first_value + 1]) : std::nullopt,
            value.has_biases() ? MaybeArray(slots[first_value + 2]) : std::nullopt, "v");
  if (int(step.rows.size()) != q.shape(0)) stop("each row of the batch has its own number of tokens.");
  if (slots[0].shape(2) != step.first + step.ring) stop("there are first + ring slots.");
  for (const mx::array* a : {&q, &k, &v})
    if (!a->is_available()) return std::nullopt;
  return run_step(inputs, k, v, step, key, value);
}

// A copy with memory of its own.
mx::array own_copy(const mx::array& a) {
  mx::array out = evaluated(a.shape(), a.dtype());
  copy_of(a, out.data<char>()).run();
  return out;
}

namespace {

// Quantized keys and values: their numbers, scales and biases; formats as mode, bits and group size.
std::pair<mx::array, MaybeArray> of_quantized(const mx::array& q, const mx::array& k, const mx::array& v, double scale,
                                              bool causal, int64_t window, float softcap, const MaybeArray& mask,
                                              int64_t items, const MaybeArray& slopes, const MaybeArray& offsets,
                                              const MaybeArray& entries, const MaybeArray& bits, int64_t list_batches,
                                              int64_t list_heads, const MaybeArray& key_scales,
                                              const MaybeArray& key_biases, const MaybeArray& value_scales,
                                              const MaybeArray& value_biases, const std::array<int32_t, 3>& key,
                                              const std::array<int32_t, 3>& value, bool logsumexp) {
  Options options{scale, softcap, causal, window, items, list_batches, list_heads};
  options.key = format_of(key), options.value = format_of(value);
  const Extras extras{mask, offsets, entries, bits, slopes, key_scales, key_biases, value_scales, value_biases};
  const auto out = flash_attention(q, k, v, options, extras, logsumexp);
  return {out[0], logsumexp ? MaybeArray(out[2]) : std::nullopt};
}

std::vector<mx::array> append(const std::vector<mx::array>& buffers, const mx::array& keys, const mx::array& values,
                              const std::array<int32_t, 3>& key, const std::array<int32_t, 3>& value, int row, int used) {
  return append_quantized(buffers, keys, values, format_of(key), format_of(value), row, used);
}

// A step is computed at once, and is no operation of which MLX could make a gradient.
void refuse_traced(const mx::array& q, const mx::array& k, const mx::array& v) {
  if (q.is_tracer() || k.is_tracer() || v.is_tracer())
    throw std::invalid_argument("[stream_step] the arrays are part of a transformation of MLX.");
}

// Whether slots can be written in place: evaluated, contiguous, and nothing but the caller's object refers to them.
bool all_own(const std::vector<mx::array*>& arrays) {
  return std::all_of(arrays.begin(), arrays.end(), [](const mx::array* a) {
    return a->is_available() && a->is_donatable() && a->flags().row_contiguous;
  });
}

// What stays the same from step to step.
StreamStep step_of(const mx::array& q, int64_t first, int64_t window, int64_t ring, double scale, float softcap,
                   const MaybeArray& radians, bool adjacent, bool rotated) {
  StreamStep step;
  step.call.problem.scale = scale, step.call.problem.softcap = softcap;
  step.first = first, step.window = window, step.ring = ring, step.adjacent = adjacent, step.rotated = rotated;
  if (radians) {
    if (!radians->is_available() || radians->dtype() != mx::float32 || radians->ndim() != 1 || !radians->flags().row_contiguous ||
        2 * radians->shape(0) > q.shape(3))
      throw std::invalid_argument("[stream_step] radians are evaluated float32, one for each pair of dims.");
    step.radians.assign(radians->data<float>(), radians->data<float>() + radians->size());
  }
  return step;
}

MaybeArray stream(const mx::array& q, const mx::array& k, const mx::array& v, const nb::list& slots,
                  const std::array<int32_t, 3>& key, const std::array<int32_t, 3>& value, int64_t first, int64_t window,
                  int64_t ring, const std::vector<std::array<int64_t, 2>>& rows, double scale, float softcap,
                  const MaybeArray& radians, bool adjacent, bool rotated) {
  refuse_traced(q, k, v);
  Arrays held;
  std::vector<mx::array*> objects;
  for (const nb::handle one : slots) objects.push_back(nb::cast<mx::array*>(one));
  if (!all_own(objects)) return std::nullopt;
  for (const mx::array* one : objects) held.push_back(*one);
  StreamStep step = step_of(q, first, window, ring, scale, softcap, radians, adjacent, rotated);
  for (const auto& [seen, oldest] : rows) step.rows.push_back({seen, oldest});
  return stream_step(q, k, v, held, step, format_of(key), format_of(value));
}

// Steps over full rings that are like one before: its arguments are known to fit.
class RepeatedSteps {
 public:
  // `slots`: Python's arrays of keys and values; `seen`: tokens before the first of these steps, of each row of the batch; `given`:
  // further arguments of the call, which a repeated step has too.
  RepeatedSteps(const mx::array& q, const mx::array& k, const mx::array& v, const nb::list& slots, const Format& key,
                const Format& value, StreamStep step, int64_t seen, std::array<nb::object, 4> given)
      : key_(key), value_(value), step_(std::move(step)), seen_(seen), given_(std::move(given)), scale_(step_.call.problem.scale),
        softcap_(step_.call.problem.softcap) {
    for (const mx::array* a : {&q, &k, &v}) shapes_.push_back(a->shape()), types_.push_back(a->dtype());
    for (const nb::handle one : slots) kept_.push_back(nb::borrow(one)), slots_.push_back(nb::cast<mx::array*>(one));
    step_.rows.resize(size_t(q.shape(0)));
  }

  // The output of the next step; none if it is not like the one before, or slots cannot be written in place.
  MaybeArray next(const mx::array& q, const mx::array& k, const mx::array& v, const std::array<nb::handle, 4>& given) {
    refuse_traced(q, k, v);
    const std::array<const mx::array*, 3> arrays{&q, &k, &v};
    for (size_t i = 0; i < arrays.size(); i++)
      if (!arrays[i]->is_available() || arrays[i]->shape() != shapes_[i] || arrays[i]->dtype() != types_[i]) return std::nullopt;
    for (size_t i = 0; i < given.size(); i++)
      if (!is_same(given[i], given_[i])) return std::nullopt;
    if (mx::default_device() != mx::Device::cpu || !all_own(slots_)) return std::nullopt;
    const size_t first_value = 1 + key_.parts();
    Arrays inputs{q, *slots_[0], *slots_[first_value]};
    for (size_t i = 1; i < slots_.size(); i++)
      if (i != first_value) inputs.push_back(*slots_[i]);
    for (StreamRow& row : step_.rows) row = {seen_, seen_ - step_.ring};
    step_.call.problem.scale = scale_, step_.call.problem.softcap = softcap_;
    seen_++;
    return run_step(inputs, k, v, step_, key_, value_);
  }

 private:
  static bool is_same(nb::handle a, nb::handle b) {
    return a.is(b) || (nb::isinstance<nb::float_>(a) && nb::isinstance<nb::float_>(b) && a.equal(b));
  }

  Format key_, value_;
  StreamStep step_;
  int64_t seen_;
  std::array<nb::object, 4> given_;
  double scale_;
  float softcap_;
  std::vector<mx::Shape> shapes_;
  std::vector<mx::Dtype> types_;
  std::vector<nb::object> kept_;  // owners of the slots
  std::vector<mx::array*> slots_;
};
}  // namespace

void bind_caches(nb::module_& m) {
  m.def("flash_attention_quantized", &of_quantized);
  m.def("append_quantized", &append);
  m.def("own_copy", [](const mx::array& a) {
    if (!a.is_available() || a.ndim() != 4) throw std::invalid_argument("[own_copy] the array is evaluated, of 4 dimensions.");
    return own_copy(a);
  });
  m.def("stream_step", &stream, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg());
  m.def("stream_steps",
        [](const mx::array& q, const mx::array& k, const mx::array& v, const nb::list& slots, const std::array<int32_t, 3>& key,
           const std::array<int32_t, 3>& value, int64_t first, int64_t window, int64_t ring, int64_t seen, double scale,
           float softcap, const MaybeArray& radians, bool adjacent, bool rotated, const nb::tuple& given) {
          StreamStep step = step_of(q, first, window, ring, scale, softcap, radians, adjacent, rotated);
          const auto steps = std::make_shared<RepeatedSteps>(q, k, v, slots, format_of(key), format_of(value), std::move(step), seen,
                                                             std::array<nb::object, 4>{given[0], given[1], given[2], given[3]});
          // A function, not a Python class: the classes of two versions of this library would have the same name.
          return nb::cpp_function(
              [steps](const mx::array& q, const mx::array& k, const mx::array& v, nb::handle scale, nb::handle softcap,
                      nb::handle rotated, nb::handle implementation) {
                return steps->next(q, k, v, {scale, softcap, rotated, implementation});
              },
              nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg());
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
}

}  // namespace fatui
