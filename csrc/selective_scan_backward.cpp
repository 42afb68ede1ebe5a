// selective_scan, backward, on numbers or dual numbers: chunks from the last to the first, each recomputed from the state
// that the forward kept before it. The adjoint of the state runs against time; what it is multiplied with, h[t - 1] and
// 2^(dt A2), comes from the recomputation.
#include "selective_scan.h"

namespace fastmem::scan {
namespace {

// What a thread holds beside the rows. Sums over channels (of B and C) stay vectors until a chunk is done.
template <class X>
struct Adjoint {
  using T = typename Number<X>::type;
  static constexpr int W = kLanes<T>;
  static constexpr int K = kStates<X>;

  explicit Adjoint(const Sizes& n) {
    const int64_t steps = std::min(n.chunk, n.L);
    m = pool.take(n.N * kMaxWidth), dA = pool.take(n.N * kMaxWidth);
    dD = pool.take(kMaxWidth), dbias = pool.take(kMaxWidth);
    gy = pool.take(steps * kMaxWidth), g = pool.take(steps * kMaxWidth);
    dx = pool.take(steps * kMaxWidth), drate = pool.take(steps * kMaxWidth);
    a = pool.take(steps * K * W), h = pool.take((steps + 1) * K * W);
    dB = pool.take(n.N * steps * W), dC = pool.take(n.N * steps * W);
    sums = pool.take(steps * n.N);
  }

  Pool<X> pool;
  Plane<X> m;            // [state][channel]: what the next step hands down, a[t + 1] times the adjoint of h[t + 1]
  Plane<X> dA, dD, dbias;
  Plane<X> gy, g;        // [step][channel]: gradient of y, and of what stands before the gate
  Plane<X> dx, drate;    // [step][channel]: gradients of x = dt u, and of dt through the exponentials, over ln 2
  Plane<X> a, h;         // [step][K]: 2^(dt A2), and the state before the step, of one vector of channels
  Plane<X> dB, dC;       // [state][step]: vectors over channels
  Plane<X> sums;
};

struct Stretch {
  int64_t first, last;
  bool dropped;
};

template <class X, int K, bool bounded>
void adjoint_states(const Rows<X>& rows, const Adjoint<X>& own, const std::vector<Stretch>& parts, int64_t N, int64_t n,
                    int64_t c, int64_t steps, bool with_y) {
  constexpr int W = Rows<X>::W;
  const int64_t width = rows.width;
  X h[K], A2[K], m[K], dA[K];
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * width + c;
    h[k] = rows.h.at(at), A2[k] = rows.A2.at(at), m[k] = own.m.at(at), dA[k] = own.dA.at(at);
    own.h.put(k * W, h[k]);
  }
  for (const Stretch& part : parts) {
    if (part.dropped)
      for (int k = 0; k < K; ++k) h[k] = X{};
    for (int64_t t = part.first; t < part.last; ++t) {
      const int64_t at = t * width + c, map = t * N + n;
      const X dt = rows.dt.at(at), x = rows.x.at(at);
      X y = with_y ? rows.y.at(at) : X{};
      for (int k = 0; k < K; ++k) {
        const X a = exp2<bounded>(dt * A2[k]);
        h[k] = a * h[k] + x * rows.B.broadcast(map + k);
        own.a.put((t * K + k) * W, a);
        own.h.put(((t + 1) * K + k) * W, h[k]);
        if (with_y) y = y + h[k] * rows.C.broadcast(map + k);
      }
      if (with_y) rows.y.put(at, y);
    }
  }
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    for (int64_t t = part->last - 1; t >= part->first; --t) {
      const int64_t at = t * width + c, map = t * N + n;
      const X dt = rows.dt.at(at), x = rows.x.at(at), g = own.g.at(at);
      const bool fresh = t == part->first && part->dropped;
      X dx = own.dx.at(at), drate = own.drate.at(at);
      for (int k = 0; k < K; ++k) {
        const int64_t sum = ((n + k) * steps + t) * W;
        const X adjoint = m[k] + g * rows.C.broadcast(map + k);
        own.dC.add(sum, g * h[k]);
        own.dB.add(sum, adjoint * x);
        dx = dx + adjoint * rows.B.broadcast(map + k);
        h[k] = own.h.at((t * K + k) * W);
        if (fresh) {
          m[k] = X{};
          continue;
        }
        m[k] = own.a.at((t * K + k) * W) * adjoint;
        const X q = m[k] * h[k];
        drate = drate + q * A2[k];
        dA[k] = dA[k] + q * dt;
      }
      own.dx.put(at, dx), own.drate.put(at, drate);
    }
  }
  for (int k = 0; k < K; ++k) own.m.put((n + k) * width + c, m[k]), own.dA.put((n + k) * width + c, dA[k]);
}

