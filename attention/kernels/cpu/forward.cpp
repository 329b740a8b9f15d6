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
  int64_t key_line, value_line;  // of the copies: one vector more than the row

  static size_t floats(const Problem& p) {
    const int64_t d = round_up(p.head_dim, lanes), dv = round_up(p.value_dim, lanes);
    return query_tile * (most_panels * (d + dv) + key_tile) + key_tile * (d + dv + 2 * lanes);
  }
  Room() = default;
  Room(const Problem& p, int64_t panel) {
    const int64_t d = round_up(p.head_dim, lanes), dv = round_up(p.value_dim, lanes);
    key_line = d + lanes, value_line = dv + lanes;
    scores = scratch(floats(p) * sizeof(float));
    key = scores + query_tile * key_tile;
    value = key + key_tile * key_line;
    query = value + key_tile * value_line + panel * query_tile * (d + dv);
    output = query + query_tile * d;
  }
};

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

  void step(const Problem& p, const Floats& k, const Floats& v, int64_t key) {
    if (key < begin || key >= end) return;
    const int64_t keys = std::min(key_tile, end - key);
    const Operands to_scores{k.data, k.stride, room.query, query_tile, p.head_dim, room.scores, query_tile, nullptr};
    multiply<Layout::depth_contiguous, Update::overwrite>(to_scores, keys, width);
    const float factor = finish_scores(room.scores, p, item, bounds, key, keys, width);
    softmax_step(room.scores, keys, width, factor, state);
    const Operands to_output{v.data,      v.stride,   room.scores, query_tile, keys,
                             room.output, query_tile, state.correction};
    if (key == begin) multiply<Layout::rows_contiguous, Update::overwrite>(to_output, p.value_dim, width);
    else multiply<Layout::rows_contiguous, Update::rescale>(to_output, p.value_dim, width);
  }
};

// Few rows (decoding): lanes of queries would stand empty, so the lanes are keys for the scores and dims for the output,
// and K is turned instead of Q. Only the scores, a few numbers, are turned back to where the softmax wants them.
template <class T>
struct FewRows {
  static constexpr int64_t most = 8;
  const Problem& p;
  Panel& panel;
  int64_t rows, dv;
  float *query, *by_row, *output;  // [row][d], [row][key], [row][dv]

  FewRows(const Problem& problem, Panel& only) : p(problem), panel(only), rows(only.item.rows()) {
    const Room& room = panel.room;
    const int64_t d = round_up(p.head_dim, lanes);
    dv = round_up(p.value_dim, lanes);
    query = room.query, by_row = room.query + query_tile * (d + dv), output = by_row + most * key_tile;
    std::fill_n(output, rows * dv, 0.0f);
    const Rows<T> q = rows_of<T>(p.query, panel.item);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < p.head_dim; c += lanes)
        store(query + r * d + c, widen_strided(q.row[r] + c * q.stride, q.stride, p.head_dim - c));
  }

  void step(int64_t key, int64_t keys) {
    const Item& item = panel.item;
    const Room& room = panel.room;
    turn(key_rows(key, keys), p.head_dim, round_up(keys, lanes), room.key);
    const int64_t d = round_up(p.head_dim, lanes);
    multiply<Layout::depth_contiguous, Update::overwrite>(
        {query, d, room.key, query_tile, p.head_dim, by_row, key_tile, nullptr}, rows, round_up(keys, lanes));
    turn(lines(by_row, key_tile), keys, lanes, room.scores);
    const float factor = finish_scores(room.scores, p, item, panel.bounds, key, keys, lanes);
    softmax_step(room.scores, keys, lanes, factor, panel.state);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < dv; c += lanes)
        store(output + r * dv + c, load(output + r * dv + c) * panel.state.correction[r]);
    const Floats v = floats_of<T>(p.value, item.batch, item.kv_head, key, keys, p.value_dim, room.value,
                                  room.value_line, dv == p.value_dim);
    multiply<Layout::rows_contiguous, Update::add>(
        {room.scores, query_tile, v.data, v.stride, keys, output, dv, nullptr}, rows, dv);
  }

  void finish() const { turn(lines(output, dv), p.value_dim, lanes, panel.room.output); }

 private:
  Rows<float> lines(const float* data, int64_t line) const {
    Rows<float> all;
    all.stride = 1, all.count = rows;
    for (int64_t r = 0; r < rows; r++) all.row[r] = data + r * line;
    return all;
  }
  Rows<T> key_rows(int64_t key, int64_t keys) const {
    const Tensor& t = p.key;
    Rows<T> all;
    all.stride = t.stride[3], all.count = keys;
    const T* data = static_cast<const T*>(t.data) + panel.item.batch * t.stride[0] + panel.item.kv_head * t.stride[1];
    for (int64_t j = 0; j < keys; j++) all.row[j] = data + (key + j) * t.stride[2];
    return all;
  }
};

// All panels of an item against one tile of keys. Long rows that several panels share are worth a copy: read once in
// order, and with a stride that does not put them all into the same few sets of the cache.
template <class T>
void share_tile(const Problem& p, const Item& item, Panel* panel, int64_t panels, int64_t key, int64_t keys) {
  const Room& room = panel[0].room;
  const auto in_place = [panels](int64_t dim) { return panels == 1 || dim < 128; };
  const Floats k = floats_of<T>(p.key, item.batch, item.kv_head, key, keys, p.head_dim, room.key, room.key_line,
                                in_place(p.head_dim));
  const Floats v = floats_of<T>(p.value, item.batch, item.kv_head, key, keys, p.value_dim, room.value, room.value_line,
                                in_place(p.value_dim));
  for (int64_t i = 0; i < panels; i++) panel[i].step(p, k, v, key);
}

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
    if (item.rows() <= FewRows<T>::most && begin < end) {
      FewRows<T> few(p, panel[0]);
      for (int64_t key = begin; key < end; key += key_tile) few.step(key, std::min(key_tile, end - key));
      few.finish();
    } else {
      for (int64_t key = begin; key < end; key += key_tile)
        share_tile<T>(p, item, panel, panels, key, std::min(key_tile, end - key));
    }
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
