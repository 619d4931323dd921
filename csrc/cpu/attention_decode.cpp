// attention_decode: a few new tokens against a long cache. The cache is read once, in its own layout, by all
// heads that share it; it is cut over tasks by shapes alone, and the parts (m, l, O) are merged in fixed
// order.
//
// Lanes of the score product are query rows (token, head), so K is broadcast and never transposed; lanes of P
// V are head dims.
#include "attention.h"

namespace palm::cpu::ISA {

constexpr int kBlock = VB == 64 ? 24 : 12;  // keys a step: as many accumulators as the registers hold
constexpr int kRows = 8;                    // query rows of a P V tile

// scores[keys][L rows] = K[keys][D] Q[D][L]; `ahead` walks through memory that will be read next, spread over
// the loop.
template <int keys, class C>
PALM_INLINE void score_rows(const C* k, int64_t stride, const C* q, int64_t ldq, int64_t D, C* scores,
                            int64_t lds, const char* ahead, int64_t bytes) {
  typename Of<C>::V c[keys];
#pragma GCC unroll 24
  for (int i = 0; i < keys; ++i) c[i] = typename Of<C>::V{};
  const int64_t step = bytes / D;
  for (int64_t d = 0; d < D; ++d) {
    const auto b = load(q + d * ldq);
    for (int64_t line = 0; line < step; line += 64) __builtin_prefetch(ahead + d * step + line);
#pragma GCC unroll 24
    for (int i = 0; i < keys; ++i) c[i] += set1(k[i * stride + d]) * b;
  }
#pragma GCC unroll 24
  for (int i = 0; i < keys; ++i) store(scores + i * lds, c[i]);
}

// out[kRows][NP] = alpha out + P[n][kRows]^T V[n][NP]
template <class C>
PALM_INLINE void value_rows(const C* probs, int64_t ldp, const C* v, int64_t stride, int64_t count, C* out,
                            int64_t ld, const C* alpha) {
  constexpr int L = W<C>;
  constexpr int rows = VB == 64 ? kRows : kRows / 2;  // 16 registers hold 4 x 2 accumulators
  for (int r = 0; r < kRows; r += rows) {
    typename Of<C>::V c[rows][2];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const auto x = set1(alpha[r + i]);
      c[i][0] = load(out + (r + i) * ld) * x;
      c[i][1] = load(out + (r + i) * ld + L) * x;
    }
    for (int64_t n = 0; n < count; ++n) {
      const auto b0 = load(v + n * stride), b1 = load(v + n * stride + L);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const auto x = set1(probs[n * ldp + r + i]);
        c[i][0] += x * b0;
        c[i][1] += x * b1;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      store(out + (r + i) * ld, c[i][0]);
      store(out + (r + i) * ld + L, c[i][1]);
    }
  }
}

// Sizes of one call, from shapes alone.
struct DecodePlan {
  int64_t G, rows, room, width, chunk, chunks, part;
  template <class C>
  static DecodePlan of(const Attention& p, C) {
    DecodePlan x;
    x.G = p.H / p.K;
    x.rows = p.T * x.G;
    x.room = round_up(x.rows, most(kRows, W<C>));
    x.width = round_up(p.D, Tile<C>::NP);
    const int64_t pairs = most(1, p.B * p.K);
    x.chunk = round_up(most(10 * kBlock, (p.S * pairs + 31) / 32), kBlock);  // about 32 tasks, none too short
    x.chunks = (p.S + x.chunk - 1) / x.chunk;
    x.part = x.room * (x.width + 2);  // O, m, l
    return x;
  }
};

template <class E, class C = typename Of<E>::C>
struct DecodeState {
  Scratch<C> queries, tile, scores, alpha, lo, hi;
  DecodeState(const DecodePlan& x, int64_t D)
      : queries(x.room * D),
        tile(kBlock * x.width),
        scores(kBlock * x.room),
        alpha(x.room),
        lo(x.room),
        hi(x.room) {}
};

