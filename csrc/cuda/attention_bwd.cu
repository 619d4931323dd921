// Attention backward in two passes without atomics (Dao 2022, algorithm 4): dq by tiles of packed rows, then
// dk, dv and dbias by tiles of kept keys over the rows of all heads, so that every sum has one owner and one
// order. The first pass leaves lse, delta and bounds of its rows for the second.
//
// p = exp(scale q k + bias - lse), dp = dout v, delta = rowsum(dout out) - dlse, ds = p (dp - delta):
// dq = scale ds k, dk = scale ds^T q, dv = p^T dout, dbias = the sum of ds over rows.
//
// Both passes have one shape. A block holds two tiles (q and dout; k and v) and moves along two others (k and
// v; q and dout). Scores stand as [held][moved], so that p and ds are left operands of the sums as they are.
#include <stdexcept>

#include "attention_backward.cuh"

namespace palm::cuda {

// ---- first pass: dq
// By one thread.
template <class P, class T = typename P::T>
PALM_DEVICE void plan_rows(Backward<T>& w, const Attention& p, const Keys& keys, Row* rows) {
  const RowTile tile = row_tile(p, blockIdx.x, P::HELD);
  const int G = group(p), count = min(tile.rows - tile.first, P::HELD);
  w.count = count;
  if (count <= 0) return;
  const Sequence s = sequence(p, keys, tile.sequence);
  begin_work<P>(w, p, s, tile.head, tile.first, count);
  w.range = key_tiles(p, s, tile.first / G, (tile.first + count - 1) / G, P::MOVED);
  w.moved[0] = at<const T>(p.k, s.b, s.k_row, tile.head);
  w.moved[1] = at<const T>(p.v, s.b, s.k_row, tile.head);
  w.rows = rows + tile.slot * P::HELD;
}

// This block's rows: bounds, lse and -dlse, but not yet rowsum(dout out).
template <class P, class T = typename P::T>
PALM_DEVICE void begin_rows(const Attention& p, const Backward<T>& w, Row* rows) {
  for (int i = threadIdx.x; i < P::HELD; i += P::THREADS) {
    const int r = w.first + i;
    Row row{INFINITY, 0, 0x7fffffff, -1};
    if (i < w.count) {
      const Bounds seen = visible(p, w.s, r / w.G);
      const float lse = *at_row<const float>(p.lse, w.s, w.G, w.head, r);
      if (seen.lo <= seen.hi && lse != -INFINITY) {
        row = {p.key_bias ? lse : lse * kLog2e, 0, seen.lo, seen.hi};
        if (p.dlse.data) row.delta = -*at_row<const float>(p.dlse, w.s, w.G, w.head, r);
      }
    }
    rows[i] = row;
  }
}

// Adds rowsum(dout out) and leaves the rows to the second pass.
template <class P, class T = typename P::T>
PALM_DEVICE void finish_rows(Row* rows, const T* dout, const T* out, Row* left) {
  constexpr int WIDTH = P::THREADS / P::HELD, N = kChunk<T>, CHUNKS = P::D / N / WIDTH;
  const int i = threadIdx.x / WIDTH, part = threadIdx.x % WIDTH;
  float sum = 0;
  for (int c = part * CHUNKS; c < (part + 1) * CHUNKS; ++c) {
    float x[N], y[N];
    load<N>(x, chunk_at<P::D>(dout, i, c), N);
    load<N>(y, chunk_at<P::D>(out, i, c), N);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += x[j] * y[j];
  }
  sum = warp_sum<WIDTH>(sum);
  if (part == 0) {
    Row row = rows[i];
    if (!P::EXACT || row.lo != row.hi) row.delta += sum;
    rows[i] = left[i] = row;
  }
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 256 / P::THREADS)
    attention_dq_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys, Row* rows,
                        bool aligned) {
  using T = typename P::T;
  constexpr int D = P::D;
  PALM_SHARED(typename P::Shared, shared);
  const Backward<T>& w = shared->work;
  if (threadIdx.x == 0) plan_rows<P>(shared->work, p, keys, rows);
  __syncthreads();
  if (w.count <= 0) return;
  const int dim = int(p.D);
  const Lane<P> lane;

  begin_rows<P>(p, w, shared->held_rows);
  __syncthreads();
  const Cursor cursor = cursor_at<P>(w.first, w.G);
  const auto load_held = [&](T* to, const Heads& x) {
    const T* from = at<const T>(x, w.s.b, w.s.q_row, int64_t(w.head) * w.G);
    load_seen<P, P::HELD>(to, from, x, cursor, shared->held_rows, w, dim, aligned);
  };
  T* out = shared->moved[0][0];
  static_assert(sizeof shared->moved >= sizeof(T) * P::HELD * D);
  load_held(shared->held[0], p.q);
  load_held(shared->held[1], p.dout);
  load_held(out, p.out);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  finish_rows<P>(shared->held_rows, shared->held[1], out, w.rows);
  __syncthreads();
  Row mine[P::M * 2];
#pragma unroll
  for (int i = 0; i < P::M * 2; ++i) mine[i] = shared->held_rows[lane.held_row(i)];

  const auto load = [&](int j, int stage) {
    const int first = j * P::MOVED, i = threadIdx.x;
    load_keys<D, P::MOVED, P::THREADS>(shared->moved[stage][0], w.moved[0], p.k.token, w.s, first, dim,
                                       aligned);
    load_keys<D, P::MOVED, P::THREADS>(shared->moved[stage][1], w.moved[1], p.v.token, w.s, first, dim,
                                       aligned);
    if (w.s.bias && i < P::MOVED)
      copy_async<4>(&shared->moved_bias[stage][i], w.s.bias + first + i, first + i < w.s.kept);
  };
  typename P::Sums dq{};
  const auto compute = [&](int j, int stage) {
    const T *k = shared->moved[stage][0], *v = shared->moved[stage][1];
    typename P::Scores qk, dp;
    score<D>(qk, shared->held[0], lane.row, k, lane.moved, p.tf32);
    score<D>(dp, shared->held[1], lane.row, v, lane.moved, p.tf32);
    const bool masked = j < w.range.full0 || j >= w.range.full1;
    gradients<P>(qk, dp, p.key_bias, w.scale, masked, [&](int i, int c) {
      const int n = lane.moved_row(c);
      return Pair{mine[i], shared->moved_bias[stage][n], j * P::MOVED + n};
    });
    if constexpr (P::PARTS > 1) {
      share<P>(shared->left[1], dp, lane);
      sync_named(1 + lane.group, 32 * P::PARTS);
    }
    add<P>(dq, dp, shared->left[1], k, lane, p.tf32);
  };
  pipeline<P::STAGES>(w.range.begin, w.range.end, load, compute);

  T* result = shared->held[0];
  round_to<P>(result, dq, lane, [&](int i) { return mine[i].lse < INFINITY ? w.scale : 0.f; });
  __syncthreads();
  store_rows<P>(result, w.count, dim, aligned,
                [&](int i) { return at_row<T>(p.dq, w.s, w.G, w.head, w.first + i); });
}

