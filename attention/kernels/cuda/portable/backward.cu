// General backward kernel (FlashAttention-2: Dao, 2023) with mma.sync, for Ampere and later: a block owns BLOCK_K keys and
// iterates over all queries that attend to any of them, BLOCK_Q at a time.
//
//                 queries, BLOCK_Q at a time                  S = Q K^T    P = 2^((S - base) c - rest)   dP = dO V^T
//               +--------+--------+--                         dS = P * (dP - delta)
//   band 0      | S^T    |        |    BAND_TILES * 16        dV += P^T dO    dK += dS^T Q    in registers
//   band 1      | dP^T   |        |    keys per warp          dQ += dS K                      in float32, in device memory
//   ...         |        |        |
//               +--------+--------+--
//
// The transposed accumulators of P and dS are directly the left operands of dV and dK. dQ sums over all keys, so dS goes
// through shared memory, and blocks accumulate dQ with atomics. With COLUMN_WARPS = 2, two warps share a band: each
// computes half of its scores, P goes through shared memory too, and each owns half of the columns of dV and dK.

// Mask elements of a warp's scores, in their dtype; loaded before the product that computes the scores.
struct MaskPart {
  MaskElement elements[SUB_Q / 4][2 * BAND_TILES];

  // For two adjacent queries of every 8, and keys 8 apart; indices beyond the end are clamped.
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

// Converts scores to weights in place; with SOFTCAP also computes the derivative of the cap. `numbers` are the exponent
// rests from the first query on; with REBASE their bases are at offset BASES.
constexpr int BASES = 2 * BLOCK_Q;

using Listed = ListedTiles<BLOCK_Q, BLOCK_K>;

template <bool REBASE>
DEVICE void weigh(Scores& scores, Scores& slopes, const Problem& problem, const MaskPart& mask, const u32* bits,
                  float bias_slope, const float* numbers, int first_key, int first_query, bool whole) {
  const int key = first_key + threadIdx.x % 32 / 4, query = first_query + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < SUB_Q / 8; ++n) {
    const float2 rests = *reinterpret_cast<const float2*>(numbers + 8 * n + threadIdx.x % 4 * 2);
    const float2 bases = REBASE ? *reinterpret_cast<const float2*>(numbers + BASES + 8 * n + threadIdx.x % 4 * 2)
                                : make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = query + 8 * n + i, last = problem.last_seen_by(own) - key, first = problem.first_seen_by(own) - key;
      const u32 shown = LISTS && bits != nullptr ? bits[(8 * n + i) * Listed::WORDS] >> key % 32 : ~0u;
#pragma unroll
      for (int j = 0; j < 2 * BAND_TILES; ++j) {
        float& s = scores[j / 2][n][j % 2 * 2 + i];
        if (SOFTCAP) s = squash(s, problem.into_cap), slopes[j / 2][n][j % 2 * 2 + i] = 1 - s * s;
        if (MASK_ADDED) s *= problem.score_factor;
        if (ALIBI) s += bias_slope * static_cast<float>(key + 8 * j - problem.position_of(own));
        if (MASK) s += mask_value(mask.elements[2 * n + i][j]);
        if (REBASE) s = rebased(s, i ? bases.y : bases.x);
        s = s * problem.exponent_factor() - (i ? rests.y : rests.x);
        const bool hidden = 8 * j >= last || (WINDOW && 8 * j < first) || (LISTS && !(shown & 1u << 8 * j));
        s = !whole && hidden ? 0 : exp2_fast(s);
      }
    }
  }
}

// Initialises an accumulator of dP with -delta, so that the product is dP - delta.
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

// dQ += dS K for a warp's part of the query tile. Accumulators are stored in the layout of add_to_memory: 128 floats per 16
// queries and 8 columns.
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

// Shared-memory layout.
constexpr int VALUES_AT = KeyTile::BYTES, RING_AT = VALUES_AT + ValueTile::BYTES;
constexpr int SCORES_AT = RING_AT + STAGES * STAGE_BYTES, WEIGHTS_AT = SCORES_AT + ScoreTile::BYTES;
constexpr int NUMBERS_AT = QueryTile::BYTES + CotangentTile::BYTES;  // within a stage

// Position of a warp in its block: a band of keys, and a part of the columns.
struct Warp {
  int band_row, part;
  DEVICE Warp() {
    const int warp = threadIdx.x / 32;
    band_row = warp / COLUMN_WARPS * BAND_TILES * 16, part = warp % COLUMN_WARPS;
  }
};

