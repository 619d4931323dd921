// Where a call runs (device, stream, scratch), and the library palm_kernels_cuda. The only CUDA file that
// sees torch, through its stable ABI. With PALM_EMULATE it is compiled for tests/emulator: the same kernels,
// run on CPU tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "../ops.h"

#if !defined(PALM_EMULATE)
#include <cuda_runtime_api.h>

// Stands in libtorch_cuda. Weak, so that the library loads in a CPU build of torch too, where it is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace palm {

namespace cuda {

#define DECLARE(name, Struct) void name(const Struct&, const Queue&);
PALM_OPS(DECLARE)
#undef DECLARE

using torch::stable::Tensor;

#if defined(PALM_EMULATE)
struct Guard {
  explicit Guard(int32_t) {}
};

static Queue queue_of(int32_t) {
  const char* arch = std::getenv("PALM_EMULATED_ARCH");
  return {nullptr, arch ? std::atoi(arch) : 80, 4, nullptr,
          nullptr};  // few: persistent loops turn more than once
}

static void check_launch(const char*) {}
#else
using Guard = torch::stable::accelerator::DeviceGuard;

static void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "palm_kernels_cuda: ", what, ": ", cudaGetErrorString(error));
}

// What a device is: asked once for each.
static Queue properties(int32_t device) {
  static std::once_flag asked[128];
  static Queue known[128];
  std::call_once(asked[device], [&] {
    int major = 0, minor = 0, multiprocessors = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
    known[device] = {nullptr, 10 * major + minor, multiprocessors, nullptr, nullptr};
  });
  return known[device];
}

static Queue queue_of(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "palm_kernels_cuda: this torch is built without CUDA");
  Queue queue = properties(device);
  const auto error = aoti_torch_get_current_cuda_stream(device, &queue.stream);  // 0, or torch has said why
  STD_TORCH_CHECK(error == 0, "palm_kernels_cuda: no current stream of device ", device);
  return queue;
}

static void check_launch(const char* op) { check(cudaGetLastError(), op); }
#endif

}  // namespace cuda

// The device and current stream of a call's first tensor, and the scratch that lives until the call returns.
class On {
 public:
  static constexpr const char* kLibrary = "palm_kernels_cuda";
  static constexpr int64_t kMaxKeys = 1 << 30;  // sums of two positions fit 32 bits

  explicit On(const torch::stable::Tensor& first)
      : first_(first), guard_(first.get_device_index()), queue_(cuda::queue_of(first.get_device_index())) {
    queue_.allocate = [](void* owner, int64_t bytes) { return static_cast<On*>(owner)->allocate(bytes); };
    queue_.owner = this;
  }
  On(const On&) = delete;

#define DECLARE(name, Struct) int64_t name(const Struct& p) const;
  PALM_OPS(DECLARE)
#undef DECLARE

 private:
  void* allocate(int64_t bytes) {
    scratch_.push_back(torch::stable::new_empty(first_, {bytes}, torch::headeronly::ScalarType::Byte));
    void* data = scratch_.back().mutable_data_ptr();
#if defined(PALM_EMULATE)
    std::memset(data, 0xff, bytes);  // NaN in every float
#endif
    return data;
  }

  const torch::stable::Tensor& first_;
  cuda::Guard guard_;
  Queue queue_;
  std::vector<torch::stable::Tensor> scratch_;
};

#define LAUNCH(name, Struct)                                                             \
  int64_t On::name(const Struct& p) const {                                              \
    STD_TORCH_CHECK(p.dtype != Dtype::f64, kLibrary, ": " #name ": no float64 on CUDA"); \
    cuda::name(p, queue_);                                                               \
    cuda::check_launch(#name);                                                           \
    return -1;                                                                           \
  }
PALM_OPS(LAUNCH)
#undef LAUNCH

}  // namespace palm

#include "../bindings.h"

STABLE_TORCH_LIBRARY(palm_kernels_cuda, m) { palm::bindings::define(m); }

#if defined(PALM_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cuda, CPU, m) { palm::bindings::implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cuda, CUDA, m) { palm::bindings::implement(m); }
#endif
