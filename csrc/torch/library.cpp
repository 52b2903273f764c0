// The library as a whole: what implements its ops; which instruction set the CPU kernels use, and
// torch's thread pool.
#include "common.h"

// Null where this library has no such op.
extern "C" __attribute__((visibility("default"))) gankern::Kernel gankern_kernel(const char* name) {
  const auto found = gankern::implementations.find(name);
  return found == gankern::implementations.end() ? nullptr : found->second;
}

#if GK_BACKEND_ID == 1
namespace gankern::cpu {
using Body = void (*)(void*, int64_t, int64_t);

// Scratch that a thread gave back, for its next calls: the allocator returns large blocks to the
// system, and fresh pages can take longer than what is done in them.
class Kept {
 public:
  ~Kept() {
    while (count_) drop();
    free(small_);
  }

  // A block of at least `bytes`, which becomes its size.
  void* take(size_t& bytes) {
    if (bytes <= kSmall && top_ + kSmall <= kSmalls &&
        (small_ || (small_ = static_cast<char*>(aligned_alloc(64, kSmalls))))) {
      char* data = small_ + top_;
      top_ += (bytes + 63) / 64 * 64;
      return data;
    }
    int best = -1;
    for (int i = 0; i < count_; i++)
      if (blocks_[i].bytes >= bytes && blocks_[i].bytes / 4 <= bytes &&
          (best < 0 || blocks_[i].bytes < blocks_[best].bytes))
        best = i;
    if (best < 0) {
      bytes = (bytes + 63) / 64 * 64;
      return aligned_alloc(64, bytes);
    }
    const Block block = remove(best);
    bytes = block.bytes;
    return block.data;
  }

  void put(void* data, size_t bytes) {
    const size_t at = static_cast<char*>(data) - small_;
    if (small_ && data >= small_ && at < kSmalls) {
      top_ = at;
      return;
    }
    if (!data || bytes < kLeast || bytes > kMost) return free(data);
    while (count_ == kBlocks || total_ + bytes > kMost) drop();
    blocks_[count_++] = {data, bytes};
    total_ += bytes;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  static constexpr size_t kLeast = 1 << 15, kMost = 1 << 26;
  static constexpr int kBlocks = 16;
  // Small blocks lie in one, each behind those that are in use: a thread gives back first what it
  // took last.
  static constexpr size_t kSmall = 1 << 12, kSmalls = 1 << 16;

  Block remove(int i) {
    const Block block = blocks_[i];
    total_ -= block.bytes;
    count_--;
    for (; i < count_; i++) blocks_[i] = blocks_[i + 1];
    return block;
  }
  void drop() { free(remove(0).data); }  // the one that lay longest

  Block blocks_[kBlocks];
  int count_ = 0;
  size_t total_ = 0;
  char* small_ = nullptr;
  size_t top_ = 0;
};

static thread_local Kept kept;
bool poisons_scratch = false;

// What csrc/cpu/vec.h calls; torch's headers stay out of files built for AVX.
void* take_scratch(size_t& bytes) {
  void* data = kept.take(bytes);
  if (poisons_scratch && data) memset(data, 0xff, bytes);
  return data;
}

void put_scratch(void* data, size_t bytes) { kept.put(data, bytes); }

void parallel_for(int64_t n, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}
}  // namespace gankern::cpu

static int best_isa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

static int isa = best_isa();

extern "C" int gankern_cpu_isa() { return isa; }

// For tests: use a lower instruction set than the machine has.
extern "C" __attribute__((visibility("default"))) int gankern_set_cpu_isa(int wanted) {
  isa = std::min(wanted < 0 ? best_isa() : wanted, best_isa());
  return isa;
}

// For tests: fresh memory holds NaN. PyTorch's own switch for it is not asked.
extern "C" __attribute__((visibility("default"))) void gankern_poison_memory(int on) {
  gankern::poisoned = gankern::cpu::poisons_scratch = on;
}
#endif
