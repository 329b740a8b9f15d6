// Merges the partial results of all ranks for a few rows: each has its output of its own keys, and its logsumexp.
//
//   output    = sum over ranks of e^(s - m) output of the rank / sum over ranks of e^(s - m),  m the largest logsumexp s
//   logsumexp = m + log(sum over ranks of e^(s - m))
//
// Each rank writes its words to the inboxes of the others, in their memory, as pairs of word and serial number; a pair is
// written at once, so that a word is there when its number is (NCCL's LL protocol). A thread waits for what it merges itself. All
// ranks merge in the same order, so that they get the same bits. An inbox has two halves, used in turn: a rank that
// sends the next but one has received the next, whose sender had then finished this one.

DEVICE void send(u64 place, u32 word, u32 serial) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(place), "r"(word), "r"(serial) : "memory");
}

constexpr u32 MAX_POLLS = 1u << 28;  // of about a microsecond; then the kernel fails

// Waits for a word of another rank.
DEVICE u32 receive(u64 place, u32 serial) {
  for (u32 polls = 0;; ++polls) {
    u32 word, found;
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(word), "=r"(found) : "l"(place) : "memory");
    if (found == serial) return word;
    if (polls == MAX_POLLS) asm volatile("trap;");
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const u32* partial, const float* sums, const u64* inboxes, u32* output, float* logsumexp, int words,
                int row_words, int rank, int capacity, u64 serial) {
  const int word = blockIdx.x * THREADS + threadIdx.x;
  if (word >= words) return;
  const int row = word / row_words, at_sum = words + row;
  const u32 number = static_cast<u32>(serial);
  const bool first = word % row_words == 0;
  // where the words of a rank are in the inbox of another
  const auto half = [&](int of, int in) { return inboxes[in] + 8 * static_cast<u64>(capacity) * (number % 2 * RANKS + of); };
  const u32 own = partial[word];
  const float own_sum = sums[row];
  for (int other = 0; other < RANKS; ++other) {
    if (other == rank) continue;
    send(half(rank, other) + 8 * word, own, number);
    if (first) send(half(rank, other) + 8 * at_sum, __float_as_uint(own_sum), number);
  }
  float sum[RANKS], top = MINUS_INFINITY;
#pragma unroll
  for (int of = 0; of < RANKS; ++of) {
    sum[of] = of == rank ? own_sum : __uint_as_float(receive(half(of, rank) + 8 * at_sum, number));
    top = fmaxf(top, sum[of]);
  }
  const float base = top == MINUS_INFINITY ? 0 : top;
  float total = 0, x = 0, y = 0;
#pragma unroll
  for (int of = 0; of < RANKS; ++of) {
    const u32 pair = of == rank ? own : receive(half(of, rank) + 8 * word, number);
    const float weight = expf(sum[of] - base);
    total += weight, x += weight * low_of(pair), y += weight * high_of(pair);
  }
  const float inverse = total > 0 ? 1 / total : 0;
  output[word] = pack(x * inverse, y * inverse);
  if (first && logsumexp != nullptr) logsumexp[row] = total != 0 ? base + logf(total) : MINUS_INFINITY;  // NaN of a NaN
}
