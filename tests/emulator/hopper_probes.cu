// Hopper's instructions and its attention kernel behind C functions, for test_hopper.py. Runs in the emulator
// and on a GPU of compute capability 9.0. A function returns null, or what went wrong.
#include "../../csrc/cuda/attention_hopper.cu"

#include <stdexcept>
#include <string>

namespace palm::cuda {

constexpr int kImage = 64 * 1024;  // bytes of shared memory

PALM_DEVICE char* place_image(const char* image) {
  PALM_SHARED(char, shared);
  for (int i = threadIdx.x; i < kImage; i += kGroup) shared[i] = image[i];
  fence_proxy_async();
  __syncthreads();
  return shared;
}

struct At {
  int offset, lead, stride;
};

// d [128][N / 2] += a b: the operands' places in `image`, or a's registers [128][4].
template <class T, int N, bool ALONG_N>
__global__ void wgmma_kernel(const char* image, const uint32_t* registers, At a, At b, float* d) {
  const char* shared = place_image(image);
  float x[N / 8][4];
  uint32_t y[1][4] = {};
  for (int i = 0; i < N / 2; ++i) x[i / 4][i % 4] = d[threadIdx.x * (N / 2) + i];
  for (int i = 0; i < 4 && registers; ++i) y[0][i] = registers[threadIdx.x * 4 + i];
  const uint64_t from = descriptor(shared + b.offset, b.lead, b.stride);
  wgmma_fence(x, y);
  if constexpr (ALONG_N)
    wgmma<T, N, true>(x, y[0], from, true);
  else
    wgmma<T, N, false>(x, descriptor(shared + a.offset, a.lead, a.stride), from, true);
  wgmma_commit();
  wgmma_wait<0>(x);
  for (int i = 0; i < N / 2; ++i) d[threadIdx.x * (N / 2) + i] = x[i / 4][i % 4];
}

// Shared memory [bytes] as the copy of one box left it.
__global__ void box_kernel(const __grid_constant__ TensorMap map, int x, int y, int z, int w, int bytes,
                           char* out) {
  PALM_SHARED(char, shared);
  auto& barrier = *reinterpret_cast<uint64_t*>(shared + bytes);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(barrier, bytes);
    copy_box(shared, map, x, y, z, w, barrier);
  }
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes; i += kGroup) out[i] = shared[i];
}

template <class F>
const char* said(F&& f) {
  static std::string what;
  try {
    f();
#if !defined(PALM_EMULATE)
    if (const cudaError_t error = cudaDeviceSynchronize()) return cudaGetErrorString(error);
#endif
    return nullptr;
  } catch (const std::exception& e) {
    return (what = e.what()).c_str();
  }
}

}  // namespace palm::cuda

#define PROBE extern "C" __attribute__((visibility("default"))) const char*
using namespace palm::cuda;
static const palm::Queue queue{nullptr, 90, 4, nullptr, nullptr};

// n: columns; a in registers has b along N, else both stand along K.
PROBE probe_wgmma(int n, const char* image, const uint32_t* registers, const int* places, float* d) {
  const auto run = [&](auto kernel) {
    const At a{places[0], places[1], places[2]}, b{places[3], places[4], places[5]};
    launch<decltype(kernel)::value>(1, kGroup, kImage, queue, image, registers, a, b, d);
  };
  return said([&] {
    if (n == 64)
      run(std::integral_constant<decltype(&wgmma_kernel<f16, 64, true>), wgmma_kernel<f16, 64, true>>{});
    if (n == 80)
      run(std::integral_constant<decltype(&wgmma_kernel<f16, 80, false>), wgmma_kernel<f16, 80, false>>{});
    if (n == 128)
      run(std::integral_constant<decltype(&wgmma_kernel<f16, 128, false>), wgmma_kernel<f16, 128, false>>{});
    if (n == 256)
      run(std::integral_constant<decltype(&wgmma_kernel<f16, 256, true>), wgmma_kernel<f16, 256, true>>{});
  });
}
PROBE probe_box(void* data, const uint64_t* size, const uint64_t* stride, const uint32_t* box, const int* at,
                char* out) {
  return said([&] {
    TensorMap map;
    if (!tensor_map(map, palm::Dtype::f16, data, {size[0], size[1], size[2], size[3]},
                    {stride[0], stride[1], stride[2]}, {box[0], box[1], box[2], box[3]}))
      throw std::runtime_error("no tensor map");
    const int bytes = box[0] * box[1] * box[2] * box[3] * 2;
    launch<box_kernel>(1, kGroup, bytes + 8, queue, map, at[0], at[1], at[2], at[3], bytes, out);
  });
}
PROBE probe_attention(const palm::Attention* p, int arch) {
  palm::Queue any = queue;
  any.arch = arch;
  return said([&] {
    if (!attention_fwd_hopper(*p, any)) throw std::runtime_error("not served");
  });
}
