// Split-K kernel for few queries and many keys (Flash-Decoding: Dao et al., 2023): keys are split over blocks and warps.
//
//                    keys of a split, 16 at a time, round-robin over the warps
//                  +----+----+----+----+----+----+----+----+----+--
//   16 rows: the   | w0 | w1 | w2 | w3 | w0 | w1 | w2 | w3 | .. each warp keeps its own maximum, sum and output
//   queries of all +----+----+----+----+----+----+----+----+----+--
//   heads that share a key head
//
// Each warp has its own ring of STAGES buffers of 16 keys and values, so that warps never wait for each other; the kernel
// is bound by the bytes in flight. In the epilogue the partial results of the warps are combined in shared memory. With one
// split that is the output; with several, the last block to finish combines the splits: see sm90/decode_join.cuh.

static_assert(ROWS == 16);
constexpr int STEP = 16;  // keys per step of a warp
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int TILE_BYTES = STEP * HEAD_DIM * 2;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int LANE_COPIES = STEP * ROW_UNITS / 32;

// A lane holds rows lane / 4 and lane / 4 + 8 and, of every 8 columns, the two at 2 * (lane % 4).
using Output = float[HEAD_DIM / 8][4];

// Softmax state of a lane's rows; `sum` covers only the lane's columns until the epilogue.
struct Rows {
  float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
  float sum[2] = {0, 0};
  float slope[2] = {0, 0};  // with ALIBI
};

// Starts an asynchronous copy of 16 rows to a tile, to the addresses given by `place`; elements beyond `rows_left` or
// `columns` are zero-filled.
template <typename Place>
DEVICE void copy_rows(u32 tile, int rows_left, int columns, const Place& place) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < LANE_COPIES; ++i) {
    const int row = (i * 32 + lane) / ROW_UNITS, unit = (i * 32 + lane) % ROW_UNITS;
    const bool valid = row < rows_left && unit * 8 < columns;
    copy_16_bytes(unit_address(tile, row, unit), place(valid ? row : 0) + (valid ? unit * 16 : 0), valid);
  }
}

// S = Q K^T for 16 keys: two accumulators of 8 keys each.
DEVICE void score(float (&scores)[2][4], u32 query, u32 keys) {
  const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
#pragma unroll 4
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    u32 rows[4], words[4];
    load_matrices(rows, unit_address(query, lane % 16, 2 * step + lane / 16));
    load_matrices(words, unit_address(keys, row, 2 * step + lane / 8 % 2));
    multiply_add(scores[0], rows, words[0], words[1]);
    multiply_add(scores[1], rows, words[2], words[3]);
  }
}

// O += P V for 16 keys.
DEVICE void add_values(Output& out, const u32 (&weights)[4], u32 values) {
  const int lane = threadIdx.x % 32, row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int pair = 0; pair < HEAD_DIM / 16; ++pair) {
    u32 words[4];
    load_matrices_transposed(words, unit_address(values, row, 2 * pair + lane / 16));
    multiply_add(out[2 * pair], weights, words[0], words[1]);
    multiply_add(out[2 * pair + 1], weights, words[2], words[3]);
  }
}

// Caps, biases and masks a row's scores of the keys from `key` on; returns the maximum of them and the row's own.
DEVICE float limit(float (&scores)[2][4], int r, const Rows& rows, const Problem& problem, int row, int key) {
  const int first = problem.first_seen_by(row), last = problem.last_seen_by(row);
  float largest = rows.max[r];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& s = scores[i / 2][2 * r + i % 2];
    const int column = key + i / 2 * 8 + 2 * (threadIdx.x % 4) + i % 2;
    if (SOFTCAP) s = 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * 1.44269504f * problem.into_cap * s));
    if (ALIBI) s += rows.slope[r] * static_cast<float>(column - problem.position_of(row));
    if (column >= last || ((WINDOW || SPANS) && column < first)) s = MINUS_INFINITY;
    largest = fmaxf(largest, s);
  }
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  return fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
}

// Caps and masks the scores of the keys from `key` on, and converts them to weights relative to the running maximum.
DEVICE void softmax(float (&scores)[2][4], Rows& rows, Output& out, const Problem& problem, int first_row, int key) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float largest = limit(scores, r, rows, problem, first_row + threadIdx.x % 32 / 4 + 8 * r, key);
    const float base = largest == MINUS_INFINITY ? 0 : largest;
    const float rescale = exp2_fast((rows.max[r] - base) * problem.scale_log2);
    rows.max[r] = largest;
    rows.sum[r] *= rescale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& s = scores[i / 2][2 * r + i % 2];
      rows.sum[r] += s = exp2_fast((s - base) * problem.scale_log2);  // exactly 1 if s is the maximum
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) out[i][2 * r] *= rescale, out[i][2 * r + 1] *= rescale;
  }
}

// Keys and values of a plane, and the range [begin, end) of the split.
struct Keys {
  const char *key, *value;
  u64 key_row, value_row;  // bytes
  int begin, end;
};

