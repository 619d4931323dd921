// rotary: one pass, bound by memory (reads n, writes n); backward is the same kernel with the angle negated.
// A thread turns, with one packet of cos and sin of its token, two packets of x of one head after the other.
#include "common.cuh"

namespace palm::cuda {

constexpr int kHeads = 2;            // heads that a thread has under way at once: 64 bytes,
constexpr int kBlocks = 4;           // and blocks a multiprocessor: 64 KB
constexpr int64_t kOccupied = 2048;  // threads that a multiprocessor holds

// A row of the tiling is a token and `slice` of its heads (all of them, unless the tokens are too few to fill
// the multiprocessors): `pairs` threads turn two packets of a head each, `rest` more copy one.
struct RotaryPlan {
  Tiling tiles;
  int64_t pairs, rest, slice, slices;
};

PALM_DEVICE int64_t position_of(const Rotary& p, int64_t token) {
  const int64_t t = token % p.T, at = token / p.T * p.position_batch + t * p.position_token;
  return p.positions32 ? p.positions32[at] : p.positions64 ? p.positions64[at] : t;
}

// (a, b) -> (a c - b s, b c + a s) of the pairs of two packets: neighbours in both, laid end to end, or one
// from each. Fused the same way in every variant: alignment and pairing must not show in bits.
template <bool INTERLEAVED, class T, int N>
PALM_DEVICE void turn(Packet<T, N> (&v)[2], const float (&c)[N], const float (&s)[N]) {
  float x[2][N];
  unpack(x[0], v[0]);
  unpack(x[1], v[1]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int first = INTERLEAVED ? 2 * i : i, second = INTERLEAVED ? first + 1 : first + N;
    float &a = x[first / N][first % N], &b = x[second / N][second % N];
    const float turned = fmaf(a, c[i], -(b * s[i]));
    b = fmaf(b, c[i], a * s[i]);
    a = turned;
  }
  v[0] = packed<T>(x[0]);
  v[1] = packed<T>(x[1]);
}

// f over the M packets of each head, `apart` from each other, all loaded before one is stored: out may be x.
template <int N, int M, class T, class F>
PALM_DEVICE void each_head(const T* x, T* out, int heads, int64_t x_head, int64_t out_head, int apart,
                           F&& f) {
#pragma unroll 1
  for (int h = 0; h < heads; h += kHeads) {
    Packet<T, N> v[kHeads][M];
#pragma unroll
    for (int i = 0; i < kHeads; ++i)
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (h + i < heads) v[i][m] = get<N>(x + (h + i) * x_head + m * apart);
#pragma unroll
    for (int i = 0; i < kHeads; ++i)
      if (h + i < heads) {
        f(v[i]);
#pragma unroll
        for (int m = 0; m < M; ++m) put(out + (h + i) * out_head + m * apart, v[i][m]);
      }
  }
}

template <class T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rotary_kernel(const __grid_constant__ Rotary p, const __grid_constant__ RotaryPlan plan) {
  using V = Packet<T, N>;
  const Place at = place(plan.tiles, 1);
  const int64_t token = at.row / plan.slices, head = at.row % plan.slices * plan.slice;
  if (token * p.heads >= p.rows.count || at.column >= plan.pairs + plan.rest) return;
  const int64_t position = position_of(p, token);
  const bool known = position >= 0 && position < p.length;
  PALM_ASSERT(known, "rotary: every position must be a row of cos and sin");
  if (!known) return;
  const T* x = row<const T>(p.rows, p.x, token * p.heads) + head * p.x_head;
  T* out = row<T>(p.rows, p.out, token * p.heads) + head * p.out_head;
  const int heads = static_cast<int>(head + plan.slice < p.heads ? plan.slice : p.heads - head);
  if (at.column >= plan.pairs) {
    const int64_t rest = (plan.pairs + at.column) * N;
    return each_head<N, 1>(x + rest, out + rest, heads, p.x_head, p.out_head, 0, [](V(&)[1]) {});
  }
  float c[N], s[N];
  load_floats(c, static_cast<const float*>(p.cos) + position * p.cos_stride + at.column * N);
  load_floats(s, static_cast<const float*>(p.sin) + position * p.sin_stride + at.column * N);
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = p.conjugate ? -s[i] : s[i];
  const int64_t first = at.column * N * (INTERLEAVED ? 2 : 1);
  const int apart = INTERLEAVED ? N : static_cast<int>(p.half);
  each_head<N, 2>(x + first, out + first, heads, p.x_head, p.out_head, apart,
                  [&](V(&v)[2]) { turn<INTERLEAVED>(v, c, s); });
}

// Whether packets of 16 bytes hold whole pairs, and every operand begins and goes on at a multiple of them.
template <class T>
bool in_packets(const Rotary& p) {
  const auto whole = [](int64_t n) { return n % kPacket<T> == 0; };
  return whole(p.half) && whole(p.cols) && (p.heads == 1 || (whole(p.x_head) && whole(p.out_head))) &&
         aligned(p.cos) && aligned(p.sin) && p.cos_stride % 4 == 0 && p.sin_stride % 4 == 0 &&
         aligned<T>(p.rows, p.x) && aligned<T>(p.rows, p.out);
}

template <class T, int N>
void rotary_in(const Rotary& p, const Queue& queue) {
  const int64_t tokens = p.rows.count / p.heads;
  RotaryPlan plan{{}, p.half / N, p.x.data == p.out.data ? 0 : (p.cols - 2 * p.half) / N, p.heads, 1};
  const int64_t side = plan.pairs + plan.rest;
  if (side == 0) return;
  while (plan.slice > kHeads && tokens * plan.slices * side < kOccupied * queue.multiprocessors) {
    plan.slice = cdiv(plan.slice, 2);
    plan.slices = cdiv(p.heads, plan.slice);
  }
  plan.tiles = tiling(tokens * plan.slices, side, 1);
  if (p.interleaved)
    launch<rotary_kernel<T, N, true>>(plan.tiles.blocks(), kThreads, 0, queue, p, plan);
  else
    launch<rotary_kernel<T, N, false>>(plan.tiles.blocks(), kThreads, 0, queue, p, plan);
}

void rotary(const Rotary& p, const Queue& queue) {
  if (p.rows.count == 0 || p.cols == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    in_packets<T>(p) ? rotary_in<T, kPacket<T>>(p, queue) : rotary_in<T, 1>(p, queue);
  });
}

}  // namespace palm::cuda
