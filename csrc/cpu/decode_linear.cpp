// decode_linear: a few rows of x against a weight matrix that is read once, at memory bandwidth.
//
// x is widened to float once and padded with zeros. kOutputs weight rows are taken side by side, a cache line
// of each at a time, against kRows rows of x in registers; the same columns of the next weight rows are
// prefetched meanwhile (kept in the caches: the hint for data without reuse halves the rate). Columns are cut
// so that a cut of x stays in the first cache while kGroups groups of weight rows pass over it. The order of
// every sum depends on shapes alone.
#include "gemm.h"
#include "parallel.h"

namespace palm::cpu::ISA {

constexpr int kOutputs = 4;                // weight rows side by side
constexpr int kRows = VB == 64 ? 4 : 2;    // x rows of a register tile: kOutputs * kRows sums
constexpr int64_t kCut = 1 << 14;          // bytes of x between two cuts of the columns
constexpr int64_t kGroups = 4;             // groups of kOutputs weight rows that pass over one cut
constexpr int64_t kThreadBytes = 1 << 17;  // weights a thread takes at least: about 8 us

typedef uint32_t vu_mem __attribute__((vector_size(VB), aligned(2), may_alias));

// Columns of a cache line of weights, and vectors that one widening gives.
template <class E>
constexpr int kLine = 64 / sizeof(E);
template <class E>
constexpr int kParts = 1;
template <>
constexpr int kParts<bf16> = 2;

template <class E>
PALM_INLINE void widen(const E* w, typename Of<E>::V* parts) {
  parts[0] = load(w);
}
// Even columns, then odd ones: one operation a vector, where widening in order takes two. x is packed alike.
PALM_INLINE void widen(const bf16* w, vf* parts) {
  const vu pairs = *reinterpret_cast<const vu_mem*>(w);
  parts[0] = (vf)(pairs << 16);
  parts[1] = (vf)(pairs & 0xffff0000u);
}

// One row of x in compute type, in the order of weights E, zero from column C to `room`.
template <class E, class X, class C = typename Of<E>::C>
static void pack(const X* x, int64_t C_, int64_t room, C* to) {
  constexpr int L = W<E>, parts = kParts<E>;
  for (int64_t c = 0; c < room; c += parts * L, to += parts * L) {
    C columns[parts * L];
    for (int h = 0; h < parts; ++h) {
      const int64_t at = c + h * L;
      store(columns + h * L, at < C_ ? load(x + at, C_ - at) : typename Of<E>::V{});
    }
    for (int h = 0; h < parts; ++h)
      for (int l = 0; l < L; ++l) to[h * L + l] = columns[l * parts + h];
  }
}

// Lanes without bit s: a[l] + a[l + s]; with it: b[l - s] + b[l].
template <int s, class V>
PALM_INLINE V fold(V a, V b) {
  butterfly<s>(a, b);
  return a + b;
}
// v[l] + v[l + s] + v[l + 2 s] + ... in each lane l < s.
template <int s, class V>
PALM_INLINE V fold_rest(V v) {
  if constexpr (s < int(sizeof(V) / sizeof(v[0]))) return fold_rest<2 * s>(fold<s>(v, v));
  return v;
}

template <class X, class E>
struct Product {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  static constexpr int L = W<E>, line = kLine<E>;
  const Linear& p;
  const C* x;
  int64_t ldx, cut;  // columns between two packed rows, and between two cuts

  const E* weights(int64_t n, int64_t c) const {
    return static_cast<const E*>(p.weight) + least(n, p.F - 1) * p.weight_stride + c;
  }

  // sum += a cache line of each weight row times the same columns of R rows of x.
  template <int R>
  PALM_INLINE static void multiply(const E* const* w, int64_t at, const C* xs, int64_t ldx,
                                   V (&sum)[kOutputs][R]) {
    constexpr int parts = kParts<E>;
#pragma GCC unroll 8
    for (int i = 0; i < line; i += parts * L) {
      V columns[R][parts];
#pragma GCC unroll 8
      for (int r = 0; r < R * parts; ++r)
        columns[r / parts][r % parts] = load(xs + r / parts * ldx + i + r % parts * L);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) {
        V wide[parts];
        widen(w[j] + at + i, wide);
#pragma GCC unroll 8
        for (int r = 0; r < R * parts; ++r)
          sum[j][r / parts] += columns[r / parts][r % parts] * wide[r % parts];
      }
    }
  }

