// soft_weak_embedding: forward is one pass from ids to mixed rows. Backward, as on the CPU: each token has
// two entries, its share of weight[id] and of its source. Entries are sorted by the row of dweight that they
// add to (dmask is a row behind the last one) and each row's segment is summed in that order. A long segment
// (a frequent token, the mask) is summed in pieces of kPiece sorted entries first: the pieces lie between
// fixed places, so that all shapes are static and no thread adds up more than kPiece entries, or its part of
// pieces.
#include <algorithm>

#include "sort.cuh"

namespace palm::cuda {
namespace {

constexpr uint32_t kPiece = 128;
constexpr int kAtOnce = 4;  // rows far apart are read together: each waits for memory

// What row r asks for; source -1 is the mask.
struct Token {
  int64_t id, source;
  float a;
  bool good;
};
PALM_DEVICE int64_t id_at(const Rows& rows, const Matrix& ids, bool wide, int64_t r) {
  return wide ? *row<const int64_t>(rows, ids, r) : *row<const int32_t>(rows, ids, r);
}
PALM_DEVICE Token token(const SoftWeakEmbedding& p, int64_t r) {
  Token t;
  t.id = id_at(p.rows, p.ids, p.wide_ids, r);
  t.source = p.source_ids.data ? id_at(p.rows, p.source_ids, p.wide_source_ids, r) : -1;
  t.a = *row<const float>(p.rows, p.strength, r);
  const bool id = t.id >= 0 && t.id < p.vocab, source = t.source < p.vocab, a = t.a >= 0 && t.a <= 1;
  PALM_ASSERT(id, "soft_weak_embedding: need 0 <= id < V (weight's rows)");
  PALM_ASSERT(source, "soft_weak_embedding: need source_ids below V (weight's rows)");
  PALM_ASSERT(a, "soft_weak_embedding: need 0 <= strength <= 1");
  t.good = id && source && a;
  return t;
}

// r(a) = ((1-a)^2 + a^2)^(-1/2), or 1.
PALM_DEVICE float scale_of(const SoftWeakEmbedding& p, float a) {
  return p.variance_preserving ? 1 / sqrtf((1 - a) * (1 - a) + a * a) : 1;
}

template <class T>
PALM_DEVICE const T* weight_row(const SoftWeakEmbedding& p, int64_t id) {
  return static_cast<const T*>(p.weight) + id * p.weight_stride;
}
// Null means zeros.
template <class T>
PALM_DEVICE const T* source_row(const SoftWeakEmbedding& p, int64_t source) {
  return source < 0 ? static_cast<const T*>(p.mask) : weight_row<T>(p, source);
}

// The packet at p, of which n elements are there; zeros beyond them, or where p is null. Unpacked later: what
// is converted at once waits for this load before the next one begins.
template <int N, class T>
PALM_DEVICE Packet<T, N> get_part(const T* p, int64_t n) {
  if (p && n >= N) return get<N>(p);
  T part[N];
#pragma unroll
  for (int i = 0; i < N; ++i) part[i] = p && i < n ? p[i] : from_float<T>(0);
  Packet<T, N> packet;
  memcpy(static_cast<void*>(&packet), part, sizeof(packet));
  return packet;
}
template <int N, class T>
PALM_DEVICE void put_part(T* p, const Packet<T, N>& packet, int64_t n) {
  if (n >= N) return put(p, packet);
  T part[N];
  memcpy(static_cast<void*>(part), &packet, sizeof(packet));
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < n) p[i] = part[i];
}

// At a = 0 and 1 the bits of one side, and the other is not read.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_fwd_kernel(const __grid_constant__ SoftWeakEmbedding p,
                                   const __grid_constant__ Tiling tiles) {
  const Place at = place(tiles, N);
  const int64_t n = p.cols - at.column;
  if (at.row >= p.rows.count || n <= 0) return;
  const Token t = token(p, at.row);
  if (!t.good) return;
  const T *e = weight_row<T>(p, t.id) + at.column, *c = source_row<T>(p, t.source);
  if (c) c += at.column;
  Packet<T, N> own = get_part<N>(t.a < 1 ? e : nullptr, n);
  const Packet<T, N> source = get_part<N>(t.a > 0 ? c : nullptr, n);
  if (t.a > 0 && t.a < 1) {
    float x[N], y[N];
    unpack(x, own);
    unpack(y, source);
    const float r = scale_of(p, t.a);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = r * ((1 - t.a) * x[i] + t.a * y[i]);
    own = packed<T>(x);
  } else if (t.a == 1) {
    own.bits = source.bits;
  }
  put_part(row<T>(p.rows, p.out, at.row) + at.column, own, n);
}

