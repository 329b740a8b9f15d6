// The gradients of q, k and v by mma.sync, without a score matrix (Dao, 2023): a block takes BLOCK_K keys and goes over all
// queries that see any of them, BLOCK_Q at a time.
//
//                 queries, BLOCK_Q at a time                  S = Q K^T    P = exp2(c S - logsumexp)    dP = dO V^T
//               +--------+--------+--                         dS = P * (dP - delta)
//   band 0      | S^T    |        |    BAND_TILES * 16        dV += P^T dO    dK += dS^T Q    in registers
//   band 1      | dP^T   |        |    keys a warp            dQ += dS K                      in float32, in device memory
//   ...         |        |        |
//               +--------+--------+--
//
// Transposed, the accumulators of P and dS are left operands of dV and dK as they are. All keys have a part in dQ, so dS
// goes through shared memory, and blocks add to dQ what they found. With COLUMN_WARPS = 2 two warps share a band: each
// makes half of its scores, and P goes through shared memory too; each then holds half of the columns of dV and dK.

constexpr int BLOCK_K = BANDS * BAND_TILES * 16, SUB_Q = COLUMN_WARPS > 1 ? BLOCK_Q / COLUMN_WARPS : PART_Q;
constexpr bool EXCHANGE = COLUMN_WARPS > 1;
using KeyTile = Tile<BLOCK_K, HEAD_DIM>;
using ValueTile = Tile<BLOCK_K, VALUE_DIM>;
using QueryTile = Tile<BLOCK_Q, HEAD_DIM>;
using CotangentTile = Tile<BLOCK_Q, VALUE_DIM>;
using ScoreTile = Tile<BLOCK_K, BLOCK_Q>;
constexpr int NUMBER_BYTES = 2 * BLOCK_Q * 4;  // logsumexps and deltas
constexpr int STAGE_BYTES = QueryTile::BYTES + CotangentTile::BYTES + NUMBER_BYTES;
constexpr int KEY_COLUMNS = HEAD_DIM / COLUMN_WARPS, VALUE_COLUMNS = VALUE_DIM / COLUMN_WARPS;  // of a warp's dK and dV
constexpr int SUM_TILES = BLOCK_Q / QUERY_WARPS / 16, SUM_COLUMNS = HEAD_DIM * QUERY_WARPS / WARPS;  // of a warp's dQ
static_assert(KEY_COLUMNS % 16 == 0 && VALUE_COLUMNS % 16 == 0 && SUM_COLUMNS % 16 == 0 && SUM_TILES > 0, "whole matrices");
constexpr int PADDED = 64;  // queries come in tiles of so many in what general_rows.cu makes

using Scores = float[BAND_TILES][SUB_Q / 8][4];
using Operand = u32[BAND_TILES][4];

