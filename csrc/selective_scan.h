// What selective_scan's forward, backward and tangent share: the call, its pieces of work, and a chunk of one of them.
//
// A piece of work is one sequence and a block of up to 64 channels of one group; vectors run over channels. A block
// walks in chunks, whose inputs are first brought into rows of floats [step][channel] that stay in L1 and L2.
// Derivation: docs/ops/selective_scan.md.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "scan_math.h"

namespace fastmem::scan {

namespace py = pybind11;

inline constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;
inline constexpr int64_t kMaxWidth = 64;

struct Sizes {
  int64_t R, L, D, N, G;  // rows, steps, channels, states, groups
  int64_t P;              // sets of parameters
  int64_t packed;         // sequences in a row
  int64_t chunk;
  int64_t sequences() const { return R * packed; }
};

// A tensor (R, L, [G,] X) of any float type; strides in elements, X contiguous.
struct Stream {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t row = 0, step = 0, group = 0;

  explicit operator bool() const { return data != nullptr; }
  int64_t at(int64_t r, int64_t t, int64_t g) const { return r * row + t * step + g * group; }
};

inline Stream stream_of(py::handle object) {
  Stream s;
  if (object.is_none()) return s;
  auto f = py::reinterpret_borrow<py::tuple>(object);
  s.data = reinterpret_cast<char*>(f[0].cast<uintptr_t>());
  s.dtype = static_cast<Dtype>(f[1].cast<int>());
  s.row = f[2].cast<int64_t>(), s.step = f[3].cast<int64_t>(), s.group = f[4].cast<int64_t>();
  return s;
}

template <class T>
inline void read(const Stream& s, int64_t at, int64_t count, T* out) {
  if constexpr (std::is_same_v<T, double>) {
    std::memcpy(out, reinterpret_cast<const double*>(s.data) + at, count * sizeof(double));
  } else if (s.dtype == Dtype::f32) {
    std::memcpy(out, reinterpret_cast<const float*>(s.data) + at, count * sizeof(float));
  } else if (s.dtype == Dtype::bf16) {
    as_row(reinterpret_cast<const bf16*>(s.data) + at, count, out);
  } else {
    as_row(reinterpret_cast<const f16*>(s.data) + at, count, out);
  }
}
template <class T>
inline void write(const Stream& s, int64_t at, int64_t count, const T* in) {
  if constexpr (std::is_same_v<T, double>) {
    std::memcpy(reinterpret_cast<double*>(s.data) + at, in, count * sizeof(double));
  } else if (s.dtype == Dtype::f32) {
    std::memcpy(reinterpret_cast<float*>(s.data) + at, in, count * sizeof(float));
  } else if (s.dtype == Dtype::bf16) {
    store_row(in, count, reinterpret_cast<bf16*>(s.data) + at);
  } else {
    store_row(in, count, reinterpret_cast<f16*>(s.data) + at);
  }
}

// The float inputs of a call, or a direction for each of them, or their gradients; null where there is none.
template <class T>
struct Inputs {
  Stream u, delta, B, C, z;
  T *A = nullptr, *D = nullptr, *bias = nullptr, *initial = nullptr;
};

template <class T>
Inputs<T> inputs_of(const py::tuple& streams, const py::tuple& parameters) {
  auto pointer = [&](int i) { return reinterpret_cast<T*>(parameters[i].cast<uintptr_t>()); };
  return {stream_of(streams[0]), stream_of(streams[1]), stream_of(streams[2]), stream_of(streams[3]),
          stream_of(streams[4]), pointer(0), pointer(1), pointer(2), pointer(3)};
}

template <class T>
struct Call {
  Sizes n;
  Inputs<T> in;
  Inputs<T> to;  // direction of a tangent
  const bool* reset;
  const int64_t* cu_seqlens;
  bool softplus;
  int threads;
};

// The sequences [begin, end) of a row, and the channels [c0, c0 + count) of group g.
struct Block {
  int64_t g, c0, count;
};
struct Sequence {
  int64_t index, row, begin, end, set;
};

// Block widths depend on sizes alone, so that sums over blocks have the same order on any number of threads.
inline int64_t block_width(const Sizes& n) {
  const int64_t per_group = n.D / n.G;
  for (int64_t width : {kMaxWidth, kMaxWidth / 2})
    if (n.sequences() * n.G * ((per_group + width - 1) / width) >= 16) return width;
  return kMaxWidth / 4;
}

inline std::vector<Block> blocks_of(const Sizes& n) {
  const int64_t per_group = n.D / n.G, width = block_width(n);
  std::vector<Block> blocks;
  for (int64_t g = 0; g < n.G; ++g)
    for (int64_t c = 0; c < per_group; c += width)
      blocks.push_back({g, g * per_group + c, std::min(width, per_group - c)});
  return blocks;
}

template <class T>
Sequence sequence_of(const Call<T>& p, int64_t index) {
  const int64_t row = index / p.n.packed, piece = index % p.n.packed;
  const int64_t set = index / (p.n.sequences() / p.n.P);
  if (!p.cu_seqlens) return {index, row, 0, p.n.L, set};
  return {index, row, p.cu_seqlens[piece], p.cu_seqlens[piece + 1], set};
}

// Where the state before chunk c >= 1 of a sequence is kept: no two sequences of a row share a place.
inline int64_t carry_at(const Sizes& n, const Sequence& s, int64_t c, const Block& block) {
  return ((s.row * (n.L / n.chunk) + s.begin / n.chunk + c - 1) * n.N) * n.D + block.c0;
}

// States that are taken at once: as many as the registers hold. Doubles are for checking derivatives, not for speed.
template <class X>
inline constexpr int kStates = std::is_same_v<typename Number<X>::type, double> ? 1 : Number<X>::dual ? 2 : 4;

// Memory for a thread's numbers of type X, aligned to cache lines.
template <class X>
class Pool {
 public:
  using T = typename Number<X>::type;
  Plane<X> take(int64_t count) {
    const int64_t padded = (count + 15) / 16 * 16, total = padded * (Number<X>::dual ? 2 : 1);
    held_.emplace_back(new (std::align_val_t(64)) T[total]());
    return {held_.back().get(), padded};
  }

