// Forward pass of items with few rows (decoding), in all dtypes.
#include "decode.hpp"
#include "forward.hpp"

namespace fatui {
namespace {

// Scores beyond this have rounding errors that make probabilities depend on the order of summation.
constexpr float largest_reordered = 0x1p12f;

// Whether the kernel for many rows must recompute the item: its scores are more accurate and summed as in the backward pass.
inline bool wants_panels(const ForwardCall& call, const Item& item, const Softmax& state) {
  const Coarse coarse(call.problem);
  const auto beyond = [&](float x) {
    return coarse.has(x) ||
           (call.statistics != nullptr && std::abs(x) > largest_reordered && x != -infinity);
  };
  return std::any_of(state.maximum, state.maximum + item.rows(), beyond);
}

template <class T, Reading reading>
void attend_rows(const ForwardCall& call, const Item& item, Partials& partials) {
  const Problem& p = call.problem;
  const Buffers buffer(p, 0), spare(p, 1);
  const Bounds bounds = bounds_of(p, item);
  Softmax state;
  state.reset();
  FewRows<T, reading> few{p, item, bounds, state, buffer.query, buffer.scores, spare.output, buffer.key, buffer.value};
  KeyRuns runs(p, item, bounds);
  few.attend(runs);
  if (p.spans == nullptr && wants_panels(call, item, state)) {
    if constexpr (bfloat16_pairs && std::is_same_v<T, bfloat16_t>)
      if (!is_quantized(p)) return attend_bfloat16(call, item, partials);
    if constexpr (std::is_same_v<T, float>) return attend_float32(call, item, partials);
    else if constexpr (std::is_same_v<T, float16_t>) return attend_float16(call, item, partials);
    else return attend_widened(call, item, partials);
  }
  if (!partials.wanted()) return write_few_rows<T>(call, item, few.output, few.dv, state);
  Rows<float> rows;
  rows.stride = 1, rows.count = few.rows;
  for (int64_t r = 0; r < few.rows; r++) rows.row[r] = few.output + r * few.dv;
  transpose_rows(rows, p.value_dim, round_up(few.rows, lanes), buffer.output);
  partials.keep(item, buffer.output, state);
}

template <class T>
void attend_few(const ForwardCall& call, const Item& item, Partials& partials) {
  const Problem& p = call.problem;
  if (is_quantized(p)) return attend_rows<T, Reading::copied>(call, item, partials);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16_t>)
    if (whole_words(p.key, p.head_dim) && whole_words(p.value, p.value_dim) &&
        (item.rows() > 1 || has_lists(p) || !to_l2(p)))  // one row from memory is computed key by key
      return attend_rows<T, Reading::pairs>(call, item, partials);
#endif
  if (whole_vectors<T>(p.key, p.head_dim) && whole_vectors<T>(p.value, p.value_dim))
    return attend_rows<T, Reading::in_place>(call, item, partials);
  attend_rows<T, Reading::copied>(call, item, partials);
}

}  // namespace

void attend_few_float32(const ForwardCall& call, const Item& item, Partials& partials) { attend_few<float>(call, item, partials); }
void attend_few_float16(const ForwardCall& call, const Item& item, Partials& partials) {
  attend_few<float16_t>(call, item, partials);
}
void attend_few_bfloat16(const ForwardCall& call, const Item& item, Partials& partials) {
  attend_few<bfloat16_t>(call, item, partials);
}

}  // namespace fatui
