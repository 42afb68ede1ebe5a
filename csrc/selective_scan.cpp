// selective_scan, forward, on numbers or dual numbers; the tangent, which is both passes on dual numbers; and the step.
#include "selective_scan.h"

namespace fastmem::scan {
namespace {

// States [n, n + K) of one vector of channels over steps [first, last): h = 2^(dt A2) h + x B, y += C h.
template <class X, int K, bool bounded>
void scan_states(const Chunk<X>& chunk, int64_t n, int64_t c, int64_t first, int64_t last) {
  const int64_t width = chunk.width;
  X h[K], A2[K];
  for (int k = 0; k < K; ++k) h[k] = chunk.h.at((n + k) * width + c), A2[k] = chunk.A2.at((n + k) * width + c);
  const Plane<X> dts = chunk.dt, xs = chunk.x, ys = chunk.y;
  const auto B = chunk.B, C = chunk.C;
  for (int64_t t = first; t < last; ++t) {
    const int64_t at = chunk.cell(c, t);
    const X dt = dts.at(at), x = xs.at(at);
    X y = ys.at(at);
    for (int k = 0; k < K; ++k) {
      h[k] = exp2<bounded>(dt * A2[k]) * h[k] + x * B.data.broadcast(t * B.step + n + k);
      y = y + h[k] * C.data.broadcast(t * C.step + n + k);
    }
    ys.put(at, y);
  }
  for (int k = 0; k < K; ++k) chunk.h.put((n + k) * width + c, h[k]);
}

template <class X, bool bounded>
void scan_stretch(const Chunk<X>& chunk, int64_t N, int64_t first, int64_t last) {
  constexpr int K = 2 * kStates<X>;
  for (int64_t c = 0; c < chunk.width; c += Chunk<X>::W) {
    int64_t n = 0;
    for (; n + K <= N; n += K) scan_states<X, K, bounded>(chunk, n, c, first, last);
    for (; n < N; ++n) scan_states<X, 1, bounded>(chunk, n, c, first, last);
  }
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
  stretches(resets(p, s, t), steps, [&](int64_t first, int64_t last, bool dropped) {
    if (dropped) zero(chunk.h, p.n.N * chunk.width);
    chunk.with_bound([&](auto bounded) { scan_stretch<X, bounded()>(chunk, p.n.N, first, last); });
  });
  const Plane<X> y = chunk.y;
  for (int64_t i = 0; i < steps; ++i) {
    if (!p.in.z) {
      chunk.write_row(out.y, s.row, t + i, i, [=](int64_t, int64_t cell) { return y.at(cell); });
      continue;
    }
    const Row<X> z = chunk.row(p.in.z, p.to.z, s.row, t + i, 1);
    chunk.write_row(out.y, s.row, t + i, i, [=](int64_t c, int64_t cell) {
      const X gate = z.at(c);
      return y.at(cell) * (gate * sigmoid(gate));
    });
  }
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
  for (int64_t i = 0; i < chunk.span(); ++i) chunk.select(i), chunk.give_back(chunk.h, s.index, out.final);
}

}  // namespace

template <class X>
void forward(const Call<typename Number<X>::type>& p, const ForwardOut<X>& out) {
  const std::vector<Block> blocks = blocks_of(p.n);
  const int64_t count = p.n.sequences();
  const int threads = worthwhile(p, 1);
  const int64_t spans = spans_for(blocks.size(), count, threads);
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
void step_row(const Inputs<T>& in, const Sizes& n, bool softplus_, int64_t row, int64_t c0, int64_t c1, T* state, T* y) {
  constexpr int W = kLanes<T>;
  const int64_t N = n.N, count = c1 - c0, per_group = n.D / n.G;
  const int64_t padded = (count + W - 1) / W * W, vectors = N / W * W;
  std::vector<T> memory(4 * padded + 2 * n.G * N);
  T *dt = memory.data(), *u = dt + padded, *z = u + padded, *out = z + padded, *B = out + padded, *C = B + n.G * N;
  read(in.delta, in.delta.at(row, 0, 0) + c0, count, dt);
  read(in.u, in.u.at(row, 0, 0) + c0, count, u);
  for (int64_t g = c0 / per_group; g * per_group < c1; ++g) {
    read(in.B, in.B.at(row, 0, g), N, B + g * N);
    read(in.C, in.C.at(row, 0, g), N, C + g * N);
  }
  if (in.bias)
    for (int64_t c = 0; c < count; ++c) dt[c] += in.bias[c0 + c];
  if (softplus_)
    for (int64_t c = 0; c < padded; c += W) store(dt + c, softplus(load(dt + c)));
  for (int64_t c = 0; c < count; ++c) {
    const int64_t channel = c0 + c;
    T* h = state + (row * n.D + channel) * N;
    const T *A = in.A + channel * N, *b = B + channel / per_group * N, *out_map = C + channel / per_group * N;
    const T rate = dt[c] * T(kLog2e), x = dt[c] * u[c];
    Vec<T> sum_v{};
    int64_t i = 0;
    for (; i < vectors; i += W) {
      const Vec<T> next = exp2<false>(rate * load(A + i)) * load(h + i) + x * load(b + i);
      store(h + i, next);
      sum_v += next * load(out_map + i);
    }
    T total = sum<T>(sum_v);
    for (; i < N; ++i) {
      h[i] = std::exp2(rate * A[i]) * h[i] + x * b[i];
      total += h[i] * out_map[i];
    }
    out[c] = in.D ? total + in.D[channel] * u[c] : total;
  }
  if (in.z) {
    read(in.z, in.z.at(row, 0, 0) + c0, count, z);
    for (int64_t c = 0; c < padded; c += W) {
      const Vec<T> gate = load(z + c);
      store(out + c, load(out + c) * (gate * sigmoid(gate)));
    }
  }
  Stream to{reinterpret_cast<char*>(y), in.u.dtype, n.D, 0, 0};
  write(to, to.at(row, 0, 0) + c0, count, out);
}

void step(int dtype, const py::tuple& sizes, const py::tuple& streams, const py::tuple& parameters, bool softplus_,
          int threads, uintptr_t state, uintptr_t y) {
  auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
  const Sizes n{size(0), 1, size(1), size(2), size(3), 1, 1, 1};
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto pointer = [&](int i) { return reinterpret_cast<T*>(parameters[i].cast<uintptr_t>()); };
    const Inputs<T> in{stream_of(streams[0]), stream_of(streams[1]), stream_of(streams[2]), stream_of(streams[3]),
                       stream_of(streams[4]), pointer(0), pointer(1), pointer(2), nullptr};
    py::gil_scoped_release release;
    const double work = double(n.R) * n.D * n.N;
    const int used = static_cast<int>(std::clamp(work / 6e4, 1.0, double(std::max(threads, 1))));
    const int64_t pieces = (n.D + kMaxWidth - 1) / kMaxWidth;  // of a row, each with all that it needs in L1
    parallel_for(n.R * pieces, used, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / pieces, c0 = i % pieces * kMaxWidth;
        step_row(in, n, softplus_, row, c0, std::min(c0 + kMaxWidth, n.D), reinterpret_cast<T*>(state),
                 reinterpret_cast<T*>(y));
      }
    });
  });
}

