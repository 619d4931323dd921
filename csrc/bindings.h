// Tensors -> structs, and the schemas of every op, for all compiled backends: torch's stable ABI alone.
// Arguments were checked by palm_kernels/ops; here stands only what memory safety needs. A backend's
// bindings.cpp first defines the class palm::On, made from the first tensor of a call: its member functions
// `int64_t op(const Struct&) const` run the launchers and give the first bad row, or -1. It names the library
// (kLibrary) and says how many keys attention takes (kMaxKeys).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "ops.h"

namespace palm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, On::kLibrary, ": float32, bfloat16, float16 or float64 expected");
  }
}

inline void* pointer(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
inline void* pointer(const OptionalTensor& t) { return t ? pointer(*t) : nullptr; }

struct Operand {
  const Tensor& tensor;
  Matrix& matrix;
};

// The rows that all operands share (every dimension but the last), neighbouring dimensions merged where every
// operand's strides allow it; fills the operands' matrices. Most calls end with one dimension.
inline Rows rows_of(std::initializer_list<Operand> operands) {
  const Tensor& first = operands.begin()->tensor;
  Rows rows{1, 0, {}};
  for (const Operand& o : operands) o.matrix.data = pointer(o.tensor);
  for (int64_t d = 0; d + 1 < first.dim(); ++d) {
    const int64_t size = first.size(d);
    rows.count *= size;
    if (size == 1) continue;
    const int last = rows.dims - 1;
    const bool merge = last >= 0 && std::all_of(operands.begin(), operands.end(), [&](const Operand& o) {
                         return o.matrix.stride[last] == o.tensor.stride(d) * size;
                       });
    if (!merge) STD_TORCH_CHECK(rows.dims < kMaxDims, On::kLibrary, ": over 8 separately strided dimensions");
    const int at = merge ? last : rows.dims++;
    rows.size[at] = merge ? rows.size[at] * size : size;
    for (const Operand& o : operands) o.matrix.stride[at] = o.tensor.stride(d);
  }
  if (rows.dims == 0) {
    rows.dims = 1;
    rows.size[0] = 1;
    for (const Operand& o : operands) o.matrix.stride[0] = 0;
  }
  return rows;
}

// [batch, token, head, D]; a packed [token, head, D] has batch stride 0. lse: [batch, head, token] or [head,
// token].
inline Heads heads_of(const Tensor& t) {
  const int64_t d = t.dim();
  return {pointer(t), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}
inline Heads lse_of(const OptionalTensor& t) {
  if (!t) return {};
  const int64_t d = t->dim();
  return {pointer(*t), d == 3 ? t->stride(0) : 0, t->stride(d - 1), t->stride(d - 2)};
}
inline const int32_t* int32s(const OptionalTensor& t) { return static_cast<const int32_t*>(pointer(t)); }

// ---- attention ----
constexpr int64_t kMaxQueries = 1 << 30;

inline Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias,
                           bool causal, double scale, int64_t left, int64_t right, const Tensor& out,
                           const OptionalTensor& lse, bool tf32) {
  Attention p{};
  const bool packed = q.dim() == 3;
  p.dtype = dtype_of(q);
  p.B = packed ? 0 : q.size(0);
  p.T = packed ? 0 : q.size(1);
  p.S = packed ? 0 : k.size(1);
  p.H = q.size(-2);
  p.K = k.size(-2);
  p.D = q.size(-1);
  p.causal = causal;
  p.tf32 = tf32;
  p.scale = scale;
  p.left = left;
  p.right = right;
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  p.out = heads_of(out);
  p.lse = lse_of(lse);
  STD_TORCH_CHECK(p.K > 0 && p.H % p.K == 0 && p.D <= 256, On::kLibrary, ": attention: bad heads or D");
  STD_TORCH_CHECK(q.size(-3) < kMaxQueries && k.size(-3) < On::kMaxKeys, On::kLibrary,
                  ": attention: too many tokens");
  if (key_bias) {
    p.key_bias = pointer(*key_bias);
    p.bias_batch = packed ? 0 : key_bias->stride(0);
    p.bias_token = key_bias->stride(-1);
  }
  return p;
}
inline void gradients(Attention& p, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq,
                      const Tensor& dk, const Tensor& dv, const OptionalTensor& dbias) {
  p.dout = heads_of(dout);
  p.dlse = lse_of(dlse);
  p.dq = heads_of(dq);
  p.dk = heads_of(dk);
  p.dv = heads_of(dv);
  if (dbias) {
    p.dbias = pointer(*dbias);
    p.dbias_batch = dbias->dim() == 2 ? dbias->stride(0) : 0;
    p.dbias_token = dbias->stride(-1);
  }
}
inline void pack(Attention& p, const Tensor& q, const Tensor& k, const Tensor& cu_q, const Tensor& cu_k) {
  p.B = cu_q.size(0) - 1;
  p.cu_q = int32s(cu_q);
  p.cu_k = int32s(cu_k);
  p.q_rows = q.size(0);
  p.k_rows = k.size(0);
}
inline void attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor key_bias,
                          OptionalTensor prefix_lengths, bool causal, double scale, int64_t left,
                          int64_t right, Tensor out, Tensor lse, bool tf32) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse, tf32);
  p.prefix_lengths = int32s(prefix_lengths);
  On(q).attention_fwd(p);
}
inline void attention_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                          Tensor lse, OptionalTensor key_bias, OptionalTensor prefix_lengths, bool causal,
                          double scale, int64_t left, int64_t right, Tensor dq, Tensor dk, Tensor dv,
                          OptionalTensor dbias, bool tf32) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse, tf32);
  p.prefix_lengths = int32s(prefix_lengths);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  On(dout).attention_bwd(p);
}
inline int64_t attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k,
                                    OptionalTensor key_bias, bool causal, double scale, int64_t left,
                                    int64_t right, Tensor out, Tensor lse, bool tf32) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse, tf32);
  pack(p, q, k, cu_q, cu_k);
  return On(q).attention_fwd(p);
}
inline int64_t attention_varlen_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v,
                                    Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, OptionalTensor key_bias,
                                    bool causal, double scale, int64_t left, int64_t right, Tensor dq,
                                    Tensor dk, Tensor dv, OptionalTensor dbias, bool tf32) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse, tf32);
  pack(p, q, k, cu_q, cu_k);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  return On(dout).attention_bwd(p);
}
inline int64_t attention_decode(Tensor q, Tensor k, Tensor v, Tensor cache_lengths, OptionalTensor key_bias,
                                double scale, int64_t left, int64_t right, Tensor out, Tensor lse,
                                bool tf32) {
  Attention p = attention(q, k, v, key_bias, true, scale, left, right, out, lse, tf32);
  p.cache_lengths = int32s(cache_lengths);
  return On(q).attention_decode(p);
}

