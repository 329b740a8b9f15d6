// Reduction of the split-K kernel: the partial results of a block's warps are combined in shared memory. If the keys are
// split over blocks, each block writes its part to device memory, and the last to finish combines them in a fixed order.
//
//   sum    = sum over parts of 2^(c (maximum of the part - maximum of all)) * sum of the part
//   output = sum over parts of 2^(c (maximum of the part - maximum of all)) * sum of the part / sum * output of the part
//
// Maxima and sums are stored separately, and maxima before multiplication by c: with a large maximum a logsumexp would lose
// the sum, and neighbouring scores may have the same product.
//
// The last block is the one that counts to the number of splits in the tile's word. What is in that memory at the start is
// unknown; so each block first replaces it, unless it has the serial number of the launch, which is unique, by that number and
// a count of 0. Both latencies are hidden behind the first loads.

// Floats of a row of a warp's output in shared memory, so that the rows which are written at once are in different banks, and
// of its partial result: output, then maxima and sums.
constexpr int RESULT_ROW = HEAD_DIM + RESULT_GAP, WARP_RESULT = ROWS * (RESULT_ROW + 2);
constexpr int LANE_VECTORS = (HEAD_DIM + 127) / 128;
constexpr int EARLY_PARTS = 12 / LANE_VECTORS;  // of a row, loaded before their weights are known
constexpr int COUNT_BITS = 8;                   // of the tile's word

// Output of a tile's rows, and the factor of their scores.
struct Results {
  char* output;
  RowResults row_results;
  float scale_log2;
  int columns, rows;
};

// Partial results of the splits: output, maximum and sum of each row; the tile's word counts those that are complete.
struct Parts {
  float* numbers;
  u64* word;
  u64 serial;
  int first, index, count;  // first part of the tile, this part, number of parts

  // The words of all tiles follow the parts of all blocks.
  DEVICE Parts(float* numbers, int tile, int index, int count, u64 serial)
      : numbers(numbers), word(reinterpret_cast<u64*>(numbers + static_cast<u64>(gridDim.x) * ROWS * (HEAD_DIM + 2)) + tile),
        serial(serial), first(tile * count), index(index), count(count) {}
  DEVICE float* part(int i) const { return numbers + static_cast<u64>(first + i) * ROWS * (HEAD_DIM + 2); }
  DEVICE float2* maxima_and_sums(int i) const { return reinterpret_cast<float2*>(part(i) + ROWS * HEAD_DIM); }
};

// Combines the warps' results of two columns of a row, and writes them to the output or to this split's part.
DEVICE void join_pair(const float* warps, int row, int column, const Results& results, const Parts& parts) {
  float largest = MINUS_INFINITY, total = 0, x = 0, y = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, warps[w * WARP_RESULT + ROWS * RESULT_ROW + row]);
  const float base = largest == MINUS_INFINITY ? 0 : largest;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float* result = warps + w * WARP_RESULT;
    const float factor = exp2_fast((result[ROWS * RESULT_ROW + row] - base) * results.scale_log2);
    total += factor * result[ROWS * RESULT_ROW + ROWS + row];
    const float2 pair = *reinterpret_cast<const float2*>(result + row * RESULT_ROW + column);
    x += factor * pair.x, y += factor * pair.y;
  }
  const float inverse = total > 0 ? 1 / total : 0;
  if (parts.count > 1) {
    float* part = parts.part(parts.index) + row * HEAD_DIM + column;
    *reinterpret_cast<float2*>(part) = make_float2(x * inverse, y * inverse);
    if (column == 0) parts.maxima_and_sums(parts.index)[row] = make_float2(largest, total);
  } else {
    reinterpret_cast<u32*>(results.output)[(row * results.columns + column) / 2] = pack(x * inverse, y * inverse);
    if (column == 0) results.row_results.write(row, largest, total, results.scale_log2);
  }
}

DEVICE u64 load_relaxed(const u64* place) {
  u64 x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(place) : "memory");
  return x;
}
DEVICE void replace_word(u64* place, u64 old, u64 word) {
  [[maybe_unused]] u64 found;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;" : "=l"(found) : "l"(place), "l"(old), "l"(word) : "memory");
}
// Adds one; what the block wrote before is visible to the block that reads the sum, and the other way round.
DEVICE u64 count_up(u64* place) {
  u64 old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;" : "=l"(old) : "l"(place) : "memory");
  return old;
}

// The tile's word, as a thread that later counts finds it.
struct Counter {
  u64 found = 0;

  DEVICE explicit Counter(const Parts& parts) {
    if (threadIdx.x == 0 && parts.count > 1) found = load_relaxed(parts.word);
  }
  // Sets the count to 0, unless another block of the launch has done it.
  DEVICE void reset(const Parts& parts) const {
    const bool is_set = found >> COUNT_BITS == parts.serial << COUNT_BITS >> COUNT_BITS;
    if (threadIdx.x == 0 && parts.count > 1 && !is_set) replace_word(parts.word, found, parts.serial << COUNT_BITS);
  }
};