// A warp's accumulators of dK and dV.
struct Gradients {
  float keys[BAND_TILES][KEY_COLUMNS / 8][4] = {}, values[BAND_TILES][VALUE_COLUMNS / 8][4] = {};
};

// Computes weights and dS of SUB_Q queries from `at` on, in a tile that begins at `first_query`, and adds to dK and dV.
DEVICE void look_at_queries(Gradients& own, char* shared, int stage_at, const Warp& warp, const Problem& problem,
                            const MaskPart& masked, const u32* bits, float bias_slope, int at, int first_query,
                            int first_key) {
  const u32 base = shared_address(shared), queries = base + stage_at, cotangents = queries + QueryTile::BYTES;
  const float* numbers = reinterpret_cast<float*>(shared + stage_at + NUMBERS_AT);
  const int from = first_query + at, last = min(problem.queries, from + SUB_Q) - 1;
  const bool whole = first_key + BLOCK_K <= problem.last_seen_by(from) &&
                     (!WINDOW || first_key >= problem.first_seen_by(last)) && (!LISTS || bits == nullptr);
  // those of the lane's first key and query
  if (LISTS && bits != nullptr) bits += (at + threadIdx.x % 4 * 2) * Listed::WORDS + warp.band_row / 32;
  Scores weights = {}, slopes, found;
  multiply_by_columns<KeyTile, QueryTile, HEAD_DIM>(weights, base + KeyTile::at(warp.band_row, 0),
                                                    queries + QueryTile::at(at, 0));
  bool rebase = false;
#pragma unroll
  for (int i = threadIdx.x % 32; i < SUB_Q; i += 32) rebase = rebase || numbers[BASES + at + i] != 0;
  if (__builtin_expect(__any_sync(~0u, rebase), 0)) {
    weigh<true>(weights, slopes, problem, masked, bits, bias_slope, numbers + at, first_key + warp.band_row, from, whole);
  } else {
    weigh<false>(weights, slopes, problem, masked, bits, bias_slope, numbers + at, first_key + warp.band_row, from, whole);
  }
  if (EXCHANGE) leave_scores(shared + WEIGHTS_AT + ScoreTile::at(warp.band_row, at), weights);
  else multiply_from_registers<CotangentTile, VALUE_COLUMNS>(own.values, weights, cotangents + CotangentTile::at(at, 0));
  start_from_deltas(found, numbers + BLOCK_Q + at);
  multiply_by_columns<ValueTile, CotangentTile, VALUE_DIM>(found, base + VALUES_AT + ValueTile::at(warp.band_row, 0),
                                                           cotangents + CotangentTile::at(at, 0));
#pragma unroll
  for (int j = 0; j < BAND_TILES * SUB_Q / 2; ++j) {
    const int t = j / (SUB_Q / 2), n = j / 4 % (SUB_Q / 8);
    found[t][n][j % 4] *= SOFTCAP ? weights[t][n][j % 4] * slopes[t][n][j % 4] : weights[t][n][j % 4];
  }
  leave_scores(shared + SCORES_AT + ScoreTile::at(warp.band_row, at), found);
  if (!EXCHANGE) multiply_from_registers<QueryTile, KEY_COLUMNS>(own.keys, found, queries + QueryTile::at(at, 0));
}

// Adds to dK and dV for the whole tile, with weights and dS computed by two warps.
DEVICE void add_from_memory(Gradients& own, u32 base, int stage_at, const Warp& warp) {
  const u32 row = ScoreTile::at(warp.band_row, 0), queries = base + stage_at, cotangents = queries + QueryTile::BYTES;
  multiply_from_memory<CotangentTile, VALUE_COLUMNS>(own.values, base + WEIGHTS_AT + row,
                                                     cotangents + CotangentTile::at(0, warp.part * VALUE_COLUMNS));
  multiply_from_memory<QueryTile, KEY_COLUMNS>(own.keys, base + SCORES_AT + row,
                                               queries + QueryTile::at(0, warp.part * KEY_COLUMNS));
}

