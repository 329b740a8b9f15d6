// General forward kernel (FlashAttention-2: Dao, 2023) with mma.sync, for Ampere and later: array masks, values of another
// width than keys, strided inputs.
//
//              keys, BLOCK_N at a time, through STAGES buffers filled by cp.async
//            +--------+--------+--------+--
//   warp 0   |        |        |        |    ROW_TILES * 16 rows per warp: scores, softmax and output in registers
//   warp 1   |   S    |   S    |   S    |
//    ...     |        |        |        |    tiles fully masked by causality or the window are neither loaded nor computed
//   warp W-1 |        |        |        |
//            +--------+--------+--------+--
//
// With one buffer, the values of a tile are loaded during its score product, and the next keys during its softmax and second
// product; with more, whole tiles are prefetched. With SPLIT the keys are split over several blocks, and portable/join.cu
// combines their partial results. With LISTS a block's key tiles are entries of a block list, longest lists first. With
// QUANTIZED keys and values are dequantized on their way to the buffers (quantized/loader.cuh), which is not asynchronous.

constexpr int WARP_ROWS = 16 * ROW_TILES, BLOCK_M = WARPS * WARP_ROWS;
using QueryTile = Tile<BLOCK_M, HEAD_DIM>;
using KeyTile = Tile<BLOCK_N, HEAD_DIM>;
using ValueTile = Tile<BLOCK_N, VALUE_DIM>;
using OutputTile = Tile<BLOCK_M, VALUE_DIM>;
constexpr int FIRST_BYTES = !SPLIT && OutputTile::BYTES > QueryTile::BYTES ? OutputTile::BYTES : QueryTile::BYTES;
constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;

// A warp's queries as left operands: loaded from shared memory for each key tile, or kept in registers if these suffice.
struct Queries {
  u32 place;
#if QUERIES_IN_REGISTERS
  u32 kept[HEAD_DIM / 16][ROW_TILES][4];
#endif

  DEVICE void keep() {
#if QUERIES_IN_REGISTERS
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) read(kept[step], step);
#endif
  }
  DEVICE void operand(u32 (&words)[ROW_TILES][4], int step) const {
#if QUERIES_IN_REGISTERS
#pragma unroll
    for (int i = 0; i < 4 * ROW_TILES; ++i) words[i / 4][i % 4] = kept[step][i / 4][i % 4];
#else
    read(words, step);
#endif
  }
  DEVICE void read(u32 (&words)[ROW_TILES][4], int step) const {
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) load_matrices(words[t], place + QueryTile::at(16 * t, 16 * step));
  }
};

// S = Q K^T
DEVICE void score(Scores& scores, const Queries& queries, u32 keys) {
  keys += KeyTile::by_columns();
#pragma unroll
  for (int i = 0; i < ROW_TILES * BLOCK_N / 2; ++i) scores[i / (BLOCK_N / 2)][i / 4 % (BLOCK_N / 8)][i % 4] = 0;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    u32 rows[ROW_TILES][4];
    queries.operand(rows, step);
#pragma unroll
    for (int pair = 0; pair < BLOCK_N / 16; ++pair) {
      u32 words[4];
      load_matrices(words, keys + KeyTile::at(16 * pair, 16 * step));
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        multiply_add(scores[t][2 * pair], rows[t], words[0], words[1]);
        multiply_add(scores[t][2 * pair + 1], rows[t], words[2], words[3]);
      }
    }
  }
}

// O += P V
DEVICE void add_values(Output& out, const Scores& weights, u32 values) {
  values += ValueTile::by_rows();
#pragma unroll
  for (int step = 0; step < BLOCK_N / 16; ++step) {
    u32 rows[ROW_TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; ++t) pack_operand(rows[t], weights[t][2 * step], weights[t][2 * step + 1]);
#pragma unroll
    for (int pair = 0; pair < VALUE_DIM / 16; ++pair) {
      u32 words[4];
      load_matrices_transposed(words, values + ValueTile::at(16 * step, 16 * pair));
#pragma unroll
      for (int t = 0; t < ROW_TILES; ++t) {
        multiply_add(out[t][2 * pair], rows[t], words[0], words[1]);
        multiply_add(out[t][2 * pair + 1], rows[t], words[2], words[3]);
      }
    }
  }
}

// Indices of output rows over batch, heads and queries.
struct Places {
  i64 first_plane;  // plane of the first head
  int group, queries;

