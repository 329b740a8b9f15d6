// Shared by both layouts of the Hopper backward kernel: tiles, and arithmetic on a warpgroup's scores, 64 keys x SPAN queries
// in registers. A thread holds two keys and, of every 8 queries, the two at 2 * (lane % 4).

constexpr int CONSUMERS = 2;
constexpr int BLOCK_Q = 64;  // queries per tile
using QueryTile = Tile<BLOCK_Q>;
using KeyTile = Tile<BLOCK_K>;

struct Problem {
  int heads, heads_per_key, queries, keys, columns;
  float scale, scale_log2;  // softmax scale; scale * log2(e), with SOFTCAP cap * log2(e)
  float into_cap;           // with SOFTCAP: scale / cap
  int window;
  Slopes slopes;            // with ALIBI

  DEVICE int shift() const { return keys - queries; }
  DEVICE int query_tiles() const { return (queries + BLOCK_Q - 1) / BLOCK_Q; }
  // Query tiles that attend to any key of a key tile: [first_tile, end_tile).
  DEVICE int first_tile(int key) const { return CAUSAL ? max(0, key - shift()) / BLOCK_Q : 0; }
  DEVICE int end_tile(int key) const {
    if (!WINDOW) return query_tiles();
    const int end = max(0, min(queries, key + BLOCK_K - 1 - shift() + window));
    return (end + BLOCK_Q - 1) / BLOCK_Q;
  }
  // The consumers (bits) whose half of a tile of keys sees a query tile, by causality and window.
  DEVICE int seers(int key, int tile) const {
    const int early = key - shift() - tile * BLOCK_Q;
    int found = 0;
#pragma unroll
    for (int i = 0; i < CONSUMERS; ++i) {
      const int first = early + i * WARPGROUP_ROWS;
      found |= ((!CAUSAL || first < BLOCK_Q) && (!WINDOW || first + WARPGROUP_ROWS + window > 1)) << i;
    }
    return found;
  }
};

// Key tiles of this block: its column of the host's schedule table (rounds x blocks), with LISTS also their steps (rounds x
// 2 x blocks).
struct Schedule {
  const int* entry;
  int key_tiles, plane = 0, key = 0, steps = 0;
  DEVICE Schedule(const int* table, const Problem& problem)
      : entry(table + blockIdx.x), key_tiles((problem.keys + BLOCK_K - 1) / BLOCK_K) {}
  DEVICE bool next() {
    const int index = *entry;
    if (index < 0) return false;
    if constexpr (LISTS) steps = entry[gridDim.x];
    entry += LISTS ? 2 * gridDim.x : gridDim.x;
    plane = index / key_tiles, key = index % key_tiles * BLOCK_K;
    return true;
  }
};

// Block lists by key tile: entries (query tile, bits tile or -1 if every pair is visible), with SKIPS (query tile, sight), of
// list l are from offsets[l] on, l = plane * key tiles + key tile; bits [query][key] of the bits tiles. Of the sight the lower bits
// are the bits tile, or all 1 if every pair is visible; then which halves of the keys see the tile, and which see that of the next
// entry (for the last, of the first). Planes may be shared by batch entries or heads.
constexpr int SIGHT_BITS = 26, WHOLLY_VISIBLE = (1 << SIGHT_BITS) - 1;
constexpr int SEEN = 1, NEXT_SEEN = 3;  // first of these bits as the producer leaves them
struct Lists {
  const int* offsets;
  const int2* entries;
  const u32* bits;
  int batch_step, head_step;
  DEVICE int plane(int batch, int head) const { return batch * batch_step + head * head_step; }
};