// ---- norm ----
inline void* statistic(const Norm& p, const OptionalTensor& t) {
  STD_TORCH_CHECK(!t || (t->is_contiguous() && t->numel() == p.rows.count &&
                         dtype_of(*t) == (p.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32)),
                  On::kLibrary, ": norm: bad statistics");
  return pointer(t);
}
inline void* gain(Norm& p, const OptionalTensor& t) {
  if (!t) return nullptr;
  const Dtype dtype = dtype_of(*t);
  const bool halves = p.dtype == Dtype::bf16 || p.dtype == Dtype::f16;
  STD_TORCH_CHECK(
      t->is_contiguous() && t->numel() == p.cols && (dtype == p.dtype || (halves && dtype == Dtype::f32)),
      On::kLibrary, ": norm: bad weight or bias");
  p.gain_dtype = dtype;
  return pointer(t);
}
inline Norm norm_fwd(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, double offset, const Tensor& out,
                     const OptionalTensor& sum, const OptionalTensor& mean, const OptionalTensor& rstd) {
  Norm p{};
  p.dtype = p.gain_dtype = dtype_of(x);
  p.cols = x.size(-1);
  p.eps = eps;
  p.offset = offset;
  STD_TORCH_CHECK(residual.has_value() == sum.has_value(), On::kLibrary,
                  ": norm: residual and sum go together");
  p.rows = residual ? rows_of({{x, p.x}, {*residual, p.residual}, {*sum, p.sum}, {out, p.out}})
                    : rows_of({{x, p.x}, {out, p.out}});
  p.weight = gain(p, weight);
  p.bias = gain(p, bias);
  STD_TORCH_CHECK(!weight || !bias || dtype_of(*weight) == dtype_of(*bias), On::kLibrary,
                  ": norm: two gain dtypes");
  p.mean = statistic(p, mean);
  p.rstd = statistic(p, rstd);
  return p;
}
inline Norm norm_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& weight,
                     const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& dsum,
                     double offset, const Tensor& dx, const OptionalTensor& dweight,
                     const OptionalTensor& dbias) {
  Norm p{};
  p.dtype = p.gain_dtype = dtype_of(x);
  p.cols = x.size(-1);
  p.offset = offset;
  p.rows = dsum ? rows_of({{x, p.x}, {dout, p.dout}, {*dsum, p.dsum}, {dx, p.dx}})
                : rows_of({{x, p.x}, {dout, p.dout}, {dx, p.dx}});
  p.weight = gain(p, weight);
  p.dweight = gain(p, dweight);
  p.dbias = gain(p, dbias);
  for (const OptionalTensor* t : {&weight, &dweight, &dbias})
    STD_TORCH_CHECK(!*t || dtype_of(**t) == p.gain_dtype, On::kLibrary, ": norm: two gain dtypes");
  p.mean = statistic(p, mean);
  p.rstd = statistic(p, rstd);
  return p;
}
inline void rms_norm_fwd(Tensor x, OptionalTensor residual, OptionalTensor weight, double eps, double offset,
                         Tensor out, OptionalTensor sum, OptionalTensor rstd) {
  On(x).rms_norm_fwd(norm_fwd(x, residual, weight, {}, eps, offset, out, sum, {}, rstd));
}
inline void rms_norm_bwd(Tensor dout, Tensor x, OptionalTensor weight, Tensor rstd, OptionalTensor dsum,
                         double offset, Tensor dx, OptionalTensor dweight) {
  On(dout).rms_norm_bwd(norm_bwd(dout, x, weight, {}, rstd, dsum, offset, dx, dweight, {}));
}
inline void layer_norm_fwd(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                           double eps, double offset, Tensor out, OptionalTensor sum, OptionalTensor mean,
                           OptionalTensor rstd) {
  On(x).layer_norm_fwd(norm_fwd(x, residual, weight, bias, eps, offset, out, sum, mean, rstd));
}
inline void layer_norm_bwd(Tensor dout, Tensor x, OptionalTensor weight, Tensor mean, Tensor rstd,
                           OptionalTensor dsum, double offset, Tensor dx, OptionalTensor dweight,
                           OptionalTensor dbias) {
  On(dout).layer_norm_bwd(norm_bwd(dout, x, weight, mean, rstd, dsum, offset, dx, dweight, dbias));
}

