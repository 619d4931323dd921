// What attention's kernels share: which keys a query sees, where rows are, tiles in shared memory and the
// fragments that tensor cores take from them.
//
// All G = H / K query heads of a key/value head stand as rows of one tall matrix: row r is token r / G, head
// r % G, so one tile of K and V serves them all. Keys that a bias removes (-inf) are left out: `compact_keys`
// lists the others, and kernels count kept keys only, so that removed ones cost nothing and nothing of theirs
// is read. Which keys a row sees is then an interval lo..hi of kept keys whose ends grow with the token.
#pragma once

#include "common.cuh"

namespace palm::cuda {

// ---- sequences and their keys
// Of all sequences; null without a bias. Sequence b's part of position and bias begins at its first key row,
// its part of rank (S + 1 entries: kept keys before each key) b entries later.
struct Keys {
  int32_t *position, *rank;
  float* bias;
};

struct Sequence {
  int b, q_row, k_row;  // of its first rows: a dense entry has rows 0; packed ones have batch stride 0
  int T, S, prefix, kept;
  const int32_t *position, *rank;  // null: key n is kept key n
  const float* bias;
};

// All keys of a dense or packed batch. It asserts nothing: a call anywhere in a kernel makes wgmma wait for
// each product.
PALM_DEVICE Sequence whole_sequence(const Attention& p, int b) {
  Sequence s{b, 0, 0, int(p.T), int(p.S), 0, 0, nullptr, nullptr, nullptr};
  if (p.cu_q) {
    s.q_row = p.cu_q[b];
    s.k_row = p.cu_k[b];
    s.T = p.cu_q[b + 1] - s.q_row;
    s.S = p.cu_k[b + 1] - s.k_row;
  }
  if (p.prefix_lengths) s.prefix = min(max(p.prefix_lengths[b], 0), s.S);
  s.kept = s.S;
  return s;
}

PALM_DEVICE Sequence sequence(const Attention& p, const Keys& keys, int b) {
  Sequence s = whole_sequence(p, b);
  if (p.cache_lengths) {
    const int length = p.cache_lengths[b];
    PALM_ASSERT(length >= 0 && length <= p.S, "attention_decode: cache_lengths must be 0 to Smax");
    s.kept = s.S = min(max(length, 0), s.S);
  }
  if (keys.rank) {
    const int64_t first = s.k_row + b * p.S;  // packed: p.S is 0
    s.position = keys.position + first;
    s.bias = keys.bias + first;
    s.rank = keys.rank + first + b;
    s.kept = s.rank[s.S];
  }
  return s;
}

// Kept keys lo..hi, none if lo > hi; both ends grow with t.
struct Bounds {
  int lo, hi;
};
PALM_DEVICE Bounds visible(const Attention& p, const Sequence& s, int t) {
  const int diagonal = t + s.S - s.T, after = s.T - 1 - t;  // of diagonal to the last key
  int lo = 0, hi = s.S - 1;
  if (p.right >= 0 && p.right < after) hi = diagonal + int(p.right);
  if (p.causal) hi = min(hi, max(diagonal, s.prefix - 1));
  if (p.left >= 0 && p.left < diagonal) lo = min(diagonal - int(p.left), s.S);
  hi = max(hi, -1);
  if (!s.rank) return {lo, hi};
  return {s.rank[lo], s.rank[hi + 1] - 1};
}

// Tiles of BN kept keys that tokens t0..t1 meet, [begin, end); all of [full0, full1) is visible to all of
// them.
struct Range {
  int begin, full0, full1, end;
};
PALM_DEVICE Range key_tiles(const Attention& p, const Sequence& s, int t0, int t1, int BN) {
  const Bounds first = visible(p, s, t0), last = visible(p, s, t1);
  Range r;
  r.begin = first.lo / BN;
  r.end = max(r.begin, int(cdiv(last.hi + 1, BN)));
  r.full0 = min(max(int(cdiv(last.lo, BN)), r.begin), r.end);
  r.full1 = min(max((first.hi + 1) / BN, r.full0), r.end);
  return r;
}

// ---- tiles of packed rows, one a block
struct RowTile {
  int head;   // key/value head
  int first;  // row
  int rows;   // of the sequence: T G. Nothing to do if first >= rows
  int64_t slot;
  int sequence;
};

// Query heads of a key/value head.
PALM_DEVICE int group(const Attention& p) { return int(p.H) / int(p.K); }

// The sequence of a packed batch that owns `slot` and its tile: sequence b begins at slot cu[b] factor /
// BLOCK
// + b, which leaves every sequence at least as many slots as it has tiles.
PALM_DEVICE int locate(const int32_t* cu, int64_t B, int64_t factor, int block, int64_t slot, int64_t& tile) {
  int lo = 0, hi = int(B);
  while (hi - lo > 1) {
    const int middle = (lo + hi) / 2;
    (cu[middle] * factor / block + middle <= slot ? lo : hi) = middle;
  }
  tile = slot - (cu[lo] * factor / block + lo);
  return lo;
}

// Of one key/value head: tiles of all entries of a dense batch, or slots enough for all packed sequences.
inline int64_t row_slots(const Attention& p, int BM) {
  const int64_t G = p.H / p.K;
  return p.cu_q ? p.q_rows * G / BM + p.B : p.B * ((p.T * G + BM - 1) / BM);
}
inline int64_t key_slots(const Attention& p, int BN) {
  return p.cu_k ? p.k_rows / BN + p.B : p.B * ((p.S + BN - 1) / BN);
}

// Of block `index` of K row_slots(p, BM): later tokens first, since under causal they see more keys.
PALM_DEVICE RowTile row_tile(const Attention& p, int index, int BM) {
  const int G = group(p), B = int(p.B), K = int(p.K);
  RowTile r;
  int64_t tile;
  if (p.cu_q) {
    const int slots = int(p.q_rows * G / BM) + B;
    r.head = index / slots;
    r.sequence = locate(p.cu_q, B, G, BM, index % slots, tile);
    r.slot = index;
    r.rows = (p.cu_q[r.sequence + 1] - p.cu_q[r.sequence]) * G;
  } else {
    r.rows = int(p.T) * G;
    const int tiles = int(cdiv(r.rows, BM)), bk = index % (B * K);
    tile = tiles - 1 - index / (B * K);
    r.head = bk % K;
    r.sequence = bk / K;
    r.slot = (int64_t(r.head) * B + r.sequence) * tiles + tile;
  }
  r.first = int(min(tile * BM, int64_t(r.rows)));
  return r;
}

template <class T>
PALM_DEVICE T* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

// Row r of key/value head `head`'s packed rows.
template <class T>
PALM_DEVICE T* at_row(const Heads& x, const Sequence& s, int G, int head, int r) {
  return at<T>(x, s.b, s.q_row + r / G, int64_t(head) * G + r % G);
}
template <class T>
PALM_DEVICE T* at_key(const Heads& x, const Sequence& s, int head, int n) {
  return at<T>(x, s.b, s.k_row + (s.position ? s.position[n] : n), head);
}

// The scores' scale without a bias (and with scale > 0) goes into the exponent's factor: scores stay q k.
// With one they are natural, so that finite stand-ins for -inf, such as the smallest float32, do not
// overflow.
PALM_DEVICE bool folds(const Attention& p) { return !p.key_bias && p.scale > 0; }
// Factor of a difference of scores in the exponent of 2.
PALM_DEVICE float unit_of(const Attention& p) { return folds(p) ? float(p.scale) * kLog2e : kLog2e; }

// ---- tiles in shared memory: [ROWS][D], 16-byte chunks swizzled within 128 bytes by the row, so that
// ldmatrix and 16-byte stores meet no bank twice
template <class T>
constexpr int kChunk = 16 / sizeof(T);

template <int D, class T>
PALM_DEVICE T* chunk_at(T* tile, int row, int chunk) {
  static_assert(D / kChunk<T> >= 8);
  constexpr int N = kChunk<std::remove_const_t<T>>;  // swizzled and whole 128 bytes apart: fewer addresses
  return tile + row * D + (chunk & ~7) * N + ((chunk & 7) ^ (row & 7)) * N;
}
template <int D, class T>
PALM_DEVICE T* element_at(T* tile, int row, int column) {
  constexpr int N = kChunk<std::remove_const_t<T>>;
  return chunk_at<D>(tile, row, column / N) + column % N;
}

// What this lane gives ldmatrix for rows row..row + 15 and chunks chunk, chunk + 1 (row a multiple of 8,
// chunk even). Matrices 0 to 3: both row halves of the first chunk, then of the second; with CHUNKS_FIRST
// both chunks of the first rows, then of the others. The lane's part takes four values at most, the rest are
// constants beside the tile's address.
template <int D, bool CHUNKS_FIRST, class T>
PALM_DEVICE const T* lane_chunk(const T* tile, int row, int chunk) {
  const int lane = threadIdx.x % 32, low = lane >> 3 & 1, high = lane >> 4;
  const int lane_row = (lane & 7) + (CHUNKS_FIRST ? high : low) * 8;
  const int swizzled = (CHUNKS_FIRST ? low : high) ^ (lane & 7) ^ (chunk & 7);
  return tile + (lane_row * D + swizzled * kChunk<T>)+(row * D + (chunk & ~7) * kChunk<T>);
}

// Starts to copy ROWS rows of `dim` elements; row_of(i) is row i's address or null; zeros there and beyond
// dim. `aligned`: addresses are multiples of 16 bytes. Complete after commit_copies, wait_copies and a
// barrier.
template <int D, int ROWS, int THREADS, class T, class RowOf>
PALM_DEVICE void load_tile(T* tile, int dim, bool aligned, const RowOf& row_of) {
  constexpr int N = kChunk<T>, CHUNKS = D / N, STEP = THREADS / CHUNKS, COUNT = ROWS / STEP;
  static_assert(THREADS % CHUNKS == 0 && ROWS % STEP == 0);
  const int thread = thread_again(), chunk = thread % CHUNKS, first = thread / CHUNKS, column = chunk * N;
  if (aligned && (column + N <= dim || column >= dim)) {
    const T* from[COUNT];  // all first: what row_of reads would wait behind the copies
#pragma unroll
    for (int j = 0; j < COUNT; ++j) from[j] = row_of(first + j * STEP);
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      copy_async<16>(chunk_at<D>(tile, first + j * STEP, chunk), from[j] + column, from[j] && column < dim);
  } else {
#pragma unroll 1
    for (int i = first; i < ROWS; i += STEP) {
      const T* row = row_of(i);
      T* to = chunk_at<D>(tile, i, chunk);
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = row && column + j < dim ? row[column + j] : T(0.f);
    }
  }
}
// Kept keys first.. of a sequence whose first key row is `base`: without positions one addition an address.
template <int D, int ROWS, int THREADS, class T>
PALM_DEVICE void load_keys(T* tile, const T* base, int64_t stride, const Sequence& s, int first, int dim,
                           bool aligned) {
  constexpr int N = kChunk<T>, CHUNKS = D / N, STEP = THREADS / CHUNKS;
  const int count = s.kept - first;
  if (s.position || !aligned || dim % N) {
    return load_tile<D, ROWS, THREADS>(tile, dim, aligned, [&](int i) -> const T* {
      return i < count ? base + (s.position ? s.position[first + i] : first + i) * stride : nullptr;
    });
  }
  const int thread = thread_again(), column = thread % CHUNKS * N, mine = thread / CHUNKS;
  const T* from = base + (first + mine) * stride + column;
#pragma unroll
  for (int j = 0; j < ROWS; j += STEP, from += STEP * stride)
    copy_async<16>(chunk_at<D>(tile, mine + j, column / N), from, mine + j < count && column < dim);
}

// Two neighbours, at an even column.
template <class T>
PALM_DEVICE void store_pair(T* to, float lo, float hi) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(lo, hi);
  } else {
    const uint32_t both = pack<T>(lo, hi);
    memcpy(__builtin_assume_aligned(static_cast<void*>(to), 4), &both, 4);
  }
}
// A chunk of a tile to a row that has `left` more elements.
template <class T>
PALM_DEVICE void store_chunk(T* to, const T* chunk, int left, bool fits) {
  constexpr int N = kChunk<T>;
  if (fits && left >= N) return store_16(to, *reinterpret_cast<const uint4*>(chunk));
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < left) to[i] = chunk[i];
}

