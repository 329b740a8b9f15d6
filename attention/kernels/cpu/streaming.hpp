// One token of an endless sequence: its key and value are written into slots that are used again and again, and its query
// attends to what the slots hold, as they lie.
//
//   slots   0 .. first-1   | first                           first + ring - 1
//           first tokens   | this lap ->   w | <- lap before
//   query   rotated for    | slot w          | slot w + ring            (first tokens: the position after all that are kept)
//
// A key is rotated once, to its slot, and the query by what makes the distances those of the tokens that are kept.
#pragma once
#include <vector>

#include "append.hpp"

namespace fatui {

struct StreamRow {
  int64_t seen = 0, oldest = 0;  // tokens before this one; position of the oldest that the ring still has
  bool operator==(const StreamRow&) const = default;
};

struct StreamStep {
  ForwardCall call;        // q (B, H, 1, D), slots of keys and values, output; lengths but for the number of keys
  Tensor new_key, new_value;  // (B, Hkv, 1, .)
  std::vector<StreamRow> rows;
  int64_t first = 0, window = 0, ring = 0;
  std::vector<float> radians;  // of a position, one for each pair of dims; empty: no rotary positions
  bool adjacent = false;       // pairs are adjacent dims, not halves
  bool rotated = false;        // q and k are rotated to the slot already
};

// Writes the token into its slots, and attends.
FATUI_PART void stream_step(const StreamStep& step);

}  // namespace fatui
