// Register-tile micro-kernels and the packing that lets them run at the machine's FMA rate: with packed
// operands each kernel reads contiguous vectors on one side and broadcasts from one base pointer on the
// other.
#pragma once

#include "simd.h"

namespace palm::cpu::ISA {

// Sizes for compute type C: L lanes; keys x queries tile of the score kernel is NB x MP (24 or 12
// accumulators: what 32 or 16 registers hold beside the operands), rows x columns tile of the other two is R
// x NP.
template <class C>
struct Tile {
  using V = typename Of<C>::V;
  static constexpr int L = W<C>;
  static constexpr int NB = VB == 64 ? 8 : 4;
  static constexpr int MP = 3 * L;
  static constexpr int R = VB == 64 ? 12 : 6;
  static constexpr int NP = 2 * L;
};

PALM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PALM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
PALM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- packing ----

// Exchanges lane bit s between a and b: one stage of a transposition.
template <int s, class V>
PALM_INLINE void butterfly(V& a, V& b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
  V x = a, y = b;
  for (int l = 0; l < L; ++l) {
    x[l] = l & s ? b[l - s] : a[l];
    y[l] = l & s ? b[l] : a[l + s];
  }
#else
  decltype(a > b) i, j;
  for (int l = 0; l < L; ++l) {
    i[l] = l & s ? L + l - s : l;
    j[l] = l & s ? L + l : l + s;
  }
  const V x = __builtin_shuffle(a, b, i), y = __builtin_shuffle(a, b, j);
#endif
  a = x;
  b = y;
}

// Transposes the L x L matrix held in r.
template <int s, class V>
PALM_INLINE void transpose(V* r) {
  constexpr int L = sizeof(V) / sizeof(r[0][0]);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (!(i & s)) butterfly<s>(r[i], r[i + s]);
  if constexpr (s > 1) transpose<s / 2>(r);
}

// dst[d * ld + i] = scale * rows[i][d] for L rows of D elements; a null row counts as zeros.
template <class E, class C = typename Of<E>::C>
static void pack_columns(const E* const* rows, int64_t D, C scale, C* dst, int64_t ld) {
  constexpr int L = W<E>;
  using V = typename Of<E>::V;
  for (int64_t d = 0; d < D; d += L) {
    V r[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] = rows[i] ? load(rows[i] + d, D - d) * set1(scale) : V{};
    transpose<L / 2>(r);
    if (D - d >= L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(dst + (d + i) * ld, r[i]);
    } else {
      for (int i = 0; i < D - d; ++i) store(dst + (d + i) * ld, r[i]);
    }
  }
}

// One row of panels: dst[panel * stride + lane] = scale * row[panel * NP + lane], zero beyond D; a null row
// counts as zeros.
template <class E, class C = typename Of<E>::C>
PALM_INLINE void pack_row(const E* row, int64_t D, C scale, C* dst, int64_t stride) {
  constexpr int L = W<E>;
  using V = typename Of<E>::V;
  for (int64_t d = 0; d < D; d += 2 * L, dst += stride) {
    store(dst, row ? load(row + d, D - d) * set1(scale) : V{});
    store(dst + L, row && D - d > L ? load(row + d + L, D - d - L) * set1(scale) : V{});
  }
}

// ---- micro-kernels. In each the left operand is broadcast and the right one read in vectors ----

// c[NB keys][MP queries] = A[d][NB]^T B[d][MP], d < D
template <class C, class T = Tile<C>>
PALM_INLINE void scores_tile(const C* a, const C* b, int64_t D, typename T::V (*c)[3]) {
#pragma GCC unroll 8
  for (int i = 0; i < T::NB; ++i) c[i][0] = c[i][1] = c[i][2] = typename T::V{};
#pragma GCC unroll 2
  for (int64_t d = 0; d < D; ++d) {
    const auto b0 = load(b), b1 = load(b + T::L), b2 = load(b + 2 * T::L);
    if (!(d & 1)) __builtin_prefetch(a + D * T::NB);  // the next block of keys
#pragma GCC unroll 8
    for (int i = 0; i < T::NB; ++i) {
      const auto x = set1(a[i]);
      c[i][0] += x * b0;
      c[i][1] += x * b1;
      c[i][2] += x * b2;
    }
    a += T::NB;
    b += T::MP;
  }
}

// out[R][NP] = (first ? 0 : alpha * out) + A[n][R]^T B[n][NP], n < count; A's rows are MP apart. alpha
// null: 1.
template <class C, bool first, bool rescale, class T = Tile<C>>
PALM_INLINE void accumulate_rows(const C* a, const C* b, int64_t count, C* out, int64_t ld, const C* alpha) {
  typename T::V c[T::R][2];
#pragma GCC unroll 12
  for (int i = 0; i < T::R; ++i) {
    c[i][0] = first ? typename T::V{} : load(out + i * ld);
    c[i][1] = first ? typename T::V{} : load(out + i * ld + T::L);
    if (rescale) {
      const auto x = set1(alpha[i]);
      c[i][0] *= x;
      c[i][1] *= x;
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    const auto b0 = load(b), b1 = load(b + T::L);
#pragma GCC unroll 12
    for (int i = 0; i < T::R; ++i) {
      const auto x = set1(a[i]);
      c[i][0] += x * b0;
      c[i][1] += x * b1;
    }
    a += T::MP;
    b += T::NP;
  }
#pragma GCC unroll 12
  for (int i = 0; i < T::R; ++i) {
    store(out + i * ld, c[i][0]);
    store(out + i * ld + T::L, c[i][1]);
  }
}

// out[rows][NP] += A[row][m] B[m][NP], m over `panels` panels of MP queries, `panel` elements apart in A; A's
// rows are MP apart.
template <int rows, class C, class T = Tile<C>>
PALM_INLINE void accumulate_keys(const C* a, int64_t panel, int panels, const C* b, C* out, int64_t ld) {
  typename T::V c[rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    c[i][0] = load(out + i * ld);
    c[i][1] = load(out + i * ld + T::L);
    __builtin_prefetch(out + (rows + i) * ld);  // the rows that come next: 159 -> 174 GF/s at D = 128
    __builtin_prefetch(out + (rows + i) * ld + T::L);
  }
  for (int p = 0; p < panels; ++p, a += panel) {
#pragma GCC unroll 2
    for (int m = 0; m < T::MP; ++m) {
      const auto b0 = load(b), b1 = load(b + T::L);
#pragma GCC unroll 12
      for (int i = 0; i < rows; ++i) {
        const auto x = set1(a[i * T::MP + m]);
        c[i][0] += x * b0;
        c[i][1] += x * b1;
      }
      b += T::NP;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
    store(out + i * ld, c[i][0]);
    store(out + i * ld + T::L, c[i][1]);
  }
}

}  // namespace palm::cpu::ISA
