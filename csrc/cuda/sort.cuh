// A stable sort of 32-bit keys from the lowest digit up (radix sort, 8 bits a pass): counts of digits by
// tile, their prefix sums, then every key goes to its place. No atomics: ranks within a warp come from
// ballots.
#pragma once

#include "common.cuh"

namespace palm::cuda {
namespace {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kWarps = kThreads / 32, kKeys = 8;  // keys a thread; those of a warp are neighbours
constexpr int kTile = kThreads * kKeys;
static_assert(kDigits == kThreads, "a thread looks after a digit");

// The sum of the lanes up to this one.
PALM_DEVICE uint32_t warp_prefix(uint32_t x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t below = shuffle_up(x, d);
    if (lane >= d) x += below;
  }
  return x;
}

// A tile of keys, warp by warp, 32 neighbours at a time.
struct Tile {
  int64_t first;
  PALM_DEVICE Tile()
      : first(int64_t(blockIdx.x) * kTile + threadIdx.x / 32 * 32 * kKeys + threadIdx.x % 32) {}
  PALM_DEVICE int64_t at(int i) const { return first + i * 32; }
};

// counts[warp][digit] of this tile, and ranks[i]: how many keys before it in its warp have its digit. Keys
// beyond the last one count as the highest digit: behind them nothing follows.
PALM_DEVICE void count_digits(const uint32_t (&keys)[kKeys], int shift, uint32_t (&ranks)[kKeys],
                              uint32_t* counts) {
  for (int i = threadIdx.x; i < kWarps * kDigits; i += kThreads) counts[i] = 0;
  __syncthreads();
  const uint32_t below = (1u << threadIdx.x % 32) - 1;
  uint32_t* mine = counts + threadIdx.x / 32 * kDigits;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const uint32_t digit = keys[i] >> shift & (kDigits - 1);
    uint32_t same = kAllLanes;
#pragma unroll
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const bool set = digit >> bit & 1;
      const uint32_t lanes = ballot(set);
      same &= set ? lanes : ~lanes;
    }
    const uint32_t before = mine[digit];
    ranks[i] = before + popcount(same & below);
    sync_warp();
    if ((same & below) == 0) mine[digit] = before + popcount(same);
    sync_warp();
  }
  __syncthreads();
}

PALM_DEVICE void load_keys(uint32_t (&keys)[kKeys], const uint32_t* from, int64_t count) {
  const Tile tile;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) keys[i] = tile.at(i) < count ? from[tile.at(i)] : ~0u;
}

// counts [digit][tile]
__global__ void __launch_bounds__(kThreads)
    sort_digits_kernel(const uint32_t* keys, int64_t count, int shift, uint32_t* counts) {
  PALM_SHARED(uint32_t, shared);
  uint32_t tile[kKeys], ranks[kKeys], sum = 0;
  load_keys(tile, keys, count);
  count_digits(tile, shift, ranks, shared);
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * kDigits + threadIdx.x];
  counts[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = sum;
}

// A warp a digit: counts[digit][tile] becomes the sum of the tiles before, totals[digit] that of all.
__global__ void __launch_bounds__(kThreads)
    sort_prefix_kernel(uint32_t* counts, int64_t tiles, uint32_t* totals) {
  const int digit = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t *row = counts + digit * tiles, before = 0;
  for (int64_t begin = 0; begin < tiles; begin += 32) {
    const int64_t i = begin + lane;
    const uint32_t own = i < tiles ? row[i] : 0, sum = warp_prefix(own);
    if (i < tiles) row[i] = before + sum - own;
    before += shuffle(sum, 31);
  }
  if (lane == 0) totals[digit] = before;
}

// Every key, and the entry it came from (null: its own index), to its place.
__global__ void __launch_bounds__(kThreads)
    sort_scatter_kernel(const uint32_t* keys, const uint32_t* order, int64_t count, int shift,
                        const uint32_t* counts, const uint32_t* totals, uint32_t* keys_out,
                        uint32_t* order_out) {
  PALM_SHARED(uint32_t, shared);
  uint32_t *sums = shared + kWarps * kDigits, tile[kKeys], ranks[kKeys];
  load_keys(tile, keys, count);
  count_digits(tile, shift, ranks, shared);

  const int digit = threadIdx.x, warp = digit / 32;
  const uint32_t total = totals[digit], sum = warp_prefix(total);
  if (digit % 32 == 31) sums[warp] = sum;
  __syncthreads();
  uint32_t place = sum - total + counts[int64_t(digit) * gridDim.x + blockIdx.x];
  for (int w = 0; w < warp; ++w) place += sums[w];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t own = shared[w * kDigits + digit];
    shared[w * kDigits + digit] = place;
    place += own;
  }
  __syncthreads();
  const Tile at;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    if (at.at(i) >= count) continue;
    const uint32_t to = shared[warp * kDigits + (tile[i] >> shift & (kDigits - 1))] + ranks[i];
    keys_out[to] = tile[i];
    order_out[to] = order ? order[at.at(i)] : static_cast<uint32_t>(at.at(i));
  }
}

struct Sorted {
  uint32_t *keys, *order;  // order: the entries' indices before
};

// count < 2^31 keys, none above `largest` (1 at least). Overwrites keys.
Sorted sorted(uint32_t* keys, int64_t count, uint64_t largest, const Queue& queue) {
  const int64_t tiles = cdiv(count, kTile);
  uint32_t* counts = scratch<uint32_t>(queue, kDigits * tiles + kDigits);
  uint32_t* totals = counts + kDigits * tiles;
  uint32_t* other_keys = scratch<uint32_t>(queue, count);
  uint32_t* orders[2] = {scratch<uint32_t>(queue, count), scratch<uint32_t>(queue, count)};
  const uint32_t* order = nullptr;
  constexpr size_t kShared = (kWarps * kDigits + kWarps) * sizeof(uint32_t);
  for (int shift = 0; largest >> shift; shift += kDigitBits) {
    uint32_t* to = orders[shift / kDigitBits % 2];
    launch<sort_digits_kernel>(tiles, kThreads, kShared, queue, keys, count, shift, counts);
    launch<sort_prefix_kernel>(kDigits / kWarps, kThreads, 0, queue, counts, tiles, totals);
    launch<sort_scatter_kernel>(tiles, kThreads, kShared, queue, keys, order, count, shift, counts, totals,
                                other_keys, to);
    order = to;
    uint32_t* swap = keys;
    keys = other_keys;
    other_keys = swap;
  }
  return {keys, const_cast<uint32_t*>(order)};
}

}  // namespace
}  // namespace palm::cuda
