// What a scan computes with: a vector of channels, or a dual number of two (a value and its derivative along a
// direction), and the functions of either. Kernels are written once over such a type X.
#pragma once
#include <cmath>
#include <type_traits>

#include "vector_math.h"

namespace fastmem {

template <class T>
struct Dual {
  Vec<T> v, d;
};
template <class T>
inline Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.v + b.v, a.d + b.d};
}
template <class T>
inline Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.v - b.v, a.d - b.d};
}
template <class T>
inline Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.v * b.v, a.v * b.d + a.d * b.v};
}

template <class X>
struct Number;  // what X is made of
template <class T>
struct Number<Dual<T>> {
  using type = T;
  static constexpr bool dual = true;
};
template <>
struct Number<Vec<float>> {
  using type = float;
  static constexpr bool dual = false;
};
template <>
struct Number<Vec<double>> {
  using type = double;
  static constexpr bool dual = false;
};

template <class T>
inline Vec<T> value(Dual<T> x) {
  return x.v;
}
inline Vec<float> value(Vec<float> x) { return x; }
inline Vec<double> value(Vec<double> x) { return x; }

// What a kernel gives back of a number: the value, or of a dual number its derivative.
template <class T>
inline Vec<T> result(Dual<T> x) {
  return x.d;
}
inline Vec<float> result(Vec<float> x) { return x; }
inline Vec<double> result(Vec<double> x) { return x; }

template <class X, class T>
inline X constant(T x) {
  if constexpr (Number<X>::dual) return {splat(x), Vec<T>{}};
  else return splat(x);
}

// Numbers in memory: values, and for dual numbers their derivatives `plane` elements further on.
template <class X>
struct Plane {
  using T = typename Number<X>::type;
  T* data = nullptr;
  int64_t plane = 0;

  X at(int64_t i) const {
    if constexpr (Number<X>::dual) return {load(data + i), load(data + plane + i)};
    else return load(data + i);
  }
  void put(int64_t i, X x) const {
    if constexpr (Number<X>::dual) store(data + i, x.v), store(data + plane + i, x.d);
    else store(data + i, x);
  }
  void add(int64_t i, X x) const { put(i, at(i) + x); }
  X broadcast(int64_t i) const {
    if constexpr (Number<X>::dual) return {splat(data[i]), splat(data[plane + i])};
    else return splat(data[i]);
  }
  T* result() const { return Number<X>::dual ? data + plane : data; }
};

// ------------------------------------------------------------------------------------------------------------ functions

#if defined(FASTMEM_ISA_AVX2) || defined(FASTMEM_ISA_AVX512)
// 2^(j / n) for j < n, as bits less j << shift: adding k << shift for k = n i + j then gives 2^(k / n). As many as one
// instruction looks up.
#if defined(FASTMEM_ISA_AVX512)
inline constexpr int kPowers = 32, kPowerShift = 18;
inline constexpr double kFirstPower = 1.0218971486541166;
#else
inline constexpr int kPowers = 8, kPowerShift = 20;
inline constexpr double kFirstPower = 1.0905077326652577;
#endif
struct Powers {
  alignas(kVectorBytes) int32_t bits[kPowers];
  constexpr Powers() : bits() {
    double power = 1;
    for (int j = 0; j < kPowers; ++j, power *= kFirstPower)
      bits[j] = std::bit_cast<int32_t>(static_cast<float>(power)) - (j << kPowerShift);
  }
};
inline constexpr Powers kPowersOfTwo;
#endif

