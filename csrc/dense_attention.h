// What forward and backward of dense attention share.
#pragma once
#include <algorithm>

#include "attention.h"

namespace fastmem {

inline constexpr int64_t kDenseTile = 96;  // slots per tile
inline constexpr int64_t kDenseGroup = 4;  // vectors of queries per group

template <class A>
inline int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Value rows of the slots of a KeyTile.
template <class T>
struct ValueTile {
  using A = typename Accumulate<T>::type;
  const A* rows = nullptr;
  int64_t stride = 0;
  std::vector<A> scratch;

  void gather(const View& v, int64_t b, int64_t h, const KeyTile<T>& keys, int64_t begin, int64_t F) {
    if (std::is_same_v<T, A> && keys.whole) {
      rows = reinterpret_cast<const A*>(v.row<const T>(b, h, begin));
      stride = v.r;
      return;
    }
    scratch.resize(kDenseTile * F);
    for (int64_t i = 0; i < keys.count; ++i) {
      const A* row = as_row(v.row<const T>(b, h, keys.slot[i]), F, &scratch[i * F]);
      if (row != &scratch[i * F]) std::memcpy(&scratch[i * F], row, F * sizeof(A));
    }
    rows = scratch.data();
    stride = F;
  }
};

}  // namespace fastmem
