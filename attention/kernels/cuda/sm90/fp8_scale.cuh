// Scales of tiles in fp8 (e4m3): powers of two.

constexpr float LARGEST = 448;
constexpr int MIN_EXPONENT = -30, MAX_EXPONENT = 60;

// Exponent of the smallest power of two, within limits, that `largest` divided by it is at most LARGEST.
DEVICE int exponent_for(float largest) {
  const u32 bits = __float_as_uint(fminf(largest * (1 / LARGEST), 1e38f));
  const int exponent = static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0);
  return max(MIN_EXPONENT, min(MAX_EXPONENT, exponent));
}
