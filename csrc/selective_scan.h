// What selective_scan's forward, backward and tangent share: the call, its pieces of work, and a chunk of one of them.
//
// Vectors run over channels. A block is up to 64 channels of one group; a piece of work is one sequence and a span of
// neighbouring blocks, which walk side by side from chunk to chunk, so that memory is read in long rows (block after
// block would touch every page of the inputs once a block). The inputs of a chunk are first brought into columns of
// floats that stay in L1 and L2.
// Derivation: docs/ops/selective_scan.md.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "scan_math.h"

namespace fastmem::scan {

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

// From (address, dtype, strides), or nothing.
inline Stream stream_of(const Integers& n) {
  return {n.pointer<char>(0), static_cast<Dtype>(n[1]), n[2], n[3], n[4]};
}

// Whether a stream's elements are what the kernel computes in.
template <class T>
inline bool native(const Stream& s) {
  return std::is_same_v<T, double> || s.dtype == Dtype::f32;
}
inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// For results (R, L, D) that nothing was written to yet.
inline void in_huge_pages(const Sizes& n, std::initializer_list<Stream> results) {
  for (const Stream& s : results) fastmem::in_huge_pages(s.data, n.R * n.L * n.D * bytes_of(s.dtype));
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

  explicit operator bool() const { return beside_states() || A || initial; }
  bool beside_states() const { return u || delta || B || C || z || D || bias; }
};

template <class T>
Inputs<T> inputs_of(const Streams& streams, const Integers& parameters) {
  return {stream_of(streams[0]),     stream_of(streams[1]),     stream_of(streams[2]),
          stream_of(streams[3]),     stream_of(streams[4]),     parameters.pointer<T>(0),
          parameters.pointer<T>(1),  parameters.pointer<T>(2),  parameters.pointer<T>(3)};
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

// Channels [c0, c0 + count) of group g, the `place`-th block of the group.
struct Block {
  int64_t g, place, c0, count;
};
// Steps [begin, end) of a row.
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
      blocks.push_back({g, c / width, g * per_group + c, std::min(width, per_group - c)});
  return blocks;
}

// How many spans the blocks are cut into, for `pieces` times as many to be shared evenly among threads.
inline int64_t spans_for(int64_t blocks, int64_t pieces, int threads) {
  return std::clamp<int64_t>(threads / std::gcd(pieces, static_cast<int64_t>(threads)), 1, std::max<int64_t>(blocks, 1));
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

template <class X>
inline void zero(const Plane<X>& x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<typename Number<X>::type>) x.put(i, X{});
}

// A row of channels of a tensor, where it stands or brought into floats.
template <class X>
struct Row {
  using T = typename Number<X>::type;
  const T *value, *tangent;

  X at(int64_t c) const {
    if constexpr (Number<X>::dual) return {load(value + c), load(tangent + c)};
    else return load(value + c);
  }
};

// Lines of memory that a piece of work will want: its next block's inputs, this one's results. Asked for one by one during
// the arithmetic, so that memory is waited for behind it.
struct Ahead {
  struct Lines {
    const char* first;
    int64_t step, channel;  // bytes
  };
  Lines lines[11];
  int count = 0;

  void add(const Stream& s, int64_t r, int64_t t, int64_t channel) {
    if (!s) return;
    const int64_t bytes = bytes_of(s.dtype);
    lines[count++] = {s.data + (s.at(r, t, 0) + channel) * bytes, s.step * bytes, bytes};
  }
  // What falls to one of the passes over the states, at step t of the vector of channels c.
  void ask(int64_t pass, int64_t passes, int64_t t, int64_t c) const {
    for (int64_t i = pass; i < count; i += passes)
      __builtin_prefetch(lines[i].first + t * lines[i].step + c * lines[i].channel);
  }
};

// The chunk of a piece of work, and what does not change along a sequence.
//
// Inputs lie in columns: a vector of channels c (c a multiple of W), all its steps, then the next vector; see `cell`.
template <class X>
class Chunk {
 public:
  using T = typename Number<X>::type;
  static constexpr int W = kLanes<T>;

