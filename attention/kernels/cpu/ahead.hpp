// Prefetching rows of keys and values ahead of their use.
#pragma once
#include <limits>

#include "schedule.hpp"
#include "vector.hpp"

namespace fatui {

// Consecutive rows of keys or values, in place or copied.
template <class E>
struct Lines {
  const E* data;
  int64_t stride, length, count;

  const E* line(int64_t j) const { return data + j * stride; }
};

// Prefetches rows into the L1, or the L2, 64 bytes at a time and strictly in address order, so that the hardware prefetchers
// recognise one stream and run ahead of it.
class Ahead {
 public:
  template <class E>
  explicit Ahead(const Lines<E>& lines, bool to_write = false)
      : to_write_(to_write), at_(reinterpret_cast<const char*>(lines.data)), pieces_(ceil_div(lines.length * sizeof(E), 64)),
        gap_(lines.stride * int64_t(sizeof(E)) - 64 * pieces_), lines_(lines.count) {
    if (gap_ == 0) pieces_ *= lines_, lines_ = std::min<int64_t>(lines_, 1);  // contiguous: one long row
    here_ = lines_ > 0 ? pieces_ : 0;
  }

  // Two streams, a line of each in turns, which a CPU reads faster than one after the other. They are alike in everything but
  // their place.
  template <class E>
  Ahead(const Lines<E>& a, const Lines<E>& b) : Ahead(a) { second_ = reinterpret_cast<const char*>(b.data) - at_, taken_ = 1; }

  // What is prefetched once all of this has been: more lines, for which it is not the time of the products that decides.
  void go_on_with(Ahead* then) { then_ = then; }

  void ask_for_all() { ask_one_by_one(std::numeric_limits<int64_t>::max()); }
  template <int level = 1>
  void ask_one_by_one(int64_t count) {
    while (count > 0 && lines_ > 0) {
      const int64_t some = std::min(count, here_);
      for (const char *at = at_, *end = at_ + 64 * some; at < end; at += 64) {
        if (to_write_) __builtin_prefetch(at, 1, 3);
        else prefetch<level>(at);
      }
      at_ += 64 * some, here_ -= some, count -= some;
      if (here_ == 0 && --lines_ > 0) at_ += gap_, here_ = pieces_;
    }
    if (count > 0 && then_ != nullptr) then_->ask_one_by_one<level>(count);
  }
  int64_t pieces() const { return lines_ * pieces_; }

  template <int count, int level = 1>
  FATUI_INLINE void ask() {
    if (here_ < count) return ask_one_by_one<level>(count);
    FATUI_UNROLL for (int i = 0; i < count; i++) prefetch<level>(at_ + 64 * i);
    at_ += 64 * count, here_ -= count;
  }

  // The first of some lines that the caller prefetches itself, where that takes no branch. If they are not one after the other,
  // they are asked for here, and what the caller prefetches is `instead`.
  FATUI_INLINE const char* take(int64_t count, const void* instead) {
    if (here_ < count) return ask_instead(count, instead);
    at_ += 64 * count, here_ -= count;
    return at_ - 64 * count;
  }

  // A line of each of two streams, or two lines of one.
  template <int level = 1>
  FATUI_INLINE void ask_two() {
    if (here_ < taken_) return ask_two_of_rows<level>();
    prefetch<level>(at_);
    prefetch<level>(at_ + second_);
    at_ += 64 * taken_, here_ -= taken_;
  }

 private:
  template <int level>
  FATUI_INLINE static void prefetch(const char* at) {
    if constexpr (level == 1) __builtin_prefetch(at);
    else __builtin_prefetch(at, 0, 2);
  }
  [[gnu::noinline]] const char* ask_instead(int64_t count, const void* instead) {
    ask_one_by_one(count);
    return static_cast<const char*>(instead);
  }
  template <int level>
  void ask_two_of_rows() {
    if (taken_ == 2) return ask_one_by_one<level>(2);
    if (lines_ == 0 || --lines_ == 0) return;
    at_ += gap_, here_ = pieces_;
    ask_two<level>();
  }

  bool to_write_;
  Ahead* then_ = nullptr;
  const char* at_;
  int64_t second_ = 64, taken_ = 2;  // of two lines: where the second one is, how many are of one stream
  int64_t pieces_, gap_, lines_, here_ = 0;  // pieces per row; gap between rows; rows left; pieces left in this row
};

}  // namespace fatui
