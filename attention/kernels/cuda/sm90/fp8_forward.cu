// FlashAttention forward kernel for Hopper in 8 bits: Q, K, P and V in fp8 (e4m3), from fp8_quantize.cu. It shares the
// producer, the masks and the split of tiles with forward.cu; start there.
//
//   scores    S = Q K^T           64 x BLOCK_N    float32; exponents of 2 are S * 2^(exponents of the Q rows and the K tile)
//   softmax   P = 2^(S - max + 8) 64 x BLOCK_N    packed to 1 byte: the left operand of the next product, since the keys of V
//                                                 are permuted
//   product   T = P V             64 x HEAD_DIM   the tensor cores' accumulator keeps few bits of fp8 products, so it sums up
//                                                 one tile of keys only (two-level accumulation)
//   output    O = O * rescale + T 64 x HEAD_DIM   float32, in units of the V tile's power of two: its change is in `rescale`

constexpr float WEIGHT_EXPONENT = 8;  // weights are at most 2^8, for fewer subnormals; the sums have the same factor

using Weights8 = u32[BLOCK_N / 32][4];

DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

DEVICE void start_product(Output& product, const Weights8& weights, u32 value) {
  const u64 tile = matrix_descriptor(value, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_N / 32; ++step) {
    wgmma_output(product, weights[step], advance(tile, step / 4 * ValueTile::CHUNK_BYTES + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// O = O * factor + T
DEVICE void promote(Output& output, const Output& product, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 2; ++i) output[i] = output[i] * factor[i / 2 % 2] + product[i];
}

DEVICE void pack_weights8(Weights8& weights, const Scores& scores) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 8; ++i) {
    // register i % 4 of step i / 4: row i % 2, and of 16 keys those of two groups of 8
    const int first = i / 4 * 16 + i % 4 / 2 * 8 + i % 2 * 2;
    asm("{\n .reg .b16 low, high;\n cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        " mov.b32 %0, {low, high};\n}"
        : "=r"(weights[i / 4][i % 4])
        : "f"(scores[first]), "f"(scores[first + 1]), "f"(scores[first + 4]), "f"(scores[first + 5]));
  }
}

// 2^(score * factor - shift), by the special function unit or, for POLYNOMIAL of 8 pairs of columns, by a polynomial of degree
// 2 in the other units: its relative error, 0.0018, is small beside that of e4m3, 0.06. `shift` is an integer.
struct Exponential {
  static constexpr float ROUND = 12582912;  // 1.5 * 2^23: the sum with it is rounded to an integer, in the low bits
  static constexpr float C0 = 1.00044316f, C1 = 0.703448409f, C2 = 0.238429136f;
  float factor, shift, least;

  DEVICE Exponential(float factor, float shift) : factor(factor), shift(shift), least((shift - 100) * (1 / factor)) {}
  DEVICE float by_unit(float score) const { return exp2_fast(score * factor - shift); }
  DEVICE float by_polynomial(float score) const {
    score = fmaxf(score, least);
    const float rounded = __fmaf_rn(score, factor, ROUND - shift);
    const float rest = __fmaf_rn(score, factor, -(rounded - (ROUND - shift)));
    const float power = __fmaf_rn(__fmaf_rn(C2, rest, C1), rest, C0);
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(rounded) << 23));
  }
};

// Online softmax in exponents of 2: `factor` is a power of two, so that maxima and differences are exact for any scores.
DEVICE void softmax8(Scores& scores, Rows& rows, float factor) {
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = MINUS_INFINITY;
#pragma unroll
    for (int i = 2 * r; i < BLOCK_N / 2; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    largest = fmaxf(rows.max[r], ceilf(largest * factor));
    const float base = largest == MINUS_INFINITY ? 0 : largest;  // fully masked so far
    rows.rescale[r] = exp2_fast(rows.max[r] - base);
    rows.max[r] = largest;
    shift[r] = base - WEIGHT_EXPONENT;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Exponential exponential(factor, shift[r]);
    float even = 0, odd = 0;
#pragma unroll
    for (int i = 2 * r; i < BLOCK_N / 2; i += 4) {
      const bool polynomial = i / 4 % 8 < POLYNOMIAL;
      even += scores[i] = polynomial ? exponential.by_polynomial(scores[i]) : exponential.by_unit(scores[i]);
      odd += scores[i + 1] = polynomial ? exponential.by_polynomial(scores[i + 1]) : exponential.by_unit(scores[i + 1]);
    }
    rows.sum[r] = rows.sum[r] * rows.rescale[r] + (even + odd);
  }
}

// ---- a consumer --------------------------------------------------------------------------------------------------

struct Results {
  char* output;
  Parts parts;
};

