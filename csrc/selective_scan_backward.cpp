// selective_scan, backward, on numbers or dual numbers: chunks from the last to the first, each recomputed from the state
// that the forward kept before it. The adjoint of the state runs against time; what it is multiplied with, h[t - 1] and
// 2^(dt A2), comes from the recomputation. Where only the gradients of A and of the initial state are wanted, as when a
// step of MAML moves A, one walk from the first chunk to the last has them: how a state depends on those two is as large as
// the state itself.
#include "selective_scan.h"

namespace fastmem::scan {
namespace {

// What a thread holds beside the chunk.
template <class X>
struct Adjoint {
  using T = typename Number<X>::type;
  static constexpr int W = Chunk<X>::W;
  static constexpr int K = kStates<X>;  // the most that are taken at once

  Adjoint(const Sizes& n, Chunk<X>& chunk) : N(n.N) {
    const int64_t steps = std::min(n.chunk, n.L);
    raw = chunk.cells(), u = chunk.cells(), gy = chunk.cells(), z = chunk.cells(), g = chunk.cells();
    dx = chunk.cells(), drate = chunk.cells();
    a = pool.take(steps * K * W), h = pool.take((steps + 1) * K * W);
    dB = maps.take(steps * n.N).data, dC = maps.take(steps * n.N).data;
  }

  // What the i-th block of a span keeps from chunk to chunk.
  void select(int64_t i) {
    while (static_cast<int64_t>(held.size()) <= i)
      held.push_back({pool.take(N * kMaxWidth), pool.take(N * kMaxWidth), pool.take(N * kMaxWidth),
                      pool.take(N * kMaxWidth), pool.take(kMaxWidth), pool.take(kMaxWidth)});
    m = held[i].m, dA = held[i].dA, s = held[i].s, dinitial = held[i].dinitial, dD = held[i].dD, dbias = held[i].dbias;
  }

