// Attention forward by Hopper's own instructions (FlashAttention-3): one warpgroup copies tiles of keys and
// values by TMA into a ring of stages, two others, 64 packed rows each, multiply them by wgmma. While a
// warpgroup weighs its scores the other's products run: they take turns to issue theirs, the scores of the
// next tile together with the values of this one.
#include "attention_forward.cuh"
#include "hopper.cuh"

namespace palm::cuda {

#if PALM_SM90A

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2, kBlockRows = 64 * kConsumers, kBlockThreads = kGroup * (1 + kConsumers);
enum NamedBarrier { kTurn = 1, kOwn = 3 };  // one of each a consumer

// Tiles are [D / 64][rows][64]: rows of 128 bytes, swizzled as TMA does.
template <class T, int D>
struct Ring {
  static constexpr int BN = D == 256 ? 80 : 128, STAGES = D == 64 ? 3 : 2;
  T q[kBlockRows * D];  // in the end out
  T k[STAGES][BN * D], v[STAGES][BN * D];
  uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], v_raw;
};

struct Stage {
  int index = 0;
  uint32_t parity = 0;

  PALM_DEVICE void next(int stages) {
    if (++index < stages) return;
    index = 0;
    parity ^= 1;
  }
};

template <int ROWS, class T>
PALM_DEVICE T* chunk_of(T* tile, int row, int chunk) {
  return tile + (chunk / 8 * ROWS + row) * 64 + ((chunk ^ (row & 7)) & 7) * 8;
}

// ---- the producer: one warp
template <class T, int D>
PALM_DEVICE void copy_tile(T* to, const TensorMap& map, int token, int head, int batch, uint64_t& full) {
  constexpr int BN = Ring<T, D>::BN;
  if (threadIdx.x % 32) return;
  mbarrier_expect(full, BN * D * sizeof(T));
#pragma unroll
  for (int x = 0; x < D; x += 64) copy_box(to + x * BN, map, x, token, head, batch, full);
}

template <class T, int D>
PALM_DEVICE void produce(const Attention& p, const Sequence& s, int head, const Range& range,
                         Ring<T, D>& ring, const TensorMap& k_map, const TensorMap& v_map) {
  constexpr int BN = Ring<T, D>::BN;
  const int batch = p.cu_k ? 0 : s.b, lane = threadIdx.x % 32;
  Stage k{0, 1}, v{0, 1};
  // In the order of use: the scores of the next tile come before the values of this one.
  for (int j = range.begin; j <= range.end; ++j) {
    const int token = s.k_row + j * BN;
    if (j < range.end) {
      mbarrier_wait(ring.k_empty[k.index], k.parity);
      copy_tile<T, D>(ring.k[k.index], k_map, token, head, batch, ring.k_full[k.index]);
      k.next(Ring<T, D>::STAGES);
    }
    if (j == range.begin) continue;
    T* const tile = ring.v[v.index];
    uint64_t& full = ring.v_full[v.index];
    mbarrier_wait(ring.v_empty[v.index], v.parity);
    // The rows behind a packed sequence are another's: weight 0 times what stands there may be NaN.
    const bool ragged = p.cu_k && j * BN > s.S;
    copy_tile<T, D>(tile, v_map, token - BN, head, batch, ragged ? ring.v_raw : full);
    if (ragged) {
      mbarrier_wait(ring.v_raw, 0);
      for (int row = s.S - (j - 1) * BN; row < BN; ++row)
        if (lane < D / 8) *reinterpret_cast<uint4*>(chunk_of<BN>(tile, row, lane)) = {};
      fence_proxy_async();
      sync_warp();
      if (lane == 0) mbarrier_arrive(full);
    }
    v.next(Ring<T, D>::STAGES);
  }
}

// ---- a consumer: thread l % 32 of a warp has rows l / 4 and l / 4 + 8 of its warp's 16
template <class T, int D>
PALM_DEVICE void load_group(T* tile, const Attention& p, const Sequence& s, const RowTile& r, int first) {
  constexpr int CHUNKS = D / 8;
  const int thread = threadIdx.x % kGroup, chunk = thread % CHUNKS;
#pragma unroll
  for (int i = thread / CHUNKS; i < 64; i += kGroup / CHUNKS) {
    const int row = r.first + first + i;
    const bool wanted = row < r.rows;
    const T* from = wanted ? at_row<const T>(p.q, s, group(p), r.head, row) + chunk * 8 : nullptr;
    copy_async<16>(chunk_of<kBlockRows>(tile, first + i, chunk), from, wanted);
  }
  commit_copies();
  wait_copies<0>();
  fence_proxy_async();
}

