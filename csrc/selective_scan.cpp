// selective_scan, forward, on numbers or dual numbers; the tangent, which is both passes on dual numbers; and the step.
#include "selective_scan.h"

namespace fastmem::scan {
namespace {

// States [n, n + K) of one vector of channels over steps [first, last): h = 2^(dt A2) h + x B, y += C h.
template <class X, int K, bool bounded>
void scan_states(const Chunk<X>& chunk, const Ahead& ahead, int64_t pass, int64_t passes, int64_t n, int64_t c,
                 int64_t first, int64_t last) {
  const int64_t width = chunk.width;
  X h[K], A2[K];
  for (int k = 0; k < K; ++k) h[k] = chunk.h.at((n + k) * width + c), A2[k] = chunk.A2.at((n + k) * width + c);
  const Plane<X> dts = chunk.dt, xs = chunk.x, ys = chunk.y;
  const auto B = chunk.B, C = chunk.C;
  for (int64_t t = first; t < last; ++t) {
    const int64_t at = chunk.cell(c, t);
    const X dt = dts.at(at), x = xs.at(at);
    X y = ys.at(at);
    ahead.ask(pass, passes, t, c);
    for (int k = 0; k < K; ++k) {
      h[k] = exp2<bounded>(dt * A2[k]) * h[k] + x * B.data.broadcast(t * B.step + n + k);
      y = y + h[k] * C.data.broadcast(t * C.step + n + k);
    }
    ys.put(at, y);
  }
  for (int k = 0; k < K; ++k) chunk.h.put((n + k) * width + c, h[k]);
}

template <class X>
void scan_stretch(const Chunk<X>& chunk, const Ahead& ahead, int64_t N, int64_t first, int64_t last) {
  constexpr int K = 2 * kStates<X>;
  for (int64_t c = 0; c < chunk.width; c += Chunk<X>::W)
    chunk.with_bound(c, [&](auto bounded) {
      const int64_t passes = N / K + N % K;
      int64_t n = 0, pass = 0;
      for (; n + K <= N; n += K) scan_states<X, K, bounded()>(chunk, ahead, pass++, passes, n, c, first, last);
      for (; n < N; ++n) scan_states<X, 1, bounded()>(chunk, ahead, pass++, passes, n, c, first, last);
    });
}

template <class X>
void keep_carry(const Chunk<X>& chunk, const Sizes& n, typename Number<X>::type* carry, int64_t plane) {
  for (int64_t i = 0; i < n.N; ++i) {
    const auto* h = chunk.h.data + i * chunk.width;
    std::copy_n(h, chunk.block().count, carry + i * n.D);
    if constexpr (Number<X>::dual) std::copy_n(h + chunk.h.plane, chunk.block().count, carry + plane + i * n.D);
  }
}

template <class X>
void step_chunk(const Call<typename Number<X>::type>& p, const ForwardOut<X>& out, Chunk<X>& chunk, const Sequence& s,
                int64_t t, int64_t steps) {
  chunk.prepare(s, t, steps, [](int64_t, X, X) {});
  const Ahead ahead = chunk.ahead({p.in.u, p.in.delta, p.to.u, p.to.delta}, {p.in.z, p.to.z, out.y}, s.row, t,
                                   t + p.n.chunk);
  stretches(resets(p, s, t), steps, [&](int64_t first, int64_t last, bool dropped) {
    if (dropped) zero(chunk.h, p.n.N * chunk.width);
    scan_stretch(chunk, ahead, p.n.N, first, last);
  });
  chunk.write_y(out.y, s, t, steps);
}

template <class X>
void run(const Call<typename Number<X>::type>& p, const ForwardOut<X>& out, Chunk<X>& chunk, const Sequence& s) {
  for (int64_t i = 0; i < chunk.span(); ++i) chunk.select(i), chunk.initial_state(s);
  for (int64_t t = s.begin, c = 0; t < s.end; t += p.n.chunk, ++c)
    for (int64_t i = 0; i < chunk.span(); ++i) {
      chunk.select(i);
      if (out.carries && c > 0) keep_carry(chunk, p.n, out.carries + carry_at(p.n, s, c, chunk.block()), out.plane);
      step_chunk(p, out, chunk, s, t, std::min(p.n.chunk, s.end - t));
    }
  for (int64_t i = 0; out.final && i < chunk.span(); ++i)
    chunk.select(i), chunk.give_back(chunk.h, s.index, out.final);
}

}  // namespace

template <class X>
void forward(const Call<typename Number<X>::type>& p, const ForwardOut<X>& out) {
  const std::vector<Block> blocks = blocks_of(p.n);
  const int64_t count = p.n.sequences();
  const int threads = worthwhile(p, 1);
  const int64_t spans = spans_for(blocks.size(), count, threads);
  in_huge_pages(p.n, {out.y});
  parallel_for(spans * count, threads, [&](int64_t begin, int64_t end, int) {
    Chunk<X> chunk(p, blocks);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t span = unit / count, size = blocks.size();
      const Sequence s = sequence_of(p, unit % count);
      chunk.enter(size * span / spans, size * (span + 1) / spans, s.set);
      run(p, out, chunk, s);
    }
  });
}

