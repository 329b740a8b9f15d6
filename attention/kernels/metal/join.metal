// Second pass of the forward kernel with split keys: O = sum of exp(lse_s - lse) O_s, lse = log sum exp(lse_s), over the
// spans s, where each logsumexp is stored as the sum of two floats, lse_s and rest_s.
// One simdgroup per query row; lanes iterate over the head dim.
  const int lines = parts_shape[1] * parts_shape[2] * parts_shape[3];
  const int splits = parts_shape[0];
  const int line = int(threadgroup_position_in_grid.x);
  const uint lane = thread_index_in_simdgroup;

  float largest = -INFINITY;
  for (int s = 0; s < splits; s++) {
    largest = metal::max(largest, lses[s * lses_strides[0] + line * lses_strides[1]]);
  }
  const float base = largest == -INFINITY ? 0.0f : largest;
  float total = 0.0f;
  for (int s = 0; s < splits; s++) {
    const float above = lses[s * lses_strides[0] + line * lses_strides[1]] - base;
    total += metal::exp2((above + rests[s * rests_strides[0] + line * rests_strides[1]]) * LOG2_E);
  }
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  for (int d = int(lane); d < D; d += 32) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      const float above = lses[s * lses_strides[0] + line * lses_strides[1]] - base;
      const float weight = metal::exp2((above + rests[s * rests_strides[0] + line * rests_strides[1]]) * LOG2_E);
      sum += weight * parts[(int64_t(s) * lines + line) * D + d];
    }
    o[int64_t(line) * D + d] = T(sum * inverse);
  }
  if (lane == 0) {
    const float log_total = metal::precise::log(total);
    const float made = total == 0.0f ? -INFINITY : base + log_total;
    lse[line] = made;
    rest[line] = total == 0.0f ? 0.0f : rest_of(made, base, log_total);
  }
