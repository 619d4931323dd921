// Attention forward (Dao 2022, algorithm 1) with mma.sync: a block takes BM packed rows of one key/value head
// through the tiles of BN keys that they see.
//
// While the products with one tile of K run, its V and the next K are under way (cp.async): K has two
// buffers, V one. At head dims 64 and 128 a warp has 32 rows, so that each fragment of K and V serves two
// products; fragments of Q are read again for every tile, which leaves the registers to the sums.
#include "attention.cuh"

namespace palm::cuda {

// What a block works on. It stands in shared memory: in registers, which the sums fill, it would be spilled.
template <class T>
struct Work {
  RowTile rows;
  Sequence s;
  Range tiles;
  const T *k, *v;  // of the sequence's first key
  bool fits;       // 16-byte accesses
};

template <class T_, int D_, int BM_, int BN_, int WARPS>
struct ForwardTile {
  using T = T_;
  static constexpr int D = D_, BM = BM_, BN = BN_, THREADS = 32 * WARPS;
  static constexpr int ROWS = BM / WARPS, M = ROWS / 16, N = BN / 8;
  static constexpr size_t kShared = (BM + 3 * BN) * D * sizeof(T) + 2 * BN * sizeof(float) + sizeof(Work<T>);
  static_assert(BN <= THREADS && ROWS <= 32);

  const Attention& p;
  T *q, *k, *v;  // [BM][D], [2][BN][D], [BN][D]
  float* bias;   // [2][BN]
  Work<T>& w;
  PALM_DEVICE ForwardTile(const Attention& p, T* shared)
      : p(p),
        q(shared),
        k(q + BM * D),
        v(k + 2 * BN * D),
        bias(reinterpret_cast<float*>(v + BN * D)),
        w(*reinterpret_cast<Work<T>*>(bias + 2 * BN)) {}

