// Attention backward in two passes without atomics (Dao 2022, algorithm 4): dq by tiles of packed rows, then
// dk, dv and dbias by tiles of kept keys over the rows of all heads, so that every sum has one owner and one
// order. The first pass leaves lse, delta and bounds of its rows for the second.
//
// p = exp(scale q k + bias - lse), dp = dout v, delta = rowsum(dout out) - dlse, ds = p (dp - delta):
// dq = scale ds k, dk = scale ds^T q, dv = p^T dout, dbias = the sum of ds over rows.
//
// Both passes have one shape. A block keeps two tiles (q and dout; k and v) and moves along two others (k and
// v; q and dout). Scores stand as [kept][moved], so that p and ds are left operands of the sums as they are.
#include "attention.cuh"

namespace palm::cuda {

// Of a packed row. Those that see nothing, or only fill up a tile, have lse inf and no bounds: p and ds are 0
// there, and q and dout are not read. lse is in base 2 unless there is a bias (see `gradients`).
struct alignas(16) Row {
  float lse, delta;
  int lo, hi;  // kept keys
};

// What a block works on. It stands in shared memory, since the sums take the registers.
template <class T>
struct Backward {
  Sequence s;
  int head, first, count;  // key/value head; rows (of the second pass: kept keys) first.. of the sequence
  Range range;             // tiles that it moves along
  const T* moved[2];       // their first rows
  Row* rows;               // first pass: of the tile, second: of the sequence
  int G, tokens, heads;    // G, and a cursor's step
  float scale;
};

// A warp has M tiles of 16 kept rows and COLUMNS of the D columns of their sums: 128 sums a thread in the
// second pass. Where PARTS warps have the same rows, each computes the scores of its part of the moved rows
// and they trade p and ds through shared memory. Few kept rows, since multi-query attention has few blocks
// in the second pass; 8 warps a multiprocessor, whose scores and sums take the registers.
template <class Element, int HeadDim>
struct Plan {
  using T = Element;
  static constexpr bool EXACT = std::is_same_v<T, float>;
  static constexpr int D = HeadDim;
  static constexpr int KEPT = EXACT && D == 256 ? 32 : 64, MOVED = EXACT && D == 128 ? 16 : 32;
  static constexpr int STAGES = EXACT && D == 256 ? 1 : 2;
  static constexpr int M = !EXACT && D == 64 ? 2 : 1;
  static constexpr int COLUMNS = D == 64 ? 64 : 128, PARTS = D / COLUMNS;
  static constexpr int GROUPS = KEPT / (16 * M), THREADS = 32 * GROUPS * PARTS;
  static constexpr int N = MOVED / PARTS / 8;      // tiles of 8 moved rows in a warp's scores
  static constexpr int STEPS = MOVED / Mma<T>::K;  // left fragments along the moved rows
  static_assert(KEPT % MOVED == 0);  // rows that the first pass leaves are whole tiles of the second
  using Scores = float[M][N][4];
  using Sums = float[M][COLUMNS / 8][4];

  static constexpr int CHUNKS = D / kChunk<T>, STEP = THREADS / CHUNKS;  // rows that a block copies at once

  struct Shared {
    Backward<T> work;
    T kept[2][KEPT * D], moved[STAGES][2][MOVED * D];
    Row kept_rows[KEPT], moved_rows[4][MOVED];
    float moved_bias[STAGES][MOVED], kept_bias[KEPT], dbias[PARTS][KEPT];
    uint4 left[2][PARTS > 1 ? GROUPS * M * STEPS * 32 : 1];  // p and ds as fragments
  };
};

// A thread's place: its warp's rows and columns, and its row g and columns 2 t, 2 t + 1 of accumulators.
template <class P>
struct Lane {
  int id = threadIdx.x % 32, g = id / 4, t = id % 4;
  int group = threadIdx.x / 32 / P::PARTS, part = threadIdx.x / 32 % P::PARTS;
  int row = group * 16 * P::M, column = part * P::COLUMNS, moved = part * P::N * 8;
};

// ---- products
// Leaves this warp's part of c, rounded to T, to the warps with the same rows.
template <class P>
PALM_DEVICE void share(uint4* left, const typename P::Scores& c, const Lane<P>& lane) {
  using F = Mma<typename P::T>;
  constexpr int OWN = P::STEPS / P::PARTS;
#pragma unroll
  for (int m = 0; m < P::M; ++m)
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const auto a = F::a_of(&c[m][i * F::K / 8]);
      left[((lane.group * P::M + m) * P::STEPS + lane.part * OWN + i) * 32 + lane.id] =
          make_uint4(a.r[0], a.r[1], a.r[2], a.r[3]);
    }
}

