// Mathematics on vectors and on whole rows, one source for every instruction set.
#pragma once
#include <cmath>
#include <type_traits>

#include "common.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmem {

// Bit i is set where !(a[i] <= b[i]): greater, or one of them is NaN.
template <class T>
inline uint32_t not_le(Vec<T> a, Vec<T> b) {
#if defined(FASTMEM_ISA_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NLE_UQ);
#elif defined(FASTMEM_ISA_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_NLE_UQ));
#elif defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) return _mm_movemask_ps(_mm_cmpnle_ps((__m128)a, (__m128)b));
  else return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)a, (__m128d)b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(!(a[i] <= b[i])) << i;
  return bits;
#endif
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87.3; NaN stays NaN.
inline Vec<float> exp(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  Vec<float> shifted = x * 1.44269504f + round;
  Vec<float> n = shifted - round;
  Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Bits scale = ((Bits)shifted - std::bit_cast<int32_t>(round) + 127) << 23;
  p *= (Vec<float>)scale;
  p = x < -87.3f ? Vec<float>{} : p;
  return x == x ? p : x;
}
inline Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 1 / x to 1 ulp or two, for x that neither overflows nor underflows: an estimate and a step of Newton's, or two, take a
// third of a division's time.
inline Vec<float> reciprocal(Vec<float> x) {
#if defined(FASTMEM_ISA_AVX512)
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#elif defined(FASTMEM_ISA_AVX2)
  Vec<float> y = (Vec<float>)_mm256_rcp_ps((__m256)x);
  y = y + y * (1.0f - x * y);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}
inline Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

// As many bf16 as floats in a vector, and these floats' bits.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// A row as what kernels compute in: itself for float and double, converted into `scratch` for the half types.
template <class T>
inline const T* as_row(const T* row, int64_t, T*) {
  return row;
}
inline const float* as_row(const bf16* row, int64_t n, float* scratch) {
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) {
    Halves half;
    std::memcpy(&half, row + i, sizeof(half));
    store(scratch + i, (Vec<float>)(__builtin_convertvector(half, Words) << 16));
  }
  for (; i < n; ++i) scratch[i] = to_float(row[i]);
  return scratch;
}
inline const float* as_row(const f16* row, int64_t n, float* scratch) {
  int64_t i = 0;
#if defined(FASTMEM_ISA_AVX512) || defined(FASTMEM_ISA_AVX2)
  for (; i + 8 <= n; i += 8) {
    __m128i half;
    std::memcpy(&half, row + i, sizeof(half));
    _mm256_storeu_ps(scratch + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) scratch[i] = to_float(row[i]);
  return scratch;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(double x, double& out) { out = x; }
inline void from_float(float x, bf16& out) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u);
}
inline void from_float(float x, f16& out) {
  uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 shifts the mantissa into place, rounded by the adder
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | sign);
}
template <class A, class T>
inline void store_row(const A* row, int64_t n, T* out) {
  int64_t i = 0;
#if defined(FASTMEM_ISA_AVX512) || defined(FASTMEM_ISA_AVX2)
  if constexpr (std::is_same_v<T, f16>)
    for (; i + 8 <= n; i += 8) {
      __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(row + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(out + i, &half, sizeof(half));
    }
#endif
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<A, float>)
    for (; i + kLanes<float> <= n; i += kLanes<float>) {
      const Words bits = (Words)load(row + i), high = bits >> 16;
      const Words rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
      const Halves half = __builtin_convertvector((bits << 1) > 0xff000000u ? high | 0x40u : rounded, Halves);
      std::memcpy(out + i, &half, sizeof(half));
    }
  for (; i < n; ++i) from_float(row[i], out[i]);
}

// y += a * x
template <class A>
inline void add_scaled(A a, const A* x, A* y, int64_t n) {
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

}  // namespace fastmem