// Writes dK and dV of a block, staged in the shared memory of K and V, which are no longer needed.
DEVICE void hand_out(const Gradients& own, char* shared, const Warp& warp, float scale, char* d_key, char* d_value,
                     int rows_left, int columns, int value_columns) {
  __syncthreads();
#pragma unroll
  for (int t = 0; t < BAND_TILES; ++t) {
    const int row = warp.band_row + 16 * t;
    leave_rows<KeyTile, KEY_COLUMNS>(shared + KeyTile::at(row, warp.part * KEY_COLUMNS), own.keys[t], scale, scale);
    leave_rows<ValueTile, VALUE_COLUMNS>(shared + VALUES_AT + ValueTile::at(row, warp.part * VALUE_COLUMNS), own.values[t],
                                         1, 1);
  }
  __syncthreads();
  write_rows<KeyTile>(shared, [&](int row) { return d_key + static_cast<i64>(row) * columns * 2; }, rows_left, columns);
  write_rows<ValueTile>(shared + VALUES_AT, [&](int row) { return d_value + static_cast<i64>(row) * value_columns * 2; },
                        rows_left, value_columns);
}

// Iteration of a block over all heads that share its keys, and over the query tiles that attend to any of them. Each block
// starts at a different tile, so that blocks do not all add to the same rows of dQ at the same time.
#if LISTS
struct Walk {
  const int* offsets;  // of the block's key tile in the lists of the first head
  Listed listed;
  int first_head, head_step, start, length = 0;

  DEVICE Walk(const Problem& problem, int first_head, int key_tile, const int* offsets, const Listed& listed, int head_step)
      : offsets(offsets), listed(listed), first_head(first_head), head_step(head_step), start(key_tile) {
    for (int i = 0; i < problem.group; ++i) length += count(i);
  }
  DEVICE int count(int own) const { return offsets[own * head_step + 1] - offsets[own * head_step]; }
  // Head and entry of step i.
  DEVICE int2 step(int i) const {
    int own = 0;
    for (; i >= count(own); ++own) i -= count(own);
    return make_int2(own, offsets[own * head_step] + (i + start) % count(own));
  }
  DEVICE int head(int i) const { return first_head + step(i).x; }
  DEVICE int query(int i) const { return listed.entries[step(i).y].x * BLOCK_Q; }
  DEVICE const u32* bits(int i) const {
    const int tile = listed.entries[step(i).y].y;
    return tile < 0 ? nullptr : listed.bits + static_cast<i64>(tile) * (BLOCK_Q * Listed::WORDS);
  }
};
#else
struct Walk {
  int first_head, first, count, start, length;

  DEVICE Walk(const Problem& problem, int first_head, int first_key) : first_head(first_head) {
    const int shift = problem.keys - problem.queries, last_key = min(problem.keys, first_key + BLOCK_K) - 1;
    const int end = WINDOW ? min(problem.queries, last_key - shift + problem.window) : problem.queries;
    first = (CAUSAL ? max(0, first_key - shift) : 0) / BLOCK_Q;
    count = max(0, (end + BLOCK_Q - 1) / BLOCK_Q - first);
    start = count ? first_key / BLOCK_K % count : 0, length = problem.group * count;
  }
  DEVICE int head(int i) const { return first_head + i / count; }
  DEVICE int query(int i) const { return (first + (i % count + start) % count) * BLOCK_Q; }
  DEVICE const u32* bits(int) const { return nullptr; }
};
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key, const char* value, const char* cotangent, const float* rows,
#if MASK
                const MaskElement* mask,
#endif
#if ALIBI
                const float* slopes,
#endif
                float* sums,
#if LISTS
                const int* order, const int* offsets, const int2* entries, const u32* bits,
#endif
                char* d_key, char* d_value, int heads, int group, int queries, int keys, int columns,
                int value_columns, int scale_bits, int score_factor_bits, int into_cap_bits,
#if ALIBI
                int slope_factor_bits,
#endif
                int window,
#if LISTS
                int batch_step, int head_step,
#endif
                Step query_batch, Step query_head, Step query_row, Step key_batch, Step key_head, Step key_row, Step value_batch, Step value_head,
                Step value_row, Step cotangent_batch, Step cotangent_head, Step cotangent_row
#if MASK
                , Step mask_batch, Step mask_head, Step mask_query, Step mask_key
