// topk_attention on the CPU: scores, selection and attention in one pass over the bank; docs/ops/topk_attention.md.
//
// Few queries per bank: the bank is streamed row by row. Many: queries lie in the lanes of vectors, a tile of scores is
// compared with each query's current k-th best, and only what beats it leaves the registers.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace fastmem {
namespace {

constexpr int64_t kTile = 96;          // slots scored at a time
constexpr int64_t kGroupVectors = 8;   // vectors of queries scored together
constexpr int64_t kRowwise = 4;        // up to this many queries per bank, vectors run along the row instead
constexpr int64_t kSplitSlots = 2048;  // a bank is split over threads in pieces no smaller

// A score as an integer with the order of selection: higher score first, NaN above all; -0 and 0 tie.
template <class A>
struct RankOf;
template <>
struct RankOf<float> {
  using type = int32_t;
  using Key = uint64_t;
};
template <>
struct RankOf<double> {
  using type = int64_t;
  using Key = unsigned __int128;
};
template <class A>
using Rank = typename RankOf<A>::type;
// Rank and slot in one integer, all distinct: higher rank first, then lower slot.
template <class A>
using Key = typename RankOf<A>::Key;

template <class A>
inline Rank<A> rank_of(A score) {
  if (score != score) score = std::numeric_limits<A>::quiet_NaN();
  Rank<A> bits = std::bit_cast<Rank<A>>(score + A(0));
  return bits < 0 ? bits ^ std::numeric_limits<Rank<A>>::max() : bits;
}
template <class A>
inline A score_of(Rank<A> rank) {
  return std::bit_cast<A>(rank < 0 ? rank ^ std::numeric_limits<Rank<A>>::max() : rank);
}
template <class A>
inline Key<A> make_key(Rank<A> rank, Rank<A> slot) {
  using Bits = std::make_unsigned_t<Rank<A>>;
  return static_cast<Key<A>>(static_cast<Bits>(rank ^ std::numeric_limits<Rank<A>>::min())) << (sizeof(Bits) * 8) |
         static_cast<Bits>(~slot);
}
template <class A>
inline A key_score(Key<A> key) {
  return score_of<A>(static_cast<Rank<A>>(key >> (sizeof(Rank<A>) * 8)) ^ std::numeric_limits<Rank<A>>::min());
}
template <class A>
inline int64_t key_slot(Key<A> key) {
  return static_cast<int64_t>(static_cast<std::make_unsigned_t<Rank<A>>>(~static_cast<Rank<A>>(key)));
}

#if defined(FASTMEM_ISA_AVX2)
// For each set of lanes: its lanes in order, before any others.
struct Front {
  uint8_t lanes[256][8];
  constexpr Front() : lanes() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, at = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][at++] = static_cast<uint8_t>(lane);
  }
};
inline constexpr Front kFront;
inline __m256i load_bits(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_bits(int32_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
#endif

// The best k of each of a group of queries: candidates are appended, in the order of slots, to a buffer that is cut
// back to about k when it is full.
template <class A>
struct Selection {
  static constexpr int W = kLanes<A>;
  int64_t k = 0, capacity = 0;
  std::vector<Rank<A>> ranks, slots;  // (queries, capacity)
  std::vector<int64_t> count;
  std::vector<A> threshold;  // what is no better than this is not among the best k

  void start(int64_t queries, int64_t lanes, int64_t best) {
    k = best;
    capacity = (2 * best + 3 * W) / W * W;
    ranks.resize((queries + 1) * capacity), slots.resize((queries + 1) * capacity);
    count.assign(queries, 0);
    threshold.assign(lanes, std::numeric_limits<A>::infinity());
    std::fill_n(threshold.begin(), queries, -std::numeric_limits<A>::infinity());
  }

  void push(int64_t query, A score, int64_t slot) {
    int64_t at = query * capacity + count[query]++;
    ranks[at] = rank_of(score);
    slots[at] = static_cast<Rank<A>>(slot);
    if (count[query] == capacity) cut(query, k / 4 + W / 2);
  }

  // Keeps the best k and at most `slack` more, in the order of slots.
  void cut(int64_t query, int64_t slack) {
    if (count[query] <= k + slack) return;
    Rank<A>*rank = &ranks[query * capacity], *slot = &slots[query * capacity];
    int64_t size = count[query], padded = (size + W - 1) / W * W;
    std::fill(rank + size, rank + padded, std::numeric_limits<Rank<A>>::min());
    Vec<Rank<A>> most = load(rank);
    for (int64_t i = W; i < padded; i += W) most = load(rank + i) > most ? load(rank + i) : most;
    // Bisection: at least k rank above `low`, fewer than k above `high`. What a tie kept ranks as high as the threshold.
    Rank<A> low = rank_of(threshold[query]) - 1, high = most[0];
    for (int i = 1; i < W; ++i) high = std::max(high, most[i]);
    int64_t above_high = 0, found = size;
    while (found > k + slack) {
      Rank<A> middle = (low & high) + ((low ^ high) >> 1);  // the mean without overflow
      if (middle == low) break;  // the k-th best ties at `high`
      int64_t above = count_above(rank, padded, middle);
      if (above >= k) low = middle, found = above;
      else high = middle, above_high = above;
    }
    bool tie = found > k + slack;
    Rank<A> bar = tie ? high : low;
    int64_t ties = tie ? k - above_high : 0;  // of equal ranks the lowest slots stay, and they come first
    count[query] = keep(rank, slot, size, bar, ties);
    A score = score_of<A>(bar);
    threshold[query] = score == score ? score : std::numeric_limits<A>::infinity();
  }

 private:
  static int64_t count_above(const Rank<A>* rank, int64_t padded, Rank<A> bar) {
    Vec<Rank<A>> minus{};
    for (int64_t i = 0; i < padded; i += W) minus += load(rank + i) > bar;
    return -static_cast<int64_t>(sum<Rank<A>>(minus));
  }

  // Moves what ranks above `bar`, and the first `ties` that equal it, to the front.
  static int64_t keep(Rank<A>* rank, Rank<A>* slot, int64_t size, Rank<A> bar, int64_t ties) {
    int64_t kept = 0, i = 0;
#if defined(FASTMEM_ISA_AVX512)
    if constexpr (std::is_same_v<A, float>)
      for (; ties == 0 && i < size; i += W) {
        __m512i ranks = _mm512_loadu_si512(rank + i), slots = _mm512_loadu_si512(slot + i);
        __mmask16 stay = _mm512_cmpgt_epi32_mask(ranks, _mm512_set1_epi32(bar));  // the padding is never above
        _mm512_storeu_si512(rank + kept, _mm512_maskz_compress_epi32(stay, ranks));
        _mm512_storeu_si512(slot + kept, _mm512_maskz_compress_epi32(stay, slots));
        kept += __builtin_popcount(stay);
      }
#elif defined(FASTMEM_ISA_AVX2)
    if constexpr (std::is_same_v<A, float>)
      for (; ties == 0 && i < size; i += W) {
        __m256i ranks = load_bits(rank + i), slots = load_bits(slot + i);
        int stay = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(ranks, _mm256_set1_epi32(bar))));
        __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kFront.lanes[stay])));
        store_bits(rank + kept, _mm256_permutevar8x32_epi32(ranks, order));
        store_bits(slot + kept, _mm256_permutevar8x32_epi32(slots, order));
        kept += __builtin_popcount(stay);
      }
