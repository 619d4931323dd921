// Tensors -> structs, one instruction set chosen once, and the library palm_kernels_cpu. The only CPU file
// that sees torch, through its stable ABI. Arguments were checked by palm_kernels/ops; here stands only what
// memory safety needs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>

#include "../ops.h"
#include "parallel.h"

namespace palm::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void parallel_range(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t),
                    void* context) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t lo, int64_t hi) { body(context, lo, hi); });
}
int64_t thread_count() { return torch::stable::get_num_threads(); }

// ---- instruction sets. PALM_ISAS(X) comes from the build: X(name) for each that was compiled, oldest first
// ----
struct Kernels {
  const char* isa;
#define FIELD(name, Struct) int64_t (*name)(const Struct&);
  PALM_CPU_OPS(FIELD)
};
#define DECLARE(name, Struct) int64_t name(const Struct&);
#define ENTRY(name, Struct) , name
#define NAMESPACE(isa)                                         \
  namespace isa {                                              \
  PALM_CPU_OPS(DECLARE)                                        \
  static constexpr Kernels table = {#isa PALM_CPU_OPS(ENTRY)}; \
  }
PALM_ISAS(NAMESPACE)
#define TABLE(isa) isa::table,
static constexpr Kernels tables[] = {PALM_ISAS(TABLE)};

static bool supported(const std::string& isa) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (isa == "v3") return v3;
  if (isa == "v4") return v4;
  if (isa == "v4_bf16") return v4 && __builtin_cpu_supports("avx512bf16");
#endif
  return true;
}

static std::string isas() {
  std::string names;
  for (const Kernels& t : tables)
    if (supported(t.isa)) names += (names.empty() ? "" : " ") + std::string(t.isa);
  std::replace(names.begin(), names.end(), '_', '-');
  return names;
}

static const Kernels& choose() {
  const char* forced = std::getenv("PALM_KERNELS_CPU_ISA");
  std::string wanted = forced ? forced : "";
  std::replace(wanted.begin(), wanted.end(), '-', '_');
  for (int i = sizeof(tables) / sizeof(*tables) - 1; i >= 0; --i)
    if (supported(tables[i].isa) && (wanted.empty() || wanted == tables[i].isa)) return tables[i];
  STD_TORCH_CHECK(false, "PALM_KERNELS_CPU_ISA=", wanted, " is none of this machine's: ", isas());
}
static const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}
static std::string isa() {
  std::string name = kernels().isa;
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

// ---- tensors -> structs ----
static Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "palm_kernels_cpu: float32, bfloat16, float16 or float64 expected");
  }
}

