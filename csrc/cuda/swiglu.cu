// swiglu: one pass, bound by memory (reads 2n, writes n; backward reads 3n, writes 2n). One packet of 16
// bytes an operand and thread: 8 warps of them keep a multiprocessor's share of the bandwidth under way.
#include "common.cuh"

namespace palm::cuda {

PALM_DEVICE float sigmoid(float x) { return reciprocal_fast(1 + exp2_fast(-kLog2e * x)); }

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_fwd_kernel(const __grid_constant__ Swiglu p, const __grid_constant__ Tiling tiles) {
  const Place at = place(tiles, N);
  const int64_t n = p.cols - at.column;
  if (at.row >= p.rows.count || n <= 0) return;
  float g[N], u[N];
  load<N>(g, row<const T>(p.rows, p.gate, at.row) + at.column, n);
  load<N>(u, row<const T>(p.rows, p.up, at.row) + at.column, n);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] *= silu(g[i], sigmoid(g[i]));
  store<N>(row<T>(p.rows, p.out, at.row) + at.column, u, n);
}

// dup = dout silu(g), dgate = dout up silu'(g)
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    swiglu_bwd_kernel(const __grid_constant__ Swiglu p, const __grid_constant__ Tiling tiles) {
  const Place at = place(tiles, N);
  const int64_t n = p.cols - at.column;
  if (at.row >= p.rows.count || n <= 0) return;
  float g[N], u[N], d[N];
  load<N>(g, row<const T>(p.rows, p.gate, at.row) + at.column, n);
  load<N>(u, row<const T>(p.rows, p.up, at.row) + at.column, n);
  load<N>(d, row<const T>(p.rows, p.dout, at.row) + at.column, n);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(g[i]);
    u[i] *= d[i] * silu_slope(g[i], s, 1.f);
    d[i] *= silu(g[i], s);
  }
  store<N>(row<T>(p.rows, p.dgate, at.row) + at.column, u, n);
  store<N>(row<T>(p.rows, p.dup, at.row) + at.column, d, n);
}

void swiglu_fwd(const Swiglu& p, const Queue& queue) {
  if (p.rows.count == 0 || p.cols == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    with_packet<T>(p.rows, {&p.gate, &p.up, &p.out}, [&](auto n) {
      const Tiling tiles = tiling(p.rows.count, p.cols, n);
      launch<swiglu_fwd_kernel<T, n>>(tiles.blocks(), kThreads, 0, queue, p, tiles);
    });
  });
}

void swiglu_bwd(const Swiglu& p, const Queue& queue) {
  if (p.rows.count == 0 || p.cols == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    with_packet<T>(p.rows, {&p.gate, &p.up, &p.dout, &p.dgate, &p.dup}, [&](auto n) {
      const Tiling tiles = tiling(p.rows.count, p.cols, n);
      launch<swiglu_bwd_kernel<T, n>>(tiles.blocks(), kThreads, 0, queue, p, tiles);
    });
  });
}

}  // namespace palm::cuda
