#include "mask_lists.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <unordered_map>
#include <utility>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "pool.hpp"
#include "schedule.hpp"

namespace fatui {
namespace {

constexpr uint64_t full = 0xffffffff00000000;  // -1 in the upper half, which is stored behind the tile

uint64_t eight_flags(const uint8_t* flags) {
  static_assert(std::endian::native == std::endian::little);
  uint64_t word;
  std::memcpy(&word, flags, 8);
  return word;
}

// Bit n is flag n, of 64.
uint64_t bits_of(const uint8_t* flags) {
#if defined(__AVX512BW__)
  const __m512i all = _mm512_loadu_si512(flags);
  return _mm512_test_epi8_mask(all, all);
#else
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) bits |= (eight_flags(flags + 8 * i) * 0x0102040810204080 >> 56) << (8 * i);
  return bits;
#endif
}

int64_t count(const uint8_t* flags, int64_t width) {
  int64_t found = 0, i = 0;
  for (; i + 64 <= width; i += 64) found += std::popcount(bits_of(flags + i));
  for (; i < width; i++) found += flags[i];
  return found;
}

// Writes the numbers of the set bits, counted from `first`, as full tiles, and returns the end.
uint64_t* list_bits(uint64_t bits, int64_t first, uint64_t* out) {
  for (; bits != 0; bits &= bits - 1) *out++ = full | uint64_t(first + std::countr_zero(bits));
  return out;
}

#if defined(__AVX512VBMI2__)
// The same for up to 16 bits, without a branch for each; writes 16 entries, of which the later are anything.
inline uint64_t* list_few_bits(uint64_t bits, __m512i numbers, int64_t first, uint64_t* out) {
  const __m128i found = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(bits, numbers));
  const __m512i tile = _mm512_set1_epi64(int64_t(full | uint64_t(first)));
  _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_cvtepu8_epi64(found), tile));
  _mm512_storeu_si512(out + 8, _mm512_add_epi64(_mm512_cvtepu8_epi64(_mm_srli_si128(found, 8)), tile));
  return out + std::popcount(bits);
}
#endif

// Lists the flags that are set, up to `end`, where the entries of other rows follow.
void list_row(const uint8_t* flags, int64_t width, uint64_t* out, [[maybe_unused]] const uint64_t* end) {
  int64_t i = 0;
#if defined(__AVX512VBMI2__)
  alignas(64) uint8_t order[64];
  std::iota(order, order + 64, uint8_t(0));
  const __m512i numbers = _mm512_load_si512(order);
  for (; i + 64 <= width; i += 64) {
    const uint64_t bits = bits_of(flags + i);
    out = end - out >= 16 && std::popcount(bits) <= 16 ? list_few_bits(bits, numbers, i, out) : list_bits(bits, i, out);
  }
#endif
  for (; i + 64 <= width; i += 64) out = list_bits(bits_of(flags + i), i, out);
  for (; i < width; i++)
    if (flags[i]) *out++ = full | uint64_t(i);
}

void list_wide_row(const BlockFlags& b, const uint8_t* flags, uint64_t* out) {
  for (int64_t i = 0; i < b.width; i++) {
    if (!flags[i]) continue;
    const int64_t end = std::min((i + 1) * b.wide, b.key_tiles);
    for (int64_t tile = i * b.wide; tile < end; tile++) *out++ = full | uint64_t(tile);
  }
}

// Calls `work(plane, row)` for all rows of blocks, on several threads if they are many.
template <class Work>
void for_rows(const BlockFlags& b, const Work& work) {
  constexpr int64_t flags_of_item = 1 << 18;
  const int64_t rows = b.planes * b.rows, of_item = std::max<int64_t>(1, flags_of_item / b.width), items = ceil_div(rows, of_item);
  parallel_for(items, int(std::min<int64_t>(items, thread_count())), [&](int64_t item) {
    for (int64_t i = item * of_item; i < std::min(rows, (item + 1) * of_item); i++) work(i / b.rows, i % b.rows);
  });
}

// The first row tile of a row of blocks, which may be the one behind the last, among those of all planes.
int64_t first_tile(const BlockFlags& b, int64_t plane, int64_t row) {
  return plane * b.row_tiles + std::min(row * b.tall, b.row_tiles);
}

// Adjacent rows of a tile whose ends are the same, or each one more than those of the row before.
struct Run {
  int32_t row, rows, low, high, low_step, high_step;
};

