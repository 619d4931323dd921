// Runs CUDA device code on the CPU: one block at a time, one fiber per CUDA thread, all in one OS thread.
// Warp collectives (shuffle, ldmatrix, mma) are meetings of all lanes that they name; __syncthreads is a
// meeting of the block. Finds divergent barriers (deadlock), missing barriers (random schedules), missing
// waits for asynchronous copies (even seeds: they land as late as allowed, odd: at once), reads of unwritten
// shared memory (it holds NaN), writes behind its end, and, built with -fsanitize=address, any access outside
// an allocation. wgmma reads shared memory as TMA and fence.proxy.async left it, so that a generic write
// without any fence behind it stays unseen. Does not model: who must execute that fence, clusters, occupancy,
// time.
//
// PALM_EMULATOR_SEED=0 steps all threads in turn; any other seed lets one warp run on until it must wait, in
// random order of warps, lanes and blocks. Products of wgmma run when they are waited for, or at once where
// the seed is 1 more than a multiple of 4.
#pragma once

#include <cuda_bf16.h>  // NVIDIA's own host implementations of the number formats and vector types
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __restrict__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__

namespace palm::emulator {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("emulator: " + what); }

// The caller has no string to destroy while the exception passes: AddressSanitizer, which does not know the
// fibers' stacks, would then find on them what the frame that threw has left.
[[noreturn]] inline void assertion_failed(const char* message) {
  throw std::runtime_error(std::string("emulator: device-side assert: ") + message);
}

// An mbarrier in its 8 bytes of shared memory.
struct Mbar {
  uint64_t phase : 1, count : 15, pending : 16;
  int64_t bytes : 32;
};

enum class Wait : uint8_t { none, block, warp, mbar, named, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
};

struct Fiber {
  void* sp = nullptr;
  std::unique_ptr<char[]> stack;
  uint3 thread{};
  int lane = 0, warp = 0;
  Wait wait = Wait::none;
  volatile Mbar* bar = nullptr;  // Wait::mbar: until its phase is no longer `parity`
  unsigned parity = 0;
  int named = -1;            // Wait::named: which
  const void* in = nullptr;  // this lane's side of a warp collective
  void* out = nullptr;
  std::vector<Copy> open;                 // cp.async not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
};

using Product = std::function<void()>;
struct Warp {
  uint32_t arrived = 0, mask = 0;
  const char* op = nullptr;
  std::vector<Product> products;                     // wgmma not yet committed
  std::vector<std::vector<Product>> product_groups;  // committed, not yet waited for
  bool fenced = false;                               // by wgmma.fence, since the last wait
};

struct Named {
  int threads = 0, arrived = 0;
};

// What a launch counted, for the tests that assert it.
struct Counts {
  long mma = 0, ldmatrix = 0, bank_conflicts = 0, cp_async = 0, bulk_copies = 0, wgmma = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  dim3 grid, block;
  uint3 index{};
  int threads = 0, alive = 0, at_barrier = 0;
  long barriers = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  void* main_sp = nullptr;
  Fiber* current = nullptr;
  std::exception_ptr error;
  std::vector<std::function<void()>> bulk;  // TMA copies in flight: they land when nobody else can run
  std::vector<char> async;  // shared memory as the async proxy sees it; empty until it is used
  Named named[16];
  std::mt19937 random;
  bool shuffled = false, late = true, late_products = true;
};

inline Counts& counts() {
  static Counts c;
  return c;
}
inline Block& block() {
  static thread_local Block b;
  return b;
}
inline Fiber& self() { return *block().current; }

