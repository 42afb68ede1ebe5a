// causal_conv1d on the CPU; derivation in docs/ops/causal_conv1d.md.
//
// Vectors run over channels. One step of a block of channels is a row; a kernel gets its W inputs as W pointers to rows,
// so that a row of the initial state, a zero before it, or an input read in place are all the same to it.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"
#include "vector_math.h"

namespace fastmem {
namespace {

constexpr int64_t kSteps = 256;    // steps of one piece of work; sums over steps are cut here, whatever the threads
constexpr int64_t kBlock = 128;    // channels of one piece of work: few enough that all its rows stay in L1
constexpr int64_t kAtOnce = 16;    // steps read at a time where time is contiguous: 16 floats are one cache line
constexpr int64_t kSoon = 12;      // steps from asking for a row to reading it: a block's rows are too short to be foreseen

// ------------------------------------------------------------------------------------------------------------- vectors

// A whole vector, or the first n lanes of one with zeros in the others.
struct Whole {
  template <class A>
  Vec<A> get(const A* p) const {
    return load(p);
  }
  template <class A>
  void put(A* p, Vec<A> v) const {
    store(p, v);
  }
};
struct Part {
  int64_t n;
  template <class A>
  Vec<A> get(const A* p) const {
    Vec<A> v{};
    std::memcpy(&v, p, n * sizeof(A));
    return v;
  }
  template <class A>
  void put(A* p, Vec<A> v) const {
    std::memcpy(p, &v, n * sizeof(A));
  }
};

// Calls body(i, Whole or Part) over n channels; the last ones go through the same instructions as all others.
template <class A, class F>
inline void by_vector(int64_t n, F&& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// The logistic function of x, and 1 minus it without cancellation.
template <class A>
struct Sigmoid {
  Vec<A> value, rest;
  explicit Sigmoid(Vec<A> x) {
    const Vec<A> e = exp(x < 0 ? x : -x), larger = reciprocal(1 + e), smaller = e * larger;
    value = x < 0 ? smaller : larger;
    rest = x < 0 ? larger : smaller;
  }
};

// bias + sum over the taps; `weight` is (W, stride).
template <int W, class A, class Lanes>
inline Vec<A> taps_sum(const A* const* taps, const A* weight, int64_t stride, int count, Vec<A> total, int64_t i,
                       Lanes lanes) {
  const int n = W ? W : count;
  for (int w = 0; w < n; ++w) total += lanes.get(weight + w * stride + i) * lanes.get(taps[w] + i);
  return total;
}

template <class A>
using ForwardRow = void (*)(const A* const* taps, const A* weight, int64_t stride, const A* bias, int count, A* out,
                            int64_t n);
// W = 0: `count` taps.
template <class A, int W, bool silu>
void forward_row(const A* const* taps, const A* weight, int64_t stride, const A* bias, int count, A* out, int64_t n) {
  by_vector<A>(n, [&](int64_t i, auto lanes) {
    const Vec<A> start = bias ? lanes.get(bias + i) : Vec<A>{};
    const Vec<A> x = taps_sum<W, A>(taps, weight, stride, count, start, i, lanes);
    if constexpr (silu) lanes.put(out + i, x * Sigmoid<A>(x).value);
    else lanes.put(out + i, x);
  });
}

template <class A>
using BackwardRow = void (*)(const A* const* taps, const A* weight, int64_t stride, const A* bias, int count,
                             const A* grad_y, A* grad, A* sums, int64_t n);
// grad <- the gradient of the sum before the activation (not touched without one); sums (W + 1, stride), unless null,
// gain the products with each tap, and in the last row the gradient itself.
template <class A, int W, bool silu>
void backward_row(const A* const* taps, const A* weight, int64_t stride, const A* bias, int count, const A* grad_y,
                  A* grad, A* sums, int64_t n) {
  by_vector<A>(n, [&](int64_t i, auto lanes) {
    Vec<A> g = lanes.get(grad_y + i);
    if constexpr (silu) {
      const Vec<A> start = bias ? lanes.get(bias + i) : Vec<A>{};
      const Vec<A> x = taps_sum<W, A>(taps, weight, stride, count, start, i, lanes);
      const Sigmoid<A> s(x);
      g *= s.value * (1 + x * s.rest);
      lanes.put(grad + i, g);
    }
    if (!sums) return;
    const int taps_here = W ? W : count;
    for (int w = 0; w < taps_here; ++w) {
      A* sum = sums + w * stride + i;
      lanes.put(sum, lanes.get(sum) + g * lanes.get(taps[w] + i));
    }
    A* sum = sums + taps_here * stride + i;
    lanes.put(sum, lanes.get(sum) + g);
  });
}

template <class A, bool silu>
struct Rows {
  ForwardRow<A> forward;
  BackwardRow<A> backward;
  template <int W>
  static Rows of() {
    return {&forward_row<A, W, silu>, &backward_row<A, W, silu>};
  }
  static Rows of(int64_t W) {
    switch (W) {
      case 2: return of<2>();
      case 3: return of<3>();
      case 4: return of<4>();
      default: return of<0>();
    }
  }
};

// -------------------------------------------------------------------------------------------------------------- tensors

template <class T>
using Acc = typename Accumulate<T>::type;

template <class T>
inline Acc<T> widen(T x) {
  if constexpr (std::is_same_v<T, Acc<T>>) return x;
  else return to_float(x);
}

// (B, L, D) with any strides, in elements.
struct Sequence3 {
  const void* data;
  int64_t row, step, channel;
};

// The rows of one block of channels, in the order of time: in place where they are what kernels compute in, else
// converted. A row stays valid until `window` later ones were asked for.
template <class T>
class Reader {
  using A = Acc<T>;

 public:
  Reader(const Sequence3& x, int64_t block, int64_t window)
      : x_(x), in_place_(std::is_same_v<T, A> && x.channel == 1), at_once_(x.channel == 1 ? 1 : kAtOnce), block_(block) {
    if (in_place_) return;
    while (slots_ < window + at_once_) slots_ *= 2;
    ring_.reset(new A[slots_ * block]);
  }

  // From now on steps [first, limit) of this row, channels [c0, c0 + n).
  void seek(int64_t row, int64_t first, int64_t limit, int64_t c0, int64_t n) {
    base_ = static_cast<const T*>(x_.data) + row * x_.row + c0 * x_.channel;
    filled_ = first, limit_ = limit, n_ = n;
  }

  const A* at(int64_t t) {
    if constexpr (std::is_same_v<T, A>)
      if (in_place_) return soon(t), base_ + t * x_.step;
    while (filled_ <= t) fill(std::min(filled_ + at_once_, limit_));
    return slot(t);
  }

 private:
  void soon(int64_t t) const {
    if (t + kSoon >= limit_) return;
    const char* row = reinterpret_cast<const char*>(base_ + (t + kSoon) * x_.step);
    for (int64_t i = 0; i < n_ * int64_t(sizeof(T)); i += 64) __builtin_prefetch(row + i);
  }

  A* slot(int64_t t) { return ring_.get() + (t & (slots_ - 1)) * block_; }

  void fill(int64_t end) {
    if (x_.channel == 1) {
      for (int64_t t = filled_; t < end; ++t) {
        soon(t);
        const A* row = as_row(base_ + t * x_.step, n_, slot(t));
        if (row != slot(t)) std::copy_n(row, n_, slot(t));
      }
    } else {
      for (int64_t c = 0; c < n_; ++c)
        for (int64_t t = filled_; t < end; ++t) slot(t)[c] = widen(base_[c * x_.channel + t * x_.step]);
    }
    filled_ = end;
  }

  const Sequence3 x_;
  const bool in_place_;
  const int64_t at_once_, block_;
  int64_t slots_ = 1, filled_ = 0, limit_ = 0, n_ = 0;
  std::unique_ptr<A[]> ring_;
  const T* base_ = nullptr;
};

// A row that is computed as A and leaves as T.
template <class T>
class Writer {
  using A = Acc<T>;

 public:
  explicit Writer(int64_t block) : scratch_(std::is_same_v<T, A> ? 0 : block) {}
  A* open(T* out) {
    if constexpr (std::is_same_v<T, A>) return out;
    else return scratch_.data();
  }
  void close(T* out, int64_t n) {
    if constexpr (!std::is_same_v<T, A>) store_row(scratch_.data(), n, out);
  }

 private:
  std::vector<A> scratch_;
};

// ---------------------------------------------------------------------------------------------------- pieces of the work

struct Sizes {
  int64_t B, L, D, W;
  int64_t groups;  // weights: row b uses those of b / (B / groups)
};

// Steps [first, last) of a segment [begin, end), within which every step sees all inputs before it. The steps before
// `begin` are the initial state if `state`, else zeros.
struct Piece {
  int64_t row, sequence, begin, end, first, last;
  bool state, tail;  // tail: the segment is the last of its sequence
};

struct Plan {
  std::vector<Piece> pieces;
  struct Chunk {
    int64_t first, last, group;  // pieces, at most kSteps steps, all with the same weights
  };
  std::vector<Chunk> chunks;
  int64_t sequences = 1;  // per row
};

Plan plan_of(const Sizes& n, bool state, const bool* reset, const int64_t* cu_seqlens, int64_t sequences) {
  Plan plan;
  plan.sequences = sequences;
  int64_t used = 0;
  const auto add = [&](Piece piece) {
    const int64_t group = piece.row / (n.B / n.groups);
    for (int64_t t = piece.first; t < piece.end || t == piece.first; t = piece.last) {
      if (plan.chunks.empty() || used >= kSteps || plan.chunks.back().group != group) {
        const int64_t at = static_cast<int64_t>(plan.pieces.size());
        plan.chunks.push_back({at, at, group});
        used = 0;
      }
      piece.first = t;
      piece.last = std::min(piece.end, t + kSteps - used);
      used += std::max<int64_t>(1, piece.last - t);
      plan.pieces.push_back(piece);
      plan.chunks.back().last++;
      if (piece.last == piece.end) return;
    }
  };
  for (int64_t row = 0; row < n.B; ++row) {
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t start = cu_seqlens ? cu_seqlens[s] : 0, stop = cu_seqlens ? cu_seqlens[s + 1] : n.L;
      int64_t begin = start;
      bool sees_state = state;
      for (int64_t t = start; reset && t < stop; ++t) {
        if (!reset[row * n.L + t]) continue;
        if (t > begin) add({row, row * sequences + s, begin, t, begin, t, sees_state, false});
        begin = t;
        sees_state = false;
      }
      add({row, row * sequences + s, begin, stop, begin, stop, sees_state, true});
    }
  }
  return plan;
}

void check_cu_seqlens(const int64_t* cu_seqlens, int64_t sequences, int64_t L) {
  bool right = cu_seqlens[0] == 0 && cu_seqlens[sequences] == L;
  for (int64_t s = 0; s < sequences; ++s) right = right && cu_seqlens[s] <= cu_seqlens[s + 1];
  if (!right) throw std::invalid_argument("cu_seqlens: expected numbers from 0 up to L that do not decrease");
}

// As many threads as there is work for: one is worth waking for about this many elements, some 50 microseconds.
int threads_for(int threads, int64_t elements) {
  constexpr int64_t kPerThread = 50000;
  return static_cast<int>(std::clamp<int64_t>(elements / kPerThread, 1, std::max(threads, 1)));
}

// ---------------------------------------------------------------------------------------------------- forward, backward

template <class T>
struct Call {
  using A = Acc<T>;
  Sizes n;
  Sequence3 x;
  const A* weight;   // (groups, D, W)
  const A* bias;     // (groups, D) or null
  const T* state;    // (B * sequences, W - 1, D) or null
  bool silu;
  Plan plan;