// ---- fragments. Mma<T>: products over K columns. A is 16 rows, B two neighbouring tiles of 8 columns, so
// that one ldmatrix fills either; accumulators are float[4] a tile of 16 x 8 (device.cuh has the layout).
template <class T>
struct Mma {
  static constexpr int K = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];
  };

  // Rows row..row + 15 of a tile, columns k..k + K - 1.
  template <int D>
  static PALM_DEVICE A load_a(const T* tile, int row, int k) {
    A a;
    ldmatrix<false>(a.r, lane_chunk<D, false>(tile, row, k / kChunk<T>));
    return a;
  }
  // Of the transposed tile: its columns are rows n..n + 15, its rows columns k..k + K - 1.
  template <int D>
  static PALM_DEVICE B load_b(const T* tile, int n, int k) {
    B b;
    ldmatrix<false>(b.r, lane_chunk<D, true>(tile, n, k / kChunk<T>));
    return b;
  }
  // Of the tile as it stands: rows k..k + K - 1, columns n..n + 15. Goes with `a_of` of accumulators.
  template <int D>
  static PALM_DEVICE B load_rows_b(const T* tile, int k, int n) {
    B b;
    ldmatrix<true>(b.r, lane_chunk<D, false>(tile, k, n / kChunk<T>));
    return b;
  }
  // The K / 8 neighbouring accumulator tiles c[0..], rounded to T, as the left operand of the next product.
  static PALM_DEVICE A a_of(const float (*c)[4]) {
    return {{pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]),
             pack<T>(c[1][2], c[1][3])}};
  }
  template <bool SINGLE>
  static PALM_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b) {
    const uint32_t b0[2] = {b.r[0], b.r[1]}, b1[2] = {b.r[2], b.r[3]};
    mma<T>(d0, a.r, b0);
    mma<T>(d1, a.r, b1);
  }
};

