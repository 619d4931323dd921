// Products of bf16 matrices with float sums, by the tile unit (AMX) or by the dot instruction, and the
// packing that both read: left operands are rows; right operands are panels of NT vectors of columns,
// [k / 2][16 NT] pairs of consecutive k. Both units take subnormal elements for 0.
#pragma once

#include "gemm.h"

#if VB == 64 && defined(__AVX512BF16__)

namespace palm::cpu::ISA {

constexpr int kPanel = 32;         // columns of a panel, two vectors of pairs
constexpr int kRowsLd = 256 + 32;  // elements from row to row of a left operand: an odd number of cache lines

#if defined(__AMX_BF16__)
// Gives this thread eight tiles of 16 rows of 64 bytes for its lifetime.
struct Tiles {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Tiles() {
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    // GCC's intrinsic declares that it reads the first eight bytes: the other stores would be dropped.
    asm volatile("" : "+m"(config));
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// The compiler takes a tile load for a register operation: what it reads must be in memory by then.
PALM_INLINE void before_tiles() { asm volatile("" ::: "memory"); }

// c[32][32] (+)= a[32][k] b[k][32]: k a multiple of 32, b one panel; zero: c is not read.
PALM_INLINE void product(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                         bool zero) {
  before_tiles();
  const int64_t rows = lda * 2, out = ldc * 4;
  if (zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, out);
    _tile_loadd(1, c + 16, out);
    _tile_loadd(2, c + 16 * ldc, out);
    _tile_loadd(3, c + 16 * ldc + 16, out);
  }
  for (int64_t i = 0; i < k; i += 32, b += 32 * kPanel) {
    _tile_loadd(6, b, 4 * kPanel);
    _tile_loadd(4, a + i, rows);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kPanel, 4 * kPanel);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * lda + i, rows);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, out);
  _tile_stored(1, c + 16, out);
  _tile_stored(2, c + 16 * ldc, out);
  _tile_stored(3, c + 16 * ldc + 16, out);
}

// c[64][16] = a[64][k] b[k][16], b a panel of one vector; between() runs every 32 of k.
template <class F>
PALM_INLINE void product_tall(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                              F&& between) {
  before_tiles();
  const int64_t rows = lda * 2, out = ldc * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k; i += 32, b += 32 * 16) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a + i, rows);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 16 * lda + i, rows);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, a + 32 * lda + i, rows);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, a + 48 * lda + i, rows);
    _tile_dpbf16ps(3, 5, 6);
    between();
  }
  _tile_stored(0, c, out);
  _tile_stored(1, c + 16 * ldc, out);
  _tile_stored(2, c + 32 * ldc, out);
  _tile_stored(3, c + 48 * ldc, out);
}

// c[16][32] += a[16][k] b[k][32]
PALM_INLINE void product_16(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc) {
  before_tiles();
  _tile_loadd(0, c, ldc * 4);
  _tile_loadd(1, c + 16, ldc * 4);
  for (int64_t i = 0; i < k; i += 32, b += 32 * kPanel) {
    _tile_loadd(4, a + i, lda * 2);
    _tile_loadd(6, b, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kPanel, 4 * kPanel);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
}
#else
struct Tiles {};

PALM_INLINE __m512bh pair_at(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// c[rows][16 NT] (+)= a[rows][k] b[k][16 NT]
template <int rows, int NT>
PALM_INLINE void product_rows(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                              bool zero) {
  __m512 sum[rows][NT];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NT; ++j)
      sum[i][j] = zero ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * ldc + 16 * j);
  for (int64_t i = 0; i < k; i += 2, b += 32 * NT) {
    __m512bh right[NT];
#pragma GCC unroll 2
    for (int j = 0; j < NT; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + 32 * j);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const __m512bh x = pair_at(a + r * lda + i);
#pragma GCC unroll 2
      for (int j = 0; j < NT; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], x, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NT; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, sum[i][j]);
}