// How long the exponentials of a scan take alone: the benchmarks' floor.
double exponentials(int64_t count, int threads) {
  constexpr int64_t kCells = 2048, W = kLanes<float>;
  py::gil_scoped_release release;
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

// ---------------------------------------------------------------------------------------------------------------- door

void bound_forward(int dtype, const py::tuple& sizes, const py::tuple& streams, const py::tuple& parameters,
                   const py::tuple& places, bool softplus, int threads, const py::tuple& y, uintptr_t final,
                   uintptr_t carries) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    const ForwardOut<Vec<T>> out{stream_of(y), reinterpret_cast<T*>(final), reinterpret_cast<T*>(carries), 0};
    py::gil_scoped_release release;
    forward<Vec<T>>(p, out);
  });
}

void bound_backward(int dtype, const py::tuple& sizes, const py::tuple& streams, const py::tuple& parameters,
                    const py::tuple& places, bool softplus, int threads, const py::tuple& grad_y, uintptr_t grad_final,
                    uintptr_t carries, const py::tuple& grad_streams, const py::tuple& grad_parameters) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    const BackwardIn<Vec<T>> in{stream_of(grad_y), reinterpret_cast<T*>(grad_final), reinterpret_cast<T*>(carries), 0};
    const auto grads = inputs_of<T>(grad_streams, grad_parameters);
    py::gil_scoped_release release;
    backward<Vec<T>>(p, in, grads);
  });
}

void bound_tangent(int dtype, const py::tuple& sizes, const py::tuple& streams, const py::tuple& parameters,
                   const py::tuple& places, bool softplus, int threads, const py::tuple& to_streams,
                   const py::tuple& to_parameters, const py::tuple& grad_y, uintptr_t grad_final, uintptr_t carries,
                   const py::tuple& y, uintptr_t final, const py::tuple& grad_streams,
                   const py::tuple& grad_parameters) {
  on_state_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto p = call_of<T>(sizes, streams, parameters, places, softplus, threads);
    p.to = inputs_of<T>(to_streams, to_parameters);
    T* kept = reinterpret_cast<T*>(carries);
    const int64_t plane = p.n.R * (p.n.L / p.n.chunk) * p.n.N * p.n.D;
    const ForwardOut<Dual<T>> out{stream_of(y), reinterpret_cast<T*>(final), kept, plane};
    const BackwardIn<Dual<T>> in{stream_of(grad_y), reinterpret_cast<T*>(grad_final), kept, plane};
    const auto grads = inputs_of<T>(grad_streams, grad_parameters);
    py::gil_scoped_release release;
    forward<Dual<T>>(p, out);
    backward<Dual<T>>(p, in, grads);
  });
}

}  // namespace
}  // namespace fastmem::scan

void bind_selective_scan(pybind11::module_& m) {
  m.def("selective_scan_forward", &fastmem::scan::bound_forward);
  m.def("selective_scan_backward", &fastmem::scan::bound_backward);
  m.def("selective_scan_tangent", &fastmem::scan::bound_tangent);
  m.def("selective_scan_step", &fastmem::scan::step);
  m.def("exponentials", &fastmem::scan::exponentials);
}