// sums = rows @ columns^T, added to what `sums` holds: rows of a band against queries.
template <class Rows, class Columns, int DEPTH>
DEVICE void multiply_by_columns(Scores& sums, u32 rows, u32 columns) {
  rows += Rows::by_rows(), columns += Columns::by_columns();
#pragma unroll
  for (int step = 0; step < DEPTH / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) load_matrices(left[t], rows + Rows::at(16 * t, 16 * step));
#pragma unroll
    for (int pair = 0; pair < SUB_Q / 16; ++pair) {
      u32 right[4];
      load_matrices(right, columns + Columns::at(16 * pair, 16 * step));
#pragma unroll
      for (int t = 0; t < BAND_TILES; ++t) {
        multiply_add(sums[t][2 * pair], left[t], right[0], right[1]);
        multiply_add(sums[t][2 * pair + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// sums += left (16 rows a tile, 16 columns) @ 16 rows of a tile in shared memory.
template <class Right, int TILES, int COLUMNS>
DEVICE void multiply_step(float (&sums)[TILES][COLUMNS / 8][4], const u32 (&left)[TILES][4], u32 right) {
#pragma unroll
  for (int pair = 0; pair < COLUMNS / 16; ++pair) {
    u32 words[4];
    load_matrices_transposed(words, right + Right::at(0, 16 * pair));
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      multiply_add(sums[t][2 * pair], left[t], words[0], words[1]);
      multiply_add(sums[t][2 * pair + 1], left[t], words[2], words[3]);
    }
  }
}

// sums += weights^T @ rows of a tile: with the weights in registers ...
template <class Right, int COLUMNS>
DEVICE void multiply_from_registers(float (&sums)[BAND_TILES][COLUMNS / 8][4], const Scores& weights, u32 right) {
  right += Right::by_rows();
#pragma unroll
  for (int step = 0; step < SUB_Q / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) pack_operand(left[t], weights[t][2 * step], weights[t][2 * step + 1]);
    multiply_step<Right, BAND_TILES, COLUMNS>(sums, left, right + Right::at(16 * step, 0));
  }
}

// ... or in shared memory, for all queries of the tile.
template <class Right, int COLUMNS>
DEVICE void multiply_from_memory(float (&sums)[BAND_TILES][COLUMNS / 8][4], u32 weights, u32 right) {
  weights += ScoreTile::by_rows(), right += Right::by_rows();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) {
    Operand left;
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) load_matrices(left[t], weights + ScoreTile::at(16 * t, 16 * step));
    multiply_step<Right, BAND_TILES, COLUMNS>(sums, left, right + Right::at(16 * step, 0));
  }
}

// A mask's elements for a warp's scores, as they lie in memory: asked for before the product that makes the scores.
struct MaskPart {
  MaskElement elements[SUB_Q / 4][2 * BAND_TILES];

  // For two neighbours of each 8 queries and keys 8 apart; beyond the last of either those are read again.
  DEVICE void read(const MaskArray& mask, const Problem& problem, int batch, int head, int first_query, int first_key) {
    const int key = first_key + threadIdx.x % 32 / 4, last = problem.keys - 1;
#pragma unroll
    for (int i = 0; i < SUB_Q / 4; ++i) {
      const int query = min(first_query + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2, problem.queries - 1);
      const MaskElement* row = mask.row(batch, head, query);
#pragma unroll
      for (int j = 0; j < 2 * BAND_TILES; ++j) elements[i][j] = row[min(key + 8 * j, last) * mask.key_step];
    }
  }
};

// Scores to weights, in place; with SOFTCAP also what the cap makes of a score's derivative. `numbers` are the logsumexps
// of the first query here, +inf for one that sees nothing or is none.
DEVICE void weigh(Scores& scores, Scores& slopes, const Problem& problem, const MaskPart& mask, const float* numbers,
                  int first_key, int first_query, bool whole) {
  const int key = first_key + threadIdx.x % 32 / 4, query = first_query + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < SUB_Q / 8; ++n) {
    const float2 logsumexps = *reinterpret_cast<const float2*>(numbers + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = query + 8 * n + i, last = problem.last_seen_by(own) - key, first = problem.first_seen_by(own) - key;
#pragma unroll
      for (int j = 0; j < 2 * BAND_TILES; ++j) {
        float& s = scores[j / 2][n][j % 2 * 2 + i];
        if (SOFTCAP) s = squash(s, problem.into_cap), slopes[j / 2][n][j % 2 * 2 + i] = 1 - s * s;
        s *= problem.scale_log2;
        if (MASK) s += mask_value(mask.elements[2 * n + i][j]);
        s -= i ? logsumexps.y : logsumexps.x;
        s = !whole && (8 * j >= last || (WINDOW && 8 * j < first)) ? 0 : exp2_fast(s);
      }
    }
  }
}

// Sets an accumulator of dP to -delta, so that the product comes out as dP - delta.
DEVICE void start_from_deltas(Scores& sums, const float* deltas) {
#pragma unroll
  for (int n = 0; n < SUB_Q / 8; ++n) {
    const float2 pair = *reinterpret_cast<const float2*>(deltas + 8 * n + threadIdx.x % 4 * 2);
#pragma unroll
    for (int t = 0; t < BAND_TILES; ++t) {
      sums[t][n][0] = sums[t][n][2] = -pair.x, sums[t][n][1] = sums[t][n][3] = -pair.y;
    }
  }
}

DEVICE void leave_scores(char* tile, const Scores& scores) {
#pragma unroll
  for (int t = 0; t < BAND_TILES; ++t) leave_rows<ScoreTile, SUB_Q>(tile + ScoreTile::at(16 * t, 0), scores[t], 1, 1);
}

// dQ += dS K for a warp's part of the tile of queries. The sums of an accumulator lie as add_to_memory puts them: for each
// 16 queries and 8 columns 128 floats.
DEVICE void add_query_gradient(float* sums, u32 scores, u32 keys, int warp) {
  const int first_query = warp % QUERY_WARPS * SUM_TILES * 16, first_column = warp / QUERY_WARPS * SUM_COLUMNS;
  float found[SUM_TILES][SUM_COLUMNS / 8][4] = {};
  scores += ScoreTile::by_columns() + ScoreTile::at(0, first_query);
  keys += KeyTile::by_rows() + KeyTile::at(0, first_column);
#pragma unroll
  for (int step = 0; step < BLOCK_K / 16; ++step) {
    u32 left[SUM_TILES][4];
#pragma unroll
    for (int t = 0; t < SUM_TILES; ++t) load_matrices_transposed(left[t], scores + ScoreTile::at(16 * step, 16 * t));
    multiply_step<KeyTile, SUM_TILES, SUM_COLUMNS>(found, left, keys + KeyTile::at(16 * step, 0));
  }
  sums += first_query * HEAD_DIM + first_column * 16;
#pragma unroll
  for (int i = 0; i < SUM_TILES * SUM_COLUMNS / 8; ++i) {
    const int t = i / (SUM_COLUMNS / 8), n = i % (SUM_COLUMNS / 8);
    add_to_memory(sums + t * 16 * HEAD_DIM + n * 128, found[t][n]);
  }
}

