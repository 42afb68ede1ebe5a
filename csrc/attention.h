// What topk_attention and dense_attention share: how their tensors are passed, and the tile of scores.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "vector_math.h"

namespace fastmem {

// A vector whose norm is below this counts as zero: its cosine is 0, and so is its gradient.
inline constexpr double kCosineEps = 1e-8;

template <class A>
inline A inverse_norm(A squared_norm) {
  return squared_norm <= static_cast<A>(kCosineEps * kCosineEps) ? A(0) : A(1) / std::sqrt(squared_norm);
}

struct Sizes {
  int64_t B, H, Q, S, E, F;
};

inline Sizes sizes_of(const Integers& n) { return {n[0], n[1], n[2], n[3], n[4], n[5]}; }

// Threads for a call that does `work` multiply-adds: waking one costs as much as some 200,000 of them.
inline int threads_for(int threads, double work) {
  return static_cast<int>(std::max(1.0, std::min<double>(threads, work / 2e5)));
}

// Where everything that decides a score lies: score = factor * scale * similarity(q, k) + bias.
struct ScoreInputs {
  View q, k, scale, bias, mask;
  double factor;
  bool cosine;

  template <class A>
  A multiplier(int64_t b, int64_t h) const {
    return static_cast<A>(factor) * (scale ? *scale.row<const A>(b, h) : A(1));
  }
};

// Queries that see the same keys, bias and mask form one bank; they are scored together, so each key is read once.
struct Banks {
  int64_t B, H, Q;
  bool share_b, share_h;

  // `values` only where the queries of a bank also read them together.
  Banks(const Sizes& n, const ScoreInputs& in, const View& values = {})
      : B(n.B), H(n.H), Q(n.Q),
        share_b(n.B == 1 || (in.k.b == 0 && in.bias.b == 0 && in.mask.b == 0 && values.b == 0)),
        share_h(n.H == 1 || (in.k.h == 0 && in.bias.h == 0 && in.mask.h == 0 && values.h == 0)) {}
  Banks(const Sizes& n, bool one_b, bool one_h)
      : B(n.B), H(n.H), Q(n.Q), share_b(one_b || n.B == 1), share_h(one_h || n.H == 1) {}

  int64_t batches() const { return share_b ? 1 : B; }
  int64_t heads() const { return share_h ? 1 : H; }
  int64_t count() const { return batches() * heads(); }
  int64_t queries() const { return (share_b ? B : 1) * (share_h ? H : 1) * Q; }

