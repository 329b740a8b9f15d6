// FlashAttention forward kernel with logsumexp (Dao et al., 2022; Dao, 2023).
//
//                       +----------- BLOCK_K keys -----------+
//                       |  K' , then V in the same buffer    |   threadgroup memory, iterated over the keys
//                       +------------------------------------+
//   +-------------+     +------------------------------------+
//   | Q  (D wide) |     |  S, then P: in registers           |   each simdgroup owns 8 query rows of BLOCK_Q
//   +-------------+     +------------------------------------+
//                       O (8 x D), maximum and sum of each row: in registers
//
// LISTS: the keys are those of the listed tiles. PACKED (GQA row packing): the rows are those of all query heads that share a
// key head, and each of several threadgroups processes a span of the keys; join.metal combines their normalised outputs and
// logsumexps. There are then more than BLOCK_Q / 8 simdgroups; the additional ones only load. QUANTIZED: keys and values are
// dequantized on their way into the tile (quantized.metal).
  constexpr int THREADS = SIMDGROUPS * 32;
  constexpr int DIMS = D / 8;
  constexpr int KEYS = BLOCK_K / 8;
  constexpr int PITCH = D + PAD;
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int heads = q_shape[1];
  const int group = heads / k_shape[1];
  const int packed = PACKED ? group : 1;
  const int rows = packed * queries;
  const uint lane = thread_index_in_simdgroup;
  const int simdgroup_at = int(simdgroup_index_in_threadgroup);
  const int span = division[0];  // keys of a split
  const int splits = division[1];
  const int split = int(threadgroup_position_in_grid.z) % splits;
  int batch = int(threadgroup_position_in_grid.z) / splits;
  int plane = int(threadgroup_position_in_grid.y);
  int first_row = int(threadgroup_position_in_grid.x) * BLOCK_Q;
  int list = 0;
  if (LISTS) {
    const Listed own = scheduled(lists, first_row / LIST_Q);
    list = ((own.batch * lists_shape[1] + own.head) * lists_shape[2] + own.tile) * LIST_RECORD;
    batch = batch * lists_shape[0] + own.batch;
    plane += own.head;
    first_row = own.tile * LIST_Q + first_row % LIST_Q;
  }
  const int key_head = PACKED ? plane : plane / group;
  const short fragment_r = fragment_row(lane);
  const short fragment_c = fragment_column(lane);
  const int row = first_row + simdgroup_at * 8 + fragment_r;
  const int head = plane * packed + row / queries;
  const int query = row % queries;
  const bool computes = simdgroup_at * 8 < BLOCK_Q;
  const bool is_row = computes && row < rows;

  threadgroup T query_tile[BLOCK_Q * PITCH];
  threadgroup T key_tile[BLOCK_K * PITCH];

#ifdef QUANTIZED
  const auto key_rows = packed_rows<KEY_MODE, KEY_BITS, KEY_GROUP>(
      k, k_strides, key_scales, key_scales_strides, key_biases, key_biases_strides, batch, key_head);
  const auto value_rows = packed_rows<VALUE_MODE, VALUE_BITS, VALUE_GROUP>(
      v, v_strides, value_scales, value_scales_strides, value_biases, value_biases_strides, batch, key_head);
#else
  const DenseRows<T> key_rows = {k + batch * k_strides[0] + key_head * k_strides[1], k_strides[2], k_strides[3]};
  const DenseRows<T> value_rows = {v + batch * v_strides[0] + key_head * v_strides[1], v_strides[2], v_strides[3]};
