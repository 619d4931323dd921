// attention_decode in the compute type: K is broadcast in place (16-bit keys are widened into a block that
// the first cache holds), P V runs over vectors of head dims.
#include "attention_decode.h"

namespace palm::cpu::ISA {

constexpr int kKeys = VB == 64 ? 24 : 12;  // keys of a score tile: as many sums as the registers hold
constexpr int kBlock = 2 * kKeys;          // keys a step: the output's sums are loaded and stored once in it
constexpr int kRows = 8;                   // query rows of a P V tile
constexpr int kTileLd = 256 + 16;          // from row to row of a copied block

// scores[kKeys][L rows] = K[kKeys][D] Q[D][L]; three lines of `ahead` every two steps. K's rows are LD
// apart: with the distance known the loop needs one pointer, without it 24 that no file of registers holds.
template <int LD, class C>
static void score_rows(const C* k, const C* q, int64_t ldq, int64_t D, C* scores, int64_t lds, Ahead& ahead) {
  typename Of<C>::V c[kKeys];
#pragma GCC unroll 24
  for (int i = 0; i < kKeys; ++i) c[i] = typename Of<C>::V{};
  for (int64_t d = 0; d < D; ++d) {
    const auto b = load(q + d * ldq);
    ahead.fetch();
    if (d & 1) ahead.fetch();
#pragma GCC unroll 24
    for (int i = 0; i < kKeys; ++i) c[i] += set1(k[i * LD + d]) * b;
  }
#pragma GCC unroll 24
  for (int i = 0; i < kKeys; ++i) store(scores + i * lds, c[i]);
}

// out[kRows][NP] = alpha out + P[n][kRows]^T V[n][NP]; one line of `ahead` a step.
template <class C>
PALM_INLINE void value_rows(const C* probs, int64_t ldp, const C* v, int64_t stride, int64_t count, C* out,
                            int64_t ld, const C* alpha, Ahead& ahead) {
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
      ahead.fetch();
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

template <class E, class C = typename Of<E>::C>
struct DecodeState {
  static constexpr int L = W<C>;
  const DecodePlan& x;
  Scratch<C> queries, tile, scores, alpha, lo, hi;
  DecodeState(const DecodePlan& x, int64_t D)
      : x(x),
        queries(x.room * D),
        tile(kBlock * kTileLd),
        scores(kBlock * x.room),
        alpha(x.room),
        lo(x.room),
        hi(x.room) {}

  // `room` rows of the cache from n0 on in compute type, zero beyond D, beyond the count and where the key is
  // removed.
  const C* copy(const DecodeChunk<E>& c, const Heads& cache, int64_t n0, int64_t count, int64_t room) {
    for (int64_t i = 0; i < room; ++i)
      pack_row(i >= count || c.removed(n0 + i) ? nullptr : c.key(cache, n0 + i), c.p.D, C(1),
               tile + i * kTileLd, 2 * L);
    return tile;
  }

  // Scores of kKeys keys from n0 on, of which `count` are there.
  void score(const DecodeChunk<E>& c, int64_t n0, int64_t count, C* to, Ahead& values) {
    const Attention& p = c.p;
    const bool whole = sizeof(E) == sizeof(C) && !p.key_bias && count >= kKeys && p.k.token == p.D;
    const auto kernel = whole && p.D == 64    ? score_rows<64, C>
                        : whole && p.D == 128 ? score_rows<128, C>
                        : whole && p.D == 256 ? score_rows<256, C>
                                              : score_rows<kTileLd, C>;
    const C* k = kernel == score_rows<kTileLd, C> ? copy(c, p.k, n0, count, kKeys)
                                                  : reinterpret_cast<const C*>(c.key(p.k, n0));
    for (int64_t r = 0; r < x.room; r += L) kernel(k, queries + r, x.room, p.D, to + r, x.room, values);
  }

  void block(const DecodeChunk<E>& c, int64_t n0, int64_t count, int64_t end) {
    const Attention& p = c.p;
    Ahead values = c.ahead(p.v, n0, count);
    for (int64_t i = 0; i < count; i += kKeys) score(c, n0 + i, count - i, scores + i * x.room, values);
    c.softmax(scores, n0, count, lo, hi, alpha);
    const bool whole = sizeof(E) == sizeof(C) && !p.key_bias && p.D % (2 * L) == 0;
    const int64_t stride = whole ? p.v.token : kTileLd;
    const C* v = whole ? reinterpret_cast<const C*>(c.key(p.v, n0)) : copy(c, p.v, n0, count, count);
    Ahead keys = c.ahead(p.k, n0 + count, least(kBlock, end - n0 - count));
    for (int64_t d = 0; d < x.width; d += 2 * L)
      for (int64_t r = 0; r < x.room; r += kRows)
        value_rows<C>(scores + r, x.room, v + d, stride, count, c.out + r * x.width + d, x.width, alpha + r,
                      keys);
  }

  void run(const DecodeChunk<E>& c, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < x.room; r += L) {
      const E* rows[L];
      for (int64_t i = 0; i < L; ++i) rows[i] = c.query(r + i);
      pack_columns(rows, c.p.D, C(c.p.scale), queries + r, x.room);
    }
    for (int64_t n = most(begin, c.begin(lo, hi) / kBlock * kBlock); n < end; n += kBlock)
      block(c, n, least(kBlock, end - n), end);
  }
};

int64_t attention_decode(const Attention& p) {
  const int64_t bad = bad_length(p);
  if (bad < 0)
    with_dtype(p.dtype, [&](auto e) {
      using E = decltype(e);
      using C = typename Of<E>::C;
      decode<E, DecodeState<E>>(p, DecodePlan(p, kBlock, most(kRows, W<C>), Tile<C>::NP));
    });
  return bad;
}

}  // namespace palm::cpu::ISA
