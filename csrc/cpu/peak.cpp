// peak: what the arithmetic units can do at most, for the benchmarks to hold the kernels against. Chains of
// one instruction in registers: the float multiply-add, the bf16 dot or the product of bf16 tiles with float
// sums.
#include "pairs.h"
#include "parallel.h"

namespace palm::cpu::ISA {

constexpr int kChains = 12;  // hides a latency of 4 on two ports, and fits 16 registers

// step(sum) is one instruction that depends on sum alone; the total is stored so that no chain is dropped.
template <class Step>
static void run_chains(const Peak& p, Step step) {
  parallel_for(p.count, 1, [&](int64_t lo, int64_t hi) {
    for (; lo < hi; ++lo) {
      vf sum[kChains];
      for (int j = 0; j < kChains; ++j) sum[j] = set1(float(j));
      for (int64_t i = 0; i < p.repeats; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j) sum[j] = step(sum[j]);
      }
      for (int j = 1; j < kChains; ++j) sum[0] += sum[j];
      p.out[lo] = hsum(sum[0]);
    }
  });
}

#if defined(__AMX_BF16__)
static int64_t tile_peak(const Peak& p) {
  parallel_for(p.count, 1, [&](int64_t lo, int64_t hi) {
    const Tiles tiles;
    alignas(64) float sums[256];
    for (; lo < hi; ++lo) {
      _tile_zero(4);
      _tile_zero(5);
      for (int64_t i = 0; i < p.repeats; ++i) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, sums, 64);
      p.out[lo] = sums[0];
    }
  });
  return 4 * 2 * 16 * 16 * 32 * p.repeats;
}
#endif

int64_t peak(const Peak& p) {
  const int64_t flop = 2 * kChains * W<float> * p.repeats;
  if (p.unit == Unit::fma) {
    const vf half = set1(0.5f), one = set1(1.0f);
    run_chains(p, [=](vf sum) { return sum * half + one; });  // tends to 2: no overflow, no subnormal
    return flop;
  }
#if defined(__AVX512BF16__) && VB == 64
  if (p.unit == Unit::dot) {
    const __m512bh tiny = (__m512bh)_mm512_set1_epi32(0x38003800);  // pairs of 2^-15: sums stay small
    run_chains(p, [=](vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, tiny, tiny); });
    return 2 * flop;
  }
#endif
#if defined(__AMX_BF16__)
  if (p.unit == Unit::tile) return tile_peak(p);
#endif
  return -1;
}

}  // namespace palm::cpu::ISA