  Chunk(const Call<T>& p, const std::vector<Block>& blocks)
      : p_(p), n_(p.n), most_(std::min(n_.chunk, n_.L)), blocks_(blocks) {
    dt = cells(), x = cells(), y = cells();
    B_ = pool_.take(most_ * n_.N), C_ = pool_.take(most_ * n_.N);
    rows_ = pool_.take(4 * kMaxWidth);
  }

  Plane<X> cells() { return pool_.take(most_ * kMaxWidth); }
  int64_t cell(int64_t c, int64_t t) const { return c * most_ + t * W; }

  // The blocks [first, last), of one set of parameters.
  void enter(int64_t first, int64_t last, int64_t set) {
    if (first == first_ && last == last_ && set == set_) return;
    first_ = first, last_ = last, set_ = set;
    while (static_cast<int64_t>(held_.size()) < last - first)
      held_.push_back({pool_.take(n_.N * kMaxWidth), pool_.take(n_.N * kMaxWidth), pool_.take(kMaxWidth),
                       pool_.take(kMaxWidth), pool_.take(kMaxWidth)});
    for (int64_t i = 0; i < last - first; ++i) {
      select(i);
      transposed(p_.in.A, p_.to.A, set, A2);
      T* largest = limit_.data;
      std::fill_n(largest, width, T(0));
      for (int64_t j = 0; j < n_.N * width; ++j) {
        const T a = A2.data[j] *= T(kLog2e);
        if constexpr (Number<X>::dual) A2.data[A2.plane + j] *= T(kLog2e);
        T& most = largest[j % width];
        if (!(std::abs(a) <= most)) most = std::isnan(a) ? std::numeric_limits<T>::infinity() : std::abs(a);
      }
      for (int64_t c = 0; c < width; ++c) limit_.data[c] = T(120) / largest[c];
      parameter(p_.in.D, p_.to.D, D);
      parameter(p_.in.bias, p_.to.bias, bias);
    }
  }

  // The i-th of the blocks entered becomes the one that all else is about.
  void select(int64_t i) {
    block_ = blocks_[first_ + i];
    at_ = i;
    width = (block_.count + W - 1) / W * W;
    A2 = held_[i].A2, h = held_[i].h, D = held_[i].D, bias = held_[i].bias, limit_ = held_[i].limit;
  }
  int64_t span() const { return last_ - first_; }

  // `inputs` of the block that follows, in this chunk or, after the last block, in the chunk that starts at `next`;
  // `results` of this block in the chunk that starts at t.
  Ahead ahead(std::initializer_list<Stream> inputs, std::initializer_list<Stream> results, int64_t r, int64_t t,
              int64_t next) const {
    const bool last = at_ + 1 == span();
    const int64_t c0 = blocks_[last ? first_ : first_ + at_ + 1].c0;
    Ahead out;
    for (const Stream& s : inputs) out.add(s, r, last ? next : t, c0);
    for (const Stream& s : results) out.add(s, r, t, block_.c0);
    return out;
  }

  void initial_state(const Sequence& s) { transposed(p_.in.initial, p_.to.initial, s.index, h); }

  // Matrix `index` of (.., D, N) -> [state][channel], zeros where there is none.
  void transposed(const T* from, const T* to, int64_t index, const Plane<X>& out) const {
    const int64_t first = (index * n_.D + block_.c0) * n_.N;
    auto bring = [&](const T* in, T* states) {
      const int64_t count = in ? block_.count : 0;
      if (in) transpose(in + first, n_.N, count, n_.N, states, width);
      if (count == 0) std::fill_n(states, n_.N * width, T(0));
      else if (count < width)
        for (int64_t i = 0; i < n_.N; ++i) std::fill(states + i * width + count, states + (i + 1) * width, T(0));
    };
    bring(from, out.data);
    if constexpr (Number<X>::dual) bring(to, out.data + out.plane);
  }

