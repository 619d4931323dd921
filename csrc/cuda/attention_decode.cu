// Attention of a few new tokens to a cache (Flash-Decoding): the cache is split over blocks, a second kernel
// merges their sums. Bound by memory: a block reads its part of K and V once, for all query heads of a
// key/value head, with 48 KB of it under way at any time.
//
// Up to 16 packed query rows are one tile that all warps share, each with its own keys; more rows are four
// tiles, one a warp.
#include "attention_forward.cuh"

namespace palm::cuda {

constexpr int kDecodeThreads = 128, kMergeThreads = 256, kMaxParts = 128;

template <class T_, int D_, int ROW_WARPS_>
struct DecodeTile {
  using T = T_;
  static constexpr int D = D_, ROW_WARPS = ROW_WARPS_, BM = 16 * ROW_WARPS;
  static constexpr int SLOTS = 4, BN = (16 << 10) / (D * sizeof(T));  // keys: 16 KB a slot
  static constexpr int KEY_WARPS = 4 / ROW_WARPS < BN / 16 ? 4 / ROW_WARPS : BN / 16;
  static constexpr int KEYS = BN / KEY_WARPS;  // of a warp
  static constexpr size_t kShared =
      (SLOTS * BN + BM) * D * sizeof(T) + 2 * BN * sizeof(float) + sizeof(Work<T>);
  static_assert(KEY_WARPS * BM * 4 <= SLOTS * BN * int(sizeof(T)));  // their sums replace the cache
};

// The largest score of a row and the sum of exponentials relative to it.
struct Sum {
  float top, total;
};
// What stands between the two kernels: out [count][rows][width], relative to the tops in sums [count][rows].
// One part: nothing does.
struct Parts {
  int count, width;
  int64_t rows;  // B K T G
  float* out;
  Sum* sums;
};

// A tile of the cache; of keys that a bias removes nothing is read.
template <class X, class T = typename X::T>
PALM_DEVICE void load_cache(T* tile, const Attention& p, const Work<T>& w, const T* base, int64_t stride,
                            const float* bias, int first, bool aligned) {
  load_tile<X::D, X::BN, kDecodeThreads>(tile, int(p.D), aligned, [&](int i) -> const T* {
    const int n = first + i;
    return n < w.s.kept && (!bias || bias[n * p.bias_token] != -INFINITY) ? base + n * stride : nullptr;
  });
}

// Four columns of row r of (b, head); lse beside the first.
template <class T>
PALM_DEVICE void store_row(const Attention& p, int b, int head, int r, int column, const float (&x)[4],
                           Sum sum) {
  const int G = group(p), token = r / G, q_head = head * G + r % G;
  const float inverse = sum.total == 0 ? 0 : 1 / sum.total;
  T* to = at<T>(p.out, b, token, q_head) + column;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (column + c < p.D) to[c] = from_float<T>(x[c] * inverse);
  if (column == 0) *at<float>(p.lse, b, token, q_head) = log_sum(sum.top, sum.total, unit_of(p));
}

// Adds what the KEY_WARPS warps of each row have in out [KEY_WARPS][BM][D] and sums [KEY_WARPS][BM].
template <class X>
PALM_DEVICE void merge_warps(const Attention& p, const Parts& parts, const Work<typename X::T>& w, float* out,
                             const Sum* sums) {
  const float unit = unit_of(p);
  const int rows = min(X::BM, w.rows.rows - w.rows.first);
  for (int i = threadIdx.x; i < rows * (X::D / 4); i += kDecodeThreads) {
    const int r = i / (X::D / 4), column = i % (X::D / 4) * 4;
    if (column >= p.D) continue;
    Sum sum{-INFINITY, 0};
#pragma unroll
    for (int k = 0; k < X::KEY_WARPS; ++k) sum.top = fmaxf(sum.top, sums[k * X::BM + r].top);
    float x[4] = {};
#pragma unroll
    for (int k = 0; k < X::KEY_WARPS; ++k) {
      const Sum one = sums[k * X::BM + r];
      const float weight = exp2_fast((one.top - base_of(sum.top)) * unit);
      const float* from = element_at<X::D>(out, k * X::BM + r, column);
      sum.total += weight * one.total;
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] += weight * from[c];
    }
    if (parts.count == 1) {
      store_row<typename X::T>(p, w.s.b, w.rows.head, w.rows.first + r, column, x, sum);
    } else {
      const int64_t pair = int64_t(w.s.b) * p.K + w.rows.head;
      const int64_t row = blockIdx.y * parts.rows + pair * w.rows.rows + w.rows.first + r;
      store<4>(parts.out + row * parts.width + column, x, 4);
      if (column == 0) parts.sums[row] = sum;
    }
  }
}

