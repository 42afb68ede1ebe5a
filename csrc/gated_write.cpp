// gated_write: tokens written in order into a bank of slots; the rule stands in docs/ops/gated_write.md.
//
// The decisions need nothing but cosines, and a write changes them linearly:
//   K' = (1 - a) K + a k   =>   cos(u, K') = p cos(u, K) + q cos(u, k),  p = (1 - a)|K| / |K'|,  q = a|k| / |K'|.
// So each chunk of tokens takes one matrix product (tokens x slots, tokens x tokens), and a write then costs O(chunk)
// instead of O(S E). Contents are brought up to date once per chunk, from the log of what went where.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace fastmem {
namespace {

constexpr int64_t kChunk = 64;   // tokens whose cosines are held at once; a multiple of every panel width
constexpr int64_t kFewTokens = 8;  // up to here plain dot products beat packed panels
constexpr int64_t kSumBlock = 128;  // partial sums of this length keep the rounding error of long rows small
// Following a write multiplies the error of a slot's cosines by |parts| / |sum|, which cancellation makes large. Where
// these factors have come to this much, cosines are taken afresh.
constexpr double kCancellation = 5;

#if defined(FASTMEM_ISA_AVX512)
constexpr int kTileRows = 8;
#elif defined(FASTMEM_ISA_AVX2)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
template <class T>
constexpr int kPanel = 2 * kLanes<T>;  // tokens side by side in a panel

// Where the gradient of a written slot's strength goes.
enum Route : int8_t { kNowhere = 0, kOldStrength = 1, kSurprise = 2 };

// The order of fastmem.ops._gated_write_reference.Rule.
struct Rule {
  double match_threshold, alpha_match, alpha_evict, boost, min_strength, retain_strength, retain_access, retain_age,
      z_threshold, capacity_pressure, ema_alpha, conflict_weight, conflict_floor, update_stats;
};

struct Sizes {
  int64_t B, S, T, E, F;
};

template <class T>
struct Forward {
  Sizes n;
  Rule rule;
  const T *bank_keys, *bank_values, *bank_strength, *bank_access, *bank_age;  // (B, S, E), (B, S, F), (B, S) x 3
  const T *keys, *values, *surprise;                                          // (B, T, E), (B, T, F), (B, T) or null
  const T *mean, *var, *count;                                                // (B,) or null
  const bool* mask;                                                           // (B, T) or null
  T *new_keys, *new_values, *new_strength, *new_access, *new_age, *new_mean, *new_var, *new_count;
  int64_t* slot;                     // (B, T)
  T *blend, *surprises, *threshold;  // (B, T)
  int8_t* route;                     // (B, T)
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
double norm(const T* row, int64_t n) {
  const T quick = dot(row, row, n);
  if (quick > T(1e-30) && quick < T(1e30)) return std::sqrt(static_cast<double>(quick));
  // Squares of floats neither overflow nor vanish in double.
  constexpr int64_t kSums = 32;
  double s[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) s[j] += static_cast<double>(row[i + j]) * row[i + j];
  for (; i < n; ++i) s[i % kSums] += static_cast<double>(row[i]) * row[i];
  for (int64_t half = kSums / 2; half; half /= 2)
    for (int64_t j = 0; j < half; ++j) s[j] += s[j + half];
  return std::sqrt(s[0]);
}

template <class T>
bool all_finite(const T* row, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> bad{};  // x - x is 0 for a finite x, else nan
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Vec<T> x = load(row + i);
    bad += x - x;
  }
  T rest = sum<T>(bad);
  for (; i < n; ++i) rest += row[i] - row[i];
  return rest == 0;
}

// A number as the product of two of type T, either of which is in range where the number itself may not be.
template <class T>
struct Factors {
  T a, b;
};

template <class T>
Factors<T> factors_of(double x) {
  if (x == 0 || !std::isfinite(x)) return {static_cast<T>(x), T(1)};
  int exponent;
  std::frexp(x, &exponent);
  const double power = std::ldexp(1.0, exponent / 2);
  return {static_cast<T>(power), static_cast<T>(x / power)};
}

template <class T>
struct Top {
  T value;
  int64_t index;
};

template <class T>
using IndexVec = decltype(Vec<T>{} > Vec<T>{});

// Largest element and the lowest index that has it; x is padded with -inf to whole vectors. nan never wins.
template <class T>
Top<T> argmax(const T* x, int64_t padded) {
  constexpr int W = kLanes<T>;
  using Index = std::remove_cvref_t<decltype(IndexVec<T>{}[0])>;
  Vec<T> top = Vec<T>{} - std::numeric_limits<T>::infinity();
  IndexVec<T> at{}, here{};
  for (int j = 0; j < W; ++j) here[j] = static_cast<Index>(j);
  for (int64_t i = 0; i < padded; i += W) {
    Vec<T> v = load(x + i);
    IndexVec<T> more = v > top;
    top = more ? v : top;
    at = more ? here : at;
    here += static_cast<Index>(W);
  }
  Top<T> best{top[0], static_cast<int64_t>(at[0])};
  for (int j = 1; j < W; ++j)
    if (top[j] > best.value || (top[j] == best.value && at[j] < best.index)) best = {top[j], at[j]};
  return best;
}

// out[r][j] = rows[r] . token j of the panel; panel is (E, kPanel), out is (kTileRows, kPanel).
template <class T>
void tile(const T* const* rows, const T* panel, int64_t E, T* out) {
  constexpr int W = kLanes<T>, R = kTileRows;
  std::fill(out, out + R * 2 * W, T(0));
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  for (int64_t begin = 0; begin < E; begin += kSumBlock) {
    Vec<T> s[R][2] = {};
    for (int64_t e = begin, end = std::min(E, begin + kSumBlock); e < end; ++e) {
      Vec<T> u0 = load(panel + e * 2 * W), u1 = load(panel + e * 2 * W + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        s[r][0] += row[r][e] * u0;
        s[r][1] += row[r][e] * u1;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) store(out + (2 * r + v) * W, load(out + (2 * r + v) * W) + s[r][v]);
  }
}

// rows[slot] <- (1 - a) rows[slot] + a token, in token order, for columns [c0, c1) of `width`.
template <class T>
void replay(T* rows, const T* tokens, const int64_t* slot, const T* blend, int64_t t0, int64_t t1, int64_t width,
            int64_t c0, int64_t c1) {
  constexpr int W = kLanes<T>;
  for (int64_t t = t0; t < t1; ++t) {
    if (slot[t] < 0) continue;
    T* row = rows + slot[t] * width;
    const T* token = tokens + t * width;
    const T a = blend[t], keep = 1 - a;
    if (a == 1) {  // what was there must not leak through, not even as nan * 0
      std::copy(token + c0, token + c1, row + c0);
      continue;
    }
    int64_t c = c0;
    for (; c + W <= c1; c += W) store(row + c, keep * load(row + c) + a * load(token + c));
    for (; c < c1; ++c) row[c] = keep * row[c] + a * token[c];
  }
}

// The transpose of replay: on entry `rows` holds the gradient of the new rows, on return that of the old ones.
template <class T>
void replay_back(T* rows, T* grad_tokens, const int64_t* slot, const T* blend, int64_t n, int64_t width, int64_t c0,
                 int64_t c1) {
  constexpr int W = kLanes<T>;
  for (int64_t t = n - 1; t >= 0; --t) {
    T* grad = grad_tokens + t * width;
    if (slot[t] < 0) {
      std::fill(grad + c0, grad + c1, T(0));
      continue;
    }
    T* row = rows + slot[t] * width;
    const T a = blend[t], keep = 1 - a;
    if (a == 1) {
      std::copy(row + c0, row + c1, grad + c0);
      std::fill(row + c0, row + c1, T(0));
      continue;
    }
    int64_t c = c0;
    for (; c + W <= c1; c += W) {
      Vec<T> g = load(row + c);
      store(grad + c, a * g);
      store(row + c, keep * g);
    }
    for (; c < c1; ++c) {
      grad[c] = a * row[c];
      row[c] = keep * row[c];
    }
  }
}

// One memory. `threads` split the matrix product and the contents; the decisions are one chain.
template <class T>
class Memory {
 public:
  Memory(const Sizes& n, const Rule& rule)
      : n_(n),
        rule_(rule),
        chunk_(std::min(n.T, kChunk)),
        padded_(round_up(n.S, kLanes<T>)),
        // One more cache line, so that a column of cosines does not fall into few cache sets.
        stride_(padded_ + 64 / static_cast<int64_t>(sizeof(T))),
        cosines_(new T[chunk_ * stride_]),
        gram_(new T[chunk_ * round_up(chunk_, kPanel<T>)]),
        panels_(new T[round_up(chunk_, kPanel<T>) * n.E]),
        worth_(new T[padded_]),
        slot_norm_(n.S),
        slot_error_(n.S),
        token_norm_(chunk_),
        live_(n.S),
        stale_(n.S),
        valid_(chunk_),
        refreshed_(n.E) {}

  void run(const Forward<T>& p, int64_t b, int threads) {
    const int64_t S = n_.S, N = n_.T, E = n_.E, F = n_.F;
    at(p, b);
    copy(p.bank_keys + b * S * E, new_keys_, S * E, threads);
    std::copy_n(p.bank_strength + b * S, S, strength_);
    std::copy_n(p.bank_access + b * S, S, access_);
    std::copy_n(p.bank_age + b * S, S, age_);
    lowest_dead_ = 0;
    live_count_ = 0;
    std::fill(worth_.get(), worth_.get() + padded_, -std::numeric_limits<T>::infinity());
    for (int64_t s = 0; s < S; ++s) {
      live_[s] = is_live(s);
      live_count_ += live_[s];
      stale_[s] = 1;
      slot_error_[s] = 1;
      set_worth(s);
    }
    for (int64_t t0 = 0; t0 < N; t0 += kChunk) {
      int64_t t1 = std::min(N, t0 + kChunk);
      take_cosines(t0, t1, threads);
      for (int64_t t = t0; t < t1; ++t) decide(t, t0, t1);
      split(E, threads, [&](int64_t c0, int64_t c1) {
        replay(new_keys_, keys_, slot_, blend_, t0, t1, E, c0, c1);
      });
      for (int64_t t = t0; t < t1; ++t)
        if (slot_[t] >= 0) stale_[slot_[t]] = 1, slot_error_[slot_[t]] = 1;
    }
    copy(p.bank_values + b * S * F, new_values_, S * F, threads);
    split(F, threads, [&](int64_t c0, int64_t c1) { replay(new_values_, values_, slot_, blend_, 0, N, F, c0, c1); });
    if (p.mean) {
      p.new_mean[b] = mean_;
      p.new_var[b] = var_;
      p.new_count[b] = count_;
    }
  }

 private:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();

  void at(const Forward<T>& p, int64_t b) {
    const int64_t S = n_.S, N = n_.T, E = n_.E, F = n_.F;
    keys_ = p.keys + b * N * E;
    values_ = p.values + b * N * F;
    surprise_ = p.surprise ? p.surprise + b * N : nullptr;
    mask_ = p.mask ? p.mask + b * N : nullptr;
    new_keys_ = p.new_keys + b * S * E;
    new_values_ = p.new_values + b * S * F;
    strength_ = p.new_strength + b * S;
    access_ = p.new_access + b * S;
    age_ = p.new_age + b * S;
    slot_ = p.slot + b * N;
    blend_ = p.blend + b * N;
    surprises_ = p.surprises + b * N;
    threshold_ = p.threshold + b * N;
    route_ = p.route + b * N;
    if (p.mean) mean_ = p.mean[b], var_ = p.var[b], count_ = p.count[b];
  }

  static void split(int64_t columns, int threads, const std::function<void(int64_t, int64_t)>& body) {
    constexpr int64_t kStep = 64;
    if (threads == 1) return body(0, columns);
    parallel_for((columns + kStep - 1) / kStep, threads, [&](int64_t begin, int64_t end, int) {
      body(begin * kStep, std::min(columns, end * kStep));
    });
  }

  static void copy(const T* from, T* to, int64_t count, int threads) {
    split(count, threads, [&](int64_t begin, int64_t end) { std::copy(from + begin, from + end, to + begin); });
  }

  bool is_live(int64_t s) const { return strength_[s] >= T(rule_.min_strength) && strength_[s] > 0; }

  void set_worth(int64_t s) {
    worth_[s] = -(T(rule_.retain_strength) * strength_[s] + T(rule_.retain_access) * std::log1p(access_[s]) -
                  T(rule_.retain_age) * age_[s]);
  }

  // Cosines of the chunk's tokens to the live slots as they are now, and to each other.
  void take_cosines(int64_t t0, int64_t t1, int threads) {
    const int64_t n = t1 - t0, E = n_.E, F = n_.F, P = kPanel<T>, panels = (n + P - 1) / P;
    const bool few = n <= kFewTokens;
    gram_stride_ = round_up(n, P);
    // Unit tokens, side by side in panels (panel, E, P), or one after the other where they are few.
    parallel_for(panels, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t filled = std::min(P, n - panel * P);
        Factors<T> inverse[kPanel<T>];
        for (int64_t j = 0; j < filled; ++j) {
          const int64_t t = panel * P + j;
          const double length = norm(keys_ + (t0 + t) * E, E);
          token_norm_[t] = length;
          valid_[t] = (!mask_ || mask_[t0 + t]) && std::isfinite(length) && all_finite(values_ + (t0 + t) * F, F) &&
                      (!surprise_ || std::isfinite(surprise_[t0 + t]));
          inverse[j] = factors_of<T>(inverse_of(length));
        }
        const T* key = keys_ + (t0 + panel * P) * E;
        T* out = panels_.get() + panel * P * E;
        if (few) {
          for (int64_t j = 0; j < filled; ++j)
            for (int64_t e = 0; e < E; ++e) out[j * E + e] = key[j * E + e] * inverse[j].a * inverse[j].b;
          continue;
        }
        if (filled < P) std::fill(out, out + P * E, T(0));
        constexpr int64_t kBlock = 64;  // columns whose part of the panel stays in the nearest cache
        for (int64_t begin_e = 0; begin_e < E; begin_e += kBlock)
          for (int64_t j = 0; j < filled; ++j)
            for (int64_t e = begin_e, end_e = std::min(E, begin_e + kBlock); e < end_e; ++e)
              out[e * P + j] = key[j * E + e] * inverse[j].a * inverse[j].b;
      }
    });
    for (int64_t t = 0; t < n; ++t) std::fill_n(cosines_.get() + t * stride_, padded_, kNone);

    // Rows to multiply with: live slots with a finite key, then the chunk's own tokens.
    rows_.clear();
    for (int64_t s = 0; s < n_.S; ++s)
      if (live_[s]) rows_.push_back(s);
    const int64_t slots = static_cast<int64_t>(rows_.size()), R = kTileRows;
    if (few) {
      parallel_for(slots, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t s = rows_[i];
          const T* row = new_keys_ + s * E;
          const double inverse = slot_inverse(s);
          if (std::isnan(inverse)) continue;
          for (int64_t t = 0; t < n; ++t)
            cosines_[t * stride_ + s] = static_cast<T>(inverse * dot(row, panels_.get() + t * E, E));
        }
      });
      for (int64_t i = 0; i < n; ++i)
        for (int64_t t = i + 1; t < n; ++t)
          gram_[i * gram_stride_ + t] = dot(panels_.get() + i * E, panels_.get() + t * E, E);
      return;
    }
    const int64_t slot_groups = (slots + R - 1) / R, token_groups = (n + R - 1) / R;
    parallel_for(slot_groups + token_groups, threads, [&](int64_t begin, int64_t end, int) {
      alignas(64) T out[kTileRows * kPanel<T>];
      const T* row[kTileRows];
      double inverse[kTileRows];
      for (int64_t group = begin; group < end; ++group) {
        const bool of_slots = group < slot_groups;
        const int64_t first = (of_slots ? group : group - slot_groups) * R;
        const int64_t count = std::min(R, (of_slots ? slots : n) - first);
        for (int64_t r = 0; r < R; ++r) {
          const int64_t i = first + std::min(r, count - 1);  // the last group repeats its last row
          row[r] = of_slots ? new_keys_ + rows_[i] * E : keys_ + (t0 + i) * E;
          inverse[r] = of_slots ? (r < count ? slot_inverse(rows_[i]) : 0) : inverse_of(token_norm_[i]);
        }
        // A token is only compared with later ones.
        for (int64_t panel = of_slots ? 0 : first / P; panel < panels; ++panel) {
          tile(row, panels_.get() + panel * P * E, E, out);
          const int64_t filled = std::min(P, n - panel * P);
          if (of_slots) {
            for (int64_t j = 0; j < filled; ++j)
              for (int64_t r = 0; r < count; ++r)
                if (!std::isnan(inverse[r]))
                  cosines_[(panel * P + j) * stride_ + rows_[first + r]] = static_cast<T>(inverse[r] * out[r * P + j]);
          } else {
            for (int64_t r = 0; r < count; ++r)
              for (int64_t j = 0; j < filled; ++j)
                gram_[(first + r) * gram_stride_ + panel * P + j] = static_cast<T>(inverse[r] * out[r * P + j]);
          }
        }
      }
    });
  }

  // 1 / |x|; 0 for a zero vector, whose cosine to anything is 0; nan for one that is not finite.
  static double inverse_of(double length) {
    return length == 0 ? 0 : std::isfinite(length) ? 1 / length : std::numeric_limits<double>::quiet_NaN();
  }

  double slot_inverse(int64_t s) {
    if (stale_[s]) slot_norm_[s] = norm(new_keys_ + s * n_.E, n_.E), stale_[s] = 0;
    return inverse_of(slot_norm_[s]);
  }

  void decide(int64_t t, int64_t t0, int64_t t1) {
    slot_[t] = -1;
    blend_[t] = surprises_[t] = threshold_[t] = 0;
    route_[t] = kNowhere;
    if (!valid_[t - t0]) return;
    const int64_t S = n_.S;
    const Top<T> best = argmax(cosines_.get() + (t - t0) * stride_, padded_);
    const T c = best.value;

    T s = 0;
    bool predicted = false;  // the surprise is the caller's, not the conflict with what is stored
    if (surprise_) {
      const T conflict = c > T(rule_.conflict_floor) ? T(rule_.conflict_weight) * (1 - c) : T(0);
      predicted = surprise_[t] >= conflict;
      s = predicted ? surprise_[t] : conflict;
      const T utilisation = S ? T(live_count_) / T(S) : T(0);
      const T theta = count_ == 0 ? T(0)
                                  : (mean_ + T(rule_.z_threshold) * std::sqrt(var_)) *
                                        (1 + T(rule_.capacity_pressure) * utilisation);
      if (rule_.update_stats != 0) {
        const T ema = T(rule_.ema_alpha), d = s - mean_;
        if (count_ == 0) {
          mean_ = s, var_ = 0;
        } else {
          mean_ += ema * d;
          var_ = T(1 - rule_.ema_alpha) * (var_ + ema * d * d);
        }
        count_ += 1;
      }
      surprises_[t] = s;
      threshold_[t] = theta;
      if (!(s > theta)) return;
    }
    if (S == 0) return;

    const bool matched = c > kNone && c >= T(rule_.match_threshold);
    int64_t at = best.index;
    T a = T(rule_.alpha_match);
    if (!matched) {
      if (live_count_ < S) {
        while (live_[lowest_dead_]) ++lowest_dead_;
        at = lowest_dead_, a = 1;
      } else {
        at = argmax(worth_.get(), padded_).index, a = T(rule_.alpha_evict);
      }
    }
    slot_[t] = at;
    blend_[t] = a;

    const T old = live_[at] ? strength_[at] : T(0);
    if (rule_.boost >= 0) {
      const T raised = old + T(rule_.boost);
      route_[t] = raised <= 1 && live_[at] ? kOldStrength : kNowhere;
      strength_[at] = raised <= 1 ? raised : T(1);
    } else if (matched && old >= s) {
      route_[t] = kOldStrength;
    } else {
      route_[t] = predicted ? kSurprise : kNowhere;
      strength_[at] = s;
    }
    if (!matched) access_[at] = 0;
    age_[at] = 0;
    set_worth(at);
    const bool live = is_live(at);
    live_count_ += live - live_[at];
    live_[at] = live;
    if (!live) lowest_dead_ = std::min(lowest_dead_, at);
    follow(t, t0, t1, at, a);
  }

  // The cosines of the chunk's later tokens to a slot that token t has just been written to.
  void follow(int64_t t, int64_t t0, int64_t t1, int64_t s, T a) {
    const int64_t n = t1 - t0, first = t - t0 + 1;
    T* column = cosines_.get() + s;
    const T* same = gram_.get() + (t - t0) * gram_stride_;
    if (!live_[s]) {
      for (int64_t i = first; i < n; ++i) column[i * stride_] = kNone;
      return;
    }
    const double length = token_norm_[t - t0];
    if (a == 1) {
      slot_norm_[s] = length;
      slot_error_[s] = 1;
      for (int64_t i = first; i < n; ++i) column[i * stride_] = same[i];
      return;
    }
    const double kept = (1 - static_cast<double>(a)) * slot_norm_[s], added = a * length;
    if (std::isnan(kept)) return;
    const double cosine = cosines_[(t - t0) * stride_ + s], parts = kept * slot_error_[s] + added;
    const double square = kept * kept + 2 * kept * added * cosine + added * added;
    if (square * kCancellation * kCancellation <= parts * parts) return refresh(t, t0, t1, s);
    slot_norm_[s] = std::sqrt(square);
    slot_error_[s] = parts / slot_norm_[s];
    const T p = static_cast<T>(kept / slot_norm_[s]), q = static_cast<T>(added / slot_norm_[s]);
    for (int64_t i = first; i < n; ++i) column[i * stride_] = p * column[i * stride_] + q * same[i];
  }

  // The same from the slot's content, brought up to token t.
  void refresh(int64_t t, int64_t t0, int64_t t1, int64_t s) {
    const int64_t E = n_.E;
    std::copy_n(new_keys_ + s * E, E, refreshed_.data());
    for (int64_t i = t0; i <= t; ++i) {
      const int64_t here = slot_[i] == s ? 0 : -1;
      replay(refreshed_.data(), keys_ + i * E, &here, blend_ + i, 0, 1, E, 0, E);
    }
    slot_norm_[s] = norm(refreshed_.data(), E);
    slot_error_[s] = 1;
    const double inverse = inverse_of(slot_norm_[s]);
    for (int64_t i = t + 1; i < t1; ++i)
      cosines_[(i - t0) * stride_ + s] =
          static_cast<T>(inverse * inverse_of(token_norm_[i - t0]) * dot(refreshed_.data(), keys_ + i * E, E));
  }

  const Sizes n_;
  const Rule rule_;
  const int64_t chunk_, padded_, stride_;
  int64_t gram_stride_ = 0;
  std::unique_ptr<T[]> cosines_;  // (chunk, stride): token x slot; -inf where a slot is dead or not finite
  std::unique_ptr<T[]> gram_;     // (chunk, gram_stride): token x later token
  std::unique_ptr<T[]> panels_;   // unit tokens
  std::unique_ptr<T[]> worth_;    // (padded,) minus the retention
  std::vector<double> slot_norm_;
  std::vector<double> slot_error_;  // of a slot's cosines, in rounding errors
  std::vector<double> token_norm_;
  std::vector<uint8_t> live_, stale_, valid_;
  std::vector<int64_t> rows_;
  std::vector<T> refreshed_;

  const T *keys_, *values_, *surprise_;
  const bool* mask_;
  T *new_keys_, *new_values_, *strength_, *access_, *age_;
  int64_t* slot_;
  T *blend_, *surprises_, *threshold_;
  int8_t* route_;
  T mean_ = 0, var_ = 0, count_ = 0;
  int64_t live_count_ = 0, lowest_dead_ = 0;
};