// A consumer's position in the rings and in its work: key tile `n`, counted down to `first`.
struct Consumer {
  const Memory memory;
  const int index;
  Ring keys, values;
  Schedule schedule;
  Work work;
  u32 query = 0;
  int n = 0, skips = 0;  // skips: trailing key tiles of the work that are masked for all queries of this consumer
  int query_exponent = 0, value_exponent = 0;

  DEVICE Consumer(const Memory& memory, int index, const Schedule& schedule)
      : memory(memory), index(index), schedule(schedule) {
    if (index == CONSUMERS - 1) pass_turn();  // the first is consumer 0's
  }
  DEVICE u32 await_keys() const {
    barrier_wait(memory.key_full(keys.stage), keys.parity);
    return memory.key(keys.stage);
  }
  DEVICE u32 await_values() const {
    barrier_wait(memory.value_full(values.stage), values.parity);
    return memory.value(values.stage);
  }
  DEVICE void release_query() const { release(memory.query_empty(work.query_buffer(index))); }
  DEVICE void release_keys() {
    release(memory.key_empty(keys.stage));
    keys.advance();
    if (n == work.first) release_query();  // after the last scores
  }
  DEVICE void release_values() {
    release(memory.value_empty(values.stage));
    values.advance();
  }
  DEVICE void wait_turn() const {
    if constexpr (TURNS) named_sync(TURN_BARRIER + index, 2 * WARPGROUP);
  }
  DEVICE void pass_turn() const {
    if constexpr (TURNS) named_arrive(TURN_BARRIER + (index + 1) % CONSUMERS, 2 * WARPGROUP);
  }
  // Skips the key tiles that are masked for all queries of this consumer.
  DEVICE void pass_unseen() {
#pragma unroll 1
    for (int i = 0; i < skips; ++i) {
      pass_turn();
      await_keys();
      release(memory.key_empty(keys.stage));
      keys.advance();
      await_values();
      release_values();
      wait_turn();
    }
  }

  // Starts the next work once its queries are loaded; returns false at the end of the list.
  DEVICE bool next_work(const Problem& problem) {
    if (!schedule.next(work)) return false;
    const int buffer = work.query_buffer(index);
    barrier_wait(memory.query_full(buffer), work.query_parity());
    query = memory.query(buffer);
    query_exponent = load_word(memory.query_exponent(buffer));
    asm volatile("" : "+r"(query));  // opaque, so that with a single buffer derived values do not stay in vector registers
    n = problem.key_blocks_of_warpgroup(top(), work.first, work.end) - 1;
    skips = work.end - 1 - n;
    return true;
  }
  DEVICE bool sees_nothing() const { return n < work.first; }