// Block (x, y): part y of what tile x of the query rows sees.
template <class X>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_kernel(const __grid_constant__ Attention p, const __grid_constant__ Parts parts,
                            bool aligned) {
  using T = typename X::T;
  constexpr int D = X::D, BM = X::BM, BN = X::BN, N = X::KEYS / 8;
  PALM_SHARED(T, slots);                                     // [SLOTS][BN][D]
  T* const q = slots + X::SLOTS * BN * D;                    // [BM][D]
  float* const bias = reinterpret_cast<float*>(q + BM * D);  // [2][BN]
  Work<T>& w = *reinterpret_cast<Work<T>*>(bias + 2 * BN);
  if (threadIdx.x == 0) {
    plan(w, p, Keys{}, blockIdx.x, BM, BN);
    Range& tiles = w.tiles;
    const int share = int(cdiv(tiles.end - tiles.begin, parts.count));
    tiles.begin += blockIdx.y * share;
    tiles.end = max(tiles.begin, min(tiles.begin + share, tiles.end));
  }
  __syncthreads();

  const float* all_bias = static_cast<const float*>(p.key_bias);
  if (all_bias) all_bias += w.s.b * p.bias_batch;
  const auto slot = [&](int item) { return slots + item % X::SLOTS * BN * D; };
  const auto bias_of = [&](int item) { return bias + item / 2 % 2 * BN; };
  const auto load = [&](int item) {  // K of tile item / 2 of the part, or V
    const int tile = w.tiles.begin + item / 2, n = tile * BN + threadIdx.x;
    if (tile < w.tiles.end) {
      const bool values = item % 2;
      load_cache<X>(slot(item), p, w, values ? w.v : w.k, values ? p.v.token : p.k.token, all_bias, tile * BN,
                    aligned);
      if (all_bias && !values && threadIdx.x < BN)
        copy_async<4>(bias_of(item) + threadIdx.x, all_bias + n * p.bias_token, n < w.s.kept);
    }
    commit_copies();
  };
  const int warp = shuffle(int(threadIdx.x / 32), 0), row = warp % X::ROW_WARPS * 16,
            key_warp = warp / X::ROW_WARPS;
  const int key = key_warp * X::KEYS, items = 2 * (w.tiles.end - w.tiles.begin);
  const bool works = X::KEY_WARPS * X::ROW_WARPS == 4 || key_warp < X::KEY_WARPS;
  load_queries<D, BM, kDecodeThreads>(q, p, w, aligned);
#pragma unroll 1
  for (int item = 0; item < X::SLOTS - 1; ++item) load(item);
  float o[1][D / 8][4] = {}, s[1][N][4] = {};
  RowSums sums[1];
  for (int item = 0; item < items; ++item) {
    wait_copies<X::SLOTS - 2>();
    __syncthreads();  // this item is there, all have done with the last one
    load(item + X::SLOTS - 1);
    if (!works) continue;
    if (item % 2 == 0) {
      const int tile = w.tiles.begin + item / 2;
      score<D>(s, q, row, slot(item), key, p.tf32);
      softmax_step(s, sums, o, p, w, w.rows.first + row, tile * BN + key,
                   all_bias ? bias_of(item) + key : nullptr, tile < w.tiles.full0 || tile >= w.tiles.full1);
    } else {
      add_values<D>(o, s, slot(item), key, p.tf32);
    }
  }
  wait_copies<0>();
  __syncthreads();

  float* const all_out = reinterpret_cast<float*>(slots);
  Sum* const all_sums = reinterpret_cast<Sum*>(q);
  if (works) {
    const int thread = thread_again(), g = thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = thread / 32 * 16 + h * 8 + g;  // key_warp BM + row + ...
      const float total = row_sum(sums[0].total[h]);
      if (t == 0) all_sums[r] = {sums[0].top[h], total};
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        store_pair(element_at<D>(all_out, r, d * 8 + 2 * t), o[0][d][2 * h], o[0][d][2 * h + 1]);
    }
  }
  __syncthreads();
  merge_warps<X>(p, parts, w, all_out, all_sums);
}