// ---- fibers
extern "C" void palm_emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(.text
.weak palm_emulator_switch
.type palm_emulator_switch,@function
palm_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size palm_emulator_switch,.-palm_emulator_switch)");
#else  // seven times slower: two system calls a switch
extern "C" __attribute__((weak)) void palm_emulator_switch(void** save, void* load) {
  static thread_local ucontext_t main_context;
  if (!*save) *save = &main_context;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
#endif

inline void yield() { palm_emulator_switch(&block().current->sp, block().main_sp); }

inline void fiber_main() {
  Block& b = block();
  try {
    (*b.body)();
  } catch (...) {
    b.error = std::current_exception();
  }
  b.current->wait = Wait::done;
  --b.alive;
  yield();
  std::abort();
}

constexpr size_t kStack = 256 << 10;

inline void start(Fiber& f) {
  if (!f.stack) f.stack.reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack.get(), kStack);  // the last block's frames left their redzones
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(f.stack.get() + kStack) & ~uintptr_t(15);
  void** s = reinterpret_cast<void**>(top);
  *--s = nullptr;  // rsp % 16 is 8 at a function's entry
  *--s = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  f.sp = s;
#else
  auto* context = new (f.stack.get()) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = f.stack.get() + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStack - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, &fiber_main, 0);
  f.sp = context;
#endif
}

// ---- meetings
inline void release(Wait what, int named = -1) {
  for (Fiber& f : block().fibers)
    if (f.wait == what && f.named == named) {
      f.wait = Wait::none;
      f.named = -1;
    }
}

inline void barrier() {
  Block& b = block();
  if (++b.at_barrier < b.threads) {
    self().wait = Wait::block;
    return yield();
  }
  b.at_barrier = 0;
  ++b.barriers;
  release(Wait::block);
}

// bar.sync id, threads (wait) and bar.arrive (not).
inline void named_barrier(int id, int threads, bool wait) {
  Block& b = block();
  Named& n = b.named[id];
  if (id < 0 || id > 15 || threads % 32) fail("named barrier: bad id or thread count");
  if (n.arrived && n.threads != threads) fail("named barrier: its threads disagree about their number");
  n.threads = threads;
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++b.barriers;
    return release(Wait::named, id);
  }
  if (!wait) return;
  self().wait = Wait::named;
  self().named = id;
  yield();
}

// All lanes of mask meet; the last to come runs op over everybody's (in, out).
using Collective = void (*)(Fiber** lanes, uint32_t mask);
inline void meet(const char* name, uint32_t mask, const void* in, void* out, Collective op) {
  Block& b = block();
  Fiber& f = self();
  Warp& w = b.warps[f.warp];
  if (!(mask >> f.lane & 1)) fail("a lane is not in its own mask");
  if (w.arrived == 0) {
    w.mask = mask;
    w.op = name;
  }
  if (w.mask != mask || w.op != name)
    fail(std::string("lanes of one warp met in ") + w.op + " and " + name + ", or with different masks");
  f.in = in;
  f.out = out;
  w.arrived |= 1u << f.lane;
  if (w.arrived != mask) {
    f.wait = Wait::warp;
    return yield();
  }
  Fiber* lanes[32] = {};
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) lanes[l] = &b.fibers[f.warp * 32 + l];
  op(lanes, mask);
  w.arrived = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) lanes[l]->wait = Wait::none;
}

// ---- asynchronous work
inline void land(const Copy& c) {
  if (c.from)
    std::memcpy(c.to, c.from, c.bytes);
  else
    std::memset(c.to, 0, c.bytes);
}
inline void copy_async(const Copy& c) {
  if ((reinterpret_cast<uintptr_t>(c.to) | reinterpret_cast<uintptr_t>(c.from)) % c.bytes)
    fail("cp.async: an address is not aligned to its size");
  ++counts().cp_async;
  block().late ? self().open.push_back(c) : land(c);
}
inline void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}
inline void wait_copies(int pending) {
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& c : groups.front()) land(c);
    groups.erase(groups.begin());
  }
}