  struct At {
    int64_t b, h, q;
  };
  // The first batch and head of a bank.
  At home(int64_t bank) const {
    return {bank / heads(), bank % heads(), 0};
  }
  // The i-th query of a bank.
  At at(int64_t bank, int64_t i) const {
    At place = home(bank);
    int64_t rest = i / Q, inner = share_h ? H : 1;
    if (share_b) place.b = rest / inner;
    if (share_h) place.h = rest % inner;
    place.q = i % Q;
    return place;
  }
};

#if defined(FASTMEM_ISA_AVX512)
inline constexpr int kTileVectors = 4;  // 6 rows x 4 vectors: 24 of 32 registers hold sums
#else
inline constexpr int kTileVectors = 2;  // 6 rows x 2 vectors: 12 of 16
#endif
inline constexpr int kTileRows = 6;

// acc[r][v] += sum over i < n of a[r * a_row + i * a_step] * b[i * b_row + v * W ...]: the tile under every product of
// matrices here. `a` is broadcast element by element, so it is read where it lies, whatever its layout; each sum runs
// over i in order, so a result does not depend on the tile it was computed in.
template <int R, int V, class A>
inline void multiply_tile(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_row, int64_t n,
                          Vec<A> (&acc)[R][V]) {
  for (int64_t i = 0; i < n; ++i, a += a_step, b += b_row) {
    Vec<A> column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += a[r * a_row] * column[v];
  }
}

// The same from zero. Cleared as one array, the sums would be memory that a string instruction fills.
template <int R, int V, class A>
inline void product_tile(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_row, int64_t n,
                         Vec<A> (&acc)[R][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<A>{};
  multiply_tile<R, V>(a, a_row, a_step, b, b_row, n, acc);
}

// Calls f.template operator()<R, V>(row, vector) so that tiles of R rows and V vectors cover rows x vectors.
template <class F>
inline void for_tiles(int64_t rows, int64_t vectors, F&& f) {
  auto down = [&]<int V>(int64_t v) {
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) f.template operator()<kTileRows, V>(r, v);
    if (r + 3 <= rows) f.template operator()<3, V>(r, v), r += 3;
    for (; r < rows; ++r) f.template operator()<1, V>(r, v);
  };
  int64_t v = 0;
  for (; v + kTileVectors <= vectors; v += kTileVectors) down.template operator()<kTileVectors>(v);
  if constexpr (kTileVectors == 4) {
    if (v + 3 == vectors) return down.template operator()<3>(v);
    if (v + 2 <= vectors) down.template operator()<2>(v), v += 2;
  }
  if (v < vectors) down.template operator()<1>(v);
}

// Asks for the rows of the next tile while this one is worked on: a tile reads several rows at once, element by element,
// which the hardware does not foresee.
template <class T>
inline void prefetch_rows(const View& rows, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t width) {
  for (int64_t s = begin; s < end; ++s) {
    const char* row = reinterpret_cast<const char*>(rows.row<const T>(b, h, s));
    for (int64_t at = 0; at < width * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(row + at, 0, 3);
  }
}

// For rows read one after the other: asks for the one `kAheadBytes` further on, past the end too, where the next bank
// often lies. Asking cannot fault.
inline constexpr int64_t kAheadBytes = 32768;
template <class T>
inline void prefetch_ahead(const T* row, int64_t width) {
  uintptr_t at = reinterpret_cast<uintptr_t>(row) + kAheadBytes;
  for (uintptr_t end = at + width * sizeof(T); at < end; at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
}

// Keys of one tile of slots, unusable ones left out: `rows` lies in the bank itself where it can.
template <class T>
struct KeyTile {
  using A = typename Accumulate<T>::type;
  int64_t count = 0;
  const A* rows = nullptr;
  int64_t stride = 0;
  std::vector<A> inverse, bias;  // 1 / norm (1 for dot) and bias per row
  std::vector<int64_t> slot;
  std::vector<A> scratch;
  bool whole = true;  // no slot left out

  void reserve(int64_t tile, int64_t E) {
    inverse.resize(tile), bias.resize(tile), slot.resize(tile), scratch.resize(tile * E);
  }

  void gather(const ScoreInputs& in, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t E) {
    const uint8_t* mask = in.mask ? in.mask.row<const uint8_t>(b, h) : nullptr;
    const A* bias_row = in.bias ? in.bias.row<const A>(b, h) : nullptr;
    count = 0;
    for (int64_t s = begin; s < end; ++s) {
      A add = bias_row ? bias_row[s * in.bias.r] : A(0);
      if ((mask && !mask[s * in.mask.r]) || add == -INFINITY) continue;
      bias[count] = add;
      slot[count++] = s;
    }
    whole = count == end - begin;
    if (std::is_same_v<T, A> && whole) {
      rows = reinterpret_cast<const A*>(in.k.row<const T>(b, h, begin));
      stride = in.k.r;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const auto* row = as_row(in.k.row<const T>(b, h, slot[i]), E, &scratch[i * E]);
        if (row != &scratch[i * E]) std::memcpy(&scratch[i * E], row, E * sizeof(A));
      }
      rows = scratch.data();
      stride = E;
    }
    for (int64_t i = 0; i < count; ++i) {
      const A* row = rows + i * stride;
      inverse[i] = in.cosine ? inverse_norm(dot(row, row, E)) : A(1);
    }
  }
};

}  // namespace fastmem
