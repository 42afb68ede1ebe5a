// The kernels as bindings.cpp sees them: plain numbers, addresses and strides, no tensor type of anybody's. Which
// dimensions stand where is said beside each kernel.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace fastmem {

// Sizes, or the addresses of contiguous tensors with 0 for none.
struct Integers {
  std::array<int64_t, 16> values{};

  int64_t operator[](int64_t i) const { return values[i]; }
  template <class T>
  T* pointer(int64_t i) const {
    return reinterpret_cast<T*>(values[i]);
  }
};

// A tensor of up to three indices before its contiguous rows; strides in elements, 0 where it is shared.
struct View {
  void* data = nullptr;
  int64_t b = 0, h = 0, r = 0;

  template <class T>
  T* row(int64_t ib, int64_t ih, int64_t ir = 0) const {
    return static_cast<T*>(data) + ib * b + ih * h + ir * r;
  }
  explicit operator bool() const { return data != nullptr; }
};

// A gradient and its own number of batches and heads, 1 where what it belongs to is shared.
struct Target {
  View grad;
  int64_t B = 1, H = 1;
};

inline constexpr int64_t kUnreadable = 1 << 20;  // dimensions of a tensor that cannot be read

// A tensor as it comes from Python, with none of its properties checked.
struct Tensor {
  void* data = nullptr;
  int64_t ndim = -1;  // none given
  const int64_t *shape = nullptr, *strides = nullptr;
  int dtype = -1;  // a code of common.h, or -1
  bool on_cpu = false;

  explicit operator bool() const { return ndim >= 0; }
  template <class... N>
  bool is(N... sizes) const {
    const int64_t expected[] = {sizes...};
    bool there = data != nullptr;  // ZeroTensors have elements but no memory
    for (int64_t size : expected) there |= size == 0;
    return on_cpu && there && ndim == sizeof...(N) && std::equal(expected, expected + sizeof...(N), shape);
  }
  bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = ndim - 1; i >= 0; step *= shape[i--])
      if (shape[i] != 1 && strides[i] != step) return false;
    return true;
  }
};

using Streams = std::array<Integers, 5>;  // selective_scan.h tells what of

void topk_attention_forward(int dtype, const Integers& sizes, int64_t top_k, double factor, bool cosine, int threads,
                            View q, View k, View v, View scale, View bias, View mask, View out, View indices,
                            View weights);
void topk_attention_backward(int dtype, const Integers& sizes, int64_t top_k, double factor, bool cosine, int threads,
                             View q, View k, View v, View scale, View grad_out, View grad_weights, View indices,
                             View weights, View grad_q, View grad_scale, Target grad_k, Target grad_v,
                             Target grad_bias);
void dense_attention_forward(int dtype, const Integers& sizes, double factor, bool cosine, int threads, View q, View k,
                             View v, View scale, View bias, View mask, View out, View lse);
void dense_attention_backward(int dtype, const Integers& sizes, double factor, bool cosine, int threads, int64_t nb,
                              int64_t nh, View q, View k, View v, View scale, View bias, View mask, View grad_out,
                              View out, View lse, View grad_q, View grad_scale, View grad_k, View grad_v,
                              View grad_bias);

void gated_write(int dtype, const Integers& sizes, const std::array<double, 14>& rule, const Integers& in,
                 const Integers& out, int threads);
void gated_write_linear(int dtype, const Integers& sizes, const Integers& decisions, const Integers& in,
                        const Integers& out, bool transposed, int threads);

void causal_conv1d(int dtype, const Integers& sizes, const Integers& x, const Integers& in, bool silu,
                   int64_t sequences, const Integers& out, int threads);
void causal_conv1d_backward(int dtype, const Integers& sizes, const Integers& x, const Integers& in, bool silu,
                            int64_t sequences, const Integers& grad_y, uintptr_t grad_final, const Integers& out,
                            int threads);
// Fills y (B, D) and new_state (B, W - 1, D), which may be state itself. False, and nothing done, where the arguments are
// not those of an ordinary call: right in shape, on the CPU, contiguous, parameters in the type that is computed in or of x.
bool causal_conv1d_step(Tensor state, Tensor x, Tensor weight, Tensor bias, bool silu, int threads, Tensor y,
                        Tensor new_state);

void selective_scan_forward(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                            const Integers& places, bool softplus, int threads, const Integers& y, uintptr_t final,
                            uintptr_t carries);
void selective_scan_backward(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                             const Integers& places, bool softplus, int threads, const Integers& grad_y,
                             uintptr_t grad_final, uintptr_t carries, const Streams& grad_streams,
                             const Integers& grad_parameters);
void selective_scan_tangent(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                            const Integers& places, bool softplus, int threads, const Streams& to_streams,
                            const Integers& to_parameters, const Integers& grad_y, uintptr_t grad_final,
                            uintptr_t carries, const Integers& y, uintptr_t final, const Streams& grad_streams,
                            const Integers& grad_parameters);
// Changes state (B, D, N) and fills y (B, D). False, and nothing done, where the arguments are not those of an ordinary
// call: right in shape, on the CPU, parameters and state contiguous and in the type that is computed in.
bool selective_scan_step(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z,
                         Tensor bias, bool softplus, int threads, Tensor y);
// How long the exponentials of a scan take alone: the benchmarks' floor.
double exponentials(int64_t count, int threads);

}  // namespace fastmem