#if LISTS
// Steps of a consumer. The query tile of each is left in shared memory by the producer.
struct Walk {
  int left, tile = 0;
  DEVICE int following(const Problem&, int) const { return tile; }  // as little known as the present one
  DEVICE void next(const Problem&, int) { --left; }
};
#elif SKIPS && CAUSAL
// Iterates over the query tiles of a key tile, head by head. The first of the next key tile is a later one, so that key tiles do not
// add to the same rows of dQ at the same time. Kept in few registers.
struct Walk {
  int plane, tile, left;
  DEVICE Walk(const Problem& problem, int key_plane, int key)
      : plane(key_plane * problem.heads_per_key), tile(problem.first_tile(key)),
        left(max(0, problem.end_tile(key) - tile) * problem.heads_per_key) {}
  DEVICE int following(const Problem& problem, int key) const {
    return tile + 1 == problem.end_tile(key) ? problem.first_tile(key) : tile + 1;
  }
  DEVICE void next(const Problem& problem, int key) {
    const int following = this->following(problem, key);
    plane += following <= tile, tile = following;
    --left;
  }
  DEVICE u64 place(const Problem& problem) const { return static_cast<u64>(plane) * problem.query_tiles() + tile; }
};
#else
// Iterates over the query tiles of a key tile, head by head. Key tiles start at different query tiles, so that they do not
// all add to the same rows of dQ at the same time.
struct Walk {
  int plane, tile, first, start, end, left;
  DEVICE Walk(const Problem& problem, int key_plane, int key)
      : plane(key_plane * problem.heads_per_key), first(problem.first_tile(key)), end(problem.end_tile(key)) {
    const int count = max(0, end - first);
    start = tile = first + (count > 0 ? key / BLOCK_K % count : 0);
    left = count * problem.heads_per_key;
  }
  DEVICE int following(const Problem&, int) const { return tile + 1 == end ? first : tile + 1; }
  DEVICE void next(const Problem& problem, int key) {
    tile = following(problem, key);
    if (tile == start) ++plane;
    --left;
  }
  DEVICE u64 place(const Problem& problem) const { return static_cast<u64>(plane) * problem.query_tiles() + tile; }
};
#endif

constexpr u32 NOTHING_BYTES = SKIPS || CLEARS ? BLOCK_K / 2 * BLOCK_Q * 2 : 0;

using Scores = float[SPAN / 2];
using Operand = u32[SPAN / 16][4];  // scores as a left operand
constexpr int QUERY_GRADIENTS = HEAD_DIM * BLOCK_Q / (CONSUMERS * WARPGROUP);  // elements of a dQ tile per thread

// S^T or dP^T: 64 rows of K or V against SPAN rows of Q or dO.
DEVICE void start_scores(Scores& scores, u32 left, u32 right) {
  const u64 left_tile = matrix_descriptor(left, 0), right_tile = matrix_descriptor(right, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, offset = step % 4 * 32;
    wgmma_scores(scores, advance(left_tile, chunk * KeyTile::CHUNK_BYTES + offset),
                 advance(right_tile, chunk * QueryTile::CHUNK_BYTES + offset), step > 0);
  }
  wgmma_commit();
}

// Always true, but opaque to NVRTC: a branch on it ends the basic block, so that values computed from thread indices after
// it do not occupy registers before it. ptxas removes the branch.
DEVICE bool always() {
  u32 one;
  asm volatile("mov.u32 %0, 1;" : "=r"(one));
  return one;
}

// ---- softmax and its derivative ----------------------------------------------------------------------------------

// Row statistics: | 64 exponent rests | 64 deltas | 64 bases | whether any base is nonzero |. Each array is in the order of
// the threads' loads: first the queries of lane % 4 = 0, which are 0, 1, 8, 9, 16, 17, ...
constexpr int DELTAS = BLOCK_Q * 4, BASES = 2 * BLOCK_Q * 4, REBASE = 3 * BLOCK_Q * 4, ROWS_BYTES = REBASE + 16;