// ---- rotary ----
inline int64_t rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved,
                      bool conjugate, Tensor out) {
  Rotary p{};
  p.dtype = dtype_of(x);
  p.rows = rows_of({{x, p.x}, {out, p.out}});
  const bool many = x.dim() == 4;
  p.T = x.size(1);
  p.heads = many ? x.size(2) : 1;
  p.x_head = many ? x.stride(2) : 0;
  p.out_head = many ? out.stride(2) : 0;
  p.cols = x.size(-1);
  p.length = cos.size(0);
  p.half = cos.size(1);
  p.interleaved = interleaved;
  p.conjugate = conjugate;
  const Dtype wide = p.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  STD_TORCH_CHECK(dtype_of(cos) == wide && dtype_of(sin) == wide && sin.size(0) == p.length &&
                      sin.size(1) == p.half && 2 * p.half <= p.cols &&
                      (p.half < 2 || (cos.stride(1) == 1 && sin.stride(1) == 1)),
                  On::kLibrary, ": rotary: bad cos or sin");
  p.cos = pointer(cos);
  p.sin = pointer(sin);
  p.cos_stride = cos.stride(0);
  p.sin_stride = sin.stride(0);
  if (positions) {
    if (positions->scalar_type() == ScalarType::Int)
      p.positions32 = static_cast<const int32_t*>(pointer(*positions));
    else if (positions->scalar_type() == ScalarType::Long)
      p.positions64 = static_cast<const int64_t*>(pointer(*positions));
    else
      STD_TORCH_CHECK(false, On::kLibrary, ": rotary: positions are int32 or int64");
    p.position_batch = positions->dim() == 2 ? positions->stride(0) : 0;
    p.position_token = positions->stride(-1);
  }
  return On(x).rotary(p);
}

