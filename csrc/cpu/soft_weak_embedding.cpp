// soft_weak_embedding: forward is one pass from ids to mixed rows. Backward: every contribution to a row of
// dweight or to dmask is an entry; entries are sorted by their row once (counting sort, stable), then each
// row's segment is summed in that order, so the result does not depend on the thread count.
#include "parallel.h"
#include "simd.h"

namespace palm::cpu::ISA {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least: a few microseconds of work
constexpr int64_t kLong = 512;     // entries from which a segment is summed by all threads
constexpr int64_t kPieces = 64;    // in at most this many pieces

static int64_t grain_of(int64_t cols) { return cols < kGrain ? kGrain / (cols > 0 ? cols : 1) : 1; }

static int64_t id_at(const Rows& rows, const Matrix& ids, bool wide, int64_t r) {
  return wide ? *row<int64_t>(rows, ids, r) : *row<int32_t>(rows, ids, r);
}

// What row r asks for; source -1 is the mask.
template <class C>
struct Token {
  int64_t id, source;
  C a;
  bool valid;
};

template <class C>
static Token<C> token(const SoftWeakEmbedding& p, int64_t r) {
  Token<C> t;
  t.id = id_at(p.rows, p.ids, p.wide_ids, r);
  t.source = p.source_ids.data ? id_at(p.rows, p.source_ids, p.wide_source_ids, r) : -1;
  if (t.source < 0) t.source = -1;
  t.a = *row<C>(p.rows, p.strength, r);
  t.valid = t.id >= 0 && t.id < p.vocab && t.source < p.vocab && t.a >= 0 && t.a <= 1;
  return t;
}

// r(a) = ((1-a)^2 + a^2)^(-1/2), or 1.
template <class C>
static C scale_of(const SoftWeakEmbedding& p, C a) {
  if (!p.variance_preserving) return 1;
  return 1 / C(__builtin_sqrt((1 - a) * (1 - a) + a * a));
}

template <class E>
static const E* weight_row(const SoftWeakEmbedding& p, int64_t id) {
  return static_cast<const E*>(p.weight) + id * p.weight_stride;
}

// The source's row; null means zeros.
template <class E>
static const E* source_row(const SoftWeakEmbedding& p, int64_t source) {
  return source < 0 ? static_cast<const E*>(p.mask) : weight_row<E>(p, source);
}

template <class E>
static void copy_row(E* out, const E* from, int64_t cols) {
  if (from)
    memcpy(out, from, cols * sizeof(E));
  else
    memset(out, 0, cols * sizeof(E));
}

template <class E>
static int64_t fwd(const SoftWeakEmbedding& p) {
  using C = typename Of<E>::C;
  const bool streamed = streams<E>(p.rows, p.out, p.cols);
  FirstBad bad;
  parallel_for(p.rows.count, grain_of(p.cols), [&, streamed](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      const auto t = token<C>(p, r);
      if (!t.valid) {
        bad.report(r);
        continue;
      }
      E* out = row<E>(p.rows, p.out, r);
      if (t.a == 0 || t.a == 1) {  // bit for bit, and the other is not read
        copy_row(out, t.a == 0 ? weight_row<E>(p, t.id) : source_row<E>(p, t.source), p.cols);
        continue;
      }
      const E *e = weight_row<E>(p, t.id), *c = source_row<E>(p, t.source);
      const auto keep = set1(1 - t.a), mix = set1(t.a), scale = set1(scale_of(p, t.a));
      each<E>(p.cols, [=](int64_t i, int64_t n) PALM_INLINED {
        auto u = keep * load(e + i, n);
        if (c) u += mix * load(c + i, n);
        put(out + i, scale * u, n, streamed);
      });
    }
    end_stream();
  });
  return bad.result();
}

// ---- backward: dweight and dmask ----
// Entry 2r is row r's share of weight[id], r(a) (1-a) dout; entry 2r + 1 its share of the source, r(a) a
// dout. Rows of dweight are keys 0 .. keys - 1, dmask is key `keys`; starts[key] .. starts[key + 1] is its
// segment.
struct Entries {
  int64_t keys;
  Scratch<int64_t> starts, order;
  Entries(int64_t keys, int64_t rows) : keys(keys), starts(keys + 3), order(2 * rows) {
    memset(starts.data, 0, (keys + 3) * sizeof(int64_t));
  }
};