// ---- second pass: dk, dv, dbias
struct KeyTile {
  int head, sequence, first;  // keys of the sequence, also beyond its last one
};
// Of block `index` of K key_slots(p, BN): earlier keys first, since under causal more rows see them.
PALM_DEVICE KeyTile key_tile(const Attention& p, int64_t index, int BN) {
  if (p.cu_k) {
    const int64_t slots = p.k_rows / BN + p.B;
    int64_t tile;
    const int b = locate(p.cu_k, p.B, 1, BN, index % slots, tile);
    return {int(index / slots), b, int(tile * BN)};
  }
  const int64_t bk = index % (p.B * p.K);
  return {int(bk % p.K), int(bk / p.K), int(index / (p.B * p.K) * BN)};
}

// Where the slots of key/value head `head` of sequence b begin.
PALM_DEVICE int64_t first_slot(const Attention& p, int head, int b, int BM) {
  const int64_t G = group(p), tiles = cdiv(p.T * G, BM);
  return p.cu_q ? head * (p.q_rows * G / BM + p.B) + p.cu_q[b] * G / BM + b : (head * p.B + b) * tiles;
}

// Tiles of BM packed rows that see keys j0..j1, [begin, end); every row of [full0, full1) sees all of them.
PALM_DEVICE Range row_tiles(const Attention& p, const Sequence& s, int64_t j0, int64_t j1, int G, int BM) {
  const int64_t shift = int64_t(s.S) - s.T, T = s.T;
  int64_t t0 = 0, t1 = T, full0 = 0, full1 = T;
  if (p.causal) {
    t0 = j0 < s.prefix ? 0 : j0 - shift;
    full0 = j1 < s.prefix ? 0 : j1 - shift;
  }
  if (p.right >= 0) {
    t0 = max(t0, j0 - p.right - shift);
    full0 = max(full0, j1 - p.right - shift);
  }
  if (p.left >= 0) {
    t1 = min(t1, j1 + p.left - shift + 1);
    full1 = min(full1, j0 + p.left - shift + 1);
  }
  const auto row = [&](int64_t t) { return min(max(t, int64_t(0)), T) * G; };
  Range r;
  r.begin = int(row(t0) / BM);
  r.end = max(r.begin, int(cdiv(row(t1), BM)));
  r.full0 = min(max(int(cdiv(row(full0), BM)), r.begin), r.end);
  r.full1 = min(max(int(row(full1) / BM), r.full0), r.end);
  return r;
}