// Where the arrays of a block's iterations begin: it goes over all heads that share its keys, and of each over the tiles
// [first, first + count) of queries, from a tile of its own on, so that not all blocks add to the same sums at once.
struct Walk {
  int first, count, start;
  DEVICE int head(int i) const { return i / count; }
  DEVICE int query(int i) const { return (first + (i % count + start) % count) * BLOCK_Q; }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key, const char* value, const char* cotangent, const float* rows,
#if MASK
                const MaskElement* mask,
#endif
                float* sums, char* d_key, char* d_value, int heads, int group, int queries, int keys, int columns,
                int value_columns, int scale_bits, int scale_log2_bits, int into_cap_bits, int window, Step query_batch,
                Step query_head, Step query_row, Step key_batch, Step key_head, Step key_row, Step value_batch, Step value_head,
                Step value_row, Step cotangent_batch, Step cotangent_head, Step cotangent_row
#if MASK
                , Step mask_batch, Step mask_head, Step mask_query, Step mask_key
#endif
    ) {
  extern __shared__ __align__(1024) char shared[];
  const Problem problem{heads, group, queries, keys, __int_as_float(scale_log2_bits), __int_as_float(into_cap_bits), window};
  const int key_tiles = (keys + BLOCK_K - 1) / BLOCK_K, key_heads = heads / group;
  const int key_tile = blockIdx.x % key_tiles, plane = blockIdx.x / key_tiles;
  const int batch = plane / key_heads, key_head_index = plane % key_heads, first_key = key_tile * BLOCK_K;
  const int padded_queries = (queries + PADDED - 1) / PADDED * PADDED;

  // The queries that see any of the keys.
  const int shift = keys - queries, begin = CAUSAL ? max(0, first_key - shift) : 0;
  const int end = WINDOW ? min(queries, min(keys, first_key + BLOCK_K) - 1 - shift + window) : queries;
  const int first_tile = begin / BLOCK_Q, tiles = max(0, (end + BLOCK_Q - 1) / BLOCK_Q - first_tile);
  const Walk walk{first_tile, tiles, tiles ? key_tile % tiles : 0};

  const int warp = threadIdx.x / 32, band = warp / COLUMN_WARPS, part = warp % COLUMN_WARPS;
  const u32 keys_at = shared_address(shared), values_at = keys_at + KeyTile::BYTES, ring_at = values_at + ValueTile::BYTES;
  char* ring = shared + KeyTile::BYTES + ValueTile::BYTES;
  char* scores = ring + STAGES * STAGE_BYTES;
  const u32 scores_at = shared_address(scores), weights_at = scores_at + ScoreTile::BYTES;
  const int band_row = band * BAND_TILES * 16;

  const auto start_copies = [&](int i, int stage) {
    if (i >= group * walk.count) return;
    const int head = key_head_index * group + walk.head(i), first = walk.query(i);
    const u32 at = ring_at + stage * STAGE_BYTES;
    copy_tile<QueryTile>(at, query + (steps(batch, query_batch) + steps(head, query_head)) * 2, query_row, first, queries, columns);
    copy_tile<CotangentTile>(at + QueryTile::BYTES, cotangent + (steps(batch, cotangent_batch) + steps(head, cotangent_head)) * 2,
                             cotangent_row, first, queries, value_columns);
    const int quads = BLOCK_Q / 4, kind = threadIdx.x / quads, quad = threadIdx.x % quads;
    if (kind < 2) {
      const i64 padded_row = static_cast<i64>(batch * heads + head) * padded_queries + first;
      const float* numbers = rows + padded_row / PADDED * 2 * PADDED + kind * PADDED + padded_row % PADDED;
      copy_16_bytes(at + QueryTile::BYTES + CotangentTile::BYTES + (kind * quads + quad) * 16, numbers + quad * 4, true);
    }
  };
  copy_tile<KeyTile>(keys_at, key + (steps(batch, key_batch) + steps(key_head_index, key_head)) * 2, key_row, first_key, keys, columns);
  copy_tile<ValueTile>(values_at, value + (steps(batch, value_batch) + steps(key_head_index, value_head)) * 2, value_row, first_key, keys,
                       value_columns);
  start_copies(0, 0);
  commit_copies();

#if MASK
  const MaskArray array{mask, mask_batch, mask_head, mask_query, mask_key};
#endif
  float own_keys[BAND_TILES][KEY_COLUMNS / 8][4] = {}, own_values[BAND_TILES][VALUE_COLUMNS / 8][4] = {};
#pragma unroll 1
  for (int i = 0; i < group * walk.count; ++i) {
    const int stage = STAGES > 1 ? i % 2 : 0, head = key_head_index * group + walk.head(i), first_query = walk.query(i);
    const u32 queries_at = ring_at + stage * STAGE_BYTES, cotangents_at = queries_at + QueryTile::BYTES;
    const float* numbers = reinterpret_cast<float*>(ring + stage * STAGE_BYTES + QueryTile::BYTES + CotangentTile::BYTES);
    wait_copies<0>();
    __syncthreads();  // the tile has landed, and all warps are done with the last one and its dS
    if (STAGES > 1) start_copies(i + 1, 1 - stage), commit_copies();
#pragma unroll 1
    for (int sub = EXCHANGE ? part : 0; sub < (EXCHANGE ? part + 1 : BLOCK_Q / SUB_Q); ++sub) {
      const int at = sub * SUB_Q, from = first_query + at, last = min(queries, from + SUB_Q) - 1;
      const bool whole = first_key + BLOCK_K <= problem.last_seen_by(from) && (!WINDOW || first_key >= problem.first_seen_by(last));
      MaskPart masked;
#if MASK
      masked.read(array, problem, batch, head, from, first_key + band_row);
#endif
      Scores weights = {}, slopes, found;
      multiply_by_columns<KeyTile, QueryTile, HEAD_DIM>(weights, keys_at + KeyTile::at(band_row, 0), queries_at + QueryTile::at(at, 0));
      weigh(weights, slopes, problem, masked, numbers + at, first_key + band_row, from, whole);
      if (EXCHANGE) leave_scores(scores + ScoreTile::BYTES + ScoreTile::at(band_row, at), weights);
      else multiply_from_registers<CotangentTile, VALUE_COLUMNS>(own_values, weights, cotangents_at + CotangentTile::at(at, 0));
      start_from_deltas(found, numbers + BLOCK_Q + at);
      multiply_by_columns<ValueTile, CotangentTile, VALUE_DIM>(found, values_at + ValueTile::at(band_row, 0), cotangents_at + CotangentTile::at(at, 0));
#pragma unroll
      for (int j = 0; j < BAND_TILES * SUB_Q / 2; ++j) {
        const int t = j / (SUB_Q / 2), n = j / 4 % (SUB_Q / 8);
        found[t][n][j % 4] *= SOFTCAP ? weights[t][n][j % 4] * slopes[t][n][j % 4] : weights[t][n][j % 4];
      }
      leave_scores(scores + ScoreTile::at(band_row, at), found);
      if (!EXCHANGE) multiply_from_registers<QueryTile, KEY_COLUMNS>(own_keys, found, queries_at + QueryTile::at(at, 0));
    }
    __syncthreads();  // dS is there whole
    if (EXCHANGE) {
      multiply_from_memory<CotangentTile, VALUE_COLUMNS>(own_values, weights_at + ScoreTile::at(band_row, 0), cotangents_at + CotangentTile::at(0, part * VALUE_COLUMNS));
      multiply_from_memory<QueryTile, KEY_COLUMNS>(own_keys, scores_at + ScoreTile::at(band_row, 0), queries_at + QueryTile::at(0, part * KEY_COLUMNS));
      if (STAGES == 1) __syncthreads();
    }
    if (STAGES == 1) start_copies(i + 1, 0), commit_copies();
    add_query_gradient(sums + (static_cast<i64>(batch * heads + head) * padded_queries + first_query) * HEAD_DIM, scores_at, keys_at, warp);
  }
  wait_copies<0>();
  __syncthreads();  // keys and values are no longer needed: what they get takes their place
#pragma unroll
  for (int t = 0; t < BAND_TILES; ++t) {
    const float scale = __int_as_float(scale_bits);
    const int row = band_row + 16 * t;
    leave_rows<KeyTile, KEY_COLUMNS>(shared + KeyTile::at(row, part * KEY_COLUMNS), own_keys[t], scale, scale);
    leave_rows<ValueTile, VALUE_COLUMNS>(shared + KeyTile::BYTES + ValueTile::at(row, part * VALUE_COLUMNS), own_values[t], 1, 1);
  }
  __syncthreads();
  const i64 first_place = static_cast<i64>(plane) * keys + first_key;
  write_rows<KeyTile>(shared, [&](int row) { return d_key + (first_place + row) * columns * 2; }, keys - first_key, columns);
  write_rows<ValueTile>(shared + KeyTile::BYTES, [&](int row) { return d_value + (first_place + row) * value_columns * 2; },
                        keys - first_key, value_columns);
}