static void* pointer(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
static void* pointer(const OptionalTensor& t) { return t ? pointer(*t) : nullptr; }

struct Operand {
  const Tensor& tensor;
  Matrix& matrix;
};

// The rows that all operands share (every dimension but the last), neighbouring dimensions merged where every
// operand's strides allow it; fills the operands' matrices. Most calls end with one dimension.
static Rows rows_of(std::initializer_list<Operand> operands) {
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
    if (!merge)
      STD_TORCH_CHECK(rows.dims < kMaxDims, "palm_kernels_cpu: over 8 separately strided dimensions");
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
static Heads heads_of(const Tensor& t) {
  const int64_t d = t.dim();
  return {pointer(t), d == 4 ? t.stride(0) : 0, t.stride(d - 3), t.stride(d - 2)};
}
static Heads lse_of(const OptionalTensor& t) {
  if (!t) return {};
  const int64_t d = t->dim();
  return {pointer(*t), d == 3 ? t->stride(0) : 0, t->stride(d - 1), t->stride(d - 2)};
}
static const int32_t* int32s(const OptionalTensor& t) { return static_cast<const int32_t*>(pointer(t)); }

// ---- attention ----
static Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias,
                           bool causal, double scale, int64_t left, int64_t right, const Tensor& out,
                           const OptionalTensor& lse) {
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
  p.scale = scale;
  p.left = left;
  p.right = right;
  p.q = heads_of(q);
  p.k = heads_of(k);
  p.v = heads_of(v);
  p.out = heads_of(out);
  p.lse = lse_of(lse);
  STD_TORCH_CHECK(p.K > 0 && p.H % p.K == 0 && p.D <= 256, "palm_kernels_cpu: attention: bad heads or D");
  STD_TORCH_CHECK(p.S < 1 << 24 && k.size(0) < 1 << 24, "palm_kernels_cpu: attention: over 2^24 keys");
  if (key_bias) {
    p.key_bias = pointer(*key_bias);
    p.bias_batch = packed ? 0 : key_bias->stride(0);
    p.bias_token = key_bias->stride(-1);
  }
  return p;
}
static void gradients(Attention& p, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq,
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
static void pack(Attention& p, const Tensor& q, const Tensor& k, const Tensor& cu_q, const Tensor& cu_k) {
  p.B = cu_q.size(0) - 1;
  p.cu_q = int32s(cu_q);
  p.cu_k = int32s(cu_k);
  p.q_rows = q.size(0);
  p.k_rows = k.size(0);
}
static void attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor key_bias,
                          OptionalTensor prefix_lengths, bool causal, double scale, int64_t left,
                          int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  p.prefix_lengths = int32s(prefix_lengths);
  kernels().attention_fwd(p);
}
static void attention_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                          Tensor lse, OptionalTensor key_bias, OptionalTensor prefix_lengths, bool causal,
                          double scale, int64_t left, int64_t right, Tensor dq, Tensor dk, Tensor dv,
                          OptionalTensor dbias) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  p.prefix_lengths = int32s(prefix_lengths);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  kernels().attention_bwd(p);
}
static int64_t attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k,
                                    OptionalTensor key_bias, bool causal, double scale, int64_t left,
                                    int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  pack(p, q, k, cu_q, cu_k);
  return kernels().attention_fwd(p);
}
static int64_t attention_varlen_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v,
                                    Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, OptionalTensor key_bias,
                                    bool causal, double scale, int64_t left, int64_t right, Tensor dq,
                                    Tensor dk, Tensor dv, OptionalTensor dbias) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  pack(p, q, k, cu_q, cu_k);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  return kernels().attention_bwd(p);
}
static int64_t attention_decode(Tensor q, Tensor k, Tensor v, Tensor cache_lengths, OptionalTensor key_bias,
                                double scale, int64_t left, int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, true, scale, left, right, out, lse);
  p.cache_lengths = int32s(cache_lengths);
  return kernels().attention_decode(p);
}

// ---- norm ----
static void* statistic(const Norm& p, const OptionalTensor& t) {
  STD_TORCH_CHECK(!t || (t->is_contiguous() && t->numel() == p.rows.count &&
                         dtype_of(*t) == (p.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32)),
                  "palm_kernels_cpu: norm: bad statistics");
  return pointer(t);
}
static void* gain(Norm& p, const OptionalTensor& t) {
  if (!t) return nullptr;
  const Dtype dtype = dtype_of(*t);
  const bool halves = p.dtype == Dtype::bf16 || p.dtype == Dtype::f16;
  STD_TORCH_CHECK(
      t->is_contiguous() && t->numel() == p.cols && (dtype == p.dtype || (halves && dtype == Dtype::f32)),
      "palm_kernels_cpu: norm: bad weight or bias");
  p.gain_dtype = dtype;
  return pointer(t);
}
static Norm norm_fwd(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, double eps, double offset, const Tensor& out,
                     const OptionalTensor& sum, const OptionalTensor& mean, const OptionalTensor& rstd) {
  Norm p{};
  p.dtype = p.gain_dtype = dtype_of(x);
  p.cols = x.size(-1);
  p.eps = eps;
  p.offset = offset;
  STD_TORCH_CHECK(residual.has_value() == sum.has_value(),
                  "palm_kernels_cpu: norm: residual and sum go together");
  p.rows = residual ? rows_of({{x, p.x}, {*residual, p.residual}, {*sum, p.sum}, {out, p.out}})
                    : rows_of({{x, p.x}, {out, p.out}});
  p.weight = gain(p, weight);
  p.bias = gain(p, bias);
  STD_TORCH_CHECK(!weight || !bias || dtype_of(*weight) == dtype_of(*bias),
                  "palm_kernels_cpu: norm: two gain dtypes");
  p.mean = statistic(p, mean);
  p.rstd = statistic(p, rstd);
  return p;
}
static Norm norm_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& weight,
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
    STD_TORCH_CHECK(!*t || dtype_of(**t) == p.gain_dtype, "palm_kernels_cpu: norm: two gain dtypes");
  p.mean = statistic(p, mean);
  p.rstd = statistic(p, rstd);
  return p;
}
static void rms_norm_fwd(Tensor x, OptionalTensor residual, OptionalTensor weight, double eps, double offset,
                         Tensor out, OptionalTensor sum, OptionalTensor rstd) {
  kernels().rms_norm_fwd(norm_fwd(x, residual, weight, {}, eps, offset, out, sum, {}, rstd));
}
static void rms_norm_bwd(Tensor dout, Tensor x, OptionalTensor weight, Tensor rstd, OptionalTensor dsum,
                         double offset, Tensor dx, OptionalTensor dweight) {
  kernels().rms_norm_bwd(norm_bwd(dout, x, weight, {}, rstd, dsum, offset, dx, dweight, {}));
}
static void layer_norm_fwd(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                           double eps, double offset, Tensor out, OptionalTensor sum, OptionalTensor mean,
                           OptionalTensor rstd) {
  kernels().layer_norm_fwd(norm_fwd(x, residual, weight, bias, eps, offset, out, sum, mean, rstd));
}
static void layer_norm_bwd(Tensor dout, Tensor x, OptionalTensor weight, Tensor mean, Tensor rstd,
                           OptionalTensor dsum, double offset, Tensor dx, OptionalTensor dweight,
                           OptionalTensor dbias) {
  kernels().layer_norm_bwd(norm_bwd(dout, x, weight, mean, rstd, dsum, offset, dx, dweight, dbias));
}

