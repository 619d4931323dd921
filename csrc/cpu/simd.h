// Vectors of one instruction set, in GCC / Clang vector extensions. The build gives ISA (the namespace) and
// VB (bytes a vector). Kernels compute in float (float64 data: in double); bf16 and f16 are widened on load
// and rounded to nearest even on store. No standard library templates here: a comdat copy compiled for a
// newer instruction set could be linked for everyone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../ops.h"
#include "memory.h"

#define PALM_INLINE inline __attribute__((always_inline))
#define PALM_INLINED \
  __attribute__((always_inline))  // behind a lambda's parameters: the body of an inner loop

namespace palm::cpu::ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float vf __attribute__((vector_size(VB)));
typedef double vd __attribute__((vector_size(VB)));
typedef int32_t vi __attribute__((vector_size(VB)));
typedef int64_t vl __attribute__((vector_size(VB)));
typedef uint32_t vu __attribute__((vector_size(VB)));
typedef uint16_t vh __attribute__((vector_size(VB / 2)));
// Unaligned views for loads and stores; a memcpy of 32 bytes goes through the stack and is ten times slower.
typedef float vf_mem __attribute__((vector_size(VB), aligned(4), may_alias));
typedef double vd_mem __attribute__((vector_size(VB), aligned(8), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(VB / 2), aligned(2), may_alias));

// Element type E: compute type C = Of<E>::C, its vector V = Of<E>::V with W lanes.
template <class E>
struct Of {
  using C = float;
  using V = vf;
};
template <>
struct Of<double> {
  using C = double;
  using V = vd;
};
template <class E>
constexpr int W = VB / sizeof(typename Of<E>::C);

// x - 0, not 0 + x: the compiler folds the first, the second costs an add (-0).
PALM_INLINE vf set1(float x) { return x - vf{}; }
PALM_INLINE vd set1(double x) { return x - vd{}; }

// ---- half formats ----
PALM_INLINE float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    if (magnitude & 0x3ff) bits |= 0x400000;  // quiet, as vcvtph2ps does
  } else if (magnitude >= 0x400) {
    bits = (magnitude << 13) + (112u << 23);
  } else {
    float f = float(int32_t(magnitude)) * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
PALM_INLINE uint16_t float_to_f16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to 65536 or beyond: inf
  if (bits >= 0x38800000) {
    const uint32_t rounded = bits - (112u << 23) + 0xfff + (bits >> 13 & 1);
    return uint16_t(sign | rounded >> 13);
  }
  float f;
  memcpy(&f, &bits, 4);
  f += 0.5f;  // aligns the subnormal's last place with 0.5's and rounds to nearest even
  memcpy(&bits, &f, 4);
  return uint16_t(sign | (bits - 0x3f000000));
}

// ---- loads and stores ----
PALM_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
PALM_INLINE vd load(const double* p) { return *reinterpret_cast<const vd_mem*>(p); }
PALM_INLINE vf load(const bf16* p) {
  // GCC 12 makes five shuffles of the portable form where one instruction widens.
#if VB == 64
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  const vh h = *reinterpret_cast<const vh_mem*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
PALM_INLINE vf load(const f16* p) {
#if VB == 64
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < VB / 4; ++i) v[i] = f16_to_float(p[i].bits);
  return v;
#endif
}
PALM_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
PALM_INLINE void store(double* p, vd v) { *reinterpret_cast<vd_mem*>(p) = v; }
PALM_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__) && VB == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const vu u = (vu)v;
  const vu rounded = (u + (0x7fff + (u >> 16 & 1))) >> 16;
  const vu kept = v != v ? u >> 16 | 0x40 : rounded;  // NaN must not round to infinity
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(kept, vh);
#endif
}
PALM_INLINE void store(f16* p, vf v) {
#if VB == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < VB / 4; ++i) p[i].bits = float_to_f16(v[i]);
#endif
}
// n < W<E> elements from p to `to`, in one instruction where the machine has it: a vector read back from
// single stores waits for all of them. With kZero the other lanes of `to` become 0, else they stay.
template <bool kZero, class E>
PALM_INLINE void copy_lanes(E* to, const E* p, int64_t n) {
#if VB == 64
  const __mmask16 lanes = n > 0 ? (1u << n) - 1 : 0;
  if constexpr (sizeof(E) == 2) {
    const __m256i v = _mm256_maskz_loadu_epi16(lanes, p);
    kZero ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v) : _mm256_mask_storeu_epi16(to, lanes, v);
  } else if constexpr (sizeof(E) == 4) {
    const __m512 v = _mm512_maskz_loadu_ps(lanes, p);
    kZero ? _mm512_storeu_ps(to, v) : _mm512_mask_storeu_ps(to, lanes, v);
  } else {
    const __m512d v = _mm512_maskz_loadu_pd(lanes, p);
    kZero ? _mm512_storeu_pd(to, v) : _mm512_mask_storeu_pd(to, lanes, v);
  }
