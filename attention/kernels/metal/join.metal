// Joins what groups with a span of the keys each have made: O = sum of exp(lse_s - lse) O_s, lse = log sum exp(lse_s).
// One simdgroup a query row; lanes walk the head dim.
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
    total += metal::exp2((lses[s * lses_strides[0] + line * lses_strides[1]] - base) * LOG2_E);
  }
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  for (int d = int(lane); d < D; d += 32) {
    float sum = 0.0f;
    for (int s = 0; s < splits; s++) {
      const float weight = metal::exp2((lses[s * lses_strides[0] + line * lses_strides[1]] - base) * LOG2_E);
      sum += weight * parts[(int64_t(s) * lines + line) * D + d];
    }
    o[int64_t(line) * D + d] = T(sum * inverse);
  }
  if (lane == 0) {
    lse[line] = total > 0.0f ? base + metal::precise::log(total) : -INFINITY;
  }
