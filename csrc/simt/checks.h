// The parts of the race build: checks.cpp takes each access, order.cpp knows what happens before
// what, shadow.cpp remembers accesses, traffic.cpp counts them as the hardware would make them.
#pragma once

#include "runtime.h"

namespace simt {

struct Access {
  uintptr_t address;
  int size;
  bool write, atomic, shared;
  const void* pc;
};

// An access in the past: by which thread, at which of its times (order.cpp), from where.
struct Event {
  uint32_t block = 0;  // its linear index + 1; 0: no event
  uint32_t clock = 0;
  uint64_t pc : 48, thread : 15, atomic : 1;
  Event() : pc(0), thread(0), atomic(0) {}
};

namespace order {
void launch_begins();
void enter(int place);
void block_begins();
void barrier();
void rendezvous(int warp, unsigned lanes);
void fence();
void atomic(uintptr_t address, bool writes);
Event now(const Access& a);
// True if the event, an access to `address`, is ordered before what the running thread does now.
bool before_now(const Event& e, uintptr_t address);
}  // namespace order

namespace shadow {
void launch_begins();
void access(const Access& a);
}  // namespace shadow

namespace traffic {
void log(const Access& a);
void flush();
}  // namespace traffic

std::string describe_place(uintptr_t address,
                           bool shared);  // "global memory, byte 8 of argument 2"

}  // namespace simt