// ---- cross_entropy ----
inline CrossEntropy losses(const Tensor& logits, const OptionalTensor& weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, double logit_scale) {
  CrossEntropy p{};
  p.dtype = dtype_of(logits);
  p.cols = logits.size(-1);
  p.weight = pointer(weight);
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.logit_scale = logit_scale;
  return p;
}
// An operand that may be absent walks along beside `other` and ends without data.
inline Operand optional_operand(const OptionalTensor& t, const Tensor& other, Matrix& m) {
  return {t ? *t : other, m};
}

inline int64_t cross_entropy_fwd(Tensor logits, Tensor target, OptionalTensor weight,
                                 OptionalTensor token_weight, int64_t ignore_index, double label_smoothing,
                                 double z_loss, double logit_scale, std::string reduction, Tensor loss,
                                 Tensor z, Tensor lse, Tensor scale) {
  CrossEntropy p = losses(logits, weight, ignore_index, label_smoothing, z_loss, logit_scale);
  const bool none = reduction == "none";
  p.reduction = none ? Reduction::none : reduction == "mean" ? Reduction::mean : Reduction::sum;
  p.rows = rows_of({{logits, p.logits},
                    {target, p.target},
                    optional_operand(token_weight, target, p.token_weight),
                    {none ? loss : target, p.loss},
                    {none ? z : target, p.z},
                    {lse, p.lse}});
  p.token_weight.data = pointer(token_weight);
  p.loss.data = pointer(loss);
  p.z.data = pointer(z);
  p.scale = pointer(scale);
  return On(logits).cross_entropy_fwd(p);
}
inline int64_t cross_entropy_bwd(Tensor logits, Tensor dloss, Tensor lse, Tensor scale, Tensor target,
                                 OptionalTensor weight, OptionalTensor token_weight, int64_t ignore_index,
                                 double label_smoothing, double z_loss, double logit_scale, Tensor dlogits) {
  CrossEntropy p = losses(logits, weight, ignore_index, label_smoothing, z_loss, logit_scale);
  const bool one = dloss.dim() == 0;
  p.rows = rows_of({{logits, p.logits},
                    {target, p.target},
                    optional_operand(token_weight, target, p.token_weight),
                    {one ? target : dloss, p.dloss},
                    {lse, p.lse},
                    {dlogits, p.dlogits}});
  p.token_weight.data = pointer(token_weight);
  if (one) p.dloss = {pointer(dloss), {}};
  p.scale = pointer(scale);
  return On(logits).cross_entropy_bwd(p);
}
inline int64_t linear_cross_entropy_rows(Tensor logits, Tensor target, OptionalTensor weight,
                                         OptionalTensor token_weight, OptionalTensor dloss,
                                         int64_t ignore_index, double label_smoothing, double z_loss,
                                         double logit_scale, bool gradient, Tensor loss, Tensor z,
                                         Tensor row_weight) {
  CrossEntropy p = losses(logits, weight, ignore_index, label_smoothing, z_loss, logit_scale);
  p.gradient = gradient;
  p.rows = rows_of({{logits, p.logits},
                    {target, p.target},
                    optional_operand(token_weight, target, p.token_weight),
                    optional_operand(dloss, target, p.dloss),
                    {loss, p.loss},
                    {z, p.z},
                    {row_weight, p.row_weight}});
  p.token_weight.data = pointer(token_weight);
  p.dloss.data = pointer(dloss);
  return On(logits).linear_cross_entropy_rows(p);
}

