// Quantization of Q, K and V to fp8 (e4m3) for fp8_forward.cu: one block for 128 rows of a head.
//
//   Q   [row][column]   times softmax scale and log2(e)            one power of two for 64 rows
//   K   [key][column]   minus the mean over sampled keys           one power of two for 128 keys
//   V   [column][key]   transposed, keys permuted (see below)      one power of two for 128 keys
//
// Softmax is invariant to a vector subtracted from all keys of a head, so the mean may be that of a sample; every block of a
// head computes the same one. A scale is the smallest power of two that keeps all values within 448, the largest e4m3: the
// relative precision of e4m3 is that of any other scale, and products with powers of two are exact.
//
// The accumulator of S is the left operand of P V if the keys of V are permuted: lane t of a quad holds columns 8 j + 2 t and
// 8 j + 2 t + 1 of S, and as left operand 4 t to 4 t + 3 of every 16. Position 4 t + b of 16 therefore holds key
// 2 t + 8 (b / 2) + b % 2.

constexpr int ROWS = 128;       // rows per block
constexpr int QUERY_ROWS = 64;  // rows of Q per scale: those of a consumer warpgroup
constexpr int THREADS = 4 * HEAD_DIM;
constexpr int GROUPS = HEAD_DIM / 8;     // 16-byte groups of columns
constexpr int LANES = THREADS / GROUPS;  // rows at a time
constexpr int SAMPLE = 32;               // keys that the mean is taken from
static_assert(LANES == SAMPLE);
constexpr float LARGEST = 448;
constexpr int MIN_EXPONENT = -30, MAX_EXPONENT = 60;

// The rows of a head; `stride` in elements.
struct Rows {
  const char* base;
  i64 stride;
  int count, columns;

  // The 8 columns of `group` in a row; zeros outside the array.
  DEVICE uint4 load(int row, int group) const {
    if (row >= count || 8 * group >= columns) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(base + (row * stride + 8 * group) * 2);
  }
};

DEVICE void unpack(float (&x)[8], const uint4& words) {
  const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = low_of(pairs[i]), x[2 * i + 1] = high_of(pairs[i]);
}

// Exponent of the smallest power of two, within limits, that `largest` divided by it is at most LARGEST.
DEVICE int exponent_for(float largest) {
  const u32 bits = __float_as_uint(fminf(largest * (1 / LARGEST), 1e38f));
  const int exponent = static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0);
  return max(MIN_EXPONENT, min(MAX_EXPONENT, exponent));
}

// Maximum over the threads of a block; `room` holds a float per warp.
DEVICE float block_max(float x, float* room) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) x = fmaxf(x, room[i]);
  return x;
}

struct Shared {
  float maxima[THREADS / 32];
  float sample[SAMPLE][HEAD_DIM];
  float mean[HEAD_DIM];
};

// Computes the mean of the sampled keys in `shared.mean`. They are spread over equal parts of the sequence, at another place in
// each, since rotary embeddings are periodic.
DEVICE void sample_mean(const Rows& keys, Shared& shared) {
  const int group = threadIdx.x % GROUPS, lane = threadIdx.x / GROUPS;
  const int sampled = min(keys.count, SAMPLE);
  float x[8] = {};
  if (lane < sampled) {
    const i64 place = SAMPLE * lane + lane * 19 % SAMPLE;  // of SAMPLE * SAMPLE
    unpack(x, keys.load(sampled < SAMPLE ? lane : place * keys.count / (SAMPLE * SAMPLE), group));
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) shared.sample[lane][8 * group + j] = x[j];
  __syncthreads();
  if (threadIdx.x < HEAD_DIM) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < SAMPLE; ++i) total += shared.sample[i][threadIdx.x];
    shared.mean[threadIdx.x] = total / sampled;
  }
  __syncthreads();
}

// The 8 elements of a row as they are quantized, before scaling: of Q times a factor, of K minus the mean.
template <bool QUERY>
DEVICE void prepare(float (&x)[8], const uint4& words, float factor, const float* mean) {
  unpack(x, words);
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = QUERY ? x[j] * factor : x[j] - mean[j];
}

// Quantizes ROWS rows of Q or K; `exponents` are the first and, of Q, the second of their scales.
template <bool QUERY>
DEVICE void quantize_rows(u32* to, int* exponents, const Rows& rows, int first, float factor, Shared& shared) {
  constexpr int STEPS = ROWS / LANES, PARTS = QUERY ? ROWS / QUERY_ROWS : 1, PART_STEPS = STEPS / PARTS;
  const int group = threadIdx.x % GROUPS, lane = threadIdx.x / GROUPS;
  const float* mean = shared.mean + 8 * group;
  uint4 words[STEPS];
#pragma unroll
  for (int i = 0; i < STEPS; ++i) words[i] = rows.load(first + lane + i * LANES, group);
  if constexpr (!QUERY) sample_mean(rows, shared);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    float largest = 0;
#pragma unroll
    for (int i = part * PART_STEPS; i < (part + 1) * PART_STEPS; ++i) {
      float x[8];
      prepare<QUERY>(x, words[i], factor, mean);
      const bool inside = first + lane + i * LANES < rows.count;
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, inside ? fabsf(x[j]) : 0);
    }
    const int exponent = exponent_for(block_max(largest, shared.maxima));
    if (threadIdx.x == 0 && first + part * QUERY_ROWS < rows.count) exponents[part] = exponent;
    const float by = power_of_two(-exponent);
