// The operation called from Python: validation of shapes and dtypes, and its error messages.
#include <stdexcept>

#include <mlx/ops.h>

#include "primitive.hpp"

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
}  // namespace

std::vector<mx::array> flash_attention(const mx::array& q, const mx::array& k, const mx::array& v, Options options,
                                       const std::optional<mx::array>& mask, bool logsumexp) {
  check(q, k, v);
  const mx::Stream s = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{q, k, v};
  if (mask) inputs.push_back(four_dimensional(*mask, {q.shape(0), q.shape(1), q.shape(2), k.shape(2)}, s));
  auto primitive = std::make_shared<FlashForward>(s, options);
  if (logsumexp || q.is_tracer() || k.is_tracer() || v.is_tracer())  // a gradient may be requested
    return mx::array::make_arrays(primitive->output_shapes(inputs), {q.dtype(), mx::float32, mx::float32}, primitive,
                                  inputs);
  const mx::Shape shape{q.shape(0), q.shape(1), q.shape(2), v.shape(3)};
  return {mx::array(shape, q.dtype(), std::move(primitive), std::move(inputs))};
}

}  // namespace fatui