// ---- soft_weak_embedding: ids, source_ids, strength, dstrength arrive as [..., 1] ----
inline bool wide(const Tensor& t) { return t.scalar_type() == ScalarType::Long; }

inline int64_t soft_weak_embedding_fwd(Tensor ids, Tensor weight, Tensor strength, OptionalTensor mask,
                                       OptionalTensor source_ids, bool variance_preserving, Tensor out) {
  SoftWeakEmbedding p{};
  const Tensor& sources = source_ids ? *source_ids : ids;
  p.dtype = dtype_of(weight);
  p.cols = weight.size(1);
  p.vocab = weight.size(0);
  p.wide_ids = wide(ids);
  p.wide_source_ids = wide(sources);
  p.variance_preserving = variance_preserving;
  p.rows = rows_of({{out, p.out}, {ids, p.ids}, {sources, p.source_ids}, {strength, p.strength}});
  if (!source_ids) p.source_ids.data = nullptr;
  p.weight = pointer(weight);
  p.weight_stride = weight.stride(0);
  p.mask = pointer(mask);
  return On(ids).soft_weak_embedding_fwd(p);
}
inline int64_t soft_weak_embedding_bwd(Tensor dout, Tensor ids, Tensor strength, OptionalTensor weight,
                                       OptionalTensor mask, OptionalTensor source_ids,
                                       bool variance_preserving, int64_t vocab, OptionalTensor dweight,
                                       OptionalTensor dmask, OptionalTensor dstrength) {
  SoftWeakEmbedding p{};
  const Tensor& sources = source_ids ? *source_ids : ids;
  const Tensor& dstrengths = dstrength ? *dstrength : strength;
  p.dtype = dtype_of(dout);
  p.cols = dout.size(-1);
  p.vocab = vocab;
  p.wide_ids = wide(ids);
  p.wide_source_ids = wide(sources);
  p.variance_preserving = variance_preserving;
  p.rows = rows_of({{dout, p.dout},
                    {ids, p.ids},
                    {sources, p.source_ids},
                    {strength, p.strength},
                    {dstrengths, p.dstrength}});
  if (!source_ids) p.source_ids.data = nullptr;
  if (!dstrength) p.dstrength.data = nullptr;
  p.weight = pointer(weight);
  p.weight_stride = weight ? weight->stride(0) : 0;
  p.mask = pointer(mask);
  p.dweight = pointer(dweight);
  p.dmask = pointer(dmask);
  return On(dout).soft_weak_embedding_bwd(p);
}

// ---- swiglu ----
inline void swiglu_fwd(Tensor gate, Tensor up, Tensor out) {
  Swiglu p{};
  p.dtype = dtype_of(gate);
  p.cols = gate.size(-1);
  p.rows = rows_of({{gate, p.gate}, {up, p.up}, {out, p.out}});
  On(gate).swiglu_fwd(p);
}
inline void swiglu_bwd(Tensor dout, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  Swiglu p{};
  p.dtype = dtype_of(gate);
  p.cols = gate.size(-1);
  p.rows = rows_of({{gate, p.gate}, {up, p.up}, {dout, p.dout}, {dgate, p.dgate}, {dup, p.dup}});
  On(dout).swiglu_bwd(p);
}

