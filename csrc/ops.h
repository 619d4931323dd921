// The C++ contract: one plain struct per op (shapes, strides, pointers) and the list of launchers. No torch.
// Strides count elements. A null pointer means absent. Letters as in palm_kernels/reference.py.
#pragma once

#include <cstdint>

namespace palm {

enum class Dtype : int32_t { f32, bf16, f16, f64 };

constexpr int kMaxDims = 8;

// `count` rows behind `dims` leading dimensions, innermost last; bindings merge dimensions where every
// operand allows it.
struct Rows {
  int64_t count;
  int dims;
  int64_t size[kMaxDims];
};

// One operand over Rows: its last dimension is contiguous, the leading ones are strided.
struct Matrix {
  void* data;
  int64_t stride[kMaxDims];
};

// out = silu(gate) * up. Forward reads gate, up and writes out; backward reads dout too and writes dgate,
// dup.
struct Swiglu {
  Dtype dtype;
  Rows rows;
  int64_t cols;
  Matrix gate, up, out;
  Matrix dout, dgate, dup;
};

}  // namespace palm

// X(name, struct): every CPU launcher `int64_t name(const struct&)`. It returns the first bad row, or -1.
#define PALM_CPU_OPS(X) \
  X(swiglu_fwd, Swiglu) \
  X(swiglu_bwd, Swiglu)