// The same three shapes as above.
PALM_INLINE void product(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                         bool zero) {
  for (int r = 0; r < 32; r += 8) product_rows<8, 2>(a + r * lda, lda, b, k, c + r * ldc, ldc, zero);
}
template <class F>
PALM_INLINE void product_tall(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc,
                              F&& between) {
  for (int r = 0; r < 64; r += 16) {
    product_rows<16, 1>(a + r * lda, lda, b, k, c + r * ldc, ldc, true);
    for (int64_t i = 0; i < k; i += 128) between();
  }
}
PALM_INLINE void product_16(const bf16* a, int64_t lda, const bf16* b, int64_t k, float* c, int64_t ldc) {
  for (int r = 0; r < 16; r += 8) product_rows<8, 2>(a + r * lda, lda, b, k, c + r * ldc, ldc, false);
}
#endif

// ---- packing ----

// Elements [d, d + 32) of a row of D, zero beyond it; a null row counts as zeros.
PALM_INLINE __m512i load_32(const bf16* row, int64_t d, int64_t D) {
  if (!row) return _mm512_setzero_si512();
  if (D - d >= 32) return _mm512_loadu_si512(row + d);
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << most(0, D - d)) - 1), row + d);
}

// x and y element by element in turn: to[0..64) = x0 y0 x1 y1 ...
PALM_INLINE void interleave(__m512i x, __m512i y, bf16* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                       38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(x, high, y));
}

// Two vectors of floats as bf16, x's elements first, and element by element in turn.
PALM_INLINE __m512i halves(vf x, vf y) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); }
PALM_INLINE __m512i pairs(vf x, vf y) {
  const __m512i turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                        22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(turn, halves(x, y));
}

// Columns of a right operand whose k runs along the rows' elements: 16 rows become 16 columns. to[d / 2][16]
// pairs, `ld` elements apart, D rounded up to 32.
inline void pack_transposed(const bf16* const* rows, int64_t D, bf16* to, int64_t ld) {
  for (int64_t d = 0; d < D; d += 32) {
    vf r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = (vf)load_32(rows[i], d, D);
    transpose<8>(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d / 2 + i) * ld, (__m512i)r[i]);
  }
}

// The same for a right operand whose k runs over the rows: rows x and y become one row of pairs in panels of
// kPanel columns, `stride` elements apart.
PALM_INLINE void pack_pair(const bf16* x, const bf16* y, int64_t D, bf16* to, int64_t stride) {
  for (int64_t d = 0; d < D; d += 32, to += stride) interleave(load_32(x, d, D), load_32(y, d, D), to);
}

// to[d][m] = rows[m][d]: 32 rows of D elements become columns; to's rows are ld apart, D rounded up to 32.
inline void pack_columns(const bf16* const* rows, int64_t D, bf16* to, int64_t ld) {
  for (int64_t d = 0; d < D; d += 32) {
    bf16 turned[16][64];
    for (int i = 0; i < 16; ++i)
      interleave(load_32(rows[2 * i], d, D), load_32(rows[2 * i + 1], d, D), turned[i]);
    for (int half = 0; half < 2; ++half) {
      vf r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = (vf)_mm512_loadu_si512(turned[i] + 32 * half);
      transpose<8>(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d + 16 * half + i) * ld, (__m512i)r[i]);
    }
  }
}

// 2^t for t <= 0, -inf included, to 2.9e-6: t - floor(t) by a polynomial of degree 4 (minimax on [0, 1) with
// 2^0 = 1). Enough for what is rounded to bf16, and a third of vexp_low's instructions.
PALM_INLINE vf exp2_low(vf t) {
  const vf f = (vf)_mm512_reduce_ps((__m512)t, 1);
  vf p = set1(1.3425154424e-2f);
  p = p * f + set1(5.2245374039e-2f);
  p = p * f + set1(2.4127855610e-1f);
  p = p * f + set1(6.9304515453e-1f);
  p = p * f + set1(1.0f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)t);
}

}  // namespace palm::cpu::ISA

#endif
