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

PALM_DEVICE Sequence sequence(const Attention& p, const Keys& keys, int b) {
  Sequence s{b, 0, 0, int(p.T), int(p.S), 0, 0, nullptr, nullptr, nullptr};
  if (p.cu_q) {
    s.q_row = p.cu_q[b];
    s.k_row = p.cu_k[b];
    s.T = p.cu_q[b + 1] - s.q_row;
    s.S = p.cu_k[b + 1] - s.k_row;
  }
  if (p.cache_lengths) {
    const int length = p.cache_lengths[b];
    PALM_ASSERT(length >= 0 && length <= p.S, "attention_decode: cache_lengths must be 0 to Smax");
    s.S = min(max(length, 0), s.S);
  }
  if (p.prefix_lengths) s.prefix = min(max(p.prefix_lengths[b], 0), s.S);
  s.kept = s.S;
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
  const int64_t diagonal = int64_t(t) + s.S - s.T;
  int64_t lo = 0, hi = s.S - 1;
  if (p.right >= 0) hi = min(hi, diagonal + p.right);
  if (p.causal) hi = min(hi, max(diagonal, int64_t(s.prefix) - 1));
  if (p.left >= 0) lo = min(max(lo, diagonal - p.left), int64_t(s.S));
  hi = max(hi, int64_t(-1));
  if (!s.rank) return {int(lo), int(hi)};
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
PALM_DEVICE RowTile row_tile(const Attention& p, int64_t index, int BM) {
  const int64_t G = p.H / p.K, slots = p.cu_q ? p.q_rows * G / BM + p.B : p.B * cdiv(p.T * G, BM);
  RowTile r;
  int64_t tile;
  if (p.cu_q) {
    r.head = int(index / slots);
    r.sequence = locate(p.cu_q, p.B, G, BM, index % slots, tile);
    r.slot = index;
    r.rows = int((p.cu_q[r.sequence + 1] - p.cu_q[r.sequence]) * G);
  } else {
    const int64_t tiles = cdiv(p.T * G, BM), bk = index % (p.B * p.K);
    tile = tiles - 1 - index / (p.B * p.K);
    r.head = int(bk % p.K);
    r.sequence = int(bk / p.K);
    r.slot = r.head * slots + r.sequence * tiles + tile;
    r.rows = int(p.T * G);
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

// ---- tiles in shared memory: [ROWS][D], 16-byte chunks swizzled within 128 bytes by the row, so that
// ldmatrix and 16-byte stores meet no bank twice
template <class T>
constexpr int kChunk = 16 / sizeof(T);

template <int D, class T>
PALM_DEVICE T* chunk_at(T* tile, int row, int chunk) {
  static_assert(D / kChunk<T> >= 8);
  return tile + row * D + ((chunk ^ (row & 7)) * kChunk<std::remove_const_t<T>>);
}
template <int D, class T>
PALM_DEVICE T* element_at(T* tile, int row, int column) {
  constexpr int N = kChunk<std::remove_const_t<T>>;
  return chunk_at<D>(tile, row, column / N) + column % N;
}

// Starts to copy ROWS rows of `dim` elements; row_of(i) is row i's address or null; zeros there and beyond
// dim. `aligned`: addresses are multiples of 16 bytes. Complete after commit_copies, wait_copies and a
// barrier.
template <int D, int ROWS, int THREADS, class T, class RowOf>
PALM_DEVICE void load_tile(T* tile, int dim, bool aligned, const RowOf& row_of) {
  constexpr int N = kChunk<T>, CHUNKS = D / N;
  static_assert(THREADS % CHUNKS == 0);
  const int chunk = threadIdx.x % CHUNKS, column = chunk * N;
#pragma unroll
  for (int i = threadIdx.x / CHUNKS; i < ROWS; i += THREADS / CHUNKS) {
    const T* row = row_of(i);
    T* to = chunk_at<D>(tile, i, chunk);
    if (aligned && (column + N <= dim || column >= dim)) {
      const bool wanted = row && column < dim;
      copy_async<16>(to, wanted ? row + column : nullptr, wanted);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) to[j] = row && column + j < dim ? row[column + j] : T(0.f);
    }
  }
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
    const int lane = threadIdx.x % 32;
    A a;
    ldmatrix<false>(a.r, chunk_at<D>(tile, row + (lane & 15), k / kChunk<T> + (lane >> 4)));
    return a;
  }
  // Of the transposed tile: its columns are rows n..n + 15, its rows columns k..k + K - 1.
  template <int D>
  static PALM_DEVICE B load_b(const T* tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    B b;
    ldmatrix<false>(b.r,
                    chunk_at<D>(tile, n + (lane & 7) + (lane >> 4) * 8, k / kChunk<T> + (lane >> 3 & 1)));
    return b;
  }
  // Of the tile as it stands: rows k..k + K - 1, columns n..n + 15. Goes with `a_of` of accumulators.
  template <int D>
  static PALM_DEVICE B load_rows_b(const T* tile, int k, int n) {
    const int lane = threadIdx.x % 32;
    B b;
    ldmatrix<true>(b.r, chunk_at<D>(tile, k + (lane & 15), n / kChunk<T> + (lane >> 4)));
    return b;
  }
  // The K / 8 neighbouring accumulator tiles c[0..], rounded to T, as the left operand of the next product.
  static PALM_DEVICE A a_of(const float (*c)[4]) {
    return {{pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]),
             pack<T>(c[1][2], c[1][3])}};
  }
  static PALM_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b, bool) {
    const uint32_t b0[2] = {b.r[0], b.r[1]}, b1[2] = {b.r[2], b.r[3]};
    mma<T>(d0, a.r, b0);
    mma<T>(d1, a.r, b1);
  }
};