  const int64_t N;
  Pool<X> pool;
  struct Held {
    Plane<X> m, dA, s, dinitial, dD, dbias;
  };
  std::vector<Held> held;
  Plane<X> m;  // [state][channel]: what a step hands down to the one before, 2^(dt A2) times the adjoint of its state; or,
               // with time, the derivative of the state with respect to A
  Plane<X> s, dinitial;  // and the one with respect to the initial state, and the gradient of that
  Plane<X> dA, dD, dbias;
  Plane<X> raw, u;     // cells: delta before softplus, and u
  Plane<X> gy, z, g;   // cells: gradient of y, the gate's input, gradient of what stands before the gate
  Plane<X> dx, drate;  // cells: gradients of x = dt u, and of dt through the exponentials, over ln 2
  Plane<X> a, h;       // [step][K]: 2^(dt A2), and the state before the step, of one vector of channels
  Pool<Vec<T>> maps;
  T *dB, *dC;  // [step][state]: sums over the block's channels, where no partials are kept
};

// Sums over the channels of a block, of each step's states.
template <class T>
struct Sums {
  T* data;
  int64_t step;
};

struct Stretch {
  int64_t first, last;
  bool dropped;
};

// dB[k] and dC[k] += the sums over lanes of what they get from one vector of channels. Kept as vectors until all channels
// are done, they would fill L1 twice over.
template <int K, class T>
inline void add_sums(const Vec<T> (&to_B)[K], const Vec<T> (&to_C)[K], T* dB, T* dC) {
  Vec<T> all[2 * K];
  T sums[2 * K];
  for (int k = 0; k < K; ++k) all[k] = to_B[k], all[K + k] = to_C[k];
  if constexpr (K % 2 == 0)
    for (int k = 0; k < 2 * K; k += 4) four_sums<T>(all + k, sums + k);
  else
    for (int k = 0; k < 2 * K; ++k) sums[k] = sum<T>(all[k]);
  // As vectors: the compiler makes K single additions of a loop.
  typedef T States __attribute__((vector_size(K * sizeof(T))));
  for (auto [to, from] : {std::pair{dB, sums}, std::pair{dC, sums + K}}) {
    States total, more;
    std::memcpy(&total, to, sizeof(total)), std::memcpy(&more, from, sizeof(more));
    total += more;
    std::memcpy(to, &total, sizeof(total));
  }
}

template <class X, int K, bool bounded>
void adjoint_states(const Chunk<X>& chunk, const Adjoint<X>& own, const std::vector<Stretch>& parts,
                    const Ahead& ahead, int64_t pass, int64_t passes, int64_t n, int64_t c, bool with_y,
                    Sums<typename Number<X>::type> dB, Sums<typename Number<X>::type> dC) {
  using T = typename Number<X>::type;
  constexpr int W = Chunk<X>::W;
  const int64_t width = chunk.width;
  X h[K], A2[K], m[K], dA[K];
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * width + c;
    h[k] = chunk.h.at(at), A2[k] = chunk.A2.at(at), m[k] = own.m.at(at), dA[k] = own.dA.at(at);
    own.h.put(k * W, h[k]);
  }
  const auto B = chunk.B, C = chunk.C;
  const Plane<X> dts = chunk.dt, xs = chunk.x, ys = chunk.y, as = own.a, hs = own.h;
  for (const Stretch& part : parts) {
    if (part.dropped)
      for (int k = 0; k < K; ++k) h[k] = X{};
    for (int64_t t = part.first; t < part.last; ++t) {
      const int64_t at = chunk.cell(c, t);
      const X dt = dts.at(at), x = xs.at(at);
      ahead.ask(pass, passes, t, c);
      for (int k = 0; k < K; ++k) {
        const X a = exp2<bounded>(dt * A2[k]);
        h[k] = a * h[k] + x * B.data.broadcast(t * B.step + n + k);
        as.put((t * K + k) * W, a);
        hs.put(((t + 1) * K + k) * W, h[k]);
      }
      if (with_y) {
        X y = ys.at(at);
        for (int k = 0; k < K; ++k) y = y + h[k] * C.data.broadcast(t * C.step + n + k);
        ys.put(at, y);
      }
    }
  }
  const Plane<X> gs = own.g, dxs = own.dx, drates = own.drate;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    for (int64_t t = part->last - 1; t >= part->first; --t) {
      const int64_t at = chunk.cell(c, t);
      const X dt = dts.at(at), x = xs.at(at), g = gs.at(at);
      const bool fresh = t == part->first && part->dropped;
      X dx = dxs.at(at), drate = drates.at(at);
      Vec<T> to_B[K], to_C[K];
      for (int k = 0; k < K; ++k) {
        const X adjoint = m[k] + g * C.data.broadcast(t * C.step + n + k);
        to_C[k] = result(g * h[k]), to_B[k] = result(adjoint * x);
        dx = dx + adjoint * B.data.broadcast(t * B.step + n + k);
        h[k] = hs.at((t * K + k) * W);
        m[k] = as.at((t * K + k) * W) * adjoint;
        const X q = m[k] * h[k];
        if (fresh) {
          m[k] = X{};
          continue;
        }
        drate = drate + q * A2[k];
        dA[k] = dA[k] + q * dt;
      }
      add_sums<K, T>(to_B, to_C, dB.data + t * dB.step + n, dC.data + t * dC.step + n);
      dxs.put(at, dx), drates.put(at, drate);
    }
  }
  for (int k = 0; k < K; ++k) own.m.put((n + k) * width + c, m[k]), own.dA.put((n + k) * width + c, dA[k]);
}

