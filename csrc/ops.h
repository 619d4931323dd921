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

// One operand [batch, token, head, D] (lse: [batch, token, head]) with D contiguous; packed sequences have
// batch stride 0.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

// out = softmax(scale q k^T + key_bias) v over the visible keys. Query i sees keys lo(i) <= j <= hi(i), with
// o = i + S - T: lo = max(0, o - left), hi = min(S - 1, o + right, causal ? max(o, prefix - 1) : S - 1);
// left, right < 0 are unlimited. Keys whose bias is -inf are removed: never read. Dense: T and S hold for
// every batch entry. Packed: B sequences, cu_q and cu_k give their rows. Decode: cache_lengths gives S of
// each entry. key_bias, lse and dbias are float (double beside f64).
struct Attention {
  Dtype dtype;
  int64_t B, T, S, H, K, D;
  bool causal;
  bool tf32;  // CUDA, float32: one tf32 product instead of three
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

// out = (s - mean) rstd (weight + offset) + bias with s = x, or x + residual as stored in sum; rms_norm has
// no mean and no bias. weight and bias have gain_dtype: dtype, or f32 beside 16 bits. mean and rstd, [rows],
// are float (double beside f64): forward writes them where they are given, backward reads them and dout, x
// (the stored sum) and dsum, which is added to dx.
struct Norm {
  Dtype dtype, gain_dtype;
  Rows rows;
  int64_t cols;
  double eps, offset;
  Matrix x, residual, sum, out;
  Matrix dout, dsum, dx;
  const void *weight, *bias;
  void *mean, *rstd, *dweight, *dbias;
};

// Row r is head r % heads of token r / heads, whose position (in positions32 or positions64, else its index
// in 0..T-1) names a row of cos and sin [length, half]: float, double beside f64. The first 2 half columns
// are rotated, the others copied. conjugate: by the negated angle. out may be x.
struct Rotary {
  Dtype dtype;
  Rows rows;
  int64_t T, heads, cols, half, length;
  bool interleaved, conjugate;
  Matrix x, out;
  int64_t x_head, out_head;
  const void *cos, *sin;
  int64_t cos_stride, sin_stride;
  const int32_t* positions32;
  const int64_t* positions64;
  int64_t position_batch, position_token;
};

enum class Reduction : int32_t { none, mean, sum };

// The losses of rows of `cols` logits, z = logit_scale * logits (formulas: palm_kernels/reference.py). Token
// weights, class weights, losses and lse are float (double beside f64). cross_entropy_fwd writes loss, z, lse
// a row; for mean and sum loss and z hold one value, scale (one value) is 1 / sum of t w_y for mean, else 1.
// cross_entropy_bwd reads dloss (stride 0 for mean and sum), lse and scale and writes dlogits.
// linear_cross_entropy_rows writes loss, z and row_weight = t w_y a row and, where `gradient`, the gradient
// of sum dloss loss (dloss null: 1) in the logits' place.
struct CrossEntropy {
  Dtype dtype;
  Reduction reduction;
  bool gradient;
  Rows rows;
  int64_t cols, ignore_index;
  double label_smoothing, z_loss, logit_scale;
  Matrix logits, target, token_weight, dloss, lse, loss, z, row_weight, dlogits;
  void *weight, *scale;
};

// out = r(a) [(1 - a) weight[id] + a source] (PALM E1), source = weight[source_id] if source_id >= 0, else
// mask (null: zeros). ids, source_ids (null: all mask) are int64 where wide_*, else int32; they, strength and
// dstrength have one element a row. Backward: each of dweight [vocab, cols] and dmask [cols], contiguous, and
// dstrength may be null; weight and mask are read for dstrength only.
struct SoftWeakEmbedding {
  Dtype dtype;
  Rows rows;
  int64_t cols, vocab;
  bool wide_ids, wide_source_ids, variance_preserving;
  Matrix ids, source_ids, strength;
  const void* weight;
  int64_t weight_stride;
  const void* mask;
  Matrix out;
  Matrix dout, dstrength;
  void *dweight, *dmask;
};

enum class Unit : int32_t { fma, dot, tile };

// Chains of one instruction (the float multiply-add, the bf16 dot, the product of bf16 tiles), `repeats`
// long, one set an element of out, to be timed. Returns the floating-point operations behind one element, or
// -1 without that instruction.
struct Peak {
  float* out;
  int64_t count, repeats;
  Unit unit;
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

// out = x weight^T + bias + residual with weight [F, C], bias [F] of dtype; weight_dtype is dtype, or 16 bits
// beside f32.
struct Linear {
  Dtype dtype, weight_dtype;
  Rows rows;
  int64_t C, F;
  Matrix x, residual, out;
  const void *weight, *bias;
  int64_t weight_stride;
};

// Where a CUDA launcher works. allocate gives scratch that is safe to free once the launcher has returned
// (freed memory is reused in stream order).
struct Queue {
  void* stream;  // cudaStream_t
  int arch;      // 80, 90, ...
  int multiprocessors;
  void* (*allocate)(void* owner, int64_t bytes);
  void* owner;
};

}  // namespace palm

// X(name, struct): what every compiled backend has. A CPU launcher is `int64_t name(const struct&)` and
// returns the first bad row, or -1; a CUDA launcher is `void palm::cuda::name(const struct&, const Queue&)`.
#define PALM_OPS(X)                             \
  X(attention_fwd, Attention)                   \
  X(attention_bwd, Attention)                   \
  X(attention_decode, Attention)                \
  X(layer_norm_fwd, Norm)                       \
  X(layer_norm_bwd, Norm)                       \
  X(rms_norm_fwd, Norm)                         \
  X(rms_norm_bwd, Norm)                         \
  X(rotary, Rotary)                             \
  X(cross_entropy_fwd, CrossEntropy)            \
  X(cross_entropy_bwd, CrossEntropy)            \
  X(linear_cross_entropy_rows, CrossEntropy)    \
  X(soft_weak_embedding_fwd, SoftWeakEmbedding) \
  X(soft_weak_embedding_bwd, SoftWeakEmbedding) \
  X(swiglu_fwd, Swiglu)                         \
  X(swiglu_bwd, Swiglu)

#define PALM_CPU_OPS(X)    \
  PALM_OPS(X)              \
  X(decode_linear, Linear) \
  X(peak, Peak)

// The launchers that instruction sets with fast products of bf16 pairs have of their own.
#define PALM_PAIRS_OPS(X)     \
  X(attention_fwd, Attention) \
  X(attention_bwd, Attention) \
  X(attention_decode, Attention)