// An end of a run's rows, `last` that of its last row, within keys [0, keys]: the same for all rows if it is beyond them.
void clip(int32_t& first, int32_t& step, int64_t last, int64_t keys) {
  if (step == 0 || last <= 0 || first >= keys) first = int32_t(std::clamp<int64_t>(last <= 0 ? 0 : first, 0, keys)), step = 0;
}

// What a run sees of a key tile; if it is equal, the bits are.
Run within(const Run& run, int64_t first_key, int64_t keys) {
  Run seen = run;
  seen.low -= int32_t(first_key), seen.high -= int32_t(first_key);
  const int32_t last_low = seen.low + run.low_step * (run.rows - 1), last_high = seen.high + run.high_step * (run.rows - 1);
  clip(seen.low, seen.low_step, last_low, keys), clip(seen.high, seen.high_step, last_high, keys);
  if (last_high <= seen.low) seen.low = seen.high = seen.low_step = seen.high_step = 0;
  return seen;
}

// Sets the bits of a tile, and returns how many are set.
int64_t set_bits(const std::vector<Run>& runs, int64_t block_k, uint32_t* bits) {
  const int64_t words = block_k / 32;
  int64_t pairs = 0;
  for (const Run& run : runs)
    for (int32_t i = 0; i < run.rows; i++) {
      const int64_t low = std::max(run.low + run.low_step * i, 0), high = std::min<int64_t>(run.high + run.high_step * i, block_k);
      if (high <= low) continue;
      pairs += high - low;
      uint32_t* row = bits + (run.row + i) * words;
      for (int64_t w = low / 32; w * 32 < high; w++) {
        const int64_t from = std::max<int64_t>(low - 32 * w, 0), to = std::min<int64_t>(high - 32 * w, 32);
        row[w] = uint32_t((uint64_t(1) << to) - (uint64_t(1) << from));
      }
    }
  return pairs;
}

// The least and the largest ends of rows: of those that see a key, and of all.
struct Ends {
  int32_t first, last, all_from, all_to;
};
Ends ends_of(const int32_t* low, const int32_t* high, int64_t rows) {
  constexpr int32_t most = std::numeric_limits<int32_t>::max();
  int32_t first = most, last = 0, all_from = 0, all_to = most;
  for (int64_t i = 0; i < rows; i++) {  // without branches, so that it becomes vector instructions
    const int32_t sees = -int32_t(low[i] < high[i]), from = (low[i] & sees) | (most & ~sees), to = high[i] & sees;
    first = std::min(first, from), last = std::max(last, to);
    all_from = std::max(all_from, from), all_to = std::min(all_to, to);
  }
  return {first, last, all_from, all_to};
}

// Whether the ends of rows from 1 on differ from those before by what the first two do.
bool is_one_run(const int32_t* low, const int32_t* high, int64_t rows) {
  int32_t others = 0;
  const int32_t low_step = rows > 1 ? low[1] - low[0] : 0, high_step = rows > 1 ? high[1] - high[0] : 0;
  for (int64_t i = 1; i < rows; i++) others |= (low[i] - low[i - 1] - low_step) | (high[i] - high[i - 1] - high_step);
  return others == 0 && (low_step == 0 || low_step == 1) && (high_step == 0 || high_step == 1);
}

class Lister {
 public:
  explicit Lister(const RowIntervals& given) : p_(given), low_(given.block_q), high_(given.block_q) {
    const int64_t tiles = p_.planes * ceil_div(p_.rows, p_.block_q);
    made_.offsets.reserve(tiles + 1);
    made_.offsets.push_back(0);
  }

  IntervalLists run() {
    for (int64_t plane = 0; plane < p_.planes; plane++)
      for (int64_t row = 0; row < p_.rows; row += p_.block_q) list_tile(plane * p_.rows + row, std::min(p_.block_q, p_.rows - row));
    if (made_.bits.empty()) made_.bits.resize(p_.block_q * p_.block_k / 32);
    return std::move(made_);
  }

 private:
  // Key tiles of rows, the keys of the last row tile ending where the keys do.
  void list_tile(int64_t first_row, int64_t rows) {
    for (int64_t i = 0; i < rows; i++) {
      low_[i] = std::max(p_.low[first_row + i], 0);
      high_[i] = std::min(p_.high[first_row + i], int32_t(p_.keys));
    }
    const int32_t *low = low_.data(), *high = high_.data();
    const auto [first, last, all_from, all_to] = ends_of(low, high, rows);
    if (first < last) {
      const int64_t key_tiles = ceil_div(p_.keys, p_.block_k), from = ceil_div(int64_t(all_from), p_.block_k);
      const int64_t to = all_to >= p_.keys ? key_tiles : all_to / p_.block_k;  // tiles [from, to) are full
      split_rows(low, high, rows);
      seen_.clear();
      for (int64_t tile = first / p_.block_k; tile * p_.block_k < last; tile++) {
        const int64_t keys = std::min(p_.block_k, p_.keys - tile * p_.block_k);
        if (tile < from || tile >= to) {
          add_partial(tile, keys);
          continue;
        }
        add(tile, -1, rows * keys);
      }
    }
    made_.offsets.push_back(int32_t(made_.entries.size() / 2));
  }