// float32: three tf32 products of the parts of x = big + small, or, SINGLE, the one of numbers rounded to
// tf32. The unit drops the lowest 13 bits of its operands by itself, which makes big of x.
template <>
struct Mma<float> {
  static constexpr int K = 8;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[4];
  };

  template <int D>
  static PALM_DEVICE A load_a(const float* tile, int row, int k) {
    A a;
    ldmatrix<false>(a.r, lane_chunk<D, false>(tile, row, k / 4));
    return a;
  }
  template <int D>
  static PALM_DEVICE B load_b(const float* tile, int n, int k) {
    B b;
    ldmatrix<false>(b.r, lane_chunk<D, true>(tile, n, k / 4));
    return b;
  }
  // Accumulators hold columns 2 t and 2 t + 1, the left operand k = t and t + 4: both operands number k so
  // that they agree.
  template <int D>
  static PALM_DEVICE B load_rows_b(const float* tile, int k, int n) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = *element_at<D>(tile, k + 2 * t + i % 2, n + g + i / 2 * 8);
      memcpy(&b.r[i], &x, 4);
    }
    return b;
  }
  static PALM_DEVICE A a_of(const float (*c)[4]) {
    A a;
    const float x[4] = {c[0][0], c[0][2], c[0][1], c[0][3]};
    memcpy(a.r, x, 16);
    return a;
  }

  // big is x without its lowest 13 bits, which the unit drops by itself, small the rest. Adding half of what
  // is dropped first makes it round: small, and x in one of the two mixed products, where the error of doing
  // without small small^T then has no sign. For inf and NaN they are those of the largest float32, as inf -
  // inf and 0 inf are NaN, x itself is in the product of the big parts. Parts have x's sign: no two products
  // are infinities of different signs.
  struct Parts {
    uint32_t mixed[4], small[4];
  };
  template <bool ROUND>
  static PALM_DEVICE Parts split(const uint32_t (&bits)[4]) {
    constexpr float kLargest = 3.4011621342146535e38f;  // that rounds to a finite one
    constexpr uint32_t kHalf = 0x1000;
    Parts p;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x, big;
      memcpy(&x, &bits[i], 4);
      x = fminf(fmaxf(x, -kLargest), kLargest);
      memcpy(&p.mixed[i], &x, 4);
      const uint32_t kept = p.mixed[i] & 0xffffe000u;
      memcpy(&big, &kept, 4);
      x -= big;
      memcpy(&p.small[i], &x, 4);
      p.small[i] += kHalf;
      if (ROUND) p.mixed[i] += kHalf;
    }
    return p;
  }
  static PALM_DEVICE void product(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[4]) {
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_tf32(d0, a, b0);
    mma_tf32(d1, a, b1);
  }
  static PALM_DEVICE void round(uint32_t (&to)[4], const uint32_t (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x;
      memcpy(&x, &from[i], 4);
      to[i] = to_tf32(x);
    }
  }
  template <bool SINGLE>
  static PALM_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b) {
    if constexpr (SINGLE) {
      uint32_t ra[4], rb[4];
      round(ra, a.r);
      round(rb, b.r);
      product(d0, d1, ra, rb);
    } else {
      const Parts pa = split<true>(a.r), pb = split<false>(b.r);
      product(d0, d1, pa.small, pb.mixed);
      product(d0, d1, pa.mixed, pb.small);
      product(d0, d1, a.r, b.r);
    }
  }
};

