// What attention's forward kernels share: a block's work and a warp's step, products, online softmax, of M
// tiles of 16 query rows against N tiles of 8 keys, in accumulators.
#pragma once

#include "attention.cuh"

namespace palm::cuda {

// ---- what a block works on. It stands in shared memory: the sums fill the registers, which would spill it.
template <class T>
struct Work {
  RowTile rows;
  Sequence s;
  Range tiles;     // of keys
  const T *k, *v;  // of the sequence's first key
};

// Of block `index`, by one thread.
template <class T>
PALM_DEVICE void plan(Work<T>& w, const Attention& p, const Keys& keys, int index, int BM, int BN) {
  const RowTile rows = row_tile(p, index, BM);
  w.rows = rows;
  if (rows.first >= rows.rows) return;
  const Sequence s = sequence(p, keys, rows.sequence);
  const int G = group(p), last = min(rows.first + BM, rows.rows) - 1;
  w.s = s;
  w.tiles = key_tiles(p, s, rows.first / G, last / G, BN);
  w.k = at<const T>(p.k, s.b, s.k_row, rows.head);
  w.v = at<const T>(p.v, s.b, s.k_row, rows.head);
}

template <int D, int BM, int THREADS, class T>
PALM_DEVICE void load_queries(T* tile, const Attention& p, const Work<T>& w, bool aligned) {
  const int G = group(p), first = w.rows.first, rows = w.rows.rows, head = w.rows.head;
  const Sequence s = w.s;
  load_tile<D, BM, THREADS>(tile, int(p.D), aligned, [&](int i) -> const T* {
    return first + i < rows ? at_row<const T>(p.q, s, G, head, first + i) : nullptr;
  });
}

// ---- products
// s = q k^T of rows row.. of q and key.. of k.
template <int D, int M, int N, class T>
PALM_DEVICE void score(float (&s)[M][N][4], const T* q, int row, const T* k, int key, bool tf32) {
  using X = Mma<T>;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[m][n][c] = 0;
#pragma unroll
  for (int d = 0; d < D; d += X::K) {
    typename X::A a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = X::template load_a<D>(q, row + m * 16, d);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const typename X::B b = X::template load_b<D>(k, key + n * 8, d);
#pragma unroll
      for (int m = 0; m < M; ++m) X::multiply(s[m][n], s[m][n + 1], a[m], b, tf32);
    }
  }
}
// o += p v, v from row key on.
template <int D, int M, int N, class T>
PALM_DEVICE void add_values(float (&o)[M][D / 8][4], const float (&p)[M][N][4], const T* v, int key,
                            bool tf32) {
  using X = Mma<T>;
#pragma unroll
  for (int n = 0; n < N; n += X::K / 8) {
    typename X::A a[M];
#pragma unroll
    for (int m = 0; m < M; ++m) a[m] = X::a_of(&p[m][n]);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const typename X::B b = X::template load_rows_b<D>(v, key + n * 8, d);
#pragma unroll
      for (int m = 0; m < M; ++m) X::multiply(o[m][d / 8], o[m][d / 8 + 1], a[m], b, tf32);
    }
  }
}

// ---- softmax. What works on s[N][4] is about one tile of 16 rows, of which a lane has rows g and g + 8.
// Natural scores, with the bias (shared memory, of the tile's keys) where there is one.
template <int N>
PALM_DEVICE void scale_scores(float (&s)[N][4], float scale, const float* bias) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float add = bias ? bias[n * 8 + threadIdx.x % 4 * 2 + c % 2] : 0;
      s[n][c] = fmaf(s[n][c], scale, add);
    }
}
// -inf for the keys that a row does not see; `first` is the tile's first key.
template <int N>
PALM_DEVICE void mask_scores(float (&s)[N][4], int first, const Bounds (&see)[2]) {
  const int lane_key = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int lo = see[c / 2].lo - lane_key, hi = see[c / 2].hi - lane_key;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (n * 8 + c % 2 < lo || n * 8 + c % 2 > hi) s[n][c] = -INFINITY;
  }
}

// Online softmax: the largest score so far and this lane's part of the sum of exponentials.
struct RowSums {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
};
// What the exponentials of a row are relative to: 0 where it has seen nothing, as -inf - -inf is NaN.
PALM_DEVICE float base_of(float top) { return top == -INFINITY ? 0 : top; }

// New maxima with the scores s; shrink: the factors of what was summed before. Not an fma of s unit and base
// unit in the exponents, whose rounding of base blows up beyond 1e8.
template <int N>
PALM_DEVICE void raise(RowSums& rows, const float (&s)[N][4], float unit, float (&shrink)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = rows.top[h];
#pragma unroll
    for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    shrink[h] = exp2_fast((rows.top[h] - base_of(top)) * unit);
    rows.top[h] = top;
    rows.total[h] *= shrink[h];
  }
}
// Scores become exponentials, 2^((s - top) unit).
template <int N>
PALM_DEVICE void exponentials(float (&s)[N][4], RowSums& rows, float unit) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float base = base_of(rows.top[h]);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 2 * h; c < 2 * h + 2; ++c) s[n][c] = exp2_fast((s[n][c] - base) * unit);
      rows.total[h] += s[n][2 * h] + s[n][2 * h + 1];
    }
  }
}
template <int N>
PALM_DEVICE void scale_rows(float (&o)[N][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int c = 0; c < 4; ++c) o[n][c] *= factor[c / 2];
}
// The sum over the four lanes of a row.
PALM_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
// log sum exp of a row in natural units, -inf where it saw nothing.
PALM_DEVICE float log_sum(float top, float total, float unit) {
  return total == 0 ? -INFINITY : top * (unit / kLog2e) + logf(total);
}

// One step over a warp's keys key.. (`bias` is theirs) of its packed rows row..: scores become exponentials,
// o shrinks to the new maxima. Warps that `masked` call with all their lanes.
template <int M, int N, int DN, class T>
PALM_DEVICE void softmax_step(float (&s)[M][N][4], RowSums (&sums)[M], float (&o)[M][DN][4],
                              const Attention& p, const Work<T>& w, int row, int key, const float* bias,
                              bool masked) {
  if (!folds(p)) {
#pragma unroll
    for (int m = 0; m < M; ++m) scale_scores(s[m], float(p.scale), bias);
  }
  if (masked) {  // lane i looks after row i
    const int lane = threadIdx.x % 32, mine = min(row + lane % (16 * M), w.rows.rows - 1);
    const Bounds see = visible(p, w.s, mine / group(p));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int a = m * 16 + lane / 4, b = a + 8;
      mask_scores(s[m], key,
                  {{shuffle(see.lo, a), shuffle(see.hi, a)}, {shuffle(see.lo, b), shuffle(see.hi, b)}});
    }
  }
  float shrink[M][2];
  bool same = true;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    raise(sums[m], s[m], unit_of(p), shrink[m]);
    same = same && shrink[m][0] == 1 && shrink[m][1] == 1;
  }
  if (ballot(!same)) {  // maxima soon stay what they are
#pragma unroll
    for (int m = 0; m < M; ++m) scale_rows(o[m], shrink[m]);
  }
#pragma unroll
  for (int m = 0; m < M; ++m) exponentials(s[m], sums[m], unit_of(p));
}

}  // namespace palm::cuda
