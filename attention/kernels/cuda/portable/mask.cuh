// Masking and problem parameters of the general kernels: causal, window and array masks, and block lists.
//
// The rows of a block are queries of one head or, with PACK, of all heads that share a key head: row r is query r / group of
// head r % group, so that adjacent rows attend to nearly the same keys.

#define MASK_NONE 0
#define MASK_BOOL 1
#define MASK_BF16 2
#define MASK_F16 3
#define MASK_F32 4
#define MASK_ADDED (MASK > MASK_BOOL)

constexpr float LOG2_E = 1.44269504f;

struct Problem {
  int heads, group;     // query heads, and query heads per key head
  int queries, keys;    // lengths
  float score_factor;   // softmax scale, with SOFTCAP the cap; times log2(e) unless a mask is added to the product
  float into_cap;       // with SOFTCAP: softmax scale / cap
  int window;           // with WINDOW: maximum number of keys that a row attends to
  Slopes slopes;        // with ALIBI

  // Factor that turns scores, or scores with an added mask, into exponents of 2.
  DEVICE float exponent_factor() const { return MASK_ADDED ? LOG2_E : score_factor; }

  DEVICE int rows() const { return PACK ? queries * group : queries; }
  DEVICE int query_of(int row) const { return PACK ? row / group : row; }
  DEVICE int head_of(int row) const { return PACK ? row % group : 0; }
  DEVICE int position_of(int query) const { return query + keys - queries; }

  // Causal masks are lower-right aligned: the last query attends to every key. A query attends to the keys [first, last).
  DEVICE int last_seen_by(int query) const { return CAUSAL ? min(keys, query + 1 + keys - queries) : keys; }
  DEVICE int first_seen_by(int query) const { return WINDOW ? max(0, query + 1 + keys - queries - window) : 0; }
};

// A mask element, and two adjacent ones loaded at once, `first` at the lower address.
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

// Value that a mask element adds to a score: -inf for a false bool.
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

// A mask array that broadcasts over any axis; strides in elements, 0 for broadcast axes.
struct MaskArray {
  const MaskElement* elements;
  i64 batch_step, head_step, query_step, key_step;

  DEVICE const MaskElement* row(int batch, int head, int query) const {
    return elements + batch * batch_step + head * head_step + query * query_step;
  }
};

// Score before masking by position: with SOFTCAP cap * tanh(score / cap), where the softmax applies the factor cap. The
// hardware tanh is accurate to 11 bits only, too few for float16.
DEVICE float squash(float score, float into_cap) {
  return 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * LOG2_E * into_cap * score));
}

// Tiles of a block list: (tile of the other axis, bits tile or -1 if every pair is visible), and bits [query][key] of the bits
// tiles, TILE_ROWS x TILE_KEYS.
template <int TILE_ROWS, int TILE_KEYS>
struct ListedTiles {
  static constexpr int WORDS = TILE_KEYS / 32;  // of a row
  const int2* entries;
  const u32* bits;

  DEVICE u32 word(int tile, int row, int key) const {
    return bits[(static_cast<i64>(tile) * TILE_ROWS + row) * WORDS + key / 32];
  }
};
