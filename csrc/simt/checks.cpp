// Takes every access of an instrumented kernel. g++ -fsanitize=thread calls __tsan_read4 and its
// like before each one; these are ours, not ThreadSanitizer's.
#ifdef GANKERN_SIMT_RACE
#include "checks.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>

namespace simt {

static Range host_stack;  // holds the launch's arguments
static Library library;   // of the running kernel

// Arrays of simt.empty(): which bytes have been written.
struct Fresh {
  Range range;
  std::vector<bool> written;
};
static std::vector<Fresh> fresh;

static Fresh* find_fresh(uintptr_t p) {
  for (Fresh& f : fresh)
    if (f.range.has(p)) return &f;
  return nullptr;
}

static const Region* find_region(uintptr_t p) {
  static size_t last = 0;
  if (last < regions.size() && p - regions[last].begin < regions[last].end - regions[last].begin)
    return &regions[last];
  for (last = 0; last < regions.size(); last++)
    if (p - regions[last].begin < regions[last].end - regions[last].begin) return &regions[last];
  return nullptr;
}

std::string describe_place(uintptr_t p, bool shared) {
  if (!shared) {
    const Region* r = find_region(p);
    if (!r) return "global memory";
    return "global memory, byte " + std::to_string(p - r->begin) + " of argument " +
           std::to_string(r->argument);
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(running.shared);
  if (p - begin >= running.launch->smem) return "static shared memory";
  return "dynamic shared memory, byte " + std::to_string(p - begin);
}

static std::string outside(const Access& a) {
  std::string text = std::string(a.write ? "write" : "read") + " of " + std::to_string(a.size) +
                     " bytes outside every array that the launcher was given";
  const Region* nearest = nullptr;
  uintptr_t best = 1 << 20;
  for (const Region& r : regions) {
    const uintptr_t gap = a.address >= r.end ? a.address - r.end : r.begin - a.address;
    if (gap < best || (gap == best && !nearest)) best = gap, nearest = &r;
  }
  if (nearest)
    text += ", " + std::to_string(best) +
            (a.address >= nearest->end ? " bytes after the end of argument "
                                       : " bytes before the start of argument ") +
            std::to_string(nearest->argument);
  return text;
}

static void check_global(const Access& a) {
  const Region* r = find_region(a.address);
  if (r && a.address + a.size > r->end) r = nullptr;
  if (!r && running.known_arrays) fail(outside(a), a.pc);
  if (r && a.write && !r->writable)
    fail("write to argument " + std::to_string(r->argument) + ", which is const", a.pc);
  if (fresh.empty()) return;
  Fresh* f = find_fresh(a.address);
  if (!f) return;
  const auto begin = f->written.begin() + (a.address - f->range.begin);
  if (!a.write || a.atomic)
    if (std::find(begin, begin + a.size, false) != begin + a.size)
      suspect("read of unwritten " + describe_place(a.address, false) + ", " +
                  std::to_string(a.size) + " bytes",
              a.pc);
  if (a.write) std::fill(begin, begin + a.size, true);
}

static void take(const void* p, size_t size, bool write, bool atomic, const void* pc) {
  if (!running.self) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (running.now->stacks.contains(address)) return;
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(running.shared);
  const bool dynamic = offset < running.launch->smem;
  const bool shared = dynamic || library.writable.has(address);
  if (!shared && (library.all.has(address) || host_stack.has(address))) return;
  if (shared && !dynamic) running.now->static_shared = true;
  const Access a{address, static_cast<int>(size), write, atomic, shared, pc};
  if (size <= 16 && (size & (size - 1)) == 0 && address % size)
    fail("misaligned access: " + std::to_string(size) + " bytes at an address that is " +
             std::to_string(address % size) + " bytes off",
         pc);
  if (dynamic && offset + size > running.launch->smem)
    fail("access to dynamic shared memory beyond its end", pc);
  if (!shared) check_global(a);
  if (atomic) order::atomic(address, write);
  shadow::access(a);
  traffic::log(a);
}

namespace checks {

void launch_begins() {
  static thread_local Range stack;
  if (!stack.end) {
    pthread_attr_t attributes;
    void* base;
    size_t size;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &base, &size);
    pthread_attr_destroy(&attributes);
    stack.begin = reinterpret_cast<uintptr_t>(base);
    stack.end = stack.begin + size;
  }
  host_stack = stack;
  library = library_of(running.launch->kernel);
  order::launch_begins();
  shadow::launch_begins();
}
void enter(int place) { order::enter(place); }
void block_begins() { order::block_begins(); }
void barrier() { order::barrier(); }
void rendezvous(int warp, unsigned lanes) { order::rendezvous(warp, lanes); }
void warp_pauses() { traffic::flush(); }
void fence() { order::fence(); }
void atomic(const void* p, int size, const void* pc, bool writes) {
  take(p, size, writes, true, pc);
}

void written_by_host(const void* p, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (Fresh* f = find_fresh(address)) {
    const auto begin = f->written.begin() + (address - f->range.begin);
    std::fill(begin, begin + std::min(bytes, static_cast<size_t>(f->written.end() - begin)), true);
  }
}
void unwritten(const void* p, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  fresh.push_back({{begin, begin + bytes}, std::vector<bool>(bytes, false)});
}
void forget(const void* p) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  fresh.erase(std::remove_if(fresh.begin(), fresh.end(),
                             [=](const Fresh& f) { return f.range.begin == begin; }),
              fresh.end());
}

}  // namespace checks
}  // namespace simt

#define HOOKS(n)                                                                                \
  void __tsan_read##n(void* p) { simt::take(p, n, false, false, __builtin_return_address(0)); } \
  void __tsan_write##n(void* p) { simt::take(p, n, true, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##n(void* p) {                                                      \
    simt::take(p, n, false, false, __builtin_return_address(0));                                \
  }                                                                                             \
  void __tsan_unaligned_write##n(void* p) {                                                     \
    simt::take(p, n, true, false, __builtin_return_address(0));                                 \
  }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  simt::take(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  simt::take(p, n, true, false, __builtin_return_address(0));
}
// Of the guards that g++ gives to some static arrays of templates; no access of the kernel's.
unsigned char __tsan_atomic8_load(const unsigned char* p, int) { return *p; }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