DEVICE float4 load_four(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

using RowNumbers = float[SPAN / 4];  // one value per query of a thread

DEVICE void load_rows(RowNumbers& numbers, u32 rows) {
  const u32 own = rows + threadIdx.x % 4 * 64;
#pragma unroll
  for (int i = 0; i < SPAN / 4; i += 4) {
    const float4 x = load_four(own + i * 4);
    numbers[i] = x.x, numbers[i + 1] = x.y, numbers[i + 2] = x.z, numbers[i + 3] = x.w;
  }
}

// Index of the row value of a score element.
DEVICE constexpr int row_of(int element) { return element / 4 * 2 + element % 2; }

// Masks the scores of keys outside the causal range or the window, and of keys beyond the end.
DEVICE void mask_scores(Scores& scores, const Problem& problem, int first_key, int first_query) {
  const int early = first_key - problem.shift() - first_query;
  const bool whole = first_key + 64 <= problem.keys && (!CAUSAL || early + 63 <= 0) &&
                     (!WINDOW || early + problem.window >= SPAN);
  if (whole) return;
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * r;
    const int from = (first_key + row >= problem.keys ? SPAN : CAUSAL ? early + row : 0) - column;
    const int to = (WINDOW ? early + row + problem.window : SPAN) - column;
    constexpr bool BY_BITS = WINDOW && !SOFTCAP;  // with a softcap the bits would be registers too many
    const u32 seen = BY_BITS ? elements_within(from, to) : 0;
#pragma unroll
    for (int i = 0; i < SPAN / 4; ++i) {
      const int query = i / 2 * 8 + i % 2;
      const bool hidden = BY_BITS ? !(seen & 1u << i) : query < from || (WINDOW && query >= to);
      if (hidden) scores[i / 2 * 4 + 2 * r + i % 2] = MINUS_INFINITY;
    }
  }
}

// The index of a query tile over all planes, and in the lower bits the consumers whose keys see it.
DEVICE int with_seers(int place, int seers) { return place << CONSUMERS | seers; }
constexpr int ALL_SEE = (1 << CONSUMERS) - 1;

// What the producer leaves about a query tile. If it is listed: its index over all planes (with SKIPS with_seers), its index, and
// whether it is partially masked (bit 0), with SKIPS also which halves of the keys see it and the next. With ALIBI: the slope of its head.
DEVICE void leave_listed(u32 listed, u32 place, u32 tile, u32 sight) {
  if constexpr (SKIPS) place = with_seers(place, sight >> SEEN & ALL_SEE);
  store_word(listed, place), store_word(listed + 4, tile), store_word(listed + 8, sight);
}
DEVICE void leave_slope(u32 listed, float slope) { store_word(listed + 12, __float_as_uint(slope)); }

// Adds slope * (key - position of the query) to the scores.
DEVICE void add_biases(Scores& scores, const Problem& problem, int first_key, int first_query, u32 listed) {
  const float slope = __uint_as_float(load_word(listed + 12));
  if constexpr (LISTS) first_query += load_word(listed + 4) * BLOCK_Q;
  const int lane = threadIdx.x % 32, key = first_key + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const float distance = key - (first_query + 2 * (lane % 4) + problem.shift());
#pragma unroll
  for (int i = 0; i < SPAN / 2; ++i) scores[i] += slope * (distance + (8 * (i / 2 % 2) - 8 * (i / 4) - i % 2));
}

// Masks the scores of a listed tile whose bits are 0, and those of keys beyond the end. `bits` is the address of the bits of
// the warpgroup's first key and query.
DEVICE void mask_listed(Scores& scores, const Problem& problem, int first_key, u32 listed, u32 bits) {
  if ((SKIPS ? load_word(listed + 8) & 1 : load_word(listed + 8)) && (!SOFTCAP || always())) {
    const int lane = threadIdx.x % 32, key = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const u32 own = bits + 2 * (lane % 4) * (BLOCK_K / 8) + key / 32 * 4;
#pragma unroll
    for (int i = 0; i < SPAN / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const u32 word = load_word(own + (2 * i + j) * (BLOCK_K / 8)) >> key % 32;
        if (!(word & 1)) scores[i + j] = MINUS_INFINITY;
        if (!(word & 256)) scores[i + j + 2] = MINUS_INFINITY;
      }
    }
  }
  mask_scores(scores, problem, first_key, 0);
}

// Replaces the scores by tanh(s / cap); the factor cap is applied with the weights.
DEVICE void cap_scores(Scores& scores, float into_cap) {
  const float factor = 2 * 1.44269504f * into_cap;
#pragma unroll
  for (int i = 0; i < SPAN / 2; ++i) scores[i] = 1 - 2 * reciprocal_fast(1 + exp2_fast(scores[i] * factor));
}