// ---- dweight and dmask
// Entry 2r is row r's share of weight[id], r(a) (1-a) dout; entry 2r + 1 its share of the source, r(a) a
// dout. Its key is the row of dweight, `vocab` for dmask, or vocab + 1: an exact 0 or 1 leaves one side out.
// Keys do not depend on what is wanted, so neither do the bits.
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_keys_kernel(const __grid_constant__ SoftWeakEmbedding p, uint32_t* keys) {
  const int64_t r = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (r >= p.rows.count) return;
  const Token t = token(p, r);
  const int64_t nothing = p.vocab + 1, source = t.source < 0 ? p.vocab : t.source;
  keys[2 * r] = static_cast<uint32_t>(t.good && t.a < 1 ? t.id : nothing);
  keys[2 * r + 1] = static_cast<uint32_t>(t.good && t.a > 0 ? source : nothing);
}

// Sorted entries: their keys, tokens, and what dout is multiplied by; key k has starts[k] .. starts[k + 1]
// - 1. pieces [piece][2][cols]: a piece's part of the long segment that covers its first entry, and of one
// that begins within it.
struct Entries {
  uint32_t count;  // below 2^31
  uint32_t *keys, *tokens, *starts;
  float *shares, *pieces;
};

__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_entries_kernel(const __grid_constant__ SoftWeakEmbedding p,
                                       const __grid_constant__ Entries s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < s.count) {
    const uint32_t entry = s.tokens[i];
    const float a = *row<const float>(p.rows, p.strength, entry / 2);
    s.tokens[i] = entry / 2;
    s.shares[i] = scale_of(p, a) * (entry % 2 ? a : 1 - a);
  }
  if (i > p.vocab + 1) return;
  uint32_t low = 0, high = s.count;  // the first entry whose key is not below i
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    s.keys[middle] < i ? low = middle + 1 : high = middle;
  }
  s.starts[i] = low;
}

// The sum of entries begin .. end - 1 over N columns.
template <int N, class T>
PALM_DEVICE void sum_entries(float (&sum)[N], const SoftWeakEmbedding& p, const Entries& s, uint32_t begin,
                             uint32_t end, int64_t column) {
  for (uint32_t k = begin; k < end; k += kAtOnce) {
    Packet<T, N> packets[kAtOnce];
    uint32_t tokens[kAtOnce];
    float shares[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      tokens[u] = s.tokens[min(k + u, end - 1)];
      shares[u] = s.shares[min(k + u, end - 1)];
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) packets[u] = get<N>(row<const T>(p.rows, p.dout, tokens[u]) + column);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u >= end) break;
      float x[N];
      unpack(x, packets[u]);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += shares[u] * x[i];
    }
  }
}

// N floats in accesses of at most 16 bytes. N = 1 or aligned p.
template <int N>
PALM_DEVICE void store_floats(float* p, const float (&x)[N]) {
  constexpr int M = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    float part[M];
#pragma unroll
    for (int j = 0; j < M; ++j) part[j] = x[i + j];
    store<M>(p + i, part, M);
  }
}

// Where the sum of a key's entries goes; null where it is not wanted.
template <class T>
PALM_DEVICE T* result(const SoftWeakEmbedding& p, int64_t key) {
  if (key == p.vocab) return static_cast<T*>(p.dmask);
  return key < p.vocab && p.dweight ? static_cast<T*>(p.dweight) + key * p.cols : nullptr;
}

struct Segment {
  uint32_t begin, end;
  PALM_DEVICE Segment(const Entries& s, int64_t key) : begin(s.starts[key]), end(s.starts[key + 1]) {}
  PALM_DEVICE bool is_long() const { return end - begin > kPiece; }
};

