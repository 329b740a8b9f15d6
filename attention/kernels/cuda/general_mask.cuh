// Which pairs of a query and a key count, and how an array says so.
//
// A block's rows are queries of one head or, with PACK, of all heads that share a key head: row r is query r / group of
// head r % group, so that neighbours see nearly the same keys.

#define MASK_NONE 0
#define MASK_BOOL 1
#define MASK_BF16 2
#define MASK_F16 3
#define MASK_F32 4
#define MASK_ADDED (MASK > MASK_BOOL)

constexpr float LOG2_E = 1.44269504f;

struct Problem {
  int heads, group;     // query heads, and those that share one key head
  int queries, keys;    // lengths
  float score_factor;   // of the scores, with SOFTCAP the cap; times log2(e) unless a mask is added to the product
  float into_cap;       // with SOFTCAP: softmax scale / cap
  int window;           // with WINDOW: the keys that a row sees at most

  // What the softmax multiplies by to get exponents of 2: of scores, or of scores to which a mask has been added.
  DEVICE float exponent_factor() const { return MASK_ADDED ? LOG2_E : score_factor; }

  DEVICE int rows() const { return PACK ? queries * group : queries; }
  DEVICE int query_of(int row) const { return PACK ? row / group : row; }
  DEVICE int head_of(int row) const { return PACK ? row % group : 0; }

  // Causal masks are aligned at the lower right: the last query sees every key. A query sees the keys [first, last).
  DEVICE int last_seen_by(int query) const { return CAUSAL ? min(keys, query + 1 + keys - queries) : keys; }
  DEVICE int first_seen_by(int query) const { return WINDOW ? max(0, query + 1 + keys - queries - window) : 0; }
};

// An element, and two neighbours as they are read at once, `first` of them at the lower address.
#if MASK == MASK_F32
using MaskElement = float;
using MaskPair = float2;
DEVICE MaskPair pair_of(float first, float second) { return make_float2(first, second); }
DEVICE float first_of(MaskPair pair) { return pair.x; }
DEVICE float second_of(MaskPair pair) { return pair.y; }
#elif MASK_ADDED
using MaskElement = unsigned short;
using MaskPair = u32;
DEVICE MaskPair pair_of(MaskElement first, MaskElement second) { return first | static_cast<u32>(second) << 16; }
DEVICE MaskElement first_of(MaskPair pair) { return pair; }
DEVICE MaskElement second_of(MaskPair pair) { return pair >> 16; }
#else
using MaskElement = unsigned char;
using MaskPair = unsigned short;
DEVICE MaskPair pair_of(MaskElement first, MaskElement second) { return first | second << 8; }
DEVICE MaskElement first_of(MaskPair pair) { return pair; }
DEVICE MaskElement second_of(MaskPair pair) { return pair >> 8; }
#endif

// What a mask's element adds to a score: -inf where a bool says no.
DEVICE float mask_value(MaskElement element) {
#if MASK_ADDED
#if MASK == MASK_BF16
  return __uint_as_float(static_cast<u32>(element) << 16);
#elif MASK == MASK_F16
  return from_half(element);
#else
  return element;
#endif
#else
  return element ? 0 : MINUS_INFINITY;
#endif
}

// An array that broadcasts over any axis: steps in elements, 0 where it does.
struct MaskArray {
  const MaskElement* elements;
  i64 batch_step, head_step, query_step, key_step;

  DEVICE const MaskElement* row(int batch, int head, int query) const {
    return elements + batch * batch_step + head * head_step + query * query_step;
  }
};

// A score as the softmax takes it, before positions rule anything out: with SOFTCAP cap * tanh(score / cap), the cap
// itself left to the softmax. The hardware's own tanh is good to 11 bits only, too few for float16.
DEVICE float squash(float score, float into_cap) {
  return 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * LOG2_E * into_cap * score));
}