template <class X, bool bounded>
void adjoint_chunk(const Rows<X>& rows, const Adjoint<X>& own, const std::vector<Stretch>& parts, int64_t N,
                   int64_t steps, bool with_y) {
  constexpr int K = Adjoint<X>::K;
  for (int64_t c = 0; c < rows.width; c += Rows<X>::W) {
    int64_t n = 0;
    for (; n + K <= N; n += K) adjoint_states<X, K, bounded>(rows, own, parts, N, n, c, steps, with_y);
    for (; n < N; ++n) adjoint_states<X, 1, bounded>(rows, own, parts, N, n, c, steps, with_y);
  }
}

template <class X>
void zero(const Plane<X>& x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<typename Number<X>::type>) x.put(i, X{});
}

// Sums over the lanes of each vector [state][step] -> [step][state].
template <class X>
void over_lanes(const Plane<X>& vectors, int64_t N, int64_t steps, const Plane<X>& out) {
  using T = typename Number<X>::type;
  constexpr int W = kLanes<T>;
  const T* from = vectors.result();
  T* to = out.result();
  for (int64_t n = 0; n < N; ++n)
    for (int64_t t = 0; t < steps; ++t) to[t * N + n] = sum<T>(load(from + (n * steps + t) * W));
}

// Where sums over blocks of channels (dB, dC) and over groups of sequences (dA, dD, dbias) are collected.
template <class T>
struct Partials {
  Partials(const Call<T>& p, int64_t blocks_a_group)
      : blocks(blocks_a_group), maps(p.n.R * p.n.L * p.n.G * p.n.N) {
    const int64_t a_set = p.n.sequences() / p.n.P;
    groups = std::min(a_set, std::max<int64_t>(1, 64 / p.n.P));
    if (blocks > 1) dB.reset(new T[blocks * maps]), dC.reset(new T[blocks * maps]);
    const int64_t rows = p.n.P * groups * p.n.D;
    dA.reset(new T[rows * p.n.N]), dD.reset(new T[rows]), dbias.reset(new T[rows]);
  }

  int64_t blocks, maps, groups;
  std::unique_ptr<T[]> dB, dC;         // [block of a group][R, L, G, N]
  std::unique_ptr<T[]> dA, dD, dbias;  // [set][group of sequences][D, N] or [D]
};

template <class X>
class Backward {
 public:
  using T = typename Number<X>::type;
  static constexpr int W = kLanes<T>;

  Backward(const Call<T>& p, const BackwardIn<X>& in, const Inputs<T>& grads, const Partials<T>& partials)
      : p_(p), in_(in), grads_(grads), partials_(partials), rows_(p), own_(p.n) {}

  // Group `group` of the sequences of one set, one block of channels.
  void run(const Block& block, int64_t place, int64_t set, int64_t group) {
    const int64_t a_set = p_.n.sequences() / p_.n.P, first = set * a_set;
    rows_.enter(block, set);
    zero(own_.dA, p_.n.N * rows_.width), zero(own_.dD, rows_.width), zero(own_.dbias, rows_.width);
    for (int64_t i = a_set * group / partials_.groups; i < a_set * (group + 1) / partials_.groups; ++i)
      sequence(sequence_of(p_, first + i), place);
    const int64_t row = (set * partials_.groups + group) * p_.n.D + block.c0;
    const T* dA = own_.dA.result();
    for (int64_t c = 0; c < block.count; ++c) {
      for (int64_t n = 0; n < p_.n.N; ++n) partials_.dA[(row + c) * p_.n.N + n] = dA[n * rows_.width + c];
      partials_.dD[row + c] = own_.dD.result()[c], partials_.dbias[row + c] = own_.dbias.result()[c];
    }
  }