// s = q k^T
template <class T, int D, int BN>
PALM_DEVICE void start_scores(float (&s)[BN / 8][4], uint64_t q, uint64_t k) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int panel = i / 4, step = i % 4 * 32;  // bytes
    wgmma<T, BN, false>(s, q + ((panel * kBlockRows * 128 + step) >> 4), k + ((panel * BN * 128 + step) >> 4),
                        i > 0);
  }
  wgmma_commit();
}
// o += weights v
template <class T, int D, int BN>
PALM_DEVICE void start_values(float (&o)[D / 8][4], const uint32_t (&weights)[BN / 16][4], uint64_t v) {
#pragma unroll
  for (int i = 0; i < BN / 16; ++i) wgmma<T, D, true>(o, weights[i], v + ((i * 16 * 128) >> 4), true);
  wgmma_commit();
}

template <class T, int N>
PALM_DEVICE void round_weights(uint32_t (&weights)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const typename Mma<T>::A a = Mma<T>::a_of(s + 2 * i);
#pragma unroll
    for (int r = 0; r < 4; ++r) weights[i][r] = a.r[r];
  }
}

// out and lse of a warpgroup's rows, `first` on; out goes through the queries' place, to be stored by rows.
template <class T, int D>
PALM_DEVICE void store_rows(T* tile, const Attention& p, const Sequence& s, const RowTile& r, int first,
                            const float (&o)[D / 8][4], const RowSums& sums) {
  const int lane = threadIdx.x % 32, G = group(p), warp_row = first + threadIdx.x % kGroup / 32 * 16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + lane / 4 + h * 8, global = r.first + row;
    const float total = row_sum(sums.total[h]), factor = total == 0 ? 0 : reciprocal_fast(total);
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      store_pair(chunk_of<kBlockRows>(tile, row, i) + lane % 4 * 2, o[i][2 * h] * factor,
                 o[i][2 * h + 1] * factor);
    if (lane % 4 == 0 && global < r.rows)
      *at_row<float>(p.lse, s, G, r.head, global) = log_sum(sums.top[h], total, unit_of(p));
  }
  sync_warp();
  constexpr int CHUNKS = D / 8;
#pragma unroll 4
  for (int i = lane / CHUNKS; i < 16; i += 32 / CHUNKS) {
    const int row = r.first + warp_row + i, chunk = lane % CHUNKS;
    if (row >= r.rows) break;
    store_16(at_row<T>(p.out, s, G, r.head, row) + chunk * 8,
             *reinterpret_cast<const uint4*>(chunk_of<kBlockRows>(tile, warp_row + i, chunk)));
  }
}

template <class T, int D>
PALM_DEVICE void consume(const Attention& p, const Sequence& s, const RowTile& r, const Range& range,
                         int consumer, Ring<T, D>& ring) {
  constexpr int BN = Ring<T, D>::BN, STAGES = Ring<T, D>::STAGES, ALL = kGroup * kConsumers;
  const int lane = threadIdx.x % 32, first = consumer * 64;
  load_group<T, D>(ring.q, p, s, r, first);
  sync_named(kOwn + consumer, kGroup);

  const int row = r.first + first + threadIdx.x % kGroup / 32 * 16 + lane / 4, G = group(p);
  const Bounds sees[2] = {visible(p, s, row / G), visible(p, s, (row + 8) / G)};
  const uint64_t q = descriptor(ring.q + first * 64, 0, 1024);
  const auto k_tile = [&](int i) { return descriptor(ring.k[i], 0, 1024); };
  const auto v_tile = [&](int i) { return descriptor(ring.v[i], BN * 128, 1024); };
  const auto release = [&](uint64_t& empty) {
    if (lane == 0) mbarrier_arrive(empty);
  };
  float scores[BN / 8][4] = {}, o[D / 8][4] = {}, shrink[2];
  uint32_t weights[BN / 16][4];
  RowSums sums;
  const auto weigh = [&](int j) {
    if (j < range.full0 || j >= range.full1) mask_scores(scores, j * BN, sees);
    raise(sums, scores, unit_of(p), shrink);
    exponentials(scores, sums, unit_of(p));
  };

  if (range.begin < range.end) {
    Stage stage, before;  // of the scores, of the values
    mbarrier_wait(ring.k_full[0], 0);
    wgmma_fence(scores);
    start_scores<T, D, BN>(scores, q, k_tile(0));
    wgmma_wait<0>(scores);
    release(ring.k_empty[0]);
    weigh(range.begin);
    round_weights<T>(weights, scores);
    stage.next(STAGES);
    if (consumer == 1 && range.begin + 1 < range.end) arrive_named(kTurn, ALL);
    for (int j = range.begin + 1; j < range.end; ++j) {
      mbarrier_wait(ring.k_full[stage.index], stage.parity);
      sync_named(kTurn + consumer, ALL);
      wgmma_fence(scores);
      start_scores<T, D, BN>(scores, q, k_tile(stage.index));
      mbarrier_wait(ring.v_full[before.index], before.parity);
      wgmma_fence(o, weights);
      start_values<T, D, BN>(o, weights, v_tile(before.index));
      if (consumer == 0 || j + 1 < range.end) arrive_named(kTurn + 1 - consumer, ALL);
      wgmma_wait<1>(scores);
      release(ring.k_empty[stage.index]);
      weigh(j);
      wgmma_wait<0>(o);
      release(ring.v_empty[before.index]);
      if (ballot(shrink[0] != 1 || shrink[1] != 1)) scale_rows(o, shrink);
      round_weights<T>(weights, scores);
      before = stage;
      stage.next(STAGES);
    }
    mbarrier_wait(ring.v_full[before.index], before.parity);
    wgmma_fence(o, weights);
    start_values<T, D, BN>(o, weights, v_tile(before.index));
    wgmma_wait<0>(o);
  }
  sync_named(kOwn + consumer, kGroup);
  store_rows<T, D>(ring.q, p, s, r, first, o, sums);
}

