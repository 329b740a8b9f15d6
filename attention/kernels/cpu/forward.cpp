// Attention, forward: one tile of queries against all its keys, tile by tile, without the score matrix.
//
//                 64 queries (lanes)                     for each tile of 64 keys:
//               +--------------------+                     S = K Q'            S[key][query]
//        Q'     | D x 64, turned     |                     finish_scores       scale, softcap, mask, bounds
//               +--------------------+                     softmax_step        P, maximum, sum, correction
//   +-------+   +--------------------+                     O' = O' * correction + V' P
//   | K     | . |  S, then P         |                   and at the end O = (O' / sum), turned back
//   | 64xD  |   |  64 keys x 64      |
//   +-------+   +--------------------+                   K and V are read where they lie; Q' S O' stay in the
//   +-------+   +--------------------+                   caches of the core: 64 (D + Dv + 64) floats
//   | V'    | . |  O'   Dv x 64      |
//   +-------+   +--------------------+
#include <vector>

#include "pool.hpp"
#include "product.hpp"
#include "softmax.hpp"
#include "forward.hpp"

namespace fatui {
namespace {

struct Room {
  float *query, *scores, *output, *key, *value;
  int64_t key_padded, value_padded;

  static size_t floats(const Problem& p) {
    const int64_t d = round_up(p.head_dim, lanes), dv = round_up(p.value_dim, lanes);
    return query_tile * (most_panels * (d + dv) + key_tile) + key_tile * (d + dv);
  }
  Room() = default;
  Room(const Problem& p, int64_t panel) {
    key_padded = round_up(p.head_dim, lanes), value_padded = round_up(p.value_dim, lanes);
    scores = scratch(floats(p) * sizeof(float));
    key = scores + query_tile * key_tile;
    value = key + key_tile * key_padded;
    query = value + key_tile * value_padded + panel * query_tile * (key_padded + value_padded);
    output = query + query_tile * key_padded;
  }
};

// S = K Q', one line a key.
template <class T>
void scores(const Problem& p, const Item& item, int64_t key, int64_t keys, int64_t width, const Room& room) {
  const Floats k = floats_of<T>(p.key, item.batch, item.kv_head, key, keys, p.head_dim, room.key, room.key_padded);
  const Operands o{k.data, k.stride, room.query, query_tile, p.head_dim, room.scores, query_tile, nullptr};
  multiply<Layout::depth_contiguous, Update::overwrite>(o, keys, width);
}

// O' = O' * correction + V' P.
template <class T>
void accumulate(const Problem& p, const Item& item, int64_t key, int64_t keys, int64_t width, const Room& room,
                const float* correction) {
  const Floats v = floats_of<T>(p.value, item.batch, item.kv_head, key, keys, p.value_dim, room.value,
                                room.value_padded);
  const Operands o{v.data, v.stride, room.scores, query_tile, keys, room.output, query_tile, correction};
  if (correction == nullptr) multiply<Layout::rows_contiguous, Update::overwrite>(o, p.value_dim, width);
  else multiply<Layout::rows_contiguous, Update::rescale>(o, p.value_dim, width);
}

// One panel of 64 queries: what it keeps from one tile of keys to the next.
struct Panel {
  Item item;
  Bounds bounds;
  Softmax state;
  Room room;
  int64_t width, begin, end;

  template <class T>
  void open(const Problem& p, const Item& whole, int64_t index) {
    item = Schedule::panel(whole, index);
    room = Room(p, index);
    bounds = bounds_of(p, item);
    state.reset();
    width = round_up(item.rows(), lanes);
    begin = std::max(item.key_begin, bounds.any_first / key_tile * key_tile);
    end = std::min(item.key_end, bounds.any_last + 1);
    if (begin >= end) return std::fill_n(room.output, p.value_dim * query_tile, 0.0f), void();
    turn(rows_of<T>(p.query, item), p.head_dim, width, room.query);
  }

  template <class T>
  void step(const Problem& p, int64_t key) {
    if (key < begin || key >= end) return;
    const int64_t keys = std::min(key_tile, end - key);
    scores<T>(p, item, key, keys, width, room);
    const float factor = finish_scores(room.scores, p, item, bounds, key, keys, width);
    softmax_step(room.scores, keys, width, factor, state);
    accumulate<T>(p, item, key, keys, width, room, key == begin ? nullptr : state.correction);
  }
};

template <class T>
void run(const ForwardCall& call) {
  const Problem& p = call.problem;
  const Schedule schedule(p);
  Partials partials(p, schedule);
  parallel_for(schedule.items(), threads_for(p), [&](int64_t index) {
    const Item item = schedule.item(p, index);
    const int64_t panels = item.heads > 1 ? 1 : ceil_div(item.queries, query_tile);
    Panel panel[most_panels];
    int64_t begin = p.keys, end = 0;
    for (int64_t i = 0; i < panels; i++) {
      panel[i].template open<T>(p, item, i);
      begin = std::min(begin, panel[i].begin), end = std::max(end, panel[i].end);
    }
    for (int64_t key = begin; key < end; key += key_tile)
      for (int64_t i = 0; i < panels; i++) panel[i].template step<T>(p, key);
    for (int64_t i = 0; i < panels; i++)
      if (schedule.spans == 1) write_rows<T>(call, panel[i].item, panel[i].room.output, panel[i].state);
      else partials.keep(item, panel[i].room.output, panel[i].state);
  });
  if (schedule.spans > 1) partials.combine<T>(call, schedule);
}
}  // namespace

void forward(const ForwardCall& call) {
  const Problem& p = call.problem;
  if (p.batch * p.heads * p.queries == 0) return;
  switch (p.query.element) {
    case Element::float16: return run<float16_t>(call);
    case Element::bfloat16: return forward_bfloat16(call) ? void() : run<bfloat16_t>(call);
    default: return run<float>(call);
  }
}

int64_t forward_workspace(const Problem& p) {
  const Schedule schedule(p);
  if (p.query.element == Element::bfloat16 && bfloat16_workspace(p) > 0) return bfloat16_workspace(p);
  return int64_t(threads_for(p) * Room::floats(p) * sizeof(float)) + Partials::bytes(p, schedule);
}

}  // namespace fatui