// As many threads as there is work for: waking one costs as much as moving about this many elements.
int worthwhile(int threads, int64_t elements) {
  constexpr int64_t kPerThread = 1 << 19;
  return static_cast<int>(std::clamp<int64_t>(elements / kPerThread, 1, std::max(threads, 1)));
}

// Whole memories go to the threads; what is left over is done together, one memory after the other.
template <class T>
void forward(const Forward<T>& p, int threads) {
  const int64_t products = p.n.T * (p.n.S + std::min(p.n.T, kChunk) / 2) * p.n.E;  // 16 of them cost as much as a move
  threads = worthwhile(threads, p.n.B * (2 * (p.n.S + p.n.T) * (p.n.E + p.n.F) + products / 16));
  const int64_t whole = p.n.B / threads * threads;
  parallel_for(whole, threads, [&](int64_t begin, int64_t end, int) {
    Memory<T> memory(p.n, p.rule);
    for (int64_t b = begin; b < end; ++b) memory.run(p, b, 1);
  });
  if (whole == p.n.B) return;
  Memory<T> memory(p.n, p.rule);
  for (int64_t b = whole; b < p.n.B; ++b) memory.run(p, b, threads);
}

// One linear map for keys, values and strength, given the decisions; forwards (replay) and transposed (backward).
template <class T>
struct Linear {
  Sizes n;
  const int64_t* slot;  // (B, T)
  const T* blend;       // (B, T)
  const int8_t* route;  // (B, T)
};