// mbarrier: a phase ends when its arrivals and its bytes are complete; these may come before they are
// announced.
inline volatile Mbar* mbar(uint64_t* barrier) { return reinterpret_cast<volatile Mbar*>(barrier); }
inline void mbar_init(uint64_t* barrier, int count) {
  volatile Mbar* m = mbar(barrier);
  m->phase = 0;
  m->count = m->pending = count;
  m->bytes = 0;
}
inline bool mbar_update(uint64_t* barrier, int arrivals, int bytes) {  // whether a phase ends
  volatile Mbar* m = mbar(barrier);
  if (static_cast<int>(m->pending) < arrivals) fail("mbarrier: more arrivals than its count");
  m->bytes = m->bytes + bytes;
  m->pending = m->pending - arrivals;
  if (m->pending || m->bytes) return false;
  m->phase = m->phase ^ 1;
  m->pending = m->count;
  return true;
}
inline void mbar_arrive(uint64_t* barrier, int bytes) {
  Block& b = block();
  if (!mbar_update(barrier, 1, bytes) || !b.shuffled) return;
  ++b.barriers;  // whoever waits may run before the one that ends the phase
  yield();
}
inline void mbar_wait(uint64_t* barrier, unsigned parity) {
  Fiber& f = self();
  while (mbar(barrier)->phase == parity) {
    f.bar = mbar(barrier);
    f.parity = parity;
    f.wait = Wait::mbar;
    yield();
  }
}

// The async proxy's view of shared memory: `offset` bytes from its start.
inline char* async_shared(size_t offset, size_t bytes) {
  Block& b = block();
  if (offset + bytes > b.shared_bytes) fail("the async proxy left the block's shared memory");
  if (b.async.empty()) b.async.assign(b.shared_bytes, '\xFF');
  return b.async.data() + offset;
}
inline void fence_proxy_async() {
  Block& b = block();
  std::memcpy(async_shared(0, b.shared_bytes), b.shared, b.shared_bytes);
}

inline Warp& warp() { return block().warps[self().warp]; }
inline void issue(Product product) {
  if (!warp().fenced) fail("wgmma without wgmma.fence since the registers may have been used");
  ++counts().wgmma;
  block().late_products ? warp().products.push_back(std::move(product)) : product();
}
inline void commit_products() {
  warp().product_groups.push_back(std::move(warp().products));
  warp().products.clear();
}
inline void wait_products(size_t pending) {
  auto& groups = warp().product_groups;
  while (groups.size() > pending) {
    for (const Product& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  warp().fenced = false;
}

// ---- scheduling
inline bool ready(const Fiber& f) {
  return f.wait == Wait::none || (f.wait == Wait::mbar && f.bar->phase != f.parity);
}

inline void step(Fiber& f) {
  Block& b = block();
  b.current = &f;
  f.wait = Wait::none;
  palm_emulator_switch(&b.main_sp, f.sp);
  if (b.error) std::rethrow_exception(std::exchange(b.error, nullptr));
}

// One warp runs on until all its lanes wait, in random order, up to the next barrier.
inline bool step_shuffled(std::vector<int>& order) {
  Block& b = block();
  bool ran = false;
  std::shuffle(order.begin(), order.end(), b.random);
  for (int w : order) {
    int lanes[32];
    for (int l = 0; l < 32; ++l) lanes[l] = l;
    std::shuffle(lanes, lanes + 32, b.random);
    const long barriers = b.barriers;
    for (bool more = true; more && barriers == b.barriers;) {
      more = false;
      for (int l : lanes)
        if (Fiber& f = b.fibers[w * 32 + l]; ready(f)) {
          ran = more = true;
          step(f);
        }
    }
    if (barriers != b.barriers) break;
  }
  return ran;
}

inline bool step_in_turn() {
  bool ran = false;
  for (Fiber& f : block().fibers)
    if (ready(f)) {
      ran = true;
      step(f);
    }
  return ran;
}

inline void deadlock() {
  Block& b = block();
  int waiting[6] = {};
  for (const Fiber& f : b.fibers) ++waiting[static_cast<int>(f.wait)];
  char text[200];
  std::snprintf(text, sizeof text,
                "deadlock in block (%u,%u,%u): %d threads at __syncthreads, %d in warp collectives, %d at "
                "mbarriers, %d at named barriers, %d finished",
                b.index.x, b.index.y, b.index.z, waiting[1], waiting[2], waiting[3], waiting[4], waiting[5]);
  fail(text);
}

constexpr size_t kGuard = 64;  // bytes behind shared memory, which must keep their value

inline void run_block(std::vector<int>& order) {
  Block& b = block();
  std::memset(b.shared, 0xFF, b.shared_bytes);  // NaN in every float format
  b.alive = b.threads;
  b.at_barrier = 0;
  b.async.clear();
  for (Named& n : b.named) n = Named{};
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    f.thread = {i % b.block.x, i / b.block.x % b.block.y, i / (b.block.x * b.block.y)};
    f.lane = i % 32;
    f.warp = i / 32;
    f.wait = Wait::none;
    f.named = -1;
    f.open.clear();
    f.groups.clear();
    start(f);
  }
  for (Warp& w : b.warps) w = Warp{};
  while (b.alive) {
    const bool ran = b.shuffled ? step_shuffled(order) : step_in_turn();
    if (ran) continue;
    if (b.bulk.empty()) deadlock();
    const size_t i = b.shuffled ? b.random() % b.bulk.size() : 0;  // any order is allowed
    auto copy = std::move(b.bulk[i]);
    b.bulk.erase(b.bulk.begin() + i);
    copy();
  }
  for (const Fiber& f : b.fibers)
    if (!f.open.empty() || !f.groups.empty())
      fail("a thread ended with asynchronous work that it never waited for");
  for (const Warp& w : b.warps)
    if (!w.products.empty() || !w.product_groups.empty())
      fail("a warp ended with products that it never waited for");
  if (!b.bulk.empty()) fail("a block ended with bulk copies that nobody waited for");
  for (const Named& n : b.named)
    if (n.arrived) fail("a block ended with arrivals at a named barrier that nobody waited for");
#if !defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < kGuard; ++i)
    if (b.shared[b.shared_bytes + i] != 0x5A) fail("a block wrote behind its shared memory");
#endif
}

inline void prepare(dim3 grid, dim3 threads, size_t shared, int arch) {
  Block& b = block();
  b.grid = grid;
  b.block = threads;
  b.threads = threads.x * threads.y * threads.z;
  if (b.threads % 32 || b.threads > 1024) fail("a block has 1 to 32 whole warps");
  const size_t limit = arch == 86 || arch == 89 ? 99 : arch < 90 ? 163 : 227;
  if (shared > limit * 1024) fail("over " + std::to_string(limit) + " KiB of shared memory");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) fail("an empty grid");
  if (grid.y > 65535 || grid.z > 65535) fail("a grid has at most 65,535 blocks in y and z");
  b.fibers.resize(b.threads);
  b.warps.resize(b.threads / 32);
  b.bulk.clear();
  b.error = nullptr;
  const char* seed = std::getenv("PALM_EMULATOR_SEED");
  const unsigned long value = seed ? std::strtoul(seed, nullptr, 10) : 0;
  b.random.seed(value);
  b.shuffled = value != 0;
  b.late = value % 2 == 0;
  b.late_products = value % 4 != 1;
}

