// Fibers: switching between stacks, and the stacks. x86-64 by hand, ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifdef GANKERN_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>

#include <memory>
#endif

namespace simt {

// A suspended flow of control. `fake` is AddressSanitizer's; the scheduler's own has no stack here.
struct Fiber {
#ifdef __x86_64__
  void* sp = nullptr;
#else
  std::unique_ptr<ucontext_t> context = std::make_unique<ucontext_t>();
#endif
  void* fake = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
};

#ifdef __x86_64__
// Saves the callee's registers on the stack, leaves its top in *save, and goes on from `resume`.
__attribute__((naked, noinline)) inline void simt_switch(void** /*save*/, void* /*resume*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void prepare(Fiber& fiber, void (*entry)()) {
  char* base = static_cast<char*>(const_cast<void*>(fiber.stack));
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(base + fiber.stack_size);
  *--top = nullptr;  // where entry would return to, and the stack's alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.sp = top;
#else
  getcontext(fiber.context.get());
  fiber.context->uc_stack.ss_sp = base;
  fiber.context->uc_stack.ss_size = fiber.stack_size;
  makecontext(fiber.context.get(), entry, 0);
#endif
  fiber.fake = nullptr;
}

inline void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef GANKERN_SIMT_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.stack, to.stack_size);
#endif
#ifdef __x86_64__
  simt_switch(&from.sp, to.sp);
#else
  swapcontext(from.context.get(), to.context.get());
#endif
#ifdef GANKERN_SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

// Stacks for a block's threads, each above a page that faults, as far as a process may have so many
// mappings (65,530, two a stack). Tops are staggered, because equal offsets within a page would
// make all stacks compete for the same cache sets.
class Stacks {
 public:
#if defined(GANKERN_SIMT_ASAN) || defined(GANKERN_SIMT_RACE)
  static constexpr size_t kSize = 256 << 10;
#else
  static constexpr size_t kSize = 64 << 10;
#endif
  static constexpr size_t kGuard = 4096;

  void assign(Fiber& fiber, int i) {
    if (!memory_) reserve();
    char* base = memory_ + i * kSize;
    if (i >= guarded_) {
      if (guards++ < kMostGuards) mprotect(base, kGuard, PROT_NONE);
      guarded_ = i + 1;
    }
    fiber.stack = base + kGuard;
    fiber.stack_size = kSize - kGuard - i % 32 * 128;
  }
  bool contains(uintptr_t p) const { return p - reinterpret_cast<uintptr_t>(memory_) < kAll; }
  void forget_poison() {
#ifdef GANKERN_SIMT_ASAN
    for (int i = 0; i < guarded_; i++)
      __asan_unpoison_memory_region(memory_ + i * kSize + kGuard, kSize - kGuard);
#endif
  }

 private:
  static constexpr size_t kAll = 1024 * kSize;
  static constexpr int kMostGuards = 24 << 10;
  static inline int guards = 0;
  void reserve() {
    void* p = mmap(nullptr, kAll, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(p);
  }
  char* memory_ = nullptr;
  int guarded_ = 0;
};

}  // namespace simt
