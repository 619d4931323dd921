// rms_norm and layer_norm backward: blocks go through rows, the next ones on their way into shared memory,
// and add up dweight and dbias there, float32; a second kernel adds up the blocks' sums. A row that does not
// fit is read twice. Bound by memory (reads 2 n, or 3 n with dsum, writes n).
#include "norm.cuh"

namespace palm::cuda {

constexpr int kBackwardThreads =
    512;  // of a block, at most; two of them, or four of 256, share a multiprocessor
constexpr int kGroups =
    512;  // blocks that have sums of their own: fixed, so that bits depend on shapes alone
constexpr int kMostStages = 4;  // rows that a team has under way
constexpr int kTotalColumns = 32, kTotalRows = 32;

// What a thread of backward has: `count` packets of its team's row, read from slots of its own in shared
// memory (STAGED) or from the row, and as many of each gain's sums.
template <class T, int N, bool STAGED>
struct Share {
  static constexpr int M = N < 4 ? N : 4;  // floats that shared memory moves at once
  using V = Packet<T, N>;
  const Norm& p;
  const NormPlan& plan;
  int member, count;
  float* sums;
  V* staged;

  PALM_DEVICE int64_t row_of(int block) const {
    return static_cast<int64_t>(block) * plan.teams + plan.team();
  }
  PALM_DEVICE int column_of(int k) const { return (member + k * plan.width) * N; }
  PALM_DEVICE const T* stream(int s, int64_t r) const {
    return s == 0   ? row<const T>(p.rows, p.x, r)
           : s == 1 ? row<const T>(p.rows, p.dout, r)
                    : row<const T>(p.rows, p.dsum, r);
  }
  PALM_DEVICE V* slot(int stage, int s, int k) const {
    return staged + ((stage * plan.streams + s) * plan.packets + k) * blockDim.x + threadIdx.x;
  }
  PALM_DEVICE float* shared_sum(int gain, int k, int part, int thread) const {
    const int line = (gain * plan.packets + k) * (N / M) + part;
    return sums + (line * blockDim.x + thread) * M;
  }
  PALM_DEVICE float* sum(int gain, int k, int part) const {
    if constexpr (STAGED)
      return shared_sum(gain, k, part, threadIdx.x);
    else
      return sums + static_cast<int64_t>(gain) * plan.cols + column_of(k) + part * M;
  }
  // Over the block's teams in order.
  PALM_DEVICE float total(int gain, int column) const {
    const int q = column / N, i = column % N;
    const float* from = shared_sum(gain, q / plan.width, i / M, q % plan.width) + i % M;
    float sum = 0;
    for (int t = 0; t < plan.teams; ++t) sum += from[t * plan.width * M];
    return sum;
  }

  PALM_DEVICE void bring(int block, int stage) const {
    const int64_t r = row_of(block);
    if (r < p.rows.count)
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        if (s == plan.streams) break;
        const T* from = stream(s, r);
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          if constexpr (sizeof(V) >= 4)
            copy_async<sizeof(V)>(slot(stage, s, k), from + column_of(k), true);
          else
            *slot(stage, s, k) = get<N>(from + column_of(k));
        }
      }
    commit_copies();
  }
  PALM_DEVICE void load_packet(float (&x)[N], int stage, int s, int64_t r, int k) const {
    if constexpr (STAGED)
      unpack(x, *slot(stage, s, k));
    else
      load<N>(x, stream(s, r) + column_of(k), N);
  }
  PALM_DEVICE void set_sum(int gain, int k, int part, const float (&x)[M]) const {
    if constexpr (STAGED)
      *reinterpret_cast<Packet<float, M>*>(sum(gain, k, part)) = packed<float>(x);
    else
      put(sum(gain, k, part), packed<float>(x));
  }
  PALM_DEVICE void add(int gain, int k, const float (&terms)[N]) const {
#pragma unroll
    for (int part = 0; part < N / M; ++part) {
      float total[M];
      unpack(total, *reinterpret_cast<const Packet<float, M>*>(sum(gain, k, part)));
#pragma unroll
      for (int i = 0; i < M; ++i) total[i] += terms[part * M + i];
      set_sum(gain, k, part, total);
    }
  }
  PALM_DEVICE void clear() const {
    const float zeros[M] = {};
    for (int gain = 0; gain < plan.gains; ++gain)
#pragma unroll 1
      for (int k = 0; k < count; ++k)
        for (int part = 0; part < N / M; ++part) set_sum(gain, k, part, zeros);
  }
  // dout, x^ = (x - mean) rstd and h = dout gain.
  PALM_DEVICE void terms(float (&d)[N], float (&v)[N], float (&h)[N], int stage, int64_t r, int k, float mean,
                         float rstd) const {
    load_packet(v, stage, 0, r, k);
    load_packet(d, stage, 1, r, k);
    if (p.weight) load_gain<T>(h, p.weight, p.gain_dtype == Dtype::f32, column_of(k));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = (v[i] - mean) * rstd;
      h[i] = p.weight ? rounded_product(d[i], h[i] + static_cast<float>(p.offset)) : d[i];
    }
  }
};

