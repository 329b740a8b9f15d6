// Backward consumers for head dims up to 128: each owns 64 of the tile's 128 keys and keeps their dK and dV in registers.
//
//                    queries: 64 at a time, of every head that shares the key head
//                  +------+------+------+--
//   128 keys  wg 0 | S^T  |      |      |   64 keys    S^T = K Q^T, P^T = 2^(c S^T - logsumexp)    dV += P^T dO
//             wg 1 |      |      |      |   64 keys    dP^T = V dO^T, dS^T = P^T (dP^T - delta)    dK += dS^T Q
//                  +------+------+------+--
//                     |  dS through shared memory
//                     v
//                    dQ += dS K     wg 0 computes the left half of the columns, wg 1 the right half
//
// P^T and dS^T are left operands directly from their accumulator registers. dQ of a query tile is computed one step late,
// so that the consumers need not run in lockstep: one computes exponentials while the other's wgmmas run. A step:
//
//   tensor cores   [ dP(n) ][ dV(n)  ][ dK(n)  ][ dQ(n-1) ][ S(n+1)                          ]
//   other units    [ P(n)  ][ dS(n)  ]                     [ dQ(n-1) to device memory        ]
//
// A dS buffer is reused three tiles later, when both consumers have finished reading it: a consumer waits for dS(n-1) of
// both before it writes dS(n), and the other consumer has then completed its step n-2, which read dS(n-3).

constexpr bool HELD = HEAD_DIM == 64;      // K and V stay in registers, as left operands
constexpr bool LATE = HELD && !SOFTCAP;    // dV(n) is issued after dS(n)
constexpr bool AHEAD = HELD || !(SOFTCAP || ALIBI);  // registers suffice to prefetch the exponents of the next tile
using QueryGradient = float[QUERY_GRADIENTS];
using KeyOperand = u32[HEAD_DIM / 16][4];  // 64 rows of K or V as a left operand

DEVICE void load_operand(KeyOperand& operand, u32 rows) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; ++i) {
    const int unit = 2 * (i % 4) + lane / 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(operand[i][0]), "=r"(operand[i][1]), "=r"(operand[i][2]), "=r"(operand[i][3])
                 : "r"(rows + i / 4 * KeyTile::CHUNK_BYTES + row * 128 + ((unit ^ row % 8) << 4))
                 : "memory");
  }
}

// S^T or dP^T with K or V in registers.
DEVICE void start_scores(Scores& scores, const KeyOperand& left, u32 right) {
  const u64 right_tile = matrix_descriptor(right, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, offset = step % 4 * 32;
    wgmma_scores_held(scores, left[step], advance(right_tile, chunk * QueryTile::CHUNK_BYTES + offset), step > 0);
  }
  wgmma_commit();
}

// dV += P^T dO, or dK += dS^T Q.
DEVICE void start_gradient(Output& gradient, const Operand& left, u32 right) {
  const u64 right_tile = matrix_descriptor(right, QueryTile::CHUNK_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_Q / 16; ++step) wgmma_output(gradient, left[step], advance(right_tile, step * 2048), true);
  wgmma_commit();
}

// What a consumer holds of its half of the keys.
struct KeyHalf {
  Memory memory;
  int index;
  Ring ring;
  Scores scores;  // S^T, then P^T
  RowNumbers logsumexps;
  Output key_gradient, value_gradient;
  KeyOperand held_key, held_value;

  DEVICE KeyHalf(const Memory& memory, int index) : memory(memory), index(index) {}

  DEVICE u32 own_rows() const { return index * WARPGROUP_ROWS * 128; }

  DEVICE void start_next_scores() {
    await_phase(memory.full(ring.stage), ring.parity);
    if constexpr (HELD) start_scores(scores, held_key, memory.query(ring.stage));
    else start_scores(scores, memory.key() + own_rows(), memory.query(ring.stage));
    // before dQ is added in device memory: later loads and stores queue after those atomics
    if constexpr (AHEAD) load_rows(logsumexps, memory.rows(ring.stage));
  }
  // Ends a step. ptxas does not permit reading accumulators of wgmmas issued before the loop's back edge.
  DEVICE void finish_scores() {
    wgmma_wait<0>();
    settle(scores);
  }

  DEVICE void begin() {
    if constexpr (HELD) {
      load_operand(held_key, memory.key() + own_rows());
      load_operand(held_value, memory.value() + own_rows());
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) key_gradient[i] = value_gradient[i] = 0;
  }
  DEVICE void store(char* for_keys, char* for_values, const Problem& problem, int plane, int key) {
    settle(key_gradient);
    settle(value_gradient);
    const int row = key + index * WARPGROUP_ROWS + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const u64 place = (static_cast<u64>(plane) * problem.keys + row) * problem.columns * 2;
    const int rows_left = problem.keys - row, row_bytes = problem.columns * 2;
    store_gradient(for_keys + place, key_gradient, problem.scale, rows_left, problem.columns, row_bytes);
    store_gradient(for_values + place, value_gradient, 1, rows_left, problem.columns, row_bytes);
  }
};
