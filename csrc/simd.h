// Vectors by the compiler's vector extension: one source for every instruction set, lowered to what the flags allow.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmem {

#if defined(FASTMEM_ISA_AVX512)
inline constexpr int kVectorBytes = 64;
#elif defined(FASTMEM_ISA_AVX2)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x to the bit, -0 included, so no instruction is left of it
}
// Halves the vector until four lanes or fewer are left: a chain of kLanes additions would wait on each other.
template <class T, int N = kLanes<T>, class V = Vec<T>>
inline T sum(V v) {
  if constexpr (N > 4) {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    Half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return sum<T, N / 2, Half>(halves[0] + halves[1]);
  } else if constexpr (N == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

// to[j] = the sum of v[j] for j < 4: four sums for little more than one of them costs.
template <class T>
inline void four_sums(const Vec<T>* v, T* to) {
  for (int j = 0; j < 4; ++j) to[j] = sum<T>(v[j]);
}
#if defined(FASTMEM_ISA_AVX512)
template <>
inline void four_sums<float>(const Vec<float>* v, float* to) {
  // Within every quarter of a vector: halves of two vectors are added side by side, then halves of these.
  auto halved = [](Vec<float> a, Vec<float> b) {
    return _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b)));
  };
  const __m512d low = halved(v[0], v[1]), high = halved(v[2], v[3]);
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 sums = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#elif defined(FASTMEM_ISA_AVX2)
template <>
inline void four_sums<float>(const Vec<float>* v, float* to) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]), _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#endif

// to[j * to_row + i] = from[i * from_row + j] for i < rows, j < columns.
template <class T>
inline void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  int64_t i = 0;
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4)
    for (; i + 4 <= rows; i += 4) {
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        const float *in = reinterpret_cast<const float*>(from + i * from_row + j);
        float* out = reinterpret_cast<float*>(to + j * to_row + i);
        __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + from_row), c = _mm_loadu_ps(in + 2 * from_row),
               d = _mm_loadu_ps(in + 3 * from_row);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(out, a), _mm_storeu_ps(out + to_row, b), _mm_storeu_ps(out + 2 * to_row, c),
            _mm_storeu_ps(out + 3 * to_row, d);
      }
      for (; j < columns; ++j)
        for (int64_t k = i; k < i + 4; ++k) to[j * to_row + k] = from[k * from_row + j];
    }
#endif
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}

// Dot product of two contiguous rows.
template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + W) * load(b + i + W);
    s2 += load(a + i + 2 * W) * load(b + i + 2 * W);
    s3 += load(a + i + 3 * W) * load(b + i + 3 * W);
  }
  for (; i + W <= n; i += W) s0 += load(a + i) * load(b + i);
  T total = sum<T>((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace fastmem
