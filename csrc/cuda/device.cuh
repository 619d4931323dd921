// What kernels need beyond plain C++: launches, shared memory, warp collectives, tensor cores, asynchronous
// copies, fast mathematics. Every PTX instruction stands here once (Hopper's in hopper.cuh), beside its host
// twin, with which tests/emulator runs the same kernels on the CPU.
#pragma once

#if defined(PALM_EMULATE)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../ops.h"

#if defined(PALM_EMULATE)
#define PALM_DEVICE inline
#define PALM_SHARED(T, name) T* name = reinterpret_cast<T*>(palm::emulator::block().shared)
// A device-side assertion on data that the host cannot see; the message begins with the op's name.
#define PALM_ASSERT(condition, message) \
  if (!(condition)) palm::emulator::assertion_failed(message)
#else
#define PALM_DEVICE __device__ __forceinline__
#define PALM_SHARED(T, name)                                            \
  extern __shared__ __align__(1024) unsigned char palm_shared_memory[]; \
  T* name = reinterpret_cast<T*>(palm_shared_memory)
#define PALM_ASSERT(condition, message) assert((condition) && message)
#endif

namespace palm::cuda {

#if defined(PALM_EMULATE)
using std::max;
using std::min;
#endif
using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

// ---- launch: kernel<<<grid, block, shared bytes>>>(arguments) in the queue's stream. An error is left for
// the caller's cudaGetLastError.
template <auto kernel, class... A>
void launch(dim3 grid, dim3 block, size_t shared, const Queue& queue, const A&... arguments) {
#if defined(PALM_EMULATE)
  emulator::launch(grid, block, shared, queue.arch, [&] { kernel(arguments...); });
#else
  if (shared > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
#endif
}

template <class T>
T* scratch(const Queue& queue, int64_t count) {
  return static_cast<T*>(queue.allocate(queue.owner, count * static_cast<int64_t>(sizeof(T))));
}

// ---- warp collectives
#if defined(PALM_EMULATE)
template <class T>
inline T shuffle_from(const char* name, T value, int source, uint32_t mask) {
  struct In {
    T value;
    int source;
  } in{value, source};
  T out;
  emulator::meet(name, mask, &in, &out, [](emulator::Fiber** lanes, uint32_t m) {
    for (int l = 0; l < 32; ++l) {
      if (!(m >> l & 1)) continue;
      const int source = static_cast<const In*>(lanes[l]->in)->source;
      if (!(m >> source & 1)) emulator::fail("a shuffle from a lane outside its mask");
      *static_cast<T*>(lanes[l]->out) = static_cast<const In*>(lanes[source]->in)->value;
    }
  });
  return out;
}
#endif

template <class T>
PALM_DEVICE T shuffle_xor(T value, int distance, uint32_t mask = kAllLanes) {
#if defined(PALM_EMULATE)
  return shuffle_from("shuffle_xor", value, emulator::self().lane ^ distance, mask);
#else
  return __shfl_xor_sync(mask, value, distance);
#endif
}

template <class T>
PALM_DEVICE T shuffle(T value, int source, uint32_t mask = kAllLanes) {
#if defined(PALM_EMULATE)
  return shuffle_from("shuffle", value, source & 31, mask);
#else
  return __shfl_sync(mask, value, source);
#endif
}

// The value `distance` lanes below; the lanes without one keep their own.
template <class T>
PALM_DEVICE T shuffle_up(T value, int distance, uint32_t mask = kAllLanes) {
#if defined(PALM_EMULATE)
  const int lane = emulator::self().lane;
  return shuffle_from("shuffle_up", value, lane < distance ? lane : lane - distance, mask);
#else
  return __shfl_up_sync(mask, value, distance);
#endif
}

PALM_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kAllLanes) {
#if defined(PALM_EMULATE)
  uint32_t out;
  emulator::meet("ballot", mask, &predicate, &out, [](emulator::Fiber** lanes, uint32_t m) {
    uint32_t bits = 0;
    for (int l = 0; l < 32; ++l)
      if ((m >> l & 1) && *static_cast<const bool*>(lanes[l]->in)) bits |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (m >> l & 1) *static_cast<uint32_t*>(lanes[l]->out) = bits;
  });
  return out;
#else
  return __ballot_sync(mask, predicate);
#endif
}

PALM_DEVICE int popcount(uint32_t bits) {
#if defined(PALM_EMULATE)
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}

PALM_DEVICE void sync_warp(uint32_t mask = kAllLanes) {
#if defined(PALM_EMULATE)
  emulator::meet("sync_warp", mask, nullptr, nullptr, [](emulator::Fiber**, uint32_t) {});
#else
  __syncwarp(mask);
#endif
}

// Barrier `id` (1 to 15) of `threads` threads of the block.
PALM_DEVICE void sync_named(int id, int threads) {
#if defined(PALM_EMULATE)
  emulator::named_barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
PALM_DEVICE void arrive_named(int id, int threads) {
#if defined(PALM_EMULATE)
  emulator::named_barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// threadIdx.x, read anew: the compiler cannot move what follows from it out of a loop, where it would occupy
// registers all along.
PALM_DEVICE int thread_again() {
#if defined(PALM_EMULATE)
  return threadIdx.x;
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// ---- numbers
PALM_DEVICE float to_float(float x) { return x; }
// A bf16 is a float's upper half. (__bfloat162float is cvt.f32.bf16 on sm_90, which wants each number in a
// register of its own.)
PALM_DEVICE float to_float(bf16 x) {
#if defined(PALM_EMULATE)
  return __bfloat162float(x);
#else
  float y;
  asm("mov.b32 %0, {%1, %2};" : "=f"(y) : "h"(uint16_t(0)), "h"(static_cast<__nv_bfloat16_raw>(x).x));
  return y;
#endif
}
PALM_DEVICE float to_float(f16 x) { return __half2float(x); }

template <class T>
PALM_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, f16>)
    return __float2half_rn(x);
  else
    return x;
}

// Two 16-bit numbers in one register, lo in the lower half (one cvt.rn.bf16x2.f32 or cvt.rn.f16x2.f32).
template <class T>
PALM_DEVICE uint32_t pack(float lo, float hi) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(lo, hi);
    memcpy(&bits, &both, 4);
  } else {
    const __half2 both = __floats2half2_rn(lo, hi);
    memcpy(&bits, &both, 4);
  }
  return bits;
}

