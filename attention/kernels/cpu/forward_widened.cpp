// Forward pass in bfloat16, widened to float32 tile by tile: on CPUs without its products, and for calls with few rows
// or quantized keys and values.
#include "forward_walk.hpp"

namespace fatui {

void forward_widened(const ForwardCall& call) { walk<bfloat16_t>(call); }
int64_t widened_workspace(const Problem& p) { return workspace(p); }

void attend_widened(const ForwardCall& call, const Item& item, Partials& partials) {
  attend_panels<bfloat16_t>(call, item, partials);
}

}  // namespace fatui
