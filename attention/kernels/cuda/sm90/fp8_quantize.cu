// Quantization of K and V to fp8 (e4m3) for fp8_forward.cu, which quantizes Q itself: one block for 128 rows of a head.
//
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

// A block's rows are copied to shared memory, where each thread reads only what it copied: twice, once for the maximum. So few
// registers are needed, and the copies of four blocks of a multiprocessor are under way at once.

constexpr int ROWS = 128;  // rows per block
constexpr int THREADS = 2 * HEAD_DIM;
constexpr int GROUPS = HEAD_DIM / 8;     // 16-byte groups of columns
constexpr int LANES = THREADS / GROUPS;  // rows at a time
constexpr int UNITS = ROWS / LANES;      // 16-byte units of a thread
constexpr int SAMPLE = 32;               // keys that the mean is taken from
static_assert(SAMPLE == 2 * LANES && UNITS % 4 == 0);
constexpr int COPIED = ROWS * HEAD_DIM * 2, MAXIMA = 64;  // bytes of shared memory, before what is made of it

// The rows of a head; `stride` in elements.
struct Rows {
  const char* base;
  i64 stride;
  int count, columns;

  // The 8 columns of `group` in a row; zeros outside the array.
  DEVICE bool has(int row, int group) const { return row < count && 8 * group < columns; }
  DEVICE const char* place(int row, int group) const { return base + (row * stride + 8 * group) * 2; }
  DEVICE uint4 load(int row, int group) const {
    return has(row, group) ? *reinterpret_cast<const uint4*>(place(row, group)) : make_uint4(0, 0, 0, 0);
  }
  // Starts copying them to unit `i` of the thread.
  DEVICE void copy(u32 copied, int i, int row, int group) const {
    const bool valid = has(row, group);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unit_address(copied, i)),
                 "l"(valid ? place(row, group) : base), "r"(valid ? 16 : 0)
                 : "memory");
  }
  static DEVICE u32 unit_address(u32 copied, int i) { return copied + (i * THREADS + threadIdx.x) * 16; }
};

DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE uint4 load_unit(u32 copied, int i) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(Rows::unit_address(copied, i))
               : "memory");
  return x;
}

DEVICE void unpack(float (&x)[8], const uint4& words) {
  const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = low_of(pairs[i]), x[2 * i + 1] = high_of(pairs[i]);
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
  const int group = threadIdx.x % GROUPS;
  const int sampled = min(keys.count, SAMPLE);
  uint4 words[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int lane = threadIdx.x / GROUPS + h * LANES;
    const i64 place = SAMPLE * lane + lane * 19 % SAMPLE;  // of SAMPLE * SAMPLE
    const int key = sampled < SAMPLE ? lane : static_cast<int>(place * keys.count / (SAMPLE * SAMPLE));
    words[h] = lane < sampled ? keys.load(key, group) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float x[8];
    unpack(x, words[h]);
#pragma unroll
    for (int j = 0; j < 8; ++j) shared.sample[threadIdx.x / GROUPS + h * LANES][8 * group + j] = x[j];
  }
  __syncthreads();
  if (threadIdx.x < HEAD_DIM) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < SAMPLE; ++i) total += shared.sample[i][threadIdx.x];
    shared.mean[threadIdx.x] = total / sampled;
  }
  __syncthreads();
}
// Quantizes ROWS rows of K, from which the mean is subtracted.
DEVICE void quantize_rows(u32* to, int* exponent_to, const Rows& rows, int first, Shared& shared, u32 copied) {
  const int group = threadIdx.x % GROUPS, lane = threadIdx.x / GROUPS;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) rows.copy(copied, i, first + lane + i * LANES, group);
  sample_mean(rows, shared);
  float mean[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) mean[j] = shared.mean[8 * group + j];
  wait_copies();
  float largest = 0;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    float x[8];
    unpack(x, load_unit(copied, i));
    const bool inside = first + lane + i * LANES < rows.count;
    float own = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) own = fmaxf(own, fabsf(x[j] - mean[j]));
    largest = fmaxf(largest, inside ? own : 0);
  }
  const int exponent = exponent_for(block_max(largest, shared.maxima));
  if (threadIdx.x == 0) *exponent_to = exponent;
  const float by = power_of_two(-exponent);
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    float x[8];
    unpack(x, load_unit(copied, i));
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = (x[j] - mean[j]) * by;
    const int row = first + lane + i * LANES;
    if (row < rows.count) {
      *reinterpret_cast<uint2*>(to + (static_cast<i64>(row) * HEAD_DIM + 8 * group) / 4) =
          make_uint2(pack_fp8(x[0], x[1], x[2], x[3]), pack_fp8(x[4], x[5], x[6], x[7]));
    }
  }
}