inline void launch(dim3 grid, dim3 threads, size_t shared, int arch, const std::function<void()>& body) {
  Block& b = block();
  prepare(grid, threads, shared, arch);
  void* memory = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const size_t guard = 0;  // the sanitizer watches the end
#else
  const size_t guard = kGuard;
#endif
  if (posix_memalign(&memory, 1024, std::max<size_t>(1, shared + guard))) fail("no memory");
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, std::free);
  b.shared = static_cast<char*>(memory);
  b.shared_bytes = shared;
  std::memset(b.shared + shared, 0x5A, guard);
  b.body = &body;
  std::vector<int> order(b.warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint32_t> blocks_in_order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) blocks_in_order[i] = i;
  if (b.shuffled) std::shuffle(blocks_in_order.begin(), blocks_in_order.end(), b.random);
  for (uint32_t i : blocks_in_order) {
    b.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(order);
  }
}

}  // namespace palm::emulator

#define threadIdx (palm::emulator::self().thread)
#define blockIdx (palm::emulator::block().index)
#define blockDim (palm::emulator::block().block)
#define gridDim (palm::emulator::block().grid)
#define __syncthreads() palm::emulator::barrier()

// What a test reads after a call: the counts since the last one.
extern "C" __attribute__((weak, used, visibility("default"))) void palm_emulator_counts(long* out) {
  auto& c = palm::emulator::counts();
  const long values[] = {c.mma, c.ldmatrix, c.bank_conflicts, c.cp_async, c.bulk_copies, c.wgmma};
  std::memcpy(out, values, sizeof values);
  c = {};
}