  void split_rows(const int32_t* low, const int32_t* high, int64_t rows) {
    runs_.clear();
    if (is_one_run(low, high, rows)) {
      runs_.push_back({0, int32_t(rows), low[0], high[0], rows > 1 ? low[1] - low[0] : 0, rows > 1 ? high[1] - high[0] : 0});
      return;
    }
    for (int64_t i = 0; i < rows; i++) {
      if (!runs_.empty()) {
        Run& run = runs_.back();
        const int32_t low_step = low[i] - low[i - 1], high_step = high[i] - high[i - 1];
        const bool fits = low_step == run.low_step && high_step == run.high_step;
        const bool second = run.rows == 1 && (low_step == 0 || low_step == 1) && (high_step == 0 || high_step == 1);
        if (fits || second) {
          run.rows++, run.low_step = low_step, run.high_step = high_step;
          continue;
        }
      }
      runs_.push_back({int32_t(i), 1, low[i], high[i], 0, 0});
    }
  }

  void add(int64_t tile, int32_t bits, int64_t pairs) {
    made_.entries.push_back(int32_t(tile)), made_.entries.push_back(bits);
    made_.pairs += pairs;
  }

  void add_partial(int64_t tile, int64_t keys) {
    now_.clear();
    for (const Run& run : runs_) now_.push_back(within(run, tile * p_.block_k, keys));
    if (now_.size() != seen_.size() || std::memcmp(now_.data(), seen_.data(), now_.size() * sizeof(Run)) != 0) {
      seen_ = now_;
      const std::string key(reinterpret_cast<const char*>(now_.data()), now_.size() * sizeof(Run));
      const auto [place, is_new] = known_.try_emplace(key);
      if (is_new) place->second = make_bits();
      latest_ = place->second;
    }
    if (latest_.pairs > 0) add(tile, latest_.index, latest_.pairs);
  }

  struct Known {
    int32_t index = 0;
    int64_t pairs = 0;
  };
  Known make_bits() {
    const size_t size = p_.block_q * p_.block_k / 32, end = made_.bits.size();
    made_.bits.resize(end + size);
    const int64_t pairs = set_bits(now_, p_.block_k, made_.bits.data() + end);
    if (pairs == 0) made_.bits.resize(end);
    return {int32_t(end / size), pairs};
  }

  const RowIntervals p_;
  std::vector<int32_t> low_, high_;  // of a row tile
  IntervalLists made_;
  std::vector<Run> runs_, now_, seen_;  // of the rows; what they see of a tile; of the tile before
  Known latest_;
  std::unordered_map<std::string, Known> known_;
};
}  // namespace

void count_blocks(const BlockFlags& b, int32_t* offsets) {
  offsets[0] = 0;
  for_rows(b, [&](int64_t plane, int64_t row) {
    const uint8_t* flags = b.flags + (plane * b.rows + row) * b.width;
    int64_t tiles = count(flags, b.width) * b.wide;
    if (flags[b.width - 1]) tiles -= b.width * b.wide - b.key_tiles;  // the last block may be cut
    std::fill(offsets + 1 + first_tile(b, plane, row), offsets + 1 + first_tile(b, plane, row + 1), int32_t(tiles));
  });
  std::partial_sum(offsets, offsets + b.planes * b.row_tiles + 1, offsets);
}

void list_blocks(const BlockFlags& b, const int32_t* offsets, int64_t* entries) {
  for_rows(b, [&](int64_t plane, int64_t row) {
    const uint8_t* flags = b.flags + (plane * b.rows + row) * b.width;
    for (int64_t tile = first_tile(b, plane, row); tile < first_tile(b, plane, row + 1); tile++) {
      auto* out = reinterpret_cast<uint64_t*>(entries + offsets[tile]);
      if (b.wide == 1) list_row(flags, b.width, out, reinterpret_cast<uint64_t*>(entries + offsets[tile + 1]));
      else list_wide_row(b, flags, out);
    }
  });
}

IntervalLists list_intervals(const RowIntervals& intervals) { return Lister(intervals).run(); }
}  // namespace fatui