// 2^x. `bounded` promises |x| <= 127; without it, 0 and infinity come out where they should, and NaN stays NaN.
template <bool bounded>
inline Vec<float> exp2(Vec<float> x) {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  if constexpr (!bounded) {
    // Just below 128 the rounded exponent would be one that floats lack, so the upper half of the range is halved.
    const Vec<float> high = x > 1.0f ? splat(1.0f) : Vec<float>{};
    Vec<float> within = x < -126.0f ? splat(-126.0f) : x > 128.0f ? splat(128.0f) : x;
    const Vec<float> y = exp2<true>(within - high) * (1.0f + high);
    return x == x ? (x < -126.0f ? Vec<float>{} : y) : x;
  } else {
#if defined(FASTMEM_ISA_AVX2) || defined(FASTMEM_ISA_AVX512)
    // x = k / n + r: 2^(k mod n / n) from a table in registers, and a polynomial in r, relative error 3e-8 (n = 8) or 5e-8
    // (n = 32) and none at r = 0: what decays slowly is multiplied so often that a bias would show.
    constexpr float round = 1.5f * (1 << kPowerShift);  // adding it rounds to a multiple of 1 / n, k in the low bits
    asm("" : "+v"(x));  // a product that becomes part of two FMAs below makes one more of them, and they are the bottleneck
    const Vec<float> shifted = x + round;
    const Vec<float> r = x - (shifted - round);
    const Bits k = (Bits)shifted;
#if defined(FASTMEM_ISA_AVX512)
    Vec<float> p = splat(2.4022674839e-1f);
    p = p * r + 6.9315733367e-1f;
    const __m512i low = _mm512_load_si512(kPowersOfTwo.bits), high = _mm512_load_si512(kPowersOfTwo.bits + 16);
    const Bits power = (Bits)_mm512_permutex2var_epi32(low, (__m512i)k, high);
#else
    Vec<float> p = splat(5.5496221773e-2f);
    p = p * r + 2.4025762998e-1f;
    p = p * r + 6.9314721426e-1f;
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPowersOfTwo.bits));
    const Bits power = (Bits)_mm256_permutevar8x32_epi32(table, (__m256i)k);
#endif
    p = p * r + 1.0f;
    return p * (Vec<float>)(power + (k << kPowerShift));
#else
    // A polynomial of degree 5 with the same property, relative error 1e-7.
    constexpr float round = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the bias of the exponent
    const Vec<float> shifted = x + round;
    const Vec<float> r = x - (shifted - round);
    Vec<float> p = splat(1.3264727080e-3f);
    p = p * r + 9.6715128622e-3f;
    p = p * r + 5.5507337456e-2f;
    p = p * r + 2.4022242082e-1f;
    p = p * r + 6.9314697760e-1f;
    p = p * r + 1.0f;
    return p * (Vec<float>)((Bits)shifted << 23);
#endif
  }
}
template <bool bounded>
inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}
template <bool bounded, class T>
inline Dual<T> exp2(Dual<T> x) {
  const Vec<T> y = exp2<bounded>(x.v);
  return {y, y * x.d * T(0.69314718055994530942)};
}

// 1 / (1 + e^-x)
inline Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> minus = Vec<float>{} - x;
  const Vec<float> y = 1.0f / (1.0f + exp(minus > 88.0f ? splat(88.0f) : minus));
  return minus > 88.0f ? Vec<float>{} : y;  // times a large x it must stay small
}
inline Vec<double> sigmoid(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = 1 / (1 + std::exp(-x[i]));
  return x;
}
template <class T>
inline Dual<T> sigmoid(Dual<T> x) {
  const Vec<T> s = sigmoid(x.v);
  return {s, s * (T(1) - s) * x.d};
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), and log1p(e) = 2 artanh(e / (2 + e)).
inline Vec<float> softplus(Vec<float> x) {
  const Vec<float> positive = x > 0.0f ? x : Vec<float>{};
  const Vec<float> e = exp(x > 0.0f ? Vec<float>{} - x : x);
  const Vec<float> s = e / (2.0f + e), q = s * s;
  Vec<float> p = splat(1.4089167553e-1f);
  p = p * q + 1.3980301354e-1f;
  p = p * q + 2.0012455143e-1f;
  p = p * q + 3.3333157341e-1f;
  p = p * q + 1.0f;
  return positive + 2.0f * s * p;
}
inline Vec<double> softplus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = x[i] > 20 ? x[i] : std::log1p(std::exp(x[i]));
  return x;
}
template <class T>
inline Dual<T> softplus(Dual<T> x) {
  return {softplus(x.v), sigmoid(x.v) * x.d};
}

}  // namespace fastmem
