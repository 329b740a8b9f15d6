// FlashAttention backward kernel: dQ, and each row's delta = sum(dO * O) - dLSE, which the kernel of dK and dV reads.
//
//   S = Q K', P = exp(S - lse), dP = dO V', dS = P (dP - delta) . slope . scale, dQ = sum of dS K
//
//   Q, dO (BLOCK_Q x D): threadgroup memory, loaded once; each simdgroup owns 8 of the rows
//   K, V  (BLOCK_K x CHUNK): threadgroup memory, iterated over the keys; in chunks of the head dim if CHUNK < D
//   S, dP (8 x BLOCK_K) and dQ (8 x D): in registers
//
// LISTS: the keys are those of the listed tiles.
  constexpr int THREADS = SIMDGROUPS * 32;
  constexpr int DIMS = D / 8;
  constexpr int KEYS = BLOCK_K / 8;
  constexpr int CHUNKS = D / CHUNK;
  constexpr int PITCH = D + PAD;
  constexpr int CHUNK_PITCH = CHUNK + PAD;
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int heads = q_shape[1];
  const uint lane = thread_index_in_simdgroup;
  const int simdgroup_at = int(simdgroup_index_in_threadgroup);
  int batch = int(threadgroup_position_in_grid.z);
  int head = int(threadgroup_position_in_grid.y);
  int first_query = int(threadgroup_position_in_grid.x) * BLOCK_Q;
  int list = 0;
  if (LISTS) {
    const Listed listed = scheduled(lists, first_query / LIST_Q);
    list = ((listed.batch * lists_shape[1] + listed.head) * lists_shape[2] + listed.tile) * LIST_RECORD;
    batch = batch * lists_shape[0] + listed.batch;
    head += listed.head;
    first_query = listed.tile * LIST_Q + first_query % LIST_Q;
  }
  const int key_head = head / (heads / k_shape[1]);
  const short fragment_r = fragment_row(lane);
  const short fragment_c = fragment_column(lane);
  const int own = simdgroup_at * 8;
  const int query = first_query + own + fragment_r;

  threadgroup T query_tile[BLOCK_Q * PITCH];
  threadgroup T upstream_tile[BLOCK_Q * PITCH];
  threadgroup T key_tile[BLOCK_K * CHUNK_PITCH];
  threadgroup T value_tile[BLOCK_K * CHUNK_PITCH];

  const device T* keys_at = k + batch * k_strides[0] + key_head * k_strides[1];
  const device T* values_at = v + batch * v_strides[0] + key_head * v_strides[1];
  load_tile<T, BLOCK_Q, D, PITCH, THREADS>(
      q + batch * q_strides[0] + head * q_strides[1] + first_query * q_strides[2], q_strides[2], q_strides[3],
      query_tile, queries - first_query, thread_index_in_threadgroup);
  load_tile<T, BLOCK_Q, D, PITCH, THREADS>(
      d_o + batch * d_o_strides[0] + head * d_o_strides[1] + first_query * d_o_strides[2], d_o_strides[2],
      d_o_strides[3], upstream_tile, queries - first_query, thread_index_in_threadgroup);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // B1: Q and dO are loaded

  const int64_t first_line = (int64_t(batch) * heads + head) * queries + first_query + own;
  const int64_t line = first_line + fragment_r;

  // The diagonal of dO O', summed in the same order over the head dim as dP: in a row with a single key, where O is V, the
  // two are bitwise equal and dS is exactly 0.
  constexpr int PART = part_width<T, D>();
  Fragment outputs;
  clear<1>(&outputs);
  for (int d0 = 0; d0 < D; d0 += PART) {
    Fragment part;
    clear<1>(&part);
    for (int d = d0; d < d0 + PART; d += 8) {
      Fragment upstream = read_block(upstream_tile + own * PITCH + d, PITCH, fragment_r, fragment_c);
      Fragment turned;
      UNROLL
      for (int e = 0; e < 2; e++) {
        const int at = fragment_c + e;
        const bool is_row = first_query + own + at < queries;
        turned.thread_elements()[e] = is_row ? float(o[(first_line + at) * D + d + fragment_r]) : 0.0f;
      }
      simdgroup_multiply_accumulate(part, upstream, turned, part);
    }
    add<1>(&outputs, &part);
  }
  float mean = 0.0f;
  UNROLL
  for (int e = 0; e < 2; e++) {
    mean += fragment_c + e == fragment_r ? outputs.thread_elements()[e] : 0.0f;
  }
  mean = row_sum(mean);
  float base = 0.0f;
  float beyond = 0.0f;
  if (query < queries) {
    const float found = lse[batch * lse_strides[0] + head * lse_strides[1] + query * lse_strides[2]];
    base = found == -INFINITY ? 0.0f : found;
    beyond = rest[batch * rest_strides[0] + head * rest_strides[1] + query * rest_strides[2]];
    if (LOGSUMEXP) {
      mean -= d_lse[batch * d_lse_strides[0] + head * d_lse_strides[1] + query * d_lse_strides[2]];
    }
    if (fragment_c == 0) {
      delta[line] = mean;
    }
  }

  Fragment sums[DIMS];
  clear<DIMS>(sums);
  const int last_query = metal::min(first_query + BLOCK_Q, queries) - 1;
  const float alibi = ALIBI ? slopes[head] : 0.0f;
  const int entry0 = LISTS ? lists[list] : 0;
  int from = first_key<WINDOW, BLOCK_K>(first_query, queries, keys, window);
  int end = key_end<CAUSAL>(last_query, queries, keys);
  if (LISTS) {
    from = 0;
    end = first_query < queries ? (lists[list + 1] - entry0) * LIST_K : 0;
  }
  for (int step = from; step < end; step += BLOCK_K) {
    int key0 = step;
    uint seen = all_bits<BLOCK_K>();  // of a row per lane
    if (LISTS) {
      const int entry = (entry0 + step / LIST_K) * 2;
      key0 = entries[entry] * LIST_K + step % LIST_K;
      seen = load_bits<LIST_Q, LIST_K, BLOCK_Q, BLOCK_K>(
          bits, entries[entry + 1], first_query % LIST_Q, step % LIST_K, lane);
      if (key0 >= keys || simd_or(seen) == 0) {  // for all simdgroups alike
        continue;
      }
    }
    Fragment scores[KEYS];
    Fragment products[KEYS];
    clear<KEYS>(scores);
    clear<KEYS>(products);
    UNROLL
    for (int c = 0; c < CHUNKS; c++) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // B2: the previous K and V are no longer read
      load_tile<T, BLOCK_K, CHUNK, CHUNK_PITCH, THREADS>(
          keys_at + key0 * k_strides[2] + c * CHUNK * k_strides[3], k_strides[2], k_strides[3], key_tile, keys - key0,
          thread_index_in_threadgroup);
      load_tile<T, BLOCK_K, CHUNK, CHUNK_PITCH, THREADS>(
          values_at + key0 * v_strides[2] + c * CHUNK * v_strides[3], v_strides[2], v_strides[3], value_tile,
          keys - key0, thread_index_in_threadgroup);
      threadgroup_barrier(mem_flags::mem_threadgroup);  // B3: K and V are loaded
      multiply_in_parts<T, KEYS, CHUNK>(
          scores, query_tile + own * PITCH + c * CHUNK, PITCH, key_tile, CHUNK_PITCH, fragment_r, fragment_c);
      multiply_in_parts<T, KEYS, CHUNK>(
          products, upstream_tile + own * PITCH + c * CHUNK, PITCH, value_tile, CHUNK_PITCH, fragment_r, fragment_c);
    }
    const bool is_whole = MASK == 0 && (!LISTS || simd_and(seen) == all_bits<BLOCK_K>())
        && is_all_seen<CAUSAL, WINDOW>(first_query, last_query, key0, key0 + BLOCK_K - 1, queries, keys, window);
    const uint own_seen = LISTS ? simd_shuffle(seen, ushort(own + fragment_r)) : seen;
    UNROLL
    for (int j = 0; j < KEYS; j++) {
      UNROLL
      for (int e = 0; e < 2; e++) {
        const int key = key0 + j * 8 + fragment_c + e;
        float s = scores[j].thread_elements()[e] * scale;
        float slope = scale;
        if (SOFTCAP) {
          const float squashed = metal::precise::tanh(s / softcap);
          s = softcap * squashed;
          slope *= 1.0f - squashed * squashed;
        }
        if (ALIBI) {
          s = with_alibi(s, alibi, query, key, queries, keys);
        }
        if (!is_whole
            && (!is_seen<CAUSAL, WINDOW>(query, key, queries, keys, window)
                || (LISTS && !has_bit(own_seen, j * 8 + fragment_c + e)))) {
          s = -INFINITY;
        } else if (MASK != 0) {
          const int64_t at =
              batch * mask_strides[0] + head * mask_strides[1] + query * mask_strides[2] + key * mask_strides[3];
          s = MASK == 2 ? masked(s, float(mask[at])) : bool(mask[at]) ? s : -INFINITY;
        }
        const float weight = metal::exp2((s - base - beyond) * LOG2_E);
        scores[j].thread_elements()[e] = weight * (products[j].thread_elements()[e] - mean) * slope;
      }
    }
    UNROLL
    for (int c = CHUNKS - 1; c >= 0; c--) {  // backwards, because the last chunk of K is still loaded
      if (c < CHUNKS - 1) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // B4: the previous chunk is no longer read
        load_tile<T, BLOCK_K, CHUNK, CHUNK_PITCH, THREADS>(
            keys_at + key0 * k_strides[2] + c * CHUNK * k_strides[3], k_strides[2], k_strides[3], key_tile,
            keys - key0, thread_index_in_threadgroup);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // B5: the chunk of K is loaded
      }
      multiply<T, KEYS, CHUNK>(sums + c * (CHUNK / 8), scores, key_tile, CHUNK_PITCH, fragment_r, fragment_c);
    }
  }

  if (query < queries) {
    UNROLL
    for (int d = 0; d < DIMS; d++) {
      d_q[line * D + d * 8 + fragment_c] = T(sums[d].thread_elements()[0]);
      d_q[line * D + d * 8 + fragment_c + 1] = T(sums[d].thread_elements()[1]);
    }
  }