// With time, y too in a tangent: m = dh/dA = 2^(dt A2) (m + dt h), s = dh/dh[0] = 2^(dt A2) s, and each step adds g C times either.
template <class X, int K, bool bounded, bool initial>
void sensitive_states(const Chunk<X>& chunk, const Adjoint<X>& own, const std::vector<Stretch>& parts,
                      const Ahead& ahead, int64_t pass, int64_t passes, int64_t n, int64_t c) {
  using T = typename Number<X>::type;
  constexpr bool with_y = Number<X>::dual;  // a tangent's; it walks once for all
  const int64_t width = chunk.width;
  X h[K], A2[K], m[K], s[K];
  Vec<T> dA[K], dinitial[K];
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * width + c;
    h[k] = chunk.h.at(at), A2[k] = chunk.A2.at(at), m[k] = own.m.at(at), dA[k] = load(own.dA.result() + at);
    if constexpr (initial) s[k] = own.s.at(at), dinitial[k] = load(own.dinitial.result() + at);
  }
  const auto B = chunk.B, C = chunk.C;
  const Plane<X> dts = chunk.dt, xs = chunk.x, ys = chunk.y, gs = own.g;
  for (const Stretch& part : parts) {
    if (part.dropped)
      for (int k = 0; k < K; ++k) h[k] = m[k] = s[k] = X{};
    for (int64_t t = part.first; t < part.last; ++t) {
      const int64_t at = chunk.cell(c, t);
      const X dt = dts.at(at), x = xs.at(at), g = gs.at(at);
      [[maybe_unused]] X y{};
      ahead.ask(pass, passes, t, c);
      for (int k = 0; k < K; ++k) {
        const X a = exp2<bounded>(dt * A2[k]), out = C.data.broadcast(t * C.step + n + k), weight = g * out;
        m[k] = a * (m[k] + dt * h[k]);
        h[k] = a * h[k] + x * B.data.broadcast(t * B.step + n + k);
        dA[k] += result(weight * m[k]);
        if constexpr (initial) s[k] = a * s[k], dinitial[k] += result(weight * s[k]);
        if constexpr (with_y) y = y + h[k] * out;
      }
      if constexpr (with_y) ys.add(at, y);
    }
  }
  for (int k = 0; k < K; ++k) {
    const int64_t at = (n + k) * width + c;
    chunk.h.put(at, h[k]), own.m.put(at, m[k]), store(own.dA.result() + at, dA[k]);
    if constexpr (initial) own.s.put(at, s[k]), store(own.dinitial.result() + at, dinitial[k]);
  }
}

// Calls take(K, bounded, pass, passes, n, c) for states [n, n + K) of the vector of channels c, until all were taken.
template <class X, class Take>
void each_states(const Chunk<X>& chunk, int64_t N, const Take& take) {
  constexpr int K = kStates<X>;
  for (int64_t c = 0; c < chunk.width; c += Chunk<X>::W)
    chunk.with_bound(c, [&](auto bounded) {
      const int64_t passes = N / K + N % K;
      int64_t n = 0, pass = 0;
      for (; n + K <= N; n += K) take(std::integral_constant<int, K>{}, bounded, pass++, passes, n, c);
      for (; n < N; ++n) take(std::integral_constant<int, 1>{}, bounded, pass++, passes, n, c);
    });
}