namespace {

// --------------------------------------------------------------------------------------------------------------- step

// One step of one row's channels: vectors run over states, which are contiguous in (B, D, N).
template <class T>
class Step {
 public:
  Step(const Inputs<T>& in, const Sizes& n, bool softplus)
      : in_(in), n_(n), softplus_(softplus), padded_(round_up(n.N)), rates_(kMaxWidth * padded_), B_(n.G * n.N),
        C_(n.G * n.N) {}

  // Channels [c0, c0 + count), at most kMaxWidth; y contiguous, in the type of u.
  void run(int64_t row, int64_t c0, int64_t count, T* state, const Stream& y) {
    const int64_t per_group = n_.D / n_.G, end = round_up(count);
    read(in_.delta, in_.delta.at(row, 0, 0) + c0, count, dt_);
    read(in_.u, in_.u.at(row, 0, 0) + c0, count, u_);
    for (int64_t g = c0 / per_group; g * per_group < c0 + count; ++g) {
      read(in_.B, in_.B.at(row, 0, g), n_.N, &B_[g * n_.N]);
      read(in_.C, in_.C.at(row, 0, g), n_.N, &C_[g * n_.N]);
    }
    if (in_.bias) add_scaled(T(1), in_.bias + c0, dt_, count);
    if (softplus_)
      for (int64_t c = 0; c < end; c += W) store(dt_ + c, softplus(load(dt_ + c)));
    for (int64_t c = 0; c < end; c += W) {
      const Vec<T> dt = load(dt_ + c);
      store(rate_ + c, dt * T(kLog2e)), store(input_ + c, dt * load(u_ + c));
    }
    T* h = state + (row * n_.D + c0) * n_.N;
    if (!take_rates(c0, count)) advance<false, 0>(c0, count, h);
    else if (n_.N == 16) advance<true, 16>(c0, count, h);
    else advance<true, 0>(c0, count, h);
    if (in_.z) {
      read(in_.z, in_.z.at(row, 0, 0) + c0, count, z_);
      for (int64_t c = 0; c < end; c += W) {
        const Vec<T> gate = load(z_ + c);
        store(out_ + c, load(out_ + c) * (gate * sigmoid(gate)));
      }
    }
    write(y, y.at(row, 0, 0) + c0, count, out_);
  }

 private:
  static constexpr int W = kLanes<T>;
  static int64_t round_up(int64_t n) { return (n + W - 1) / W * W; }

  // rates_ <- log2(e) dt A; whether all are within what exp2<true> takes, which a NaN is not.
  bool take_rates(int64_t c0, int64_t count) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // of magnitudes they compare as numbers do
    Vec<Bits> largest{};
    for (int64_t c = 0; c < count; ++c) {
      const T rate = rate_[c], *A = in_.A + (c0 + c) * n_.N;
      T* to = &rates_[c * padded_];
      int64_t i = 0;
      auto take = [&](Vec<T> a) {
        const Vec<T> x = rate * a;
        store(to + i, x);
        const Vec<Bits> magnitude = (Vec<Bits>)x & std::numeric_limits<Bits>::max();
        largest = magnitude > largest ? magnitude : largest;
      };
      for (; i + W <= n_.N; i += W) take(load(A + i));
      if (i < n_.N) {
        Vec<T> a{};
        std::memcpy(&a, A + i, (n_.N - i) * sizeof(T));
        take(a);
      }
    }
    bool within = true;
    for (int i = 0; i < W; ++i) within &= largest[i] < std::bit_cast<Bits>(T(126));
    return within;
  }