// By one thread.
template <class P, class T = typename P::T>
PALM_DEVICE void plan_keys(Backward<T>& w, const Attention& p, const Keys& keys, Row* rows) {
  const KeyTile tile = key_tile(p, blockIdx.x, P::HELD);
  const Sequence s = sequence(p, keys, tile.sequence);
  const int G = group(p), count = min(s.kept - tile.first, P::HELD), last = tile.first + count - 1;
  begin_work<P>(w, p, s, tile.head, tile.first, count);
  if (count <= 0) return;
  w.range = s.position ? row_tiles(p, s, s.position[tile.first], s.position[last], G, P::MOVED)
                       : row_tiles(p, s, tile.first, last, G, P::MOVED);
  w.moved[0] = at<const T>(p.q, s.b, s.q_row, int64_t(tile.head) * G);
  w.moved[1] = at<const T>(p.dout, s.b, s.q_row, int64_t(tile.head) * G);
  w.rows = rows + first_slot(p, tile.head, tile.sequence, P::HELD) * P::HELD;
}

// The gradients of the removed ones among keys first..first + HELD - 1.
template <class P, class T = typename P::T>
PALM_DEVICE void clear_removed(const Attention& p, const Backward<T>& w, const Heads& dbias) {
  for (int i = threadIdx.x / 32; i < P::HELD; i += P::THREADS / 32) {
    const int j = w.first + i, lane = threadIdx.x % 32;
    if (j >= w.s.S || w.s.rank[j] != w.s.rank[j + 1]) continue;
    for (int d = lane; d < p.D; d += 32) {
      at<T>(p.dk, w.s.b, w.s.k_row + j, w.head)[d] = T(0.f);
      at<T>(p.dv, w.s.b, w.s.k_row + j, w.head)[d] = T(0.f);
    }
    if (dbias.data && lane == 0) *at<float>(dbias, w.s.b, w.s.k_row + j, w.head) = 0;
  }
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 256 / P::THREADS)
    attention_dkdv_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys, Row* rows,
                          const __grid_constant__ Heads dbias, bool aligned) {
  using T = typename P::T;
  constexpr int D = P::D;
  PALM_SHARED(typename P::Shared, shared);
  const Backward<T>& w = shared->work;
  if (threadIdx.x == 0) plan_keys<P>(shared->work, p, keys, rows);
  __syncthreads();
  if (w.s.rank) clear_removed<P>(p, w, dbias);
  if (w.count <= 0) return;
  const int dim = int(p.D);
  const Lane<P> lane;

  const auto load_held = [&](T* to, const Heads& x) {
    const T* from = at<const T>(x, w.s.b, w.s.k_row, w.head);
    load_keys<D, P::HELD, P::THREADS>(to, from, x.token, w.s, w.first, dim, aligned);
  };
  load_held(shared->held[0], p.k);
  load_held(shared->held[1], p.v);
  for (int i = threadIdx.x; i < P::HELD; i += P::THREADS) {
    shared->held_bias[i] = w.s.bias && i < w.count ? w.s.bias[w.first + i] : 0;
    for (int part = 0; part < P::PARTS; ++part) shared->dbias[part][i] = 0;
  }
  // Rows are there a tile ahead of q and dout, which stay unread where a row sees nothing.
  const auto copy_rows = [&](int j) {
    const int i = threadIdx.x;
    if (j < w.range.end && i < P::MOVED)
      copy_async<16>(&shared->moved_rows[j % 4][i], w.rows + int64_t(j) * P::MOVED + i, true);
    commit_copies();
  };
  copy_rows(w.range.begin);
  wait_copies<0>();
  __syncthreads();
  Cursor cursor = cursor_at<P>(w.range.begin * P::MOVED, w.G);
  const auto load = [&](int j, int stage) {
    const Row* seen = shared->moved_rows[j % 4];
    T(&to)[2][P::MOVED * D] = shared->moved[stage];
    load_seen<P, P::MOVED>(to[0], w.moved[0], p.q, cursor, seen, w, dim, aligned);
    cursor = load_seen<P, P::MOVED>(to[1], w.moved[1], p.dout, cursor, seen, w, dim, aligned);
    copy_rows(j + 1);
  };

  typename P::Sums dk{}, dv{};
  const auto compute = [&](int j, int stage) {
    const T *q = shared->moved[stage][0], *dout = shared->moved[stage][1];
    typename P::Scores qk, dp;
    score<D>(qk, shared->held[0], lane.row, q, lane.moved, p.tf32);
    score<D>(dp, shared->held[1], lane.row, dout, lane.moved, p.tf32);
    const bool masked = j < w.range.full0 || j >= w.range.full1;
    gradients<P>(qk, dp, p.key_bias, w.scale, masked, [&](int i, int c) {
      const int n = lane.held_row(i);
      return Pair{shared->moved_rows[j % 4][lane.moved_row(c)], shared->held_bias[n], w.first + n};
    });
    if (dbias.data) add_bias<P>(shared->dbias[lane.part], dp, lane);
    if constexpr (P::PARTS > 1) {
      share<P>(shared->left[0], qk, lane);
      share<P>(shared->left[1], dp, lane);
      sync_named(1 + lane.group, 32 * P::PARTS);
    }
    add<P>(dv, qk, shared->left[0], dout, lane, p.tf32);
    add<P>(dk, dp, shared->left[1], q, lane, p.tf32);
  };
  pipeline<P::STAGES>(w.range.begin, w.range.end, load, compute);

  round_to<P>(shared->held[0], dk, lane, [&](int) { return w.scale; });
  round_to<P>(shared->held[1], dv, lane, [&](int) { return 1.f; });
  __syncthreads();
  const auto store = [&](const T* from, const Heads& x) {
    store_rows<P>(from, w.count, dim, aligned, [&](int i) { return at_key<T>(x, w.s, w.head, w.first + i); });
  };
  store(shared->held[0], p.dk);
  store(shared->held[1], p.dv);
  for (int i = threadIdx.x; dbias.data && i < w.count; i += P::THREADS) {
    float sum = 0;
    for (int part = 0; part < P::PARTS; ++part) sum += shared->dbias[part][i];
    *at_key<float>(dbias, w.s, w.head, w.first + i) = sum;
  }
}

