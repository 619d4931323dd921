// cross_entropy, linear_cross_entropy's rows: bound by memory. Forward reads the logits once (a running
// maximum and sum in every lane), backward once more; linear_cross_entropy's rows read them twice, the second
// time from the second cache. z = logit_scale logits is rounded alike wherever it is used, so that it cancels
// in lse - z_y and in exp(z_y - lse).
#include <algorithm>

#include "common.cuh"

namespace palm::cuda {
namespace {

constexpr int kStep = 3;  // packets of a lane that are under way together: with four the rows' kernel spills
// Bytes of a row from which it has a block of 1,024 threads, of which a multiprocessor holds one: the rows
// under way (132 of 256 KB on an H100) are still in the second cache when they are read again.
constexpr int64_t kLongRow = 1 << 16;
constexpr int64_t kPiece = 4096;  // rows whose terms a block adds up
constexpr float kLargest = 3.4028234663852886e38f;
// exp gives a subnormal number below this. As on the CPU such probabilities are 0: a GEMM over subnormal
// numbers can be slow.
constexpr float kLowest = -87.33f;

// What the kernels make of the options: 1 - eps, eps / V.
struct Factors {
  float logit_scale, keep, share, z_loss;
};
Factors factors(const CrossEntropy& p) {
  const double eps = p.label_smoothing, V = static_cast<double>(p.cols);
  return {float(p.logit_scale), float(1 - eps), float(eps == 0 ? 0 : eps / V), float(p.z_loss)};
}

// The kept target of a row: y, token weight t, class weight w_y. Nothing else of an ignored row is read.
struct Label {
  int y;
  float t, w;
  bool kept;
};
PALM_DEVICE Label label(const CrossEntropy& p, int64_t r) {
  if (r >= p.rows.count) return {};
  const int64_t y = *row<const int64_t>(p.rows, p.target, r);
  if (y == p.ignore_index) return {};
  const bool good = y >= 0 && y < p.cols;
  PALM_ASSERT(good, "cross_entropy: need 0 <= target < V, or ignore_index");
  if (!good) return {};
  const float t = p.token_weight.data ? *row<const float>(p.rows, p.token_weight, r) : 1;
  return {static_cast<int>(y), t, p.weight ? static_cast<const float*>(p.weight)[y] : 1, true};
}

// A row in packets that begin at multiples of 16 bytes, wherever the row does: packet k holds columns
// first(k) to first(k) + N - 1, of which the first and the last packet may lack some. Columns are 32 bits.
template <class T>
struct Logits {
  static constexpr int N = kPacket<T>;
  T* data;
  int cols;
  int ahead;
  PALM_DEVICE Logits(T* data, int64_t cols)
      : data(data), cols(static_cast<int>(cols)), ahead(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T)) {}
  PALM_DEVICE int packets() const { return cols ? (cols + ahead + N - 1) / N : 0; }
  PALM_DEVICE int first(int k) const { return k * N - ahead; }
  // Which of the packet at column c are there: i with from <= i < to.
  PALM_DEVICE int from(int c) const { return max(-c, 0); }
  PALM_DEVICE int to(int c) const { return max(min(cols - c, N), 0); }
  PALM_DEVICE bool whole(int c) const { return c >= 0 && c + N <= cols; }

  // f(i, w_c) for the packet at column c (null: 1). The weights are read without a branch, so that they are
  // under way together.
  template <class F>
  PALM_DEVICE void with_weights(const float* weight, int c, F&& f) const {
    if (weight) {
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, weight[min(max(c + i, 0), cols - 1)]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) f(i, 1.f);
    }
  }

  PALM_DEVICE Packet<T, N> load(int c) const {
    if (whole(c)) return get<N>(data + c);
    const int i0 = from(c), i1 = to(c);
    T part[N];
#pragma unroll
    for (int i = 0; i < N; ++i) part[i] = i >= i0 && i < i1 ? data[c + i] : from_float<T>(0);
    Packet<T, N> packet;
    memcpy(static_cast<void*>(&packet), part, 16);
    return packet;
  }
  PALM_DEVICE void store(int c, const float (&v)[N], bool at_once) const {
    if (at_once && whole(c)) return put(data + c, packed<T>(v));
    const int i0 = from(c), i1 = to(c);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i >= i0 && i < i1) data[c + i] = from_float<T>(v[i]);
  }
};

// A lane's logits so far: their maximum, kept finite so that neither -inf - -inf nor inf - inf arises, mass =
// sum exp(z - top); for smoothing gap = sum w_c (pivot - z_c) and weight_sum. The pivot is a level near
// the logits, about which the gaps keep their digits.
struct Running {
  float top = -kLargest, mass = 0, pivot = 0, gap = 0, weight_sum = 0;

