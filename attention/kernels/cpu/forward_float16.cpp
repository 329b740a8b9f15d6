// Forward pass in float16, widened to float32 tile by tile.
#include "forward_walk.hpp"

namespace fatui {

void attend_float16(const ForwardCall& call, const Item& item, Partials& partials) { attend_panels<float16_t>(call, item, partials); }
void forward_float16(const ForwardCall& call) { walk<float16_t>(call); }
int64_t float16_workspace(const Problem& p) { return workspace(p); }

}  // namespace fatui