// Whether any row of a tile has a nonzero base; never with SOFTCAP, because the cap is bounded (MAX_SOFTCAP in runtime/call.py).
DEVICE bool has_bases(u32 rows) {
  static_assert(!(SOFTCAP && ALIBI), "the derivative of the softcap is made of the scores after it");
  if constexpr (SOFTCAP) return false;
  u32 flag;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(flag) : "r"(rows + REBASE) : "memory");
  return flag != 0;
}

// Subtracts the bases from the scores. `rows` are the row statistics of this warpgroup.
DEVICE void rebase(Scores& scores, u32 rows) {
  RowNumbers bases;
  load_rows(bases, rows + BASES);
#pragma unroll
  for (int i = 0; i < SPAN / 2; ++i) scores[i] = rebased(scores[i], bases[row_of(i)]);
}

// P^T = 2^((S^T - base) c - rest). The scores are replaced by the factor of dS^T: P^T or, with SOFTCAP, P^T (1 - tanh^2).
template <bool PACK>
DEVICE void weigh(Scores& scores, Operand& weights, const RowNumbers& logsumexps, const Problem& problem, int first_key,
                  int first_query, u32 listed, u32 bits) {
  if constexpr (SOFTCAP) cap_scores(scores, problem.into_cap);
  if constexpr (LISTS) mask_listed(scores, problem, first_key, listed, bits);
  else mask_scores(scores, problem, first_key, first_query);
#pragma unroll
  for (int i = 0; i < SPAN / 2; i += 2) {
    const float even = exp2_fast(scores[i] * problem.scale_log2 - logsumexps[row_of(i)]);
    const float odd = exp2_fast(scores[i + 1] * problem.scale_log2 - logsumexps[row_of(i + 1)]);
    if (PACK) weights[i / 8][i / 2 % 4] = pack(even, odd);
    scores[i] = SOFTCAP ? even - even * fminf(scores[i] * scores[i], 1) : even;
    scores[i + 1] = SOFTCAP ? odd - odd * fminf(scores[i + 1] * scores[i + 1], 1) : odd;
  }
}

// dS^T = P^T (dP^T - delta), packed; without SOFTCAP it also packs P^T if it is not packed yet.
template <bool PACK>
DEVICE void differentiate(const Scores& scores, const Scores& weight_gradients, Operand& weights, Operand& gradients,
                          u32 rows) {
  RowNumbers deltas;
  load_rows(deltas, rows + DELTAS);
#pragma unroll
  for (int i = 0; i < SPAN / 2; i += 2) {
    const float even = scores[i] * (weight_gradients[i] - deltas[row_of(i)]);
    const float odd = scores[i + 1] * (weight_gradients[i + 1] - deltas[row_of(i + 1)]);
    gradients[i / 8][i / 2 % 4] = pack(even, odd);
    if (PACK) weights[i / 8][i / 2 % 4] = pack(scores[i], scores[i + 1]);
  }
}

// Stores a warpgroup's P^T or dS^T to its rows of a shared tile, from the 16-byte unit `first` on, as a wgmma operand.
DEVICE void store_operand(u32 tile, const Operand& operand, int first) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < SPAN / 16; ++i) {
    const int unit = first + 2 * i + lane / 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     tile + row * 128 + ((unit ^ row % 8) << 4)),
                 "r"(operand[i][0]), "r"(operand[i][1]), "r"(operand[i][2]), "r"(operand[i][3])
                 : "memory");
  }
}