 private:
  void sequence(const Sequence& s, int64_t place) {
    const int64_t N = p_.n.N, width = rows_.width, length = s.end - s.begin;
    const Block block = rows_.block();
    rows_.transposed(in_.grad_final, nullptr, s.index, own_.m);
    for (int64_t c = (length + p_.n.chunk - 1) / p_.n.chunk - 1; c >= 0; --c) {
      const int64_t t = s.begin + c * p_.n.chunk, steps = std::min(p_.n.chunk, s.end - t);
      if (c == 0) rows_.initial_state(s);
      else load_carry(s, c);
      chunk(s, t, steps, place);
    }
    if (!grads_.initial) return;
    T* to = grads_.initial + (s.index * p_.n.D + block.c0) * N;
    const T* m = own_.m.result();
    for (int64_t c = 0; c < block.count; ++c)
      for (int64_t n = 0; n < N; ++n) to[c * N + n] = m[n * width + c];
  }

  void load_carry(const Sequence& s, int64_t c) {
    const Block block = rows_.block();
    const T* carry = in_.carries + carry_at(p_.n, s, c, block);
    for (int64_t n = 0; n < p_.n.N; ++n) {
      T* to = rows_.h.data + n * rows_.width;
      std::copy_n(carry + n * p_.n.D, block.count, to);
      if constexpr (Number<X>::dual) std::copy_n(carry + in_.plane + n * p_.n.D, block.count, to + rows_.h.plane);
    }
  }

  void chunk(const Sequence& s, int64_t t, int64_t steps, int64_t place) {
    const int64_t N = p_.n.N, width = rows_.width, cells = steps * width;
    const bool gated = static_cast<bool>(p_.in.z);
    rows_.prepare(s, t, steps);
    rows_.stream(in_.grad_y, {}, s.row, t, steps, own_.gy);
    if (gated) {
      rows_.gate(s, t, steps);
      for (int64_t i = 0; i < cells; i += W) {
        const X z = rows_.z.at(i);
        own_.g.put(i, own_.gy.at(i) * (z * sigmoid(z)));
      }
    } else {
      for (int64_t i = 0; i < cells; i += W) own_.g.put(i, own_.gy.at(i));
    }
    parts_.clear();
    stretches(resets(p_, s, t), steps, [&](int64_t first, int64_t last, bool dropped) {
      parts_.push_back({first, last, dropped});
    });
    zero(own_.dx, cells), zero(own_.drate, cells), zero(own_.dB, N * steps * W), zero(own_.dC, N * steps * W);
    rows_.with_bound([&](auto bounded) { adjoint_chunk<X, bounded()>(rows_, own_, parts_, N, steps, gated); });
    finish(s, t, steps);
    maps(own_.dB, grads_.B, partials_.dB.get(), s, t, steps, place);
    maps(own_.dC, grads_.C, partials_.dC.get(), s, t, steps, place);
  }

  // From the gradients of x, of the exponentials and of what stands before the gate to those of the inputs.
  void finish(const Sequence& s, int64_t t, int64_t steps) {
    const int64_t width = rows_.width;
    const X ln2 = constant<X>(T(kLn2)), one = constant<X>(T(1));
    for (int64_t c = 0; c < width; c += W) {
      const X D = rows_.D.at(c);
      X dD = own_.dD.at(c), dbias = own_.dbias.at(c);
      for (int64_t i = c; i < steps * width; i += width) {
        const X u = rows_.u.at(i), g = own_.g.at(i), dx = own_.dx.at(i);
        X ddelta = u * dx + ln2 * own_.drate.at(i);
        if (p_.softplus) ddelta = ddelta * sigmoid(rows_.raw.at(i));
        X du = rows_.dt.at(i) * dx;
        if (p_.in.D) du = du + g * D, dD = dD + g * u;
        dbias = dbias + ddelta;
        if (p_.in.z) {
          const X z = rows_.z.at(i), gate = sigmoid(z);
          rows_.y.put(i, own_.gy.at(i) * rows_.y.at(i) * (gate * (one + z * (one - gate))));
        }
        own_.dx.put(i, du), own_.drate.put(i, ddelta);
      }
      own_.dD.put(c, dD), own_.dbias.put(c, dbias);
    }
    rows_.write_rows(own_.dx, grads_.u, s.row, t, steps);
    rows_.write_rows(own_.drate, grads_.delta, s.row, t, steps);
    if (p_.in.z) rows_.write_rows(rows_.y, grads_.z, s.row, t, steps);
  }

  void maps(const Plane<X>& vectors, const Stream& grad, T* partial, const Sequence& s, int64_t t, int64_t steps,
            int64_t place) {
    const int64_t N = p_.n.N, g = rows_.block().g;
    over_lanes(vectors, N, steps, own_.sums);
    const T* sums = own_.sums.result();
    for (int64_t i = 0; i < steps; ++i) {
      if (partial)
        std::copy_n(sums + i * N, N, partial + place * partials_.maps + ((s.row * p_.n.L + t + i) * p_.n.G + g) * N);
      else
        write(grad, grad.at(s.row, t + i, g), N, sums + i * N);
    }
  }