  DEVICE i64 operator()(int row) const {
    return PACK ? (first_plane + row % group) * queries + row / group : first_plane * queries + row;
  }
};

// Divides by the row sums (fully masked rows are 0) and writes the output rows and their RowResults; with SPLIT, in float32,
// and with maximum and sum as stats.
DEVICE void finish(char* shared, Output& out, Rows& rows, char* output, const RowResults& results, const Places& places,
                   int first_row, int row_count, int columns, float factor) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * WARP_ROWS;
  if (!SPLIT) __syncthreads();  // the queries are no longer needed
#pragma unroll
  for (int t = 0; t < ROW_TILES; ++t) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows.sum[t][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[r] = sum > 0 ? reciprocal_fast(sum) : 0;
      const int row = first_row + warp_row + 16 * t + 8 * r + lane / 4;
      if (row >= row_count) continue;
      if (lane % 4 == 0) {
        if (SPLIT) results.stats[places(row)] = make_float2(rows.max[t][r], sum);
        else results.from(places(row)).write(0, rows.max[t][r], sum, factor);
      }
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8 && SPLIT; ++n) {
        if (8 * n >= columns) continue;
        *reinterpret_cast<float2*>(output + (places(row) * columns + 8 * n + lane % 4 * 2) * 4) =
            make_float2(out[t][n][2 * r] * inverse[r], out[t][n][2 * r + 1] * inverse[r]);
      }
    }
    if (!SPLIT) leave_rows<OutputTile, VALUE_DIM>(shared + OutputTile::at(warp_row + 16 * t, 0), out[t], inverse[0], inverse[1]);
  }
  if (SPLIT) return;
  __syncthreads();
  write_rows<OutputTile>(shared, [&](int row) { return output + places(first_row + row) * columns * 2; },
                         row_count - first_row, columns);
}

using Listed = ListedTiles<BLOCK_M, BLOCK_N>;

// Work of a block: its rows, their first head, the head of their keys, and the range of keys, with LISTS of entries.
struct Work {
  int batch, first_head, key_head, first_row, begin, end;
  int split, tiles;

  // A listed work: plane, row tile, first and end entry.
  DEVICE Work(const Problem& problem, int4 own, int splits) {
    tiles = (problem.rows() + BLOCK_M - 1) / BLOCK_M, split = SPLIT ? blockIdx.x % splits : 0;
    batch = own.x / problem.heads, first_head = own.x % problem.heads, key_head = first_head / problem.group;
    first_row = own.y * BLOCK_M, begin = own.z, end = own.w;
  }

  DEVICE Work(const Problem& problem, int first_key, int split_keys, int splits) {
    const int planes = PACK ? problem.heads / problem.group : problem.heads, work = SPLIT ? blockIdx.x / splits : blockIdx.x;
    tiles = (problem.rows() + BLOCK_M - 1) / BLOCK_M, split = SPLIT ? blockIdx.x % splits : 0;
    first_row = (tiles - 1 - work % tiles) * BLOCK_M;  // longest first with causal masks
    batch = work / tiles / planes;
    const int plane = work / tiles % planes;
    first_head = PACK ? plane * problem.group : plane, key_head = PACK ? plane : plane / problem.group;
    begin = SPLIT ? first_key + split * split_keys : 0, end = SPLIT ? min(problem.keys, begin + split_keys) : problem.keys;
  }
};

// Key tiles that a block has to process, and the first and end keys of this warp's rows.
struct Reach {
  int first_block, end_block, seen_by_any, seen_by_all, unseen_by_any, unseen_by_some;

  DEVICE Reach(const Problem& problem, const Work& work) {
    const int rows = problem.rows(), warp_row = work.first_row + threadIdx.x / 32 * WARP_ROWS;
    const auto query_at = [&](int row) { return problem.query_of(min(row, rows - 1)); };
    first_block = max(work.begin, problem.first_seen_by(query_at(work.first_row))) / BLOCK_N;
    end_block = (min(work.end, problem.last_seen_by(query_at(work.first_row + BLOCK_M - 1))) + BLOCK_N - 1) / BLOCK_N;
    const int top = query_at(warp_row), bottom = query_at(warp_row + WARP_ROWS - 1);
    seen_by_any = warp_row < rows ? problem.last_seen_by(bottom) : 0, seen_by_all = problem.last_seen_by(top);
    unseen_by_any = problem.first_seen_by(top), unseen_by_some = problem.first_seen_by(bottom);
    if (LISTS) first_block = work.begin, end_block = work.end;
  }
  // Whether the warp's rows attend to any, and to every, key of the tile that begins at a key.
  DEVICE bool any(int first) const { return first < seen_by_any && (!WINDOW || first + BLOCK_N > unseen_by_any); }
  DEVICE bool all(int first) const { return first + BLOCK_N <= seen_by_all && (!WINDOW || first >= unseen_by_some); }
};