// Where sums over blocks of channels (dB, dC) and over groups of sequences (dA, dD, dbias) are collected.
template <class T>
struct Partials {
  Partials(const Call<T>& p, int64_t blocks_a_group, bool wanted)
      : blocks(blocks_a_group), maps(p.n.R * p.n.L * p.n.G * p.n.N) {
    const int64_t a_set = p.n.sequences() / p.n.P;
    groups = std::min(a_set, std::max<int64_t>(1, 64 / p.n.P));
    if (blocks > 1 && wanted) {
      for (auto* to : {&dB, &dC}) {
        to->reset(new T[blocks * maps]);
        fastmem::in_huge_pages(to->get(), blocks * maps * sizeof(T));
      }
    }
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
  static constexpr int W = Chunk<X>::W;

  Backward(const Call<T>& p, const BackwardIn<X>& in, const Inputs<T>& grads, const Partials<T>& partials,
           const std::vector<Block>& blocks)
      : p_(p), in_(in), grads_(grads), partials_(partials), chunk_(p, blocks), own_(p.n, chunk_), all_(grads.beside_states()) {}

  // Group `group` of the sequences of one set, blocks [first, last).
  void run(int64_t first, int64_t last, int64_t set, int64_t group) {
    const int64_t N = p_.n.N, a_set = p_.n.sequences() / p_.n.P;
    chunk_.enter(first, last, set);
    each_block([&] {
      zero(own_.dA, N * chunk_.width), zero(own_.dD, chunk_.width), zero(own_.dbias, chunk_.width);
    });
    for (int64_t i = a_set * group / partials_.groups; i < a_set * (group + 1) / partials_.groups; ++i)
      sequence(sequence_of(p_, set * a_set + i));
    const int64_t row = set * partials_.groups + group;
    each_block([&] {
      const Block block = chunk_.block();
      chunk_.give_back(own_.dA, row, partials_.dA.get());
      std::copy_n(own_.dD.result(), block.count, partials_.dD.get() + row * p_.n.D + block.c0);
      std::copy_n(own_.dbias.result(), block.count, partials_.dbias.get() + row * p_.n.D + block.c0);
    });
  }

 private:
  template <class Body>
  void each_block(const Body& body) {
    for (int64_t i = 0; i < chunk_.span(); ++i) chunk_.select(i), own_.select(i), body();
  }

  void sequence(const Sequence& s) {
    if (!all_) return walk(s);
    each_block([&] { chunk_.transposed(in_.grad_final, nullptr, s.index, own_.m); });
    for (int64_t c = (s.end - s.begin + p_.n.chunk - 1) / p_.n.chunk - 1; c >= 0; --c) {
      const int64_t t = s.begin + c * p_.n.chunk;
      each_block([&] {
        if (c == 0) chunk_.initial_state(s);
        else load_carry(s, c);
        chunk(s, t, std::min(p_.n.chunk, s.end - t));
      });
    }
    if (grads_.initial) each_block([&] { chunk_.give_back(own_.m, s.index, grads_.initial); });
  }

  // A sequence from its first chunk to its last, for the gradients of A and of the initial state alone.
  void walk(const Sequence& s) {
    const int64_t states = p_.n.N;
    each_block([&] {
      chunk_.initial_state(s);
      for (int64_t i = 0; i < states * chunk_.width; i += W)
        own_.m.put(i, X{}), own_.s.put(i, constant<X>(T(1))), own_.dinitial.put(i, X{});
    });
    for (int64_t t = s.begin; t < s.end; t += p_.n.chunk)
      each_block([&] { chunk(s, t, std::min(p_.n.chunk, s.end - t)); });
    each_block([&] {
      if (in_.final) chunk_.give_back(chunk_.h, s.index, in_.final);
      if (in_.grad_final) {
        const Plane<X> weight = chunk_.h;
        chunk_.transposed(in_.grad_final, nullptr, s.index, weight);
        for (int64_t i = 0; i < states * chunk_.width; i += W) {
          own_.dA.add(i, weight.at(i) * own_.m.at(i)), own_.dinitial.add(i, weight.at(i) * own_.s.at(i));
        }
      }
      if (grads_.initial) chunk_.give_back(own_.dinitial, s.index, grads_.initial);
    });
  }

  void load_carry(const Sequence& s, int64_t c) {
    const Block block = chunk_.block();
    const T* carry = in_.carries + carry_at(p_.n, s, c, block);
    for (int64_t n = 0; n < p_.n.N; ++n) {
      T* to = chunk_.h.data + n * chunk_.width;
      std::copy_n(carry + n * p_.n.D, block.count, to);
      if constexpr (Number<X>::dual) std::copy_n(carry + in_.plane + n * p_.n.D, block.count, to + chunk_.h.plane);
    }
  }

  void chunk(const Sequence& s, int64_t t, int64_t steps) {
    const int64_t N = p_.n.N, cells = chunk_.cell(chunk_.width, 0);
    const Plane<X> raw = own_.raw, u = own_.u;
    const bool soft = p_.softplus;
    chunk_.prepare(s, t, steps, [=](int64_t at, X delta, X in) {
      if (soft) raw.put(at, delta);
      u.put(at, in);
    });
    gate(s, t, steps);
    parts_.clear();
    stretches(resets(p_, s, t), steps, [&](int64_t first, int64_t last, bool dropped) {
      parts_.push_back({first, last, dropped});
    });
    const bool with_y = grads_.z || in_.y;
    const Ahead ahead = chunk_.ahead({p_.in.u, p_.in.delta, p_.in.z, in_.grad_y, p_.to.u, p_.to.delta, p_.to.z},
                                     {grads_.u, grads_.delta, grads_.z, in_.y}, s.row, t,
                                     all_ ? t - p_.n.chunk : t + p_.n.chunk);
    if (!all_) {
      auto taken = [&](auto initial) {
        each_states(chunk_, N, [&](auto K, auto bounded, int64_t pass, int64_t passes, int64_t n, int64_t c) {
          sensitive_states<X, K(), bounded(), initial()>(chunk_, own_, parts_, ahead, pass, passes, n, c);
        });
      };
      if (grads_.initial) taken(std::true_type{});
      else taken(std::false_type{});
      if (in_.y) chunk_.write_y(in_.y, s, t, steps);
      return;
    }
    zero(own_.dx, cells), zero(own_.drate, cells);
    const Sums<T> dB = sums(partials_.dB.get(), own_.dB, s, t, steps), dC = sums(partials_.dC.get(), own_.dC, s, t, steps);
    each_states(chunk_, N, [&](auto K, auto bounded, int64_t pass, int64_t passes, int64_t n, int64_t c) {
      adjoint_states<X, K(), bounded()>(chunk_, own_, parts_, ahead, pass, passes, n, c, with_y, dB, dC);
    });
    if (in_.y) chunk_.write_y(in_.y, s, t, steps);
    finish(s, t, steps);
    if (!partials_.dB) write_sums(dB, grads_.B, s, t, steps), write_sums(dC, grads_.C, s, t, steps);
  }

  // The gradient of what stands before the gate.
  void gate(const Sequence& s, int64_t t, int64_t steps) {
    const Plane<X> gys = own_.gy, zs = own_.z, gs = own_.g;
    const int64_t width = chunk_.width, column = chunk_.cell(W, 0);
    for (int64_t i = 0; i < steps; ++i) {
      const Row<X> gy = chunk_.row(in_.grad_y, {}, s.row, t + i, 0);
      if (!p_.in.z) {
        for (int64_t c = 0, at = i * W; c < width; c += W, at += column) gs.put(at, gy.at(c));
        continue;
      }
      const Row<X> z = chunk_.row(p_.in.z, p_.to.z, s.row, t + i, 1);
      for (int64_t c = 0, at = i * W; c < width; c += W, at += column) {
        const X gate = z.at(c), grad = gy.at(c);
        zs.put(at, gate), gys.put(at, grad), gs.put(at, grad * (gate * sigmoid(gate)));
      }
    }
  }

  // From the gradients of x, of the exponentials and of what stands before the gate to those of the inputs.
  void finish(const Sequence& s, int64_t t, int64_t steps) {
    const X ln2 = constant<X>(T(kLn2)), one = constant<X>(T(1));
    const Plane<X> raws = own_.raw, us = own_.u, gys = own_.gy, zs = own_.z, gs = own_.g, dxs = own_.dx;
    const Plane<X> drates = own_.drate, dts = chunk_.dt, ys = chunk_.y;
    const bool soft = p_.softplus, skips = p_.in.D, gated = static_cast<bool>(grads_.z);
    for (int64_t c = 0; c < chunk_.width; c += W) {
      const X D = chunk_.D.at(c);
      X dD = own_.dD.at(c), dbias = own_.dbias.at(c);
      for (int64_t at = chunk_.cell(c, 0), end = chunk_.cell(c, steps); at < end; at += W) {
        const X u = us.at(at), g = gs.at(at), dx = dxs.at(at);
        X ddelta = u * dx + ln2 * drates.at(at);
        if (soft) ddelta = ddelta * sigmoid(raws.at(at));
        X du = dts.at(at) * dx;
        if (skips) du = du + g * D, dD = dD + g * u;
        dbias = dbias + ddelta;
        if (gated) {
          const X z = zs.at(at), open = sigmoid(z);
          ys.put(at, gys.at(at) * ys.at(at) * (open * (one + z * (one - open))));
        }
        dxs.put(at, du), drates.put(at, ddelta);
      }
      own_.dD.put(c, dD), own_.dbias.put(c, dbias);
    }
    for (int64_t i = 0; i < steps; ++i) {
      auto column = [](Plane<X> cells) { return [=](int64_t, int64_t cell) { return cells.at(cell); }; };
      if (grads_.u) chunk_.write_row(grads_.u, s.row, t + i, i, column(dxs));
      if (grads_.delta) chunk_.write_row(grads_.delta, s.row, t + i, i, column(drates));
      if (grads_.z) chunk_.write_row(grads_.z, s.row, t + i, i, column(ys));
    }
  }

  // Zeros for a chunk's sums, in the block's place among the partials if these are kept.
  Sums<T> sums(T* partials, T* own, const Sequence& s, int64_t t, int64_t steps) const {
    const int64_t N = p_.n.N, G = p_.n.G;
    const Block& block = chunk_.block();
    Sums<T> to{own, N};
    if (partials) to = {partials + block.place * partials_.maps + ((s.row * p_.n.L + t) * G + block.g) * N, G * N};
    if (to.step == N) std::fill_n(to.data, steps * N, T(0));
    else
      for (int64_t i = 0; i < steps; ++i) std::fill_n(to.data + i * to.step, N, T(0));
    return to;
  }

  void write_sums(Sums<T> sums, const Stream& grad, const Sequence& s, int64_t t, int64_t steps) const {
    for (int64_t i = 0; grad && i < steps; ++i)
      write(grad, grad.at(s.row, t + i, chunk_.block().g), p_.n.N, sums.data + i * sums.step);
  }

  const Call<T>& p_;
  const BackwardIn<X>& in_;
  const Inputs<T>& grads_;
  const Partials<T>& partials_;
  Chunk<X> chunk_;
  Adjoint<X> own_;
  const bool all_;
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
  if (!partial || !grad) return;
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
  if (p.n.sequences() == 0 || p.n.L == 0 || p.n.D == 0) {
    for (const Stream& s : {grads.B, grads.C})
      if (s) std::memset(s.data, 0, p.n.R * p.n.L * p.n.G * p.n.N * bytes_of(s.dtype));
    for (auto [to, count] : {std::pair{grads.A, p.n.P * p.n.D * p.n.N}, std::pair{grads.D, p.n.P * p.n.D},
                             std::pair{grads.bias, p.n.P * p.n.D}})
      if (to) std::fill_n(to, count, T(0));
    const int64_t states = p.n.sequences() * p.n.D * p.n.N;
    if (grads.initial && in.grad_final && !Number<X>::dual) std::copy_n(in.grad_final, states, grads.initial);
    else if (grads.initial) std::fill_n(grads.initial, states, T(0));
    return;
  }
  in_huge_pages(p.n, {grads.u, grads.delta, grads.z});
  Partials<T> partials(p, a_group, grads.B || grads.C);
  const int64_t pieces = p.n.P * partials.groups, size = blocks.size();
  const int threads = worthwhile(p, 2);
  const int64_t spans = spans_for(size, pieces, threads);
  parallel_for(spans * pieces, threads, [&](int64_t begin, int64_t end, int) {
    Backward<X> work(p, in, grads, partials, blocks);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t span = unit / pieces, piece = unit % pieces;
      work.run(size * span / spans, size * (span + 1) / spans, piece / partials.groups, piece % partials.groups);
    }
  });
  sum_maps(p, partials, partials.dB.get(), grads.B);
  sum_maps(p, partials, partials.dC.get(), grads.C);
  sum_sets(partials.dA.get(), p.n.P, partials.groups, p.n.D * p.n.N, grads.A);
  sum_sets(partials.dD.get(), p.n.P, partials.groups, p.n.D, grads.D);
  sum_sets(partials.dbias.get(), p.n.P, partials.groups, p.n.D, grads.bias);
}

template void backward<Vec<float>>(const Call<float>&, const BackwardIn<Vec<float>>&, const Inputs<float>&);
template void backward<Vec<double>>(const Call<double>&, const BackwardIn<Vec<double>>&, const Inputs<double>&);
template void backward<Dual<float>>(const Call<float>&, const BackwardIn<Dual<float>>&, const Inputs<float>&);
template void backward<Dual<double>>(const Call<double>&, const BackwardIn<Dual<double>>&, const Inputs<double>&);

}  // namespace fastmem::scan
