// Forward pass in float32.
#include "forward_walk.hpp"

namespace fatui {

void attend_float32(const ForwardCall& call, const Item& item, Partials& partials) { attend_panels<float>(call, item, partials); }
void forward_float32(const ForwardCall& call) { walk<float>(call); }
int64_t float32_workspace(const Problem& p) { return workspace(p); }

}  // namespace fatui
