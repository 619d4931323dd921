// rms_norm and layer_norm forward: a row stays in registers between its statistics and its use. Bound by
// memory (reads n, writes n; twice that with residual): a thread has four packets under way, of one row or of
// four short ones.
#include "norm.cuh"

namespace palm::cuda {

constexpr int kForwardPackets = 4;
constexpr int kMostThreads = 1024;  // of a block: with four packets each 64 KB of a row

// The numbers of a packet that stays in registers. They are made anew at each use: kept, they would take
// twice the registers.
template <class T, int N>
PALM_DEVICE void unpack_again(float (&x)[N], const Packet<T, N>& packet) {
  if constexpr (N == 1)
    unpack(x, packet);
  else
    unpack(x, Packet<T, N>{opaque(packet.bits)});
}

// The packets that a thread of forward has of R rows, from column `column` on.
template <int N, int R>
struct Hand {
  static constexpr int P = kForwardPackets / R;
  const Norm& p;
  const NormPlan& plan;
  int column;
  PALM_DEVICE int64_t row_of(int j) const {
    return (static_cast<int64_t>(blockIdx.x) * R + j) * plan.teams + plan.team();
  }
  PALM_DEVICE int column_of(int k) const { return column + k * plan.width * N; }
  PALM_DEVICE bool has(int j, int k) const { return row_of(j) < p.rows.count && column_of(k) < plan.cols; }
};

template <class T, int N, int R, int P>
PALM_DEVICE void load_rows(Packet<T, N> (&x)[R][P], const Matrix& m, const Hand<N, R>& h) {
#pragma unroll
  for (int j = 0; j < R; ++j) {
    const T* from = row<const T>(h.p.rows, m, h.row_of(j));
#pragma unroll
    for (int k = 0; k < P; ++k) {
      memset(&x[j][k], 0, sizeof(x[j][k]));
      if (h.has(j, k)) x[j][k] = get<N>(from + h.column_of(k));
    }
  }
}

// x += residual, rounded to T, which is stored: the norm is of the stored sum.
template <class T, int N, int R, int P>
PALM_DEVICE void add_residual(Packet<T, N> (&x)[R][P], const Hand<N, R>& h) {
  Packet<T, N> residual[R][P];
  load_rows(residual, h.p.residual, h);
#pragma unroll
  for (int j = 0; j < R; ++j) {
    T* sum = row<T>(h.p.rows, h.p.sum, h.row_of(j));
#pragma unroll
    for (int k = 0; k < P; ++k) {
      float s[N], r[N];
      unpack_again(s, x[j][k]);
      unpack(r, residual[j][k]);
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] += r[i];
      x[j][k] = packed<T>(s);
      if (h.has(j, k)) put(sum + h.column_of(k), x[j][k]);
    }
  }
}

// out = (x - mean) rstd (weight + offset) + bias
template <class T, int N, int R, int P>
PALM_DEVICE void store_normed(const Packet<T, N> (&x)[R][P], const float (&mean)[R], const float (&rstd)[R],
                              const Hand<N, R>& h) {
  const Norm& p = h.p;
  const bool wide = p.gain_dtype == Dtype::f32;
  const float offset = static_cast<float>(p.offset);
  T* out[R];
#pragma unroll
  for (int j = 0; j < R; ++j) out[j] = row<T>(p.rows, p.out, h.row_of(j));
#pragma unroll
  for (int k = 0; k < P; ++k) {
    const int c = h.column_of(k);
    if (c >= h.plan.cols) return;
    float y[R][N], gain[N];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      unpack_again(y[j], x[j][k]);
#pragma unroll
      for (int i = 0; i < N; ++i) y[j][i] = (y[j][i] - mean[j]) * rstd[j];
    }
    if (p.weight) {
      load_gain<T>(gain, p.weight, wide, c);
#pragma unroll
      for (int j = 0; j < R; ++j)
#pragma unroll
        for (int i = 0; i < N; ++i) y[j][i] *= gain[i] + offset;
    }
    if (p.bias) {
      load_gain<T>(gain, p.bias, wide, c);
#pragma unroll
      for (int j = 0; j < R; ++j)
#pragma unroll
        for (int i = 0; i < N; ++i) y[j][i] += gain[i];
    }
#pragma unroll
    for (int j = 0; j < R; ++j)
      if (h.has(j, k)) store<N>(out[j] + c, y[j], N);
  }
}