PALM_DEVICE void wait_stages(int stages) {
  switch (stages) {
    case 1: return wait_copies<0>();
    case 2: return wait_copies<1>();
    case 3: return wait_copies<2>();
    default: return wait_copies<kMostStages - 1>();
  }
}

// dx = rstd (h - mean h - x^ mean(h x^)) + dsum of every gridDim.x-th block of rows; their sums of dout x^
// and dout go to partial [blocks, gains, cols]. What rounding left of the mean, mean x^, is taken out of h's
// part along x^ and of x^. dx may be dout, dsum or x.
template <class T, int N, bool STAGED>
__global__ void __launch_bounds__(kBackwardThreads, STAGED ? 2 : 1)
    norm_bwd_kernel(const __grid_constant__ Norm p, const __grid_constant__ NormPlan plan, float* partial) {
  using S = Share<T, N, STAGED>;
  PALM_SHARED(float, slots);  // kSlots twice, used in turns; then the sums; then the stages
  const int bias_at = p.dweight ? 1 : 0;
  const int64_t of_block = static_cast<int64_t>(blockIdx.x) * plan.gains * plan.cols;
  float* sums = STAGED ? slots + 2 * kSlots : partial + of_block;
  auto* staged = reinterpret_cast<Packet<T, N>*>(sums + plan.gains * plan.packets * blockDim.x * N);
  const S share{p,    plan,  plan.member(), (plan.cols / N - plan.member() + plan.width - 1) / plan.width,
                sums, staged};
  share.clear();
  const int step = gridDim.x;
  if constexpr (STAGED)
#pragma unroll 1
    for (int i = 0; i + 1 < plan.stages; ++i) share.bring(blockIdx.x + i * step, i);
  int stage = 0, odd = 0;
  float mean = 0, rstd = 0, next_mean = 0, next_rstd = 0;
  const auto next = [&](int64_t r) {
    if (r >= p.rows.count) return;
    if (plan.centred) next_mean = static_cast<const float*>(p.mean)[r];
    next_rstd = static_cast<const float*>(p.rstd)[r];
  };
  next(share.row_of(blockIdx.x));
  for (int block = blockIdx.x; block < plan.blocks; block += step) {
    const int64_t r = share.row_of(block);
    mean = next_mean;
    rstd = next_rstd;
    next(share.row_of(block + step));
    if constexpr (STAGED) {
      share.bring(block + (plan.stages - 1) * step, stage ? stage - 1 : plan.stages - 1);
      wait_stages(plan.stages);
    }
    const int count = r < p.rows.count ? share.count : 0;
    float of_row[3] = {};  // h x^, h, x^
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      float d[N], v[N], h[N];
      share.terms(d, v, h, stage, r, k, mean, rstd);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        of_row[0] += h[i] * v[i];
        of_row[1] += h[i];
        of_row[2] += v[i];
        v[i] *= d[i];
      }
      if (p.dweight) share.add(0, k, v);
      if (p.dbias) share.add(bias_at, k, d);
    }
    team_sum(of_row, plan.centred ? 3 : 1, plan.width, slots + odd * kSlots);
    const float h0 = plan.centred ? of_row[1] * plan.inverse_cols : 0;
    const float v0 = plan.centred ? of_row[2] * plan.inverse_cols : 0;
    const float slant = of_row[0] * plan.inverse_cols - v0 * h0;
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      float d[N], v[N], h[N];
      share.terms(d, v, h, stage, r, k, mean, rstd);
#pragma unroll
      for (int i = 0; i < N; ++i) h[i] = rstd * ((h[i] - h0) - (v[i] - v0) * slant);
      if (p.dsum.data) {
        share.load_packet(d, stage, 2, r, k);
#pragma unroll
        for (int i = 0; i < N; ++i) h[i] += d[i];
      }
      store<N>(row<T>(p.rows, p.dx, r) + share.column_of(k), h, N);
    }
    odd ^= 1;
    stage = stage + 1 < plan.stages ? stage + 1 : 0;
  }
  if constexpr (STAGED) {
    wait_copies<0>();
    __syncthreads();
    partial += of_block;
    for (int gain = 0; gain < plan.gains; ++gain, partial += plan.cols)
#pragma unroll 1
      for (int c = threadIdx.x; c < plan.cols; c += blockDim.x) partial[c] = share.total(gain, c);
  }
}