// sums += c moved
template <class P, class T = typename P::T>
PALM_DEVICE void add(typename P::Sums& sums, const typename P::Scores& c, const uint4* left, const T* moved,
                     const Lane<P>& lane, bool tf32) {
  using F = Mma<T>;
#pragma unroll(P::PARTS == 1 ? P::STEPS : 1)
  for (int i = 0; i < P::STEPS; ++i) {
    typename F::A a[P::M];
#pragma unroll
    for (int m = 0; m < P::M; ++m) {
      if constexpr (P::PARTS == 1) {
        a[m] = F::a_of(&c[m][i * F::K / 8]);
      } else {
        const auto shared = left[((lane.group * P::M + m) * P::STEPS + i) * 32 + lane.id];
        a[m] = {{shared.x, shared.y, shared.z, shared.w}};
      }
    }
#pragma unroll
    for (int n = 0; n < P::COLUMNS / 8; n += 2) {
      const auto b = F::template load_rows_b<P::D>(moved, i * F::K, lane.column + n * 8);
#pragma unroll
      for (int m = 0; m < P::M; ++m) F::multiply(sums[m][n], sums[m][n + 1], a[m], b, tf32);
    }
  }
}

// Adds the sums of ds over rows, one a kept key.
template <class P>
PALM_DEVICE void add_bias(float* dbias, const typename P::Scores& ds, const Lane<P>& lane) {
#pragma unroll
  for (int i = 0; i < P::M * 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < P::N; ++n) sum += ds[i / 2][n][i % 2 * 2] + ds[i / 2][n][i % 2 * 2 + 1];
    sum = warp_sum<4>(sum);
    if (lane.t == 0) dbias[lane.row + i * 8 + lane.g] += sum;
  }
}

// Calls f(score, dp, its row's Row, its key's bias, its kept key) for all of s = q k and d = dp, which become
// p and ds. With a bias lse is natural, so that a finite stand-in for -inf does not overflow. EXACT: a row
// that sees one key has ds = dlse, since dp and delta cancel, but in float32 their rounding alone would be
// over the error budget.
template <bool EXACT, class Each>
PALM_DEVICE void gradients(bool biased, float scale, bool masked, const Each& each) {
  const float slope = scale * kLog2e;
  if (biased)
    each([&](float& s, float&, const Row& r, float bias, int) { s = (s * scale + bias - r.lse) * kLog2e; });
  else
    each([&](float& s, float&, const Row& r, float, int) { s = s * slope - r.lse; });
  each([&](float& s, float& d, const Row& r, float, int) {
    s = exp2_fast(s);
    if (EXACT && r.lo == r.hi) d = 0;
    d = s * (d - r.delta);
  });
  if (masked)
    each([&](float& s, float& d, const Row& r, float, int n) {
      if (n < r.lo || n > r.hi) s = d = 0;
    });
}

// Where the slots of key/value head `head` of sequence b begin.
PALM_DEVICE int64_t first_slot(const Attention& p, int head, int b, int BM) {
  const int64_t G = group(p), tiles = cdiv(p.T * G, BM);
  return p.cu_q ? head * (p.q_rows * G / BM + p.B) + p.cu_q[b] * G / BM + b : (head * p.B + b) * tiles;
}

// ---- tiles
// compute(j, stage) for tiles begin..end - 1, while load(j + 1, other stage) is under way.
template <int STAGES, class Load, class Compute>
PALM_DEVICE void pipeline(int begin, int end, const Load& load, const Compute& compute) {
  static_assert(STAGES == 1 || STAGES == 2);
  const auto start = [&](int j, int stage) {
    if (j < end) load(j, stage);
    commit_copies();
  };
  if (STAGES == 2) start(begin, 0);
  for (int j = begin; j < end; ++j) {
    const int stage = (j - begin) % STAGES;
    if (STAGES == 1) {
      __syncthreads();
      start(j, 0);
    }
    wait_copies<0>();
    __syncthreads();
    if (STAGES == 2) start(j + 1, stage ^ 1);
    compute(j, stage);
  }
  wait_copies<0>();
  __syncthreads();
}