// Rows of keys or values of a head.
#if QUANTIZED
using Keys = Plane;
using Values = Plane;
#else
struct Keys {
  const char* elements;
  int step;
};
using Values = Keys;
template <class Tile>
DEVICE void load_keys(u32 tile, const Keys& keys, int first, int rows, int columns) {
  copy_tile<Tile>(tile, keys.elements, keys.step, first, rows, columns);
}
template <class Tile>
DEVICE void load_values(u32 tile, const Values& values, int first, int rows, int columns) {
  copy_tile<Tile>(tile, values.elements, values.step, first, rows, columns);
}
#endif

// Keys and values of a head, and the ring of shared-memory tiles they are copied to.
struct Ring {
  Keys keys;
  Values values;
  int key_count, columns, value_columns, end_block;
  u32 place;
  Listed listed;

  DEVICE int first_key(int block) const { return (LISTS ? listed.entries[block].x : block) * BLOCK_N; }

  DEVICE void start_keys(int block, int stage) const {
    if (block >= end_block) return;
    load_keys<KeyTile>(place + stage * STAGE_BYTES, keys, first_key(block), key_count, columns);
  }
  DEVICE void start_values(int block, int stage) const {
    if (block >= end_block) return;
    load_values<ValueTile>(place + stage * STAGE_BYTES + KeyTile::BYTES, values, first_key(block), key_count, value_columns);
  }
  DEVICE void start(int block, int stage) const { start_keys(block, stage), start_values(block, stage); }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key,
#if QUANTIZED
                const char* key_scales, const char* key_biases,
#endif
                const char* value,
#if QUANTIZED
                const char* value_scales, const char* value_biases,
#endif
#if MASK
                const MaskElement* mask,
#endif
#if ALIBI
                const float* slopes,
#endif
#if LISTS
                const int4* items, const int2* entries, const u32* bits,
#endif
                char* output,
#if !SPLIT
                float* logsumexp,
#endif
                float2* stats, int heads, int group, int queries, int keys, int columns, int value_columns,
                int score_factor_bits, int into_cap_bits,
#if ALIBI
                int slope_factor_bits,
#endif
                int window, int first_key, int split_keys, int splits, Step query_batch, Step query_head, Step query_row,
                Step key_batch, Step key_head, Step key_row,
#if QUANTIZED
                Step key_scale_batch, Step key_scale_head, Step key_scale_row, Step key_bias_batch, Step key_bias_head,
                Step key_bias_row,
#endif
                Step value_batch, Step value_head, Step value_row
#if QUANTIZED
                , Step value_scale_batch, Step value_scale_head, Step value_scale_row, Step value_bias_batch,
                Step value_bias_head, Step value_bias_row
#endif
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
#if LISTS
  const Work work(problem, items[blockIdx.x], splits);
  const Listed listed{entries, bits};
#else
  const Work work(problem, first_key, split_keys, splits);
  const Listed listed{};
#endif
  const Reach reach(problem, work);
  const int rows = problem.rows(), first_row = work.first_row, end_block = reach.end_block;
  const int own_row = first_row + threadIdx.x / 32 * WARP_ROWS + threadIdx.x % 32 / 4;
  const u32 queries_at = shared_address(shared);
  const auto of_head = [&](const char* array, Step batch_step, Step head_step, int bytes) {
    return array + (steps(work.batch, batch_step) + steps(work.key_head, head_step)) * bytes;
  };
#if QUANTIZED
  constexpr int KEY_SCALES = Key::SCALE_BYTES, VALUE_SCALES = Value::SCALE_BYTES;
  const Keys own_keys{of_head(key, key_batch, key_head, 4),
                      of_head(key_scales, key_scale_batch, key_scale_head, KEY_SCALES),
                      of_head(key_biases, key_bias_batch, key_bias_head, KEY_SCALES),
                      static_cast<int>(key_row) * 4, static_cast<int>(key_scale_row) * KEY_SCALES,
                      static_cast<int>(key_bias_row) * KEY_SCALES};
  const Values own_values{of_head(value, value_batch, value_head, 4),
                          of_head(value_scales, value_scale_batch, value_scale_head, VALUE_SCALES),
                          of_head(value_biases, value_bias_batch, value_bias_head, VALUE_SCALES),
                          static_cast<int>(value_row) * 4, static_cast<int>(value_scale_row) * VALUE_SCALES,
                          static_cast<int>(value_bias_row) * VALUE_SCALES};
#else
  const Keys own_keys{of_head(key, key_batch, key_head, 2), static_cast<int>(key_row)};
  const Values own_values{of_head(value, value_batch, value_head, 2), static_cast<int>(value_row)};
#endif
  const Ring ring{own_keys, own_values, keys, columns, value_columns, end_block, queries_at + FIRST_BYTES, listed};

