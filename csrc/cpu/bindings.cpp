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

// [batch, token, head, D]; a packed [token, head, D] has batch stride 0. lse: [batch, head, token] or [head, token].
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
static Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& key_bias, bool causal,
                           double scale, int64_t left, int64_t right, const Tensor& out, const OptionalTensor& lse) {
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
static void gradients(Attention& p, const Tensor& dout, const OptionalTensor& dlse, const Tensor& dq, const Tensor& dk,
                      const Tensor& dv, const OptionalTensor& dbias) {
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
static void attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor key_bias, OptionalTensor prefix_lengths, bool causal,
                          double scale, int64_t left, int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  p.prefix_lengths = int32s(prefix_lengths);
  kernels().attention_fwd(p);
}
static void attention_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                          OptionalTensor key_bias, OptionalTensor prefix_lengths, bool causal, double scale, int64_t left,
                          int64_t right, Tensor dq, Tensor dk, Tensor dv, OptionalTensor dbias) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  p.prefix_lengths = int32s(prefix_lengths);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  kernels().attention_bwd(p);
}
static int64_t attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, OptionalTensor key_bias, bool causal,
                                    double scale, int64_t left, int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  pack(p, q, k, cu_q, cu_k);
  return kernels().attention_fwd(p);
}
static int64_t attention_varlen_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                    Tensor cu_q, Tensor cu_k, OptionalTensor key_bias, bool causal, double scale, int64_t left,
                                    int64_t right, Tensor dq, Tensor dk, Tensor dv, OptionalTensor dbias) {
  Attention p = attention(q, k, v, key_bias, causal, scale, left, right, out, lse);
  pack(p, q, k, cu_q, cu_k);
  gradients(p, dout, dlse, dq, dk, dv, dbias);
  return kernels().attention_bwd(p);
}
static int64_t attention_decode(Tensor q, Tensor k, Tensor v, Tensor cache_lengths, OptionalTensor key_bias, double scale,
                                int64_t left, int64_t right, Tensor out, Tensor lse) {
  Attention p = attention(q, k, v, key_bias, true, scale, left, right, out, lse);
  p.cache_lengths = int32s(cache_lengths);
  return kernels().attention_decode(p);
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
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_lengths, bool causal, float scale, int left, "
      "int right, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_bias, "
      "Tensor? prefix_lengths, bool causal, float scale, int left, int right, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
      "Tensor(d!)? dbias) -> ()");
  m.def(
      "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_bias, bool causal, "
      "float scale, int left, int right, Tensor(a!) out, Tensor(b!) lse) -> int");
  m.def(
      "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? key_bias, bool causal, float scale, int left, int right, Tensor(a!) dq, Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!)? dbias) -> int");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? key_bias, float scale, int left, "
      "int right, Tensor(a!) out, Tensor(b!) lse) -> int");
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
  m.impl("peak", TORCH_BOX(&palm::cpu::peak));
  m.impl("swiglu_fwd", TORCH_BOX(&palm::cpu::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&palm::cpu::swiglu_bwd));
}