// a b as rounded: never fused with a sum that it goes into (where that sum should cancel exactly).
PALM_DEVICE float rounded_product(float a, float b) {
#if defined(PALM_EMULATE)
  const volatile float product = a * b;
  return product;
#else
  return __fmul_rn(a, b);
#endif
}

// 2^x, within 2 ulp; subnormal results are 0.
PALM_DEVICE float exp2_fast(float x) {
#if defined(PALM_EMULATE)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, within 1 ulp; subnormal results are 0.
PALM_DEVICE float reciprocal_fast(float x) {
#if defined(PALM_EMULATE)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// x rounded to tf32 (to nearest, ties away from zero), in its float32 bits.
PALM_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
#if defined(PALM_EMULATE)
  memcpy(&bits, &x, 4);
  if (std::isfinite(x)) bits = (bits + 0x1000u) & 0xffffe000u;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// x, of which the optimizer then knows nothing: it keeps no registers for what it made of x before.
PALM_DEVICE uint4 opaque(uint4 x) {
#if !defined(PALM_EMULATE)
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
#endif
  return x;
}

// ---- tensor cores. d += a b, fragments as the PTX manual numbers them; lane l has g = l / 4, t = l % 4:
// a holds rows g and g + 8, b column g, d rows g and g + 8 and columns 2 t, 2 t + 1.
#if defined(PALM_EMULATE)
template <class T>
inline float half_of(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * which);
  T x;
  memcpy(static_cast<void*>(&x), &bits, 2);
  return to_float(x);
}
inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The product of one warp, from A [16][K] and B [K][8] as element(lane's registers, row or column, k) gave
// them.
template <int K, class Unpack>
inline void mma_of_warp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Unpack) {
  struct In {
    uint32_t a[4], b[2];
  } in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emulator::meet("mma", kAllLanes, &in, d, [](emulator::Fiber** lanes, uint32_t) {
    ++emulator::counts().mma;
    float A[16][K], B[8][K];
    for (int l = 0; l < 32; ++l) Unpack::lane(*static_cast<const In*>(lanes[l]->in), l >> 2, l & 3, A, B);
    for (int l = 0; l < 32; ++l)
      for (int c = 0; c < 4; ++c) {
        const float *row = A[(l >> 2) + (c >> 1) * 8], *column = B[(l & 3) * 2 + (c & 1)];
        float sum = 0;
        for (int k = 0; k < K; ++k) sum += row[k] * column[k];
        static_cast<float*>(lanes[l]->out)[c] += sum;
      }
  });
}
template <class T>
struct Unpack16 {  // m16n8k16: registers hold pairs of neighbouring k
  template <class In>
  static void lane(const In& x, int g, int t, float (&A)[16][16], float (&B)[8][16]) {
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) A[g + r % 2 * 8][t * 2 + h + r / 2 * 8] = half_of<T>(x.a[r], h);
    for (int r = 0; r < 2; ++r)
      for (int h = 0; h < 2; ++h) B[g][t * 2 + h + r * 8] = half_of<T>(x.b[r], h);
  }
};
struct UnpackTf32 {  // m16n8k8: one k a register; the unit ignores the lowest 13 bits
  template <class In>
  static void lane(const In& x, int g, int t, float (&A)[16][8], float (&B)[8][8]) {
    for (int r = 0; r < 4; ++r) A[g + r % 2 * 8][t + r / 2 * 4] = bits_to_float(x.a[r] & 0xffffe000u);
    for (int r = 0; r < 2; ++r) B[g][t + r * 4] = bits_to_float(x.b[r] & 0xffffe000u);
  }
};
#endif

