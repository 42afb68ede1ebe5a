// Attention over all slots (topk_attention with top_k = None) on the CPU; docs/ops/topk_attention.md.
//
// Every product of matrices is multiply_tile with queries in the lanes: scores^T = K Q^T, out^T = V^T P^T, and so on, so
// nothing but the queries is ever transposed. Sums run in an order that the sizes alone decide.
#include <algorithm>
#include <vector>

#include "dense_attention.h"
#include "parallel.h"

namespace fastmem {
namespace {

constexpr int64_t kRowwise = 4;     // up to this many queries per bank, vectors run along the row instead
constexpr int64_t kValueRows = 4;   // value rows added at once
constexpr int64_t kPart = 96 * 48;  // slots per part; parts of a bank are merged, whatever the number of threads

// A group of queries of one bank, ready for tiles. Lanes past `size` hold zeros.
template <class T>
struct Group {
  using A = typename Accumulate<T>::type;
  int64_t bank, first, size, lanes;
  std::vector<A> columns, row;  // (E, lanes): queries times scale (and 1 / norm)

  void pack(const Sizes& n, const ScoreInputs& in, const Banks& banks) {
    columns.assign(n.E * lanes, A(0));
    row.resize(std::max(n.E, n.F));
    for (int64_t i = 0; i < size; ++i) {
      auto [b, h, q] = banks.at(bank, first + i);
      const A* x = as_row(in.q.row<const T>(b, h, q), n.E, row.data());
      A times = in.multiplier<A>(b, h) * (in.cosine ? inverse_norm(dot(x, x, n.E)) : A(1));
      for (int64_t e = 0; e < n.E; ++e) columns[e * lanes + i] = x[e] * times;
    }
  }
};

template <class T>
struct Forward {
  using A = typename Accumulate<T>::type;
  static constexpr int W = kLanes<A>;
  static constexpr A kNone = -INFINITY;

  Sizes n;
  ScoreInputs in;
  View v, out, lse;
  int threads;
  Banks banks;

  struct Scratch {
    Group<T> group;
    KeyTile<T> keys;
    ValueTile<T> values;
    std::vector<A> p, top, total, result, row;  // p (slots, lanes); top, total (lanes,); result (F, lanes) or (lanes, F)
  };

  // exp(x - top), 0 where x is -inf, also when top is.
  static Vec<A> weight(Vec<A> x, Vec<A> top) { return exp(x - (top == kNone ? Vec<A>{} : top)); }