  static PALM_DEVICE int warp_row() { return threadIdx.x / 32 * ROWS; }
};

// By one thread.
template <class X>
PALM_DEVICE void plan(const X& x, const Keys& keys, bool fits) {
  const RowTile rows = row_tile(x.p, blockIdx.x, X::BM);
  x.w.rows = rows;
  if (rows.first >= rows.rows) return;
  const Sequence s = sequence(x.p, keys, rows.sequence);
  const int G = group(x.p), last = min(rows.first + X::BM, rows.rows) - 1;
  x.w.s = s;
  x.w.tiles = key_tiles(x.p, s, rows.first / G, last / G, X::BN);
  x.w.k = at<const typename X::T>(x.p.k, s.b, s.k_row, rows.head);
  x.w.v = at<const typename X::T>(x.p.v, s.b, s.k_row, rows.head);
  x.w.fits = fits;
}

template <class X>
PALM_DEVICE void load_q(const X& x) {
  const int G = group(x.p), first = x.w.rows.first, head = x.w.rows.head;
  const Sequence s = x.w.s;
  load_rows<X::D, X::BM, X::THREADS>(x.q, x.w.rows.rows - first, int(x.p.D), x.w.fits, [&](int i) {
    return at_row<const typename X::T>(x.p.q, s, G, head, first + i);
  });
}
// Tile `tile` of K into its buffer, and the bias of its keys.
template <class X>
PALM_DEVICE void load_k(const X& x, int tile) {
  const int buffer = tile & 1, i = threadIdx.x, n = tile * X::BN + i;
  load_keys<X::D, X::BN, X::THREADS>(x.k + buffer * X::BN * X::D, x.w.k, x.p.k.token, x.w.s, tile * X::BN,
                                     int(x.p.D), x.w.fits);
  if (x.w.s.bias && i < X::BN) copy_async<4>(x.bias + buffer * X::BN + i, x.w.s.bias + n, n < x.w.s.kept);
}
template <class X>
PALM_DEVICE void load_v(const X& x, int tile) {
  load_keys<X::D, X::BN, X::THREADS>(x.v, x.w.v, x.p.v.token, x.w.s, tile * X::BN, int(x.p.D), x.w.fits);
}

// Scores of one tile to exponentials: s in place, o shrunk to the new maxima.
template <class X>
PALM_DEVICE void softmax(const X& x, float (&s)[X::M][X::N][4], RowSums (&sums)[X::M],
                         float (&o)[X::M][X::D / 8][4], int tile) {
  if (!folds(x.p)) {
    const float* bias = x.w.s.bias ? x.bias + (tile & 1) * X::BN : nullptr;
#pragma unroll
    for (int m = 0; m < X::M; ++m) scale_scores(s[m], float(x.p.scale), bias);
  }
  if (tile < x.w.tiles.full0 || tile >= x.w.tiles.full1) {
    const int lane = threadIdx.x % 32, row = x.w.rows.first + X::warp_row() + lane % X::ROWS;
    const Bounds mine = visible(x.p, x.w.s, min(row, x.w.rows.rows - 1) / group(x.p));
#pragma unroll
    for (int m = 0; m < X::M; ++m) {
      const int a = m * 16 + lane / 4, b = a + 8;
      mask_scores(s[m], tile * X::BN,
                  {{shuffle(mine.lo, a), shuffle(mine.hi, a)}, {shuffle(mine.lo, b), shuffle(mine.hi, b)}});
    }
  }
#pragma unroll
  for (int m = 0; m < X::M; ++m) {
    float shrink[2];
    exponentials(s[m], sums[m], unit_of(x.p), shrink);
    scale_rows(o[m], shrink);
  }
}

// Through the warp's own rows of q, so that a row leaves in pieces of 16 bytes: accumulators hold pairs.
template <class X>
PALM_DEVICE void store_out(const X& x, RowSums (&sums)[X::M], float (&o)[X::M][X::D / 8][4]) {
  using T = typename X::T;
  constexpr int PACKET = kChunk<T>, CHUNKS = X::D / PACKET;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, G = group(x.p);
  const int first = x.w.rows.first + X::warp_row(), rows = x.w.rows.rows;
  T* const tile = x.q + X::warp_row() * X::D;
  const Sequence s = x.w.s;
#pragma unroll
  for (int m = 0; m < X::M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = m * 16 + h * 8 + g;
      const float total = row_sum(sums[m].total[h]), inverse = total == 0 ? 0 : 1 / total;
      if (t == 0 && first + i < rows)
        *at_row<float>(x.p.lse, s, G, x.w.rows.head, first + i) =
            log_sum(sums[m].top[h], total, unit_of(x.p));
#pragma unroll
      for (int d = 0; d < X::D / 8; ++d)
        store_pair(element_at<X::D>(tile, i, d * 8 + 2 * t), o[m][d][2 * h] * inverse,
                   o[m][d][2 * h + 1] * inverse);
    }
  sync_warp();
  T* const out = static_cast<T*>(x.p.out.data);
  const int64_t mine = at_row<T>(x.p.out, s, G, x.w.rows.head, min(first + lane % X::ROWS, rows - 1)) - out;
  for (int j = lane; j < X::ROWS * CHUNKS; j += 32) {
    const int i = j / CHUNKS, chunk = j % CHUNKS, column = chunk * PACKET;
    T* to = out + shuffle(mine, i) + column;
    if (first + i < rows) store_chunk(to, chunk_at<X::D>(tile, i, chunk), int(x.p.D) - column, x.w.fits);
  }
}

template <class X>
__global__ void __launch_bounds__(X::THREADS)
    attention_fwd_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys, bool fits) {
  PALM_SHARED(typename X::T, shared);
  const X x(p, shared);
  if (threadIdx.x == 0) plan(x, keys, fits);
  __syncthreads();
  if (x.w.rows.first >= x.w.rows.rows) return;
  float o[X::M][X::D / 8][4] = {};
  RowSums sums[X::M];
  load_q(x);
  int j = x.w.tiles.begin;
  const int end = x.w.tiles.end;
  if (j < end) load_k(x, j);
  commit_copies();
  for (; j < end; ++j) {
    wait_copies<0>();  // K of this tile
    __syncthreads();   // and all have done with V of the last one
    load_v(x, j);
    commit_copies();
    if (j + 1 < end) load_k(x, j + 1);
    commit_copies();
    float s[X::M][X::N][4];
    score<X::D>(s, x.q, X::warp_row(), x.k + (j & 1) * X::BN * X::D, 0, p.tf32);
    softmax(x, s, sums, o, j);
    wait_copies<1>();  // V
    __syncthreads();
    add_values<X::D>(o, s, x.v, 0, p.tf32);
  }
  wait_copies<0>();
  __syncthreads();  // before rows of q are overwritten
  store_out(x, sums, o);
}

template <class X>
static void forward(const Attention& p, const Keys& keys, const Queue& queue) {
  using T = typename X::T;
  const int64_t blocks = row_slots(p, X::BM) * p.K;
  const bool fits =
      p.D % kChunk<T> == 0 && aligned<T>(p.q) && aligned<T>(p.k) && aligned<T>(p.v) && aligned<T>(p.out);
  if (blocks) launch<attention_fwd_kernel<X>>(dim3(blocks), X::THREADS, X::kShared, queue, p, keys, fits);
}

void attention_fwd(const Attention& p, const Queue& queue) {
  check_offsets(p, queue);
  const Keys keys = compact_keys(p, queue);
  with_dtype(p.dtype, [&](auto e) {
    with_head_dim(p.D, [&](auto d) {
      using T = decltype(e);
      constexpr int D = d;
      if constexpr (std::is_same_v<T, float>) {
        if constexpr (D == 64) forward<ForwardTile<T, D, 128, 32, 4>>(p, keys, queue);
        if constexpr (D == 128) forward<ForwardTile<T, D, 128, 16, 4>>(p, keys, queue);
        if constexpr (D == 256) forward<ForwardTile<T, D, 32, 16, 2>>(p, keys, queue);
      } else if constexpr (D < 256) {
        forward<ForwardTile<T, D, 128, 64, 4>>(p, keys, queue);
      } else {
        using Large = ForwardTile<T, D, 128, 64, 8>;
        if (Large::kShared <= shared_limit(queue))
          forward<Large>(p, keys, queue);
        else
          forward<ForwardTile<T, D, 64, 32, 4>>(p, keys, queue);
      }
    });
  });
}

}  // namespace palm::cuda
