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

// One operand [batch, token, head, D] (lse: [batch, token, head]) with D contiguous; packed sequences have batch stride 0.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

// out = softmax(scale q k^T + key_bias) v over the visible keys. Query i sees keys lo(i) <= j <= hi(i), with o = i + S - T:
// lo = max(0, o - left), hi = min(S - 1, o + right, causal ? max(o, prefix - 1) : S - 1); left, right < 0 are unlimited.
// Keys whose bias is -inf are removed: never read. Dense: T and S hold for every batch entry. Packed: B sequences, cu_q and cu_k
// give their rows. Decode: cache_lengths gives S of each entry. key_bias, lse and dbias are float (double beside f64).
struct Attention {
  Dtype dtype;
  int64_t B, T, S, H, K, D;
  bool causal;
  double scale;
  int64_t left, right;
  Heads q, k, v, out, lse;
  const void* key_bias;
  int64_t bias_batch, bias_token;
  const int32_t *prefix_lengths, *cu_q, *cu_k, *cache_lengths;
  int64_t q_rows, k_rows;  // packed: the totals that cu_q and cu_k must end with
  Heads dout, dlse, dq, dk, dv;
  void* dbias;
  int64_t dbias_batch, dbias_token;
};

// Chains of the float multiply-add (dot: of the bf16 dot instruction), `repeats` long, one set an element of
// out, to be timed. Returns the floating-point operations behind one element, or -1 without that instruction.
struct Peak {
  float* out;
  int64_t count, repeats;
  bool dot;
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
  X(attention_fwd, Attention) \
  X(attention_bwd, Attention) \
  X(attention_decode, Attention) \
  X(peak, Peak) \
  X(swiglu_fwd, Swiglu) \
  X(swiglu_bwd, Swiglu)