// f(whether float32 products are single ones): a branch around a loop of products, not within.
template <class T, class F>
PALM_DEVICE void with_tf32(bool tf32, const F& f) {
  if constexpr (std::is_same_v<T, float>)
    if (tf32) return f(std::true_type{});
  f(std::false_type{});
}

// M tiles of 16 rows against N tiles of 8: s = q k^T of rows row.. of q and key.. of k.
template <int D, int M, int N, class T>
PALM_DEVICE void score(float (&s)[M][N][4], const T* q, int row, const T* k, int key, bool tf32) {
  using X = Mma<T>;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[m][n][c] = 0;
  with_tf32<T>(tf32, [&](auto single) {
#pragma unroll
    for (int d = 0; d < D; d += X::K) {
      typename X::A a[M];
#pragma unroll
      for (int m = 0; m < M; ++m) a[m] = X::template load_a<D>(q, row + m * 16, d);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        const typename X::B b = X::template load_b<D>(k, key + n * 8, d);
#pragma unroll
        for (int m = 0; m < M; ++m) X::template multiply<single>(s[m][n], s[m][n + 1], a[m], b);
      }
    }
  });
}

// ---- made on the device before attention's kernels run
Keys compact_keys(const Attention& p, const Queue& queue);
void check_offsets(const Attention& p, const Queue& queue);

// The forward pass by wgmma and TMA; false, and nothing done, where it does not serve p or the machine.
bool attention_fwd_hopper(const Attention& p, const Queue& queue);

// f(D): the bucket of head dims, zeros beyond the real one.
template <class F>
void with_head_dim(int64_t D, F&& f) {
  if (D <= 64) return f(std::integral_constant<int, 64>{});
  if (D <= 128) return f(std::integral_constant<int, 128>{});
  f(std::integral_constant<int, 256>{});
}

// Shared memory that a block may have, less on the chips beside the data centre's.
inline size_t shared_limit(const Queue& queue) {
  const bool small = queue.arch == 86 || queue.arch == 89 || queue.arch >= 120;
  return (small ? 99 : queue.arch < 90 ? 163 : 227) << 10;
}

// Whether every row of x begins at a multiple of 16 bytes.
template <class T>
bool aligned(const Heads& x) {
  const int64_t bytes = sizeof(T);
  return !((reinterpret_cast<uintptr_t>(x.data) | (x.batch * bytes) | (x.token * bytes) | (x.head * bytes)) %
           16);
}

}  // namespace palm::cuda