 private:
  struct Free {
    void operator()(T* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<T[], Free>> held_;
};

// The rows of a piece of work, and what does not change along a sequence.
template <class X>
class Rows {
 public:
  using T = typename Number<X>::type;
  static constexpr int W = kLanes<T>;

  explicit Rows(const Call<T>& p) : p_(p), n_(p.n) {
    const int64_t steps = std::min(n_.chunk, n_.L), cells = steps * kMaxWidth;
    raw = pool_.take(cells), u = pool_.take(cells), dt = pool_.take(cells), x = pool_.take(cells);
    y = pool_.take(cells), z = pool_.take(cells);
    B = pool_.take(steps * n_.N), C = pool_.take(steps * n_.N);
    A2 = pool_.take(n_.N * kMaxWidth), D = pool_.take(kMaxWidth), bias = pool_.take(kMaxWidth);
    h = pool_.take(n_.N * kMaxWidth);
  }

  // A block of channels, of one set of parameters.
  void enter(const Block& block, int64_t set) {
    if (set == set_ && block.c0 == block_.c0 && width) return;
    block_ = block, set_ = set;
    width = (block.count + W - 1) / W * W;
    const int64_t first = set * n_.D + block.c0;
    largest_ = 0;
    for (int64_t c = 0; c < width; ++c)
      for (int64_t i = 0; i < n_.N; ++i) {
        const bool there = c < block.count;
        const T a = there ? p_.in.A[(first + c) * n_.N + i] * T(kLog2e) : T(0);
        A2.data[i * width + c] = a;
        if (!(std::abs(a) <= largest_)) largest_ = std::isnan(a) ? std::numeric_limits<T>::infinity() : std::abs(a);
        if constexpr (Number<X>::dual)
          A2.data[A2.plane + i * width + c] =
              there && p_.to.A ? p_.to.A[(first + c) * n_.N + i] * T(kLog2e) : T(0);
      }
    parameter(p_.in.D, p_.to.D, first, D);
    parameter(p_.in.bias, p_.to.bias, first, bias);
  }