  void blocked(int64_t b, int64_t h, int64_t begin, int64_t end, Scratch& own) const {
    int64_t lanes = own.group.lanes;
    own.p.resize(kDenseTile * lanes);
    for (int64_t s = begin; s < end; s += kDenseTile) {
      own.keys.gather(in, b, h, s, std::min(end, s + kDenseTile), n.E);
      int64_t next = s + kDenseTile, last = std::min(end, next + kDenseTile);
      prefetch_rows<T>(v, b, h, s, std::min(end, next), n.F);
      if (own.keys.count == 0) continue;
      own.values.gather(v, b, h, own.keys, s, n.F);
      for_tiles(own.keys.count, lanes / W, [&]<int R, int V>(int64_t r0, int64_t v0) {
        Vec<A> acc[R][V];
        product_tile<R, V>(own.keys.rows + r0 * own.keys.stride, own.keys.stride, 1, &own.group.columns[v0 * W], lanes,
                            n.E, acc);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v)
            store(&own.p[(r0 + r) * lanes + (v0 + v) * W], acc[r][v] * own.keys.inverse[r0 + r] + own.keys.bias[r0 + r]);
      });
      prefetch_rows<T>(in.k, b, h, next, last, n.E);
      for (int64_t l = 0; l < lanes; l += W) {
        Vec<A> before = load(&own.top[l]), top = before, total{};
        for (int64_t i = 0; i < own.keys.count; ++i) {
          Vec<A> x = load(&own.p[i * lanes + l]);
          top = x > top ? x : top;
        }
        for (int64_t i = 0; i < own.keys.count; ++i) {
          Vec<A> x = weight(load(&own.p[i * lanes + l]), top);
          store(&own.p[i * lanes + l], x);
          total += x;
        }
        Vec<A> shrink = weight(before, top);
        store(&own.top[l], top);
        store(&own.total[l], load(&own.total[l]) * shrink + total);
        if (not_le<A>(splat(A(1)), shrink))
          for (int64_t f = 0; f < n.F; ++f) store(&own.result[f * lanes + l], load(&own.result[f * lanes + l]) * shrink);
      }
      for_tiles(n.F, lanes / W, [&]<int R, int V>(int64_t f0, int64_t v0) {
        Vec<A> acc[R][V];
        A* to = &own.result[f0 * lanes + v0 * W];
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) acc[r][v] = load(to + r * lanes + v * W);
        multiply_tile<R, V>(own.values.rows + f0, 1, own.values.stride, &own.p[v0 * W], lanes, own.keys.count, acc);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) store(to + r * lanes + v * W, acc[r][v]);
      });
    }
  }

  // Rows one after the other, as memory likes them: all keys of a tile, then all its values.
  void rowwise(int64_t b, int64_t h, int64_t begin, int64_t end, Scratch& own) const {
    const uint8_t* mask = in.mask ? in.mask.row<const uint8_t>(b, h) : nullptr;
    const A* bias = in.bias ? in.bias.row<const A>(b, h) : nullptr;
    int64_t queries = own.group.size, slot[kDenseTile];
    own.p.resize(queries * kDenseTile);
    for (int64_t s = begin; s < end;) {
      int64_t count = 0;
      for (; s < end && count < kDenseTile; ++s) {
        A add = bias ? bias[s * in.bias.r] : A(0);
        if ((mask && !mask[s * in.mask.r]) || add == kNone) continue;
        const T* key = in.k.row<const T>(b, h, s);
        prefetch_ahead(key, n.E);
        const A* row = as_row(key, n.E, own.row.data());
        A inverse = in.cosine ? inverse_norm(dot(row, row, n.E)) : A(1);
        for (int64_t j = 0; j < queries; ++j)
          own.p[j * kDenseTile + count] = dot(row, &own.group.columns[j * n.E], n.E) * inverse + add;
        slot[count++] = s;
      }
      for (int64_t j = 0; j < queries; ++j) {
        A* p = &own.p[j * kDenseTile];
        A top = own.top[j];
        for (int64_t i = 0; i < count; ++i) top = p[i] > top ? p[i] : top;
        std::fill(p + count, p + (count + W - 1) / W * W, kNone);
        Vec<A> total{}, tops = splat(top);
        for (int64_t i = 0; i < count; i += W) {
          Vec<A> x = weight(load(p + i), tops);
          store(p + i, x);
          total += x;
        }
        A shrink = weight(splat(own.top[j]), tops)[0];
        own.top[j] = top;
        own.total[j] = own.total[j] * shrink + sum<A>(total);
        add_values(b, h, p, slot, count, shrink, &own.result[j * n.F], own);
      }
    }
  }

  // result (F,) = shrink * result + sum of p[i] * v[slot[i]]. Four rows at a time, each read once from end to end, as
  // memory likes it; the result stays in the nearest cache.
  void add_values(int64_t b, int64_t h, const A* p, const int64_t* slot, int64_t count, A shrink, A* result,
                  Scratch& own) const {
    if (shrink != A(1))
      for (int64_t f = 0; f < n.F; ++f) result[f] *= shrink;
    auto row = [&](int64_t i, int64_t place) {
      const T* value = v.row<const T>(b, h, slot[i]);
      prefetch_ahead(value, n.F);
      return as_row(value, n.F, &own.row[place * n.F]);
    };
    int64_t i = 0;
    for (; i + kValueRows <= count; i += kValueRows) {
      const A *r0 = row(i, 0), *r1 = row(i + 1, 1), *r2 = row(i + 2, 2), *r3 = row(i + 3, 3);
      const A p0 = p[i], p1 = p[i + 1], p2 = p[i + 2], p3 = p[i + 3];
      int64_t f = 0;
      for (; f + W <= n.F; f += W)
        store(result + f, load(result + f) + ((p0 * load(r0 + f) + p1 * load(r1 + f)) +
                                              (p2 * load(r2 + f) + p3 * load(r3 + f))));
      for (; f < n.F; ++f) result[f] += (p0 * r0[f] + p1 * r1[f]) + (p2 * r2[f] + p3 * r3[f]);
    }
    for (; i < count; ++i) add_scaled(p[i], row(i, 0), result, n.F);
  }

  // What a part found, per query: top, total, result.
  void finish(const A* found, int64_t parts, int64_t part_stride, int64_t b, int64_t h, int64_t q, A* result) const {
    A top = kNone, total = 0;
    for (int64_t i = 0; i < parts; ++i) top = found[i * part_stride] > top ? found[i * part_stride] : top;
    std::fill_n(result, n.F, A(0));
    for (int64_t i = 0; i < parts; ++i) {
      const A* part = found + i * part_stride;
      A times = parts == 1 ? A(1) : weight(splat(part[0]), splat(top))[0];
      total += part[1] * times;
      add_scaled(times, part + 2, result, n.F);
    }
    for (int64_t f = 0; f < n.F; ++f) result[f] = total == A(0) ? A(0) : result[f] / total;
    store_row(result, n.F, out.row<T>(b, h, q));
    // +inf makes every weight 0 in the backward of a query that saw nothing.
    *lse.row<A>(b, h, q) = total == A(0) ? -kNone : top + std::log(total);
  }

  void run() const {
    int64_t per_bank = banks.queries();
    if (banks.count() * per_bank == 0) return;
    bool lanewise = per_bank > kRowwise;
    int64_t size = std::min(lanewise ? kDenseGroup * W : kRowwise, per_bank), groups = (per_bank + size - 1) / size;
    int64_t parts = std::max<int64_t>(1, (n.S + kPart - 1) / kPart), units = banks.count() * groups, width = n.F + 2;
    std::vector<A> found(parts > 1 ? units * size * parts * width : 0);
    std::vector<Scratch> scratch(threads);
    parallel_for(units * parts, threads, [&](int64_t from, int64_t to, int thread) {
      Scratch& own = scratch[thread];
      if (lanewise) own.keys.reserve(kDenseTile, n.E);
      own.row.resize(std::max(n.E, kValueRows * n.F));
      std::vector<A> query(width);
      for (int64_t item = from; item < to; ++item) {
        int64_t unit = item / parts, part = item % parts;
        Group<T>& group = own.group;
        group.bank = unit / groups, group.first = unit % groups * size;
        group.size = std::min(size, per_bank - group.first);
        group.lanes = lanewise ? padded<A>(group.size) : 1;
        auto [b, h, q0] = banks.home(group.bank);
        int64_t begin = part * kPart, end = std::min(n.S, begin + kPart), lanes = lanewise ? group.lanes : group.size;
        own.top.assign(lanes, kNone), own.total.assign(lanes, A(0)), own.result.assign(lanes * n.F, A(0));
        if (lanewise) {
          group.pack(n, in, banks);
          blocked(b, h, begin, end, own);
        } else {
          pack_rows(own);
          rowwise(b, h, begin, end, own);
        }
        for (int64_t i = 0; i < group.size; ++i) {
          A* to = parts > 1 ? &found[((unit * size + i) * parts + part) * width] : query.data();
          to[0] = own.top[i], to[1] = own.total[i];
          for (int64_t f = 0; f < n.F; ++f) to[2 + f] = own.result[lanewise ? f * lanes + i : i * n.F + f];
          if (parts > 1) continue;
          auto [ib, ih, iq] = banks.at(group.bank, group.first + i);
          finish(to, 1, width, ib, ih, iq, own.row.data());
        }
      }
    });
    if (parts == 1) return;
    parallel_for(units * size, threads, [&](int64_t from, int64_t to, int thread) {
      for (int64_t at = from; at < to; ++at) {
        int64_t unit = at / size, query = unit % groups * size + at % size;
        if (query >= per_bank) continue;
        auto [b, h, q] = banks.at(unit / groups, query);
        scratch[thread].row.resize(std::max(n.E, n.F));
        finish(&found[at * parts * width], parts, width, b, h, q, scratch[thread].row.data());
      }
    });
  }

  // Queries row by row, (size, E).
  void pack_rows(Scratch& own) const {
    Group<T>& group = own.group;
    group.columns.resize(group.size * n.E);
    Group<T> one{group.bank, 0, 1, 1, {}, {}};
    for (int64_t j = 0; j < group.size; ++j) {
      one.first = group.first + j;
      one.pack(n, in, banks);
      std::copy(one.columns.begin(), one.columns.end(), &group.columns[j * n.E]);
    }
  }
};

}  // namespace

void dense_attention_forward(int dtype, const Integers& sizes, double factor, bool cosine, int threads, View q, View k,
                             View v, View scale, View bias, View mask, View out, View lse) {
  Sizes n = sizes_of(sizes);
  ScoreInputs in{q, k, scale, bias, mask, factor, cosine};
  threads = threads_for(threads, double(n.B) * n.H * n.Q * n.S * (n.E + n.F));
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Forward<T>{n, in, v, out, lse, threads, Banks(n, in, v)}.run();
  });
}

}  // namespace fastmem