#endif
    for (; i < size; ++i) {
      bool equal = rank[i] == bar && ties > 0, stay = rank[i] > bar || equal;
      ties -= equal;
      rank[kept] = rank[i];
      slot[kept] = slot[i];
      kept += stay;
    }
    return kept;
  }
};

template <class T>
struct Forward {
  using A = typename Accumulate<T>::type;
  static constexpr int W = kLanes<A>;

  Sizes n;
  int64_t top_k, best;  // asked for; at most S
  ScoreInputs in;
  View v, out, indices, weights;
  int threads;
  Banks banks;

  struct Scratch {
    std::vector<A> packed, rows, row, result;
    KeyTile<T> tile;
    Selection<A> selection;
    std::vector<Key<A>> merged;
  };

  // Queries [first, first + size) of a bank, multiplied by scale (and 1 / norm). Blocked: (E, lanes); else (size, E padded to vectors).
  void pack(int64_t bank, int64_t first, int64_t size, int64_t lanes, bool blocked, Scratch& own) const {
    int64_t width = (n.E + W - 1) / W * W;
    own.packed.assign(blocked ? n.E * lanes : size * width, A(0));
    own.row.resize(std::max(n.E, n.F));
    for (int64_t i = 0; i < size; ++i) {
      auto [b, h, q] = banks.at(bank, first + i);
      const A* row = as_row(in.q.row<const T>(b, h, q), n.E, own.row.data());
      A times = in.multiplier<A>(b, h) * (in.cosine ? inverse_norm(dot(row, row, n.E)) : A(1));
      A* to = own.packed.data() + (blocked ? i : i * width);
      int64_t step = blocked ? lanes : 1;
      for (int64_t e = 0; e < n.E; ++e) to[e * step] = row[e] * times;
    }
  }

