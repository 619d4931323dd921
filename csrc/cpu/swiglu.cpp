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
    end_stream();
  });
}

template <class E>
static void fwd(const Swiglu& p) {
  using V = typename Of<E>::V;
  const bool streamed = streams<E>(p.rows, p.out, p.cols, p.gate, p.up);
  over_blocks(p.rows, p.cols, [&, streamed](int64_t r, int64_t col, int64_t n) {
    const E* gate = row<E>(p.rows, p.gate, r) + col;
    const E* up = row<E>(p.rows, p.up, r) + col;
    E* out = row<E>(p.rows, p.out, r) + col;
    each<E>(n, [=](int64_t i, int64_t lanes) PALM_INLINED {
      const V g = load(gate + i, lanes);
      put(out + i, silu(g, vsigmoid(g)) * load(up + i, lanes), lanes, streamed);
    });
  });
}

// dup = dout silu(g), dgate = dout up silu'(g)
template <class E>
static void bwd(const Swiglu& p) {
  using V = typename Of<E>::V;
  const V one = set1(typename Of<E>::C(1));
  const bool streamed = streams<E>(p.rows, p.dgate, p.cols, p.gate, p.up, p.dout) &&
                        streams<E>(p.rows, p.dup, p.cols, p.gate, p.up, p.dout);
  over_blocks(p.rows, p.cols, [&, streamed](int64_t r, int64_t col, int64_t n) {
    const E* gate = row<E>(p.rows, p.gate, r) + col;
    const E* up = row<E>(p.rows, p.up, r) + col;
    const E* dout = row<E>(p.rows, p.dout, r) + col;
    E* dgate = row<E>(p.rows, p.dgate, r) + col;
    E* dup = row<E>(p.rows, p.dup, r) + col;
    each<E>(n, [=](int64_t i, int64_t lanes) PALM_INLINED {
      const V g = load(gate + i, lanes), d = load(dout + i, lanes), s = vsigmoid(g);
      const V u = load(up + i, lanes);
      put(dup + i, d * silu(g, s), lanes, streamed);
      put(dgate + i, d * u * silu_slope(g, s, one), lanes, streamed);
    });
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