  int64_t blocks() const { return (n.D + kBlock - 1) / kBlock; }
  int64_t block() const { return std::min(n.D, kBlock); }

  // (groups, W, D)
  std::vector<A> transposed() const {
    std::vector<A> out(n.groups * n.W * n.D);
    for (int64_t g = 0; g < n.groups; ++g)
      transpose(weight + g * n.D * n.W, n.W, n.D, n.W, out.data() + g * n.W * n.D, n.D);
    return out;
  }

  // Calls body(chunk, c0, channels) for all chunks and blocks of channels.
  template <class F>
  void on_all(int threads, const F& make_body) const {
    const int64_t items = static_cast<int64_t>(plan.chunks.size()) * blocks();
    parallel_for(items, threads_for(threads, n.B * n.L * n.D), [&](int64_t from, int64_t to, int) {
      auto body = make_body();
      for (int64_t i = from; i < to; ++i) {
        const int64_t c0 = i % blocks() * kBlock;
        body(i / blocks(), c0, std::min(kBlock, n.D - c0));
      }
    });
  }
};

// The W rows that the next step of a piece sees, oldest first.
template <class T>
class Window {
  using A = Acc<T>;

 public:
  explicit Window(const Call<T>& call)
      : call_(call), W_(call.n.W), reader_(call.x, call.block(), W_), zeros_(call.block()), taps_(W_) {
    if constexpr (!std::is_same_v<T, A>) state_.resize(call.state ? (W_ - 1) * call.block() : 0);
  }

