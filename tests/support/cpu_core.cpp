// Runs one case on the kernel's core, without MLX or Python: `cpu_core CASE RESULT`. For processors that are not at hand.
//
// CASE: 22 int64 (batch, heads, kv_heads, queries, keys, head_dim, value_dim, element, causal, window, the mask's element
// or -1, its four strides, whether the layout is (B, L, H, D); mode, bits and group of quantized keys, and of values, or 0),
// two doubles (scale, softcap), then q, k, v, the gradient of the output and the mask. Quantized keys and values are
// numbers, scales and, in mode affine, biases in float32, without a gradient of the output. RESULT: output, logsumexp
// (float32), and unless they are quantized the gradients of q, k and v, all contiguous.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "problem.hpp"

using namespace fatui;
using Bytes = std::vector<char>;

static Bytes read_file(const char* path) {
  Bytes all;
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) std::exit(2);
  char part[4096];
  for (size_t n; (n = std::fread(part, 1, sizeof part, file)) > 0;) all.insert(all.end(), part, part + n);
  std::fclose(file);
  return all;
}

static Tensor tensor(const char* data, Element element, int64_t heads, int64_t rows, int64_t columns, bool rows_first) {
  Tensor t;
  t.data = data, t.element = element;
  t.stride[0] = heads * rows * columns;
  t.stride[1] = rows_first ? columns : rows * columns;
  t.stride[2] = rows_first ? heads * columns : columns;
  t.stride[3] = 1;
  return t;
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const Bytes bytes = read_file(arguments[1]);
  const int64_t* n = reinterpret_cast<const int64_t*>(bytes.data());
  const double* real = reinterpret_cast<const double*>(n + 22);
  const char* at = reinterpret_cast<const char*>(real + 2);
  const Element element = Element(n[7]);
  const int64_t size = element == Element::float32 ? 4 : 2;
  const int64_t queries = n[0] * n[1] * n[3], keys = n[0] * n[2] * n[4];
  const auto take = [&](int64_t heads, int64_t rows, int64_t columns) {
    const Tensor t = tensor(at, element, heads, rows, columns, n[15] != 0);
    at += n[0] * heads * rows * columns * size;
    return t;
  };
  const auto take_packed = [&](int64_t columns, const int64_t* format, Tensor& numbers, Packing& packing) {
    packing.mode = Mode(format[0]), packing.bits = int32_t(format[1]), packing.group = int32_t(format[2]);
    const auto part = [&](Element type, int64_t count, int64_t bytes) {
      const Tensor t = tensor(at, type, n[2], n[4], count, n[15] != 0);
      at += n[0] * n[2] * n[4] * count * bytes;
      return t;
    };
    numbers = part(Element::boolean, columns * packing.bits / 32, 4);
    const bool affine = packing.mode == Mode::affine;
    packing.scales = part(affine ? Element::float32 : Element::boolean, columns / packing.group, affine ? 4 : 1);
    if (affine) packing.biases = part(Element::float32, columns / packing.group, 4);
  };
  BackwardCall back;
  Problem& p = back.problem;
  p.batch = n[0], p.heads = n[1], p.kv_heads = n[2], p.queries = n[3], p.keys = n[4];
  p.head_dim = n[5], p.value_dim = n[6], p.causal = n[8] != 0, p.window = n[9];
  p.scale = real[0], p.softcap = float(real[1]);
  p.query = take(p.heads, p.queries, p.head_dim);
  const bool packed = n[16] != 0;
  if (packed) {
    take_packed(p.head_dim, n + 16, p.key, p.key_packing);
    take_packed(p.value_dim, n + 19, p.value, p.value_packing);
  } else {
    p.key = take(p.kv_heads, p.keys, p.head_dim);
    p.value = take(p.kv_heads, p.keys, p.value_dim);
    back.output_gradient = take(p.heads, p.queries, p.value_dim);
  }
  if (n[10] >= 0) {
    p.mask.data = at, p.mask.element = Element(n[10]);
    for (int i = 0; i < 4; i++) p.mask.stride[i] = n[11 + i];
  }
  Bytes o(queries * p.value_dim * size), l(queries * 4), s(queries * sizeof(RowStatistics)), dq(queries * p.head_dim * size);
  Bytes dk(keys * p.head_dim * size), dv(keys * p.value_dim * size);
  forward({p, o.data(), reinterpret_cast<float*>(l.data()), reinterpret_cast<float*>(s.data())});
  if (packed) dq.clear(), dk.clear(), dv.clear();
  back.output = tensor(o.data(), element, p.heads, p.queries, p.value_dim, false);
  back.statistics = tensor(s.data(), Element::float32, p.heads, p.queries, 3, false);
  back.query_gradient = dq.data(), back.key_gradient = dk.data(), back.value_gradient = dv.data();
  if (!packed) backward(back);
  std::FILE* file = std::fopen(arguments[2], "wb");
  for (const Bytes* part : {&o, &l, &dq, &dk, &dv}) std::fwrite(part->data(), 1, part->size(), file);
  return std::fclose(file);
}