  const char* first_query = query + (steps(work.batch, query_batch) + steps(work.first_head, query_head)) * 2;
#pragma unroll
  for (int i = 0; i < Copying<QueryTile>::PASSES; ++i) {
    const int own = Copying<QueryTile>::first_row() + i * Copying<QueryTile>::HIGH, row = first_row + own;
    const char* source = first_query + (steps(problem.head_of(row), query_head) + steps(problem.query_of(row), query_row)) * 2;
    Copying<QueryTile>::row(queries_at, source, own, rows - first_row, columns);
  }
  commit_copies();
  if (STAGES == 1) ring.start_keys(reach.first_block, 0), commit_copies();
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) ring.start(reach.first_block + i, i), commit_copies();

  Queries own{queries_at + QueryTile::at(threadIdx.x / 32 * WARP_ROWS, 0) + QueryTile::by_rows()};
  if (QUERIES_IN_REGISTERS) {
    wait_copies<STAGES == 1 ? 1 : STAGES - 1>();
    __syncthreads();
    own.keep();
  }
  Output out = {};
  Rows state;
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; ++i) state.max[i / 2][i % 2] = MINUS_INFINITY, state.sum[i / 2][i % 2] = 0;

  RowSlopes biased;
  if constexpr (ALIBI) biased.read(problem, work.first_head, own_row);
  MaskTile masked;
#if MASK
  const MaskArray array{mask, mask_batch, mask_head, mask_query, mask_key};
  const auto read_mask = [&](int block) {
    if (block >= end_block) return;
    masked.read(array, problem, work.batch, work.first_head, own_row, ring.first_key(block));
  };
#else
  const auto read_mask = [](int) {};
#endif
  read_mask(reach.first_block);
  int stage = 0;
#pragma unroll 1
  for (int block = reach.first_block; block < end_block; ++block) {
    wait_copies<STAGES == 1 ? 0 : STAGES - 2>();
    __syncthreads();  // the tile is loaded, and no warp reads the buffer that is filled next
    if (STAGES == 1) ring.start_values(block, 0);
    else ring.start(block + STAGES - 1, (stage + STAGES - 1) % STAGES);
    commit_copies();

    const int first = ring.first_key(block);
    BitRows shown;
    bool whole = reach.all(first);
    if (LISTS) {
      const int tile = listed.entries[block].y;
      whole = whole && tile < 0;
      if (!whole) shown.read(listed, tile, own_row - first_row);
    }
    const bool needed = reach.any(first);
    const u32 buffer = ring.place + stage * STAGE_BYTES;
    Scores scores;
    if (needed) score(scores, own, buffer);
    if (STAGES == 1) {
      wait_copies<0>();
      __syncthreads();  // the values are loaded, and no warp reads the keys
      ring.start_keys(block + 1, 0);
      commit_copies();
    }
    if (needed) {
      rule(scores, masked, shown, biased, problem, own_row, first, whole);
      read_mask(block + 1);
      softmax(scores, state, out, problem.exponent_factor());
      add_values(out, scores, buffer + KeyTile::BYTES);
    } else {
      read_mask(block + 1);
    }
    stage = STAGES == 1 ? 0 : (stage + 1) % STAGES;
  }
  wait_copies<0>();
  const Places places{static_cast<i64>(work.batch) * heads + work.first_head, group, queries};
  const i64 split_rows = static_cast<i64>(work.split) * (gridDim.x / splits / work.tiles) * rows;
#if SPLIT
  const RowResults results{nullptr, stats + split_rows};
#else
  const RowResults results{logsumexp, stats};
#endif
  finish(shared, out, state, output + (SPLIT ? split_rows * value_columns * 4 : 0), results, places, first_row, rows,
         value_columns, problem.exponent_factor());
}