  // Before piece.first; steps up to `limit` will follow.
  void seek(const Piece& p, int64_t limit, int64_t c0, int64_t n) {
    reader_.seek(p.row, std::max(p.begin, p.first - (W_ - 1)), limit, c0, n);
    for (int64_t w = 1; w < W_; ++w) {
      const int64_t t = p.first - W_ + w, back = W_ - 1 + t - p.begin;
      taps_[w] = t >= p.begin ? reader_.at(t) : p.state ? state_row(p.sequence, back, c0, n) : zeros_.data();
    }
  }

  const A* const* step(int64_t t) {
    std::copy(taps_.begin() + 1, taps_.end(), taps_.begin());
    taps_.back() = reader_.at(t);
    return taps_.data();
  }

 private:
  const A* state_row(int64_t sequence, int64_t w, int64_t c0, int64_t n) {
    const T* row = call_.state + (sequence * (W_ - 1) + w) * call_.n.D + c0;
    return as_row(row, n, state_.data() + (std::is_same_v<T, A> ? 0 : w * call_.block()));
  }

  const Call<T>& call_;
  const int64_t W_;
  Reader<T> reader_;
  std::vector<A> zeros_, state_;
  std::vector<const A*> taps_;
};

template <class T>
void forward(const Call<T>& call, T* y, T* final_state, int threads) {
  using A = Acc<T>;
  const Sizes& n = call.n;
  const std::vector<A> weights = call.transposed();
  const int W = static_cast<int>(n.W);
  const ForwardRow<A> run = call.silu ? Rows<A, true>::of(W).forward : Rows<A, false>::of(W).forward;
  in_huge_pages(y, n.B * n.L * n.D * sizeof(T));
  call.on_all(threads, [&] {
    return [&, window = Window<T>(call), writer = Writer<T>(call.block())](int64_t c, int64_t c0, int64_t nc) mutable {
      const auto& chunk = call.plan.chunks[c];
      const A* weight = weights.data() + chunk.group * n.W * n.D + c0;
      const A* bias = call.bias ? call.bias + chunk.group * n.D + c0 : nullptr;
      for (int64_t i = chunk.first; i < chunk.last; ++i) {
        const Piece& p = call.plan.pieces[i];
        window.seek(p, p.last, c0, nc);
        for (int64_t t = p.first; t < p.last; ++t) {
          T* out = y + (p.row * n.L + t) * n.D + c0;
          run(window.step(t), weight, n.D, bias, W, writer.open(out), nc);
          writer.close(out, nc);
        }
      }
    };
  });
  const T* x = static_cast<const T*>(call.x.data);
  for (const Piece& p : call.plan.pieces) {
    if (!p.tail || p.last != p.end) continue;
    for (int64_t w = 0; w < n.W - 1; ++w) {
      const int64_t t = p.end - (n.W - 1) + w, back = n.W - 1 + t - p.begin;
      T* out = final_state + (p.sequence * (n.W - 1) + w) * n.D;
      const T* row = x + p.row * call.x.row + t * call.x.step;
      if (t >= p.begin)
        for (int64_t d = 0; d < n.D; ++d) out[d] = row[d * call.x.channel];
      else if (p.state)
        std::copy_n(call.state + (p.sequence * (n.W - 1) + back) * n.D, n.D, out);
      else
        std::fill_n(out, n.D, T{});
    }
  }
}

template <class T>
struct Gradients {
  T* x;             // (B, L, D)
  Acc<T>* weight;   // (groups, D, W)
  Acc<T>* bias;     // (groups, D) or null
  T* state;         // like the state, or null
};

template <class T>
void backward(const Call<T>& call, const Sequence3& grad_y, const T* grad_final, const Gradients<T>& out,
              int threads) {
  using A = Acc<T>;
  const Sizes& n = call.n;
  const std::vector<A> weights = call.transposed();
  const int W = static_cast<int>(n.W);
  const int64_t chunks = static_cast<int64_t>(call.plan.chunks.size());
  const BackwardRow<A> differentiate = call.silu ? Rows<A, true>::of(W).backward : Rows<A, false>::of(W).backward;
  const ForwardRow<A> all_taps = Rows<A, false>::of(W).forward, some_taps = Rows<A, false>::of(0).forward;
  std::unique_ptr<A[]> sums(new A[chunks * (n.W + 1) * n.D]);  // each chunk's share of the gradients of weight and bias
  in_huge_pages(out.x, n.B * n.L * n.D * sizeof(T));
  if (out.state) std::fill_n(out.state, n.B * call.plan.sequences * (n.W - 1) * n.D, T{});

  call.on_all(threads, [&] {
    return [&, window = Window<T>(call), reader = Reader<T>(grad_y, call.block(), n.W), writer = Writer<T>(call.block()),
            ring = std::vector<A>(call.silu ? n.W * call.block() : 0), grads = std::vector<const A*>(n.W),
            rows = std::vector<const A*>(n.W)](int64_t c, int64_t c0, int64_t nc) mutable {
      const auto& chunk = call.plan.chunks[c];
      const A* weight = weights.data() + chunk.group * n.W * n.D + c0;
      const A* bias = call.bias ? call.bias + chunk.group * n.D + c0 : nullptr;
      A* share = sums.get() + c * (n.W + 1) * n.D + c0;
      for (int64_t w = 0; w <= n.W; ++w) std::fill_n(share + w * n.D, nc, A(0));

      // The gradient of step t, which may lie in the initial state, once those of the steps that saw it are there.
      const auto emit = [&](const Piece& p, int64_t t) {
        const int64_t nearest = std::max<int64_t>(0, p.begin - t), furthest = std::min(n.W - 1, p.end - 1 - t);
        const int64_t seen = std::max<int64_t>(0, furthest - nearest + 1);
        for (int64_t k = 0; k < seen; ++k) rows[k] = grads[(t + furthest - k) % n.W];
        T* to = t >= p.begin ? out.x + (p.row * n.L + t) * n.D + c0
                             : out.state + (p.sequence * (n.W - 1) + n.W - 1 + t - p.begin) * n.D + c0;
        A* row = writer.open(to);
        (seen == n.W ? all_taps : some_taps)(rows.data(), weight + (n.W - 1 - furthest) * n.D, n.D, nullptr,
                                             static_cast<int>(seen), row, nc);
        const int64_t kept = t - (p.end - (n.W - 1));
        if (p.tail && kept >= 0) {
          const T* also = grad_final + (p.sequence * (n.W - 1) + kept) * n.D + c0;
          for (int64_t d = 0; d < nc; ++d) row[d] += widen(also[d]);
        }
        writer.close(to, nc);
      };

      for (int64_t i = chunk.first; i < chunk.last; ++i) {
        const Piece& p = call.plan.pieces[i];
        const int64_t limit = std::min(p.last + n.W - 1, p.end);  // the piece's inputs are seen up to here
        int64_t next = p.state && p.first == p.begin ? p.begin - (n.W - 1) : p.first;
        window.seek(p, limit, c0, nc);
        reader.seek(p.row, p.first, limit, c0, nc);
        for (int64_t t = p.first; t < limit; ++t) {
          const A* const* taps = window.step(t);
          const A* grad = reader.at(t);
          A* mine = call.silu ? ring.data() + t % n.W * call.block() : nullptr;
          A* share_of_step = t < p.last ? share : nullptr;
          if (mine || share_of_step) differentiate(taps, weight, n.D, bias, W, grad, mine, share_of_step, nc);
          grads[t % n.W] = mine ? mine : grad;
          for (; next <= t - (n.W - 1) && next < p.last; ++next) emit(p, next);
        }
        for (; next < p.last; ++next) emit(p, next);
      }
    };
  });

  // Chunks are in the order of their groups; their shares are added in that order.
  parallel_for(call.blocks(), threads_for(threads, chunks * n.W * n.D), [&](int64_t from, int64_t to, int) {
    std::vector<double> total(call.block());
    for (int64_t b = from; b < to; ++b) {
      const int64_t c0 = b * kBlock, nc = std::min(kBlock, n.D - c0);
      for (int64_t g = 0, c = 0, end = 0; g < n.groups; ++g, c = end) {
        while (end < chunks && call.plan.chunks[end].group == g) ++end;
        for (int64_t w = 0; w <= n.W; ++w) {
          std::fill(total.begin(), total.end(), 0.0);
          for (int64_t k = c; k < end; ++k) {
            const A* share = sums.get() + (k * (n.W + 1) + w) * n.D + c0;
            for (int64_t d = 0; d < nc; ++d) total[d] += share[d];
          }
          for (int64_t d = 0; d < nc; ++d) {
            if (w < n.W) out.weight[(g * n.D + c0 + d) * n.W + w] = static_cast<A>(total[d]);
            else if (out.bias) out.bias[g * n.D + c0 + d] = static_cast<A>(total[d]);
          }
        }
      }
    }
  });
}

// One step of every row; new_state may be state itself. Parameters of type P: what is computed in, or T. Rows are as wide
// as they come, so that memory is read and written in one stream.
template <class T, class P>
void step(const Sizes& n, const T* state, const T* x, int64_t x_row, const P* weight, const P* bias, bool silu, T* y,
          T* new_state, int threads) {
  using A = Acc<T>;
  const int W = static_cast<int>(n.W);
  const int64_t kept = (n.W - 1) * n.D;
  const ForwardRow<A> run = silu ? Rows<A, true>::of(W).forward : Rows<A, false>::of(W).forward;
  const int64_t converted = std::is_same_v<P, A> ? 0 : n.D;
  std::vector<A> weights(n.W * n.D), scratch(n.W * converted), start(converted);
  transpose(as_row(weight, n.W * n.D, scratch.data()), n.W, n.D, n.W, weights.data(), n.D);
  const A* first = bias ? as_row(bias, n.D, start.data()) : nullptr;
  parallel_for(n.B, threads_for(threads, n.B * n.D), [&](int64_t from, int64_t to, int) {
    std::vector<A> rows(std::is_same_v<T, A> ? 0 : n.W * n.D);
    std::vector<const A*> taps(n.W);
    Writer<T> writer(n.D);
    for (int64_t row = from; row < to; ++row) {
      const T *old = state + row * kept, *input = x + row * x_row;
      for (int64_t w = 0; w < n.W; ++w)
        taps[w] = as_row(w < n.W - 1 ? old + w * n.D : input, n.D, rows.data() + (rows.empty() ? 0 : w * n.D));
      T* out = y + row * n.D;
      run(taps.data(), weights.data(), n.D, first, W, writer.open(out), n.D);
      writer.close(out, n.D);
      if (n.W == 1) continue;
      T* next = new_state + row * kept;
      std::memmove(next, old + n.D, (kept - n.D) * sizeof(T));
      std::copy_n(input, n.D, next + kept - n.D);
    }
  });
}

// --------------------------------------------------------------------------------------------------------------- Python

Sequence3 sequence_of(const Integers& n) { return {n.pointer<void>(0), n[1], n[2], n[3]}; }

Sizes sizes_of(const Integers& n) { return {n[0], n[1], n[2], n[3], n[4]}; }

// in: weight, bias, initial state, reset, cu_seqlens; 0 for none.
template <class T>
Call<T> call_of(const Integers& sizes, const Integers& x, const Integers& in, bool silu, int64_t sequences) {
  Call<T> call{sizes_of(sizes), sequence_of(x), in.pointer<Acc<T>>(0), in.pointer<Acc<T>>(1), in.pointer<T>(2),
               silu, {}};
  const int64_t* cu_seqlens = in.pointer<int64_t>(4);
  if (cu_seqlens) check_cu_seqlens(cu_seqlens, sequences, call.n.L);
  call.plan = plan_of(call.n, call.state != nullptr, in.pointer<bool>(3), cu_seqlens, sequences);
  return call;
}

}  // namespace

// sizes (B, L, D, W, groups); x and grad_y as (address, strides of row, step, channel); all else contiguous.
void causal_conv1d(int dtype, const Integers& sizes, const Integers& x, const Integers& in, bool silu,
                   int64_t sequences, const Integers& out, int threads) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    forward(call_of<T>(sizes, x, in, silu, sequences), out.pointer<T>(0), out.pointer<T>(1), threads);
  });
}

