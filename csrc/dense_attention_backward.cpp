// Backward of dense attention on the CPU. Weights are recomputed from the saved log-sum-exp, tile by tile, twice: with the
// queries outside for dq, with the slots outside for dk, dv and dbias. No sum is shared between threads.
#include <algorithm>
#include <vector>

#include "dense_attention.h"
#include "parallel.h"

namespace fastmem {
namespace {

// What the backward reads of a group of queries. With q' = scale * q (over its norm), g the gradient of out:
template <class T>
struct PackedGroup {
  using A = typename Accumulate<T>::type;
  int64_t bank = 0, first = 0, size = 0, lanes = 0;
  std::vector<A> q, g;            // (E, lanes), (F, lanes)
  std::vector<A> q_rows, g_rows;  // (lanes, E padded), (lanes, F padded)
  std::vector<A> lse, mean;       // (lanes,): log-sum-exp, and g . out, which is the mean of d weight
  std::vector<A> times, inverse;  // (lanes,): what made q' of q / norm, and 1 / norm
};

template <class T>
struct Backward {
  using A = typename Accumulate<T>::type;
  static constexpr int W = kLanes<A>;

  Sizes n;
  ScoreInputs in;
  View v, grad_out, out, lse, grad_q, grad_scale, grad_k, grad_v, grad_bias;
  int64_t nb, nh;  // batches and heads of the gradients of k, v and bias
  int threads;
  Banks banks;

  struct Scratch {
    KeyTile<T> keys;
    ValueTile<T> values;
    std::vector<A> weight, d_score, dq, dk, dv, row, other, mean_score, excess;
  };

  PackedGroup<T> pack(int64_t bank, int64_t first, int64_t size, Scratch& own) const {
    PackedGroup<T> group;
    int64_t lanes = padded<A>(size), wide_e = padded<A>(n.E), wide_f = padded<A>(n.F);
    group.bank = bank, group.first = first, group.size = size, group.lanes = lanes;
    group.q.assign(n.E * lanes, A(0)), group.g.assign(n.F * lanes, A(0));
    group.q_rows.assign(lanes * wide_e, A(0)), group.g_rows.assign(lanes * wide_f, A(0));
    group.lse.assign(lanes, INFINITY), group.mean.assign(lanes, A(0));
    group.times.assign(lanes, A(0)), group.inverse.assign(lanes, A(0));
    own.row.resize(std::max(n.E, n.F)), own.other.resize(n.F);
    for (int64_t i = 0; i < size; ++i) {
      auto [b, h, q] = banks.at(bank, first + i);
      const A* x = as_row(in.q.row<const T>(b, h, q), n.E, own.row.data());
      A inverse = in.cosine ? inverse_norm(dot(x, x, n.E)) : A(1), times = in.multiplier<A>(b, h);
      group.times[i] = times, group.inverse[i] = inverse;
      for (int64_t e = 0; e < n.E; ++e) group.q[e * lanes + i] = group.q_rows[i * wide_e + e] = x[e] * times * inverse;
      const A* g = as_row(grad_out.row<const T>(b, h, q), n.F, own.row.data());
      for (int64_t f = 0; f < n.F; ++f) group.g[f * lanes + i] = group.g_rows[i * wide_f + f] = g[f];
      group.mean[i] = dot(g, as_row(out.row<const T>(b, h, q), n.F, own.other.data()), n.F);
      group.lse[i] = *lse.row<const A>(b, h, q);
    }
    return group;
  }

  // weight and d_score (slots of the tile, lanes) of one tile. `mean_score` (lanes,), if given, gains the sum of weight
  // times score, bias left out.
  void weigh(const PackedGroup<T>& group, Scratch& own, A* mean_score = nullptr) const {
    int64_t lanes = group.lanes;
    for_tiles(own.keys.count, lanes / W, [&]<int R, int V>(int64_t r0, int64_t v0) {
      Vec<A> acc[R][V];
      product_tile<R, V>(own.keys.rows + r0 * own.keys.stride, own.keys.stride, 1, &group.q[v0 * W], lanes, n.E, acc);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          Vec<A> score = acc[r][v] * own.keys.inverse[r0 + r];
          Vec<A> p = exp(score + own.keys.bias[r0 + r] - load(&group.lse[(v0 + v) * W]));
          store(&own.weight[(r0 + r) * lanes + (v0 + v) * W], p);
          if (mean_score) store(mean_score + (v0 + v) * W, load(mean_score + (v0 + v) * W) + p * score);
        }
    });
    for_tiles(own.keys.count, lanes / W, [&]<int R, int V>(int64_t r0, int64_t v0) {
      Vec<A> acc[R][V];
      product_tile<R, V>(own.values.rows + r0 * own.values.stride, own.values.stride, 1, &group.g[v0 * W], lanes, n.F,
                          acc);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          int64_t at = (r0 + r) * lanes + (v0 + v) * W;
          store(&own.d_score[at], load(&own.weight[at]) * (acc[r][v] - load(&group.mean[(v0 + v) * W])));
        }
    });
  }

