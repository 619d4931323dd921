// What the memory-bound kernels share: dtypes, rows behind any leading strides, 16-byte packets, reductions.
#pragma once

#include "../scalar.h"
#include "device.cuh"

namespace palm::cuda {

template <class F>
void with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(bf16{});
    case Dtype::f16: return f(f16{});
    case Dtype::f64: return;  // dispatch.py never lets it through
  }
}

PALM_HD int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where row r begins, in elements. Most calls have one dimension: no division.
PALM_DEVICE int64_t row_offset(const Rows& rows, const Matrix& m, int64_t r) {
  int64_t at = 0;
#pragma unroll 1
  for (int d = rows.dims - 1; d > 0; --d) {
    at += r % rows.size[d] * m.stride[d];
    r /= rows.size[d];
  }
  return at + r * m.stride[0];
}
template <class T>
PALM_DEVICE T* row(const Rows& rows, const Matrix& m, int64_t r) {
  return static_cast<T*>(m.data) + row_offset(rows, m, r);
}

// Elements of one 16-byte access.
template <class T>
constexpr int kPacket = 16 / sizeof(T);

// N elements as they lie in memory: 16 bytes as words (numbers of 16 bits would take a register each), or
// one element.
template <class T, int N>
struct Packet {
  static_assert(N == 1 || N == kPacket<T>);
  std::conditional_t<N == 1, T, uint4> bits;
};

// p is aligned to the packet.
template <int N, class T>
PALM_DEVICE Packet<T, N> get(const T* p) {
  if constexpr (N == 1)
    return {*p};
  else
    return {load_16(p)};
}
template <class T, int N>
PALM_DEVICE void put(T* p, const Packet<T, N>& packet) {
  if constexpr (N == 1)
    *p = packet.bits;
  else
    store_16(p, packet.bits);
}

template <class T, int N>
PALM_DEVICE void unpack(float (&x)[N], Packet<T, N> packet) {
  T elements[N];
  memcpy(static_cast<void*>(elements), &packet, sizeof(packet));
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(elements[i]);
}
template <class T, int N>
PALM_DEVICE Packet<T, N> packed(const float (&x)[N]) {
  if constexpr (N == 1) {
    return {from_float<T>(x[0])};
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (sizeof(T) == 2)
        words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
      else
        memcpy(&words[i], &x[i], 4);
    return {make_uint4(words[0], words[1], words[2], words[3])};
  }
}

// x[i] = p[i] for i < n, else 0. N is kPacket, then p is aligned to 16 bytes, or 1.
template <int N, class T>
PALM_DEVICE void load(float (&x)[N], const T* p, int64_t n) {
  if (n >= N) return unpack(x, get<N>(p));
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < n ? to_float(p[i]) : 0;
}

template <int N, class T>
PALM_DEVICE void store(T* p, const float (&x)[N], int64_t n) {
  if (n >= N) return put(p, packed<T>(x));
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < n) p[i] = from_float<T>(x[i]);
}

// N floats in accesses of at most 16 bytes. N = 1 or aligned p.
template <int N>
PALM_DEVICE void load_floats(float (&x)[N], const float* p) {
  constexpr int M = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += M) {
    float part[M];
    load<M>(part, p + i, M);
#pragma unroll
    for (int j = 0; j < M; ++j) x[i + j] = part[j];
  }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row of m begins at a multiple of 16 bytes.
template <class T>
bool aligned(const Rows& rows, const Matrix& m) {
  if (!aligned(m.data)) return false;
  for (int d = 0; d < rows.dims; ++d)
    if (rows.size[d] > 1 && m.stride[d] * static_cast<int64_t>(sizeof(T)) % 16) return false;
  return true;
}

// f(packet size): 16 bytes if all operands are aligned to them, else one element.
template <class T, class F>
void with_packet(const Rows& rows, std::initializer_list<const Matrix*> operands, F&& f) {
  bool all = true;
  for (const Matrix* m : operands) all = all && aligned<T>(rows, *m);
  all ? f(std::integral_constant<int, kPacket<T>>{}) : f(std::integral_constant<int, 1>{});
}

// A block of kThreads works on a tile of rows x columns: 2^log_width threads side by side in a row.
constexpr int kThreads = 256;
struct Tiling {
  int log_width;
  int64_t row_tiles, column_tiles;
  int64_t blocks() const { return row_tiles * column_tiles; }
};
inline Tiling tiling(int64_t rows, int64_t columns, int packet) {
  int log_width = 0;
  while ((int64_t(packet) << log_width) < columns && (1 << log_width) < kThreads) ++log_width;
  const int64_t high = kThreads >> log_width, wide = int64_t(packet) << log_width;
  return {log_width, (rows + high - 1) / high, (columns + wide - 1) / wide};
}
struct Place {
  int64_t row, column;
};
PALM_DEVICE Place place(const Tiling& t, int packet) {
  const int width = 1 << t.log_width;
  const int64_t tile = blockIdx.x / t.column_tiles, column_tile = blockIdx.x % t.column_tiles;
  return {tile * (kThreads >> t.log_width) + (threadIdx.x >> t.log_width),
          ((column_tile << t.log_width) + (threadIdx.x & (width - 1))) * packet};
}

// ---- reductions: every lane of the (sub)warp gets the result, in one order
template <int WIDTH = 32>
PALM_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int d = WIDTH / 2; d; d /= 2) x += shuffle_xor(x, d);
  return x;
}
template <int WIDTH = 32>
PALM_DEVICE float warp_max(float x) {
#pragma unroll
  for (int d = WIDTH / 2; d; d /= 2) x = fmaxf(x, shuffle_xor(x, d));
  return x;
}

}  // namespace palm::cuda
