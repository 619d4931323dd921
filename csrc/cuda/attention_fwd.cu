// Attention forward (Dao 2022, algorithm 1) with mma.sync: a block takes BM packed rows of one key/value head
// through the tiles of BN keys that they see.
//
// While the products with one tile of K run, its V and the next K are under way (cp.async): K has two
// buffers, V one. At head dims 64 and 128 a warp has 32 rows, so that each fragment of K and V serves two
// products; fragments of Q are read again for every tile, which leaves the registers to the sums.
#include "attention_forward.cuh"

namespace palm::cuda {

template <class T_, int D_, int BM_, int BN_, int WARPS>
struct ForwardTile {
  using T = T_;
  static constexpr int D = D_, BM = BM_, BN = BN_, THREADS = 32 * WARPS;
  static constexpr int ROWS = BM / WARPS, M = ROWS / 16, N = BN / 8;  // of a warp
  static constexpr size_t kShared = (BM + 3 * BN) * D * sizeof(T) + 2 * BN * sizeof(float) + sizeof(Work<T>);
  static_assert(BN <= THREADS && ROWS <= 32);
};

// A warp's rows first.. of out and lse, by way of its rows `tile` of q in shared memory: accumulators hold
// pairs, and so a row leaves in pieces of 16 bytes.
template <int D, int M, class T>
PALM_DEVICE void store_out(const Attention& p, const Work<T>& w, int first, T* tile, const RowSums (&sums)[M],
                           const float (&o)[M][D / 8][4], bool aligned) {
  constexpr int N = kChunk<T>, CHUNKS = D / N, ROWS = 16 * M;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, G = group(p);
  const int rows = w.rows.rows, head = w.rows.head;
  const Sequence s = w.s;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = m * 16 + h * 8 + g;
      const float total = row_sum(sums[m].total[h]), inverse = total == 0 ? 0 : 1 / total;
      if (t == 0 && first + i < rows)
        *at_row<float>(p.lse, s, G, head, first + i) = log_sum(sums[m].top[h], total, unit_of(p));
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
        store_pair(element_at<D>(tile, i, d * 8 + 2 * t), o[m][d][2 * h] * inverse,
                   o[m][d][2 * h + 1] * inverse);
    }
  sync_warp();
  T* const out = static_cast<T*>(p.out.data);
  const int64_t mine = at_row<T>(p.out, s, G, head, min(first + lane % ROWS, rows - 1)) - out;
  for (int j = lane; j < ROWS * CHUNKS; j += 32) {
    const int i = j / CHUNKS, chunk = j % CHUNKS;
    T* to = out + shuffle(mine, i) + chunk * N;
    if (first + i < rows) store_chunk(to, chunk_at<D>(tile, i, chunk), int(p.D) - chunk * N, aligned);
  }
}

template <class X>
__global__ void __launch_bounds__(X::THREADS)
    attention_fwd_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys,
                         bool aligned) {
  using T = typename X::T;
  constexpr int D = X::D, BM = X::BM, BN = X::BN;
  PALM_SHARED(T, q);                                         // [BM][D]
  T *const k = q + BM * D, *const v = k + 2 * BN * D;        // [2][BN][D], [BN][D]
  float* const bias = reinterpret_cast<float*>(v + BN * D);  // [2][BN]
  Work<T>& w = *reinterpret_cast<Work<T>*>(bias + 2 * BN);
  if (threadIdx.x == 0) plan(w, p, keys, blockIdx.x, BM, BN);
  __syncthreads();
  if (w.rows.first >= w.rows.rows) return;

  const auto load_k = [&](int tile) {
    load_keys<D, BN, X::THREADS>(k + tile % 2 * BN * D, w.k, p.k.token, w.s, tile * BN, int(p.D), aligned);
    const int i = threadIdx.x, n = tile * BN + i;
    if (w.s.bias && i < BN) copy_async<4>(bias + tile % 2 * BN + i, w.s.bias + n, n < w.s.kept);
  };
  const int row = threadIdx.x / 32 * X::ROWS, end = w.tiles.end;
  int tile = w.tiles.begin;
  load_queries<D, BM, X::THREADS>(q, p, w, aligned);
  if (tile < end) load_k(tile);
  commit_copies();
  float o[X::M][D / 8][4] = {};
  RowSums sums[X::M];
  for (; tile < end; ++tile) {
    wait_copies<0>();  // K
    __syncthreads();   // and all have done with the last V
    load_keys<D, BN, X::THREADS>(v, w.v, p.v.token, w.s, tile * BN, int(p.D), aligned);
    commit_copies();
    if (tile + 1 < end) load_k(tile + 1);
    commit_copies();
    float s[X::M][X::N][4];
    score<D>(s, q, row, k + tile % 2 * BN * D, 0, p.tf32);
    softmax_step(s, sums, o, p, w, w.rows.first + row, tile * BN, w.s.bias ? bias + tile % 2 * BN : nullptr,
                 tile < w.tiles.full0 || tile >= w.tiles.full1);
    wait_copies<1>();  // V
    __syncthreads();
    add_values<D>(o, s, v, 0, p.tf32);
  }
  wait_copies<0>();
  __syncthreads();  // nobody's rows of q are under way
  store_out<D>(p, w, w.rows.first + row, q + row * D, sums, o, aligned);
}

template <class X>
static void forward(const Attention& p, const Keys& keys, const Queue& queue) {
  using T = typename X::T;
  const int64_t blocks = row_slots(p, X::BM) * p.K;
  const bool all = aligned<T>(p.q) && aligned<T>(p.k) && aligned<T>(p.v) && aligned<T>(p.out);
  if (blocks) launch<attention_fwd_kernel<X>>(dim3(blocks), X::THREADS, X::kShared, queue, p, keys, all);
}

void attention_fwd(const Attention& p, const Queue& queue) {
  check_offsets(p, queue);
  if (attention_fwd_hopper(p, queue)) return;
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
