// rotary: one pass, bound by memory (reads n, writes n). Backward is the same kernel with the angle negated.
#include "../scalar.h"
#include "parallel.h"
#include "simd.h"

namespace palm::cpu::ISA {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least: a few microseconds of work

// Every pair is loaded before it is stored, so y may be x.
template <class E>
PALM_INLINE void turn_halves(const E* x, E* y, const typename Of<E>::C* cos, const typename Of<E>::C* sin,
                             int64_t half, bool conjugate, bool streamed) {
  const auto sign = set1(typename Of<E>::C(conjugate ? -1 : 1));
  each<E>(half, [=](int64_t i, int64_t n) PALM_INLINED {
    const auto x1 = load(x + i, n), x2 = load(x + half + i, n), c = load(cos + i, n),
               s = load(sin + i, n) * sign;
    put(y + i, rotated(x1, x2, c, s), n, streamed);
    put(y + half + i, rotated(x2, x1, c, -s), n, streamed);
  });
}

// The lanes of every pair changed over.
PALM_INLINE vf swapped(vf v) {
  typedef uint64_t pairs __attribute__((vector_size(VB)));
  return (vf)((pairs)v >> 32 | (pairs)v << 32);
}
PALM_INLINE vd swapped(vd v) {
  vd out;
  for (int i = 0; i < VB / 8; ++i) out[i] = v[i ^ 1];
  return out;
}
// The first n values (at most half a vector), each in two lanes.
PALM_INLINE vf doubled(const float* p, int64_t n) {
  float tail[VB / 8] = {};
  if (n < VB / 8) {
    for (int64_t i = 0; i < n; ++i) tail[i] = p[i];
    p = tail;
  }
#if VB == 64  // GCC 12 makes five instructions of the portable form
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return (vf)_mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
#else
  typedef uint64_t pairs __attribute__((vector_size(VB)));
  typedef uint32_t words __attribute__((vector_size(VB / 2)));
  typedef uint32_t words_mem __attribute__((vector_size(VB / 2), aligned(4), may_alias));
  const words w = *reinterpret_cast<const words_mem*>(p);
  const pairs wide = __builtin_convertvector(w, pairs);
  return (vf)(wide | wide << 32);
#endif
}
PALM_INLINE vd doubled(const double* p, int64_t n) {
  vd out = {};
  for (int i = 0; i < VB / 16 && i < n; ++i) out[2 * i] = out[2 * i + 1] = p[i];
  return out;
}

template <class E>
PALM_INLINE void turn_pairs(const E* x, E* y, const typename Of<E>::C* cos, const typename Of<E>::C* sin,
                            int64_t half, bool conjugate, bool streamed) {
  typename Of<E>::V sign;
  for (int i = 0; i < W<E>; ++i) sign[i] = (i & 1) == conjugate ? -1 : 1;
  each<E>(2 * half, [=](int64_t i, int64_t n) PALM_INLINED {
    const auto both = load(x + i, n);
    const auto c = doubled(cos + i / 2, n / 2), s = doubled(sin + i / 2, n / 2) * sign;
    put(y + i, both * c + swapped(both) * s, n, streamed);
  });
}

template <class E>
static int64_t run(const Rotary& p) {
  using C = typename Of<E>::C;
  const int64_t tokens = p.heads ? p.rows.count / p.heads : 0, size = p.heads * p.cols + 1;
  const bool streamed = p.half * sizeof(E) % VB == 0 && streams<E>(p.rows, p.out, p.cols, p.x);
  FirstBad bad;
  parallel_for(tokens, kGrain / size + 1, [&](int64_t lo, int64_t hi) {
    for (int64_t token = lo; token < hi; ++token) {
      const int64_t b = token / p.T, t = token % p.T, at = b * p.position_batch + t * p.position_token;
      const int64_t position = p.positions32 ? p.positions32[at] : p.positions64 ? p.positions64[at] : t;
      if (position < 0 || position >= p.length) {
        bad.report(token);
        continue;
      }
      const C* cos = static_cast<const C*>(p.cos) + position * p.cos_stride;
      const C* sin = static_cast<const C*>(p.sin) + position * p.sin_stride;
      const E* x = row<E>(p.rows, p.x, token * p.heads);
      E* out = row<E>(p.rows, p.out, token * p.heads);
      for (int64_t h = 0; h < p.heads; ++h, x += p.x_head, out += p.out_head) {
        if (p.interleaved)
          turn_pairs<E>(x, out, cos, sin, p.half, p.conjugate, streamed);
        else
          turn_halves<E>(x, out, cos, sin, p.half, p.conjugate, streamed);
        if (out != x) memcpy(out + 2 * p.half, x + 2 * p.half, (p.cols - 2 * p.half) * sizeof(E));
      }
    }
    end_stream();
  });
  return bad.result();
}

int64_t rotary(const Rotary& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = run<decltype(e)>(p); });
  return bad;
}

}  // namespace palm::cpu::ISA
