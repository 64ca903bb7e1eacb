// Eight floats at a time, and the loads that widen float16 and int8.
//
// Included first by every decoder file: arithmetic is IEEE's, in the order it is written. A row of
// logits must not depend, to the bit, on how many rows the compiler vectorised beside it.
#pragma once
#pragma GCC optimize("no-fast-math", "fp-contract=off")

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define DECODER_AVX2 1
#include <immintrin.h>
#endif

namespace decoder {

constexpr int64_t kLanes = 8;

using Vec = float __attribute__((vector_size(32)));
using IntVec = int32_t __attribute__((vector_size(32)));

struct Half {
  uint16_t bits;
};

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

#ifdef DECODER_AVX2

inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline Vec load(const Half* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

#else

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

inline float widen(Half half) {
  // Shifted into place, exponents differ by a power of two, which a product corrects exactly;
  // infinities and NaN get the largest exponent by hand.
  uint32_t bits = static_cast<uint32_t>(half.bits & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((half.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= static_cast<uint32_t>(half.bits & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Vec load(const Half* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}

inline Vec load(const int8_t* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

#endif

// The first `count` (under eight) values, then zeros.
template <class T>
inline Vec load_some(const T* p, int64_t count) {
  T values[kLanes] = {};
  std::memcpy(values, p, count * sizeof(T));
  return load(values);
}

// Without it, g++ loads a value again for each use: cheap alone, but loads are what a product of
// few rows runs out of first.
inline void keep_in_register(Vec& v) {
#ifdef DECODER_AVX2
  asm("" : "+x"(v));
#endif
}

// Sum of the lanes, always in the same order.
inline float reduce(Vec v) {
  using Quad = float __attribute__((vector_size(16)));
  const auto* halves = reinterpret_cast<const Quad*>(&v);
  const Quad s = halves[0] + halves[1];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// The larger of each pair; NaN in `v` stays.
inline Vec at_least(Vec v, Vec low) { return v < low ? low : v; }
inline Vec at_most(Vec v, Vec high) { return v > high ? high : v; }

inline float peak(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x to about one unit in the last place; 0 below e^-87, no more than e^88; NaN stays NaN.
inline Vec exp(Vec x) {
  const IntVec tiny = x < splat(-87.0f);
  x = at_most(at_least(x, splat(-87.0f)), splat(88.0f));
  const Vec round = splat(0x1.8p23f);  // adding it rounds to a whole number in the low bits
  const Vec shifted = fma(x, splat(1.44269504f), round);
  const Vec n = shifted - round;
  // ln 2 in two parts, so that the remainder keeps its last bits.
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r) + 1.0f;
  const IntVec power = ((IntVec)shifted - (IntVec)round + 127) << 23;
  return tiny ? Vec{} : y * (Vec)power;
}

// Swaps the blocks of `lanes` values off the diagonal, in every pair of rows that far apart.
template <int lanes>
inline void swap_blocks(Vec (&rows)[kLanes], IntVec low_lanes, IntVec high_lanes) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & lanes) continue;
    const Vec low = rows[i], high = rows[i + lanes];
    rows[i] = __builtin_shuffle(low, high, low_lanes);
    rows[i + lanes] = __builtin_shuffle(low, high, high_lanes);
  }
}

inline void transpose(Vec (&rows)[kLanes]) {
  swap_blocks<4>(rows, IntVec{0, 1, 2, 3, 8, 9, 10, 11}, IntVec{4, 5, 6, 7, 12, 13, 14, 15});
  swap_blocks<2>(rows, IntVec{0, 1, 8, 9, 4, 5, 12, 13}, IntVec{2, 3, 10, 11, 6, 7, 14, 15});
  swap_blocks<1>(rows, IntVec{0, 8, 2, 10, 4, 12, 6, 14}, IntVec{1, 9, 3, 11, 5, 13, 7, 15});
}

}  // namespace decoder
