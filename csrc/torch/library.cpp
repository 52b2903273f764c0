// The library as a whole: which instruction set the CPU kernels use, and torch's thread pool.
#include "common.h"

#if GK_BACKEND_ID == 1
namespace gankern::cpu {
using Body = void (*)(void*, int64_t, int64_t);

// What csrc/cpu/vec.h calls; torch's headers stay out of files built for AVX.
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
  gankern::poisoned = on;
}
#endif