// m16n8k16 of bf16 or f16: a[0..3] = (row g, k 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), pairs of
// neighbouring k; b[0..1] = (k 2t, column g), (2t + 8, g).
template <class T>
PALM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#if defined(PALM_EMULATE)
  mma_of_warp<16>(d, a, b, Unpack16<T>{});
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// m16n8k8 of tf32: a[0..3] = (row g, k t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b[0..1] = (k t, column g),
// (t + 4, g).
PALM_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(PALM_EMULATE)
  mma_of_warp<8>(d, a, b, UnpackTf32{});
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#if !defined(PALM_EMULATE)
PALM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l gives row l % 8 of matrix l / 8 (16
// bytes), and gets of matrix i in r[i] the pair at row l / 4, columns 2 (l % 4) and + 1 (TRANS: at column
// l / 4, rows 2 (l % 4) and + 1).
template <bool TRANS>
PALM_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
#if defined(PALM_EMULATE)
  emulator::meet(
      TRANS ? "ldmatrix.trans" : "ldmatrix", kAllLanes, row, r, [](emulator::Fiber** lanes, uint32_t) {
        for (int m = 0; m < 4;
             ++m) {  // 8 rows at once: without conflict iff they cover all 8 columns of 16 bytes
          int hits[8] = {}, worst = 0;
          for (int i = 0; i < 8; ++i) {
            const auto address = reinterpret_cast<uintptr_t>(lanes[m * 8 + i]->in);
            if (address % 16) emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
            worst = std::max(worst, ++hits[address / 16 % 8]);
          }
          ++emulator::counts().ldmatrix;
          emulator::counts().bank_conflicts += worst - 1;
        }
        for (int l = 0; l < 32; ++l)
          for (int m = 0; m < 4; ++m) {
            uint16_t pair[2];
            for (int h = 0; h < 2; ++h) {
              const int row = TRANS ? (l & 3) * 2 + h : l >> 2, column = TRANS ? l >> 2 : (l & 3) * 2 + h;
              pair[h] = static_cast<const uint16_t*>(lanes[m * 8 + row]->in)[column];
            }
            static_cast<uint32_t*>(lanes[l]->out)[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
          }
      });
#else
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// ---- 16 bytes of global memory in one access, p aligned to them (a plain store of a uint4 may be taken
// apart)
PALM_DEVICE uint4 load_16(const void* p) {
#if defined(PALM_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a 16-byte load is not aligned");
#endif
  return *static_cast<const uint4*>(p);
}
PALM_DEVICE void store_16(void* p, uint4 words) {
#if defined(PALM_EMULATE)
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a 16-byte store is not aligned");
  *static_cast<uint4*>(p) = words;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#endif
}

// ---- asynchronous copies from global to shared memory (cp.async): 4, 8 or 16 bytes, aligned to their size;
// zeros where not `wanted` (then `from` is not read). They land when this thread waits for their group.
template <int BYTES>
PALM_DEVICE void copy_async(void* to, const void* from, bool wanted) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#if defined(PALM_EMULATE)
  emulator::copy_async({to, wanted ? from : nullptr, BYTES});
#else
  const int bytes = wanted ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                 "n"(BYTES), "r"(bytes)
                 : "memory");
#endif
}
PALM_DEVICE void commit_copies() {
#if defined(PALM_EMULATE)
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most PENDING of this thread's groups are still under way.
template <int PENDING>
PALM_DEVICE void wait_copies() {
#if defined(PALM_EMULATE)
  emulator::wait_copies(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace palm::cuda