  void initial_state(const Sequence& s) { transposed(p_.in.initial, p_.to.initial, s.index, h); }

  // (D, N) of a sequence -> [state][channel], zeros where there is none.
  void transposed(const T* from, const T* to, int64_t sequence, const Plane<X>& out) const {
    const int64_t first = (sequence * n_.D + block_.c0) * n_.N, plane = Number<X>::dual ? out.plane : 0;
    for (int64_t i = 0; i < n_.N; ++i)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t at = first + c * n_.N + i;
        const bool there = c < block_.count;
        if (plane) out.data[plane + i * width + c] = there && to ? to[at] : T(0);
        out.data[i * width + c] = there && from ? from[at] : T(0);
      }
  }

  // Steps [t, t + steps) of a sequence: raw, u, dt, x = dt u, B and C; y starts as D u.
  void prepare(const Sequence& s, int64_t t, int64_t steps) {
    stream(p_.in.delta, p_.to.delta, s.row, t, steps, raw);
    stream(p_.in.u, p_.to.u, s.row, t, steps, u);
    maps(p_.in.B, p_.to.B, s.row, t, steps, B);
    maps(p_.in.C, p_.to.C, s.row, t, steps, C);
    // |dt A log2(e)| <= 120 everywhere: then the exponentials stay away from their ends.
    const Vec<T> limit = splat(T(120) / largest_);
    typedef std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t> Int;
    typedef Int Bits __attribute__((vector_size(kVectorBytes)));
    Bits within = ~Bits{};
    for (int64_t c = 0; c < width; c += W) {
      const X b = bias.at(c), d = D.at(c);
      for (int64_t i = c; i < steps * width; i += width) {
        X step = raw.at(i);
        if (p_.in.bias) step = step + b, raw.put(i, step);
        if (p_.softplus) step = softplus(step);
        dt.put(i, step);
        Vec<T> size;
        if constexpr (Number<X>::dual) size = step.v;
        else size = step;
        size = size < T(0) ? T(0) - size : size;
        within &= (Bits)(size <= limit);
        const X in = u.at(i);
        x.put(i, step * in);
        y.put(i, p_.in.D ? d * in : X{});
      }
    }
    bounded_ = true;
    for (int i = 0; i < W; ++i) bounded_ &= within[i] != 0;
  }

  void gate(const Sequence& s, int64_t t, int64_t steps) { stream(p_.in.z, p_.to.z, s.row, t, steps, z); }

  // Rows of the block from a stream, the padding of the last vector zero.
  void stream(const Stream& from, const Stream& to, int64_t row, int64_t t, int64_t steps, const Plane<X>& out) const {
    for (int64_t i = 0; i < steps; ++i) {
      read_row(from, from.at(row, t + i, 0), out.data + i * width);
      if constexpr (Number<X>::dual) read_row(to, to.at(row, t + i, 0), out.data + out.plane + i * width);
    }
  }
  void write_rows(const Plane<X>& rows, const Stream& to, int64_t row, int64_t t, int64_t steps) const {
    for (int64_t i = 0; i < steps; ++i)
      write(to, to.at(row, t + i, 0) + block_.c0, block_.count, rows.result() + i * width);
  }

  const Block& block() const { return block_; }

  // Calls body with std::true_type where exponentials need no care in the prepared steps. Those of doubles never do.
  template <class Body>
  void with_bound(const Body& body) const {
    if constexpr (std::is_same_v<T, double>) return body(std::true_type{});
    else if (bounded_) return body(std::true_type{});
    else return body(std::false_type{});
  }

  int64_t width = 0;
  Plane<X> raw, u, dt, x, y, z, B, C, A2, D, bias, h;

