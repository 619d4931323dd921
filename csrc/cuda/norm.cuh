// What norm_fwd.cu and norm_bwd.cu share: how threads divide rows, sums over a row, gains. rms_norm is
// layer_norm whose mean is 0 (not `centred`).
#pragma once

#include <algorithm>

#include "common.cuh"

namespace palm::cuda {

constexpr int kWarpPackets = 4;  // packets a thread, above which a row gets a block instead of a warp
constexpr int kSlots = 3 * 32;   // floats through which the warps of a block add up three numbers

// A row is shared by a team of `width` neighbouring threads: a warp or part of it, `teams` in a block, or the
// whole block. Member m has the packets m, m + width, ...; `packets` is the most of them.
struct NormPlan {
  bool centred;
  int cols, width, log_width, teams, packets;  // log_width: where the block is the team, beyond every thread
  float inverse_cols, inverse_first;           // 1 / cols; forward: 1 / columns of the first piece
  int blocks, streams, gains, stages;  // backward: of rows; x, dout, dsum; dweight, dbias; rows under way
  int threads() const { return width * teams; }
  PALM_DEVICE int team() const { return threadIdx.x >> log_width; }
  PALM_DEVICE int member() const { return threadIdx.x & ((1 << log_width) - 1); }
};

// x[k], k < count, summed over a team, in an order that its width fixes. `slots` may be written again behind
// the next sum.
template <int K>
PALM_DEVICE void team_sum(float (&x)[K], int count, int width, float* slots) {
#pragma unroll
  for (int d = 16; d; d /= 2)
    if (d < width)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < count) x[k] += shuffle_xor(x[k], d);
  if (width <= 32) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (k < count && lane == 0) slots[k * 32 + warp] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (k < count) x[k] = warp_sum(lane < width / 32 ? slots[k * 32 + lane] : 0.f);
}

// N of weight or bias from column c on, which are T or, where wide, float.
template <class T, int N>
PALM_DEVICE void load_gain(float (&gain)[N], const void* from, bool wide, int64_t c) {
  if (sizeof(T) == 4 || wide)
    load_floats(gain, static_cast<const float*>(from) + c);
  else
    load<N>(gain, static_cast<const T*>(from) + c, N);
}

// Rows beyond a warp get a block of at most `most` threads, which have `least` packets each or more.
inline NormPlan planned(const Norm& p, bool centred, int64_t packets, int64_t least, int64_t most) {
  NormPlan plan{};
  plan.centred = centred;
  plan.cols = static_cast<int>(p.cols);
  plan.inverse_cols = 1.f / static_cast<float>(p.cols);
  const int64_t each = std::max(least, cdiv(packets, most));
  if (packets > 32 * kWarpPackets) {
    plan.width = static_cast<int>(cdiv(cdiv(packets, each), 32) * 32);
    plan.log_width = 10;
    plan.teams = 1;
  } else {
    while (plan.log_width < 5 && (1 << plan.log_width) < packets) ++plan.log_width;
    plan.width = 1 << plan.log_width;
    plan.teams = kThreads / plan.width;
  }
  plan.packets = static_cast<int>(cdiv(packets, plan.width));
  plan.blocks = static_cast<int>(cdiv(p.rows.count, plan.teams));
  return plan;
}

// f(element, packet size): packets of 16 bytes where all operands are aligned to them.
template <class F>
void with_packets(const Norm& p, std::initializer_list<const Matrix*> operands, F&& f) {
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    if (p.cols % kPacket<T> == 0 && aligned(p.weight) && aligned(p.bias))
      with_packet<T>(p.rows, operands, [&](auto n) { f(e, n); });
    else
      f(e, std::integral_constant<int, 1>{});
  });
}

}  // namespace palm::cuda