  // The other way: [state][channel] of a result -> matrix `index` of (.., D, N).
  void give_back(const Plane<X>& states, int64_t index, T* to) const {
    const T* from = states.result();
    to += (index * n_.D + block_.c0) * n_.N;
    transpose(from, width, n_.N, block_.count, to, n_.N);
  }

  // Steps [t, t + steps) of a sequence: dt, x = dt u, B and C; y starts as D u. Calls keep(cell, delta, u) with delta
  // before softplus.
  template <class Keep>
  void prepare(const Sequence& s, int64_t t, int64_t steps, const Keep& keep) {
    B = map(p_.in.B, p_.to.B, s.row, t, steps, B_);
    C = map(p_.in.C, p_.to.C, s.row, t, steps, C_);
    // Where |dt A log2(e)| <= 120, exponentials stay away from their ends. As integers, magnitudes compare as the numbers
    // do, and a NaN is above all of them.
    typedef std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t> Int;
    typedef Int Bits __attribute__((vector_size(kVectorBytes)));
    Bits largest[kMaxWidth / W] = {};
    // Everything that the loop needs in locals: a store to memory could change what is behind `this`.
    const Plane<X> dt_ = dt, x_ = x, y_ = y, D_ = D, bias_ = bias;
    const T* limit = limit_.data;
    const bool biased = p_.in.bias, soft = p_.softplus, skips = p_.in.D;
    const int64_t end = width, column = most_ * W;
    for (int64_t i = 0; i < steps; ++i) {
      const Row<X> deltas = row(p_.in.delta, p_.to.delta, s.row, t + i, 0), us = row(p_.in.u, p_.to.u, s.row, t + i, 1);
      for (int64_t c = 0, at = i * W; c < end; c += W, at += column) {
        X step = deltas.at(c);
        const X u = us.at(c);
        if (biased) step = step + bias_.at(c);
        keep(at, step, u);
        if (soft) step = softplus(step);
        const Bits size = (Bits)value(step) & std::numeric_limits<Int>::max();
        largest[c / W] = size > largest[c / W] ? size : largest[c / W];
        dt_.put(at, step), x_.put(at, step * u);
        y_.put(at, skips ? D_.at(c) * u : X{});
      }
    }
    for (int64_t v = 0; v < width / W; ++v) {
      bounded_[v] = true;
      for (int i = 0; i < W; ++i) bounded_[v] &= largest[v][i] <= std::bit_cast<Int>(limit[v * W + i]);
    }
  }

  // Row t of a tensor with its direction; `place` 0 or 1 says where it may be brought to.
  Row<X> row(const Stream& from, const Stream& to, int64_t r, int64_t t, int place) const {
    T* scratch = rows_.data + 2 * place * kMaxWidth;
    Row<X> out{pointer(from, from.at(r, t, 0), scratch), nullptr};
    if constexpr (Number<X>::dual) out.tangent = pointer(to, to.at(r, t, 0), scratch + kMaxWidth);
    return out;
  }

  // Row t of a result: calls at(c, cell) for each vector's numbers; i is the step's place in the chunk.
  template <class At>
  void write_row(const Stream& to, int64_t r, int64_t t, int64_t i, const At& at) const {
    const bool direct = native<T>(to) && block_.count == width;
    T* out = direct ? reinterpret_cast<T*>(to.data) + to.at(r, t, 0) + block_.c0 : rows_.data;
    const int64_t end = width, column = most_ * W;
    for (int64_t c = 0, cell = i * W; c < end; c += W, cell += column) {
      const X result = at(c, cell);
      if constexpr (Number<X>::dual) store(out + c, result.d);
      else store(out + c, result);
    }
    if (!direct) write(to, to.at(r, t, 0) + block_.c0, block_.count, out);
  }

