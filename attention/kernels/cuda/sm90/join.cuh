// Reduction of the Hopper forward kernel for tiles whose keys are split over several blocks: each warp writes its part of 16
// rows to device memory, and the last to finish combines them in a fixed order, so that the result is bitwise reproducible.
//
// The last warp is found without a counter, which would need resetting: each warp writes the launch's serial number, which is
// unique, and then checks whether those of all parts are present. At least one warp finds them all; if two do, both write
// the same result.

// Work::part encodes the number of parts of all earlier tiles, the number of parts of this tile, and the index of this part;
// 0 if the tile is not split.
struct Part {
  int first, count, index;
  DEVICE explicit Part(int word) : first(word >> 8), count(word >> 4 & 15), index(word & 15) {}
};

// Partial results: for each warp of a part, the accumulators in register order, then maxima and sums; and completion marks.
struct Parts {
  float4* numbers;
  u64* marks;
  u64 serial;

  static constexpr int VECTORS = HEAD_DIM / 8 + 1;  // per lane
  DEVICE u64 place(int part) const { return static_cast<u64>(part) * CONSUMERS * 4 + threadIdx.x / 32 - 4; }
  DEVICE float4* of_lane(int part) const { return numbers + place(part) * VECTORS * 32 + threadIdx.x % 32; }
};

// Writes a warp's part; returns whether all parts of its rows are present.
DEVICE bool leave_part(const Output& output, Rows& rows, const Parts& parts, const Part& part) {
  float4* place = parts.of_lane(part.first + part.index);
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 8; ++i) {
    place[i * 32] = make_float4(output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]);
  }
  place[HEAD_DIM / 8 * 32] = make_float4(rows.max[0], rows.max[1], rows.sum[0], rows.sum[1]);
  __threadfence();
  __syncwarp();
  const int lane = threadIdx.x % 32;
  volatile u64* marks = parts.marks;
  if (lane == part.index) marks[parts.place(part.first + part.index)] = parts.serial;
  __threadfence();
  __syncwarp();  // the mark is written before any lane checks the others
  const bool there = lane >= part.count || marks[parts.place(part.first + lane)] == parts.serial;
  const bool all = __all_sync(~0u, there);
  __threadfence();
  return all;
}

// Combines the parts of a warp's rows.
DEVICE void join_parts(Output& output, Rows& rows, const Parts& parts, const Part& part, float scale_log2) {
  rows = Rows();
  for (int i = 0; i < part.count; ++i) {
    const float4 seen = load_fresh(parts.of_lane(part.first + i) + HEAD_DIM / 8 * 32);
    rows.max[0] = fmaxf(rows.max[0], seen.x), rows.max[1] = fmaxf(rows.max[1], seen.y);
  }
  const float base[2] = {rows.max[0] == MINUS_INFINITY ? 0 : rows.max[0], rows.max[1] == MINUS_INFINITY ? 0 : rows.max[1]};
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = 0;
#pragma unroll 1
  for (int i = 0; i < part.count; ++i) {
    const float4* place = parts.of_lane(part.first + i);
    const float4 seen = load_fresh(place + HEAD_DIM / 8 * 32);
    const float factor[2] = {exp2_fast((seen.x - base[0]) * scale_log2), exp2_fast((seen.y - base[1]) * scale_log2)};
    rows.sum[0] += seen.z * factor[0], rows.sum[1] += seen.w * factor[1];
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; ++j) {
      const float4 x = load_fresh(place + j * 32);
      output[4 * j] += x.x * factor[0], output[4 * j + 1] += x.y * factor[0];
      output[4 * j + 2] += x.z * factor[1], output[4 * j + 3] += x.w * factor[1];
    }
  }
}