// The packed row that this thread copies next, one chunk of it, as token and head of the group: its rows are
// STEP apart, and no division is needed from one to the next.
struct Cursor {
  int token, head;
};
template <class P>
PALM_DEVICE Cursor cursor_at(int row, int G) {
  row += threadIdx.x / P::CHUNKS;
  return {row / G, row % G};
}

// Starts to copy the ROWS rows from the cursor on, zeros for those that see nothing: what stands there must
// not matter. x is the sequence's first row, of the key/value head's first head. Returns the cursor behind.
template <class P, int ROWS, class T = typename P::T>
PALM_DEVICE Cursor load_seen(T* tile, const T* x, const Heads& strides, Cursor row, const Row* rows,
                             const Backward<T>& w, int dim, bool aligned) {
  const int G = w.G, tokens = w.tokens, heads = w.heads;
  const int64_t step = tokens * strides.token + heads * strides.head, wrap = strides.token - G * strides.head;
  x += row.token * strides.token + row.head * strides.head;
  load_tile<P::D, ROWS, P::THREADS>(tile, dim, aligned, [&](int i) {
    const T* from = rows[i].lse < INFINITY ? x : nullptr;
    x += step;
    row.token += tokens;
    row.head += heads;
    if (row.head >= G) {
      x += wrap;
      row.head -= G;
      ++row.token;
    }
    return from;
  });
  return row;
}

// row_of(i): where row i of the tile goes, for i < count.
template <class P, class T = typename P::T, class RowOf>
PALM_DEVICE void store_rows(const T* tile, int count, int dim, bool aligned, const RowOf& row_of) {
  const int chunk = threadIdx.x % P::CHUNKS, column = chunk * kChunk<T>;
  for (int i = threadIdx.x / P::CHUNKS; i < count; i += P::STEP)
    store_chunk(row_of(i) + column, chunk_at<P::D>(tile, i, chunk), dim - column, aligned);
}

// sums times factor(m, half) to a tile, rounded.
template <class P, class T = typename P::T, class Factor>
PALM_DEVICE void round_to(T* tile, const typename P::Sums& sums, const Lane<P>& lane, const Factor& factor) {
#pragma unroll
  for (int m = 0; m < P::M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float by = factor(m, half);
#pragma unroll
      for (int n = 0; n < P::COLUMNS / 8; ++n) {
        T* to =
            element_at<P::D>(tile, lane.row + m * 16 + half * 8 + lane.g, lane.column + n * 8 + lane.t * 2);
        store_pair(to, sums[m][n][half * 2] * by, sums[m][n][half * 2 + 1] * by);
      }
    }
}

// ---- first pass: dq
// By one thread.
template <class P, class T = typename P::T>
PALM_DEVICE void plan_rows(Backward<T>& w, const Attention& p, const Keys& keys, Row* rows) {
  const RowTile tile = row_tile(p, blockIdx.x, P::KEPT);
  const int G = group(p), count = min(tile.rows - tile.first, P::KEPT);
  w.count = count;
  if (count <= 0) return;
  const Sequence s = sequence(p, keys, tile.sequence);
  w.s = s;
  w.head = tile.head;
  w.first = tile.first;
  w.range = key_tiles(p, s, tile.first / G, (tile.first + count - 1) / G, P::MOVED);
  w.moved[0] = at<const T>(p.k, s.b, s.k_row, tile.head);
  w.moved[1] = at<const T>(p.v, s.b, s.k_row, tile.head);
  w.rows = rows + tile.slot * P::KEPT;
  w.G = G;
  w.tokens = P::STEP / G;
  w.heads = P::STEP % G;
  w.scale = float(p.scale);
}