// One (entry, key/value head, chunk): online softmax over its keys into `part`.
template <class E, class C = typename Of<E>::C>
struct DecodeTask {
  static constexpr int L = W<C>;
  using V = typename Of<C>::V;
  const Attention& p;
  const DecodePlan& x;
  DecodeState<E>& w;
  int64_t b, kh, S;
  C *out, *m, *l;

  const E* key(const Heads& cache, int64_t n) const { return at<const E>(cache, b, n, kh); }
  C bias(int64_t n) const { return static_cast<const C*>(p.key_bias)[b * p.bias_batch + n * p.bias_token]; }

  void load_queries() {
    for (int64_t r = 0; r < x.room; r += L) {
      const E* rows[L];
      for (int64_t i = 0; i < L; ++i) {
        const int64_t one = least(r + i, x.rows - 1), t = one / x.G, o = t + S - p.T;
        rows[i] = r + i < x.rows ? at<const E>(p.q, b, t, kh * x.G + one % x.G) : nullptr;
        w.lo[r + i] = C(p.left < 0 ? 0 : most(0, o - p.left));
        w.hi[r + i] = C(p.right < 0 ? o : least(o, o + p.right));
      }
      pack_columns(rows, p.D, C(p.scale), w.queries + r, x.room);
    }
  }

  // Rows [n0, n0 + count) of the cache in compute type, zero beyond D and where the key is removed; in place
  // where they can be.
  const C* rows_of(const Heads& cache, int64_t n0, int64_t count, bool pad, int64_t& stride) {
    if constexpr (sizeof(E) == sizeof(C)) {
      if (!p.key_bias && !(pad && p.D % (2 * L))) {
        stride = cache.token;
        return reinterpret_cast<const C*>(key(cache, n0));
      }
    }
    stride = x.width;
    for (int64_t i = 0; i < count; ++i) {
      const bool removed = p.key_bias && bias(n0 + i) == C(-__builtin_inf());
      pack_row(removed ? nullptr : key(cache, n0 + i), p.D, C(1), w.tile + i * x.width, 2 * L);
    }
    return w.tile;
  }

  void softmax(int64_t n0, int64_t count) {
    const V none = set1(C(-__builtin_inf()));
    for (int64_t r = 0; r < x.room; r += L) {
      const V low = load(w.lo + r), high = load(w.hi + r), old = load(m + r);
      V top = old;
      for (int64_t i = 0; i < count; ++i) {
        const V here = set1(C(n0 + i));
        V s = load(w.scores + i * x.room + r);
        if (p.key_bias) s += set1(bias(n0 + i));
        s = (low <= here) & (here <= high) ? s : none;
        store(w.scores + i * x.room + r, s);
        top = vmax(top, s);
      }
      const V base = top == none ? V{} : top, factor = vexp_softmax(old - base);
      V sum = load(l + r) * factor;
      for (int64_t i = 0; i < count; ++i) {
        const V e = vexp_softmax(load(w.scores + i * x.room + r) - base);
        store(w.scores + i * x.room + r, e);
        sum += e;
      }
      store(m + r, top);
      store(l + r, sum);
      store(w.alpha + r, factor);
    }
  }