// Row r of the tiles is piece r.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_pieces_kernel(const __grid_constant__ SoftWeakEmbedding p,
                                      const __grid_constant__ Entries s,
                                      const __grid_constant__ Tiling tiles) {
  const Place at = place(tiles, N);
  if (at.row * kPiece >= s.count || at.column >= p.cols) return;
  const uint32_t first = static_cast<uint32_t>(at.row) * kPiece, end = min(first + kPiece, s.count);
  for (int side = 0; side < 2; ++side) {
    const int64_t key = s.keys[side ? end - 1 : first];
    if (!result<T>(p, key)) continue;
    const Segment own(s, key);
    if (!own.is_long() || (own.begin > first) != (side == 1)) continue;
    float sum[N] = {};
    sum_entries<N, T>(sum, p, s, max(own.begin, first), min(own.end, end), at.column);
    store_floats<N>(s.pieces + (2 * at.row + side) * p.cols + at.column, sum);
  }
}

// Block (i, j) adds up the long segment that begins in piece i, if there is one, over 32 N columns: each warp
// every eighth of its pieces, then the warps' sums.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_long_kernel(const __grid_constant__ SoftWeakEmbedding p,
                                    const __grid_constant__ Entries s, int column_tiles) {
  PALM_SHARED(float, shared);
  const uint32_t piece = blockIdx.x / column_tiles, first = piece * kPiece;
  const int64_t key = s.keys[min(first + kPiece, s.count) - 1];
  T* out = result<T>(p, key);
  if (!out) return;
  const Segment own(s, key);
  if (!own.is_long() || own.begin < first) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = (int64_t(blockIdx.x % column_tiles) * 32 + lane) * N;
  const uint32_t last = (own.end - 1) / kPiece;
  float sum[N] = {};
  if (column < p.cols) {
#pragma unroll 4
    for (uint32_t i = piece + warp; i <= last; i += kWarps) {
      float x[N];
      load_floats<N>(x, s.pieces + (int64_t(2) * i + (own.begin > i * kPiece)) * p.cols + column);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) shared[(j * kWarps + warp) * 32 + lane] = sum[j];
  __syncthreads();
  if (warp || column >= p.cols) return;
#pragma unroll
  for (int j = 0; j < N; ++j)
    for (int w = 1; w < kWarps; ++w) sum[j] += shared[(j * kWarps + w) * 32 + lane];
  store<N>(out + column, sum, N);
}

// Row r of the tiles is key first + r. Short segments, and zeros where there is no entry.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_segments_kernel(const __grid_constant__ SoftWeakEmbedding p,
                                        const __grid_constant__ Entries s,
                                        const __grid_constant__ Tiling tiles, int64_t first, int64_t keys) {
  const Place at = place(tiles, N);
  if (at.row >= keys || at.column >= p.cols) return;
  const Segment own(s, first + at.row);
  if (own.is_long()) return;
  float sum[N] = {};
  sum_entries<N, T>(sum, p, s, own.begin, own.end, at.column);
  store<N>(result<T>(p, first + at.row) + at.column, sum, N);
}

// ---- dstrength = dout.(r (c - E) + r' u), u = (1-a) E + a c, r' = (1-2a) r^3
// One sum: of two, each may be large where their sum is not. At 0 and 1 what is not finite counts as 0:
// forward did not read the side it comes from. 2^log_width lanes a row.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    soft_weak_embedding_slope_kernel(const __grid_constant__ SoftWeakEmbedding p, int log_width) {
  const int width = 1 << log_width, lane = threadIdx.x & (width - 1);
  const int64_t r = (int64_t(blockIdx.x) * kThreads + threadIdx.x) >> log_width;
  const bool here = r < p.rows.count;
  const Token t = here ? token(p, r) : Token{};
  float sum = 0;
  if (t.good) {
    const T *dout = row<const T>(p.rows, p.dout, r), *e = weight_row<T>(p, t.id),
            *c = source_row<T>(p, t.source);
    const float a = t.a, scale = scale_of(p, a), turn = (1 - 2 * a) * scale * scale * scale;
    const bool edge = a == 0 || a == 1;
#pragma unroll 2
    for (int64_t column = lane * N; column < p.cols; column += width * N) {
      const int64_t n = p.cols - column;
      const Packet<T, N> packets[] = {get_part<N>(dout + column, n), get_part<N>(e + column, n),
                                      get_part<N>(c ? c + column : nullptr, n)};
      float g[N], x[N], y[N];
      unpack(g, packets[0]);
      unpack(x, packets[1]);
      unpack(y, packets[2]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float slope = y[i] - x[i], u = a == 0 ? x[i] : a == 1 ? y[i] : (1 - a) * x[i] + a * y[i];
        if (edge && !(slope - slope == 0)) slope = 0;
        if (edge && !(u - u == 0)) u = 0;
        sum += g[i] * (p.variance_preserving ? scale * slope + turn * u : slope);
      }
    }
  }
  for (int d = width / 2; d; d /= 2) sum += shuffle_xor(sum, d);
  if (here && lane == 0) *row<float>(p.rows, p.dstrength, r) = sum;
}