// ---- registration. X(op, schema)
#define PALM_SCHEMAS(X)                                                                                \
  X(attention_fwd,                                                                                     \
    "(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_lengths, bool causal, "           \
    "float scale, int left, int right, Tensor(a!) out, Tensor(b!) lse, bool tf32=False) -> ()")        \
  X(attention_bwd,                                                                                     \
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "               \
    "Tensor? key_bias, Tensor? prefix_lengths, bool causal, float scale, int left, int right, "        \
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, bool tf32=False) -> ()")          \
  X(attention_varlen_fwd,                                                                              \
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_bias, "      \
    "bool causal, float scale, int left, int right, Tensor(a!) out, Tensor(b!) lse, "                  \
    "bool tf32=False) -> int")                                                                         \
  X(attention_varlen_bwd,                                                                              \
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "               \
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_bias, bool causal, float scale, int left, " \
    "int right, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, "                      \
    "bool tf32=False) -> int")                                                                         \
  X(attention_decode,                                                                                  \
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? key_bias, float scale, " \
    "int left, int right, Tensor(a!) out, Tensor(b!) lse, bool tf32=False) -> int")                    \
  X(layer_norm_fwd,                                                                                    \
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, Tensor(a!) "  \
    "out, Tensor(b!)? sum, Tensor(c!)? mean, Tensor(d!)? rstd) -> ()")                                 \
  X(layer_norm_bwd,                                                                                    \
    "(Tensor dout, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dsum, float offset, "   \
    "Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()")                                    \
  X(rms_norm_fwd,                                                                                      \
    "(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, Tensor(a!) out, "           \
    "Tensor(b!)? sum, Tensor(c!)? rstd) -> ()")                                                        \
  X(rms_norm_bwd,                                                                                      \
    "(Tensor dout, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, float offset, Tensor(a!) dx, " \
    "Tensor(b!)? dweight) -> ()")                                                                      \
  X(rotary,                                                                                            \
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool conjugate, "         \
    "Tensor(a!) out) -> int")                                                                          \
  X(cross_entropy_fwd,                                                                                 \
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, int ignore_index, "          \
    "float label_smoothing, float z_loss, float logit_scale, str reduction, Tensor(a!) loss, "         \
    "Tensor(b!) z, Tensor(c!) lse, Tensor(d!) scale) -> int")                                          \
  X(cross_entropy_bwd,                                                                                 \
    "(Tensor logits, Tensor dloss, Tensor lse, Tensor scale, Tensor target, Tensor? weight, "          \
    "Tensor? token_weight, int ignore_index, float label_smoothing, float z_loss, float logit_scale, " \
    "Tensor(a!) dlogits) -> int")                                                                      \
  X(linear_cross_entropy_rows,                                                                         \
    "(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? dloss, "         \
    "int ignore_index, float label_smoothing, float z_loss, float logit_scale, bool gradient, "        \
    "Tensor(b!) loss, Tensor(c!) z, Tensor(d!) row_weight) -> int")                                    \
  X(soft_weak_embedding_fwd,                                                                           \
    "(Tensor ids, Tensor weight, Tensor strength, Tensor? mask_embedding, Tensor? source_ids, "        \
    "bool variance_preserving, Tensor(a!) out) -> int")                                                \
  X(soft_weak_embedding_bwd,                                                                           \
    "(Tensor dout, Tensor ids, Tensor strength, Tensor? weight, Tensor? mask_embedding, "              \
    "Tensor? source_ids, bool variance_preserving, int vocab, Tensor(a!)? dweight, Tensor(b!)? "       \
    "dmask_embedding, Tensor(c!)? dstrength) -> int")                                                  \
  X(swiglu_fwd, "(Tensor gate, Tensor up, Tensor(a!) out) -> ()")                                      \
  X(swiglu_bwd, "(Tensor dout, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()")

template <class Library>
void define(Library& library) {
#define DEFINE(op, schema) library.def(#op schema);
  PALM_SCHEMAS(DEFINE)
#undef DEFINE
}

template <class Library>
void implement(Library& library) {
#define IMPLEMENT(op, schema) library.impl(#op, TORCH_BOX(&op));
  PALM_SCHEMAS(IMPLEMENT)
#undef IMPLEMENT
}

}  // namespace palm::bindings