  // First row of this consumer, and of this thread.
  DEVICE int top() const { return work.block * BLOCK_M + index * WARPGROUP_ROWS; }
  DEVICE int row() const { return top() + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  DEVICE void mask(Scores& scores, const Problem& problem) const {
    const int first_of_all = problem.first_seen_by(top() + WARPGROUP_ROWS - 1);
    if ((n + 1) * BLOCK_N > problem.last_seen_by(top()) || n * BLOCK_N < first_of_all) {
      mask_scores(scores, problem, row(), n * BLOCK_N);
    }
  }

  // Waits for the scores of tile `n`, with at most PENDING later wgmma groups in flight, and converts them to weights.
  template <int PENDING>
  DEVICE void weigh(Scores& scores, const Problem& problem, Rows& rows) {
    const float factor = power_of_two(query_exponent + static_cast<int>(load_word(memory.key_exponent(keys.stage))));
    wgmma_wait<PENDING>();
    settle(scores);
    release_keys();
    mask(scores, problem);
    softmax8(scores, rows, factor);
  }

  // Factors of the output before the product with the current V tile is added: of the softmax, and of the new unit.
  DEVICE void to_unit(float (&factor)[2], const Rows& rows) {
    const int exponent = load_word(memory.value_exponent(values.stage));
    const float unit = power_of_two(value_exponent - exponent);
    value_exponent = exponent;
    factor[0] = rows.rescale[0] * unit, factor[1] = rows.rescale[1] * unit;
  }

  // Writes the rows of the work, or their part of a split tile; the last part to finish combines them.
  DEVICE void finish(Output& out, Rows& rows, const Problem& problem, const Results& results) const {
    const float unit[2] = {power_of_two(value_exponent), power_of_two(value_exponent)};
    scale_output(out, unit);
    const Part part(same_in_warp(schedule.part()));
    if (part.count > 0) {
      if (!same_in_warp(leave_part(out, rows, results.parts, part))) return;
      join_parts(out, rows, results.parts, part, 1);
    }
    const u64 plane_rows = static_cast<u64>(schedule.plane()) * problem.queries;
    finish_rows(out, rows, {nullptr, nullptr}, row(), problem);
    store_output(results.output + (plane_rows + row()) * problem.columns * 2, out, problem.queries - row(), problem.columns);
  }
};

// Processes the key tiles of a consumer's work, at least one, with overlap inside the consumer: S of the next keys and P V of
// the current ones run while it computes the softmax.
DEVICE void attend_overlapping(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  consumer.wait_turn();
  consumer.pass_unseen();
  Scores scores;
  Output product;
  Weights8 weights;
  float factor[2];
  start_scores(scores, consumer.query, consumer.await_keys());
  consumer.pass_turn();
  consumer.weigh<0>(scores, problem, rows);
  u32 value = consumer.await_values();
  consumer.to_unit(factor, rows);
  pack_weights8(weights, scores);
#pragma unroll 1
  while (consumer.n > consumer.work.first) {
    --consumer.n;
    const u32 key = consumer.await_keys();
    consumer.wait_turn();
    start_scores(scores, consumer.query, key);
    start_product(product, weights, value);
    consumer.pass_turn();
    consumer.weigh<1>(scores, problem, rows);
    const u32 used = consumer.memory.value_empty(consumer.values.stage);
    consumer.values.advance();
    value = consumer.await_values();  // ends the basic block: ptxas would move the wait for P V up, before the exponentials
    wgmma_wait<0>();
    settle(product);
    release(used);
    promote(out, product, factor);
    consumer.to_unit(factor, rows);
    pack_weights8(weights, scores);
  }
  consumer.wait_turn();
  start_product(product, weights, value);
  consumer.pass_turn();
  wgmma_wait<0>();
  settle(product);
  promote(out, product, factor);
  consumer.release_values();
}

// Processes the key tiles of a consumer's work without overlap inside the consumer: consumers overlap with each other.
DEVICE void attend_in_turns(Consumer& consumer, const Problem& problem, Output& out, Rows& rows) {
  consumer.wait_turn();
  consumer.pass_unseen();
  u32 key = consumer.await_keys();
#pragma unroll 1
  for (; consumer.n >= consumer.work.first; --consumer.n) {
    Weights8 weights;
    float factor[2];
    {
      Scores scores;
      start_scores(scores, consumer.query, key);
      consumer.pass_turn();
      consumer.weigh<0>(scores, problem, rows);
      pack_weights8(weights, scores);
    }
    const u32 value = consumer.await_values();
    consumer.to_unit(factor, rows);
    // before the turn, so that nothing delays the next scores
    if (consumer.n > consumer.work.first) key = consumer.await_keys();
    consumer.wait_turn();
    Output product;
    start_product(product, weights, value);
    wgmma_wait<0>();
    settle(product);
    promote(out, product, factor);
    consumer.release_values();
  }
  consumer.pass_turn();
}

DEVICE void consume(Consumer& consumer, const Problem& problem, const Results& results) {
  while (consumer.next_work(problem)) {
    Output out = {};
    Rows rows;
    consumer.value_exponent = 0;
    if (consumer.sees_nothing()) consumer.release_query();
    else if constexpr (OVERLAP) attend_overlapping(consumer, problem, out, rows);
    else attend_in_turns(consumer, problem, out, rows);
    consumer.finish(out, rows, problem, results);
  }
}

// ---- the kernel --------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL_NAME(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                const __grid_constant__ TensorMap value, const int* query_exponents, const int2* key_exponents,
                const int4* table, char* output, float4* parts, u64* marks, int planes, int heads, int heads_per_key,
                int queries, int keys, int columns, int window, int rounds, u64 serial) {
  extern __shared__ __align__(1024) char shared[];
  const Memory memory{shared_address(shared)};
  const Problem problem{planes, heads, heads_per_key, queries, keys, columns, 1, 0, window};
  const Schedule schedule{table + 2 * rounds * blockIdx.x};
  if (threadIdx.x == 0) {
    prefetch(schedule.entry);  // the longest latency of the prologue
    prefetch_map(query), prefetch_map(key), prefetch_map(value);
    init_barriers(memory);
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(memory, problem, schedule, {}, query, key, value, {query_exponents, key_exponents});
  } else {
    if constexpr (CONSUMERS == 1) give_registers<CONSUMER_REGISTERS>();
    else take_registers<CONSUMER_REGISTERS>();
    Consumer consumer(memory, same_in_warp(threadIdx.x / WARPGROUP) - 1, schedule);
    consume(consumer, problem, {output, {parts, marks, serial}});
  }
}
