// One instruction set chosen once, and the library palm_kernels_cpu. The only CPU file that sees torch,
// through its stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../ops.h"
#include "memory.h"
#include "parallel.h"

namespace palm::cpu {

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

#if defined(__x86_64__)
// v4_bf16 with attention on bf16 by products of bf16 pairs (pairs.h).
template <int64_t (*pairs)(const Attention&), int64_t (*other)(const Attention&)>
static int64_t by_dtype(const Attention& p) {
  return p.dtype == Dtype::bf16 ? pairs(p) : other(p);
}
#define PAIRS(set)                               \
  namespace set {                                \
  PALM_PAIRS_OPS(DECLARE)                        \
  DECLARE(peak, Peak)                            \
  static constexpr Kernels with_pairs() {        \
    Kernels t = v4_bf16::table;                  \
    t.isa = #set;                                \
    t.peak = peak;                               \
    PALM_PAIRS_OPS(BY_DTYPE)                     \
    return t;                                    \
  }                                              \
  static constexpr Kernels table = with_pairs(); \
  }
#define BY_DTYPE(name, Struct) t.name = by_dtype<name, v4_bf16::name>;
PAIRS(v4_dot)
PAIRS(v4_amx)
#define PALM_TABLES(X) PALM_ISAS(X) X(v4_dot) X(v4_amx)
#else
#define PALM_TABLES(X) PALM_ISAS(X)
#endif
#define TABLE(isa) isa::table,
static constexpr Kernels tables[] = {PALM_TABLES(TABLE)};

#if defined(__x86_64__)
// Whether the tile unit is there and this process may use it: Linux gives its registers on request only.
static bool may_use_tiles() {
  unsigned a, b, c, d;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return there && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

static bool supported(const std::string& isa) {
#if defined(__x86_64__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (isa == "v3") return v3;
  if (isa == "v4") return v4;
  const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
  if (isa == "v4_bf16" || isa == "v4_dot") return bf16;
  if (isa == "v4_amx") return bf16 && may_use_tiles();
#endif
  return true;
}

// The bf16 dot instruction runs at twice the float multiply-add's rate on AMD and at half of it on Intel,
// where floats are faster.
static bool fast(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "v4_dot") return __builtin_cpu_is("amd");
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
    if (supported(tables[i].isa) && (wanted.empty() ? fast(tables[i].isa) : wanted == tables[i].isa))
      return tables[i];
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

static int64_t peak(int64_t repeats, std::string unit, torch::stable::Tensor out) {
  STD_TORCH_CHECK(unit == "fma" || unit == "dot" || unit == "tile", "peak: unit is ", unit);
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Float && out.is_contiguous(),
                  "peak: out is not float32");
  const Unit which = unit == "fma" ? Unit::fma : unit == "dot" ? Unit::dot : Unit::tile;
  return kernels().peak({static_cast<float*>(out.mutable_data_ptr()), out.numel(), repeats, which});
}

// An output in kept memory: floating, contiguous, freed into the cache. Such a storage cannot grow (resize_).
static torch::stable::Tensor empty(std::vector<int64_t> size, torch::headeronly::ScalarType dtype,
                                   int64_t itemsize) {
  std::vector<int64_t> strides(size.size());
  int64_t count = 1;
  for (size_t d = size.size(); d-- > 0; count *= size[d]) strides[d] = count;
  void* data = take_memory(count * itemsize);
  STD_TORCH_CHECK(data, "palm_kernels: no memory for an output of ", count * itemsize, " bytes");
  return torch::stable::from_blob(
      data, size, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype, &give_memory);
}

}  // namespace palm::cpu

namespace palm {

class On {
 public:
  static constexpr const char* kLibrary = "palm_kernels_cpu";
  static constexpr int64_t kMaxKeys = 1 << 24;  // float holds every key's position

  explicit On(const torch::stable::Tensor&) {}
#define RUN(name, Struct) \
  int64_t name(const Struct& p) const { return cpu::kernels().name(p); }
  PALM_OPS(RUN)
#undef RUN
};

}  // namespace palm

#include "../bindings.h"

// ---- what the CPU alone has, for a few rows ----
namespace palm::cpu {

using bindings::OptionalTensor;
using torch::stable::Tensor;

static void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, const Tensor& out) {
  Linear p{};
  p.dtype = bindings::dtype_of(x);
  p.weight_dtype = bindings::dtype_of(weight);
  p.C = x.size(-1);
  p.F = weight.size(0);
  const bool half = p.weight_dtype == Dtype::bf16 || p.weight_dtype == Dtype::f16;
  STD_TORCH_CHECK((p.weight_dtype == p.dtype || (half && p.dtype == Dtype::f32)) &&
                      bindings::dtype_of(out) == p.dtype && weight.size(1) == p.C && out.size(-1) == p.F,
                  "decode_linear: bad dtypes or shapes");
  p.rows = bindings::rows_of({{x, p.x}, {residual ? *residual : out, p.residual}, {out, p.out}});
  if (!residual) p.residual.data = nullptr;
  p.weight = bindings::pointer(weight);
  p.weight_stride = weight.stride(0);
  p.bias = bindings::pointer(bias);
  kernels().decode_linear(p);
}
static void decode_linear(Tensor x, Tensor weight, OptionalTensor bias, Tensor out) {
  linear(x, weight, bias, {}, out);
}