  template <int N>
  PALM_DEVICE void add(const float (&z)[N]) {
    float higher = top, sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) higher = fmaxf(higher, z[i]);
    higher = fminf(higher, kLargest);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2_fast(kLog2e * (z[i] - higher));
    mass = mass * exp2_fast(kLog2e * (top - higher)) + sum;
    top = higher;
  }

  template <class T, int N>
  PALM_DEVICE void add_gaps(const float (&z)[N], const Logits<T>& x, int c, const float* weight) {
    const int from = x.from(c), to = x.to(c);
    float gaps = 0, weights = 0;
    x.with_weights(weight, c, [&](int i, float w) {
      gaps += i >= from && i < to ? w * (pivot - z[i]) : 0;
      weights += i >= from && i < to ? w : 0;
    });
    gap += gaps;
    weight_sum += weights;
  }
};

// All logits of a row, kStep packets in flight.
template <class T>
PALM_DEVICE Running run(const Logits<T>& x, int lane, int width, float scale, bool smooth,
                        const float* weight) {
  constexpr int N = Logits<T>::N;
  Running m;
  for (int k = lane, end = x.packets(); k < end; k += kStep * width) {
    Packet<T, Logits<T>::N> packets[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u) packets[u] = x.load(x.first(k + u * width));
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int c = x.first(k + u * width);
      const int from = x.from(c), to = x.to(c);
      float z[N];
      unpack(z, packets[u]);
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = rounded_product(scale, z[i]);
      if (to - from < N) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (i < from || i >= to) z[i] = -INFINITY;
      }
      m.add(z);
      if (!smooth) continue;
      if (k == lane && u == 0 && m.top > -kLargest) m.pivot = m.top;
      m.add_gaps(z, x, c, weight);
    }
  }
  return m;
}

// x[k] over the `width` threads of a row, 32 at most or the whole block, in one order: every thread gets it.
template <class V, int K, class F>
PALM_DEVICE void reduce(V (&x)[K], int width, F f) {
  for (int d = min(width, 32) / 2; d; d /= 2)
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = f(x[k], shuffle_xor(x[k], d));
  if (width <= 32) return;
  PALM_SHARED(V, shared);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * K + k] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = shared[k];
    for (int warp = 1; warp < width / 32; ++warp) x[k] = f(x[k], shared[warp * K + k]);
  }
}
template <class V, int K>
PALM_DEVICE void add_up(V (&x)[K], int width) {
  reduce(x, width, [](V a, V b) { return a + b; });
}

// dz_c = a p_c - b w_c - d [c = y], p = exp(z - lse); 0 in an ignored row.
// a = g t ((1-eps) w_y + eps/V sum w + 2 z_loss w_y lse), b = g t eps/V, d = g t (1-eps) w_y; g = dloss
// logit_scale, total = sum w.
struct Slope {
  float scale, lse, a, b, d;
  const float* weight;
  int y;
  bool kept, smooth;
  PALM_DEVICE Slope(const CrossEntropy& p, const Factors& f, const Label& l, float dloss, float lse,
                    float total)
      : scale(f.logit_scale), lse(lse), y(l.y), kept(l.kept), smooth(f.share != 0) {
    const float gt = dloss * f.logit_scale * l.t, own = f.keep * l.w;
    float slope = own;
    if (smooth) slope += f.share * total;
    if (f.z_loss != 0) slope += 2 * f.z_loss * l.w * lse;
    a = gt * slope;
    b = gt * f.share;
    d = gt * own;
    weight = static_cast<const float*>(p.weight);
  }

  template <class T>
  PALM_DEVICE void apply(float (&v)[Logits<T>::N], const Logits<T>& x, int c) const {
    constexpr int N = Logits<T>::N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gap = rounded_product(scale, v[i]) - lse;
      v[i] = a * (gap < kLowest ? 0 : exp2_fast(kLog2e * gap));
    }
    if (smooth) x.with_weights(weight, c, [&](int i, float w) { v[i] -= b * w; });
    if (y >= c && y < c + N) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (c + i == y) v[i] -= d;
    }
  }

  // A lane's kStep packets from k on. out may be x, or begin at another place between multiples of 16 bytes.
  template <class T>
  PALM_DEVICE void step(const Logits<T>& x, const Logits<T>& out, int k, int width) const {
    Packet<T, Logits<T>::N> packets[kStep];
#pragma unroll
    for (int u = 0; u < kStep; ++u)
      if (kept) packets[u] = x.load(x.first(k + u * width));
#pragma unroll
    for (int u = 0; u < kStep; ++u) {
      const int c = x.first(k + u * width);
      float v[Logits<T>::N] = {};
      if (kept) {
        unpack(v, packets[u]);
        apply(v, x, c);
      }
      out.store(c, v, x.ahead == out.ahead);
    }
  }
};

