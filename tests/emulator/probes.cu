// Single instructions of device.cuh and the fragments built on them, each behind a C function, so that
// test_fragments.py can compare what lanes hold with independent tables. Runs in the emulator and on a GPU.
#include "../../csrc/cuda/attention_forward.cuh"

namespace palm::cuda {

// Registers of every lane: a [32][4], b [32][2], d [32][4]. kind 0: bf16, 1: f16, 2: tf32.
__global__ void mma_kernel(int kind, const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t x[4], y[2];
  float z[4];
  for (int i = 0; i < 4; ++i) x[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) y[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) z[i] = d[lane * 4 + i];
  if (kind == 0) mma<bf16>(z, x, y);
  if (kind == 1) mma<f16>(z, x, y);
  if (kind == 2) mma_tf32(z, x, y);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = z[i];
}

// tile [32][8] of 16-bit numbers: row l is the one that lane l names; r [32][4].
template <bool TRANS>
__global__ void ldmatrix_kernel(const uint16_t* tile, uint32_t* r) {
  PALM_SHARED(uint16_t, shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = tile[lane * 8 + i];
  __syncthreads();
  uint32_t x[4];
  ldmatrix<TRANS>(x, shared + lane * 8);
  for (int i = 0; i < 4; ++i) r[lane * 4 + i] = x[i];
}

// scores = q k^T and out = rounded(scores) v by the forward's own steps: q [16][64], k, v
// [16][64], scores [16][16], out [16][64].
template <class T>
__global__ void attention_kernel(const T* q, const T* k, const T* v, bool tf32, float* scores, float* out) {
  PALM_SHARED(T, shared);
  constexpr int D = 64, N = 16;
  T *sq = shared, *sk = sq + N * D, *sv = sk + N * D;
  load_tile<D, N, 32>(sq, D, true, [&](int i) { return q + i * D; });
  load_tile<D, N, 32>(sk, D - 1, true, [&](int i) { return k + i * D; });
  load_tile<D, N, 32>(sv, D, false, [&](int i) { return i == N - 1 ? nullptr : v + i * D; });
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  float s[1][N / 8][4], o[1][D / 8][4] = {};
  score<D>(s, sq, 0, sk, 0, tf32);
  add_values<D>(o, s, sv, 0, tf32);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int c = 0; c < 4; ++c) {
    const int row = g + c / 2 * 8, column = 2 * t + c % 2;
    for (int n = 0; n < N / 8; ++n) scores[row * N + n * 8 + column] = s[0][n][c];
    for (int d = 0; d < D / 8; ++d) out[row * D + d * 8 + column] = o[0][d][c];
  }
}

}  // namespace palm::cuda

#define PROBE extern "C" __attribute__((visibility("default"))) void
static const palm::Queue queue{};

PROBE probe_mma(int kind, const void* a, const void* b, void* d) {
  palm::cuda::launch<palm::cuda::mma_kernel>(1, 32, 0, queue, kind, static_cast<const uint32_t*>(a),
                                             static_cast<const uint32_t*>(b), static_cast<float*>(d));
}
PROBE probe_ldmatrix(int trans, const void* tile, void* r) {
  const auto* x = static_cast<const uint16_t*>(tile);
  auto* y = static_cast<uint32_t*>(r);
  if (trans)
    palm::cuda::launch<palm::cuda::ldmatrix_kernel<true>>(1, 32, 512, queue, x, y);
  else
    palm::cuda::launch<palm::cuda::ldmatrix_kernel<false>>(1, 32, 512, queue, x, y);
}
PROBE probe_attention(int dtype, int tf32, const void* q, const void* k, const void* v, void* scores,
                      void* out) {
  palm::cuda::with_dtype(static_cast<palm::Dtype>(dtype), [&](auto e) {
    using T = decltype(e);
    palm::cuda::launch<palm::cuda::attention_kernel<T>>(
        1, 32, 3 * 16 * 64 * sizeof(T), queue, static_cast<const T*>(q), static_cast<const T*>(k),
        static_cast<const T*>(v), tf32 != 0, static_cast<float*>(scores), static_cast<float*>(out));
  });
}