// Starts copying the 16 keys and values from `key` on, unless `key` is beyond the split.
DEVICE void start_copies(const Problem& problem, const Keys& keys, int key, u32 buffer) {
  if (key < keys.end) {
    const char *from_key = keys.key + key * keys.key_row, *from_value = keys.value + key * keys.value_row;
    copy_rows(buffer, problem.keys - key, problem.columns, [&](int row) { return from_key + row * keys.key_row; });
    copy_rows(buffer + TILE_BYTES, problem.keys - key, problem.columns,
              [&](int row) { return from_value + row * keys.value_row; });
  }
  commit_copies();
}

// A warp's share of a split: every WARPS-th step of 16 keys.
DEVICE void attend(const Problem& problem, u32 query, u32 ring, const Keys& keys, int first_row, Output& out, Rows& rows,
                   const Parts& parts) {
  const int first = keys.begin + threadIdx.x / 32 * STEP;
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) start_copies(problem, keys, first + i * WARPS * STEP, ring + i * STAGE_BYTES);
  const Counter counter(parts);
  wait_copies<STAGES - 1>();  // for the queries, whose copy one warp issued earlier
  __syncthreads();
  counter.reset(parts);
  int stage = 0;
#pragma unroll 1
  for (int key = first; key < keys.end; key += WARPS * STEP) {
    wait_copies<STAGES - 2>();
    __syncwarp();  // the copies of all lanes are complete, and no lane reads the buffer that is filled next
    start_copies(problem, keys, key + (STAGES - 1) * WARPS * STEP, ring + (stage + STAGES - 1) % STAGES * STAGE_BYTES);
    const u32 buffer = ring + stage * STAGE_BYTES;
    float scores[2][4] = {};
    score(scores, query, buffer);
    softmax(scores, rows, out, problem, first_row, key);
    const u32 weights[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                            pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
    add_values(out, weights, buffer + TILE_BYTES);
    stage = (stage + 1) % STAGES;
  }
  wait_copies<0>();
}

// Writes a warp's result of `count` rows to the block's shared memory.
DEVICE void leave_warp(float* block, const Output& out, Rows& rows, int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
    if (row >= count) continue;
    if (lane % 4 == 0) leave_row(block, row, rows.max[r], rows.sum[r]);
    float* place = block + threadIdx.x / 32 * WARP_RESULT + result_place(row);
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
      *reinterpret_cast<float2*>(place + i * 8 + lane % 4 * 2) =
          make_float2(out[i][2 * r], out[i][2 * r + 1]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE)
    KERNEL_NAME(const char* query, const char* key, const char* value,
#if ALIBI
                const float* slopes,
#endif
                char* output, float* logsumexp, float2* stats,
                float* parts, int kv_heads, int group, int queries, int keys, int columns, int scale_log2_bits,
                int into_cap_bits,
#if ALIBI
                int slope_factor_bits,
#endif
                int window, int first_key, int split_keys, int splits, long long query_batch,
                long long query_head, long long query_row, long long key_batch, long long key_head, long long key_row,
                long long value_batch, long long value_head, long long value_row, u64 serial
#if SPANS
                , int first_0, int last_0, int first_1, int last_1, int first_2, int last_2
#endif
                ) {
  extern __shared__ __align__(1024) char shared[];
#if ALIBI
  const Slopes alibi{slopes, __int_as_float(slope_factor_bits)};
#else
  const Slopes alibi;
#endif
  Problem problem{group, queries, keys, columns, __int_as_float(scale_log2_bits), __int_as_float(into_cap_bits), window, alibi
#if SPANS
                  , {first_0, first_1, first_2}, {last_0, last_1, last_2}
#endif
  };
  const Block place(problem, kv_heads, splits);
  const int warp = threadIdx.x / 32, batch = place.batch, head = place.head, first_row = place.first_row;
  if constexpr (ALIBI) problem.slopes.heads += head * group;

  const u32 queries_at = shared_address(shared), ring = queries_at + QUERY_BYTES + warp * STAGES * STAGE_BYTES;
  if (warp == 0) {
    const char* base = query + (batch * query_batch + head * group * query_head) * 2;
    copy_rows(queries_at, problem.rows() - first_row, columns, [&](int row) {
      return base + (problem.head_of(first_row + row) * query_head + problem.query_of(first_row + row) * query_row) * 2;
    });
  }
  commit_copies();

  Output out = {};
  Rows rows;
  if constexpr (ALIBI) {
    for (int r = 0; r < 2; ++r) rows.slope[r] = problem.slope_of(first_row + threadIdx.x % 32 / 4 + 8 * r);
  }
  const int begin = first_key + place.split * split_keys;
  const Parts own(parts, place.tile, place.split, splits, serial);
  attend(problem, queries_at, ring,
         {key + (batch * key_batch + head * key_head) * 2, value + (batch * value_batch + head * value_head) * 2,
          static_cast<u64>(key_row) * 2, static_cast<u64>(value_row) * 2, begin, min(keys, begin + split_keys)},
         first_row, out, rows, own);
  const u64 row = static_cast<u64>(place.plane) * problem.rows() + first_row;
  const Results results{output + row * columns * 2, RowResults{logsumexp, stats}.from(row), problem.scale_log2, columns,
                        min(ROWS, problem.rows() - first_row)};
  float* block = reinterpret_cast<float*>(shared);
  __syncthreads();  // no warp reads its ring any more
  leave_warp(block, out, rows, results.rows);
  join_block(block, results, own);
}
