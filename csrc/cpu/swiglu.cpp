// swiglu: one pass, bound by memory (reads 2n, writes n; backward reads 3n, writes 2n).
#include "../scalar.h"
#include "parallel.h"
#include "simd.h"

namespace palm::cpu::ISA {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least: a few microseconds of work

// body(row, col, n): n elements of a row from col on; long rows are cut so that one row also feeds every
// thread.
template <class F>
static void over_blocks(const Rows& rows, int64_t cols, F&& body) {
  const int64_t width = cols < kGrain ? cols : kGrain, cuts = width ? (cols + width - 1) / width : 0;
  parallel_for(rows.count * cuts, width ? (kGrain + width - 1) / width : 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t col = i % cuts * width;
      body(i / cuts, col, cols - col < width ? cols - col : width);
    }
  });
}

template <class E>
static void fwd(const Swiglu& p) {
  over_blocks(p.rows, p.cols, [&](int64_t r, int64_t col, int64_t n) {
    const E* gate = row<E>(p.rows, p.gate, r) + col;
    const E* up = row<E>(p.rows, p.up, r) + col;
    E* out = row<E>(p.rows, p.out, r) + col;
    for (int64_t i = 0; i < n; i += W<E>) {
      const auto g = load(gate + i, n - i);
      store(out + i, silu(g, vsigmoid(g)) * load(up + i, n - i), n - i);
    }
  });
}

// dup = dout silu(g), dgate = dout up silu'(g)
template <class E>
static void bwd(const Swiglu& p) {
  const auto one = set1(typename Of<E>::C(1));
  over_blocks(p.rows, p.cols, [&](int64_t r, int64_t col, int64_t n) {
    const E* gate = row<E>(p.rows, p.gate, r) + col;
    const E* up = row<E>(p.rows, p.up, r) + col;
    const E* dout = row<E>(p.rows, p.dout, r) + col;
    E* dgate = row<E>(p.rows, p.dgate, r) + col;
    E* dup = row<E>(p.rows, p.dup, r) + col;
    for (int64_t i = 0; i < n; i += W<E>) {
      const auto g = load(gate + i, n - i), d = load(dout + i, n - i), s = vsigmoid(g);
      store(dup + i, d * silu(g, s), n - i);
      store(dgate + i, d * load(up + i, n - i) * silu_slope(g, s, one), n - i);
    }
  });
}

int64_t swiglu_fwd(const Swiglu& p) {
  with_dtype(p.dtype, [&](auto e) { fwd<decltype(e)>(p); });
  return -1;
}

int64_t swiglu_bwd(const Swiglu& p) {
  with_dtype(p.dtype, [&](auto e) { bwd<decltype(e)>(p); });
  return -1;
}

}  // namespace palm::cpu::ISA