// l = t ((1-eps) w_y (lse - z_y) + eps/V sum_c w_c (lse - z_c)) + z, z = t z_loss w_y lse^2, with lse = top +
// log_sum left in its two parts, so that no difference of large numbers is rounded. p.gradient: dlogits in
// the logits' place.
template <class T>
__global__ void __launch_bounds__(1024, 1)
    cross_entropy_rows_kernel(const __grid_constant__ CrossEntropy p, const __grid_constant__ Factors f,
                              int log_width) {
  const int width = 1 << log_width, lane = threadIdx.x & (width - 1);
  const int64_t r = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) >> log_width;
  const bool here = r < p.rows.count, smooth = f.share != 0;
  const Label l = label(p, r);
  T* logits = here ? row<T>(p.rows, p.logits, r) : nullptr;
  const float z_y = l.kept ? rounded_product(f.logit_scale, to_float(logits[l.y])) : 0;
  const Logits<T> x(logits, l.kept ? p.cols : 0);
  const Running m = run(x, lane, width, f.logit_scale, smooth, static_cast<const float*>(p.weight));
  float top[1] = {m.top};
  reduce(top, width, [](float a, float b) { return fmaxf(a, b); });
  float sums[3] = {m.mass * exp2_fast(kLog2e * (m.top - top[0])), m.gap + m.weight_sum * (top[0] - m.pivot),
                   m.weight_sum};
  add_up(sums, width);

  const float log_sum = logf(sums[0]), lse = top[0] + log_sum;
  float value = l.w * (log_sum + (top[0] - z_y)), squares = 0;
  if (smooth) value = f.keep * value + f.share * (sums[1] + sums[2] * log_sum);
  value *= l.t;
  if (f.z_loss != 0) squares = l.t * f.z_loss * l.w * lse * lse;
  if (here && lane == 0) {
    *row<float>(p.rows, p.loss, r) = l.kept ? value + squares : 0;
    *row<float>(p.rows, p.z, r) = l.kept ? squares : 0;
    if (p.lse.data) *row<float>(p.rows, p.lse, r) = l.kept ? lse : 0;
    if (p.row_weight.data) *row<float>(p.rows, p.row_weight, r) = l.kept ? l.t * l.w : 0;
  }
  if (!p.gradient) return;
  const float dloss = p.dloss.data && l.kept ? *row<const float>(p.rows, p.dloss, r) : 1;
  const Slope slope(p, f, l, dloss, lse, sums[2]);
  if (width > 32)  // all have read z_y before one overwrites it
    __syncthreads();
  else
    sync_warp();
  const Logits<T> out(logits, here ? p.cols : 0);
  for (int k = lane, end = out.packets(); k < end; k += kStep * width) slope.step(out, out, k, width);
}

// dlogits = dloss scale logit_scale dl/dz; a thread has one step of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropy p, const __grid_constant__ Factors f,
                             int log_width, int column_tiles, const double* total) {
  const int width = 1 << log_width;
  const int64_t r = blockIdx.x / column_tiles * (kThreads >> log_width) + (threadIdx.x >> log_width);
  if (r >= p.rows.count) return;
  const int k = static_cast<int>(blockIdx.x % column_tiles) * kStep * width + (threadIdx.x & (width - 1));
  const Label l = label(p, r);
  float dloss = 0, lse = 0;
  if (l.kept) {
    dloss = *row<const float>(p.rows, p.dloss, r) * *static_cast<const float*>(p.scale);
    lse = *row<const float>(p.rows, p.lse, r);
  }
  const Slope slope(p, f, l, dloss, lse, total ? float(*total) : float(p.cols));
  const Logits<T> x(row<T>(p.rows, p.logits, r), p.cols), out(row<T>(p.rows, p.dlogits, r), p.cols);
  if (k < x.packets()) slope.step(x, out, k, width);
}