// dbias = the key/value heads' parts, added in order.
__global__ void __launch_bounds__(kThreads)
    attention_dbias_kernel(const __grid_constant__ Attention p, const __grid_constant__ Heads parts) {
  const int64_t S = p.cu_k ? p.k_rows : p.S, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = i / S, j = i % S;
  if (b >= (p.cu_k ? 1 : p.B)) return;
  float sum = 0;
  for (int64_t head = 0; head < p.K; ++head) sum += *at<float>(parts, b, j, head);
  static_cast<float*>(p.dbias)[b * p.dbias_batch + j * p.dbias_token] = sum;
}

template <class P>
static void backward(const Attention& p, const Keys& keys, const Heads& dbias, const Queue& queue) {
  using T = typename P::T;
  bool all = true;
  for (const Heads* x : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv}) all = all && aligned<T>(*x);
  const int64_t row_blocks = p.K * row_slots(p, P::HELD), key_blocks = p.K * key_slots(p, P::HELD);
  Row* rows = scratch<Row>(queue, row_blocks * P::HELD);
  constexpr size_t bytes = sizeof(typename P::Shared);
  if (bytes > shared_limit(queue))
    throw std::runtime_error(
        "attention: backward in float32 at head dims over 128 needs more shared memory than this GPU has; 16 "
        "bits or pk.backend('triton') would serve");
  if (row_blocks > 0)
    launch<attention_dq_kernel<P>>(row_blocks, P::THREADS, bytes, queue, p, keys, rows, all);
  if (key_blocks > 0)
    launch<attention_dkdv_kernel<P>>(key_blocks, P::THREADS, bytes, queue, p, keys, rows, dbias, all);
}

void attention_bwd(const Attention& p, const Queue& queue) {
  check_offsets(p, queue);
  if (p.B == 0) return;
  const Keys keys = compact_keys(p, queue);
  const int64_t key_rows = p.cu_k ? p.k_rows : p.B * p.S;
  Heads dbias{p.dbias, p.dbias_batch, p.dbias_token, 0};
  const bool parts = p.dbias && p.K > 1 && key_rows > 0;
  if (parts) dbias = {scratch<float>(queue, p.K * key_rows), p.S, 1, key_rows};
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    with_head_dim(p.D, [&](auto d) {
      using P = Plan<T, d>;
      if constexpr (sizeof(T) == 2 && d == 256)
        if (sizeof(typename P::Shared) > shared_limit(queue))
          return backward<Plan<T, d, true>>(p, keys, dbias, queue);
      backward<P>(p, keys, dbias, queue);
    });
  });
  if (parts)
    launch<attention_dbias_kernel>((key_rows + kThreads - 1) / kThreads, kThreads, 0, queue, p, dbias);
}

}  // namespace palm::cuda