#else
  if (kZero) memset(to, 0, W<E> * sizeof(E));
  for (int64_t i = 0; i < n; ++i) to[i] = p[i];
#endif
}
// The first n lanes; the others read as 0 and are not written.
template <class E>
PALM_INLINE typename Of<E>::V load(const E* p, int64_t n) {
  if (n >= W<E>) return load(p);
  E tail[W<E>];
  copy_lanes<true>(tail, p, n);
  return load(tail);
}
template <class E>
PALM_INLINE void store(E* p, typename Of<E>::V v, int64_t n) {
  if (n >= W<E>) return store(p, v);
  E tail[W<E>];
  store(tail, v);
  copy_lanes<false>(p, tail, n);
}
// One element, by the vector path's rounding.
template <class E>
PALM_INLINE typename Of<E>::C load1(const E* p) {
  return load(p, 1)[0];
}
PALM_INLINE float load1(const float* p) { return *p; }
PALM_INLINE double load1(const double* p) { return *p; }

// v as rounded: the compiler must not fuse the product that made it into a later sum (where the sum should
// cancel exactly).
template <class V>
PALM_INLINE V rounded(V v) {
#if defined(__x86_64__)
#if VB == 64
  asm("" : "+v"(v));
#else
  asm("" : "+x"(v));
#endif
#endif
  return v;
}