  // out of row r, columns n to n + kOutputs.
  PALM_INLINE void finish(int64_t n, int64_t r, const V* sum) const {
    X* out = row<X>(p.rows, p.out, r) + n;
    const X* bias = p.bias ? static_cast<const X*>(p.bias) + n : nullptr;
    const X* residual = p.residual.data ? row<X>(p.rows, p.residual, r) + n : nullptr;
    constexpr int lanes = L < kOutputs ? L : kOutputs;
#pragma GCC unroll 2
    for (int j = 0; j < kOutputs; j += lanes) {
      const int64_t left = least(lanes, p.F - n - j);
      if (left <= 0) return;
      V total = fold<1>(sum[j], sum[j + 1]);
      if constexpr (lanes == 4) total = fold<2>(total, fold<1>(sum[j + 2], sum[j + 3]));
      total = fold_rest<lanes>(total);
      if (bias) total += load(bias + j, left);
      if (residual) total += load(residual + j, left);
      store(out + j, total, left);
    }
  }

  // Columns [c, end) of weight rows n.. against x rows r to r + R, or what is left of them; `kept` holds the
  // sums between two cuts, [row][kOutputs]. The lines of weight rows `ahead` are shared out over the tiles.
  template <int R>
  PALM_INLINE void tile(int64_t n, int64_t c, int64_t end, int64_t r, const E* ahead, V* kept) const {
    if constexpr (R > 1)
      if (p.rows.count - r < R) return tile<R - 1>(n, c, end, r, ahead, kept);
    const bool first = c == 0, last = end == p.C;
    V sum[kOutputs][R];
    const E* w[kOutputs];
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j) {
      w[j] = weights(n + j, 0);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum[j][i] = first ? V{} : kept[(r + i) * kOutputs + j];
    }
    const int64_t tiles = (p.rows.count + kRows - 1) / kRows, t = r / kRows;
    const int from = int(t * kOutputs / tiles), to = int((t + 1) * kOutputs / tiles);
    const C* xs = x + r * ldx + c;
    const int64_t whole = c + (end - c) / line * line;
    for (; c < whole; c += line, xs += line, ahead += line) {
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j)
        if (from <= j && j < to) __builtin_prefetch(ahead + j * p.weight_stride, 0, 2);  // to L2: 5 % over L1
      multiply(w, c, xs, ldx, sum);
    }
    if (c < end) {
      E tail[kOutputs][line] = {};
      for (int j = 0; j < kOutputs; ++j) {
        memcpy(tail[j], w[j] + c, (end - c) * sizeof(E));
        w[j] = tail[j];
      }
      multiply(w, 0, xs, ldx, sum);
    }
    V* keep = kept + r * kOutputs;
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      V own[kOutputs];
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) own[j] = sum[j][i];
      if (last) finish(n, r + i, own);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j)
        if (!last) keep[i * kOutputs + j] = own[j];
    }
  }

  // Groups [lo, hi) of weight rows.
  void run(int64_t lo, int64_t hi) const {
    const int64_t rows = p.rows.count;
    Scratch<V> kept(cut < p.C ? kGroups * rows * kOutputs : 0);
    for (int64_t g = lo; g < hi; g += kGroups) {
      const int64_t stop = least(hi, g + kGroups);
      int64_t c = 0;
      do {
        const int64_t end = least(p.C, c + cut);
        for (int64_t i = g; i < stop; ++i) {
          const int64_t next = i + 1 < stop ? i + 1 : end < p.C ? g : least(stop, hi - 1);
          const E* ahead = weights(next * kOutputs, i + 1 < stop ? c : end < p.C ? end : 0);
          for (int64_t r = 0; r < rows; r += kRows)
            tile<kRows>(i * kOutputs, c, end, r, ahead, kept + (i - g) * rows * kOutputs);
        }
        c = end;
      } while (c < p.C);
    }
  }
};

template <class X, class E>
static void multiply(const Linear& p) {
  using C = typename Of<E>::C;
  constexpr int64_t line = kLine<E>;
  const int64_t rows = p.rows.count, room = round_up(p.C, line), ldx = room + line;  // apart in the cache
  Scratch<C> x(rows * ldx);
  for (int64_t r = 0; r < rows; ++r) pack<E>(row<const X>(p.rows, p.x, r), p.C, room, x + r * ldx);
  const int64_t cut = most(line, kCut / (rows * int64_t(sizeof(C))) / line * line);
  const Product<X, E> product{p, x, ldx, cut};
  const int64_t bytes = kOutputs * most(1, p.C) * int64_t(sizeof(E));
  parallel_for((p.F + kOutputs - 1) / kOutputs, (kThreadBytes + bytes - 1) / bytes,
               [&](int64_t lo, int64_t hi) { product.run(lo, hi); });
}

int64_t decode_linear(const Linear& p) {
  if (p.rows.count == 0) return -1;
  if (p.dtype == p.weight_dtype)
    with_dtype(p.dtype, [&](auto e) { multiply<decltype(e), decltype(e)>(p); });
  else if (p.weight_dtype == Dtype::bf16)
    multiply<float, bf16>(p);
  else
    multiply<float, f16>(p);
  return -1;
}

}  // namespace palm::cpu::ISA
