// Attention of few queries to many keys (flash decoding: Dao et al., 2023): the keys are split among blocks and warps.
//
//                    keys of a split, 16 at a time, dealt out to the warps
//                  +----+----+----+----+----+----+----+----+----+--
//   16 rows: the   | w0 | w1 | w2 | .. | w7 | w0 | w1 | .. each warp keeps its own maximum, sum and output
//   queries of all +----+----+----+----+----+----+----+----+----+--
//   heads that share a key head
//
// A warp has a ring of STAGES buffers of 16 keys and values of its own, so that warps never wait for each other; what
// bounds the kernel is how many bytes are on their way. At the end the warps' results are joined in shared memory.
// With one split that is the answer; with several, decode_join.cu joins them.

constexpr int ROWS = 16, STEP = 16;  // queries of a block, keys of a warp's step
constexpr int QUERY_BYTES = ROWS * HEAD_DIM * 2;
constexpr int TILE_BYTES = STEP * HEAD_DIM * 2;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int THREADS = WARPS * 32;
constexpr int LANE_COPIES = STEP * ROW_UNITS / 32;

struct Problem {
  int group, queries, keys, columns;
  float scale_log2, into_cap;
  int window;

  DEVICE int rows() const { return group * queries; }
  DEVICE int last_seen_by(int row) const { return CAUSAL ? min(keys, row % queries + 1 + keys - queries) : keys; }
  DEVICE int first_seen_by(int row) const { return WINDOW ? max(0, row % queries + 1 + keys - queries - window) : 0; }
};

using Output = float[HEAD_DIM / 8][4];

// What a lane remembers of its two rows; `sum` covers only the lane's own columns until the end.
struct Rows {
  float max[2] = {MINUS_INFINITY, MINUS_INFINITY};
  float sum[2] = {0, 0};
};

// Starts copying 16 rows from `source` on to a tile; what lies beyond `rows_left` or `columns` becomes zero.
DEVICE void copy_rows(u32 tile, const char* source, int rows_left, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < LANE_COPIES; ++i) {
    const int row = (i * 32 + lane) / ROW_UNITS, unit = (i * 32 + lane) % ROW_UNITS;
    const bool valid = row < rows_left && unit * 8 < columns;
    const u64 offset = valid ? (static_cast<u64>(row) * columns + unit * 8) * 2 : 0;
    copy_16_bytes(unit_address(tile, row, unit), source + offset, valid);
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

// Caps and masks the scores of the keys from `key` on, and turns them into weights against the maximum so far.
DEVICE void softmax(float (&scores)[2][4], Rows& rows, Output& out, const Problem& problem, int first_row, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first_row + lane / 4 + 8 * r, first = problem.first_seen_by(row), last = problem.last_seen_by(row);
    float largest = rows.max[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& s = scores[i / 2][2 * r + i % 2];
      const int column = key + i / 2 * 8 + 2 * (lane % 4) + i % 2;
      if (SOFTCAP) s = 1 - 2 * reciprocal_fast(1 + exp2_fast(2 * 1.44269504f * problem.into_cap * s));
      if (column >= last || (WINDOW && column < first)) s = MINUS_INFINITY;
      largest = fmaxf(largest, s);
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const float shift = largest == MINUS_INFINITY ? 0 : largest * problem.scale_log2;
    const float rescale = exp2_fast(rows.max[r] * problem.scale_log2 - shift);
    rows.max[r] = largest;
    rows.sum[r] *= rescale;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& s = scores[i / 2][2 * r + i % 2];
      rows.sum[r] += s = exp2_fast(s * problem.scale_log2 - shift);
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) out[i][2 * r] *= rescale, out[i][2 * r + 1] *= rescale;
  }
}