#pragma unroll
    for (int i = part * PART_STEPS; i < (part + 1) * PART_STEPS; ++i) {
      float x[8];
      prepare<QUERY>(x, words[i], factor, mean);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] *= by;
      const int row = first + lane + i * LANES;
      if (row < rows.count) {
        *reinterpret_cast<uint2*>(to + (static_cast<i64>(row) * HEAD_DIM + 8 * group) / 4) =
            make_uint2(pack_fp8(x[0], x[1], x[2], x[3]), pack_fp8(x[4], x[5], x[6], x[7]));
      }
    }
  }
}

// Quantizes 128 keys of V, transposed: `to` is the first of them in column 0, of rows of `stride` bytes.
DEVICE void quantize_transposed(char* to, i64 stride, int* exponent_to, const Rows& rows, int first, Shared& shared,
                                u32* tile) {
  // a thread has 4 keys and 8 columns
  const int group = threadIdx.x % GROUPS, four = threadIdx.x / GROUPS;
  uint4 words[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) words[b] = rows.load(first + four / 4 * 16 + four % 4 * 2 + b / 2 * 8 + b % 2, group);
  float largest = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    float x[8];
    unpack(x, words[b]);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(x[j]));
  }
  const int exponent = exponent_for(block_max(largest, shared.maxima));
  if (threadIdx.x == 0) *exponent_to = exponent;
  const float by = power_of_two(-exponent);
  // tile [column][32 words of 4 keys], the word at `four` ^ 2 (column / 8), so that neither stores nor loads conflict
  float x[4][8];
#pragma unroll
  for (int b = 0; b < 4; ++b) unpack(x[b], words[b]);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    tile[(8 * group + j) * 32 + (four ^ 2 * group % 32)] = pack_fp8(x[0][j] * by, x[1][j] * by, x[2][j] * by, x[3][j] * by);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < HEAD_DIM * 16; i += THREADS) {
    const int column = i / 16, pair = i % 16;
    *reinterpret_cast<uint2*>(to + column * stride + 8 * pair) =
        *reinterpret_cast<const uint2*>(tile + column * 32 + (2 * pair ^ 2 * (column / 8) % 32));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    KERNEL_NAME(const char* query, const char* key, const char* value, u32* query8, u32* key8, char* value8,
                int* query_exponents, int2* key_exponents, int planes, int key_planes, int heads, int heads_per_key,
                int queries, int keys, int columns, int factor_bits, i64 query_batch, i64 query_head, i64 query_row,
                i64 key_batch, i64 key_head, i64 key_row, i64 value_batch, i64 value_head, i64 value_row) {
  extern __shared__ __align__(16) char room[];
  Shared& shared = *reinterpret_cast<Shared*>(room);
  const int query_blocks = (queries + ROWS - 1) / ROWS, key_blocks = (keys + ROWS - 1) / ROWS;
  int index = blockIdx.x;
  if (index < planes * query_blocks) {
    const int plane = index / query_blocks, first = index % query_blocks * ROWS;
    const Rows of_plane{query + (plane / heads * query_batch + plane % heads * query_head) * 2, query_row, queries, columns};
    const int scales = (queries + QUERY_ROWS - 1) / QUERY_ROWS;
    quantize_rows<true>(query8 + static_cast<i64>(plane) * queries * (HEAD_DIM / 4),
                        query_exponents + static_cast<i64>(plane) * scales + first / QUERY_ROWS, of_plane, first,
                        __int_as_float(factor_bits), shared);
    return;
  }
  index -= planes * query_blocks;
  const bool is_value = index >= key_planes * key_blocks;
  if (is_value) index -= key_planes * key_blocks;
  const int plane = index / key_blocks, block = index % key_blocks, first = block * ROWS;
  const int key_heads = heads / heads_per_key, batch = plane / key_heads, head = plane % key_heads;
  int* exponents = reinterpret_cast<int*>(key_exponents + static_cast<i64>(plane) * key_blocks + block);
  if (is_value) {
    const Rows of_plane{value + (batch * value_batch + head * value_head) * 2, value_row, keys, columns};
    const i64 stride = static_cast<i64>(key_blocks) * ROWS;
    quantize_transposed(value8 + plane * stride * HEAD_DIM + first, stride, exponents + 1, of_plane, first, shared,
                        reinterpret_cast<u32*>(room + 64));
  } else {
    const Rows of_plane{key + (batch * key_batch + head * key_head) * 2, key_row, keys, columns};
    quantize_rows<false>(key8 + static_cast<i64>(plane) * keys * (HEAD_DIM / 4), exponents, of_plane, first, 1, shared);
  }
}