// f(packet size): 16 bytes if all rows of m, weight and the mask begin at multiples of them, else one
// element.
template <class T, class F>
void with_embedding_packet(const SoftWeakEmbedding& p, const Matrix& m, F&& f) {
  const Matrix weight{const_cast<void*>(p.weight), {p.weight_stride}};
  const bool all =
      aligned<T>(p.rows, m) && aligned<T>(Rows{p.vocab, 1, {p.vocab}}, weight) && aligned(p.mask);
  all ? f(std::integral_constant<int, kPacket<T>>{}) : f(std::integral_constant<int, 1>{});
}

int64_t blocks_of(int64_t threads) { return cdiv(threads, kThreads); }

template <class T, int N>
void run_rows(const SoftWeakEmbedding& p, const Entries& s, const Queue& queue) {
  const int64_t pieces = cdiv(s.count, kPiece), wide = cdiv(p.cols, 32 * N);
  if (pieces) {
    const Tiling tiles = tiling(pieces, p.cols, N);
    launch<soft_weak_embedding_pieces_kernel<T, N>>(tiles.blocks(), kThreads, 0, queue, p, s, tiles);
    launch<soft_weak_embedding_long_kernel<T, N>>(pieces * wide, kThreads, kThreads * N * sizeof(float),
                                                  queue, p, s, static_cast<int>(wide));
  }
  const int64_t first = p.dweight ? 0 : p.vocab, keys = p.vocab + (p.dmask != nullptr) - first;
  if (keys == 0) return;
  const Tiling tiles = tiling(keys, p.cols, N);
  launch<soft_weak_embedding_segments_kernel<T, N>>(tiles.blocks(), kThreads, 0, queue, p, s, tiles, first,
                                                    keys);
}

void row_gradients(const SoftWeakEmbedding& p, const Queue& queue) {
  const int64_t count = 2 * p.rows.count, pieces = cdiv(count, kPiece);
  uint32_t* keys = scratch<uint32_t>(queue, count);
  Sorted order{keys, keys};
  if (count) {
    launch<soft_weak_embedding_keys_kernel>(blocks_of(p.rows.count), kThreads, 0, queue, p, keys);
    order = sorted(keys, count, p.vocab + 1, queue);
  }
  const Entries s{static_cast<uint32_t>(count),
                  order.keys,
                  order.order,
                  scratch<uint32_t>(queue, p.vocab + 2),
                  scratch<float>(queue, count),
                  scratch<float>(queue, 2 * pieces * p.cols)};
  launch<soft_weak_embedding_entries_kernel>(blocks_of(std::max(count, p.vocab + 2)), kThreads, 0, queue, p,
                                             s);
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    if (aligned<T>(p.rows, p.dout) && aligned(p.dweight) && aligned(p.dmask) && p.cols % kPacket<T> == 0)
      run_rows<T, kPacket<T>>(p, s, queue);
    else
      run_rows<T, 1>(p, s, queue);
  });
}

}  // namespace

void soft_weak_embedding_fwd(const SoftWeakEmbedding& p, const Queue& queue) {
  if (p.rows.count == 0 || p.cols == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    with_embedding_packet<T>(p, p.out, [&](auto n) {
      const Tiling tiles = tiling(p.rows.count, p.cols, n);
      launch<soft_weak_embedding_fwd_kernel<T, n>>(tiles.blocks(), kThreads, 0, queue, p, tiles);
    });
  });
}

void soft_weak_embedding_bwd(const SoftWeakEmbedding& p, const Queue& queue) {
  if ((p.dweight || p.dmask) && p.cols) row_gradients(p, queue);
  if (!p.dstrength.data || p.rows.count == 0) return;
  with_dtype(p.dtype, [&](auto e) {
    using T = decltype(e);
    with_embedding_packet<T>(p, p.dout, [&](auto n) {
      int log_width = 0;
      while ((int64_t(n) << log_width) < p.cols && log_width < 5) ++log_width;
      launch<soft_weak_embedding_slope_kernel<T, n>>(blocks_of(p.rows.count << log_width), kThreads, 0, queue,
                                                     p, log_width);
    });
  });
}

}  // namespace palm::cuda