template <class T, int D>
PALM_DEVICE void attend(const Attention& p, const TensorMap& k_map, const TensorMap& v_map) {
  using Tiles = Ring<T, D>;
  PALM_SHARED(Tiles, ring);
  const RowTile r = row_tile(p, blockIdx.x, kBlockRows);
  if (r.first >= r.rows) return;
  const Sequence s = whole_sequence(p, r.sequence);
  const int G = group(p), last = min(r.first + kBlockRows, r.rows) - 1;
  const Range range = key_tiles(p, s, r.first / G, last / G, Tiles::BN);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiles::STAGES; ++i) {
      mbarrier_init(ring->k_full[i], 1);
      mbarrier_init(ring->v_full[i], 1);
      mbarrier_init(ring->k_empty[i], kConsumers * 4);  // warps
      mbarrier_init(ring->v_empty[i], kConsumers * 4);
    }
    mbarrier_init(ring->v_raw, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  // 384 threads begin with 168 registers: 128 x 24 + 256 x 240 are as many.
  const int consumer = shuffle(int(threadIdx.x / kGroup), 0) - 1;  // known to be the same in a warp
  if (consumer < 0) {
    give_registers<24>();
    if (threadIdx.x < 32) produce<T, D>(p, s, r.head, range, *ring, k_map, v_map);
  } else {
    take_registers<240>();
    consume<T, D>(p, s, r, range, consumer, *ring);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Attention p, const __grid_constant__ TensorMap k_map,
                            const __grid_constant__ TensorMap v_map) {
  if constexpr (kHasHopper) attend<T, D>(p, k_map, v_map);
}

// The keys or values of all sequences, in boxes of 64 columns of BN tokens of one head.
static bool map_keys(TensorMap& map, const Attention& p, const Heads& x, int BN) {
  const uint64_t size[4] = {uint64_t(p.D), uint64_t(p.cu_k ? p.k_rows : p.S), uint64_t(p.K),
                            uint64_t(p.cu_k ? 1 : p.B)};
  const int64_t given[3] = {x.token, x.head, x.batch};
  uint64_t stride[3];
  for (int i = 0; i < 3; ++i) {
    if (size[i + 1] > 1 && given[i] <= 0) return false;
    stride[i] = 2 * uint64_t(size[i + 1] > 1 ? given[i] : p.D);
  }
  return tensor_map(map, p.dtype, x.data, size, stride, {64, uint32_t(BN), 1, 1});
}

template <class T, int D>
static bool run(const Attention& p, const Queue& queue) {
  using Tiles = Ring<T, D>;
  TensorMap k_map, v_map;
  if (!aligned<T>(p.q) || !aligned<T>(p.out)) return false;
  if (!map_keys(k_map, p, p.k, Tiles::BN) || !map_keys(v_map, p, p.v, Tiles::BN)) return false;
  launch<attention_hopper_kernel<T, D>>(p.K * row_slots(p, kBlockRows), kBlockThreads, sizeof(Tiles), queue,
                                        p, k_map, v_map);
  return true;
}
template <class T>
static bool run_dim(const Attention& p, const Queue& queue) {
  switch (p.D) {
    case 64: return run<T, 64>(p, queue);
    case 128: return run<T, 128>(p, queue);
    case 256: return run<T, 256>(p, queue);
    default: return false;
  }
}

bool attention_fwd_hopper(const Attention& p, const Queue& queue) {
  const float unit = float(p.scale) * kLog2e;  // of an exponent, neither 0 nor infinite
  const bool plain = !p.key_bias && !p.cache_lengths && unit > 1e-30f && unit < 1e30f;
  if (queue.arch != 90 || !plain || p.K * row_slots(p, kBlockRows) == 0) return false;
  if (p.dtype == Dtype::bf16) return run_dim<bf16>(p, queue);
  if (p.dtype == Dtype::f16) return run_dim<f16>(p, queue);
  return false;
}
#else
bool attention_fwd_hopper(const Attention&, const Queue&) { return false; }
#endif

}  // namespace palm::cuda