// One warp's share: every WARPS-th step of 16 keys of the split [begin, end).
DEVICE void attend(const Problem& problem, u32 query, u32 ring, const char* keys, const char* values, int first_row,
                   int begin, int end, Output& out, Rows& rows) {
  const int first = begin + threadIdx.x / 32 * STEP;
  auto start_copies = [&](int key, int stage) {
    if (key < end) {
      const u64 offset = static_cast<u64>(key) * problem.columns * 2;
      copy_rows(ring + stage * STAGE_BYTES, keys + offset, problem.keys - key, problem.columns);
      copy_rows(ring + stage * STAGE_BYTES + TILE_BYTES, values + offset, problem.keys - key, problem.columns);
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) start_copies(first + i * WARPS * STEP, i);
  wait_copies<STAGES - 1>();  // for the queries, which one warp asked for before
  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int key = first; key < end; key += WARPS * STEP) {
    wait_copies<STAGES - 2>();
    __syncwarp();  // all lanes' copies have landed, and all are done with the buffer that is filled next
    start_copies(key + (STAGES - 1) * WARPS * STEP, (stage + STAGES - 1) % STAGES);
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

// Leaves a warp's result in shared memory: output [ROWS][HEAD_DIM], then maxima (in log2 units) and sums.
DEVICE void leave(float* place, const Output& out, Rows& rows, float scale_log2) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
    if (lane % 4 == 0) {
      place[ROWS * HEAD_DIM + row] = rows.max[r] * scale_log2;
      place[ROWS * HEAD_DIM + ROWS + row] = rows.sum[r];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
      *reinterpret_cast<float2*>(place + row * HEAD_DIM + i * 8 + lane % 4 * 2) =
          make_float2(out[i][2 * r], out[i][2 * r + 1]);
    }
  }
}

constexpr int RESULT = ROWS * (HEAD_DIM + 2);  // floats that a warp leaves

// Joins the warps' results of one row and writes two columns of it: the output and its logsumexp, or with SPLIT the
// float32 output of this split and its logsumexp in log2 units. `place` counts the rows of all planes and splits.
DEVICE void join_warps(const float* results, int row, int column, int columns, u64 place, char* output, float* logsumexp) {
  float largest = MINUS_INFINITY, total = 0, x = 0, y = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, results[w * RESULT + ROWS * HEAD_DIM + row]);
  const float shift = largest == MINUS_INFINITY ? 0 : largest;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float* result = results + w * RESULT;
    const float factor = exp2_fast(result[ROWS * HEAD_DIM + row] - shift);
    total += factor * result[ROWS * HEAD_DIM + ROWS + row];
    const float2 pair = *reinterpret_cast<const float2*>(result + row * HEAD_DIM + column);
    x += factor * pair.x, y += factor * pair.y;
  }
  const float inverse = total > 0 ? 1 / total : 0, sum = total > 0 ? largest + log2f(total) : MINUS_INFINITY;
  if (SPLIT) reinterpret_cast<float2*>(output)[(place * columns + column) / 2] = make_float2(x * inverse, y * inverse);
  else reinterpret_cast<u32*>(output)[(place * columns + column) / 2] = pack(x * inverse, y * inverse);
  if (column == 0) logsumexp[place] = SPLIT ? sum : sum * 0.693147180559945f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const char* query, const char* key, const char* value, char* output, float* logsumexp, int group,
                int queries, int keys, int columns, int scale_log2_bits, int into_cap_bits, int window, int first_key,
                int split_keys, int splits) {
  extern __shared__ __align__(1024) char shared[];
  const Problem problem{group, queries, keys, columns, __int_as_float(scale_log2_bits), __int_as_float(into_cap_bits),
                        window};
  const int row_tiles = (problem.rows() + ROWS - 1) / ROWS, warp = threadIdx.x / 32;
  const int split = blockIdx.x % splits, first_row = blockIdx.x / splits % row_tiles * ROWS;
  const u64 plane = blockIdx.x / splits / row_tiles, plane_rows = plane * problem.rows();
  const int begin = first_key + split * split_keys, end = min(keys, begin + split_keys);

  const u32 queries_at = shared_address(shared), ring = queries_at + QUERY_BYTES + warp * STAGES * STAGE_BYTES;
  if (warp == 0) copy_rows(queries_at, query + (plane_rows + first_row) * columns * 2, problem.rows() - first_row, columns);
  commit_copies();

  Output out = {};
  Rows rows;
  const u64 plane_bytes = plane * keys * columns * 2;
  attend(problem, queries_at, ring, key + plane_bytes, value + plane_bytes, first_row, begin, end, out, rows);
  __syncthreads();
  float* results = reinterpret_cast<float*>(shared);
  leave(results + warp * RESULT, out, rows, problem.scale_log2);
  __syncthreads();
  const u64 all_rows = static_cast<u64>(gridDim.x / splits / row_tiles) * problem.rows();
  for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 2; i += THREADS) {
    const int row = i / (HEAD_DIM / 2), column = i % (HEAD_DIM / 2) * 2;
    if (first_row + row >= problem.rows() || column >= columns) continue;
    join_warps(results, row, column, columns, split * all_rows + plane_rows + first_row + row, output, logsumexp);
  }
}