  void block(int64_t n0, int64_t count, int64_t end) {
    int64_t stride;
    const C* k = rows_of(p.k, n0, count, false, stride);
    const int64_t bytes = count * p.D * int64_t(sizeof(E));
    for (int64_t r = 0; r < x.room; r += L) {
      C* scores = w.scores + r;
      const char* ahead = reinterpret_cast<const char*>(key(p.v, n0));
      if (count == kBlock)
        score_rows<kBlock, C>(k, stride, w.queries + r, x.room, p.D, scores, x.room, ahead, r ? 0 : bytes);
      else
        for (int64_t i = 0; i < count; ++i)
          score_rows<1, C>(k + i * stride, stride, w.queries + r, x.room, p.D, scores + i * x.room, x.room,
                           ahead, 0);
    }
    softmax(n0, count);
    const C* v = rows_of(p.v, n0, count, true, stride);
    for (int64_t d = 0; d < x.width; d += 2 * L) {
      if (n0 + count < end) {  // the next keys, a slice of each row a step
        for (int64_t i = 0; i < least(count, end - n0 - count); ++i)
          for (int64_t line = 0; line < 2 * L * int64_t(sizeof(E)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(key(p.k, n0 + count + i) + d) + line);
      }
      for (int64_t r = 0; r < x.room; r += kRows)
        value_rows<C>(w.scores + r, x.room, v + d, stride, count, out + r * x.width + d, x.width,
                      w.alpha + r);
    }
  }

  void run(int64_t begin, int64_t end) {
    load_queries();
    memset(out, 0, x.room * x.width * sizeof(C));
    for (int64_t r = 0; r < x.room; ++r) m[r] = C(-__builtin_inf()), l[r] = 0;
    begin = most(begin, int64_t(w.lo[0]) / kBlock * kBlock);
    for (int64_t n = begin; n < end; n += kBlock) block(n, least(kBlock, end - n), end);
  }
};

// out and lse of one row from its chunks.
template <class E, class C = typename Of<E>::C>
static void merge_row(const Attention& p, const DecodePlan& x, const C* parts, int64_t chunks, int64_t b,
                      int64_t kh, int64_t r) {
  const C none = C(-__builtin_inf());
  C top = none, total = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const C m = parts[c * x.part + x.room * x.width + r];
    top = top > m ? top : m;
  }
  const C base = top == none ? C(0) : top;
  C factor[64];
  for (int64_t c = 0; c < chunks; ++c) {
    const C* tail = parts + c * x.part + x.room * x.width;
    factor[c] = vexp_softmax(set1(tail[r] - base))[0];
    total += factor[c] * tail[x.room + r];
  }
  const bool dead = total == 0;
  const int64_t t = r / x.G, h = kh * x.G + r % x.G;
  E* out = at<E>(p.out, b, t, h);
  const auto inverse = set1(dead ? C(0) : 1 / total);
  for (int64_t d = 0; d < p.D; d += W<C>) {
    typename Of<C>::V sum{};
    for (int64_t c = 0; c < chunks; ++c) sum += load(parts + c * x.part + r * x.width + d) * set1(factor[c]);
    store(out + d, dead ? inverse : sum * inverse, p.D - d);
  }
  *at<C>(p.lse, b, t, h) = dead ? none : base + C(__builtin_log(total));
}

template <class E>
static void decode(const Attention& p) {
  using C = typename Of<E>::C;
  const DecodePlan x = DecodePlan::of(p, C());
  Scratch<C> parts(p.B * p.K * x.chunks * x.part + 1);
  parallel_tasks(
      p.B * p.K * x.chunks, [&] { return DecodeState<E>(x, p.D); },
      [&](DecodeState<E>& w, int64_t i) {
        const int64_t c = i % x.chunks, kh = i / x.chunks % p.K, b = i / x.chunks / p.K,
                      S = p.cache_lengths[b];
        if (c * x.chunk >= S || x.rows == 0) return;
        C* part = parts + i * x.part;
        DecodeTask<E> task{p, x, w, b, kh, S, part, part + x.room * x.width, part + x.room * (x.width + 1)};
        task.run(c * x.chunk, least(S, (c + 1) * x.chunk));
      });
  parallel_for(p.B * p.K * x.rows, 1 + 4096 / most(1, p.D), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t pair = i / x.rows, chunks = (p.cache_lengths[pair / p.K] + x.chunk - 1) / x.chunk;
      merge_row<E>(p, x, parts + pair * x.chunks * x.part, chunks, pair / p.K, pair % p.K, i % x.rows);
    }
  });
}

int64_t attention_decode(const Attention& p) {
  for (int64_t b = 0; b < p.B; ++b)
    if (p.cache_lengths[b] < 0 || p.cache_lengths[b] > p.S) return b;
  with_dtype(p.dtype, [&](auto e) { decode<decltype(e)>(p); });
  return -1;
}

}  // namespace palm::cpu::ISA
