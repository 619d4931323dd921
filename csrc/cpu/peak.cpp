// peak: what the arithmetic units can do at most, for the benchmarks to hold the kernels against. Chains of
// one instruction in registers: the float multiply-add, or the bf16 dot with float sums.
#include "parallel.h"
#include "simd.h"

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

int64_t peak(const Peak& p) {
  const int64_t flop = 2 * kChains * W<float> * p.repeats;
  if (!p.dot) {
    const vf half = set1(0.5f), one = set1(1.0f);
    run_chains(p, [=](vf sum) { return sum * half + one; });  // tends to 2: no overflow, no subnormal
    return flop;
  }
#if defined(__AVX512BF16__) && VB == 64
  const __m512bh tiny = (__m512bh)_mm512_set1_epi32(0x38003800);  // pairs of 2^-15: sums stay small
  run_chains(p, [=](vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, tiny, tiny); });
  return 2 * flop;
#else
  return -1;
#endif
}

}  // namespace palm::cpu::ISA
