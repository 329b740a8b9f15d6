// FlashAttention backward kernel: dK and dV. Two simdgroups share 8 keys, so that each has registers for one accumulator:
//
//   even simdgroup:  S' = K Q',   P' = exp(S' - lse)  -- P' slope scale -->   dV = sum of P' dO
//   odd simdgroup:   dP' = V dO'                dS' = (that) (dP' - delta)    dK = sum of dS' Q
//
//   K, V  (BLOCK_K x D): threadgroup memory, loaded once
//   Q, dO (BLOCK_Q x CHUNK): threadgroup memory, iterated over the queries of all heads that share the key head
//   S' or dP' (8 x BLOCK_Q), dV or dK (8 x D): in registers; the weights are exchanged through threadgroup memory
//
// LISTS: the queries are those of the listed tiles, which differ between heads unless these share their lists.
  constexpr int THREADS = SIMDGROUPS * 32;
  constexpr int DIMS = D / 8;
  constexpr int QUERIES = BLOCK_Q / 8;
  constexpr int CHUNKS = D / CHUNK;
  constexpr int PITCH = D + PAD;
  constexpr int CHUNK_PITCH = CHUNK + PAD;
  const int queries = q_shape[2];
  const int keys = k_shape[2];
  const int heads = q_shape[1];
  const int key_heads = k_shape[1];
  const int group = heads / key_heads;
  const uint lane = thread_index_in_simdgroup;
  const int pair = int(simdgroup_index_in_threadgroup) / 2;
  const bool odd = simdgroup_index_in_threadgroup % 2 == 1;
  int batch = int(threadgroup_position_in_grid.z);
  int key_head = int(threadgroup_position_in_grid.y);
  int key0 = int(threadgroup_position_in_grid.x) * BLOCK_K;
  int list0 = 0;  // of the first head
  int lists_per_head = 0;
  if (LISTS) {
    const Listed listed = scheduled(lists, key0 / LIST_K);
    list0 = (listed.batch * lists_shape[1] * lists_shape[2] + listed.tile) * LIST_RECORD;
    lists_per_head = lists_shape[1] > 1 ? lists_shape[2] * LIST_RECORD : 0;
    batch = batch * lists_shape[0] + listed.batch;
    key_head += listed.head;
    key0 = listed.tile * LIST_K + key0 % LIST_K;
  }
  const short fragment_r = fragment_row(lane);
  const short fragment_c = fragment_column(lane);
  const int key = key0 + pair * 8 + fragment_r;

  threadgroup T key_tile[BLOCK_K * PITCH];
  threadgroup T value_tile[BLOCK_K * PITCH];
  threadgroup T query_tile[BLOCK_Q * CHUNK_PITCH];
  threadgroup T upstream_tile[BLOCK_Q * CHUNK_PITCH];
  threadgroup float2 weights[BLOCK_K * BLOCK_Q / 2];
  threadgroup float row_bases[BLOCK_Q];
  threadgroup float row_rests[BLOCK_Q];
  threadgroup float row_means[BLOCK_Q];

  load_tile<T, BLOCK_K, D, PITCH, THREADS>(
      k + batch * k_strides[0] + key_head * k_strides[1] + key0 * k_strides[2], k_strides[2], k_strides[3], key_tile,
      keys - key0, thread_index_in_threadgroup);
  load_tile<T, BLOCK_K, D, PITCH, THREADS>(
      v + batch * v_strides[0] + key_head * v_strides[1] + key0 * v_strides[2], v_strides[2], v_strides[3], value_tile,
      keys - key0, thread_index_in_threadgroup);
  const threadgroup T* own = (odd ? value_tile : key_tile) + pair * 8 * PITCH;
  const threadgroup T* first = odd ? upstream_tile : query_tile;
  const threadgroup T* second = odd ? query_tile : upstream_tile;

  Fragment sums[DIMS];
  clear<DIMS>(sums);
  const int shift = keys - queries;
  int from = CAUSAL ? metal::max(0, key0 - shift) / BLOCK_Q * BLOCK_Q : 0;
  int end = WINDOW ? metal::min(queries, metal::min(key0 + BLOCK_K, keys) - 1 - shift + window) : queries;
  int entry0 = 0;
  for (int head = key_head * group; head < key_head * group + group; head++) {
    const device T* queries_at = q + batch * q_strides[0] + head * q_strides[1];
    const device T* upstream_at = d_o + batch * d_o_strides[0] + head * d_o_strides[1];
    const device float* lse_at = lse + batch * lse_strides[0] + head * lse_strides[1];
    const device float* rest_at = rest + batch * rest_strides[0] + head * rest_strides[1];
    const device float* delta_at = delta + batch * delta_strides[0] + head * delta_strides[1];
    const float alibi = ALIBI ? slopes[head] : 0.0f;
    if (LISTS) {
      const int list = list0 + head * lists_per_head;
      entry0 = lists[list];
      from = 0;
      end = key0 < keys ? (lists[list + 1] - entry0) * LIST_Q : 0;
    }
    for (int step = from; step < end; step += BLOCK_Q) {
      int query0 = step;
      uint seen = all_bits<BLOCK_K>();  // of a row per lane
      if (LISTS) {
        const int entry = (entry0 + step / LIST_Q) * 2;
        query0 = entries[entry] * LIST_Q + step % LIST_Q;
        seen = load_bits<LIST_Q, LIST_K, BLOCK_Q, BLOCK_K>(
            bits, entries[entry + 1], step % LIST_Q, key0 % LIST_K, lane);
        if (query0 >= queries || simd_or(seen) == 0) {  // for all simdgroups alike
          continue;
        }
      }
      Fragment scores[QUERIES];
      clear<QUERIES>(scores);
      UNROLL
      for (int c = 0; c < CHUNKS; c++) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // B1: the previous Q and dO are no longer read
        load_tile<T, BLOCK_Q, CHUNK, CHUNK_PITCH, THREADS>(
            queries_at + query0 * q_strides[2] + c * CHUNK * q_strides[3], q_strides[2], q_strides[3], query_tile,
            queries - query0, thread_index_in_threadgroup);
        load_tile<T, BLOCK_Q, CHUNK, CHUNK_PITCH, THREADS>(
            upstream_at + query0 * d_o_strides[2] + c * CHUNK * d_o_strides[3], d_o_strides[2], d_o_strides[3],
            upstream_tile, queries - query0, thread_index_in_threadgroup);
        for (int i = int(thread_index_in_threadgroup); c == 0 && i < BLOCK_Q; i += THREADS) {
          const bool is_row = query0 + i < queries;
          const float found = is_row ? lse_at[(query0 + i) * lse_strides[2]] : 0.0f;
          row_bases[i] = found == -INFINITY ? 0.0f : found;
          row_rests[i] = is_row ? rest_at[(query0 + i) * rest_strides[2]] : 0.0f;
          row_means[i] = is_row ? delta_at[(query0 + i) * delta_strides[2]] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // B2: Q and dO, and in the first iteration K and V, are loaded
        multiply_in_parts<T, QUERIES, CHUNK>(
            scores, own + c * CHUNK, PITCH, first, CHUNK_PITCH, fragment_r, fragment_c);
      }
      threadgroup float2* shared = weights + pair * QUERIES * 32 + int(lane);
      if (!odd) {
        const bool is_whole = MASK == 0 && (!LISTS || simd_and(seen) == all_bits<BLOCK_K>())
            && is_all_seen<CAUSAL, WINDOW>(
                query0, query0 + BLOCK_Q - 1, key0, key0 + BLOCK_K - 1, queries, keys, window);
        UNROLL
        for (int j = 0; j < QUERIES; j++) {
          float2 passed;
          UNROLL
          for (int e = 0; e < 2; e++) {
            const int query = query0 + j * 8 + fragment_c + e;
            const uint row_seen = LISTS && !is_whole ? simd_shuffle(seen, ushort(j * 8 + fragment_c + e)) : seen;
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
                    || (LISTS && !has_bit(row_seen, pair * 8 + fragment_r)))) {
              s = -INFINITY;
            } else if (MASK != 0) {
              const int64_t at =
                  batch * mask_strides[0] + head * mask_strides[1] + query * mask_strides[2] + key * mask_strides[3];
              s = MASK == 2 ? masked(s, float(mask[at])) : bool(mask[at]) ? s : -INFINITY;
            }
            const int at_row = j * 8 + fragment_c + e;
            const float weight = metal::exp2((s - row_bases[at_row] - row_rests[at_row]) * LOG2_E);
            scores[j].thread_elements()[e] = weight;
            passed[e] = weight * slope;
          }
          shared[j * 32] = passed;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);  // B3: the weights are stored
      if (odd) {
        UNROLL
        for (int j = 0; j < QUERIES; j++) {
          const float2 passed = shared[j * 32];
          UNROLL
          for (int e = 0; e < 2; e++) {
            const float product = scores[j].thread_elements()[e] - row_means[j * 8 + fragment_c + e];
            scores[j].thread_elements()[e] = passed[e] * product;
          }
        }
      }
      UNROLL
      for (int c = CHUNKS - 1; c >= 0; c--) {  // backwards, because the last chunk of Q and dO is still loaded
        if (c < CHUNKS - 1) {
          threadgroup_barrier(mem_flags::mem_threadgroup);  // B4: the previous chunk is no longer read
          load_tile<T, BLOCK_Q, CHUNK, CHUNK_PITCH, THREADS>(
              queries_at + query0 * q_strides[2] + c * CHUNK * q_strides[3], q_strides[2], q_strides[3], query_tile,
              queries - query0, thread_index_in_threadgroup);
          load_tile<T, BLOCK_Q, CHUNK, CHUNK_PITCH, THREADS>(
              upstream_at + query0 * d_o_strides[2] + c * CHUNK * d_o_strides[3], d_o_strides[2], d_o_strides[3],
              upstream_tile, queries - query0, thread_index_in_threadgroup);
          threadgroup_barrier(mem_flags::mem_threadgroup);  // B5: the chunk is loaded
        }
        multiply<T, QUERIES, CHUNK>(
            sums + c * (CHUNK / 8), scores, second, CHUNK_PITCH, fragment_r, fragment_c);
      }
    }
  }

  if (key < keys) {
    const int64_t line = ((int64_t(batch) * key_heads + key_head) * keys + key) * D;
    device T* out = odd ? d_k : d_v;
    UNROLL
    for (int d = 0; d < DIMS; d++) {
      out[line + d * 8 + fragment_c] = T(sums[d].thread_elements()[0]);
      out[line + d * 8 + fragment_c + 1] = T(sums[d].thread_elements()[1]);
    }
  }
