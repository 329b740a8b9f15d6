// FlashAttention forward kernel for Hopper in 8 bits: Q, K, P and V in fp8 (e4m3), from fp8_quantize.cu. It shares the
// producer, the masks and the split of tiles with forward.cu; start there.
//
//   scores    S = Q K^T           64 x BLOCK_N    float32; exponents of 2 are S * 2^(exponents of the Q rows and the K tile)
//   softmax   P = 2^(S - base + 5)                64 x BLOCK_N, packed to 1 byte: the left operand of the next product, since the
//                                                 keys of V are permuted
//   product   T = P V             64 x HEAD_DIM   the tensor cores' accumulator keeps few bits of fp8 products, so it sums
//                                                 one tile of keys only (two-level accumulation)
//   output    O = O * rescale + T 64 x HEAD_DIM   float32, in units of the V tile's power of two: its change is in `rescale`

// Weights are relative to a row's base, an exponent that is raised only when a score exceeds it by HEADROOM: most tiles need neither
// a maximum over lanes nor another factor of the output (FlashAttention 4). Weights are at most 2^8.75; the largest e4m3 is 448, 2^8.8.
constexpr float WEIGHT_EXPONENT = 5, HEADROOM = 3.75f;

using Weights8 = u32[BLOCK_N / 32][4];
using Product = float[HEAD_DIM / 2 + 4];  // V has 8 more columns of ones, so that the last four are sums of rows

DEVICE void start_product(Product& product, const Weights8& weights, u32 value) {
  const u64 tile = matrix_descriptor(value, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_N / 32; ++step) {
    wgmma_output(product, weights[step], advance(tile, step * 32), step > 0);
  }
  wgmma_commit();
}

// O = O * factor + T, and the same with the row sums.
DEVICE void promote(Output& output, Rows& rows, const Product& product, const float (&rescale)[2], float unit) {
  const float factor[2] = {rescale[0] * unit, rescale[1] * unit};
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = output[i] * factor[i / 2 % 2] + product[i];
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[r] = rows.sum[r] * rescale[r] + product[HEAD_DIM / 2 + 2 * r];
}

DEVICE void pack_weights8(Weights8& weights, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 8; ++i) {
    // register i % 4 of step i / 4: row i % 2, and of 16 keys those of two groups of 8
    const int first = i / 4 * 16 + i % 4 / 2 * 8 + i % 2 * 2;
    weights[i / 4][i % 4] = pack_fp8(scores[first], scores[first + 1], scores[first + 4], scores[first + 5]);
  }
}

// Largest score of each of the thread's rows over the thread's columns. Floats that are not negative are ordered as integers, of which one
// instruction compares three; if a whole row is negative, the order is reversed. Two chains of comparisons a row take less time.
template <bool NEGATIVE>
DEVICE void largest_of(int (&largest)[2], const Scores& scores) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int found[2] = {__float_as_int(scores[2 * r]), __float_as_int(scores[2 * r + 4])};
#pragma unroll
    for (int i = 2 * r; i < BLOCK_N / 2; i += 4) {
      const int a = __float_as_int(scores[i]), b = __float_as_int(scores[i + 1]);
      int& of = found[i / 4 % 2];
      of = NEGATIVE ? min(min(a, b), of) : max(max(a, b), of);
    }
    largest[r] = NEGATIVE ? min(found[0], found[1]) : max(found[0], found[1]);
  }
}

// The same with the thread's quad.
template <bool NEGATIVE>
DEVICE void join_quad(int (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
      const int other = __shfl_xor_sync(~0u, largest[r], lane);
      largest[r] = NEGATIVE ? min(largest[r], other) : max(largest[r], other);
    }
  }
}

// Raises the bases of the thread's rows to their maxima; `largest` is that of the thread's columns.
DEVICE void raise_bases(Rows& rows, const Scores& scores, int (&largest)[2], float factor) {
  join_quad<false>(largest);
  if (__any_sync(~0u, (largest[0] | largest[1]) < 0)) {
    int negative[2];
    largest_of<true>(negative, scores);
    join_quad<true>(negative);
#pragma unroll
    for (int r = 0; r < 2; ++r) largest[r] = largest[r] < 0 ? negative[r] : largest[r];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(rows.max[r], ceilf(__int_as_float(largest[r]) * factor));
    rows.rescale[r] = exp2_fast(rows.max[r] - (top == MINUS_INFINITY ? 0 : top));
    rows.max[r] = top;
  }
}

