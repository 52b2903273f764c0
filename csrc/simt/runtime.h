// What the parts of simt share: the state of the running launch, errors, counters, checks.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr int kMaxSharedDefault = 48 << 10, kSharedReserved = 1 << 10;  // of each block
constexpr int kPatience = 4096;  // turns of blocks that all wait, before that is a deadlock

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Waits : uint8_t { kNothing, kBarrier, kWarp, kOthers, kDone };

struct Thread {
  Fiber fiber;
  int id;
  uint3 index;
  Waits waits;
  int op;             // BlockOp or WarpOp
  unsigned mask;      // of a warp collective
  int arg, width;     // of a shuffle
  uint64_t value;     // given to a collective, then its result
  const void* place;  // where it waits
};

// A place for a block: its threads, which grow to the largest block seen, and its shared memory.
struct Block {
  int place;
  uint64_t index = 0;
  std::vector<Thread> threads;
  Stacks stacks;
  void* shared = nullptr;
  bool static_shared = false;  // it has used some (race build)
};

// The launch that runs now.
struct Running {
  const Launch* launch = nullptr;
  Block* now = nullptr;  // whose turn it is; the next three are its own
  Thread* threads = nullptr;
  void* shared = nullptr;
  uint64_t block = 0;         // linear index
  int count = 0;              // threads of a block
  Thread* self = nullptr;     // the thread that runs, null in the scheduler
  bool known_arrays = false;  // the launcher was called with arrays whose extents are registered
  std::string error;
  std::string suspicion;  // a read of unwritten memory: perhaps one side of a race, so it can wait
};
extern Running running;
extern int processors;  // multiprocessors of the simulated GPU
extern int max_shared;  // bytes that a block of it can ask for; see set_max_shared()
void set_max_shared(int bytes);
extern bool asked_shared;  // whether a launcher asked for it

// Ends the launch with an error that starts with `what` and names kernel, block and thread.
[[noreturn]] void fail(const std::string& what, const void* place = nullptr);
// The same, unless another error comes before the block ends.
void suspect(const std::string& what, const void* place);
std::string thread_name(int id);
std::string block_name(uint64_t linear);

// Source positions, innermost first: "a.cu:12 in f, from a.cu:40 in k".
std::string where(const void* pc);
std::string function_name(const void* function);

struct Range {
  uintptr_t begin = 0, end = 0;
  bool has(uintptr_t p) const { return p - begin < end - begin; }
};
// The library that holds a kernel, its writable part, and the end of that which began as zeros:
// static __shared__ arrays are in there.
struct Library {
  Range all, writable, zeros;
};
Library library_of(const void* kernel);

// clang-format off
#define SIMT_COUNTERS(X)                                                                         \
  X(launches)                                                                                    \
  X(blocks)                                                                                      \
  X(threads)                                                                                     \
  X(barriers)                                                                                    \
  X(warp_collectives)                                                                            \
  X(global_load_bytes)                                                                           \
  X(global_load_requests) X(global_load_sectors) X(global_load_used_bytes) X(global_store_bytes) \
      X(global_store_requests) X(global_store_sectors) X(global_store_used_bytes)                \
          X(global_atomics) X(unique_load_bytes) X(unique_load_sectors) X(unique_store_bytes)    \
              X(unique_store_sectors) X(shared_load_bytes) X(shared_load_requests)               \
                  X(shared_load_wavefronts) X(shared_load_conflicts) X(shared_store_bytes)       \
                      X(shared_store_requests) X(shared_store_wavefronts)                        \
                          X(shared_store_conflicts) X(shared_atomics)
// clang-format on
struct Counters {
#define X(name) uint64_t name = 0;
  SIMT_COUNTERS(X)
#undef X
};
struct LaunchRecord {
  const void* kernel;
  dim3 grid, block;
  size_t smem;
};
extern std::map<const void*, Counters> counters;  // by kernel
extern std::vector<LaunchRecord> launch_records;
extern Counters* counting;    // of the running kernel
extern uint64_t last_blocks;  // so many blocks of each launch run, the last ones; 0: all

// Arrays that launchers may touch, and arrays that nobody has written yet.
struct Region {
  uintptr_t begin, end;
  bool writable;
  int argument;  // of the launcher
};
extern std::vector<Region> regions;

const std::vector<Export>& exports();

extern const char* const variant;  // plain, asan or race

// What the race build does at each event (checks.cpp); nothing in the others.
namespace checks {
void unwritten(const void* p, size_t bytes);  // a fresh array, until forget()
void forget(const void* p);
}  // namespace checks
#ifdef GANKERN_SIMT_RACE
namespace checks {
void launch_begins();
void enter(int place);  // the block in this place goes on
void block_begins();
void barrier();                             // every thread of the block has arrived
void rendezvous(int warp, unsigned lanes);  // these lanes have met
void warp_pauses();                         // no lane of the running warp can go on
void fence();
void atomic(const void* p, int size, const void* pc, bool writes);
void written_by_host(const void* p, size_t bytes);
}  // namespace checks
#else
namespace checks {
inline void launch_begins() {}
inline void enter(int) {}
inline void block_begins() {}
inline void barrier() {}
inline void rendezvous(int, unsigned) {}
inline void warp_pauses() {}
inline void fence() {}
inline void written_by_host(const void*, size_t) {}
#ifdef GANKERN_SIMT_ASAN
void atomic(const void* p, int size, const void* pc, bool writes);
#else
inline void atomic(const void*, int, const void*, bool) {}
#endif
}  // namespace checks
#endif

}  // namespace simt
