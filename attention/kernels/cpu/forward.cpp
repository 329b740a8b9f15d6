// Which forward pass a call takes.
#include "lists.hpp"

namespace fatui {

// Whether the CPU multiplies bfloat16 pairs, and the call has enough rows to amortise transposing V. Quantized keys and values
// are read by the kernel for all dtypes.
static bool in_pairs(const Problem& p) {
  const Schedule schedule(p);
  return bfloat16_pairs && !is_quantized(p) && schedule.heads_per_tile * p.queries > few_rows;
}

void forward(const ForwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch * p.heads * p.queries == 0) return;
  switch (p.query.element) {
    case Element::float16: return forward_float16(call);
    case Element::bfloat16: return in_pairs(p) ? forward_bfloat16(call) : forward_widened(call);
    default: return forward_float32(call);
  }
}

int64_t forward_workspace(const Problem& p) {
  switch (p.query.element) {
    case Element::float16: return float16_workspace(p);
    case Element::bfloat16: return in_pairs(p) ? bfloat16_workspace(p) : widened_workspace(p);
    default: return float32_workspace(p);
  }
}

}  // namespace fatui