// sums[kind][i] of the terms[kind][count] from i piece on.
__global__ void __launch_bounds__(1024, 1)
    cross_entropy_sums_kernel(const float* terms, int64_t count, int64_t piece, int kinds, double* sums) {
  const int64_t begin = blockIdx.x * piece, end = min(begin + piece, count);
  for (int kind = 0; kind < kinds; ++kind, terms += count) {
    double sum[1] = {};
#pragma unroll 8
    for (int64_t r = begin + threadIdx.x; r < end; r += blockDim.x) sum[0] += terms[r];
    add_up(sum, blockDim.x);
    if (threadIdx.x == 0) sums[kind * gridDim.x + blockIdx.x] = sum[0];
  }
}

// loss and z of the sums [3][count] of all rows, times scale = 1 / sum of t w_y (mean; 1 where that is 0).
__global__ void __launch_bounds__(kThreads)
    cross_entropy_finish_kernel(const __grid_constant__ CrossEntropy p, const double* sums, int64_t count) {
  double sum[3] = {};
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    for (int kind = 0; kind < 3; ++kind) sum[kind] += sums[kind * count + i];
  add_up(sum, kThreads);
  if (threadIdx.x) return;
  const double scale = p.reduction == Reduction::mean && sum[2] != 0 ? 1 / sum[2] : 1;
  *static_cast<float*>(p.scale) = float(scale);
  if (p.reduction == Reduction::none) return;
  *static_cast<float*>(p.loss.data) = float(sum[0] * scale);
  *static_cast<float*>(p.z.data) = float(sum[1] * scale);
}

// Threads side by side in a row: as many as have something to do, up to `most`.
int log_width_of(int64_t cols, int packet, int most) {
  int log_width = 0;
  while ((int64_t(kStep) * packet << log_width) < cols + packet - 1 && log_width < most) ++log_width;
  return log_width;
}

void run_rows(const CrossEntropy& p, const Queue& queue) {
  if (p.rows.count == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    int log_width = log_width_of(p.cols, kPacket<T>, 8);
    if (log_width == 8)  // over four steps of a warp: a block
      log_width = p.cols * int64_t(sizeof(T)) < kLongRow ? 8 : 10;
    else
      log_width = std::min(log_width, 5);
    const int threads = log_width == 10 ? 1024 : kThreads, high = threads >> log_width;
    launch<cross_entropy_rows_kernel<T>>(cdiv(p.rows.count, high), threads, threads / 32 * 3 * sizeof(float),
                                         queue, p, factors(p), log_width);
  });
}

Matrix contiguous(const Rows& rows, void* data) {
  Matrix m{data, {}};
  int64_t stride = 1;
  for (int d = rows.dims - 1; d >= 0; --d) {
    m.stride[d] = stride;
    stride *= rows.size[d];
  }
  return m;
}

}  // namespace

void cross_entropy_fwd(const CrossEntropy& p, const Queue& queue) {
  const int64_t count = p.rows.count, pieces = cdiv(count, kPiece);
  double* sums = nullptr;
  if (p.reduction == Reduction::none) {
    run_rows(p, queue);
  } else if (count) {
    float* terms = scratch<float>(queue, 3 * count);
    CrossEntropy q = p;
    q.loss = contiguous(p.rows, terms);
    q.z = contiguous(p.rows, terms + count);
    q.row_weight = contiguous(p.rows, terms + 2 * count);
    run_rows(q, queue);
    sums = scratch<double>(queue, 3 * pieces);
    launch<cross_entropy_sums_kernel>(pieces, kThreads, kThreads / 32 * sizeof(double), queue, terms, count,
                                      kPiece, 3, sums);
  }
  launch<cross_entropy_finish_kernel>(1, kThreads, kThreads / 32 * 3 * sizeof(double), queue, p, sums,
                                      sums ? pieces : 0);
}

void cross_entropy_bwd(const CrossEntropy& p, const Queue& queue) {
  if (p.rows.count == 0 || p.cols == 0) return;
  double* total = nullptr;
  if (p.weight && p.label_smoothing != 0) {
    total = scratch<double>(queue, 1);
    launch<cross_entropy_sums_kernel>(1, 1024, 32 * sizeof(double), queue,
                                      static_cast<const float*>(p.weight), p.cols, p.cols, 1, total);
  }
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    constexpr int N = kPacket<T>;
    const int log_width = log_width_of(p.cols, N, 8), high = kThreads >> log_width;
    const int wide = kStep * N << log_width,
              column_tiles = static_cast<int>((p.cols + N - 1 + wide - 1) / wide);
    launch<cross_entropy_bwd_kernel<T>>(cdiv(p.rows.count, high) * column_tiles, kThreads, 0, queue, p,
                                        factors(p), log_width, column_tiles, total);
  });
}

void linear_cross_entropy_rows(const CrossEntropy& p, const Queue& queue) { run_rows(p, queue); }

}  // namespace palm::cuda