// One row a block: threads take 4 columns of every few parts, then add up theirs.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts_kernel(const __grid_constant__ Attention p, const __grid_constant__ Parts parts) {
  PALM_SHARED(float, weights);                                             // [kMaxParts]
  float4* const columns = reinterpret_cast<float4*>(weights + kMaxParts);  // [step][groups]
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const Sum* sums = parts.sums + row;
  Sum sum{-INFINITY, 0};
  for (int i = lane; i < parts.count; i += 32) sum.top = fmaxf(sum.top, sums[i * parts.rows].top);
  sum.top = warp_max(sum.top);
  for (int i = lane; i < parts.count; i += 32) {
    const Sum one = sums[i * parts.rows];
    const float weight = exp2_fast((one.top - base_of(sum.top)) * unit_of(p));
    sum.total += weight * one.total;
    if (threadIdx.x < 32) weights[i] = weight;
  }
  sum.total = warp_sum(sum.total);
  __syncthreads();

  const int groups = parts.width / 4, step = kMergeThreads / groups;
  const int column = threadIdx.x % groups * 4, first = threadIdx.x / groups;
  float x[4] = {};
  if (first < step) {
#pragma unroll 4
    for (int i = first; i < parts.count; i += step) {
      float y[4];
      load<4>(y, parts.out + (i * parts.rows + row) * parts.width + column, 4);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] += weights[i] * y[c];
    }
    columns[threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
  }
  __syncthreads();
  if (first > 0) return;
  for (int i = 1; i < step; ++i) {
    const float4 y = columns[i * groups + threadIdx.x];
    x[0] += y.x;
    x[1] += y.y;
    x[2] += y.z;
    x[3] += y.w;
  }
  const int rows = int(p.T) * group(p), pair = int(row / rows);
  store_row<T>(p, pair / int(p.K), pair % int(p.K), int(row % rows), column, x, sum);
}

template <class X>
static void decode(const Attention& p, const Queue& queue) {
  using T = typename X::T;
  const int64_t tiles = row_slots(p, X::BM) * p.K, rows = p.B * p.T * p.H;
  // Two blocks a multiprocessor, none without a tile of keys.
  const int64_t wanted = min(2 * queue.multiprocessors / tiles, (p.S + X::BN - 1) / X::BN);
  Parts parts{int(max(int64_t(1), min(wanted, int64_t(kMaxParts)))), int(p.D + 3) / 4 * 4, rows, nullptr,
              nullptr};
  if (parts.count > 1) {
    parts.out = scratch<float>(queue, parts.count * rows * parts.width);
    parts.sums = scratch<Sum>(queue, parts.count * rows);
  }
  const bool all = aligned<T>(p.q) && aligned<T>(p.k) && aligned<T>(p.v);
  launch<attention_decode_kernel<X>>(dim3(tiles, parts.count), kDecodeThreads, X::kShared, queue, p, parts,
                                     all);
  if (parts.count > 1)
    launch<merge_parts_kernel<T>>(dim3(rows), kMergeThreads,
                                  kMaxParts * sizeof(float) + kMergeThreads * sizeof(float4), queue, p,
                                  parts);
}

void attention_decode(const Attention& p, const Queue& queue) {
  if (p.B * p.T * p.H == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    with_head_dim(p.D, [&](auto d) {
      using T = decltype(e);
      // The sums of four row tiles of 256 float32 columns would not fit: there 16 rows are a tile always.
      if constexpr (sizeof(T) * d < 1024)
        if (p.T * (p.H / p.K) > 16) return decode<DecodeTile<T, d, 4>>(p, queue);
      decode<DecodeTile<T, d, 1>>(p, queue);
    });
  });
}

}  // namespace palm::cuda
