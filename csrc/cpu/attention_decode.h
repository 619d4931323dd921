// attention_decode: a few new tokens against a long cache. The cache is read once, in its own layout, by all
// heads that share it; it is cut over tasks by shapes alone, and the parts (m, l, O) are merged in fixed
// order. Lanes of the scores are query rows (token, head), so K is never transposed; lanes of P V are head
// dims. A form (attention_decode.cpp, attention_decode_bf16.cpp) brings the two products.
#pragma once

#include "attention.h"

namespace palm::cpu::ISA {

// Sizes of one call, from shapes alone: `block` keys a step; rows and columns in multiples of `room` and
// `width`.
struct DecodePlan {
  int64_t G, rows, room, width, block, chunk, chunks, part;
  DecodePlan(const Attention& p, int64_t block, int64_t room, int64_t width)
      : G(p.H / p.K), rows(p.T * G), room(round_up(rows, room)), width(round_up(p.D, width)), block(block) {
    const int64_t pairs = most(1, p.B * p.K);
    chunk = round_up(most(240, (p.S * pairs + 31) / 32), block);  // about 32 tasks, none too short
    chunks = (p.S + chunk - 1) / chunk;
    part = this->room * (this->width + 2);  // O, m, l
  }
};

// Rows of a cache that will be read next, asked for line by line between the operations of a product: a core
// waits less than half as long as with bursts, which fill its buffers. In four places by turns, since the
// prefetchers follow a sequence in each page: 21 GB/s where one sequence gets 17.
class Ahead {
 public:
  Ahead(const void* first, int64_t rows, int64_t bytes, int64_t stride)
      : at_(static_cast<const char*>(first)),
        rows_((rows + kPlaces - 1) / kPlaces),
        lines_((bytes + 63) / 64),
        stride_(stride),
        apart_(rows_ * stride) {}
  PALM_INLINE void fetch() {
    if (rows_ <= 0) return;
    prefetch(at_ + 64 * line_ + place_ * apart_);
    if (++place_ < kPlaces) return;
    place_ = 0;
    if (++line_ < lines_) return;
    line_ = 0;
    at_ += stride_;
    --rows_;
  }

 private:
  static constexpr int64_t kPlaces = 4;
  const char* at_;
  int64_t rows_, lines_, stride_, apart_, line_ = 0, place_ = 0;
};

// One (entry, key/value head, chunk of keys) and its part: online softmax over blocks of keys.
template <class E, class C = typename Of<E>::C>
struct DecodeChunk {
  static constexpr int L = W<C>;
  using V = typename Of<C>::V;
  const Attention& p;
  const DecodePlan& x;
  int64_t b, kh, S;
  C *out, *m, *l;

  DecodeChunk(const Attention& p, const DecodePlan& x, int64_t b, int64_t kh, C* part)
      : p(p),
        x(x),
        b(b),
        kh(kh),
        S(p.cache_lengths[b]),
        out(part),
        m(part + x.room * x.width),
        l(m + x.room) {}

  const E* key(const Heads& cache, int64_t n) const { return at<const E>(cache, b, n, kh); }
  C bias(int64_t n) const { return static_cast<const C*>(p.key_bias)[b * p.bias_batch + n * p.bias_token]; }
  bool removed(int64_t n) const { return p.key_bias && bias(n) == C(-__builtin_inf()); }
  const E* query(int64_t r) const {
    return r < x.rows ? at<const E>(p.q, b, r / x.G, kh * x.G + r % x.G) : nullptr;
  }
  Ahead ahead(const Heads& cache, int64_t n, int64_t count) const {
    return {key(cache, n), count, p.D * int64_t(sizeof(E)), cache.token * int64_t(sizeof(E))};
  }

  // Empties the part; the first key that some row sees.
  int64_t begin(C* lo, C* hi) const {
    memset(out, 0, x.room * x.width * sizeof(C));
    for (int64_t r = 0; r < x.room; ++r) {
      const int64_t o = least(r, x.rows - 1) / x.G + S - p.T;
      lo[r] = C(p.left < 0 ? 0 : most(0, o - p.left));
      hi[r] = C(p.right < 0 ? o : least(o, o + p.right));
      m[r] = C(-__builtin_inf());
      l[r] = 0;
    }
    return int64_t(lo[0]);
  }

  // scores [count][room] of keys [n0, n0 + count) become probabilities; alpha is what O must be scaled by.
  void softmax(C* scores, int64_t n0, int64_t count, const C* lo, const C* hi, C* alpha) const {
    const V none = set1(C(-__builtin_inf()));
    for (int64_t r = 0; r < x.room; r += L) {
      const V low = load(lo + r), high = load(hi + r), old = load(m + r);
      V top = old;
      for (int64_t i = 0; i < count; ++i) {
        const V here = set1(C(n0 + i));
        V s = load(scores + i * x.room + r);
        if (p.key_bias) s += set1(bias(n0 + i));
        s = (low <= here) & (here <= high) ? s : none;
        store(scores + i * x.room + r, s);
        top = vmax(top, s);
      }
      const V base = top == none ? V{} : top, factor = vexp_softmax(old - base);
      V sum = load(l + r) * factor;
      for (int64_t i = 0; i < count; ++i) {
        const V e = vexp_softmax(load(scores + i * x.room + r) - base);
        store(scores + i * x.room + r, e);
        sum += e;
      }
      store(m + r, top);
      store(l + r, sum);
      store(alpha + r, factor);
    }
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

// The first entry whose length is not in [0, S], or -1.
inline int64_t bad_length(const Attention& p) {
  for (int64_t b = 0; b < p.B; ++b)
    if (p.cache_lengths[b] < 0 || p.cache_lengths[b] > p.S) return b;
  return -1;
}

// State(plan, D) is a thread's own memory; its run(chunk, begin, end) takes keys [begin, end) into the part.
template <class E, class State, class C = typename Of<E>::C>
static void decode(const Attention& p, const DecodePlan& x) {
  Scratch<C> parts(p.B * p.K * x.chunks * x.part + 1);
  parallel_tasks(
      p.B * p.K * x.chunks, [&] { return State(x, p.D); },
      [&](State& w, int64_t i) {
        const int64_t c = i % x.chunks, kh = i / x.chunks % p.K, b = i / x.chunks / p.K;
        const DecodeChunk<E> chunk(p, x, b, kh, parts + i * x.part);
        if (c * x.chunk < chunk.S && x.rows > 0) w.run(chunk, c * x.chunk, least(chunk.S, (c + 1) * x.chunk));
      });
  parallel_for(p.B * p.K * x.rows, 1 + 4096 / most(1, p.D), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t pair = i / x.rows, chunks = (p.cache_lengths[pair / p.K] + x.chunk - 1) / x.chunk;
      merge_row<E>(p, x, parts + pair * x.chunks * x.part, chunks, pair / p.K, pair % p.K, i % x.rows);
    }
  });
}

}  // namespace palm::cpu::ISA