// Online softmax in exponents of 2: `factor` is a power of two, so that bases and differences are exact for any scores. `rows.max`
// are the bases.
DEVICE void softmax8(Scores& scores, Rows& rows, float factor) {
  int largest[2];
  largest_of<false>(largest, scores);
  bool exceeded = false;  // of negative scores it is only known that they are below 0
#pragma unroll
  for (int r = 0; r < 2; ++r) exceeded |= fmaxf(__int_as_float(largest[r]), 0) * factor > rows.max[r] + HEADROOM;
  rows.rescale[0] = rows.rescale[1] = 1;
  if (__any_sync(~0u, exceeded)) raise_bases(rows, scores, largest, factor);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float shift = (rows.max[r] == MINUS_INFINITY ? 0 : rows.max[r]) - WEIGHT_EXPONENT;  // fully masked so far
#pragma unroll
    for (int i = 2 * r; i < BLOCK_N / 2; i += i % 2 ? 3 : 1) scores[i] = exp2_fast(scores[i] * factor - shift);
  }
}

// ---- queries ------------------------------------------------------------------------------------------------------

constexpr int QUANTIZE_BARRIER = TURN_BARRIER + CONSUMERS;  // first named barrier, one per consumer

DEVICE void load_four(u32 (&words)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
DEVICE void store_four(u32 address, const u32 (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
// Address of a 16-byte unit of a row in a tile of 64 rows.
DEVICE u32 unit_of(u32 tile, int row, int unit) {
  return tile + unit / 8 * (WARPGROUP_ROWS * 128) + row * 128 + (unit % 8 ^ row % 8) * 16;
}

// The larger magnitudes of both halves of two words, with any sign.
DEVICE u32 larger_magnitudes(u32 a, u32 b) {
  u32 x;
  asm("max.xorsign.abs." PAIR_TYPE " %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

// Quantizes a consumer's queries in place, times `factor`, with one power of two for all, whose exponent is the last word of
// `room`; the others are for a number of each warp. A thread has half of a row.
DEVICE void quantize_queries(u32 tile, u32 room, int barrier, float factor) {
  constexpr int UNITS = HEAD_DIM / 16;
  const int thread = threadIdx.x % WARPGROUP, row = thread % WARPGROUP_ROWS, first = thread / WARPGROUP_ROWS * UNITS;
  u32 words[UNITS][4], most = 0;
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    load_four(words[i], unit_of(tile, row, first + i));
#pragma unroll
    for (int j = 0; j < 4; ++j) most = larger_magnitudes(most, words[i][j]);
  }
  float largest = fmaxf(fabsf(low_of(most)), fabsf(high_of(most)));
#pragma unroll
  for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
  if (thread % 32 == 0) store_word(room + thread / 32 * 4, __float_as_uint(largest));
  named_sync(barrier, WARPGROUP);  // every thread has read its queries, too
  u32 found[4];
  load_four(found, room);
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = fmaxf(largest, __uint_as_float(found[i]));
  const int exponent = exponent_for(largest * factor);
  const float by = factor * power_of_two(-exponent);
#pragma unroll
  for (int i = 0; i < UNITS; i += 2) {
    u32 made[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 a = words[i + j / 2][j % 2 * 2], b = words[i + j / 2][j % 2 * 2 + 1];
      made[j] = pack_fp8(low_of(a) * by, high_of(a) * by, low_of(b) * by, high_of(b) * by);
    }
    store_four(unit_of(tile, row, (first + i) / 2), made);
  }
  if (thread == 0) store_word(room + 16, exponent);
  fence_shared_for_async();
  named_sync(barrier, WARPGROUP);
}

// ---- a consumer --------------------------------------------------------------------------------------------------

struct Results {
  char* output;
  Parts parts;
};

struct Consumer : Position {
  int value_exponent = 0;  // of the scale of the output

  using Position::Position;
  DEVICE bool next_work(const Problem& problem) {
    if (!Position::next_work(problem)) return false;
    quantize_queries(query, memory.exchange(index), QUANTIZE_BARRIER + index, problem.scale_log2);
    value_exponent = 0;
    pass_unseen(skips);
    return true;
  }

  // Waits for the scores of tile `n`, with at most PENDING later wgmma groups in flight, and converts them to weights.
  template <int PENDING>
  DEVICE void weigh(Scores& scores, const Problem& problem, Rows& rows) {
    const float factor = power_of_two(static_cast<int>(load_word(memory.query_exponent(index)) + load_word(memory.key_exponent(keys.stage))));
    wgmma_wait<PENDING>();
    settle(scores);
    release_keys();
    mask_bounds(scores, problem);
    softmax8(scores, rows, factor);
  }

  // Changes the unit of the output to that of the current V tile; returns the factor for it.
  DEVICE float to_unit() {
    const int exponent = load_word(memory.value_exponent(values.stage));
    const float unit = power_of_two(value_exponent - exponent);
    value_exponent = exponent;
    return unit;
  }

  // Writes the rows of the work item, or their part of a split tile; the last part to finish combines them.
  DEVICE void finish(Output& out, Rows& rows, const Problem& problem, const Results& results) const {
    float unit = power_of_two(value_exponent);
    const Part part(same_in_warp(schedule.part()));
    if (part.count > 0) {
      const float factor[2] = {unit, unit};
      scale_output(out, factor);
      if (!same_in_warp(leave_part(out, rows, results.parts, part))) return;
      join_parts(out, rows, results.parts, part, 1);
      unit = 1;
    }
    // each lane of a quad has the whole sums; rows that see nothing are 0
    const float inverse[2] = {rows.sum[0] > 0 ? unit / rows.sum[0] : 0, rows.sum[1] > 0 ? unit / rows.sum[1] : 0};
    scale_output(out, inverse);
    const u64 plane_rows = static_cast<u64>(schedule.plane()) * problem.queries;
    store_output(results.output + (plane_rows + row()) * problem.columns * 2, out, problem.queries - row(), problem.columns);
  }
};

// Processes the key tiles of a consumer's work, at least one, with overlap inside the consumer: S of the next keys and P V of
// the current ones run while it computes the softmax.
DEVICE void attend_overlapping(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  Scores scores;
  Product product;
  Weights8 weights;
  start_scores(scores, consumer.query, consumer.await_keys());
  consumer.weigh<0>(scores, problem, rows);
  u32 value = consumer.await_values();
  float rescale[2] = {0, 0}, unit = consumer.to_unit();
  pack_weights8(weights, scores);
#pragma unroll 1
  while (consumer.n > consumer.least()) {
    --consumer.n;
    const u32 key = consumer.await_keys();
    start_scores(scores, consumer.query, key);
    start_product(product, weights, value);
    consumer.weigh<1>(scores, problem, rows);
    const u32 used = consumer.memory.value_empty(consumer.values.stage);
    consumer.values.advance();
    value = consumer.await_values();  // ends the basic block: ptxas would move the wait for P V up, before the exponentials
    wgmma_wait<0>();
    settle(product);
    release(used);
    promote(out, rows, product, rescale, unit);
    rescale[0] = rows.rescale[0], rescale[1] = rows.rescale[1];
    unit = consumer.to_unit();
    pack_weights8(weights, scores);
  }
  start_product(product, weights, value);
  wgmma_wait<0>();
  settle(product);
  promote(out, rows, product, rescale, unit);
  consumer.release_values();
}

// Processes the key tiles of a consumer's work without overlap inside the consumer: consumers overlap with each other.
DEVICE void attend_in_turns(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  consumer.wait_turn();
  u32 key = consumer.await_keys();
#pragma unroll 1
  for (; consumer.n >= consumer.least(); --consumer.n) {
    Weights8 weights;
    {
      Scores scores;
      start_scores(scores, consumer.query, key);
      consumer.pass_turn();
      consumer.weigh<0>(scores, problem, rows);
      pack_weights8(weights, scores);
    }
    const u32 value = consumer.await_values();
    const float unit = consumer.to_unit();
    // before the turn, so that nothing delays the next scores
    if (consumer.n > consumer.least()) key = consumer.await_keys();
    consumer.wait_turn();
    Product product;
    start_product(product, weights, value);
    wgmma_wait<0>();
    settle(product);
    promote(out, rows, product, rows.rescale, unit);
    consumer.release_values();
  }
  consumer.pass_turn();
}

DEVICE void consume(Consumer& consumer, const Problem& problem, const Results& results) {
  while (consumer.next_work(problem)) {
    Output out = {};
    Rows rows;
    if (consumer.sees_nothing()) consumer.release_query();
    else if constexpr (OVERLAP) attend_overlapping(consumer, problem, out, rows);
    else attend_in_turns(consumer, problem, out, rows);
    consumer.finish(out, rows, problem, results);
    consumer.pass_unseen(consumer.earlier());
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

// Fills the rows of ones after the V tiles.
DEVICE void fill_ones(const Memory& memory) {
  constexpr u32 FOUR_ONES = 0x38383838;
  for (int i = threadIdx.x; i < STAGES * 256; i += THREADS) {
    store_word(memory.value(i / 256) + ValueTile::BYTES + i % 256 * 4, FOUR_ONES);
  }
  fence_shared_for_async();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value, const int2* key_exponents, const int4* table, char* output,
                float4* parts, u64* marks, int planes, int heads, int heads_per_key, int queries, int keys, int columns,
                int window, int factor_bits, int rounds, u64 serial) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const Problem problem{planes, heads, heads_per_key, queries, keys, columns, __int_as_float(factor_bits), 0, window};
  const Schedule schedule{table + 2 * rounds * blockIdx.x};
  if (threadIdx.x == 0) {
    prefetch(schedule.entry);  // the longest latency of the prologue
    prefetch_map(query), prefetch_map(key), prefetch_map(value);
    init_barriers(memory);
  }
  fill_ones(memory);
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, schedule, {}, query, key, value, {key_exponents});
  } else {
    if constexpr (CONSUMERS == 1) give_registers<CONSUMER_REGISTERS>();
    else take_registers<CONSUMER_REGISTERS>();
    Consumer consumer(memory, same_in_warp(threadIdx.x / WARPGROUP) - 1, schedule);
    consume(consumer, problem, {output, {parts, marks, serial}});
  }
}