// Writes 64 keys x 2 COUNT columns of a gradient, 16 bytes per thread: lanes of a quad exchange words so that each holds 8
// columns of a row. `destination` is the thread's row 0 and first column; row and column limits count from there.
template <int COUNT>
DEVICE void store_gradient(char* destination, const float (&gradient)[COUNT], float factor, int rows_left, int columns_left,
                           int row_bytes) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 16) {  // 32 columns
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = pack(gradient[i + 4 * j + 2 * r] * factor, gradient[i + 4 * j + 2 * r + 1] * factor);
      }
      transpose_in_quad(words);
      const int column = 2 * i + 8 * (threadIdx.x % 4);
      if (8 * r < rows_left && column < columns_left) {
        *reinterpret_cast<uint4*>(destination + 8 * r * row_bytes + column * 2) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

// ---- dQ ----------------------------------------------------------------------------------------------------------

// Adds a thread's elements of dQ from I on, four per step; those of a warp are contiguous, 512 bytes per step.
template <int I, int COUNT>
DEVICE void add_to_device(float* destination, const float (&gradient)[COUNT]) {
  asm volatile("red.global.add.v4.f32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(destination), "n"(I * 128), "f"(gradient[I]),
               "f"(gradient[I + 1]), "f"(gradient[I + 2]), "f"(gradient[I + 3])
               : "memory");
  if constexpr (I + 4 < COUNT) add_to_device<I + 4>(destination, gradient);
}

// Adds a warp's share of dQ in register order; sm90/backward_finish.cu restores row-major order.
template <int COUNT>
DEVICE void add_query_gradient(float* destination, const float (&gradient)[COUNT]) {
  add_to_device<0>(destination + threadIdx.x % 32 * 4, gradient);
}

// ---- shared memory -----------------------------------------------------------------------------------------------

// | barriers: 1 KiB | K | V | ring of STAGES: Q, dO | BUFFERS of P or dS | with SKIPS or CLEARS: zeros | ring: row statistics |
// | with LISTS, ring: bits |
// With LISTS the first row statistics are in the first KiB, or the bits would not fit at a head dim of 256.
constexpr int BITS_BYTES = BLOCK_Q * BLOCK_K / 8;
struct Memory {
  static constexpr int BUFFER_BYTES = BLOCK_K * BLOCK_Q * 2;
  u32 base;
  DEVICE u32 keys_full() const { return base; }
  DEVICE u32 keys_empty() const { return base + 8; }
  DEVICE u32 full(int stage) const { return base + 16 + 8 * stage; }
  DEVICE u32 empty(int stage) const { return base + 16 + 8 * (STAGES + stage); }
  DEVICE u32 exchanged(int buffer) const { return base + 16 + 8 * (2 * STAGES + buffer); }
  DEVICE u32 cleared_planes() const { return base + 112; }  // with CLEARS, see backward_sums.cuh
  DEVICE u32 begun_plane() const { return base + 116; }
  DEVICE u32 tile_key() const { return base + 124; }  // first key of the consumers' key tile
  DEVICE u32 key() const { return base + 1024; }
  DEVICE u32 value() const { return key() + KeyTile::BYTES; }
  DEVICE u32 query(int stage) const { return value() + KeyTile::BYTES + stage * 2 * QueryTile::BYTES; }
  DEVICE u32 cotangent(int stage) const { return query(stage) + QueryTile::BYTES; }
  DEVICE u32 buffer(int index) const { return query(STAGES) + index * BUFFER_BYTES; }
  DEVICE u32 nothing() const { return buffer(BUFFERS); }  // dS of the keys of a consumer that passes by
  DEVICE u32 rows(int stage) const {
    if (LISTS) return stage == 0 ? base + 192 : nothing() + NOTHING_BYTES + (stage - 1) * ROWS_BYTES;
    return nothing() + NOTHING_BYTES + stage * ROWS_BYTES;
  }
  DEVICE u32 listed(int stage) const { return base + 128 + 16 * stage; }  // see leave_listed
  DEVICE u32 bits(int stage) const { return nothing() + NOTHING_BYTES + (STAGES - 1) * ROWS_BYTES + stage * BITS_BYTES; }
};

static_assert(16 + 8 * (2 * STAGES + BUFFERS) <= 112 && 128 + 16 * STAGES <= 192 && 192 + ROWS_BYTES <= 1024);

// barrier_wait as a C++ loop: values computed before it are then not kept in registers across it.
DEVICE void await_phase(u32 barrier, u32 parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

constexpr int BOTH = 1;  // the named barrier of both consumers
DEVICE void meet() { named_sync(BOTH, CONSUMERS * WARPGROUP); }

// Releases a buffer that was read with ordinary loads. Every lane arrives: one arrival after __syncwarp would suffice, but
// racecheck does not recognise a __syncwarp that ptxas removes as unnecessary.
constexpr int READ_ARRIVALS = CONSUMERS * WARPGROUP;
DEVICE void release_read(u32 empty) {
  if (always()) barrier_arrive(empty);
}