// ---- rotary ----
static int64_t rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved,
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
                  "palm_kernels_cpu: rotary: bad cos or sin");
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
      STD_TORCH_CHECK(false, "palm_kernels_cpu: rotary: positions are int32 or int64");
    p.position_batch = positions->dim() == 2 ? positions->stride(0) : 0;
    p.position_token = positions->stride(-1);
  }
  return kernels().rotary(p);
}

// ---- cross_entropy ----
static CrossEntropy losses(const Tensor& logits, const OptionalTensor& weight, int64_t ignore_index,
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
static Operand optional_operand(const OptionalTensor& t, const Tensor& other, Matrix& m) {
  return {t ? *t : other, m};
}

static int64_t cross_entropy_fwd(Tensor logits, Tensor target, OptionalTensor weight,
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
  return kernels().cross_entropy_fwd(p);
}
static int64_t cross_entropy_bwd(Tensor logits, Tensor dloss, Tensor lse, Tensor scale, Tensor target,
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
  return kernels().cross_entropy_bwd(p);
}
static int64_t linear_cross_entropy_rows(Tensor logits, Tensor target, OptionalTensor weight,
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
  return kernels().linear_cross_entropy_rows(p);
}

// ---- soft_weak_embedding: ids, source_ids, strength, dstrength arrive as [..., 1] ----
static bool wide(const Tensor& t) { return t.scalar_type() == ScalarType::Long; }

static int64_t soft_weak_embedding_fwd(Tensor ids, Tensor weight, Tensor strength, OptionalTensor mask,
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
  return kernels().soft_weak_embedding_fwd(p);
}
static int64_t soft_weak_embedding_bwd(Tensor dout, Tensor ids, Tensor strength, OptionalTensor weight,
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
  return kernels().soft_weak_embedding_bwd(p);
}

// ---- peak ----
static int64_t peak(int64_t repeats, bool dot, Tensor out) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous(), "peak: out is not float32");
  return kernels().peak({static_cast<float*>(out.mutable_data_ptr()), out.numel(), repeats, dot});
}

// ---- swiglu ----
static void swiglu_fwd(Tensor gate, Tensor up, Tensor out) {
  Swiglu p{};
  p.dtype = dtype_of(gate);
  p.cols = gate.size(-1);
  p.rows = rows_of({{gate, p.gate}, {up, p.up}, {out, p.out}});
  kernels().swiglu_fwd(p);
}
static void swiglu_bwd(Tensor dout, Tensor gate, Tensor up, Tensor dgate, Tensor dup) {
  Swiglu p{};
  p.dtype = dtype_of(gate);
  p.cols = gate.size(-1);
  p.rows = rows_of({{gate, p.gate}, {up, p.up}, {dout, p.dout}, {dgate, p.dgate}, {dup, p.dup}});
  kernels().swiglu_bwd(p);
}

}  // namespace palm::cpu

