// Hopper's instructions: mbarriers, copies of boxes by TMA, products of warpgroups, registers moved between
// warps. As in device.cuh, every PTX instruction stands here once, beside its host twin.
#pragma once

#include "device.cuh"

#if !defined(PALM_EMULATE)
#include <cuda.h>  // types alone: nothing links against the driver
#endif

namespace palm::cuda {

// Whether these instructions exist where this is compiled for: on sm_90a, not on sm_90 or what follows it.
#if defined(PALM_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasHopper = true;
#else
constexpr bool kHasHopper = false;
#endif

// ---- mbarrier: 8 bytes of shared memory. A phase ends with its last arrival, once all bytes that were
// announced have landed; phases have the parities 0, 1, 0, ...
PALM_DEVICE void mbarrier_init(uint64_t& barrier, int arrivals) {
#if defined(PALM_EMULATE)
  emulator::mbar_init(&barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
#endif
}
// Behind the inits and before the block's barrier: TMA sees them too.
PALM_DEVICE void fence_mbarrier_init() {
#if !defined(PALM_EMULATE)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
PALM_DEVICE void mbarrier_arrive(uint64_t& barrier) {
#if defined(PALM_EMULATE)
  emulator::mbar_arrive(&barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}
// Arrives and announces bytes that copies will bring.
PALM_DEVICE void mbarrier_expect(uint64_t& barrier, int bytes) {
#if defined(PALM_EMULATE)
  emulator::mbar_arrive(&barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
#endif
}
// Until the phase of this parity has ended. The phase before the first one counts as ended, with parity 1.
PALM_DEVICE void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
#if defined(PALM_EMULATE)
  emulator::mbar_wait(&barrier, parity);
#else
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!ended);
#endif
}

// This thread's writes to shared memory become visible to TMA and wgmma.
PALM_DEVICE void fence_proxy_async() {
#if defined(PALM_EMULATE)
  emulator::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- registers: all warps of a warpgroup give some back or take them, N a thread from here on
template <int N>
PALM_DEVICE void give_registers() {
#if !defined(PALM_EMULATE)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
PALM_DEVICE void take_registers() {
#if !defined(PALM_EMULATE)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// ---- TMA: boxes of a tensor of 16-bit numbers with four dimensions, the innermost first and contiguous. A
// box lands as rows of 128 bytes, whose 16-byte chunks are swizzled by address bits 7 to 9; elements beyond
// the tensor's edges are zeros.
#if defined(PALM_EMULATE)
struct TensorMap {
  const char* data;
  uint64_t size[4], stride[4];
  uint32_t box[4];
};
inline size_t swizzled(size_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }
inline size_t shared_offset(const void* p) { return static_cast<const char*>(p) - emulator::block().shared; }
#else
using TensorMap = CUtensorMap;
#endif

// stride: bytes of dimensions 1 to 3. False where TMA cannot describe the tensor.
inline bool tensor_map(TensorMap& map, Dtype dtype, void* data, const uint64_t (&size)[4],
                       const uint64_t (&stride)[3], const uint32_t (&box)[4]) {
#if defined(PALM_EMULATE)
  (void)dtype;
  map = {static_cast<const char*>(data), {}, {2}, {}};
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 == 128;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = size[i];
    map.box[i] = box[i];
    if (i) map.stride[i] = stride[i - 1];
    fits = fits && size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 &&
           (i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] < uint64_t(1) << 40));
  }
  return fits;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // not an error of the launch that follows
    return reinterpret_cast<Encode>(found);
  }();
  const uint32_t step[4] = {1, 1, 1, 1};
  return encode &&
         encode(&map,
                dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
                data, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#endif
}

// One thread starts the copy of the box at (x, y, z, w); its bytes, all of the box, complete `barrier`.
PALM_DEVICE void copy_box(void* to, const TensorMap& map, int x, int y, int z, int w, uint64_t& barrier) {
#if defined(PALM_EMULATE)
  const size_t start = shared_offset(to);
  if (start % 128) emulator::fail("TMA: a destination is not aligned to 128 bytes");
  ++emulator::counts().bulk_copies;
  auto land = [=, bar = &barrier] {  // the map by value: its thread may have ended
    const int64_t first[4] = {x, y, z, w};
    size_t offset = start;
    for (uint32_t i = 0; i < map.box[1] * map.box[2] * map.box[3]; ++i)
      for (uint32_t c = 0; c < map.box[0]; ++c, offset += 2) {
        const int64_t at[4] = {first[0] + c, first[1] + i % map.box[1],
                               first[2] + i / map.box[1] % map.box[2],
                               first[3] + i / map.box[1] / map.box[2]};
        const char* from = map.data;
        bool inside = true;
        for (int d = 0; d < 4; ++d) {
          inside = inside && at[d] >= 0 && static_cast<uint64_t>(at[d]) < map.size[d];
          from += at[d] * static_cast<int64_t>(map.stride[d]);
        }
        uint16_t element = 0;
        if (inside) memcpy(&element, from, 2);
        memcpy(emulator::async_shared(swizzled(offset), 2), &element, 2);
        memcpy(emulator::block().shared + swizzled(offset), &element, 2);
      }
    emulator::mbar_update(bar, 0, -static_cast<int>(offset - start));
  };
  emulator::block().late ? emulator::block().bulk.push_back(land) : land();
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// ---- wgmma: d (+)= a b of 64 x N x 16, by the four warps of a warpgroup together and asynchronously. Warp w
// has rows 16 w to 16 w + 15 of d and a, in mma's fragments (device.cuh): d[n] is d's tile n of 16 x 8.
//
// Operands in shared memory are given by descriptors: rows of 128 bytes as TMA writes them. Along K (a row
// holds 64 neighbouring k of one m or n): `stride` bytes lie between groups of 8 rows. Along N (a row holds
// 64 neighbouring n of one k): `lead` bytes lie between groups of 64 n, `stride` bytes between groups of 8 k.
PALM_DEVICE uint64_t descriptor(const void* tile, int lead, int stride) {
#if defined(PALM_EMULATE)
  const uint64_t address = shared_offset(tile);
#else
  const uint64_t address = shared_address(tile);
#endif
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return (address & 0x3ffff) >> 4 | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzle128;
}

#if defined(PALM_EMULATE)
struct Operand {
  size_t start, lead, stride;

  explicit Operand(uint64_t bits)
      : start((bits & 0x3fff) << 4), lead((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) emulator::fail("wgmma: only the 128-byte swizzle is modelled");
    if (bits >> 49 & 7) emulator::fail("wgmma: no base offset is modelled");
  }
  template <class T>
  float at(size_t row, size_t k, bool along_k) const {
    const size_t from = along_k ? row / 8 * stride + row % 8 * 128 + k * 2
                                : row / 64 * lead + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
    uint16_t bits;
    memcpy(&bits, emulator::async_shared(swizzled(start + from), 2), 2);
    return half_of<T>(bits, 0);
  }
};

// The part of one warp; `registers`, if not null, hold its a. They are read and d is written when it runs.
template <class T, int N, bool ALONG_N>
inline void wgmma_of_warp(float (&d)[N / 8][4], const uint32_t* registers, uint64_t a, uint64_t b,
                          bool accumulate) {
  struct In {
    const uint32_t* registers;
    uint64_t a, b;
    bool accumulate;
  } in{registers, a, b, accumulate};
  emulator::meet("wgmma", kAllLanes, &in, d, [](emulator::Fiber** lanes, uint32_t) {
    struct {
      In in;
      int first;
      const uint32_t* a[32];
      float (*d[32])[4];
    } work;
    work.in = *static_cast<const In*>(lanes[0]->in);
    work.first = lanes[0]->warp % 4 * 16;
    for (int l = 0; l < 32; ++l) {
      const In& in = *static_cast<const In*>(lanes[l]->in);
      if (in.a != work.in.a || in.b != work.in.b || in.accumulate != work.in.accumulate)
        emulator::fail("wgmma: lanes disagree about an operand");
      work.a[l] = in.registers;
      work.d[l] = static_cast<float (*)[4]>(lanes[l]->out);
    }
    emulator::issue([work] {
      float A[16][16], B[16][N], D[16][N] = {};
      for (int l = 0; l < 32 && work.in.registers; ++l)
        for (int r = 0; r < 4; ++r)
          for (int h = 0; h < 2; ++h)
            A[l / 4 + r % 2 * 8][l % 4 * 2 + h + r / 2 * 8] = half_of<T>(work.a[l][r], h);
      const Operand a(work.in.registers ? uint64_t(1) << 62 : work.in.a), b(work.in.b);
      for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < 16 && !work.in.registers; ++m) A[m][k] = a.at<T>(work.first + m, k, true);
        for (int n = 0; n < N; ++n) B[k][n] = b.at<T>(n, k, !ALONG_N);
      }
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
          for (int n = 0; n < N; ++n) D[m][n] += A[m][k] * B[k][n];
      for (int l = 0; l < 32; ++l)
        for (int i = 0; i < N / 8; ++i)
          for (int c = 0; c < 4; ++c) {
            const float x = D[l / 4 + c / 2 * 8][i * 8 + l % 4 * 2 + c % 2];
            work.d[l][i][c] = work.in.accumulate ? work.d[l][i][c] + x : x;
          }
    });
  });
}
#else
// The accumulators of N columns, N / 2 registers, as a list in PTX and as operands of asm.
#define PALM_REGISTERS_64                                                                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27," \
  "%28,%29,%30,%31"
#define PALM_REGISTERS_80 PALM_REGISTERS_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PALM_REGISTERS_128 \
  PALM_REGISTERS_80        \
  ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define PALM_REGISTERS_256                                                                                \
  PALM_REGISTERS_128                                                                                      \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"   \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PALM_TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PALM_TILES_16(n) PALM_TILE(n), PALM_TILE(n + 1)
#define PALM_TILES_64(n) PALM_TILES_16(n), PALM_TILES_16(n + 2), PALM_TILES_16(n + 4), PALM_TILES_16(n + 6)
#define PALM_OPERANDS_64 PALM_TILES_64(0)
#define PALM_OPERANDS_80 PALM_TILES_64(0), PALM_TILES_16(8)
#define PALM_OPERANDS_128 PALM_TILES_64(0), PALM_TILES_64(8)
#define PALM_OPERANDS_256 PALM_OPERANDS_128, PALM_TILES_64(16), PALM_TILES_64(24)

// ACCUMULATE is the operand's number; A, B and FLAGS are their text; the inputs follow.
#define PALM_WGMMA_OF(COLUMNS, TYPE, A, B, ACCUMULATE, FLAGS, ...)                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                              \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
               " {" PALM_REGISTERS_##COLUMNS "}, " A ", " B ", p, " FLAGS ";\n}"           \
               : PALM_OPERANDS_##COLUMNS                                                   \
               : __VA_ARGS__)
#define PALM_WGMMA(COLUMNS, ...)                   \
  if constexpr (N == COLUMNS) {                    \
    if constexpr (std::is_same_v<T, bf16>)         \
      PALM_WGMMA_OF(COLUMNS, "bf16", __VA_ARGS__); \
    else                                           \
      PALM_WGMMA_OF(COLUMNS, "f16", __VA_ARGS__);  \
  }
#endif

// a and b in shared memory, a along K, b along K or N. Without `accumulate` d is overwritten.
template <class T, int N, bool ALONG_N>
PALM_DEVICE void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
#if defined(PALM_EMULATE)
  wgmma_of_warp<T, N, ALONG_N>(d, nullptr, a, b, accumulate);
#else
  static_assert(N == 80 || N == 128);
#define PALM_INPUTS "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(ALONG_N))
  PALM_WGMMA(80, "%40", "%41", "%42", "1, 1, 0, %43", PALM_INPUTS)
  PALM_WGMMA(128, "%64", "%65", "%66", "1, 1, 0, %67", PALM_INPUTS)
#undef PALM_INPUTS
#endif
}
// a in registers, which must stay as they are until the product is waited for.
template <class T, int N, bool ALONG_N>
PALM_DEVICE void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#if defined(PALM_EMULATE)
  wgmma_of_warp<T, N, ALONG_N>(d, a, 0, b, accumulate);