// ---- arithmetic. vmax(a, b) and vmin(a, b) give b where either is NaN (the instruction's rule) ----
PALM_INLINE vf vmax(vf a, vf b) {
#if VB == 64
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
PALM_INLINE vd vmax(vd a, vd b) {
#if VB == 64
  return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}
PALM_INLINE vf vmin(vf a, vf b) {
#if VB == 64
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
PALM_INLINE vd vmin(vd a, vd b) {
#if VB == 64
  return (vd)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
  return a < b ? a : b;
#endif
}
// Lane sums and maxima, halving: the same order for every call.
template <class V>
PALM_INLINE auto hsum(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) x[lanes];
  memcpy(x, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
template <class V>
PALM_INLINE auto hmax(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) x[lanes];
  memcpy(x, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}

// e^x to about 1 ulp for x <= 88 (double: 709); what would be subnormal (x < -87.3, -708.3) and -inf give 0,
// because a subnormal operand costs a multiply-add over a hundred cycles in the product that follows; NaN
// stays NaN. n = round(x log2 e), r = x - n ln 2, e^r by its Taylor-like polynomial on |r| <= 0.35, times
// 2^n.
PALM_INLINE vf vexp_low(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf t = x * set1(1.44269504088896341f) + magic;
  const vf n = t - magic;
#if defined(__FMA__) || defined(__aarch64__)
  const vf r = x - n * set1(0.693147180559945309f);  // float(ln 2) is off by 1.9e-9 only
#else
  const vf r = (x - n * set1(0.693359375f)) - n * set1(-2.12194440e-4f);
#endif
  vf p = set1(1.3981999507e-3f);
  p = p + r * set1(1.9875691500e-4f);
  p = p * r + set1(8.3334519073e-3f);
  p = p * r + set1(4.1665795894e-2f);
  p = p * r + set1(1.6666665459e-1f);
  p = p * r + set1(5.0000001201e-1f);
  p = p * (r * r) + r + set1(1.0f);
  const vf lowest = set1(-87.3f);
#if VB == 64
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const vi k = (vi)t - (vi)magic,
           half = k >> 1;  // in two steps, because 2^k alone may not be a normal number
  const vf y = p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
  return x < lowest ? vf{} : y;
#endif
}
PALM_INLINE vd vexp_low(vd x) {
  const vd magic = set1(6755399441055744.0);  // 1.5 * 2^52
  const vd t = x * set1(1.4426950408889634074) + magic;
  const vd n = t - magic;
  const vd r = (x - n * set1(6.93145751953125e-1)) - n * set1(1.42860682030941723212e-6);
  vd p = set1(1.0 / 6227020800.0);
  p = p * r + set1(1.0 / 479001600.0);
  p = p * r + set1(1.0 / 39916800.0);
  p = p * r + set1(1.0 / 3628800.0);
  p = p * r + set1(1.0 / 362880.0);
  p = p * r + set1(1.0 / 40320.0);
  p = p * r + set1(1.0 / 5040.0);
  p = p * r + set1(1.0 / 720.0);
  p = p * r + set1(1.0 / 120.0);
  p = p * r + set1(1.0 / 24.0);
  p = p * r + set1(1.0 / 6.0);
  p = p * r + set1(0.5);
  p = p * (r * r) + r + set1(1.0);
  const vd lowest = set1(-708.3);
#if VB == 64
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, (__m512d)lowest, _CMP_NLT_UQ);
  return (vd)_mm512_maskz_scalef_pd(normal, (__m512d)p, (__m512d)n);
#else
  const vl k = (vl)t - (vl)magic, half = k >> 1;
  const vd y = p * (vd)((half + 1023) << 52) * (vd)((k - half + 1023) << 52);
  return x < lowest ? vd{} : y;
#endif
}
#if VB == 64
// 2^t to 1.2e-7: t - floor(t) by a polynomial of degree 5 (minimax on [0, 1) with 2^0 = 1); subnormal results
// and -inf give 0 as above (scaling to them takes a hundred cycles), inf gives inf.
PALM_INLINE vf vexp2(vf t) {
  const vf f = (vf)_mm512_reduce_ps((__m512)t, 1);
  vf p = set1(1.8650337194e-3f);
  p = p * f + set1(9.0226974149e-3f);
  p = p * f + set1(5.5794483574e-2f);
  p = p * f + set1(2.4016660245e-1f);
  p = p * f + set1(6.9315103501e-1f);
  p = p * f + set1(1.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, (__m512)set1(-126.0f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)t);
}
#endif
// e^x for the differences x <= 0 of a softmax, to 1.2e-7 + 6e-8 |x|: in base 2, two thirds of the
// instructions.
PALM_INLINE vf vexp_softmax(vf x) {
#if VB == 64
  return vexp2(x * set1(1.44269504088896341f));
#else
  return vexp_low(x);
#endif
}
PALM_INLINE vd vexp_softmax(vd x) { return vexp_low(x); }
// e^x over the whole range: overflow gives inf.
PALM_INLINE vf vexp(vf x) { return vexp_low(vmin(set1(89.0f), x)); }
PALM_INLINE vd vexp(vd x) { return vexp_low(vmin(set1(710.0), x)); }
// ln x to about 1 ulp for normal x; 0 gives -inf, negative x NaN, inf and NaN stay. x = 2^e m with m in
// [sqrt(1/2), sqrt(2)), ln m by Cephes's polynomial of degree 8 in m - 1.
PALM_INLINE vf vlog(vf x) {
  const vi bits = (vi)x, shifted = bits - 0x3f3504f3;  // sqrt(1/2)'s bits: e counts from there
  const vi e = shifted >> 23;
  const vf m = (vf)(bits - (e << 23)) - set1(1.0f), n = __builtin_convertvector(e, vf), z = m * m;
  vf p = set1(7.0376836292e-2f);
  p = p * m + set1(-1.1514610310e-1f);
  p = p * m + set1(1.1676998740e-1f);
  p = p * m + set1(-1.2420140846e-1f);
  p = p * m + set1(1.4249322787e-1f);
  p = p * m + set1(-1.6668057665e-1f);
  p = p * m + set1(2.0000714765e-1f);
  p = p * m + set1(-2.4999993993e-1f);
  p = p * m + set1(3.3333331174e-1f);
  const vf y = m + (p * m * z + n * set1(-2.12194440e-4f) - z * set1(0.5f)) + n * set1(0.693359375f);
  const vf inf = set1(__builtin_inff());
  return x > vf{} ? (x < inf ? y : x) : (x == vf{} ? -inf : x - x + set1(__builtin_nanf("")));
}
PALM_INLINE vd vlog(vd x) {
  vd y;
  for (int i = 0; i < VB / 8; ++i) y[i] = __builtin_log(x[i]);
  return y;
}
// vexp_softmax where x may be inf, which gives inf.
PALM_INLINE vf vexp_term(vf x) {
#if VB == 64
  return vexp_softmax(x);
#else
  return vexp(x);
#endif
}
PALM_INLINE vd vexp_term(vd x) { return vexp(x); }
// 1 / (1 + e^-x)
PALM_INLINE vd vsigmoid(vd x) { return set1(1.0) / (set1(1.0) + vexp(-x)); }
PALM_INLINE vf vsigmoid(vf x) {
  const vf one = set1(1.0f);
#if VB == 64  // a reciprocal and a Newton step take a third of a division's time
  const vf d = one + vexp2(x * set1(-1.44269504088896341f));
  const vf y = (vf)_mm512_rcp14_ps((__m512)d), left = one - d * y;
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)set1(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_fmadd_ps(normal, (__m512)y, (__m512)left, (__m512)y);  // 0 where d may be infinite
#else
  return one / (one + vexp(-x));
#endif
}

// ---- rows ----
// f(col, n) for the vectors of a row of E: n is W<E>, a constant once inlined, but for the last.
template <class E, class F>
PALM_INLINE void each(int64_t cols, F&& f) {
  int64_t i = 0;
  for (; i + W<E> <= cols; i += W<E>) f(i, int64_t(W<E>));
  if (i < cols) f(i, cols - i);
}
// Asks for the line at p, which may lie outside of all memory.
PALM_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// The element offset of row r.
PALM_INLINE int64_t row_offset(const Rows& rows, const Matrix& m, int64_t r) {
  if (rows.dims == 1) return r * m.stride[0];
  int64_t offset = 0;
  for (int d = rows.dims - 1; d >= 0; --d) {
    offset += r % rows.size[d] * m.stride[d];
    r /= rows.size[d];
  }
  return offset;
}
template <class E>
PALM_INLINE E* row(const Rows& rows, const Matrix& m, int64_t r) {
  return static_cast<E*>(m.data) + row_offset(rows, m, r);
}

// ---- stores past the caches ----
// An output that no cache will hold until it is read is written without reading its lines first: a third of a
// copy's time from 64 MB on, for 5 % more when it is read again; below 24 MB it is a loss. Vectors of a whole
// line only: lines in two halves, with work between them, took up to twice as long as stores through the
// cache.
constexpr int64_t kStreamed = 32 << 20;
template <class E>
constexpr bool kStreams = VB == 64 && W<E> * sizeof(E) == 64;

// Whether the rows of m may be, and gain by it: large, every row aligned, the memory of none of the inputs.
template <class E, class... Inputs>
PALM_INLINE bool streams(const Rows& rows, const Matrix& m, int64_t cols, const Inputs&... inputs) {
  if (!kStreams<E> || rows.count * cols * int64_t(sizeof(E)) < kStreamed) return false;
  bool aligned = reinterpret_cast<uintptr_t>(m.data) % VB == 0;
  for (int d = 0; d < rows.dims; ++d) aligned = aligned && m.stride[d] * sizeof(E) % VB == 0;
  return aligned && (... && (inputs.data != m.data));
}
// store(p, v, n), past the caches where `streamed` and the vector is whole.
template <class E>
PALM_INLINE void put(E* p, typename Of<E>::V v, int64_t n, [[maybe_unused]] bool streamed) {
#if VB == 64
  if constexpr (kStreams<E>)
    if (streamed && n >= W<E>) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  store(p, v, n);
}
// Ends a thread's streamed stores: others see them after its next synchronisation.
PALM_INLINE void end_stream() {
#if VB == 64
  _mm_sfence();
#endif
}

// f(E{}) for the element type that dtype names.
template <class F>
PALM_INLINE void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    case Dtype::f64: return f(double{});
  }
}

// Raw scratch, 64-byte aligned, given back at the end of its scope.
template <class T>
struct Scratch {
  T* data;
  bool kept;  // from memory.h
  explicit Scratch(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 127) / 64 * 64;
    data = static_cast<T*>(bytes < kLeastBlock ? nullptr : take_memory(bytes));
    kept = data != nullptr;
    if (!kept) data = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data) abort();  // as the standard allocator would without exceptions
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { kept ? give_memory(data) : free(data); }
  operator T*() const { return data; }
};

}  // namespace palm::cpu::ISA