STABLE_TORCH_LIBRARY(palm_kernels_cpu, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_lengths, bool causal, "
      "float scale, int left, "
      "int right, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? key_bias, "
      "Tensor? prefix_lengths, bool causal, float scale, int left, int right, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, "
      "Tensor(d!)? dbias) -> ()");
  m.def(
      "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? "
      "key_bias, bool causal, "
      "float scale, int left, int right, Tensor(a!) out, Tensor(b!) lse) -> int");
  m.def(
      "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? key_bias, bool causal, float scale, int left, int right, Tensor(a!) dq, "
      "Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!)? dbias) -> int");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? key_bias, "
      "float scale, int left, "
      "int right, Tensor(a!) out, Tensor(b!) lse) -> int");
  m.def(
      "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, "
      "Tensor(a!) out, "
      "Tensor(b!)? sum, Tensor(c!)? mean, Tensor(d!)? rstd) -> ()");
  m.def(
      "layer_norm_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dsum, float "
      "offset, "
      "Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset, Tensor(a!) out, "
      "Tensor(b!)? sum, "
      "Tensor(c!)? rstd) -> ()");
  m.def(
      "rms_norm_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, float offset, "
      "Tensor(a!) dx, "
      "Tensor(b!)? dweight) -> ()");
  m.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool conjugate, "
      "Tensor(a!) out) -> int");
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
      "int ignore_index, float label_smoothing, float z_loss, float logit_scale, str reduction, "
      "Tensor(a!) loss, Tensor(b!) z, Tensor(c!) lse, Tensor(d!) scale) -> int");
  m.def(
      "cross_entropy_bwd(Tensor logits, Tensor dloss, Tensor lse, Tensor scale, Tensor target, "
      "Tensor? weight, Tensor? token_weight, int ignore_index, float label_smoothing, float z_loss, "
      "float logit_scale, Tensor(a!) dlogits) -> int");
  m.def(
      "linear_cross_entropy_rows(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? dloss, int ignore_index, float label_smoothing, float z_loss, float logit_scale, "
      "bool gradient, Tensor(b!) loss, Tensor(c!) z, Tensor(d!) row_weight) -> int");
  m.def(
      "soft_weak_embedding_fwd(Tensor ids, Tensor weight, Tensor strength, Tensor? mask_embedding, "
      "Tensor? source_ids, bool variance_preserving, Tensor(a!) out) -> int");
  m.def(
      "soft_weak_embedding_bwd(Tensor dout, Tensor ids, Tensor strength, Tensor? weight, "
      "Tensor? mask_embedding, Tensor? source_ids, bool variance_preserving, int vocab, "
      "Tensor(a!)? dweight, Tensor(b!)? dmask_embedding, Tensor(c!)? dstrength) -> int");
  m.def("peak(int repeats, bool dot, Tensor(a!) out) -> int");
  m.def("swiglu_fwd(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def("swiglu_bwd(Tensor dout, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&palm::cpu::isa));
  m.impl("isas", TORCH_BOX(&palm::cpu::isas));
}

STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cpu, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&palm::cpu::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&palm::cpu::attention_bwd));
  m.impl("attention_varlen_fwd", TORCH_BOX(&palm::cpu::attention_varlen_fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&palm::cpu::attention_varlen_bwd));
  m.impl("attention_decode", TORCH_BOX(&palm::cpu::attention_decode));
  m.impl("layer_norm_fwd", TORCH_BOX(&palm::cpu::layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&palm::cpu::layer_norm_bwd));
  m.impl("rms_norm_fwd", TORCH_BOX(&palm::cpu::rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&palm::cpu::rms_norm_bwd));
  m.impl("rotary", TORCH_BOX(&palm::cpu::rotary));
  m.impl("cross_entropy_fwd", TORCH_BOX(&palm::cpu::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&palm::cpu::cross_entropy_bwd));
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&palm::cpu::linear_cross_entropy_rows));
  m.impl("soft_weak_embedding_fwd", TORCH_BOX(&palm::cpu::soft_weak_embedding_fwd));
  m.impl("soft_weak_embedding_bwd", TORCH_BOX(&palm::cpu::soft_weak_embedding_bwd));
  m.impl("peak", TORCH_BOX(&palm::cpu::peak));
  m.impl("swiglu_fwd", TORCH_BOX(&palm::cpu::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&palm::cpu::swiglu_bwd));
}
