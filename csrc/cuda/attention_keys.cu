// The keys that a bias leaves, listed per sequence, and the check of a packed batch's offsets.
#include "attention.cuh"

namespace palm::cuda {

constexpr int kListThreads = 512;

// One block a sequence, kListThreads keys a step: position and bias of the kept keys in order, rank of all.
__global__ void __launch_bounds__(kListThreads)
    compact_keys_kernel(const __grid_constant__ Attention p, const __grid_constant__ Keys keys) {
  PALM_SHARED(int, kept_of);  // of each warp
  const int b = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k_row = p.cu_k ? p.cu_k[b] : 0, S = p.cu_k ? p.cu_k[b + 1] - k_row : p.S;
  const int64_t first = k_row + b * p.S;
  const float* given = static_cast<const float*>(p.key_bias) + b * p.bias_batch + k_row * p.bias_token;
  int before = 0;
  for (int64_t start = 0; start <= S; start += kListThreads) {
    const int64_t n = start + threadIdx.x;
    const float bias = n < S ? given[n * p.bias_token] : -INFINITY;
    const bool kept = bias != -INFINITY;
    const uint32_t lanes = ballot(kept);
    if (lane == 0) kept_of[warp] = popcount(lanes);
    __syncthreads();
    int rank = before + popcount(lanes & ((1u << lane) - 1));
    for (int w = 0; w < kListThreads / 32; ++w) {
      rank += w < warp ? kept_of[w] : 0;
      before += kept_of[w];
    }
    if (n <= S) keys.rank[first + b + n] = rank;
    if (kept) {
      keys.position[first + rank] = int(n);
      keys.bias[first + rank] = bias;
    }
    __syncthreads();
  }
}

Keys compact_keys(const Attention& p, const Queue& queue) {
  if (!p.key_bias || p.B == 0) return {};
  const int64_t rows = p.cu_k ? p.k_rows : p.B * p.S;
  const Keys keys{scratch<int32_t>(queue, rows), scratch<int32_t>(queue, rows + p.B),
                  scratch<float>(queue, rows)};
  launch<compact_keys_kernel>(dim3(p.B), kListThreads, kListThreads / 32 * sizeof(int), queue, p, keys);
  return keys;
}

__global__ void __launch_bounds__(kThreads) check_offsets_kernel(const __grid_constant__ Attention p) {
  PALM_ASSERT(p.cu_q[p.B] == p.q_rows && p.cu_k[p.B] == p.k_rows,
              "attention_varlen: cu_seqlens must end at the row counts");
  PALM_ASSERT(p.cu_q[0] == 0 && p.cu_k[0] == 0, "attention_varlen: cu_seqlens must begin at 0");
  for (int64_t b = threadIdx.x; b < p.B; b += kThreads)
    PALM_ASSERT(p.cu_q[b] <= p.cu_q[b + 1] && p.cu_k[b] <= p.cu_k[b + 1],
                "attention_varlen: cu_seqlens must ascend");
}

void check_offsets(const Attention& p, const Queue& queue) {
  if (p.cu_q) launch<check_offsets_kernel>(1, kThreads, 0, queue, p);
}

}  // namespace palm::cuda
