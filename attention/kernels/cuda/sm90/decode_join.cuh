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

// Shared memory: the warps' outputs, then maxima and sums [row][warp]. There are gaps between rows, and with PAIRED_ROWS the even
// ones of 8 come first, so that the rows which a warp writes at once are in different banks.
constexpr int RESULT_ROW = HEAD_DIM + RESULT_GAP, WARP_RESULT = ROWS * RESULT_ROW;
constexpr int JOIN_WIDTH = HEAD_DIM % 128 == 0 && (WARPS < 8 || HEAD_DIM > 128) ? 4 : 2;  // columns of a lane
constexpr int EARLY_PARTS = 16;  // loaded before their weights are known
constexpr int COUNT_BITS = 8;    // of the tile's word

DEVICE int result_place(int row) {
  return RESULT_ROW * (PAIRED_ROWS ? (row & ~7) + (row & 1) * 4 + (row >> 1 & 3) : row);
}
// Leaves the maximum and the sum of a row of a warp.
DEVICE void leave_row(float* block, int row, float max, float sum) {
  float* rows = block + WARPS * WARP_RESULT + threadIdx.x / 32;
  rows[row * WARPS] = max, rows[(ROWS + row) * WARPS] = sum;
}

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
DEVICE void join_pair(const float* block, int row, int column, const Results& results, const Parts& parts) {
  const float* rows = block + WARPS * WARP_RESULT;
  float maxima[WARPS], largest = MINUS_INFINITY, total = 0, x = 0, y = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, maxima[w] = rows[row * WARPS + w]);
  const float base = largest == MINUS_INFINITY ? 0 : largest;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float factor = exp2_fast((maxima[w] - base) * results.scale_log2);
    total += factor * rows[(ROWS + row) * WARPS + w];
    const float2 pair = *reinterpret_cast<const float2*>(block + w * WARP_RESULT + result_place(row) + column);
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

// The lane's columns of a row of a part.
struct Columns {
  float x[JOIN_WIDTH];

  DEVICE void load(const Parts& parts, int i, int place) {
    const float* from = parts.part(i) + place;
    if constexpr (JOIN_WIDTH == 4) {
      const float4 found = load_fresh(reinterpret_cast<const float4*>(from));
      x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
    } else {
      const float2 found = load_fresh(reinterpret_cast<const float2*>(from));
      x[0] = found.x, x[1] = found.y;
    }
  }
  DEVICE void add(const Columns& part, float factor) {
#pragma unroll
    for (int j = 0; j < JOIN_WIDTH; ++j) x[j] += factor * part.x[j];
  }
};

// Combines the parts of a row's columns from `first` on; called by a warp. `factors` is shared memory for two floats per part.
DEVICE void join_columns(int row, int first, float2* factors, const Results& results, const Parts& parts) {
  const int column = first + JOIN_WIDTH * (threadIdx.x % 32), place = row * HEAD_DIM + column;
  Columns early[EARLY_PARTS] = {}, sum = {};
#pragma unroll
  for (int i = 0; i < EARLY_PARTS; ++i) {
    if (i < parts.count) early[i].load(parts, i, place);
  }
  const float2 found = weigh_parts(factors, row, parts, results.scale_log2);
#pragma unroll
  for (int i = 0; i < EARLY_PARTS; ++i) {
    if (i < parts.count) sum.add(early[i], factors[i].x);
  }
#pragma unroll 8
  for (int i = EARLY_PARTS; i < parts.count; ++i) {
    Columns part;
    part.load(parts, i, place);
    sum.add(part, factors[i].x);
  }
  if (column < results.columns) {
    u32* output = reinterpret_cast<u32*>(results.output) + (row * results.columns + column) / 2;
    if constexpr (JOIN_WIDTH == 4) *reinterpret_cast<uint2*>(output) = make_uint2(pack(sum.x[0], sum.x[1]), pack(sum.x[2], sum.x[3]));
    else *output = pack(sum.x[0], sum.x[1]);
  }
  if (column == 0) results.row_results.write(row, found.x, found.y, results.scale_log2);
}

// Combines the warps' results in shared memory and, in the last block of a tile, the parts of the tile.
DEVICE void join_block(float* block, const Results& results, const Parts& parts) {
  __syncthreads();
  for (int i = threadIdx.x; i < results.rows * HEAD_DIM / 2; i += THREADS) {
    const int row = i / (HEAD_DIM / 2), column = i % (HEAD_DIM / 2) * 2;
    if (column < results.columns) join_pair(block, row, column, results, parts);
  }
  if (parts.count == 1 || !is_last(parts)) return;
  constexpr int WARP_COLUMNS = 32 * JOIN_WIDTH, PIECES_OF_ROW = HEAD_DIM / WARP_COLUMNS;
  static_assert(HEAD_DIM % WARP_COLUMNS == 0);
  const int warp = threadIdx.x / 32;
  for (int i = warp; i < results.rows * PIECES_OF_ROW; i += WARPS) {
    join_columns(i / PIECES_OF_ROW, i % PIECES_OF_ROW * WARP_COLUMNS, reinterpret_cast<float2*>(block) + warp * parts.count,
                 results, parts);
    __syncwarp();
  }
}