 private:
  void parameter(const T* from, const T* to, int64_t first, const Plane<X>& out) const {
    for (int64_t c = 0; c < width; ++c) {
      out.data[c] = from && c < block_.count ? from[first + c] : T(0);
      if constexpr (Number<X>::dual) out.data[out.plane + c] = to && c < block_.count ? to[first + c] : T(0);
    }
  }
  void read_row(const Stream& from, int64_t at, T* out) const {
    if (!from) return void(std::fill_n(out, width, T(0)));
    read(from, at + block_.c0, block_.count, out);
    std::fill(out + block_.count, out + width, T(0));
  }
  void maps(const Stream& from, const Stream& to, int64_t row, int64_t t, int64_t steps, const Plane<X>& out) const {
    for (int64_t i = 0; i < steps; ++i) {
      read(from, from.at(row, t + i, block_.g), n_.N, out.data + i * n_.N);
      if constexpr (Number<X>::dual) {
        T* tangent = out.data + out.plane + i * n_.N;
        if (to) read(to, to.at(row, t + i, block_.g), n_.N, tangent);
        else std::fill_n(tangent, n_.N, T(0));
      }
    }
  }

  const Call<T>& p_;
  const Sizes n_;
  Block block_{0, -1, 0};
  int64_t set_ = -1;
  T largest_ = 0;
  bool bounded_ = false;
  Pool<X> pool_;
};

// Stretches of a chunk without a reset inside: calls body(first, last, dropped) with steps counted from the chunk's
// start; `dropped` where the state is dropped before the first.
template <class Body>
void stretches(const bool* reset, int64_t steps, const Body& body) {
  int64_t first = 0;
  bool dropped = reset && steps && reset[0];
  for (int64_t i = 1; i < steps; ++i)
    if (reset && reset[i]) body(first, i, dropped), first = i, dropped = true;
  if (first < steps) body(first, steps, dropped);
}

template <class T>
const bool* resets(const Call<T>& p, const Sequence& s, int64_t t) {
  return p.reset ? p.reset + s.row * p.n.L + t : nullptr;
}

// As many threads as there is work for.
template <class T>
int worthwhile(const Call<T>& p, double weight) {
  const double work = weight * double(p.n.R) * double(p.n.L) * double(p.n.D) * double(p.n.N);
  return static_cast<int>(std::clamp(work / 1e5, 1.0, double(std::max(p.threads, 1))));
}

template <class X>
struct ForwardOut {
  using T = typename Number<X>::type;
  Stream y;
  T* final;
  T* carries;     // of the state, or null
  int64_t plane;  // from a carry to that of its tangent
};

template <class X>
void forward(const Call<typename Number<X>::type>& p, const ForwardOut<X>& out);

template <class X>
struct BackwardIn {
  using T = typename Number<X>::type;
  Stream grad_y;
  const T* grad_final;  // or null
  const T* carries;
  int64_t plane;
};

template <class X>
void backward(const Call<typename Number<X>::type>& p, const BackwardIn<X>& in,
              const Inputs<typename Number<X>::type>& grads);

// float or double: what the state is kept in.
template <class F>
void on_state_type(int dtype, F&& f) {
  if (dtype == static_cast<int>(Dtype::f32)) return f(float{});
  if (dtype == static_cast<int>(Dtype::f64)) return f(double{});
  throw std::invalid_argument("selective_scan: the state must be float32 or float64");
}

template <class T>
Call<T> call_of(const py::tuple& sizes, const py::tuple& streams, const py::tuple& parameters, const py::tuple& places,
                bool softplus, int threads) {
  auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
  Call<T> p{{size(0), size(1), size(2), size(3), size(4), size(5), size(6), size(7)},
            inputs_of<T>(streams, parameters),
            {},
            reinterpret_cast<const bool*>(places[0].cast<uintptr_t>()),
            reinterpret_cast<const int64_t*>(places[1].cast<uintptr_t>()),
            softplus,
            threads};
  if (const int64_t* cu = p.cu_seqlens) {
    bool right = cu[0] == 0 && cu[p.n.packed] == p.n.L;
    for (int64_t i = 0; i < p.n.packed; ++i) right = right && cu[i] <= cu[i + 1];
    if (!right) throw std::invalid_argument("cu_seqlens: expected values that rise from 0 to L");
  }
  return p;
}

}  // namespace fastmem::scan