// Long rows come in pieces and are read again for out. Their variance is taken about the mean of the first
// piece: where the others lie far from it, so that rounding grows, so does as much the variance.
template <class T, int N, int R>
__global__ void __launch_bounds__(R == 1 ? kMostThreads : kThreads)
    norm_fwd_kernel(const __grid_constant__ Norm p, const __grid_constant__ NormPlan plan) {
  using H = Hand<N, R>;
  PALM_SHARED(float, slots);
  H hand{p, plan, 0};
  const int piece = plan.width * H::P * N;
  const bool whole = R > 1 || plan.cols <= piece;
  Packet<T, N> x[R][H::P];
  float mean[R] = {}, moments[2 * R] = {};  // the sums of (s - mean)^2 and of s - mean
  for (int start = 0; start < plan.cols; start += piece) {
    hand.column = start + plan.member() * N;
    load_rows(x, p.x, hand);
    if (p.residual.data) add_residual(x, hand);
    if (plan.centred && start == 0) {
#pragma unroll
      for (int j = 0; j < R; ++j)
#pragma unroll
        for (int k = 0; k < H::P; ++k) {
          float s[N];
          unpack_again(s, x[j][k]);
#pragma unroll
          for (int i = 0; i < N; ++i) mean[j] += s[i];
        }
      team_sum(mean, R, plan.width, slots);
#pragma unroll
      for (int j = 0; j < R; ++j) mean[j] *= plan.inverse_first;
    }
#pragma unroll
    for (int j = 0; j < R; ++j)
#pragma unroll
      for (int k = 0; k < H::P; ++k) {
        if (!hand.has(j, k)) continue;
        float s[N];
        unpack_again(s, x[j][k]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float d = s[i] - mean[j];
          moments[j] += d * d;
          moments[R + j] += d;
        }
      }
    if (R > 1) break;
  }
  team_sum(moments, plan.centred ? 2 * R : R, plan.width, slots + 32);
  float rstd[R];
#pragma unroll
  for (int j = 0; j < R; ++j) {
    float variance = moments[j] * plan.inverse_cols;
    if (plan.centred) {  // what rounding left of the mean is taken out of both
      const float left = moments[R + j] * plan.inverse_cols;
      mean[j] += left;
      variance -= left * left < variance ? left * left : 0;
    }
    rstd[j] = 1 / sqrtf(variance + static_cast<float>(p.eps));
    if (plan.member() == 0 && hand.row_of(j) < p.rows.count) {
      if (p.mean) static_cast<float*>(p.mean)[hand.row_of(j)] = mean[j];
      if (p.rstd) static_cast<float*>(p.rstd)[hand.row_of(j)] = rstd[j];
    }
  }
  for (int start = 0; start < plan.cols; start += piece) {
    hand.column = start + plan.member() * N;
    if (!whole) load_rows(x, p.residual.data ? p.sum : p.x, hand);
    store_normed(x, mean, rstd, hand);
    if (R > 1) break;
  }
}

void norm_fwd(const Norm& p, const Queue& queue, bool centred) {
  if (p.rows.count == 0 || p.cols == 0) return;
  with_packets(p, {&p.x, &p.residual, &p.sum, &p.out}, [&](auto e, auto n) {
    using T = decltype(e);
    constexpr int N = decltype(n)::value;
    const int64_t packets = p.cols / N;
    NormPlan plan = planned(p, centred, packets, kForwardPackets, kMostThreads);
    const int piece = plan.width * kForwardPackets * N;
    plan.inverse_first = 1.f / static_cast<float>(std::min(plan.cols, piece));
    const size_t shared = plan.width > 32 ? kSlots * sizeof(float) : 0;
    if (N > 1 && packets <= 32)
      launch<norm_fwd_kernel<T, N, N == 1 ? 1 : 4>>(cdiv(p.rows.count, 4 * plan.teams), plan.threads(),
                                                    shared, queue, p, plan);
    else
      launch<norm_fwd_kernel<T, N, 1>>(cdiv(p.rows.count, plan.teams), plan.threads(), shared, queue, p,
                                       plan);
  });
}

void rms_norm_fwd(const Norm& p, const Queue& queue) { norm_fwd(p, queue, false); }
void layer_norm_fwd(const Norm& p, const Queue& queue) { norm_fwd(p, queue, true); }

}  // namespace palm::cuda