// Counts this block's part as complete; returns whether all parts of the tile are.
DEVICE bool is_last(const Parts& parts) {
  __syncthreads();  // the part is completely written
  bool last = false;
  if (threadIdx.x == 0) last = (count_up(parts.word) & (1 << COUNT_BITS) - 1) == parts.count - 1;
  return !__syncthreads_and(!last);
}

// Computes maximum and sum of a row, and the weight of each part in the first of its pair of `factors`; called by a warp.
DEVICE float2 weigh_parts(float2* factors, int row, const Parts& parts, float scale_log2) {
  const int lane = threadIdx.x % 32;
  float largest = MINUS_INFINITY, total = 0;
  for (int i = lane; i < parts.count; i += 32) {
    factors[i] = load_fresh(parts.maxima_and_sums(i) + row);
    largest = fmaxf(largest, factors[i].x);
  }
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float base = largest == MINUS_INFINITY ? 0 : largest;
  for (int i = lane; i < parts.count; i += 32) {
    total += factors[i].x = exp2_fast((factors[i].x - base) * scale_log2) * factors[i].y;
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const float inverse = total > 0 ? 1 / total : 0;
  for (int i = lane; i < parts.count; i += 32) factors[i].x *= inverse;
  __syncwarp();
  return make_float2(largest, total);
}

// Loads the lane's columns of a row of a part.
DEVICE void load_part(float4 (&x)[LANE_VECTORS], int row, int i, const Parts& parts) {
#pragma unroll
  for (int j = 0; j < LANE_VECTORS; ++j) {
    const int column = 4 * (threadIdx.x % 32) + 128 * j;
    if (HEAD_DIM % 128 != 0 && column >= HEAD_DIM) continue;
    x[j] = load_fresh(reinterpret_cast<const float4*>(parts.part(i) + row * HEAD_DIM + column));
  }
}
DEVICE void add_part(float4 (&sums)[LANE_VECTORS], const float4 (&x)[LANE_VECTORS], float factor) {
#pragma unroll
  for (int j = 0; j < LANE_VECTORS; ++j) {
    sums[j].x += factor * x[j].x, sums[j].y += factor * x[j].y, sums[j].z += factor * x[j].z, sums[j].w += factor * x[j].w;
  }
}

// Combines the parts of a row; called by a warp. `factors` is shared memory for two floats per part.
DEVICE void join_row(int row, float2* factors, const Results& results, const Parts& parts) {
  const int lane = threadIdx.x % 32;
  float4 early[EARLY_PARTS][LANE_VECTORS] = {};
#pragma unroll
  for (int i = 0; i < EARLY_PARTS; ++i) {
    if (i < parts.count) load_part(early[i], row, i, parts);
  }
  const float2 found = weigh_parts(factors, row, parts, results.scale_log2);
  float4 sums[LANE_VECTORS] = {};
#pragma unroll
  for (int i = 0; i < EARLY_PARTS; ++i) {
    if (i < parts.count) add_part(sums, early[i], factors[i].x);
  }
#pragma unroll 8
  for (int i = EARLY_PARTS; i < parts.count; ++i) {
    float4 x[LANE_VECTORS] = {};
    load_part(x, row, i, parts);
    add_part(sums, x, factors[i].x);
  }
#pragma unroll
  for (int j = 0; j < LANE_VECTORS; ++j) {
    const int column = 4 * lane + 128 * j;
    if (column < results.columns) {
      *reinterpret_cast<uint2*>(results.output + (row * results.columns + column) * 2) =
          make_uint2(pack(sums[j].x, sums[j].y), pack(sums[j].z, sums[j].w));
    }
  }
  if (lane == 0) results.row_results.write(row, found.x, found.y, results.scale_log2);
}

// Combines the warps' results in shared memory and, in the last block of a tile, the parts of the tile.
DEVICE void join_block(float* shared, const Results& results, const Parts& parts) {
  __syncthreads();
  for (int i = threadIdx.x; i < results.rows * HEAD_DIM / 2; i += THREADS) {
    const int row = i / (HEAD_DIM / 2), column = i % (HEAD_DIM / 2) * 2;
    if (column < results.columns) join_pair(shared, row, column, results, parts);
  }
  if (parts.count == 1 || !is_last(parts)) return;
  const int warp = threadIdx.x / 32;
  for (int row = warp; row < results.rows; row += WARPS) {
    join_row(row, reinterpret_cast<float2*>(shared) + warp * parts.count, results, parts);
    __syncwarp();
  }
}
