#include "streaming.hpp"

#include <cmath>
#include <cstring>

#include "schedule.hpp"
#include "tile.hpp"

namespace fatui {
namespace {

constexpr int64_t versions = 3;  // of a query: for this lap, the lap before, the first tokens

// Where a token of a batch row goes, and what its query sees.
struct Place {
  int64_t slot, lap_begin, oldest, position;  // position: of the query among the tokens that are kept

  Place(const StreamStep& s, const StreamRow& row) {
    const int64_t p = row.seen, turn = std::max<int64_t>(0, p - s.first) / s.ring;
    slot = p - turn * s.ring;
    lap_begin = s.first + turn * s.ring;
    oldest = std::max({s.first, row.oldest, p + 1 - s.ring, p - s.window + 1});
    position = p < s.first ? p : s.first + p - oldest;
  }

  Spans spans(const StreamStep& s, const StreamRow& row) const {
    const int64_t end = row.seen + 1, before = lap_begin - s.ring;  // first position of the lap before, less its slot
    Spans x;
    x.of[0] = {0, std::min(end, s.first), 2};
    x.of[1] = {s.first + std::max(oldest, lap_begin) - lap_begin, s.first + end - lap_begin, 0};
    if (oldest < lap_begin) x.of[2] = {s.first + oldest - before, s.first + s.ring, 1};
    if (s.radians.empty()) for (Span& span : x.of) span.query = 0;
    return x;
  }
};

// cos and sin of a number of positions, for each pair of dims.
struct Angles {
  std::vector<float> cos, sin;

  void set(const std::vector<float>& radians, int64_t positions) {
    constexpr double turn = 6.283185307179586;
    cos.resize(radians.size()), sin.resize(radians.size());
    for (size_t i = 0; i < radians.size(); i++) {
      const double angle = double(positions) * double(radians[i]);  // exact, and in float32 when it is less than a turn
      const float rest = float(angle - turn * std::nearbyint(angle / turn));
      cos[i] = std::cos(rest), sin[i] = std::sin(rest);
    }
  }
};

// A row of (B, heads, 1, D), widened and rotated, or without angles as it is.
template <class T>
void rotate_row(const T* from, int64_t stride, int64_t columns, const Angles* angles, bool adjacent, T* out) {
  if (angles == nullptr) {
    for (int64_t c = 0; c < columns; c++) out[c] = from[c * stride];
    return;
  }
  const int64_t pairs = int64_t(angles->cos.size());
  alignas(64) float low[512], high[512], wide[512 + lanes];
  for (int64_t c = 0; c < columns; c += lanes) store(wide + c, widen_strided(from + c * stride, stride, columns - c));
  const int64_t apart = adjacent ? 1 : pairs, step = adjacent ? 2 : 1;
  for (int64_t i = 0; i < pairs; i++) {
    const float a = wide[i * step], b = wide[i * step + apart];
    low[i] = a * angles->cos[i] - b * angles->sin[i];
    high[i] = a * angles->sin[i] + b * angles->cos[i];
  }
  for (int64_t i = 0; i < pairs; i++) wide[i * step] = low[i], wide[i * step + apart] = high[i];
  for (int64_t c = 0; c < columns; c += lanes) narrow_some(out + c, load(wide + c), columns - c);
}

template <class T>
void run(const StreamStep& s) {
  const Problem& p = s.call.problem;
  const bool rope = !s.radians.empty();
  std::vector<T> query(rope ? size_t(p.batch * p.heads * versions * p.head_dim) : 0);
  std::vector<T> key(is_quantized(p) && rope && !s.rotated ? size_t(p.kv_heads * p.head_dim) : 0);
  std::vector<Spans> spans;
  Angles angles[versions];
  int64_t end = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    const StreamRow& row = s.rows[size_t(b)];
    const Place place(s, row);
    spans.push_back(place.spans(s, row));
    for (const Span& span : spans.back().of) end = std::max(end, span.end);
    if (rope && (b == 0 || row != s.rows[size_t(b - 1)])) {
      const int64_t at = s.rotated ? place.slot : 0;
      const int64_t positions[versions] = {place.slot - at, place.slot + s.ring - at, place.position - at};
      for (int i = 0; i < versions; i++) angles[i].set(s.radians, positions[i]);
    }
    const Angles* to_slot = rope && !s.rotated ? &angles[0] : nullptr;
    for (int64_t h = 0; h < p.heads && rope; h++)
      for (int64_t i = 0; i < versions; i++)
        rotate_row(row_of<const T>(p.query, b, h, 0), p.query.stride[3], p.head_dim, i == 0 ? to_slot : &angles[i],
                   s.adjacent, query.data() + ((b * p.heads + h) * versions + i) * p.head_dim);
    if (!is_quantized(p)) {
      for (int64_t h = 0; h < p.kv_heads; h++) {
        rotate_row(row_of<const T>(s.new_key, b, h, 0), s.new_key.stride[3], p.head_dim, to_slot, s.adjacent,
                   row_of<T>(p.key, b, h, place.slot));
        rotate_row<T>(row_of<const T>(s.new_value, b, h, 0), s.new_value.stride[3], p.value_dim, nullptr, false,
                      row_of<T>(p.value, b, h, place.slot));
      }
      continue;
    }
    const auto one = [&](Tensor t, int64_t element_bytes) {  // this batch row alone
      t.data = static_cast<const char*>(t.data) + b * t.stride[0] * element_bytes;
      return t;
    };
    const auto of_row = [&](const Tensor& rows, const Tensor& numbers, const Packing& packing, int64_t width) {
      const int64_t scale_bytes = packing.mode == Mode::affine ? int64_t(sizeof(T)) : 1;
      NewRows x{rows, one(numbers, 4), packing, 1, p.kv_heads, 1, width, place.slot};
      x.packing.scales = one(packing.scales, scale_bytes), x.packing.biases = one(packing.biases, scale_bytes);
      return x;
    };
    Tensor keys = one(s.new_key, sizeof(T));
    if (to_slot != nullptr) {
      for (int64_t h = 0; h < p.kv_heads; h++)
        rotate_row(row_of<const T>(s.new_key, b, h, 0), s.new_key.stride[3], p.head_dim, to_slot, s.adjacent,
                   key.data() + h * p.head_dim);
      keys.data = key.data(), keys.stride[1] = p.head_dim, keys.stride[2] = p.head_dim, keys.stride[3] = 1;
    }
    quantize_into(of_row(keys, p.key, p.key_packing, p.head_dim),
                  of_row(one(s.new_value, sizeof(T)), p.value, p.value_packing, p.value_dim));
  }
  ForwardCall call = s.call;
  call.problem.spans = spans.data();
  call.problem.keys = end;
  if (rope) {
    Tensor& q = call.problem.query;
    q.data = query.data();
    q.stride[3] = 1, q.stride[2] = p.head_dim, q.stride[1] = versions * p.head_dim, q.stride[0] = p.heads * q.stride[1];
  }
  forward(call);
}

}  // namespace

void stream_step(const StreamStep& step) {
  switch (step.call.problem.query.element) {
    case Element::float16: return run<float16_t>(step);
    case Element::bfloat16: return run<bfloat16_t>(step);
    default: return run<float>(step);
  }
}

}  // namespace fatui