#endif
    ) {
  extern __shared__ __align__(1024) char shared[];
#if ALIBI
  const Slopes alibi{slopes, __int_as_float(slope_factor_bits)};
#else
  const Slopes alibi;
#endif
  const Problem problem{heads, group, queries, keys, __int_as_float(score_factor_bits), __int_as_float(into_cap_bits), window,
                        alibi};
  const int key_tiles = (keys + BLOCK_K - 1) / BLOCK_K, key_heads = heads / group;
#if LISTS
  const int work = order[blockIdx.x];
#else
  const int work = blockIdx.x;
#endif
  const int plane = work / key_tiles, first_key = work % key_tiles * BLOCK_K;
  const int batch = plane / key_heads, own_head = plane % key_heads;
  const i64 padded_queries = (queries + PADDED - 1) / PADDED * PADDED;
#if LISTS
  const Walk walk(problem, own_head * group, work % key_tiles,
                  offsets + (batch * batch_step + own_head * group * head_step) * key_tiles + work % key_tiles,
                  Listed{entries, bits}, head_step * key_tiles);
#else
  const Walk walk(problem, own_head * group, first_key);
#endif
  const Warp warp;
  const u32 base = shared_address(shared);

  const auto start_copies = [&](int i, int stage) {
    if (i >= walk.length) return;
    const int head = walk.head(i), first = walk.query(i);
    const u32 at = base + RING_AT + stage * STAGE_BYTES;
    const char* own_query = query + (steps(batch, query_batch) + steps(head, query_head)) * 2;
    const char* own_cotangent = cotangent + (steps(batch, cotangent_batch) + steps(head, cotangent_head)) * 2;
    copy_tile<QueryTile>(at, own_query, query_row, first, queries, columns);
    copy_tile<CotangentTile>(at + QueryTile::BYTES, own_cotangent, cotangent_row, first, queries, value_columns);
    const int quads = BLOCK_Q / 4, kind = threadIdx.x / quads, quad = threadIdx.x % quads;
    if (kind < 3) {
      const i64 padded_row = (batch * heads + head) * padded_queries + first;
      const float* numbers = rows + padded_row / PADDED * 3 * PADDED + kind * PADDED + padded_row % PADDED;
      copy_16_bytes(at + NUMBERS_AT + (kind * quads + quad) * 16, numbers + quad * 4, true);
    }
  };
  const char* own_key = key + (steps(batch, key_batch) + steps(own_head, key_head)) * 2;
  const char* own_value = value + (steps(batch, value_batch) + steps(own_head, value_head)) * 2;
  copy_tile<KeyTile>(base, own_key, key_row, first_key, keys, columns);
  copy_tile<ValueTile>(base + VALUES_AT, own_value, value_row, first_key, keys, value_columns);
  start_copies(0, 0);
  commit_copies();

#if MASK
  const MaskArray array{mask, mask_batch, mask_head, mask_query, mask_key};
#endif
  Gradients own;
#pragma unroll 1
  for (int i = 0; i < walk.length; ++i) {
    const int stage = STAGES > 1 ? i % 2 : 0, stage_at = RING_AT + stage * STAGE_BYTES;
    const int head = walk.head(i), first_query = walk.query(i);
    const float bias_slope = ALIBI ? problem.slopes[head] : 0;
    wait_copies<0>();
    __syncthreads();  // the tile is loaded, and no warp reads the previous tile or its dS
    if (STAGES > 1) start_copies(i + 1, 1 - stage), commit_copies();
#pragma unroll 1
    for (int sub = EXCHANGE ? warp.part : 0; sub < (EXCHANGE ? warp.part + 1 : BLOCK_Q / SUB_Q); ++sub) {
      MaskPart masked;
#if MASK
      masked.read(array, problem, batch, head, first_query + sub * SUB_Q, first_key + warp.band_row);
#endif
      look_at_queries(own, shared, stage_at, warp, problem, masked, walk.bits(i), bias_slope, sub * SUB_Q, first_query, first_key);
    }
    __syncthreads();  // dS is complete
    if (EXCHANGE) add_from_memory(own, base, stage_at, warp);
    if (EXCHANGE && STAGES == 1) __syncthreads();
    if (STAGES == 1) start_copies(i + 1, 0), commit_copies();
    float* own_sums = sums + ((batch * heads + head) * padded_queries + first_query) * HEAD_DIM;
    add_query_gradient(own_sums, base + SCORES_AT, base, threadIdx.x / 32);
  }
  wait_copies<0>();
  const i64 place = static_cast<i64>(plane) * keys + first_key;
  hand_out(own, shared, warp, __int_as_float(scale_bits), d_key + place * columns * 2, d_value + place * value_columns * 2,
           keys - first_key, columns, value_columns);
}