// f(key, entry) for what row t of index r contributes; an exact 0 or 1 leaves one side out.
template <class C, class F>
static void contributions(const SoftWeakEmbedding& p, const Token<C>& t, int64_t r, int64_t keys, F&& f) {
  if (p.dweight && t.a < 1) f(t.id, 2 * r);
  if (t.a > 0 && (t.source < 0 ? p.dmask : p.dweight)) f(t.source < 0 ? keys : t.source, 2 * r + 1);
}

// Stable counting sort by key. Returns the first bad row, or -1.
template <class C>
static int64_t sort(const SoftWeakEmbedding& p, Entries& s) {
  int64_t* starts = s.starts;
  for (int64_t r = 0; r < p.rows.count; ++r) {
    const auto t = token<C>(p, r);
    if (!t.valid) return r;
    contributions(p, t, r, s.keys, [&](int64_t key, int64_t) { ++starts[key + 2]; });
  }
  for (int64_t key = 2; key < s.keys + 3; ++key) starts[key] += starts[key - 1];
  for (int64_t r = 0; r < p.rows.count; ++r)  // starts[key + 1] is key's cursor and ends as its end
    contributions(p, token<C>(p, r), r, s.keys,
                  [&](int64_t key, int64_t entry) { s.order[starts[key + 1]++] = entry; });
  return -1;
}

// sum[0 .. cols) = the n entries from `order` on
template <class E>
static void sum_entries(const SoftWeakEmbedding& p, const int64_t* order, int64_t n, typename Of<E>::C* sum) {
  using C = typename Of<E>::C;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t r = order[k] / 2;
    const C a = *row<C>(p.rows, p.strength, r);
    const auto share = set1(scale_of(p, a) * (order[k] & 1 ? a : 1 - a));
    const E* dout = row<E>(p.rows, p.dout, r);
    each<E>(p.cols, [=](int64_t i, int64_t lanes) PALM_INLINED {
      auto x = share * load(dout + i, lanes);
      if (k) x += load(sum + i);  // scratch is padded to whole vectors
      store(sum + i, x);
    });
  }
}

template <class E>
static E* target(const SoftWeakEmbedding& p, const Entries& s, int64_t key) {
  return static_cast<E*>(key == s.keys ? p.dmask : p.dweight) + (key == s.keys ? 0 : key * p.cols);
}

// A segment too long for one thread (a frequent token, the mask): pieces whose borders depend on its length
// only, then their sums, in order, column block by column block.
template <class E>
static void sum_long(const SoftWeakEmbedding& p, const int64_t* order, int64_t n, E* out) {
  using C = typename Of<E>::C;
  const int64_t most = (n + kLong / 2 - 1) / (kLong / 2), pieces = most < kPieces ? most : kPieces;
  const int64_t length = (n + pieces - 1) / pieces, stride = (p.cols + W<E> - 1) / W<E> * W<E>;
  Scratch<C> sums(pieces * stride);
  parallel_for(pieces, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t from = i * length < n ? i * length : n, to = from + length < n ? from + length : n;
      if (from == to)
        memset(sums + i * stride, 0, stride * sizeof(C));
      else
        sum_entries<E>(p, order + from, to - from, sums + i * stride);
    }
  });
  parallel_for(stride / W<E>, kGrain / (pieces * W<E>), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo * W<E>; i < hi * W<E>; i += W<E>) {
      auto x = load(sums + i);
      for (int64_t piece = 1; piece < pieces; ++piece) x += load(sums + piece * stride + i);
      store(out + i, x, p.cols - i);
    }
  });
}

// Most rows of a large dweight: `streamed` ones are whole lines of any E.
template <class E>
static void clear_row(E* out, int64_t cols, bool streamed) {
  if (!streamed) {
    memset(out, 0, cols * sizeof(E));
    return;
  }
  float* words = reinterpret_cast<float*>(out);
  each<float>(cols * sizeof(E) / sizeof(float),
              [=](int64_t i, int64_t n) PALM_INLINED { put(words + i, vf{}, n, true); });
}