  void score_blocked(int64_t b, int64_t h, int64_t size, int64_t begin, int64_t end, Scratch& own) const {
    int64_t lanes = (size + W - 1) / W * W;
    Selection<A>& chosen = own.selection;
    KeyTile<T>& tile = own.tile;
    for (int64_t s = begin; s < end; s += kTile) {
      tile.gather(in, b, h, s, std::min(end, s + kTile), n.E);
      prefetch_rows<T>(in.k, b, h, s + kTile, std::min(end, s + 2 * kTile), n.E);
      for_tiles(tile.count, lanes / W, [&]<int R, int V>(int64_t r0, int64_t v0) {
        Vec<A> acc[R][V];
        product_tile<R, V>(tile.rows + r0 * tile.stride, tile.stride, 1, &own.packed[v0 * W], lanes, n.E, acc);
        const A* threshold = &chosen.threshold[v0 * W];
        for (int r = 0; r < R; ++r) {
          uint64_t hits = 0;
          for (int v = 0; v < V; ++v) {
            acc[r][v] = acc[r][v] * tile.inverse[r0 + r] + tile.bias[r0 + r];
            hits |= static_cast<uint64_t>(not_le<A>(acc[r][v], load(threshold + v * W))) << (v * W);
          }
          if (!hits) continue;
          A scores[V * W];
          for (int v = 0; v < V; ++v) store(scores + v * W, acc[r][v]);
          for (; hits; hits &= hits - 1) {
            int lane = std::countr_zero(hits);
            if (v0 * W + lane < size) chosen.push(v0 * W + lane, scores[lane], tile.slot[r0 + r]);
          }
        }
      });
    }
  }