  // to[row(r)][...] += sum over n of a * b: `to` has rows of `width`, a multiple of W.
  template <class Row>
  static void accumulate(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t width, int64_t inner,
                         int64_t rows, A* to, Row&& row) {
    for_tiles(rows, width / W, [&]<int R, int V>(int64_t r0, int64_t v0) {
      Vec<A> acc[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = load(to + row(r0 + r) * width + (v0 + v) * W);
      multiply_tile<R, V>(a + r0 * a_row, a_row, a_step, b + v0 * W, width, inner, acc);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(to + row(r0 + r) * width + (v0 + v) * W, acc[r][v]);
    });
  }

  // dq and d scale of one group, the slots streamed.
  void for_queries(const PackedGroup<T>& group, Scratch& own) const {
    int64_t lanes = group.lanes;
    auto [b, h, q0] = banks.home(group.bank);
    own.dq.assign(n.E * lanes, A(0)), own.mean_score.assign(lanes, A(0)), own.excess.assign(lanes, A(0));
    for (int64_t s = 0; s < n.S; s += kDenseTile) {
      int64_t end = std::min(n.S, s + kDenseTile);
      own.keys.gather(in, b, h, s, end, n.E);
      own.values.gather(v, b, h, own.keys, s, n.F);
      prefetch_rows<T>(in.k, b, h, end, std::min(n.S, end + kDenseTile), n.E);
      prefetch_rows<T>(v, b, h, end, std::min(n.S, end + kDenseTile), n.F);
      weigh(group, own, grad_scale ? own.mean_score.data() : nullptr);
      for (int64_t i = 0; grad_scale && i < own.keys.count; ++i)
        for (int64_t l = 0; l < lanes; ++l) own.excess[l] += own.d_score[i * lanes + l];
      if (in.cosine)
        for (int64_t i = 0; i < own.keys.count; ++i)
          for (int64_t l = 0; l < lanes; l += W)
            store(&own.d_score[i * lanes + l], load(&own.d_score[i * lanes + l]) * own.keys.inverse[i]);
      accumulate(own.keys.rows, 1, own.keys.stride, own.d_score.data(), lanes, own.keys.count, n.E, own.dq.data(),
                 [](int64_t r) { return r; });
    }
    std::vector<A> row(n.E);
    for (int64_t i = 0; i < group.size; ++i) {
      auto [ib, ih, iq] = banks.at(group.bank, group.first + i);
      const T* q = in.q.row<const T>(ib, ih, iq);
      const A* x = as_row(q, n.E, own.row.data());
      A along = 0;  // dq' . q / norm: the gradient of what q / norm was multiplied with, which is the scale
      for (int64_t e = 0; e < n.E; ++e) along += own.dq[e * lanes + i] * x[e] * group.inverse[i];
      A times = group.times[i] * group.inverse[i];
      for (int64_t e = 0; e < n.E; ++e) {
        A d = own.dq[e * lanes + i];
        row[e] = times * (in.cosine ? d - along * x[e] * group.inverse[i] : d);
      }
      if (grad_q) store_row(row.data(), n.E, grad_q.row<T>(ib, ih, iq));
      // The d scores sum to 0; what rounding left over is taken out again, times the mean similarity.
      A left = group.times[i] == A(0) ? A(0) : own.excess[i] * own.mean_score[i] / group.times[i];
      if (grad_scale) *grad_scale.row<A>(ib, ih, iq) = (along - left) * static_cast<A>(in.factor);
    }
  }

  // dk, dv and dbias of the slots [begin, end) of one bank of the gradients, the queries streamed.
  void for_slots(const std::vector<PackedGroup<T>>& groups, int64_t per_bank, int64_t gb, int64_t gh, int64_t begin,
                 int64_t end, Scratch& own) const {
    int64_t wide_e = padded<A>(n.E), wide_f = padded<A>(n.F), size = end - begin;
    own.dk.assign(size * wide_e, A(0)), own.dv.assign(size * wide_f, A(0));
    A d_bias[kDenseTile] = {};
    auto slot = [&](int64_t r) { return own.keys.slot[r] - begin; };
    for (int64_t bank = 0; bank < banks.count(); ++bank) {
      auto [b, h, q0] = banks.home(bank);
      if ((nb > 1 && b != gb) || (nh > 1 && h != gh)) continue;
      own.keys.gather(in, b, h, begin, end, n.E);
      own.values.gather(v, b, h, own.keys, begin, n.F);
      for (int64_t g = bank * per_bank; g < (bank + 1) * per_bank; ++g) {
        const PackedGroup<T>& group = groups[g];
        int64_t lanes = group.lanes;
        weigh(group, own);
        if (grad_v)
          accumulate(own.weight.data(), lanes, 1, group.g_rows.data(), wide_f, group.size, own.keys.count,
                     own.dv.data(), slot);
        if (grad_k)
          accumulate(own.d_score.data(), lanes, 1, group.q_rows.data(), wide_e, group.size, own.keys.count,
                     own.dk.data(), slot);
        if (grad_bias)
          for (int64_t i = 0; i < own.keys.count; ++i)
            for (int64_t l = 0; l < group.size; ++l) d_bias[slot(i)] += own.d_score[i * lanes + l];
      }
    }
    own.row.resize(std::max(n.E, n.F));
    for (int64_t s = 0; s < size; ++s) {
      if (grad_k) {
        A* d = &own.dk[s * wide_e];
        if (in.cosine) {  // through k' = k / norm
          const A* k = as_row(in.k.row<const T>(gb, gh, begin + s), n.E, own.row.data());
          A inverse = inverse_norm(dot(k, k, n.E)), along = dot(d, k, n.E) * inverse * inverse;
          bool touched = std::any_of(d, d + n.E, [](A x) { return x != A(0); });
          for (int64_t e = 0; touched && e < n.E; ++e) d[e] = inverse * (d[e] - along * k[e]);
        }
        store_row(d, n.E, grad_k.row<T>(gb, gh, begin + s));
      }
      if (grad_v) store_row(&own.dv[s * wide_f], n.F, grad_v.row<T>(gb, gh, begin + s));
      if (grad_bias) *grad_bias.row<A>(gb, gh, begin + s) = d_bias[s];
    }
  }

  void run() const {
    int64_t queries = banks.queries(), size = std::max<int64_t>(1, std::min(kDenseGroup * W, queries));
    int64_t per_bank = (queries + size - 1) / size;
    std::vector<PackedGroup<T>> groups(banks.count() * per_bank);
    std::vector<Scratch> scratch(threads);
    for (auto& own : scratch) {
      own.keys.reserve(kDenseTile, n.E);
      own.weight.resize(kDenseTile * padded<A>(size)), own.d_score.resize(own.weight.size());
    }
    parallel_for(groups.size(), threads, [&](int64_t from, int64_t to, int thread) {
      for (int64_t g = from; g < to; ++g) {
        int64_t first = g % per_bank * size;
        groups[g] = pack(g / per_bank, first, std::min(size, queries - first), scratch[thread]);
        if (grad_q || grad_scale) for_queries(groups[g], scratch[thread]);
      }
    });
    if (!grad_k && !grad_v && !grad_bias) return;
    int64_t tiles = (n.S + kDenseTile - 1) / kDenseTile;
    parallel_for(nb * nh * tiles, threads, [&](int64_t from, int64_t to, int thread) {
      for (int64_t item = from; item < to; ++item) {
        int64_t bank = item / tiles, begin = item % tiles * kDenseTile;
        for_slots(groups, per_bank, bank / nh, bank % nh, begin, std::min(n.S, begin + kDenseTile), scratch[thread]);
      }
    });
  }
};

}  // namespace

void dense_attention_backward(int dtype, const Integers& sizes, double factor, bool cosine, int threads, int64_t nb,
                              int64_t nh, View q, View k, View v, View scale, View bias, View mask, View grad_out,
                              View out, View lse, View grad_q, View grad_scale, View grad_k, View grad_v,
                              View grad_bias) {
  Sizes n = sizes_of(sizes);
  ScoreInputs in{q, k, scale, bias, mask, factor, cosine};
  threads = threads_for(threads, double(n.B) * n.H * n.Q * n.S * (n.E + n.F));
  // Queries may share a group where the gradients are shared too and the mask does not tell them apart.
  Banks banks(n, nb == 1 && mask.b == 0, nh == 1 && mask.h == 0);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Backward<T>{n,      in,     v,         grad_out, out, lse,     grad_q, grad_scale,
                grad_k, grad_v, grad_bias, nb,       nh,  threads, banks}
        .run();
  });
}

}  // namespace fastmem