#endif
  if (PACKED) {
    for (int i = int(thread_index_in_threadgroup); i < BLOCK_Q * D; i += THREADS) {
      const int r = first_row + i / D;
      const int64_t at = batch * q_strides[0] + (plane * packed + r / queries) * q_strides[1]
          + (r % queries) * q_strides[2] + (i % D) * q_strides[3];
      query_tile[i / D * PITCH + i % D] = r < rows ? T(q[at]) : T(0.0f);
    }
  } else {
    load_tile<T, BLOCK_Q, D, PITCH, THREADS>(
        q + batch * q_strides[0] + plane * q_strides[1] + first_row * q_strides[2], q_strides[2], q_strides[3],
        query_tile, queries - first_row, thread_index_in_threadgroup);
  }

  Fragment sums[DIMS];
  clear<DIMS>(sums);
  float largest = SINKS && split == 0 && is_row ? float(sinks[head]) : -INFINITY;
  float total = largest == -INFINITY ? 0.0f : 1.0f;

  const int first_query = PACKED ? 0 : first_row;
  const int last_query = PACKED ? queries - 1 : metal::min(first_row + BLOCK_Q, queries) - 1;
  const float alibi = ALIBI && is_row ? slopes[head] : 0.0f;
  const int entry0 = LISTS ? lists[list] : 0;
  int from = metal::max(first_key<WINDOW, BLOCK_K>(first_query, queries, keys, window), split * span);
  int end = metal::min(key_end<CAUSAL>(last_query, queries, keys), split * span + span);
  if (LISTS) {
    from = 0;
    end = first_row < queries ? (lists[list + 1] - entry0) * LIST_K : 0;
  }

  for (int step = from; step < end; step += BLOCK_K) {
    int key0 = step;
    uint seen = all_bits<BLOCK_K>();  // of a row per lane
    if (LISTS) {
      const int entry = (entry0 + step / LIST_K) * 2;
      key0 = entries[entry] * LIST_K + step % LIST_K;
      seen = load_bits<LIST_Q, LIST_K, BLOCK_Q, BLOCK_K>(
          bits, entries[entry + 1], first_row % LIST_Q, step % LIST_K, lane);
      if (key0 >= keys || simd_or(seen) == 0) {  // for all simdgroups alike
        continue;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // B1: V is no longer read
    load_rows<T, BLOCK_K, D, PITCH, THREADS>(key_rows, key0, keys, key_tile, thread_index_in_threadgroup);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // B2: K and Q are loaded
    Fragment scores[KEYS];
    clear<KEYS>(scores);
    if (computes) {
      multiply_in_parts<T, KEYS, D>(
          scores, query_tile + simdgroup_at * 8 * PITCH, PITCH, key_tile, PITCH, fragment_r, fragment_c);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // B3: K is no longer read
    load_rows<T, BLOCK_K, D, PITCH, THREADS>(value_rows, key0, keys, key_tile, thread_index_in_threadgroup);

    if (computes) {
      // Most tiles need no masking by position; rows past the end, which are not written, may attend to them too.
      const bool is_whole = MASK == 0 && (!LISTS || simd_and(seen) == all_bits<BLOCK_K>())
          && is_all_seen<CAUSAL, WINDOW>(first_query, last_query, key0, key0 + BLOCK_K - 1, queries, keys, window);
      const uint own_seen = LISTS ? simd_shuffle(seen, ushort(simdgroup_at * 8 + fragment_r)) : seen;
      float now = largest;
      UNROLL
      for (int j = 0; j < KEYS; j++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
          const int key = key0 + j * 8 + fragment_c + e;
          float s = scores[j].thread_elements()[e] * scale;
          if (SOFTCAP) {
            s = softcap * metal::precise::tanh(s / softcap);
          }
          if (ALIBI) {
            s = with_alibi(s, alibi, query, key, queries, keys);
          }
          if (!is_whole
              && (!is_row || !is_seen<CAUSAL, WINDOW>(query, key, queries, keys, window)
                  || (LISTS && !has_bit(own_seen, j * 8 + fragment_c + e)))) {
            s = -INFINITY;
          } else if (MASK != 0) {
            const int64_t at =
                batch * mask_strides[0] + head * mask_strides[1] + query * mask_strides[2] + key * mask_strides[3];
            s = MASK == 2 ? masked(s, float(mask[at])) : bool(mask[at]) ? s : -INFINITY;
          }
          scores[j].thread_elements()[e] = s;
          now = metal::max(now, s);
        }
      }
      now = row_max(now);
      const float base = now == -INFINITY ? 0.0f : now;  // fully masked so far
      const float shrink = metal::exp2((largest - base) * LOG2_E);
      float added = 0.0f;
      UNROLL
      for (int j = 0; j < KEYS; j++) {
        UNROLL
        for (int e = 0; e < 2; e++) {
          const float weight = metal::exp2((scores[j].thread_elements()[e] - base) * LOG2_E);
          scores[j].thread_elements()[e] = weight;
          added += weight;
        }
      }
      total = total * shrink + row_sum(added);
      largest = now;
      UNROLL
      for (int d = 0; d < DIMS; d++) {
        sums[d].thread_elements()[0] *= shrink;
        sums[d].thread_elements()[1] *= shrink;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // B4: V is loaded
    if (computes) {
      multiply<T, KEYS, D>(sums, scores, key_tile, PITCH, fragment_r, fragment_c);
    }
  }

  if (is_row) {
    const int batches = q_shape[0];
    const int64_t line = (int64_t(split * batches + batch) * heads + head) * queries + query;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    UNROLL
    for (int d = 0; d < DIMS; d++) {
      o[line * D + d * 8 + fragment_c] = OUT(sums[d].thread_elements()[0] * inverse);
      o[line * D + d * 8 + fragment_c + 1] = OUT(sums[d].thread_elements()[1] * inverse);
    }
    if (fragment_c == 0) {
      const float log_total = metal::precise::log(total);
      const float made = total == 0.0f ? -INFINITY : largest + log_total;  // NaN of a row with an infinite score
      lse[line] = made;
      rest[line] = total == 0.0f ? 0.0f : rest_of(made, largest, log_total);
    }
  }
