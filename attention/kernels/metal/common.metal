// Shared by all Metal kernels: fragments, row reductions, tiles, masking by position, and block lists. Prepended to every
// kernel source.
//
// A fragment is an 8 x 8 simdgroup_matrix<float> whose elements are accessed individually, as in MLX's kernels. All matrix
// operands are float32, so bfloat16 and float16 only need conversions. Lane l holds
//   row (q & 4) + (l / 2) % 4, columns (q & 2) * 2 + (l % 2) * 2 and the next, with q = l / 4,
// so that the four lanes of a row are reduced with xor 1 and 8.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

// Arrays of fragments stay in registers only if every index is a compile-time constant.
#define UNROLL _Pragma("clang loop unroll(full)")

typedef simdgroup_matrix<float, 8, 8> Fragment;
constant constexpr float LOG2_E = 1.44269504088896340736f;
constant constexpr float LARGEST_FLOAT = 3.402823466e38f;

METAL_FUNC short fragment_row(uint lane) { return short(((lane / 4) & 4) + (lane / 2) % 4); }
METAL_FUNC short fragment_column(uint lane) { return short(((lane / 4) & 2) * 2 + (lane % 2) * 2); }

// Loads the 8 x 8 block of a tile that starts at `block`; row-major, `pitch` elements per row.
template <typename T>
METAL_FUNC Fragment read_block(const threadgroup T* block, int pitch, short row, short column) {
  Fragment made;
  made.thread_elements()[0] = float(block[row * pitch + column]);
  made.thread_elements()[1] = float(block[row * pitch + column + 1]);
  return made;
}

// Loads an 8 x 8 block transposed: element (row, column) of the fragment is element (column, row) of the block.
template <typename T>
METAL_FUNC Fragment read_turned(const threadgroup T* block, int pitch, short row, short column) {
  Fragment made;
  made.thread_elements()[0] = float(block[column * pitch + row]);
  made.thread_elements()[1] = float(block[(column + 1) * pitch + row]);
  return made;
}

