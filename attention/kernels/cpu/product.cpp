// The products of the forward pass in float32, which all dtypes share.
#include "product.hpp"

namespace fatui {

FATUI_FORWARD_PRODUCTS()

}  // namespace fatui