// Calls body(memory, part, c0, c1) for part 0 (keys) and 1 (values), columns [c0, c1), on all threads.
template <class Body>
void over_columns(const Sizes& n, int threads, const Body& body) {
  threads = worthwhile(threads, 2 * n.B * (n.S + n.T) * (n.E + n.F));
  constexpr int64_t kStep = 64;
  // Fewer memories than threads: pieces of columns, so that every thread has work.
  const int64_t pieces = n.B >= threads ? 1 : threads;
  parallel_for(n.B * 2 * pieces, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i % pieces, part = i / pieces % 2, b = i / pieces / 2, width = part ? n.F : n.E;
      const int64_t steps = (width + kStep - 1) / kStep;
      body(b, part, steps * piece / pieces * kStep, std::min(width, steps * (piece + 1) / pieces * kStep));
    }
  });
}

template <class T>
void copy_columns(const T* from, T* to, int64_t rows, int64_t width, int64_t c0, int64_t c1) {
  if (c0 == 0 && c1 == width) return void(std::copy_n(from, rows * width, to));
  for (int64_t r = 0; r < rows; ++r) std::copy(from + r * width + c0, from + r * width + c1, to + r * width + c0);
}

template <class T>
void linear_forward(const Linear<T>& p, const T* bank_keys, const T* bank_values, const T* bank_strength, const T* keys,
                    const T* values, const T* surprise, T* new_keys, T* new_values, T* new_strength, int threads) {
  const int64_t B = p.n.B, S = p.n.S, N = p.n.T, E = p.n.E, F = p.n.F;
  over_columns(p.n, threads, [&](int64_t b, int64_t part, int64_t c0, int64_t c1) {
    const int64_t width = part ? F : E;
    T* rows = (part ? new_values : new_keys) + b * S * width;
    copy_columns((part ? bank_values : bank_keys) + b * S * width, rows, S, width, c0, c1);
    replay(rows, (part ? values : keys) + b * N * width, p.slot + b * N, p.blend + b * N, 0, N, width, c0, c1);
  });
  std::copy_n(bank_strength, B * S, new_strength);
  for (int64_t i = 0; i < B * N; ++i) {
    if (p.slot[i] < 0 || p.route[i] == kOldStrength) continue;
    new_strength[i / N * S + p.slot[i]] = p.route[i] == kSurprise ? surprise[i] : T(0);
  }
}

