// Bounds. g++ -fsanitize=address calls __asan_load4_noabort and its like before each access of a
// kernel; the linker
// (--wrap) turns them into these: AddressSanitizer's shadow decides, and simt reports.
#ifdef GANKERN_SIMT_ASAN
#include "runtime.h"

namespace simt {

static std::string report;

// Of AddressSanitizer's report, the line that tells where the address lies.
static std::string location() {
  const size_t at = report.find(" is located ");
  if (at == std::string::npos) return "";
  const size_t begin = report.rfind('\n', at) + 1, end = report.find('\n', at);
  return "\n  " + report.substr(begin, end - begin);
}

// True if the 8-byte granules of a small access are wholly addressable: the quick answer.
static bool clean(uintptr_t p, size_t size) {
  static const auto offset = [] {
    size_t scale, start;
    __asan_get_shadow_mapping(&scale, &start);
    return start;
  }();
  const char* shadow = reinterpret_cast<const char*>(offset);
  return size <= 8
             ? !shadow[p >> 3] && !shadow[(p + size - 1) >> 3]
             : size == 16 && !shadow[p >> 3] && !shadow[(p + 8) >> 3] && !shadow[(p + 15) >> 3];
}

static void check(const void* p, size_t size, bool write, const void* pc) {
  if (clean(reinterpret_cast<uintptr_t>(p), size)) return;
  if (!__asan_region_is_poisoned(const_cast<void*>(p), size)) return;
  void* frame = __builtin_frame_address(0);
  __asan_set_error_report_callback([](const char* text) { report = text; });
  report.clear();
  __asan_report_error(const_cast<void*>(pc), frame, frame, const_cast<void*>(p), write, size);
  if (!running.self) return;  // of a launcher's own code: the report is on stderr
  fail(std::string("out of bounds: ") + (write ? "write" : "read") + " of " + std::to_string(size) +
           " bytes" + location(),
       pc);
}

namespace checks {
void atomic(const void* p, int size, const void* pc, bool writes) { check(p, size, writes, pc); }
}  // namespace checks
}  // namespace simt

#define HOOKS(n)                                           \
  void __wrap___asan_load##n##_noabort(const void* p) {    \
    simt::check(p, n, false, __builtin_return_address(0)); \
  }                                                        \
  void __wrap___asan_store##n##_noabort(const void* p) {   \
    simt::check(p, n, true, __builtin_return_address(0));  \
  }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __wrap___asan_loadN_noabort(const void* p, size_t n) {
  simt::check(p, n, false, __builtin_return_address(0));
}
void __wrap___asan_storeN_noabort(const void* p, size_t n) {
  simt::check(p, n, true, __builtin_return_address(0));
}
}
#endif
