// The operation called from Python: validation of shapes and dtypes, and its error messages.
#include <stdexcept>

#include <mlx/ops.h>

#include "primitive.hpp"
#include "schedule.hpp"

namespace fatui {
namespace {

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument("[flash_attention] " + reason); }

std::string text(const mx::Shape& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

void check(const mx::array& q, const mx::array& k, const mx::array& v) {
  if (q.ndim() != 4 || k.ndim() != 4 || v.ndim() != 4)
    refuse("q, k and v have four dimensions; got " + text(q.shape()) + ", " + text(k.shape()) + ", " +
           text(v.shape()) + ".");
  const auto type = q.dtype();
  if (k.dtype() != type || v.dtype() != type) refuse("q, k and v have one type.");
  if (type != mx::float32 && type != mx::float16 && type != mx::bfloat16)
    refuse("the type is float32, float16 or bfloat16.");
  const bool agree = k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) && k.shape(1) == v.shape(1) &&
                     k.shape(2) == v.shape(2) && k.shape(3) == q.shape(3);
  if (!agree)
    refuse("shapes do not agree: q " + text(q.shape()) + ", k " + text(k.shape()) + ", v " + text(v.shape()) + ".");
  if (k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) refuse("the heads of q are a multiple of those of k.");
  for (const int dim : {q.shape(3), v.shape(3)})
    if (dim < 1 || dim > 512) refuse("head dimensions go from 1 to 512; got " + std::to_string(dim) + ".");
}

mx::array four_dimensional(const mx::array& mask, const mx::Shape& scores, mx::Stream s) {
  const bool known = mask.dtype() == mx::bool_ || mask.dtype() == mx::float32 || mask.dtype() == mx::float16 ||
                     mask.dtype() == mx::bfloat16;
  if (!known) refuse("a mask is boolean (true = attend) or of a floating type (added to the scores).");
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
  check(q, k, v);
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{q, k, v};
  options.masked = extras.mask.has_value(), options.sloped = extras.slopes.has_value();
  if (options.masked) inputs.push_back(four_dimensional(*extras.mask, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, s));
  if (options.list_batches > 0) add_lists(inputs, options, extras, s);
  if (options.sloped) {
    if (extras.slopes->dtype() != mx::float32 || extras.slopes->shape() != mx::Shape{q.shape(1)})
      refuse("slopes are float32 (" + std::to_string(q.shape(1)) + "); got " + text(extras.slopes->shape()) + ".");
    inputs.push_back(mx::reshape(*extras.slopes, {1, q.shape(1)}, s));
  }
  auto primitive = std::make_shared<FlashForward>(s, options);
  if (logsumexp || q.is_tracer() || k.is_tracer() || v.is_tracer())  // a gradient may be requested
    return mx::array::make_arrays(primitive->output_shapes(inputs), {q.dtype(), mx::float32, mx::float32}, primitive,
                                  inputs);
  const mx::Shape shape{q.shape(0), q.shape(1), q.shape(2), v.shape(3)};
  return {mx::array(shape, q.dtype(), std::move(primitive), std::move(inputs))};
}

}  // namespace fatui