template <int N>
METAL_FUNC void clear(thread Fragment* fragments) {
  UNROLL
  for (int i = 0; i < N; i++) {
    fragments[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

// fragments[j] += own (8 x WIDTH) . other[8 j .. 8 j + 8] (8 x WIDTH)', for j in 0 .. N
template <typename T, int N, int WIDTH>
METAL_FUNC void multiply_turned(
    thread Fragment* fragments, const threadgroup T* own, int own_pitch, const threadgroup T* other, int pitch,
    short row, short column) {
  for (int d = 0; d < WIDTH; d += 8) {
    Fragment a = read_block(own + d, own_pitch, row, column);
    UNROLL
    for (int j = 0; j < N; j++) {
      Fragment b = read_turned(other + j * 8 * pitch + d, pitch, row, column);
      simdgroup_multiply_accumulate(fragments[j], a, b, fragments[j]);
    }
  }
}

// Product with blocked summation, for dP: dP - delta cancels when both are nearly equal, and leaves the rounding error of
// long sums. float32 is summed in blocks of 16 dimensions; 16-bit inputs are less exact themselves. The order of summation
// of a row is the same in all kernels, independent of tile sizes.
template <typename T, int WIDTH>
METAL_FUNC constexpr int part_width() { return sizeof(T) == 4 ? 16 : WIDTH; }

template <int N>
METAL_FUNC void add(thread Fragment* fragments, thread Fragment* parts) {
  UNROLL
  for (int i = 0; i < N; i++) {
    fragments[i].thread_elements()[0] += parts[i].thread_elements()[0];
    fragments[i].thread_elements()[1] += parts[i].thread_elements()[1];
  }
}

template <typename T, int N, int WIDTH>
METAL_FUNC void multiply_in_parts(
    thread Fragment* fragments, const threadgroup T* own, int own_pitch, const threadgroup T* other, int pitch,
    short row, short column) {
  constexpr int PART = part_width<T, WIDTH>();
  if (PART == WIDTH) {
    multiply_turned<T, N, WIDTH>(fragments, own, own_pitch, other, pitch, row, column);
  } else {
    for (int d = 0; d < WIDTH; d += PART) {
      Fragment parts[N];
      clear<N>(parts);
      multiply_turned<T, N, PART>(parts, own + d, own_pitch, other + d, pitch, row, column);
      add<N>(fragments, parts);
    }
  }
}

// sums (8 x WIDTH) += weights (8 x 8 N) . other (8 N x WIDTH)
template <typename T, int N, int WIDTH>
METAL_FUNC void multiply(
    thread Fragment* sums, thread Fragment* weights, const threadgroup T* other, int pitch, short row, short column) {
  UNROLL
  for (int d = 0; d < WIDTH / 8; d++) {
    UNROLL
    for (int j = 0; j < N; j++) {
      Fragment b = read_block(other + j * 8 * pitch + d * 8, pitch, row, column);
      simdgroup_multiply_accumulate(sums[d], weights[j], b, sums[d]);
    }
  }
}

// Adds a mask to a score. Clamped, because the sum of a finite mask and a large score may overflow to -inf, which would mask
// the key.
METAL_FUNC float masked(float score, float mask) {
  return mask == -INFINITY ? mask : metal::max(score + mask, -LARGEST_FLOAT);
}

// Rounding error of the logsumexp, the float32 sum of row maximum and log of the row sum: with a maximum of -1e9, from a
// mask, the log is lost completely. Stored with the logsumexp, so that exp(s - lse - rest) is accurate at any magnitude.
METAL_FUNC float rest_of(float lse, float largest, float log_total) { return log_total - (lse - largest); }

METAL_FUNC float row_max(float x) {
  x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float row_sum(float x) {
  x += simd_shuffle_xor(x, ushort(1));
  return x + simd_shuffle_xor(x, ushort(8));
}

// Adjacent elements, loaded at once; aligned as a single element, because a slice may begin anywhere.
template <typename T>
struct Four {
  T of[4];
};

// Loads ROWS x WIDTH elements into a tile with all threads of the group; rows from `valid` on are zero.
template <typename T, int ROWS, int WIDTH, int PITCH, int THREADS>
METAL_FUNC void load_tile(
    const device T* source, int64_t row_stride, int64_t column_stride, threadgroup T* tile, int valid, uint thread_id) {
  if (column_stride == 1) {
    for (int i = int(thread_id) * 4; i < ROWS * WIDTH; i += THREADS * 4) {
      const int row = i / WIDTH;
      const int column = i % WIDTH;
      Four<T> moved = {{T(0.0f), T(0.0f), T(0.0f), T(0.0f)}};
      if (row < valid) {
        moved = *(const device Four<T>*)(source + row * row_stride + column);
      }
      *(threadgroup Four<T>*)(tile + row * PITCH + column) = moved;
    }
    return;
  }
  for (int i = int(thread_id); i < ROWS * WIDTH; i += THREADS) {
    const int row = i / WIDTH;
    const int column = i % WIDTH;
    tile[row * PITCH + column] = row < valid ? T(source[row * row_stride + column * column_stride]) : T(0.0f);
  }
}

// The rows of one head of an array.
template <typename T>
struct DenseRows {
  const device T* data;
  int64_t row_stride, column_stride;
};

// Loads rows from `from` on into a tile; those from `end` on are zero.
template <typename T, int ROWS, int WIDTH, int PITCH, int THREADS>
METAL_FUNC void load_rows(DenseRows<T> rows, int from, int end, threadgroup T* tile, uint thread_id) {
  load_tile<T, ROWS, WIDTH, PITCH, THREADS>(
      rows.data + from * rows.row_stride, rows.row_stride, rows.column_stride, tile, end - from, thread_id);
}

// Whether query row `query` attends to a key by position; `shift` = Lk - Lq aligns queries with keys.
template <bool CAUSAL, bool WINDOW>
METAL_FUNC bool is_seen(int query, int key, int queries, int keys, int window) {
  const int position = query + keys - queries;
  return query < queries && key < keys && (!CAUSAL || key <= position) && (!WINDOW || key > position - window);
}

// Whether all queries from `first_query` to `last_query` attend to all keys from `first_key` to `last_key` by position.
template <bool CAUSAL, bool WINDOW>
METAL_FUNC bool is_all_seen(
    int first_query, int last_query, int first_key, int last_key, int queries, int keys, int window) {
  return is_seen<CAUSAL, WINDOW>(first_query, last_key, queries, keys, window)
      && is_seen<CAUSAL, WINDOW>(last_query, first_key, queries, keys, window);
}

// First key that any query from `first` on attends to, rounded down to a whole tile.
template <bool WINDOW, int BLOCK>
METAL_FUNC int first_key(int first, int queries, int keys, int window) {
  return WINDOW ? metal::max(0, first + keys - queries - window + 1) / BLOCK * BLOCK : 0;
}

// One past the last key that any query up to `last` attends to.
template <bool CAUSAL>
METAL_FUNC int key_end(int last, int queries, int keys) {
  return CAUSAL ? metal::min(keys, metal::max(0, last + keys - queries + 1)) : keys;
}

// Block lists. Tiles of LIST_Q queries by LIST_K keys in which no pair is visible are not listed; a kernel iterates over the
// blocks of the listed ones.
//
//   lists (batches, heads, tiles, 8): for each tile of queries, or of keys in the kernel of dK and dV, where its entries begin
//     and end; and in the i-th record, apart from that, which batch, head and tile the i-th threadgroup processes.
//   entries (n, 2): a tile of the other side, and a tile of bits, or -1 if all pairs are visible.
//   bits (m, LIST_Q, LIST_K / 32): bit j of word w of a row: key 32 w + j of the tile is visible.
constant constexpr int LIST_RECORD = 8;

struct Listed {
  int batch;  // of the lists, as head is: 0 if they are shared
  int head;
  int tile;
};

template <typename Lists>
METAL_FUNC Listed scheduled(Lists lists, int at) {
  return {lists[at * LIST_RECORD + 2], lists[at * LIST_RECORD + 3], lists[at * LIST_RECORD + 4]};
}

// Mask of the first N bits.
template <int N>
METAL_FUNC constexpr uint all_bits() { return 0xffffffffu >> (32 - N); }

METAL_FUNC bool has_bit(uint bits, int at) { return (bits >> at & 1) != 0; }

// Loads the bits of ROWS rows of a tile from `row` on, for KEYS keys from `key` on: lane l holds row l % ROWS.
template <int LIST_Q, int LIST_K, int ROWS, int KEYS, typename Bits>
METAL_FUNC uint load_bits(Bits bits, int tile, int row, int key, uint lane) {
  if (tile < 0) {
    return all_bits<KEYS>();
  }
  const int64_t line = int64_t(tile) * LIST_Q + row + int(lane % ROWS);
  return (uint(bits[line * (LIST_K / 32) + key / 32]) >> (key % 32)) & all_bits<KEYS>();
}

// Adds slope * (key - position of the query), rounded once, so that all kernels compute the same score.
METAL_FUNC float with_alibi(float score, float slope, int query, int key, int queries, int keys) {
  return metal::fma(slope, float(key - (query + keys - queries)), score);
}
