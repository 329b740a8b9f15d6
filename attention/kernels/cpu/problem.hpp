// Description of an attention call as plain data, shared by the kernels and the MLX primitive.
//
//   query (B, H, Lq, D)   key (B, Hkv, Lk, D)   value (B, Hkv, Lk, Dv)   output (B, H, Lq, Dv)   logsumexp (B, H, Lq)
//
// Strides are in elements and arbitrary, zero included: kernels are called without copying inputs.
#pragma once
#include <cstdint>

// Marks the functions of a part of the kernel that a library may be linked without, because no call has needed it yet; they are
// null there. `build.py` names the files of each part.
#if defined(__ELF__)
#define FATUI_PART __attribute__((weak))
#else
#define FATUI_PART  // libraries have all parts
#endif

namespace fatui {

enum class Element : int32_t { float32, float16, bfloat16, boolean };

struct Tensor {
  const void* data = nullptr;
  Element element = Element::float32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// How keys or values are quantized along their last axis, as by mx.quantize: numbers packed into 32-bit words, the first in the
// lowest bits; the values of a group share a scale, and in mode affine a bias.
enum class Mode : int32_t { none, affine, mxfp8, mxfp4, nvfp4 };

struct Packing {
  Mode mode = Mode::none;
  int32_t bits = 0, group = 0;
  Tensor scales, biases;  // (B, Hkv, Lk, width / group); scales are bytes except in mode affine
};

// Block lists of a structured mask: which tiles of 128 keys each tile of 64 queries sees. A plane of lists serves one head of
// one batch row; with fewer planes than heads or batch rows they repeat.
struct BlockLists {
  const int32_t* offsets = nullptr;  // null: no lists. Entries of query tile i of a plane: [offsets[i], offsets[i + 1])
  const int32_t* entries = nullptr;  // pairs: key tile, ascending; index of its bits, or -1 if all of its pairs are visible
  const uint32_t* bits = nullptr;    // [64 queries][4]: bit j of word w is key 32 w + j
  int64_t batches = 1, heads = 1;
};

// Keys [begin, end) that a batch row's single query attends to, and the row of `query` that holds the query for them.
struct Span {
  int64_t begin = 0, end = 0, query = 0;
};
struct Spans {
  Span of[3];
};

struct Problem {
  Tensor query, key, value, mask;  // mask.data is null when there is none; a boolean mask says true = attend
  Tensor slopes;     // (B or 1, H) in float32: slope * (key - position of the query) is added to the scores; null when none
  BlockLists lists;  // exclude causal and window
  const Spans* spans = nullptr;  // of each batch row, instead of all keys; with one query, and without masks
  Packing key_packing, value_packing;  // of quantized keys and values, whose strides are in words
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, head_dim = 0, value_dim = 0;
  double scale = 1.0;  // in double: the square root of a head dim in float32 is off by 2^-25
  float softcap = 0.0f;  // 0: none
  bool causal = false;   // lower-right: query i attends to keys up to i + keys - queries
  int64_t window = 0;    // 0: none; N: only the last N of those
  int64_t items = 0;     // minimum number of work items, if the shape permits; 0: chosen by the kernel
};

inline bool is_quantized(const Problem& p) { return p.key_packing.mode != Mode::none; }

struct ForwardCall {
  Problem problem;
  void* output = nullptr;       // contiguous, the element of the query
  float* logsumexp = nullptr;   // contiguous, natural logarithm; -inf for a fully masked row; may be null
  float* statistics = nullptr;  // contiguous, for the backward pass, see RowStatistics; may be null
};

// Softmax statistics of a row, stored separately: near 1e9, where a mask may put all scores of a row, a float32 logsumexp
// would lose the logarithm of the sum.
struct RowStatistics {
  float reference;  // subtracted from the scores: their maximum, or slightly less
  float sum;        // of e^(score - reference - fine); 0 for a fully masked row
  float fine;       // low part of the reference if scores are computed in double, else 0
};

struct BackwardCall {
  Problem problem;
  Tensor output, output_gradient;
  Tensor statistics, logsumexp_gradient;  // one RowStatistics per row, contiguous; the gradient may be null
  void* query_gradient = nullptr;        // contiguous, the element of the query
  void* key_gradient = nullptr;
  void* value_gradient = nullptr;
};

void forward(const ForwardCall& call);
FATUI_PART void backward(const BackwardCall& call);

// Bytes that a call allocates above its inputs and outputs.
int64_t forward_workspace(const Problem& problem);
FATUI_PART int64_t backward_workspace(const Problem& problem);

// The kinds of forward pass, of which `forward` takes one: bfloat16 widened to float32, and in pairs.
FATUI_PART void forward_float32(const ForwardCall& call);
FATUI_PART void forward_float16(const ForwardCall& call);
FATUI_PART void forward_widened(const ForwardCall& call);
FATUI_PART void forward_bfloat16(const ForwardCall& call);
FATUI_PART int64_t float32_workspace(const Problem& problem);
FATUI_PART int64_t float16_workspace(const Problem& problem);
FATUI_PART int64_t widened_workspace(const Problem& problem);
FATUI_PART int64_t bfloat16_workspace(const Problem& problem);

// Whether the CPU has products of bfloat16 pairs (AMX or AVX-512 BF16).
#if defined(__AVX512BF16__)
constexpr bool bfloat16_pairs = true;
#else
constexpr bool bfloat16_pairs = false;
#endif

}  // namespace fatui
