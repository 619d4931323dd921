// One instruction set chosen once, and the library palm_kernels_cpu. The only CPU file that sees torch,
// through its stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
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

// PaLM's blocks on a few new tokens x [B,T,C], each against its cache [B,K,S,D], in one call: at such sizes
// the calls are what costs. The caches hold `length` tokens, of which the last T are written here; absent
// positions count from `start`. A norm weight more than blocks is the norm's behind them. Returns the first
// bad position, or -1.
static int64_t decode_blocks(Tensor x, std::vector<Tensor> norm_weights, std::vector<Tensor> w_in,
                             std::vector<Tensor> w_out, Tensor cos, Tensor sin, OptionalTensor positions,
                             int64_t start, std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
                             int64_t length, OptionalTensor key_bias, int64_t heads, std::string norm,
                             double eps, double norm_offset, int64_t left, int64_t right, bool interleaved,
                             Tensor out) {
  using torch::stable::narrow, torch::stable::view, torch::stable::transpose;
  const size_t count = w_in.size();
  STD_TORCH_CHECK(count > 0 && norm_weights.size() - count <= 1 && w_out.size() == count &&
                      k_caches.size() == count && v_caches.size() == count,
                  "decode_blocks: weights and caches of different counts");
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const int64_t K = k_caches[0].size(1), S = k_caches[0].size(2), D = k_caches[0].size(3);
  const int64_t width = heads * D, behind = width + 2 * K * D, F = w_out[0].size(1) - width;
  STD_TORCH_CHECK(F >= 0 && w_in[0].size(0) == behind + 2 * F, "decode_blocks: out_proj is [",
                  w_out[0].size(0), ", ", w_out[0].size(1), "], in_proj has ", w_in[0].size(0), " rows");
  STD_TORCH_CHECK(
      !positions || (positions->size(-1) == T && positions->numel() == (positions->dim() == 2 ? B : 1) * T),
      "decode_blocks: positions are not [", T, "] or [", B, ", ", T, "]");
  const Dtype dtype = bindings::dtype_of(x);
  for (size_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(w_in[i].size(1) == C && w_out[i].size(0) == C, "decode_blocks: x has ", C,
                    " columns, in_proj is [", w_in[i].size(0), ", ", w_in[i].size(1), "], out_proj has ",
                    w_out[i].size(0), " rows");
    for (const Tensor& cache : {k_caches[i], v_caches[i]})
      STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == B && cache.size(1) == K && cache.size(2) == S &&
                          cache.size(3) == D && cache.stride(3) == 1 && bindings::dtype_of(cache) == dtype,
                      "decode_blocks: the cache of block ", i, " does not fit");
  }
  STD_TORCH_CHECK(T <= length && length <= S, "decode_blocks: length is ", length, ", need at least the ", T,
                  " new tokens and at most the cache's ", S);
  STD_TORCH_CHECK(positions || (0 <= start && start + T <= cos.size(0)), "decode_blocks: positions ", start,
                  " to ", start + T, " are beyond the tables");
  if (!positions) {
    cos = narrow(cos, 0, start, T);
    sin = narrow(sin, 0, start, T);
  }
  const std::vector<int32_t> lengths(B, int32_t(length));

  Tensor fused = torch::stable::new_empty(x, {B, T, behind + 2 * F});
  Tensor mixed = torch::stable::new_empty(x, {B, T, width + F});
  const Tensor normed = torch::stable::empty_like(x);
  const Tensor stream = norm_weights.size() == count ? out : torch::stable::empty_like(x);
  const Tensor lse = torch::stable::new_empty(
      x, {B, heads, T},
      dtype == Dtype::f64 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float);
  const auto in_heads = [&](Tensor& rows, int64_t from, int64_t n) {
    return view(narrow(rows, 2, from, n * D), {B, T, n, D});
  };
  const Tensor q = in_heads(fused, 0, heads), rotated = in_heads(fused, 0, heads + K);
  const Tensor attended = in_heads(mixed, 0, heads);
  const Tensor gate = narrow(fused, 2, behind, F), up = narrow(fused, 2, behind + F, F);
  const Tensor product = narrow(mixed, 2, width, F);
  const int64_t size = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  const auto append = [&](Tensor& cache, int64_t from) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t kh = 0; kh < K; ++kh) {
          const int64_t row = length - T + t;
          memcpy(static_cast<char*>(cache.mutable_data_ptr()) +
                     size * (b * cache.stride(0) + kh * cache.stride(1) + row * cache.stride(2)),
                 static_cast<const char*>(fused.const_data_ptr()) +
                     size * ((b * T + t) * fused.size(2) + from + kh * D),
                 size * D);
        }
  };
  const auto normalise = [&](const Tensor& rows, const Tensor& weight, const Tensor& to) {
    if (norm == "rms_norm")
      bindings::rms_norm_fwd(rows, {}, weight, eps, norm_offset, to, {}, {});
    else
      bindings::layer_norm_fwd(rows, {}, weight, {}, eps, norm_offset, to, {}, {}, {});
  };
  for (size_t i = 0; i < count; ++i) {
    const Tensor& residual = i ? stream : x;
    normalise(residual, norm_weights[i], normed);
    linear(normed, w_in[i], {}, {}, fused);
    const int64_t bad = bindings::rotary(rotated, cos, sin, positions, interleaved, false, rotated);
    if (bad >= 0) return bad;
    append(k_caches[i], width);
    append(v_caches[i], width + K * D);
    Attention p = bindings::attention(q, transpose(k_caches[i], 1, 2), transpose(v_caches[i], 1, 2), key_bias,
                                      true, 1 / std::sqrt(double(D)), left, right, attended, lse, false);
    p.cache_lengths = lengths.data();
    kernels().attention_decode(p);
    bindings::swiglu_fwd(gate, up, product);
    linear(mixed, w_out[i], {}, residual, stream);
  }
  if (norm_weights.size() > count) normalise(stream, norm_weights[count], out);
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
      "decode_blocks(Tensor x, Tensor[] norm_weights, Tensor[] w_in, Tensor[] w_out, Tensor cos, Tensor sin, "
      "Tensor? positions, int start, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, int length, Tensor? "
      "key_bias, int heads, str norm, float eps, float norm_offset, int left, int right, bool interleaved, "
      "Tensor(c!) out) -> int");
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
  m.impl("decode_blocks", TORCH_BOX(&palm::cpu::decode_blocks));
  palm::bindings::implement(m);
}