// This block's rows: bounds, lse and -dlse, but not yet rowsum(dout out).
template <class P, class T = typename P::T>
PALM_DEVICE void begin_rows(const Attention& p, const Backward<T>& w, Row* rows) {
  for (int i = threadIdx.x; i < P::KEPT; i += P::THREADS) {
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
PALM_DEVICE void finish_rows(Row* rows, const T* dout, const T* out, Row* kept_for_second) {
  constexpr int WIDTH = P::THREADS / P::KEPT, N = kChunk<T>, CHUNKS = P::D / N / WIDTH;
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
    rows[i] = kept_for_second[i] = row;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Plan<T, D>::THREADS, 256 / Plan<T, D>::THREADS)
    attention_dq_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys, Row* rows,
                        bool aligned) {
  using P = Plan<T, D>;
  PALM_SHARED(typename P::Shared, shared);
  const Backward<T>& w = shared->work;
  if (threadIdx.x == 0) plan_rows<P>(shared->work, p, keys, rows);
  __syncthreads();
  if (w.count <= 0) return;
  const int dim = int(p.D);
  const Lane<P> lane;

  begin_rows<P>(p, w, shared->kept_rows);
  __syncthreads();
  const Cursor cursor = cursor_at<P>(w.first, w.G);
  const auto load_kept = [&](T* to, const Heads& x) {
    const T* from = at<const T>(x, w.s.b, w.s.q_row, int64_t(w.head) * w.G);
    load_seen<P, P::KEPT>(to, from, x, cursor, shared->kept_rows, w, dim, aligned);
  };
  T* out = shared->moved[0][0];
  static_assert(sizeof shared->moved >= sizeof(T) * P::KEPT * D);
  load_kept(shared->kept[0], p.q);
  load_kept(shared->kept[1], p.dout);
  load_kept(out, p.out);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  finish_rows<P>(shared->kept_rows, shared->kept[1], out, w.rows);
  __syncthreads();
  Row mine[P::M][2];
#pragma unroll
  for (int i = 0; i < P::M * 2; ++i) mine[i / 2][i % 2] = shared->kept_rows[lane.row + i * 8 + lane.g];

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
    score<D>(qk, shared->kept[0], lane.row, k, lane.moved, p.tf32);
    score<D>(dp, shared->kept[1], lane.row, v, lane.moved, p.tf32);
    const bool masked = j < w.range.full0 || j >= w.range.full1;
    gradients<P::EXACT>(p.key_bias, w.scale, masked, [&](const auto& f) {
#pragma unroll
      for (int c = 0; c < P::N * 2; ++c) {
        const int n = lane.moved + c / 2 * 8 + lane.t * 2 + c % 2;
        const float bias = shared->moved_bias[stage][n];
#pragma unroll
        for (int i = 0; i < P::M * 2; ++i)
          f(qk[i / 2][c / 2][i % 2 * 2 + c % 2], dp[i / 2][c / 2][i % 2 * 2 + c % 2], mine[i / 2][i % 2],
            bias, j * P::MOVED + n);
      }
    });
    if constexpr (P::PARTS > 1) {
      share<P>(shared->left[1], dp, lane);
      sync_named(1 + lane.group, 32 * P::PARTS);
    }
    add<P>(dq, dp, shared->left[1], k, lane, p.tf32);
  };
  pipeline<P::STAGES>(w.range.begin, w.range.end, load, compute);

  T* result = shared->kept[0];
  round_to<P>(result, dq, lane,
              [&](int m, int half) { return mine[m][half].lse < INFINITY ? w.scale : 0.f; });
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
  const KeyTile tile = key_tile(p, blockIdx.x, P::KEPT);
  const Sequence s = sequence(p, keys, tile.sequence);
  const int G = group(p), count = min(s.kept - tile.first, P::KEPT), last = tile.first + count - 1;
  w.s = s;
  w.head = tile.head;
  w.first = tile.first;
  w.count = count;
  if (count <= 0) return;
  w.range = s.position ? row_tiles(p, s, s.position[tile.first], s.position[last], G, P::MOVED)
                       : row_tiles(p, s, tile.first, last, G, P::MOVED);
  w.moved[0] = at<const T>(p.q, s.b, s.q_row, int64_t(tile.head) * G);
  w.moved[1] = at<const T>(p.dout, s.b, s.q_row, int64_t(tile.head) * G);
  w.rows = rows + first_slot(p, tile.head, tile.sequence, P::KEPT) * P::KEPT;
  w.G = max(G, 1);  // without heads there are no rows to step over
  w.tokens = P::STEP / w.G;
  w.heads = P::STEP % w.G;
  w.scale = float(p.scale);
}

