// Tiles of the general kernels: layout in shared memory, asynchronous copies, and loads of mma.sync operands.
//
// A row of WIDTH elements is WIDTH / 8 units of 16 bytes and one of padding. The pitch is then an odd number of units, so
// that the eight rows of an ldmatrix matrix are in different banks, and every address is a lane-dependent base plus a
// constant.

constexpr int THREADS = WARPS * 32;

template <int TILE_ROWS, int WIDTH>
struct Tile {
  static constexpr int ROWS = TILE_ROWS, UNITS = WIDTH / 8, PITCH = (UNITS + 1) * 16, BYTES = ROWS * PITCH;
  static_assert(WIDTH % 16 == 0, "the pitch is an odd number of units");

  // ldmatrix address of a lane's row of a 16 x 16 matrix: for a left operand, or transposed for a right operand stored as
  // rows of the contraction.
  static DEVICE u32 by_rows() { return lane() % 16 * PITCH + lane() / 16 * 16; }
  // ldmatrix address for a right operand stored as columns of the contraction, or transposed for a left operand.
  static DEVICE u32 by_columns() { return (lane() / 16 * 8 + lane() % 8) * PITCH + lane() / 8 % 2 * 16; }
  static __device__ constexpr u32 at(int row, int column) { return row * PITCH + column * 2; }

 private:
  static DEVICE int lane() { return threadIdx.x % 32; }
};

// Starts an asynchronous copy of rows of `columns` elements to a tile; elements beyond `rows_left` and `columns` are
// zero-filled. The number of threads per row is the largest power of two that divides a row's units. `walk(r)` returns a
// pointer to row r; `next` advances it by some rows.
template <class Tile>
struct Copying {
  static constexpr int SIDE = Tile::UNITS & -Tile::UNITS, CHUNKS = Tile::UNITS / SIDE, HIGH = THREADS / SIDE;
  static constexpr int PASSES = HIGH < Tile::ROWS ? Tile::ROWS / HIGH : 1;
  static constexpr int CHUNKS_AT_ONCE = HIGH > Tile::ROWS ? HIGH / Tile::ROWS : 1;
  static_assert(HIGH <= Tile::ROWS ? Tile::ROWS % HIGH == 0 : HIGH % Tile::ROWS == 0, "threads fill whole passes");

  static DEVICE int first_row() { return threadIdx.x / SIDE % Tile::ROWS; }

  // Copies a thread's share of row `row` of the tile; the row begins at `source`.
  static DEVICE void row(u32 tile, const char* source, int row, int rows_left, int columns) {
    const int first_chunk = threadIdx.x / SIDE / Tile::ROWS;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += CHUNKS_AT_ONCE) {
      const int unit = (chunk + first_chunk) * SIDE + threadIdx.x % SIDE;
      if (CHUNKS % CHUNKS_AT_ONCE && unit >= Tile::UNITS) continue;
      copy_16_bytes(tile + row * Tile::PITCH + unit * 16, source + unit * 16, row < rows_left && unit * 8 < columns);
    }
  }
};

// Starts an asynchronous copy to a tile from row `first` on of an array with row stride `step`, in elements.
template <class Tile>
DEVICE void copy_tile(u32 tile, const char* array, int step, int first, int rows, int columns) {
  using Copies = Copying<Tile>;
  const char* source = array + static_cast<i64>(first + Copies::first_row()) * (2 * step);
#pragma unroll
  for (int i = 0; i < Copies::PASSES; ++i) {
    Copies::row(tile, source, Copies::first_row() + i * Copies::HIGH, rows - first, columns);
    source += 2 * Copies::HIGH * static_cast<i64>(step);
  }
}

// Writes `rows_left` rows of `columns` elements from a tile to device memory: row r to `place(r)`.
template <class Tile, class Place>
DEVICE void write_rows(const char* tile, const Place& place, int rows_left, int columns) {
  for (int i = threadIdx.x; i < Tile::ROWS * Tile::UNITS; i += THREADS) {
    const int row = i / Tile::UNITS, unit = i % Tile::UNITS;
    if (row >= rows_left || unit * 8 >= columns) continue;
    *reinterpret_cast<uint4*>(place(row) + unit * 16) =
        *reinterpret_cast<const uint4*>(tile + row * Tile::PITCH + unit * 16);
  }
}

// Stores an accumulator of 16 rows to a tile; of every 8 columns a lane holds two, in two rows.
template <class Tile, int COLUMNS>
DEVICE void leave_rows(char* tile, const float (&sums)[COLUMNS / 8][4], float scale_low, float scale_high) {
  char* own = tile + threadIdx.x % 32 / 4 * Tile::PITCH + threadIdx.x % 4 * 4;
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n) {
    *reinterpret_cast<u32*>(own + n * 16) = pack(sums[n][0] * scale_low, sums[n][1] * scale_low);
    *reinterpret_cast<u32*>(own + 8 * Tile::PITCH + n * 16) = pack(sums[n][2] * scale_high, sums[n][3] * scale_high);
  }
}

// Packs two adjacent accumulators of 8 columns into a left operand of 16 columns.
DEVICE void pack_operand(u32 (&operand)[4], const float (&low)[4], const float (&high)[4]) {
  operand[0] = pack(low[0], low[1]);
  operand[1] = pack(low[2], low[3]);
  operand[2] = pack(high[0], high[1]);
  operand[3] = pack(high[2], high[3]);
}