// float32: three tf32 products of the parts of x = big + small, or with `tf32` the one of the big parts.
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
    const int lane = threadIdx.x % 32;
    A a;
    ldmatrix<false>(a.r, chunk_at<D>(tile, row + (lane & 15), k / 4 + (lane >> 4)));
    return a;
  }
  template <int D>
  static PALM_DEVICE B load_b(const float* tile, int n, int k) {
    const int lane = threadIdx.x % 32;
    B b;
    ldmatrix<false>(b.r, chunk_at<D>(tile, n + (lane & 7) + (lane >> 4) * 8, k / 4 + (lane >> 3 & 1)));
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

  // small is what tf32 leaves of x; cross is big, or 0 where that is inf or NaN: 0 times it would be NaN.
  struct Parts {
    uint32_t big[4], small[4], cross[4];
  };
  static PALM_DEVICE Parts parts(const uint32_t (&bits)[4]) {
    Parts p;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x, big;
      memcpy(&x, &bits[i], 4);
      p.big[i] = to_tf32(x);
      memcpy(&big, &p.big[i], 4);
      const bool finite = fabsf(big) <= 3.4028234663852886e38f;
      p.small[i] = finite ? to_tf32(x - big) : 0;
      p.cross[i] = finite ? p.big[i] : 0;
    }
    return p;
  }
  static PALM_DEVICE void multiply(float (&d0)[4], float (&d1)[4], const A& a, const B& b, bool tf32) {
    const Parts pa = parts(a.r), pb = parts(b.r);
    const auto product = [&](const uint32_t (&x)[4], const uint32_t (&y)[4]) {
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
      mma_tf32(d0, x, y0);
      mma_tf32(d1, x, y1);
    };
    if (!tf32) {
      product(pa.small, pb.cross);
      product(pa.cross, pb.small);
    }
    product(pa.big, pb.big);
  }
};

// ---- made on the device before attention's kernels run
Keys compact_keys(const Attention& p, const Queue& queue);
void check_offsets(const Attention& p, const Queue& queue);

// Whether every row of x begins at a multiple of 16 bytes.
template <class T>
bool aligned(const Heads& x) {
  const int64_t bytes = sizeof(T);
  return !((reinterpret_cast<uintptr_t>(x.data) | (x.batch * bytes) | (x.token * bytes) | (x.head * bytes)) %
           16);
}

}  // namespace palm::cuda
