// Register layout of a warpgroup's 64 rows, and layout of tiles in shared memory, in the Hopper kernels.
//
// A thread holds two rows, r = 0 and 1: row 16 * warp + lane / 4 + 8 r, and of every 8 columns the two at 2 * (lane % 4).
// Element i of an accumulator belongs to row (i / 2) % 2 and column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
//
// Tiles in shared memory are CHUNKS column chunks of 64 elements (FP8: 128), each of them ROWS x 128 bytes with the 128-byte
// swizzle: the 16-byte unit u of row r is stored at unit u ^ (r % 8). Every chunk starts at a multiple of 1024 bytes.
//
//   Q, K:  chunk 0 [ROWS][64]   chunk 1 [ROWS][64]  ...      HEAD_DIM is the contraction: 4 steps of 16 in a chunk
//   V:     as Q and K           the contraction runs down the rows: a step is 16 rows, 2048 bytes

#ifndef FP8
#define FP8 0
#endif

constexpr int ELEMENT_BYTES = FP8 ? 1 : 2;
constexpr int CHUNK_COLUMNS = 128 / ELEMENT_BYTES;
constexpr int CHUNKS = (HEAD_DIM + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
constexpr int WARPGROUP = 128;
constexpr int WARPGROUP_ROWS = 64;

template <int ROWS>
struct Tile {
  static constexpr u32 CHUNK_BYTES = ROWS * 128;
  static constexpr u32 BYTES = CHUNK_BYTES * CHUNKS;
};

constexpr int CONSUMER_WARPS = 4;  // arrivals per warpgroup to release a buffer

using Output = float[HEAD_DIM / 2];

// Marks a value as warp-uniform by a shuffle, so that values derived from it, such as tile addresses, stay in uniform
// registers.
DEVICE int same_in_warp(int x) { return __shfl_sync(~0u, x, 0); }

// Number of a thread's elements of an accumulator row whose columns, counted from the thread's first, are before `end`.
DEVICE int elements_before(int end) { return min(2 * (max(end, 0) / 8) + min(max(end, 0) % 8, 2), 32); }

// Bits of a thread's elements of an accumulator row whose columns, counted from the thread's first, are in [first, end). Such bits
// become predicates seven at a time, where each element would take a comparison for each bound.
DEVICE u32 elements_within(int first, int end) {
  const int before = elements_before(first), count = max(0, elements_before(end) - before);
  u32 bits;
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(before), "r"(count));
  return bits;
}

// A position in a ring of buffers. `parity` flips each round and distinguishes the phases of the barriers.
struct Ring {
  int stage = 0;
  u32 parity = 0;
  DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Releases a buffer with one arrival per warp, because the warps of a warpgroup are not in lockstep.
DEVICE void release(u32 empty) {
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// Loads ROWS rows of a head to a tile; `full` already expects their bytes.
template <int ROWS>
DEVICE void load_tile_expected(u32 tile, const TensorMap& map, int head, int batch, int row, u32 full) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    load_box(tile + chunk * Tile<ROWS>::CHUNK_BYTES, map, chunk * CHUNK_COLUMNS, row, head, batch, full);
  }
}

template <int ROWS>
DEVICE void load_tile(u32 tile, const TensorMap& map, int head, int batch, int row, u32 full) {
  barrier_arrive_expecting(full, Tile<ROWS>::BYTES);
  load_tile_expected<ROWS>(tile, map, head, batch, row, full);
}

DEVICE void scale_output(Output& output, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] *= factor[i / 2 % 2];
}

// Writes the warpgroup's output, 16 bytes per thread: lanes of a quad exchange words so that each holds 8 columns of a row.
// `destination` is the thread's row 0; `rows_left` is the number of rows from there to the end.
DEVICE void store_output(char* destination, const Output& output, int rows_left, int columns) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i += 16) {  // 32 columns
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = pack(output[i + 4 * j + 2 * r], output[i + 4 * j + 2 * r + 1]);
      transpose_in_quad(words);
      const int column = 2 * i + 8 * quad_lane;
      if (8 * r < rows_left && column < columns) {
        *reinterpret_cast<uint4*>(destination + (8 * r * columns + column) * 2) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}