  // Products of one row with N queries, and its squared norm. Queries are padded with zeros to whole vectors, and so is
  // the end of the row.
  template <int N>
  void dot_row(const A* row, const A* q, A (*scores)[W], A* squares, int64_t at) const {
    Vec<A> sums[N] = {}, square{};
    int64_t e = 0, stride = (n.E + W - 1) / W * W;
    auto add = [&](Vec<A> x) {
      square += x * x;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[j] += x * load(q + j * stride + e);
    };
    for (; e + W <= n.E; e += W) add(load(row + e));
    if (e < n.E) {
      A last[W] = {};
      std::copy(row + e, row + n.E, last);
      add(load(last));
    }
    squares[at] = sum<A>(square);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) scores[j][at] = sum<A>(sums[j]);
  }

  // Rows one after the other: with several at a time memory was slower, by up to half.
  template <int N>
  void score_rowwise(int64_t b, int64_t h, int64_t begin, int64_t end, Scratch& own) const {
    const uint8_t* mask = in.mask ? in.mask.row<const uint8_t>(b, h) : nullptr;
    const A* bias = in.bias ? in.bias.row<const A>(b, h) : nullptr;
    own.rows.resize(n.E);
    int64_t slot[W];
    for (int64_t s = begin; s < end;) {
      A scores[N][W] = {}, squares[W] = {}, add[W] = {};
      int64_t size = 0;
      for (; size < W && s < end; ++s) {
        if (mask && !mask[s * in.mask.r]) continue;
        add[size] = bias ? bias[s * in.bias.r] : A(0);
        if (add[size] == -INFINITY) continue;
        const T* key = in.k.row<const T>(b, h, s);
        prefetch_ahead(key, n.E);
        const A* row = as_row(key, n.E, own.rows.data());
        dot_row<N>(row, own.packed.data(), scores, squares, size);
        slot[size++] = s;
      }
      if (in.cosine)
        for (int i = 0; i < W; ++i) squares[i] = inverse_norm(squares[i]);
      for (int j = 0; j < N; ++j) {
        Vec<A> score = load(scores[j]);
        if (in.cosine) score *= load(squares);
        score += load(add);
        uint32_t hits = not_le<A>(score, splat(own.selection.threshold[j])) & ((uint64_t(1) << size) - 1);
        for (; hits; hits &= hits - 1) {
          int lane = std::countr_zero(hits);
          own.selection.push(j, score[lane], slot[lane]);
        }
      }
    }
  }

  // result (F,) = sum of weight[j] * v[index[j]], a few vectors at a time so that the sums stay in registers.
  void weighted_rows(const int64_t* index, const A* weight, int64_t count, int64_t b, int64_t h, Scratch& own) const {
    int64_t f = 0;
    for (; f + 4 * W <= n.F; f += 4 * W) {
      Vec<A> acc[4] = {};
      for (int64_t j = 0; j < count; ++j) {
        const A* row = as_row(v.row<const T>(b, h, index[j]) + f, 4 * W, own.row.data());
        for (int i = 0; i < 4; ++i) acc[i] += weight[j] * load(row + i * W);
      }
      for (int i = 0; i < 4; ++i) store(&own.result[f + i * W], acc[i]);
    }
    if (f == n.F) return;
    std::fill(own.result.begin() + f, own.result.end(), A(0));
    for (int64_t j = 0; j < count; ++j)
      add_scaled(weight[j], as_row(v.row<const T>(b, h, index[j]) + f, n.F - f, own.row.data()), &own.result[f],
                 n.F - f);
  }

  // Softmax over the chosen keys (sorted here) and the weighted sum of their values.
  void attend(Key<A>* keys, int64_t count, int64_t b, int64_t h, int64_t q, Scratch& own) const {
    std::sort(keys, keys + count, std::greater<>());
    int64_t* index = indices.row<int64_t>(b, h, q);
    A* weight = weights.row<A>(b, h, q);
    std::fill_n(weight, top_k, A(0));
    std::fill_n(index, top_k, int64_t(-1));
    A total = 0, top = count ? key_score<A>(keys[0]) : A(0);
    for (int64_t j = 0; j < count; ++j) {
      index[j] = key_slot<A>(keys[j]);
      weight[j] = key_score<A>(keys[j]) - top;
    }
    int64_t j = 0;
    for (; j + W <= count; j += W) store(weight + j, exp(load(weight + j)));
    if (j < count) {
      A rest[W] = {};
      std::copy(weight + j, weight + count, rest);
      store(rest, exp(load(rest)));
      std::copy(rest, rest + (count - j), weight + j);
    }
    for (j = 0; j < count; ++j) total += weight[j];
    for (j = 0; j < count; ++j) weight[j] /= total;
    weighted_rows(index, weight, count, b, h, own);
    store_row(own.result.data(), n.F, out.row<T>(b, h, q));
  }

  void run() const {
    int64_t per_bank = banks.queries();
    if (banks.count() * per_bank == 0) return;
    bool blocked = per_bank > kRowwise;
    // Long candidate lists take memory, so fewer queries share a group.
    int64_t group = blocked ? std::max<int64_t>(1, std::min<int64_t>(kGroupVectors, 8192 / (best + 1))) * W : kRowwise;
    while (blocked && group > 2 * W && banks.count() * ((per_bank + group - 1) / group) < threads) group /= 2;
    group = std::min(group, per_bank);
    int64_t groups = (per_bank + group - 1) / group, units = banks.count() * groups;
    int64_t splits = units % threads == 0 || units >= 8 * threads ? 1 : threads;
    splits = std::max<int64_t>(1, std::min(splits, n.S / kSplitSlots));

    std::vector<Key<A>> found(splits > 1 ? units * splits * group * best : 0);
    std::vector<int64_t> found_count(splits > 1 ? units * splits * group : 0);
    std::vector<Scratch> scratch(threads);
    for (auto& own : scratch) own.tile.reserve(kTile, n.E), own.result.resize(n.F), own.row.resize(std::max(n.E, n.F)), own.merged.resize(best);

    parallel_for(units * splits, threads, [&](int64_t from, int64_t to, int thread) {
      Scratch& own = scratch[thread];
      for (int64_t item = from; item < to; ++item) {
        int64_t unit = item / splits, split = item % splits, bank = unit / groups, first = unit % groups * group;
        int64_t size = std::min(group, per_bank - first), lanes = blocked ? (size + W - 1) / W * W : size;
        int64_t begin = n.S * split / splits, end = n.S * (split + 1) / splits;
        pack(bank, first, size, lanes, blocked, own);
        own.selection.start(size, lanes, best);
        auto [b, h, q0] = banks.home(bank);
        if (best == 0) {
        } else if (blocked) {
          score_blocked(b, h, size, begin, end, own);
        } else {
          switch (size) {
            case 1: score_rowwise<1>(b, h, begin, end, own); break;
            case 2: score_rowwise<2>(b, h, begin, end, own); break;
            case 3: score_rowwise<3>(b, h, begin, end, own); break;
            default: score_rowwise<4>(b, h, begin, end, own); break;
          }
        }
        for (int64_t i = 0; i < size; ++i) {
          own.selection.cut(i, 0);
          int64_t count = own.selection.count[i], start = i * own.selection.capacity;
          Key<A>* keys = splits == 1 ? own.merged.data() : &found[(item * group + i) * best];
          for (int64_t j = 0; j < count; ++j)
            keys[j] = make_key<A>(own.selection.ranks[start + j], own.selection.slots[start + j]);
          if (splits == 1) {
            auto [ib, ih, iq] = banks.at(bank, first + i);
            attend(keys, count, ib, ih, iq, own);
          } else {
            found_count[item * group + i] = count;
          }
        }
      }
    });
    if (splits == 1) return;
    parallel_for(units * group, threads, [&](int64_t from, int64_t to, int thread) {
      Scratch& own = scratch[thread];
      for (int64_t at = from; at < to; ++at) {
        int64_t unit = at / group, i = at % group, query = unit % groups * group + i;
        if (query >= per_bank) continue;
        own.merged.clear();
        for (int64_t item = unit * splits; item < (unit + 1) * splits; ++item) {
          const Key<A>* keys = &found[(item * group + i) * best];
          own.merged.insert(own.merged.end(), keys, keys + found_count[item * group + i]);
        }
        int64_t count = std::min<int64_t>(best, own.merged.size());
        if (count < static_cast<int64_t>(own.merged.size()))
          std::nth_element(own.merged.begin(), own.merged.begin() + count - 1, own.merged.end(), std::greater<>());
        auto [b, h, q] = banks.at(unit / groups, query);
        attend(own.merged.data(), count, b, h, q, own);
      }
    });
  }
};

}  // namespace

void topk_attention_forward(int dtype, const Integers& sizes, int64_t top_k, double factor, bool cosine, int threads,
                            View q, View k, View v, View scale, View bias, View mask, View out, View indices,
                            View weights) {
  Sizes n = sizes_of(sizes);
  ScoreInputs in{q, k, scale, bias, mask, factor, cosine};
  threads = threads_for(threads, double(n.B) * n.H * n.Q * n.S * n.E);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Forward<T>{n, top_k, std::min(top_k, n.S), in, v, out, indices, weights, threads, Banks(n, in)}.run();
  });
}

}  // namespace fastmem
