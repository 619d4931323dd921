// Blocks of 2 MB pages where they are large enough: a page fault for 2 MB, and MADV_FREE for a block that is
// kept costs microseconds and nothing later (with 4 KB pages as much as writing the block again). The kernel
// may take such pages when it needs memory; then the next use faults, as fresh memory would.
#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

namespace palm::cpu {
namespace {

constexpr int64_t kHuge = 2 << 20;

struct Block {
  char* data;
  int64_t size;
};

// A number of bytes with an optional K, M or G.
int64_t parse_bytes(const std::string& text, int64_t otherwise) {
  char* end;
  const double number = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  const int shift = unit == "K" ? 10 : unit == "M" ? 20 : unit == "G" ? 30 : 0;
  if (end == text.c_str() || number < 0 || (shift == 0 && !unit.empty())) return otherwise;
  return static_cast<int64_t>(number * static_cast<double>(int64_t(1) << shift));
}

// A quarter of the machine's memory holds a training step's outputs; the kernel may have it back at any time.
int64_t default_limit() { return int64_t(sysconf(_SC_PHYS_PAGES)) / 4 * sysconf(_SC_PAGESIZE); }

// Sizes come in eight steps an octave, so at most an eighth of a block is unused (and never touched).
int64_t size_class(int64_t bytes) {
  int64_t step = kLeastBlock / 8;
  while (bytes > 16 * step) step *= 2;
  return (bytes + step - 1) / step * step;
}

char* map(int64_t size) {
  void* base = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  char* from = static_cast<char*>(base);
  const int64_t before = -reinterpret_cast<intptr_t>(from) & (kHuge - 1);
  if (before) munmap(from, before);
  munmap(from + before + size, kHuge - before);
  madvise(from + before, size, MADV_HUGEPAGE);
  return from + before;
}

int64_t unmap(const std::vector<Block>& blocks) {
  int64_t bytes = 0;
  for (const Block& b : blocks) {
    munmap(b.data, b.size);
    bytes += b.size;
  }
  return bytes;
}

class Cache {
 public:
  const int64_t limit;

  explicit Cache(int64_t limit) : limit(limit) {}

  void* take(int64_t bytes) {
    const int64_t size = size_class(bytes < kLeastBlock ? kLeastBlock : bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t i = kept.size(); i-- > 0;) {  // the one given back last is the warmest
        if (kept[i].size != size) continue;
        char* data = kept[i].data;
        kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(i));
        total -= size;
        used[data] = size;
        return data;
      }
    }
    char* data = map(size);
    if (!data && drop()) data = map(size);
    if (!data) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    used[data] = size;
    return data;
  }

  void give(void* data) {
    std::vector<Block> oldest;
    Block block{static_cast<char*>(data), 0};
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto at = used.find(data);
      block.size = at->second;
      used.erase(at);
    }
    // The last pages, which are small, stay: less than 2 MB a block.
    madvise(block.data, block.size / kHuge * kHuge, MADV_FREE);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      kept.push_back(block);
      total += block.size;
      size_t n = 0;
      for (; total > limit; ++n) total -= kept[n].size;
      oldest.assign(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(n));
      kept.erase(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(n));
    }
    unmap(oldest);
  }

  int64_t drop() {
    std::vector<Block> all;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      all.swap(kept);
      total = 0;
    }
    return unmap(all);
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex);
    return total;
  }

  std::mutex mutex;

 private:
  std::unordered_map<void*, int64_t> used;
  std::vector<Block> kept;  // oldest first
  int64_t total = 0;        // bytes of `kept`
};

// Never destroyed: tensors may outlive every destructor. A fork waits until no thread is inside.
Cache& cache() {
  static Cache* one = [] {
    const char* text = std::getenv("PALM_KERNELS_CPU_CACHE");
    const int64_t limit = default_limit();
    return new Cache(text ? parse_bytes(text, limit) : limit);
  }();
  static const int forks =
      pthread_atfork([] { one->mutex.lock(); }, [] { one->mutex.unlock(); }, [] { one->mutex.unlock(); });
  (void)forks;
  return *one;
}

}  // namespace

void* take_memory(int64_t bytes) { return cache().limit ? cache().take(bytes) : nullptr; }
void give_memory(void* block) { cache().give(block); }
int64_t memory_limit() { return cache().limit; }
int64_t memory_kept() { return cache().bytes(); }
int64_t drop_memory() { return cache().drop(); }

}  // namespace palm::cpu

#else

namespace palm::cpu {

void* take_memory(int64_t) { return nullptr; }
void give_memory(void*) {}
int64_t memory_limit() { return 0; }
int64_t memory_kept() { return 0; }
int64_t drop_memory() { return 0; }

}  // namespace palm::cpu

#endif