void causal_conv1d_backward(int dtype, const Integers& sizes, const Integers& x, const Integers& in, bool silu,
                            int64_t sequences, const Integers& grad_y, uintptr_t grad_final, const Integers& out,
                            int threads) {
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> grads{out.pointer<T>(0), out.pointer<Acc<T>>(1), out.pointer<Acc<T>>(2), out.pointer<T>(3)};
    backward(call_of<T>(sizes, x, in, silu, sequences), sequence_of(grad_y), reinterpret_cast<const T*>(grad_final),
             grads, threads);
  });
}

bool causal_conv1d_step(Tensor state, Tensor x, Tensor weight, Tensor bias, bool silu, int threads, Tensor y,
                        Tensor new_state) {
  if (x.ndim != 2 || x.dtype < 0 || weight.ndim != 2) return false;
  const Sizes n{x.shape[0], 1, x.shape[1], weight.shape[1], 1};
  const int f64 = static_cast<int>(Dtype::f64), computed = x.dtype == f64 ? f64 : static_cast<int>(Dtype::f32);
  auto kept = [&](const Tensor& s) { return s.is(n.B, n.W - 1, n.D) && s.dtype == x.dtype && s.contiguous(); };
  if (!x.is(n.B, n.D) || (n.D > 1 && x.strides[1] != 1) || !y.is(n.B, n.D) || y.dtype != x.dtype || !y.contiguous() ||
      n.W < 1 || !kept(state) || !kept(new_state) || !weight.is(n.D, n.W) || !weight.contiguous() ||
      (weight.dtype != computed && weight.dtype != x.dtype) ||
      (bias && !(bias.is(n.D) && bias.contiguous() && bias.dtype == weight.dtype)))
    return false;
  dispatch(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto at = [](const Tensor& t) { return static_cast<T*>(t.data); };
    auto run = [&](auto* weight, auto* bias) {
      step(n, at(state), at(x), x.strides[0], weight, bias, silu, at(y), at(new_state), threads);
    };
    using A = Acc<T>;
    if (weight.dtype == computed) run(static_cast<const A*>(weight.data), static_cast<const A*>(bias.data));
    else run(static_cast<const T*>(weight.data), static_cast<const T*>(bias.data));
  });
  return true;
}

}  // namespace fastmem