template <class E>
static int64_t bwd_rows(const SoftWeakEmbedding& p) {
  using C = typename Of<E>::C;
  Entries s(p.dweight ? p.vocab : 0, p.rows.count);
  const int64_t bad = sort<C>(p, s);
  if (bad >= 0) return bad;
  const int64_t* starts = s.starts;
  const int64_t end = s.keys + (p.dmask != nullptr), block = p.cols < 8192 ? 8192 / (p.cols + 1) + 1 : 1;
  const int64_t words = p.cols * sizeof(E) / sizeof(float);
  const bool streamed = p.cols * sizeof(E) % VB == 0 &&
                        streams<float>(Rows{p.vocab, 1, {p.vocab}}, Matrix{p.dweight, {words}}, words);
  // Frequent tokens have neighbouring ids in many vocabularies: blocks are handed out one by one.
  parallel_tasks((end + block - 1) / block, [&] { return Scratch<C>(p.cols + W<E>); },
                 [&](Scratch<C>& sum, int64_t task) {
                   const int64_t last = (task + 1) * block < end ? (task + 1) * block : end;
                   for (int64_t key = task * block; key < last; ++key) {
                     const int64_t n = starts[key + 1] - starts[key];
                     E* out = target<E>(p, s, key);
                     const bool past = streamed && key < s.keys;
                     if (n == 0) clear_row(out, p.cols, past);
                     if (n == 0 || n > kLong) continue;
                     sum_entries<E>(p, s.order + starts[key], n, sum);
                     const C* from = sum;
                     each<E>(p.cols, [=](int64_t i, int64_t lanes)
                                         PALM_INLINED { put(out + i, load(from + i), lanes, past); });
                   }
                   end_stream();
                 });
  for (int64_t key = 0; key < end; ++key)
    if (const int64_t n = starts[key + 1] - starts[key]; n > kLong)
      sum_long<E>(p, s.order + starts[key], n, target<E>(p, s, key));
  return -1;
}

// ---- backward: dstrength = dout.(r (c - E) + r' u), u = (1-a) E + a c, r' = (1-2a) r^3 ----
// One sum: of two, each may be large where their sum is not. At 0 and 1 what is not finite counts as 0:
// forward did not read the side it comes from.
template <class E>
static typename Of<E>::C slope(const SoftWeakEmbedding& p, const Token<typename Of<E>::C>& t, const E* dout) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  const E *e = weight_row<E>(p, t.id), *c = source_row<E>(p, t.source);
  const bool edge = t.a == 0 || t.a == 1;
  const C r = scale_of(p, t.a);
  const V keep = set1(1 - t.a), mix = set1(t.a), zero = {};
  const V scale = set1(r), turn = set1((1 - 2 * t.a) * r * r * r);
  V sum{};
  for (int64_t i = 0; i < p.cols; i += W<E>) {
    const int64_t n = p.cols - i;
    const V g = load(dout + i, n), ei = load(e + i, n), ci = c ? load(c + i, n) : zero;
    V along = ci - ei, u = edge ? (t.a == 0 ? ei : ci) : keep * ei + mix * ci;
    if (edge) {
      along = along - along == zero ? along : zero;
      u = u - u == zero ? u : zero;
    }
    if (p.variance_preserving) along = scale * along + turn * u;
    sum += g * along;
  }
  return hsum(sum);
}

template <class E>
static int64_t bwd_strength(const SoftWeakEmbedding& p) {
  using C = typename Of<E>::C;
  FirstBad bad;
  parallel_for(p.rows.count, grain_of(p.cols), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      const auto t = token<C>(p, r);
      if (t.valid)
        *row<C>(p.rows, p.dstrength, r) = slope<E>(p, t, row<E>(p.rows, p.dout, r));
      else
        bad.report(r);
    }
  });
  return bad.result();
}

template <class E>
static int64_t bwd(const SoftWeakEmbedding& p) {
  int64_t bad = -1;
  if (p.dweight || p.dmask) bad = bwd_rows<E>(p);
  if (bad < 0 && p.dstrength.data) bad = bwd_strength<E>(p);
  return bad;
}

int64_t soft_weak_embedding_fwd(const SoftWeakEmbedding& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = fwd<decltype(e)>(p); });
  return bad;
}

int64_t soft_weak_embedding_bwd(const SoftWeakEmbedding& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = bwd<decltype(e)>(p); });
  return bad;
}

}  // namespace palm::cpu::ISA