template <class T>
void linear_backward(const Linear<T>& p, const T* new_keys, const T* new_values, const T* new_strength, T* bank_keys,
                     T* bank_values, T* bank_strength, T* keys, T* values, T* surprise, int threads) {
  const int64_t B = p.n.B, S = p.n.S, N = p.n.T, E = p.n.E, F = p.n.F;
  over_columns(p.n, threads, [&](int64_t b, int64_t part, int64_t c0, int64_t c1) {
    const int64_t width = part ? F : E;
    T* rows = (part ? bank_values : bank_keys) + b * S * width;
    copy_columns((part ? new_values : new_keys) + b * S * width, rows, S, width, c0, c1);
    replay_back(rows, (part ? values : keys) + b * N * width, p.slot + b * N, p.blend + b * N, N, width, c0, c1);
  });
  std::copy_n(new_strength, B * S, bank_strength);
  std::fill_n(surprise, B * N, T(0));
  for (int64_t i = B * N - 1; i >= 0; --i) {
    if (p.slot[i] < 0 || p.route[i] == kOldStrength) continue;
    T& grad = bank_strength[i / N * S + p.slot[i]];
    if (p.route[i] == kSurprise) surprise[i] = grad;
    grad = 0;
  }
}

// float or double: the bank's type, in which everything else has already been brought.
template <class F>
void on_bank_type(int dtype, F&& f) {
  if (dtype == static_cast<int>(Dtype::f32)) return f(float{});
  if (dtype == static_cast<int>(Dtype::f64)) return f(double{});
  throw std::invalid_argument("gated_write: the bank must be float32 or float64");
}