// The larger of each element of `a` and the magnitude of `b`'s.
DEVICE u32 larger_pair(u32 a, u32 b) {
  u32 x;
  asm("max." PAIR_TYPE " %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b & 0x7fff7fffu));
  return x;
}

// Quantizes 128 keys of V, transposed: `to` is the first of them in column 0, of rows of `stride` bytes.
DEVICE void quantize_transposed(char* to, i64 stride, int* exponent_to, const Rows& rows, int first, Shared& shared,
                                u32 copied, u32* tile) {
  // a thread has 4 keys and 8 columns, twice
  const int group = threadIdx.x % GROUPS;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const int four = threadIdx.x / GROUPS + i / 4 * LANES, b = i % 4;
    rows.copy(copied, i, first + four / 4 * 16 + four % 4 * 2 + b / 2 * 8 + b % 2, group);
  }
  wait_copies();
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    const uint4 x = load_unit(copied, i);
    most = larger_pair(larger_pair(larger_pair(larger_pair(most, x.x), x.y), x.z), x.w);
  }
  const int exponent = exponent_for(block_max(fmaxf(low_of(most), high_of(most)), shared.maxima));
  if (threadIdx.x == 0) *exponent_to = exponent;
  const float by = power_of_two(-exponent);
  // tile [column][32 words of 4 keys], the word at `four` ^ 2 (column / 8), so that neither stores nor loads conflict
#pragma unroll
  for (int h = 0; h < UNITS / 4; ++h) {
    const int four = threadIdx.x / GROUPS + h * LANES;
    float x[4][8];
#pragma unroll
    for (int b = 0; b < 4; ++b) unpack(x[b], load_unit(copied, 4 * h + b));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      tile[(8 * group + j) * 32 + (four ^ 2 * group % 32)] = pack_fp8(x[0][j] * by, x[1][j] * by, x[2][j] * by, x[3][j] * by);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < HEAD_DIM * 8; i += THREADS) {
    const int column = i / 8, four = i % 8;  // 16 bytes
    const u32* from = tile + column * 32;
    const int turn = 2 * (column / 8) % 32;
    const uint2 a = *reinterpret_cast<const uint2*>(from + (4 * four ^ turn));
    const uint2 b = *reinterpret_cast<const uint2*>(from + (4 * four + 2 ^ turn));
    *reinterpret_cast<uint4*>(to + column * stride + 16 * four) = make_uint4(a.x, a.y, b.x, b.y);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    KERNEL_NAME(const char* key, const char* value, u32* key8, char* value8, int2* key_exponents, int key_planes, int key_heads,
                int keys, int columns, i64 key_batch, i64 key_head, i64 key_row, i64 value_batch, i64 value_head,
                i64 value_row) {
  extern __shared__ __align__(16) char room[];
  Shared& shared = *reinterpret_cast<Shared*>(room + COPIED);
  const u32 copied = shared_address(room);
  const int key_blocks = (keys + ROWS - 1) / ROWS;
  int index = blockIdx.x;
  const bool is_value = index >= key_planes * key_blocks;
  if (is_value) index -= key_planes * key_blocks;
  const int plane = index / key_blocks, block = index % key_blocks, first = block * ROWS;
  const int batch = plane / key_heads, head = plane % key_heads;
  int* exponents = reinterpret_cast<int*>(key_exponents + static_cast<i64>(plane) * key_blocks + block);
  if (is_value) {
    const Rows of_plane{value + (batch * value_batch + head * value_head) * 2, value_row, keys, columns};
    const i64 stride = static_cast<i64>(key_blocks) * ROWS;
    quantize_transposed(value8 + plane * stride * HEAD_DIM + first, stride, exponents + 1, of_plane, first, shared,
                        copied, reinterpret_cast<u32*>(room + COPIED + MAXIMA));
  } else {
    const Rows of_plane{key + (batch * key_batch + head * key_head) * 2, key_row, keys, columns};
    quantize_rows(key8 + static_cast<i64>(plane) * keys * (HEAD_DIM / 4), exponents, of_plane, first, shared, copied);
  }
}