  // `known` is N, or 0: the usual N as a constant is worth a third of the time.
  template <bool bounded, int known>
  void advance(int64_t c0, int64_t count, T* state) {
    const int64_t N = known ? known : n_.N, per_group = n_.D / n_.G;
    for (int64_t c = 0; c < count;) {
      const int64_t group = (c0 + c) / per_group, end = std::min(count, (group + 1) * per_group - c0);
      const T *B = &B_[group * N], *C = &C_[group * N];
      for (; c + 4 <= end; c += 4) {
        Vec<T> sums[4];
        for (int j = 0; j < 4; ++j) sums[j] = channel<bounded, known>(c + j, state + (c + j) * N, B, C);
        four_sums<T>(sums, out_ + c);
      }
      for (; c < end; ++c) out_[c] = sum<T>(channel<bounded, known>(c, state + c * N, B, C));
    }
    if (in_.D)
      for (int64_t c = 0; c < count; ++c) out_[c] += in_.D[c0 + c] * u_[c];
  }

  // Moves one channel's state on; what its lanes add to y.
  template <bool bounded, int known>
  Vec<T> channel(int64_t c, T* h, const T* B, const T* C) const {
    const int64_t N = known ? known : n_.N;
    const T* x = &rates_[c * padded_];
    const T input = input_[c];
    Vec<T> y{};
    int64_t i = 0;
    for (; i + W <= N; i += W) {
      const Vec<T> next = exp2<bounded>(load(x + i)) * load(h + i) + input * load(B + i);
      store(h + i, next);
      y += next * load(C + i);
    }
    if (i < N) {
      const size_t rest = (N - i) * sizeof(T);
      Vec<T> state{}, in{}, out{};
      std::memcpy(&state, h + i, rest), std::memcpy(&in, B + i, rest), std::memcpy(&out, C + i, rest);
      const Vec<T> next = exp2<bounded>(load(x + i)) * state + input * in;
      std::memcpy(h + i, &next, rest);
      Vec<T> kept{};  // an infinite input makes NaN of the lanes that stand for no state
      std::memcpy(&kept, &next, rest);
      y += kept * out;
    }
    return y;
  }

  const Inputs<T>& in_;
  const Sizes n_;
  const bool softplus_;
  const int64_t padded_;
  std::vector<T> rates_, B_, C_;
  alignas(64) T dt_[kMaxWidth], u_[kMaxWidth], z_[kMaxWidth], rate_[kMaxWidth], input_[kMaxWidth], out_[kMaxWidth];
};

}  // namespace
}  // namespace fastmem::scan

namespace fastmem {

using namespace scan;

bool selective_scan_step(Tensor state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z,
                         Tensor bias, bool softplus, int threads, Tensor y) {
  if (u.ndim != 2 || A.ndim != 2 || u.dtype < 0) return false;
  const int64_t R = u.shape[0], width = u.shape[1], N = A.shape[1], G = B.ndim == 3 ? B.shape[1] : 1;
  const int f64 = static_cast<int>(Dtype::f64), kept = u.dtype == f64 ? f64 : static_cast<int>(Dtype::f32);
  const bool grouped = B.ndim == 3;
  if (N < 1 || G < 1 || width % G) return false;
  auto stream = [&](const Tensor& x) {
    return x.dtype >= 0 && (x.dtype == f64) == (u.dtype == f64) &&
           (x.shape[x.ndim - 1] == 1 || x.strides[x.ndim - 1] == 1);
  };
  auto map = [&](const Tensor& x) { return (grouped ? x.is(R, G, N) : x.is(R, N)) && stream(x); };
  auto row = [&](const Tensor& x) { return x.is(R, width) && stream(x); };
  auto parameter = [&](const Tensor& x) { return x.dtype == kept && x.contiguous(); };
  if (!row(u) || !row(delta) || !map(B) || !map(C) || (z && !row(z)) || !row(y) || y.dtype != u.dtype ||
      !y.contiguous() || !A.is(width, N) || !parameter(A) || (D && !(D.is(width) && parameter(D))) ||
      (bias && !(bias.is(width) && parameter(bias))) || !state.is(R, width, N) || !parameter(state))
    return false;
  auto stream_of = [&](const Tensor& x) -> Stream {
    if (!x) return {};
    return {static_cast<char*>(x.data), static_cast<Dtype>(x.dtype), x.strides[0], 0, x.ndim == 3 ? x.strides[1] : 0};
  };
  const scan::Sizes n{R, 1, width, N, G, 1, 1, 1};
  on_state_type(kept, [&](auto zero) {
    using T = decltype(zero);
    auto at = [](const Tensor& x) { return static_cast<T*>(x.data); };
    const Inputs<T> in{stream_of(u), stream_of(delta), stream_of(B), stream_of(C), stream_of(z), at(A), at(D), at(bias)};
    const double work = double(n.R) * n.D * n.N;
    const int used = static_cast<int>(std::clamp(work / 6e4, 1.0, double(std::max(threads, 1))));
    const int64_t pieces = (n.D + kMaxWidth - 1) / kMaxWidth;  // of a row, each with all that it needs in L1
    parallel_for(n.R * pieces, used, [&](int64_t begin, int64_t end, int) {
      Step<T> step(in, n, softplus);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i % pieces * kMaxWidth;
        step.run(i / pieces, c0, std::min(kMaxWidth, n.D - c0), at(state), stream_of(y));
      }
    });
  });
  return true;
}