Sizes sizes_of(const Integers& n) { return {n[0], n[1], n[2], n[3], n[4]}; }

}  // namespace

// sizes (B, S, T, E, F); `in` and `out` in the order of Forward.
void gated_write(int dtype, const Integers& sizes, const std::array<double, 14>& rule, const Integers& in,
                 const Integers& out, int threads) {
  on_bank_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto from = [&](int i) { return in.pointer<T>(i); };
    auto to = [&](int i) { return out.pointer<T>(i); };
    forward(Forward<T>{sizes_of(sizes), std::bit_cast<Rule>(rule),
                       from(0), from(1), from(2), from(3), from(4),
                       from(5), from(6), from(7),
                       from(8), from(9), from(10),
                       in.pointer<bool>(11),
                       to(0), to(1), to(2), to(3), to(4), to(5), to(6), to(7),
                       out.pointer<int64_t>(8), to(9), to(10), to(11),
                       out.pointer<int8_t>(12)},
            threads);
  });
}

// in and out: those of linear_backward where transposed, else of linear_forward.
void gated_write_linear(int dtype, const Integers& sizes, const Integers& decisions, const Integers& in,
                        const Integers& out, bool transposed, int threads) {
  on_bank_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Linear<T> p{sizes_of(sizes), decisions.pointer<int64_t>(0), decisions.pointer<T>(1),
                      decisions.pointer<int8_t>(2)};
    auto x = [&](int i) { return in.pointer<T>(i); };
    auto y = [&](int i) { return out.pointer<T>(i); };
    if (transposed)
      linear_backward(p, x(0), x(1), x(2), y(0), y(1), y(2), y(3), y(4), y(5), threads);
    else
      linear_forward(p, x(0), x(1), x(2), x(3), x(4), x(5), y(0), y(1), y(2), threads);
  });
}

}  // namespace fastmem