// The gradients of the removed ones among keys first..first + KEPT - 1, kept or not.
template <class P, class T = typename P::T>
PALM_DEVICE void clear_removed(const Attention& p, const Backward<T>& w, const Heads& dbias) {
  for (int i = threadIdx.x / 32; i < P::KEPT; i += P::THREADS / 32) {
    const int j = w.first + i, lane = threadIdx.x % 32;
    if (j >= w.s.S || w.s.rank[j] != w.s.rank[j + 1]) continue;
    for (int d = lane; d < p.D; d += 32) {
      at<T>(p.dk, w.s.b, w.s.k_row + j, w.head)[d] = T(0.f);
      at<T>(p.dv, w.s.b, w.s.k_row + j, w.head)[d] = T(0.f);
    }
    if (dbias.data && lane == 0) *at<float>(dbias, w.s.b, w.s.k_row + j, w.head) = 0;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Plan<T, D>::THREADS, 256 / Plan<T, D>::THREADS)
    attention_dkdv_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys, Row* rows,
                          const __grid_constant__ Heads dbias, bool aligned) {
  using P = Plan<T, D>;
  PALM_SHARED(typename P::Shared, shared);
  const Backward<T>& w = shared->work;
  if (threadIdx.x == 0) plan_keys<P>(shared->work, p, keys, rows);
  __syncthreads();
  if (w.s.rank) clear_removed<P>(p, w, dbias);
  if (w.count <= 0) return;
  const int dim = int(p.D);
  const Lane<P> lane;

  const auto load_kept = [&](T* to, const Heads& x) {
    const T* from = at<const T>(x, w.s.b, w.s.k_row, w.head);
    load_keys<D, P::KEPT, P::THREADS>(to, from, x.token, w.s, w.first, dim, aligned);
  };
  load_kept(shared->kept[0], p.k);
  load_kept(shared->kept[1], p.v);
  for (int i = threadIdx.x; i < P::KEPT; i += P::THREADS) {
    shared->kept_bias[i] = w.s.bias && i < w.count ? w.s.bias[w.first + i] : 0;
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
    score<D>(qk, shared->kept[0], lane.row, q, lane.moved, p.tf32);
    score<D>(dp, shared->kept[1], lane.row, dout, lane.moved, p.tf32);
    const bool masked = j < w.range.full0 || j >= w.range.full1;
    gradients<P::EXACT>(p.key_bias, w.scale, masked, [&](const auto& f) {
#pragma unroll
      for (int c = 0; c < P::N * 2; ++c) {
        const Row row = shared->moved_rows[j % 4][lane.moved + c / 2 * 8 + lane.t * 2 + c % 2];
#pragma unroll
        for (int i = 0; i < P::M * 2; ++i) {
          const int n = lane.row + i * 8 + lane.g;
          f(qk[i / 2][c / 2][i % 2 * 2 + c % 2], dp[i / 2][c / 2][i % 2 * 2 + c % 2], row,
            shared->kept_bias[n], w.first + n);
        }
      }
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

  round_to<P>(shared->kept[0], dk, lane, [&](int, int) { return w.scale; });
  round_to<P>(shared->kept[1], dv, lane, [&](int, int) { return 1.f; });
  __syncthreads();
  const auto store = [&](const T* from, const Heads& x) {
    store_rows<P>(from, w.count, dim, aligned, [&](int i) { return at_key<T>(x, w.s, w.head, w.first + i); });
  };
  store(shared->kept[0], p.dk);
  store(shared->kept[1], p.dv);
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

template <class T, int D>
static void backward(const Attention& p, const Keys& keys, const Heads& dbias, const Queue& queue) {
  using P = Plan<T, D>;
  bool all = true;
  for (const Heads* x : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv}) all = all && aligned<T>(*x);
  const int64_t row_blocks = p.K * row_slots(p, P::KEPT), key_blocks = p.K * key_slots(p, P::KEPT);
  Row* rows = scratch<Row>(queue, row_blocks * P::KEPT);
  constexpr size_t bytes = sizeof(typename P::Shared);
  if (row_blocks > 0)
    launch<attention_dq_kernel<T, D>>(row_blocks, P::THREADS, bytes, queue, p, keys, rows, all);
  if (key_blocks > 0)
    launch<attention_dkdv_kernel<T, D>>(key_blocks, P::THREADS, bytes, queue, p, keys, rows, dbias, all);
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
    with_head_dim(p.D, [&](auto D) { backward<T, D>(p, keys, dbias, queue); });
  });
  if (parts)
    launch<attention_dbias_kernel>((key_rows + kThreads - 1) / kThreads, kThreads, 0, queue, p, dbias);
}

}  // namespace palm::cuda
