// Block lists of masks (attention/masks/block_list.py): of whole blocks, and of rows that each see adjacent keys.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.hpp"

namespace fatui {

// Blocks as flags, a byte each: rows x width of them, of which each is `tall` row tiles and `wide` key tiles.
struct BlockFlags {
  const uint8_t* flags;
  int64_t planes, rows, width;  // blocks
  int64_t tall, wide;           // tiles of a block
  int64_t row_tiles, key_tiles;
};

// Writes where the entries of each row tile start, and the end of the last: planes * row_tiles + 1 numbers.
FATUI_PART void count_blocks(const BlockFlags& blocks, int32_t* offsets);

// Writes the entries, (key tile, -1).
FATUI_PART void list_blocks(const BlockFlags& blocks, const int32_t* offsets, int64_t* entries);

// Rows of planes that see the keys [low, high) each, as far as there are such keys.
struct RowIntervals {
  const int32_t *low, *high;  // planes x rows
  int64_t planes, rows, keys, block_q, block_k;
};

struct IntervalLists {
  std::vector<int32_t> offsets;   // planes * row tiles + 1
  std::vector<int32_t> entries;   // (key tile, tile of bits or -1)
  std::vector<uint32_t> bits;     // of the partial tiles that differ, in the order of their first entry
  int64_t pairs = 0;              // visible ones of these planes
};
FATUI_PART IntervalLists list_intervals(const RowIntervals& intervals);

}  // namespace fatui
