// Backward of topk_attention on the CPU. Only chosen rows are read. Two passes, neither of which shares a sum between
// threads, so the number of threads does not change a bit: per query (coefficients, dq), then per slot (dk, dv, dbias).
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace fastmem {
namespace {

template <class T>
struct Backward {
  using A = typename Accumulate<T>::type;
  static constexpr int W = kLanes<A>;

  Sizes n;
  int64_t top_k;
  ScoreInputs in;  // bias and mask unset: what they did stands in the weights
  View v, grad_out, grad_weights, indices, weights, grad_q, grad_scale;
  Target grad_k, grad_v, grad_bias;
  int threads;

  // Per query and chosen slot: d score, then d score by the raw product q . k, and what multiplies k itself in dk.
  std::vector<A> d_score, onto_query, onto_self;

  int64_t flat(int64_t b, int64_t h, int64_t q) const { return (b * n.H + h) * n.Q + q; }

  void per_query() {
    bool to_bank = grad_k.grad || grad_bias.grad;
    if (to_bank) d_score.resize(n.B * n.H * n.Q * top_k);
    if (grad_k.grad) onto_query.resize(d_score.size()), onto_self.resize(d_score.size());
    parallel_for(n.B * n.H * n.Q, threads, [&](int64_t from, int64_t to, int) {
      std::vector<A> q_row(n.E), k_row(n.E), v_row(n.F), out_row(n.F), dq(n.E), similarity(top_k), inverse(top_k);
      std::vector<A> ds(top_k);
      for (int64_t i = from; i < to; ++i) {
        int64_t b = i / n.Q / n.H, h = i / n.Q % n.H, qi = i % n.Q;
        const int64_t* index = indices.row<const int64_t>(b, h, qi);
        const A* p = weights.row<const A>(b, h, qi);
        const A* dp = grad_weights ? grad_weights.row<const A>(b, h, qi) : nullptr;
        const A* q = as_row(in.q.row<const T>(b, h, qi), n.E, q_row.data());
        const A* go = as_row(grad_out.row<const T>(b, h, qi), n.F, out_row.data());
        A inverse_q = in.cosine ? inverse_norm(dot(q, q, n.E)) : A(1);
        A times = in.multiplier<A>(b, h), mean = 0, onto_scale = 0, along_q = 0;
        int64_t count = 0;
        for (; count < top_k && index[count] >= 0; ++count) {
          int64_t j = count;
          ds[j] = dot(go, as_row(v.row<const T>(b, h, index[j]), n.F, v_row.data()), n.F) + (dp ? dp[j] : A(0));
          // Relative to the best slot's: where its weight is near 1, the difference below would cancel.
          if (j > 0) ds[j] -= ds[0], mean += p[j] * ds[j];
        }
        if (count > 0) ds[0] = A(0);
        std::fill(dq.begin(), dq.end(), A(0));
        for (int64_t j = 0; j < count; ++j) {
          const A* k = as_row(in.k.row<const T>(b, h, index[j]), n.E, k_row.data());
          inverse[j] = in.cosine ? inverse_norm(dot(k, k, n.E)) : A(1);
          similarity[j] = dot(q, k, n.E) * inverse_q * inverse[j];
          ds[j] = p[j] * (ds[j] - mean);
          onto_scale += ds[j] * (similarity[j] - similarity[0]);  // the ds sum to 0
          A onto_similarity = ds[j] * times, onto_product = onto_similarity * inverse_q * inverse[j];
          along_q += onto_similarity * similarity[j];
          if (grad_q) add_scaled(onto_product, k, dq.data(), n.E);
          if (grad_k.grad) {
            onto_query[i * top_k + j] = onto_product;
            onto_self[i * top_k + j] = in.cosine ? -onto_similarity * similarity[j] * inverse[j] * inverse[j] : A(0);
          }
          if (to_bank) d_score[i * top_k + j] = ds[j];
        }
        if (grad_q) {
          if (in.cosine) add_scaled(-along_q * inverse_q * inverse_q, q, dq.data(), n.E);
          store_row(dq.data(), n.E, grad_q.row<T>(b, h, qi));
        }
        if (grad_scale) *grad_scale.row<A>(b, h, qi) = onto_scale * static_cast<A>(in.factor);
      }
    });
  }

  // Sums over the queries that chose a slot, slot by slot, in the order of the queries.
  void per_slot(int64_t nb, int64_t nh, bool to_k, bool to_v, bool to_bias) const {
    Banks banks(n, nb == 1, nh == 1);
    int64_t chunks = banks.count() % threads == 0 ? 1 : threads;
    parallel_for(banks.count() * chunks, threads, [&](int64_t from, int64_t to, int) {
      std::vector<int64_t> start;
      std::vector<int64_t> entry;  // flat query * top_k + place among the chosen
      std::vector<A> dk(n.E), dv(n.F), row(std::max(n.E, n.F));
      for (int64_t item = from; item < to; ++item) {
        int64_t bank = item / chunks, chunk = item % chunks;
        int64_t begin = n.S * chunk / chunks, end = n.S * (chunk + 1) / chunks, queries = banks.queries();
        auto visit = [&](auto&& f) {
          for (int64_t i = 0; i < queries; ++i) {
            auto [b, h, q] = banks.at(bank, i);
            const int64_t* index = indices.row<const int64_t>(b, h, q);
            for (int64_t j = 0; j < top_k && index[j] >= 0; ++j)
              if (index[j] >= begin && index[j] < end) f(index[j] - begin, flat(b, h, q) * top_k + j);
          }
        };
        // Counting sort by slot; queries were visited in order and stay so.
        start.assign(end - begin + 2, 0);
        visit([&](int64_t slot, int64_t) { ++start[slot + 2]; });
        for (int64_t s = 0; s < end - begin; ++s) start[s + 2] += start[s + 1];
        entry.resize(start[end - begin + 1]);
        visit([&](int64_t slot, int64_t at) { entry[start[slot + 1]++] = at; });
        auto [b, h, q0] = banks.home(bank);
        for (int64_t s = begin; s < end; ++s) {
          int64_t first = start[s - begin], last = start[s - begin + 1];
          if (to_k) {
            std::fill(dk.begin(), dk.end(), A(0));
            A self = 0;
            for (int64_t i = first; i < last; ++i) {
              int64_t query = entry[i] / top_k;
              const T* q = in.q.row<const T>(query / n.Q / n.H, query / n.Q % n.H, query % n.Q);
              add_scaled(onto_query[entry[i]], as_row(q, n.E, row.data()), dk.data(), n.E);
              self += onto_self[entry[i]];
            }
            if (first < last && in.cosine)
              add_scaled(self, as_row(in.k.row<const T>(b, h, s), n.E, row.data()), dk.data(), n.E);
            store_row(dk.data(), n.E, grad_k.grad.row<T>(b, h, s));
          }
          if (to_v) {
            std::fill(dv.begin(), dv.end(), A(0));
            for (int64_t i = first; i < last; ++i) {
              int64_t query = entry[i] / top_k, qb = query / n.Q / n.H, qh = query / n.Q % n.H, qi = query % n.Q;
              const A* p = weights.row<const A>(qb, qh, qi);
              const A* go = as_row(grad_out.row<const T>(qb, qh, qi), n.F, row.data());
              add_scaled(p[entry[i] % top_k], go, dv.data(), n.F);
            }
            store_row(dv.data(), n.F, grad_v.grad.row<T>(b, h, s));
          }
          if (to_bias) {
            A total = 0;
            for (int64_t i = first; i < last; ++i) total += d_score[entry[i]];
            *grad_bias.grad.row<A>(b, h, s) = total;
          }
        }
      }
    });
  }

  void run() {
    if (n.B * n.H * n.Q > 0) per_query();
    // Tensors that are shared alike are summed in one go.
    Target* targets[] = {&grad_k, &grad_v, &grad_bias};
    bool done[3];
    for (int t = 0; t < 3; ++t) done[t] = !targets[t]->grad;
    for (int t = 0; t < 3; ++t) {
      if (done[t]) continue;
      bool with[3];
      for (int u = 0; u < 3; ++u) {
        with[u] = !done[u] && targets[u]->B == targets[t]->B && targets[u]->H == targets[t]->H;
        done[u] = done[u] || with[u];
      }
      per_slot(targets[t]->B, targets[t]->H, with[0], with[1], with[2]);
    }
  }
};

}  // namespace

void topk_attention_backward(int dtype, const Integers& sizes, int64_t top_k, double factor, bool cosine, int threads,
                             View q, View k, View v, View scale, View grad_out, View grad_weights, View indices,
                             View weights, View grad_q, View grad_scale, Target grad_k, Target grad_v,
                             Target grad_bias) {
  Sizes n = sizes_of(sizes);
  ScoreInputs in{q, k, scale, {}, {}, factor, cosine};
  // The second pass writes every row of the gradients, chosen or not.
  threads = threads_for(threads, double(n.B) * n.H * (n.Q * top_k + n.S) * (n.E + n.F));
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    Backward<T>{n,       top_k,  in,         v,      grad_out, grad_weights, indices,
                weights, grad_q, grad_scale, grad_k, grad_v,   grad_bias,    threads}
        .run();
  });
}

}  // namespace fastmem