// first [cols] = the sums over the rows of the first columns of partial [groups, width], second that of the
// others.
template <class G>
__global__ void __launch_bounds__(kTotalColumns* kTotalRows)
    norm_total_kernel(const float* partial, G* first, G* second, int groups, int64_t cols, int64_t width) {
  PALM_SHARED(float, sums);
  const int column = threadIdx.x % kTotalColumns, line = threadIdx.x / kTotalColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTotalColumns + column;
  float total = 0;
  if (c < width)
#pragma unroll 8
    for (int g = line; g < groups; g += kTotalRows) total += partial[g * width + c];
  sums[threadIdx.x] = total;
  __syncthreads();
  if (line > 0 || c >= width) return;
  for (int l = 1; l < kTotalRows; ++l) total += sums[l * kTotalColumns + column];
  (c < cols ? first[c] : second[c - cols]) = from_float<G>(total);
}

// Rows that a block has on their way, beside `fixed` bytes of shared memory, where four blocks share a
// multiprocessor (kGroups are nearly as many on an H100), else two, else one; 0 where not one row fits.
int stages_in(int arch, int64_t fixed, int64_t row) {
  const int64_t kilobytes = arch == 80 || arch == 87 ? 164 : arch == 90 || arch / 10 == 10 ? 228 : 100;
  for (int blocks : {4, 2, 1}) {
    const int64_t stages = (kilobytes * 1024 / blocks - 1024 - fixed) / row;
    if (stages >= (blocks > 1 ? 2 : 1)) return static_cast<int>(std::min<int64_t>(stages, kMostStages));
  }
  return 0;
}

// Without gains no bits depend on the number of blocks. With them their sums, 4 bytes a column, take at most
// 32 MB a gain, and are few beside the rows.
int64_t groups_of(const Norm& p, const NormPlan& plan, int multiprocessors) {
  if (plan.gains == 0) return std::min<int64_t>(plan.blocks, 4 * multiprocessors);
  const int64_t most = std::max<int64_t>(kGroups / 4, std::min<int64_t>(kGroups, (8 << 20) / p.cols));
  return std::min(most, cdiv(plan.blocks, 4));
}

template <class T, int N>
void rows_bwd(const Norm& p, const Queue& queue, NormPlan plan, int64_t groups, float* partial) {
  const int64_t elements = static_cast<int64_t>(plan.packets) * plan.threads() * N;
  const int64_t slots = 2 * kSlots * sizeof(float), sums = plan.gains * elements * sizeof(float);
  const int64_t row = plan.streams * elements * sizeof(T);
  plan.stages = stages_in(queue.arch, slots + sums, row);
  if (plan.stages)
    launch<norm_bwd_kernel<T, N, true>>(groups, plan.threads(), slots + sums + plan.stages * row, queue, p,
                                        plan, partial);
  else
    launch<norm_bwd_kernel<T, N, false>>(groups, plan.threads(), slots, queue, p, plan, partial);
}

void norm_bwd(const Norm& p, const Queue& queue, bool centred) {
  if (p.cols == 0) return;
  const int gains = (p.dweight ? 1 : 0) + (p.dbias ? 1 : 0);
  int64_t groups = 0;
  float* partial = nullptr;
  if (p.rows.count)
    with_packets(p, {&p.x, &p.dout, &p.dsum, &p.dx}, [&](auto e, auto n) {
      const int64_t packets = p.cols / n;
      NormPlan plan = planned(p, centred, packets, 1, packets <= 4 * kThreads ? kThreads : kBackwardThreads);
      plan.streams = p.dsum.data ? 3 : 2;
      plan.gains = gains;
      groups = groups_of(p, plan, queue.multiprocessors);
      if (gains) partial = scratch<float>(queue, groups * gains * p.cols);
      rows_bwd<decltype(e), n>(p, queue, plan, groups, partial);
    });
  if (gains == 0) return;
  void* first = p.dweight ? p.dweight : p.dbias;
  const int64_t width = gains * p.cols;
  with_dtype(p.gain_dtype, [&](auto g) {
    using G = decltype(g);
    launch<norm_total_kernel<G>>(cdiv(width, kTotalColumns), kTotalColumns * kTotalRows,
                                 kTotalColumns * kTotalRows * sizeof(float), queue, partial,
                                 static_cast<G*>(first), static_cast<G*>(p.dbias), static_cast<int>(groups),
                                 p.cols, width);
  });
}

void rms_norm_bwd(const Norm& p, const Queue& queue) { norm_bwd(p, queue, false); }
void layer_norm_bwd(const Norm& p, const Queue& queue) { norm_bwd(p, queue, true); }

}  // namespace palm::cuda