double exponentials(int64_t count, int threads) {
  constexpr int64_t kCells = 2048, W = kLanes<float>;
  std::vector<double> sums(std::max(threads, 1));
  parallel_for((count + kCells - 1) / kCells, threads, [&](int64_t begin, int64_t end, int thread) {
    alignas(64) float x[kCells];
    for (int64_t i = 0; i < kCells; ++i) x[i] = -0.01f * static_cast<float>(i % 500);
    Vec<float> a{}, b{}, c{}, d{};
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < kCells; i += 4 * W) {
        a += exp2<true>(load(x + i)), b += exp2<true>(load(x + i + W));
        c += exp2<true>(load(x + i + 2 * W)), d += exp2<true>(load(x + i + 3 * W));
      }
    sums[thread] = sum<float>((a + b) + (c + d));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void selective_scan_forward(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                            const Integers& places, bool softplus, int threads, const Integers& y, uintptr_t final,
                            uintptr_t carries) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    const ForwardOut<Vec<T>> out{stream_of(y), reinterpret_cast<T*>(final), reinterpret_cast<T*>(carries), 0};
    forward<Vec<T>>(p, out);
  });
}

void selective_scan_backward(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                             const Integers& places, bool softplus, int threads, const Integers& grad_y,
                             uintptr_t grad_final, uintptr_t carries, const Streams& grad_streams,
                             const Integers& grad_parameters) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    const BackwardIn<Vec<T>> in{stream_of(grad_y), reinterpret_cast<T*>(grad_final), reinterpret_cast<T*>(carries), 0};
    backward<Vec<T>>(p, in, inputs_of<T>(grad_streams, grad_parameters));
  });
}

void selective_scan_tangent(int dtype, const Integers& sizes, const Streams& streams, const Integers& parameters,
                            const Integers& places, bool softplus, int threads, const Streams& to_streams,
                            const Integers& to_parameters, const Integers& grad_y, uintptr_t grad_final,
                            uintptr_t carries, const Integers& y, uintptr_t final, const Streams& grad_streams,
                            const Integers& grad_parameters) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    p.to = inputs_of<T>(to_streams, to_parameters);
    T* kept = reinterpret_cast<T*>(carries);
    const int64_t plane = p.n.R * (p.n.L / p.n.chunk) * p.n.N * p.n.D;
    const ForwardOut<Dual<T>> out{stream_of(y), reinterpret_cast<T*>(final), kept, plane};
    BackwardIn<Dual<T>> in{stream_of(grad_y), reinterpret_cast<T*>(grad_final), kept, plane};
    const auto grads = inputs_of<T>(grad_streams, grad_parameters);
    // A backward that walks with time comes past all states itself; so does one of one chunk, but for the final one.
    if (grads && !grads.beside_states() && p.n.L > 0) in.y = out.y, in.final = out.final;
    else if (grads && !final && p.n.L <= p.n.chunk) in.y = out.y;
    else forward<Dual<T>>(p, out);
    if (grads) backward<Dual<T>>(p, in, grads);
  });
}

}  // namespace fastmem
