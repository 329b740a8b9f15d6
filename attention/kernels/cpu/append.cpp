#include "append.hpp"

#include <algorithm>
#include <cmath>

#include "pool.hpp"
#include "tile.hpp"

namespace fatui {
namespace {

constexpr int64_t max_values = 128;  // of a group
constexpr int64_t rows_at_once = 32, least_shared_values = 1 << 15;  // fewer are quantized sooner than threads wake up

template <class T>
FATUI_INLINE Vector rounded_to(Vector x) {
  if constexpr (std::is_same_v<T, float>) return x;
  T some[lanes];
  narrow(some, x);
  return widen(some);
}

template <class T>
float rounded_to(float x) {
  return rounded_to<T>(broadcast(x))[0];
}

// Eight numbers, one a byte, as `bits` bytes.
template <int bits>
FATUI_INLINE uint64_t packed_eight(uint64_t numbers) {
  if constexpr (bits == 8) return numbers;
  constexpr uint64_t mask = (1u << bits) - 1;
  uint64_t packed = 0;
  FATUI_UNROLL for (int i = 0; i < 8; i++) packed |= (numbers >> 8 * i & mask) << bits * i;
  return packed;
}

template <int bits>
void pack(const uint8_t* numbers, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += 8, out += bits) {
    uint64_t eight;
    std::memcpy(&eight, numbers + i, 8);
    eight = packed_eight<bits>(eight);
    std::memcpy(out, &eight, bits);
  }
}

FATUI_INLINE void store_bytes(uint8_t* out, Words x) {
  const Bytes bytes = __builtin_convertvector(x, Bytes);
  std::memcpy(out, &bytes, sizeof bytes);
}

// To e4m3: nearest, ties to even; 448 beyond it.
FATUI_INLINE Words to_e4m3(Vector x) {
  constexpr uint32_t subnormal = 141u << 23, top = 543u << 21;  // 2^14 has the last place of subnormals; 480
  const Words bits = as<Words>(x), sign = bits & 0x80000000u, size = bits ^ sign;
  const Words low = as<Words>(as<Vector>(size) + 0x1p14f) - subnormal;
  const Words high = (size + (uint32_t(7 - 127) << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  const Words result = size >= top ? Words{} + 0x7eu : size < 121u << 23 ? low : high;
  return (result & 0xffu) | sign >> 24;
}

float of_e4m3(uint8_t x) {
  const Vector size = widen_float16_bits(Words{} + uint32_t(x & 0x7f) * 128u);
  return (x & 0x80 ? -size[0] : size[0]) * 256.0f;
}

// The nearest of e2m1's values, with the distance rounded to a type; the first of several.
template <class T>
FATUI_INLINE Words to_e2m1(Vector x) {
  constexpr float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  Vector best = magnitude(rounded_to<T>(x));
  Words nearest{};
  for (uint32_t i = 1; i < 16; i++) {
    const Vector distance = magnitude(rounded_to<T>(x - values[i]));
    nearest = distance < best ? Words{} + i : nearest;
    best = distance < best ? distance : best;
  }
  return nearest;
}

// A group of values: writes its numbers, one a byte, and its scale and bias.
template <class T>
void affine_group(const float* x, int64_t count, int bits, uint8_t* numbers, T* scale_out, T* bias_out) {
  Vector high = broadcast(-infinity), low = broadcast(infinity);
  for (int64_t i = 0; i < count; i += lanes) high = larger(load(x + i), high), low = smaller(load(x + i), low);
  float largest_value = -infinity, smallest = infinity;
  for (int i = 0; i < lanes; i++)
    largest_value = std::max(largest_value, high[i]), smallest = std::min(smallest, low[i]);
  const float last = float((1 << bits) - 1);
  const bool from_below = std::fabs(smallest) > std::fabs(largest_value);
  float scale = std::max((largest_value - smallest) / last, float(1e-7));
  scale = from_below ? scale : -scale;
  const float edge = from_below ? smallest : largest_value, steps = std::nearbyint(edge / scale);
  float bias = 0.0f;
  if (steps != 0.0f) scale = edge / steps, bias = edge;
  for (int64_t i = 0; i < count; i += lanes) {
    const Vector number = smaller(larger((load(x + i) - bias) / scale, Vector{}), broadcast(last));
    store_bytes(numbers + i, as<Words>(number + 12582912.0f) & 0xffu);  // 1.5 * 2^23: rounds to an integer in the low bits
  }
  T some[lanes];
  narrow(some, broadcast(scale)), *scale_out = some[0];
  narrow(some, broadcast(bias)), *bias_out = some[0];
}

template <class T>
uint8_t small_float_group(const float* x, int64_t count, Mode mode, uint8_t* numbers) {
  Integers high{};  // of magnitudes, which are in the order of their bits, with NaN above infinity
  for (int64_t i = 0; i < count; i += lanes) {
    const Integers size = as<Integers>(magnitude(load(x + i)));
    high = size > high ? size : high;
  }
  int32_t highest = 0;
  for (int i = 0; i < lanes; i++) highest = std::max(highest, high[i]);
  const float share = rounded_to<T>(as<float>(highest) / (mode == Mode::mxfp8 ? 448.0f : 6.0f));
  float unit;
  uint8_t scale;
  if (mode == Mode::nvfp4) {
    scale = uint8_t(to_e4m3(broadcast(share))[0]);
    unit = of_e4m3(scale);
  } else if (share <= largest) {
    const int exponent = share == 0.0f ? 0 : int(std::ceil(std::log2(share)));
    scale = uint8_t(exponent + 127);
    unit = std::ldexp(1.0f, exponent);
  } else {  // NaN or infinity, which as an integer is the smallest one
    scale = std::is_same_v<T, float> ? 128 : 0;
    unit = 0.0f;
  }
  for (int64_t i = 0; i < count; i += lanes) {
    const Vector value = rounded_to<T>(load(x + i) / unit);
    if (mode == Mode::mxfp8) store_bytes(numbers + i, to_e4m3(value));
    else if (mode == Mode::nvfp4) store_bytes(numbers + i, to_e2m1<float>(value));
    else store_bytes(numbers + i, to_e2m1<T>(value));
  }
  return scale;
}

void pack(int bits, const uint8_t* numbers, int64_t count, uint8_t* out) {
  switch (bits) {
    case 2: return pack<2>(numbers, count, out);
    case 3: return pack<3>(numbers, count, out);
    case 4: return pack<4>(numbers, count, out);
    case 5: return pack<5>(numbers, count, out);
    case 6: return pack<6>(numbers, count, out);
    default: return pack<8>(numbers, count, out);
  }
}

template <class T>
void quantize_row(const NewRows& x, int64_t batch, int64_t head, int64_t row) {
  const T* from = row_of<const T>(x.rows, batch, head, row);
  const int64_t to = x.first + row, group = x.packing.group;
  uint8_t* out = reinterpret_cast<uint8_t*>(row_of<uint32_t>(x.numbers, batch, head, to));
  for (int64_t g = 0; g < x.width / group; g++, out += group * x.packing.bits / 8) {
    alignas(64) float values[max_values];
    alignas(64) uint8_t numbers[max_values];
    for (int64_t i = 0; i < group; i += lanes)
      store(values + i, widen_strided(from + (g * group + i) * x.rows.stride[3], x.rows.stride[3], lanes));
    if (x.packing.mode == Mode::affine)
      affine_group(values, group, x.packing.bits, numbers, row_of<T>(x.packing.scales, batch, head, to) + g,
                   row_of<T>(x.packing.biases, batch, head, to) + g);
    else row_of<uint8_t>(x.packing.scales, batch, head, to)[g] = small_float_group<T>(values, group, x.packing.mode, numbers);
    pack(x.packing.bits, numbers, group, out);
  }
}

void quantize_row(const NewRows& x, int64_t index) {
  const int64_t row = index % x.count, head = index / x.count % x.heads, batch = index / x.count / x.heads;
  switch (x.rows.element) {
    case Element::float16: return quantize_row<float16_t>(x, batch, head, row);
    case Element::bfloat16: return quantize_row<bfloat16_t>(x, batch, head, row);
    default: return quantize_row<float>(x, batch, head, row);
  }
}

}  // namespace

void quantize_into(const NewRows& keys, const NewRows& values) {
  const int64_t rows = keys.batch * keys.heads * keys.count, items = (rows + rows_at_once - 1) / rows_at_once;
  const auto work = [&](int64_t item) {
    for (int64_t i = item * rows_at_once; i < std::min(rows, (item + 1) * rows_at_once); i++)
      quantize_row(keys, i), quantize_row(values, i);
  };
  const bool few = rows * (keys.width + values.width) < least_shared_values;
  parallel_for(items, few ? 1 : int(std::min<int64_t>(items, thread_count())), work);
}

}  // namespace fatui
