// Reduction of the split-K kernel: the partial results of a block's warps are combined in shared memory. If the keys are
// split over blocks, each block writes its part to device memory, and the last to finish combines them in a fixed order.
//
//   sum    = sum over parts of 2^(c (maximum of the part - maximum of all)) * sum of the part
//   output = sum over parts of 2^(c (maximum of the part - maximum of all)) * sum of the part / sum * output of the part
//
// Maxima and sums are stored separately, and maxima before multiplication by c: with a large maximum a logsumexp would lose
// the sum, and neighbouring scores may have the same product.
//
// The last block is found without a counter, which would need resetting: each block writes the launch's serial number, which
// is unique, and then checks whether those of all parts are present. At least one block finds them all; if two do, both
// write the same result.

constexpr int WARP_RESULT = ROWS * (HEAD_DIM + 2);  // floats of a warp's partial result: output, then maxima and sums
constexpr int LANE_VECTORS = (HEAD_DIM + 127) / 128;

// Output of a tile's rows, and the factor of their scores.
struct Results {
  char* output;
  RowResults row_results;
  float scale_log2;
  int columns, rows;
};

// Partial results of the splits: output, maximum and sum of each row.
struct Parts {
  float* numbers;
  u64* marks;
  u64 serial;
  int first, index, count;  // first part of the tile, this part, number of parts

  DEVICE float* part(int i) const { return numbers + static_cast<u64>(first + i) * ROWS * (HEAD_DIM + 2); }
  DEVICE float2* maxima_and_sums(int i) const { return reinterpret_cast<float2*>(part(i) + ROWS * HEAD_DIM); }
};

// Combines the warps' results of two columns of a row, and writes them to the output or to this split's part.
DEVICE void join_pair(const float* warps, int row, int column, const Results& results, const Parts& parts) {
  float largest = MINUS_INFINITY, total = 0, x = 0, y = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) largest = fmaxf(largest, warps[w * WARP_RESULT + ROWS * HEAD_DIM + row]);
  const float base = largest == MINUS_INFINITY ? 0 : largest;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    const float* result = warps + w * WARP_RESULT;
    const float factor = exp2_fast((result[ROWS * HEAD_DIM + row] - base) * results.scale_log2);
    total += factor * result[ROWS * HEAD_DIM + ROWS + row];
    const float2 pair = *reinterpret_cast<const float2*>(result + row * HEAD_DIM + column);
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

// Marks this block's part as complete; returns whether all parts of the tile are.
DEVICE bool is_last(const Parts& parts) {
  volatile u64* marks = parts.marks + parts.first;
  __syncthreads();  // the part is completely written
  if (threadIdx.x == 0) {
    __threadfence();
    marks[parts.index] = parts.serial;
    __threadfence();  // before this block reads other parts
  }
  __syncthreads();
  bool there = true;
  for (int i = threadIdx.x; i < parts.count; i += THREADS) there = there && marks[i] == parts.serial;
  const bool all = __syncthreads_and(there);
  __threadfence();
  return all;
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

// Combines the parts of a row; called by a warp. `factors` is shared memory for two floats per part.
DEVICE void join_row(int row, float2* factors, const Results& results, const Parts& parts) {
  const int lane = threadIdx.x % 32;
  const float2 found = weigh_parts(factors, row, parts, results.scale_log2);
  float4 sums[LANE_VECTORS] = {};
#pragma unroll 16
  for (int i = 0; i < parts.count; ++i) {
    const float factor = factors[i].x;
#pragma unroll
    for (int j = 0; j < LANE_VECTORS; ++j) {
      const int column = 4 * lane + 128 * j;
      if (HEAD_DIM % 128 != 0 && column >= HEAD_DIM) continue;
      const float4 x = load_fresh(reinterpret_cast<const float4*>(parts.part(i) + row * HEAD_DIM + column));
      sums[j].x += factor * x.x, sums[j].y += factor * x.y, sums[j].z += factor * x.z, sums[j].w += factor * x.w;
    }
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