// PaLM's block up to the keys and values that a cache takes, and from there on: one call each, because at a
// few rows the calls themselves are what costs.
static int64_t block_inputs(Tensor x, OptionalTensor norm_weight, Tensor w_in, Tensor cos, Tensor sin,
                            OptionalTensor positions, int64_t heads, int64_t kv_heads, int64_t head_dim,
                            std::string norm, double eps, double norm_offset, bool interleaved,
                            Tensor fused) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  STD_TORCH_CHECK(w_in.size(1) == C && w_in.size(0) >= (heads + 2 * kv_heads) * head_dim,
                  "parallel_block: x has ", C, " columns, in_proj is [", w_in.size(0), ", ", w_in.size(1),
                  "]");
  STD_TORCH_CHECK(!norm_weight || norm_weight->numel() == C, "parallel_block: norm_weight is not [", C, "]");
  STD_TORCH_CHECK(
      !positions || (positions->size(-1) == T && positions->numel() == (positions->dim() == 2 ? B : 1) * T),
      "parallel_block: positions are not [", T, "] or [", B, ", ", T, "]");
  const Tensor normed = torch::stable::empty_like(x);
  if (norm == "rms_norm")
    bindings::rms_norm_fwd(x, {}, norm_weight, eps, norm_offset, normed, {}, {});
  else
    bindings::layer_norm_fwd(x, {}, norm_weight, {}, eps, norm_offset, normed, {}, {}, {});
  linear(normed, w_in, {}, {}, fused);
  Tensor rotated = fused;
  rotated = torch::stable::narrow(rotated, 2, 0, (heads + kv_heads) * head_dim);
  rotated = torch::stable::view(rotated, {B, T, heads + kv_heads, head_dim});
  return bindings::rotary(rotated, cos, sin, positions, interleaved, false, rotated);
}
static int64_t block_output(Tensor x, Tensor fused, Tensor k, Tensor v, Tensor cache_lengths,
                            OptionalTensor key_bias, int64_t heads, int64_t left, int64_t right, Tensor w_out,
                            Tensor out) {
  const int64_t B = x.size(0), T = x.size(1), S = k.size(1), K = k.size(2), D = k.size(3);
  const int64_t width = heads * D, F = w_out.size(1) - width, behind = width + 2 * K * D;
  STD_TORCH_CHECK(F >= 0 && fused.size(2) == behind + 2 * F, "parallel_block: out_proj is [", w_out.size(0),
                  ", ", w_out.size(1), "], in_proj has ", fused.size(2), " rows");
  STD_TORCH_CHECK(k.size(0) == B && v.size(0) == B && v.size(1) == S && v.size(2) == K && v.size(3) == D &&
                      cache_lengths.numel() == B && bindings::dtype_of(k) == bindings::dtype_of(x) &&
                      bindings::dtype_of(v) == bindings::dtype_of(x),
                  "parallel_block: the cache does not fit");
  Tensor rows = fused;  // the stable ABI's views take a reference that is not const
  const Tensor q = torch::stable::view(torch::stable::narrow(rows, 2, 0, width), {B, T, heads, D});
  Tensor mixed = torch::stable::new_empty(fused, {B, T, width + F});
  const Tensor attended = torch::stable::view(torch::stable::narrow(mixed, 2, 0, width), {B, T, heads, D});
  const bool wide = bindings::dtype_of(x) == Dtype::f64;
  const Tensor lse = torch::stable::new_empty(
      fused, {B, heads, T},
      wide ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  const int64_t bad = bindings::attention_decode(q, k, v, cache_lengths, key_bias, 1 / std::sqrt(double(D)),
                                                 left, right, attended, lse, false);
  if (bad >= 0) return bad;
  bindings::swiglu_fwd(torch::stable::narrow(rows, 2, behind, F),
                       torch::stable::narrow(rows, 2, behind + F, F),
                       torch::stable::narrow(mixed, 2, width, F));
  linear(mixed, w_out, {}, x, out);
  return -1;
}

}  // namespace palm::cpu

STABLE_TORCH_LIBRARY(palm_kernels_cpu, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("empty(int[] size, ScalarType dtype, int itemsize) -> Tensor");
  m.def("memory_limit() -> int");
  m.def("memory_kept() -> int");
  m.def("drop_memory() -> int");
  m.def("peak(int repeats, str unit, Tensor(a!) out) -> int");
  m.def("decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def(
      "block_inputs(Tensor x, Tensor? norm_weight, Tensor w_in, Tensor cos, Tensor sin, Tensor? positions, "
      "int heads, int kv_heads, int head_dim, str norm, float eps, float norm_offset, bool interleaved, "
      "Tensor(a!) fused) -> int");
  m.def(
      "block_output(Tensor x, Tensor fused, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? "
      "key_bias, int heads, int left, int right, Tensor w_out, Tensor(a!) out) -> int");
  palm::bindings::define(m);
}

STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&palm::cpu::isa));
  m.impl("isas", TORCH_BOX(&palm::cpu::isas));
  m.impl("empty", TORCH_BOX(&palm::cpu::empty));
  m.impl("memory_limit", TORCH_BOX(&palm::cpu::memory_limit));
  m.impl("memory_kept", TORCH_BOX(&palm::cpu::memory_kept));
  m.impl("drop_memory", TORCH_BOX(&palm::cpu::drop_memory));
}

STABLE_TORCH_LIBRARY_IMPL(palm_kernels_cpu, CPU, m) {
  m.impl("peak", TORCH_BOX(&palm::cpu::peak));
  m.impl("decode_linear", TORCH_BOX(&palm::cpu::decode_linear));
  m.impl("block_inputs", TORCH_BOX(&palm::cpu::block_inputs));
  m.impl("block_output", TORCH_BOX(&palm::cpu::block_output));
  palm::bindings::implement(m);
}