  // y, gated, of the steps that were prepared and scanned.
  void write_y(const Stream& to, const Sequence& s, int64_t t, int64_t steps) const {
    const Plane<X> ys = y;
    for (int64_t i = 0; i < steps; ++i) {
      if (!p_.in.z) {
        write_row(to, s.row, t + i, i, [=](int64_t, int64_t cell) { return ys.at(cell); });
        continue;
      }
      const Row<X> z = row(p_.in.z, p_.to.z, s.row, t + i, 1);
      write_row(to, s.row, t + i, i, [=](int64_t c, int64_t cell) {
        const X gate = z.at(c);
        return ys.at(cell) * (gate * sigmoid(gate));
      });
    }
  }

  // Calls body with std::true_type where exponentials of the channels at c need no care in the prepared steps. Those of
  // doubles never do.
  template <class Body>
  void with_bound(int64_t c, const Body& body) const {
    if constexpr (std::is_same_v<T, double>) return body(std::true_type{});
    else if (bounded_[c / W]) return body(std::true_type{});
    else return body(std::false_type{});
  }

  const Block& block() const { return block_; }

  // B or C of the chunk: numbers of step t start at t * step.
  struct Map {
    Plane<X> data;
    int64_t step;
  };

  int64_t width = 0;
  Plane<X> dt, x, y, A2, D, bias, h;
  Map B, C;

 private:
  void parameter(const T* from, const T* to, const Plane<X>& out) const {
    const int64_t first = set_ * n_.D + block_.c0;
    for (int64_t c = 0; c < width; ++c) {
      out.data[c] = from && c < block_.count ? from[first + c] : T(0);
      if constexpr (Number<X>::dual) out.data[out.plane + c] = to && c < block_.count ? to[first + c] : T(0);
    }
  }

  // Where the block's channels of a row are: in place if they are floats that fill whole vectors.
  const T* pointer(const Stream& from, int64_t at, T* scratch) const {
    if (from && native<T>(from) && block_.count == width) return reinterpret_cast<const T*>(from.data) + at + block_.c0;
    if (from) read(from, at + block_.c0, block_.count, scratch);
    std::fill(scratch + (from ? block_.count : 0), scratch + width, T(0));
    return scratch;
  }

  Map map(const Stream& from, const Stream& to, int64_t r, int64_t t, int64_t steps, const Plane<X>& room) const {
    if constexpr (!Number<X>::dual)
      if (native<T>(from)) return {{reinterpret_cast<T*>(from.data) + from.at(r, t, block_.g), 0}, from.step};
    for (int64_t i = 0; i < steps; ++i) {
      read(from, from.at(r, t + i, block_.g), n_.N, room.data + i * n_.N);
      if constexpr (Number<X>::dual) {
        T* tangent = room.data + room.plane + i * n_.N;
        if (to) read(to, to.at(r, t + i, block_.g), n_.N, tangent);
        else std::fill_n(tangent, n_.N, T(0));
      }
    }
    return {room, n_.N};
  }

  const Call<T>& p_;
  const Sizes n_;
  const int64_t most_;  // steps of the longest chunk
  const std::vector<Block>& blocks_;
  struct Held {
    Plane<X> A2, h, D, bias, limit;
  };
  std::vector<Held> held_;
  int64_t first_ = 0, last_ = 0, set_ = -1, at_ = 0;
  Block block_{};
  bool bounded_[kMaxWidth / W] = {};
  Pool<X> pool_;
  Plane<X> B_, C_, rows_, limit_;  // limit_: of |dt|, per channel
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
  T* final;       // or null
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
  Stream y{};          // where y goes, or null
  T* final = nullptr;  // where the final state goes, or null; given by a walk with time alone
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
Call<T> call_of(const Integers& sizes, const Streams& streams, const Integers& parameters, const Integers& places,
                bool softplus, int threads) {
  Call<T> p{{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]},
            inputs_of<T>(streams, parameters),
            {},
            places.pointer<const bool>(0),
            places.pointer<const int64_t>(1),
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
