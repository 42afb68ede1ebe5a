// Element types and the way they are read. Kernels compute in float (or double for double inputs).
#pragma once
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastmem {

// The same codes stand in fastmem/_native.py.
enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Multiplying by 2^112 moves the exponent from half's bias to float's, subnormals included.
  float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

// Calls f with a value of the element type: dispatch(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
void dispatch(int dtype, F&& f) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
  }
  throw std::invalid_argument("fastmem: unknown dtype code " + std::to_string(dtype));
}

// What a kernel computes in: double for double, float for everything else.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

}  // namespace fastmem