#else
  static_assert(N == 64 || N == 128 || N == 256);
#define PALM_INPUTS \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(ALONG_N))
  PALM_WGMMA(64, "{%32, %33, %34, %35}", "%36", "%37", "1, 1, %38", PALM_INPUTS)
  PALM_WGMMA(128, "{%64, %65, %66, %67}", "%68", "%69", "1, 1, %70", PALM_INPUTS)
  PALM_WGMMA(256, "{%128, %129, %130, %131}", "%132", "%133", "1, 1, %134", PALM_INPUTS)
#undef PALM_INPUTS
#endif
}

// What the compiler may compute of x it computes before this point, what reads x after it.
template <class X, int N>
PALM_DEVICE void hold(X (&x)[N][4]) {
#if defined(PALM_EMULATE)
  (void)x;
#else
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if constexpr (std::is_same_v<X, float>)
        asm volatile("" : "+f"(x[i][c])::"memory");
      else
        asm volatile("" : "+r"(x[i][c])::"memory");
#endif
}

// Before the first product, and between any other use of its registers, which are named here, and a product.
template <class... Registers>
PALM_DEVICE void wgmma_fence(Registers&... registers) {
  (hold(registers), ...);
#if defined(PALM_EMULATE)
  emulator::meet("wgmma_fence", kAllLanes, nullptr, nullptr,
                 [](emulator::Fiber**, uint32_t) { emulator::warp().fenced = true; });
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
PALM_DEVICE void wgmma_commit() {
#if defined(PALM_EMULATE)
  emulator::meet("wgmma_commit", kAllLanes, nullptr, nullptr,
                 [](emulator::Fiber**, uint32_t) { emulator::commit_products(); });
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most PENDING groups of products are under way; d: the accumulators that may be read from here on.
template <int PENDING, int N>
PALM_DEVICE void wgmma_wait(float (&d)[N][4]) {
#if defined(PALM_EMULATE)
  emulator::meet("wgmma_wait", kAllLanes, nullptr, nullptr,
                 [](emulator::Fiber**, uint32_t) { emulator::wait_products(PENDING); });
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
  hold(d);
}

}  // namespace palm::cuda