  const Call<T>& p_;
  const BackwardIn<X>& in_;
  const Inputs<T>& grads_;
  const Partials<T>& partials_;
  Rows<X> rows_;
  Adjoint<X> own_;
  std::vector<Stretch> parts_;
};

// out[i] = sum over k of in[k][i], in order.
template <class T>
void add_up(const T* in, int64_t terms, int64_t stride, int64_t begin, int64_t end, T* out) {
  std::copy(in + begin, in + end, out);
  for (int64_t k = 1; k < terms; ++k) add_scaled(T(1), in + k * stride + begin, out, end - begin);
}

// Steps that belong to no sequence do not exist, so every element of dB and dC has been written by every block.
template <class T>
void sum_maps(const Call<T>& p, const Partials<T>& partials, const T* partial, const Stream& grad) {
  const int64_t rows = p.n.R * p.n.L * p.n.G, N = p.n.N;
  parallel_for(rows, std::min<int64_t>(p.threads, rows * N * partials.blocks / 100'000 + 1),
               [&](int64_t begin, int64_t end, int) {
                 constexpr int64_t kRows = 256;
                 std::vector<T> sums(kRows * N);
                 for (int64_t r = begin; r < end; r += kRows) {
                   const int64_t last = std::min(end, r + kRows);
                   add_up(partial, partials.blocks, partials.maps, r * N, last * N, sums.data());
                   write(grad, r * N, (last - r) * N, sums.data());
                 }
               });
}

template <class T>
void sum_sets(const T* partial, int64_t sets, int64_t groups, int64_t width, T* out) {
  if (!out) return;
  for (int64_t s = 0; s < sets; ++s)
    add_up(partial + s * groups * width, groups, width, int64_t(0), width, out + s * width);
}

}  // namespace

template <class X>
void backward(const Call<typename Number<X>::type>& p, const BackwardIn<X>& in,
              const Inputs<typename Number<X>::type>& grads) {
  using T = typename Number<X>::type;
  const std::vector<Block> blocks = blocks_of(p.n);
  const int64_t a_group = blocks.size() / p.n.G;
  if (p.n.sequences() == 0 || p.n.L == 0) {
    for (auto [to, count] : {std::pair{grads.A, p.n.P * p.n.D * p.n.N}, std::pair{grads.D, p.n.P * p.n.D},
                             std::pair{grads.bias, p.n.P * p.n.D}})
      if (to) std::fill_n(to, count, T(0));
    const int64_t states = p.n.sequences() * p.n.D * p.n.N;
    if (grads.initial && in.grad_final && !Number<X>::dual) std::copy_n(in.grad_final, states, grads.initial);
    else if (grads.initial) std::fill_n(grads.initial, states, T(0));
    return;
  }
  Partials<T> partials(p, a_group);
  const int64_t units = blocks.size() * p.n.P * partials.groups;
  parallel_for(units, worthwhile(p, 2), [&](int64_t begin, int64_t end, int) {
    Backward<X> piece(p, in, grads, partials);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / (p.n.P * partials.groups), rest = unit % (p.n.P * partials.groups);
      piece.run(blocks[block], block % a_group, rest / partials.groups, rest % partials.groups);
    }
  });
  if (partials.blocks > 1) {
    sum_maps(p, partials, partials.dB.get(), grads.B);
    sum_maps(p, partials, partials.dC.get(), grads.C);
  }
  sum_sets(partials.dA.get(), p.n.P, partials.groups, p.n.D * p.n.N, grads.A);
  sum_sets(partials.dD.get(), p.n.P, partials.groups, p.n.D, grads.D);
  sum_sets(partials.dbias.get(), p.n.P, partials.groups, p.n.D, grads.bias);
}

template void backward<Vec<float>>(const Call<float>&, const BackwardIn<Vec<float>>&, const Inputs<float>&);
template void backward<Vec<double>>(const Call<double>&, const BackwardIn<Vec<double>>&, const Inputs<double>&);
template void backward<Dual<float>>(const Call<float>&, const BackwardIn<Dual<float>>&, const Inputs<float>&);
template void backward<Dual<double>>(const Call<double>&, const BackwardIn<Dual<double>>&, const Inputs<double>&);

}  // namespace fastmem::scan
