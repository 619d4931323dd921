// Tensors -> structs for the library palm_kernels_cuda. It holds no kernel yet; the namespace exists so that
// the build, the loading and `palm_kernels.info()` are the same before and after the first one.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(palm_kernels_cuda, m) {}
