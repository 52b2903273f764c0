// Runs a grid: one fiber a thread, warps in turn until each one waits, blocks one after another or,
// where they wait for one another, in turn.
#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>

uint3 simt_thread_idx __asm__("simt_threadIdx");
uint3 simt_block_idx __asm__("simt_blockIdx");
uint3 simt_block_dim __asm__("simt_blockDim");
uint3 simt_grid_dim __asm__("simt_gridDim");

namespace simt {

Running running;
std::map<const void*, Counters> counters;
std::vector<LaunchRecord> launch_records;
Counters* counting;
std::vector<Region> regions;

#ifndef GANKERN_SIMT_RACE
void checks::unwritten(const void*, size_t) {}
void checks::forget(const void*) {}
#endif
#if defined(GANKERN_SIMT_RACE)
const char* const variant = "race";
#elif defined(GANKERN_SIMT_ASAN)
const char* const variant = "asan";
#else
const char* const variant = "plain";
#endif

static Fiber scheduler;
static std::map<const void*, int> shared_limits;  // set by cudaFuncSetAttribute

static std::string show(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
std::string thread_name(int id) {
  const dim3& b = running.launch->block;
  return "thread " + show(dim3(id % b.x, id / b.x % b.y, id / (b.x * b.y)));
}
std::string block_name(uint64_t i) {
  const dim3& g = running.launch->grid;
  return "block " + show(dim3(i % g.x, i / g.x % g.y, i / (uint64_t(g.x) * g.y)));
}

static std::string report(const std::string& what, const void* place) {
  const Launch& launch = *running.launch;
  std::string text = what;
  if (place) text += "\n  at " + where(place);
  if (running.self) text += "\n  by " + thread_name(running.self->id);
  return text + (running.self ? " of " : "\n  in ") + block_name(running.block) + "\n  kernel " +
         function_name(launch.kernel) + ", grid " + show(launch.grid) + ", block " +
         show(launch.block) + ", " + std::to_string(launch.smem) +
         " bytes of dynamic shared memory";
}

void suspect(const std::string& what, const void* place) {
  if (running.suspicion.empty()) running.suspicion = report(what, place);
}

void fail(const std::string& what, const void* place) {
  std::string text = report(what, place);
  if (!running.suspicion.empty()) text += "\nbefore that: " + running.suspicion;
  if (!running.self) throw Error(text);
  running.error = text;
  switch_to(running.self->fiber, scheduler, true);
  __builtin_unreachable();
}

static void thread_main() {
#ifdef GANKERN_SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
  Thread& self = *running.self;
  running.launch->call(running.launch->args);
  self.waits = Waits::kDone;
  switch_to(self.fiber, scheduler, true);
}

static void resume(Thread& t) {
  running.self = &t;
  simt_thread_idx = t.index;
  t.waits = Waits::kNothing;
  switch_to(scheduler, t.fiber);
  running.self = nullptr;
  if (!running.error.empty()) throw Error(running.error);
}

static void pause(Waits what, int op, const void* place) {
  Thread& self = *running.self;
  self.waits = what;
  self.op = op;
  self.place = place;
  switch_to(self.fiber, scheduler);
}

// A block that sleeps waits for another one.
void sleep() {
  const void* place = __builtin_return_address(0);
  if (running.now->static_shared)
    fail(
        "simt: a block that waits for others must keep its data in dynamic shared memory; "
        "a static array is one for all blocks",
        place);
  pause(Waits::kOthers, 0, place);
}

int block_barrier(BlockOp op, int predicate) {
  Thread* self = running.self;
  self->value = predicate != 0;
  pause(Waits::kBarrier, static_cast<int>(op), __builtin_return_address(0));
  return static_cast<int>(self->value);
}

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int arg, int width) {
  const void* place = __builtin_return_address(0);
  Thread* self = running.self;
  if (!(mask >> self->id % 32 & 1))
    fail("the calling lane " + std::to_string(self->id % 32) +
             " is missing from the mask of a warp "
             "collective",
         place);
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("the width of a shuffle must be a power of two up to 32, got " + std::to_string(width),
         place);
  self->mask = mask;
  self->value = value;
  self->arg = arg;
  self->width = width;
  pause(Waits::kWarp, static_cast<int>(op), place);
  return self->value;
}

// The lane whose value a shuffle gives to `lane`.
static int source_lane(WarpOp op, int lane, int arg, int width) {
  const int first = lane & ~(width - 1), last = first + width - 1;
  int j = lane;
  if (op == WarpOp::kIdx) return first | (arg & (width - 1));
  if (op == WarpOp::kUp) j = lane - arg;
  if (op == WarpOp::kDown) j = lane + arg;
  if (op == WarpOp::kXor) j = lane ^ arg;
  return j > last || (j < first && op == WarpOp::kUp) ? lane : j;
}

// Gives every lane of `lanes`, which have all arrived, the result of its collective.
static void collect(Thread* warp, unsigned lanes) {
  uint64_t values[32];
  unsigned votes = 0;
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    values[i] = warp[i].value;
    votes |= (values[i] & 1) << i;
  }
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    Thread& t = warp[i];
    const WarpOp op = static_cast<WarpOp>(t.op);
    if (op == WarpOp::kBallot) t.value = votes;
    if (op == WarpOp::kAll) t.value = votes == lanes;
    if (op == WarpOp::kAny) t.value = votes != 0;
    if (op >= WarpOp::kIdx && op <= WarpOp::kXor) {
      const int source = source_lane(op, i, t.arg, t.width);
      if (source < 0 || source > 31 || !(lanes >> source & 1)) {
        running.self = &t;  // for the message
        const std::string text = "a shuffle reads lane " + std::to_string(source) +
                                 ", which is not among its lanes (it has exited, or is missing "
                                 "from the mask)\n  at " +
                                 where(t.place) + "\n  by " + thread_name(t.id);
        running.self = nullptr;
        fail(text);
      }
      t.value = values[source];
    }
    t.waits = Waits::kNothing;
  }
}

// Completes one warp collective whose lanes have all arrived; exited lanes do not count.
static bool complete_collective(int first, int lanes) {
  Thread* warp = &running.threads[first];
  for (int i = 0; i < lanes; i++) {
    if (warp[i].waits != Waits::kWarp) continue;
    const unsigned mask = warp[i].mask;
    unsigned arrived = 0;
    bool all = true;
    for (int j = 0; j < lanes && all; j++) {
      if (!(mask >> j & 1) || warp[j].waits == Waits::kDone) continue;
      all = warp[j].waits == Waits::kWarp;
      if (!all) break;
      if (warp[j].mask != mask || warp[j].op != warp[i].op)
        fail("lanes of one mask meet in different warp collectives\n  " + thread_name(first + i) +
             " at " + where(warp[i].place) + "\n  " + thread_name(first + j) + " at " +
             where(warp[j].place));
      arrived |= 1u << j;
    }
    if (!all) continue;
    collect(warp, arrived);
    counting->warp_collectives++;
    checks::rendezvous(first / 32, arrived);
    return true;
  }
  return false;
}

static void run_warp(int first) {
  const int lanes = running.count - first < 32 ? running.count - first : 32;
  Thread* warp = &running.threads[first];
  do {
    for (int i = 0; i < lanes; i++)
      if (warp[i].waits == Waits::kNothing) resume(warp[i]);
    checks::warp_pauses();
  } while (complete_collective(first, lanes));
}

// Every thread waits or has exited: completes the barrier that all of them wait at, or reports.
// Returns false when all have exited.
static bool complete_barrier() {
  Thread* begin = running.threads;
  Thread* end = begin + running.count;
  Thread *waiting = nullptr, *done = nullptr, *stuck = nullptr;
  for (Thread* t = begin; t != end; t++) {
    if (t->waits == Waits::kDone) done = done ? done : t;
    if (t->waits == Waits::kBarrier) waiting = waiting ? waiting : t;
    if (t->waits == Waits::kWarp) stuck = stuck ? stuck : t;
  }
  if (stuck) {
    std::string missing;
    for (Thread* t = begin + stuck->id / 32 * 32; t != end && t->id / 32 == stuck->id / 32; t++)
      if (stuck->mask >> t->id % 32 & 1 && t->waits == Waits::kBarrier && missing.empty())
        missing = "\n  " + thread_name(t->id) + ", a lane of its mask, waits at " + where(t->place);
    fail("deadlock: a warp collective that not all lanes of its mask reach\n  " +
         thread_name(stuck->id) + " waits at " + where(stuck->place) + missing);
  }
  if (!waiting) return false;
  if (done)
    fail("divergent barrier: not all threads of the block reach it\n  " + thread_name(waiting->id) +
         " waits at " + where(waiting->place) + "\n  " + thread_name(done->id) + " has exited");
  uint64_t sum = 0;
  for (Thread* t = begin; t != end; t++) {
    if (t->op != waiting->op ||
        (t->place != waiting->place && where(t->place) != where(waiting->place)))
      fail("divergent barrier: threads of one block wait at different barriers\n  " +
           thread_name(waiting->id) + " at " + where(waiting->place) + "\n  " + thread_name(t->id) +
           " at " + where(t->place));
    sum += t->value;
  }
  const BlockOp op = static_cast<BlockOp>(waiting->op);
  if (op == BlockOp::kAnd) sum = sum == uint64_t(running.count);
  if (op == BlockOp::kOr) sum = sum != 0;
  for (Thread* t = begin; t != end; t++) {
    t->value = sum;
    t->waits = Waits::kNothing;
  }
  counting->barriers++;
  checks::barrier();
  return true;
}

// Makes `b` the block whose turn it is.
static void enter(Block& b) {
  const dim3& g = running.launch->grid;
  running.now = &b;
  running.threads = b.threads.data();
  running.shared = b.shared;
  running.block = b.index;
  simt_block_idx = {unsigned(b.index % g.x), unsigned(b.index / g.x % g.y),
                    unsigned(b.index / (uint64_t(g.x) * g.y))};
  checks::enter(b.place);
}

static void begin_block() {
  const dim3& b = running.launch->block;
  running.now->static_shared = false;
  if (running.shared) std::memset(running.shared, 0xff, running.launch->smem);  // NaN
  for (int i = 0; i < running.count; i++) {
    Thread& t = running.threads[i];
    t.id = i;
    t.index = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    t.waits = Waits::kNothing;
    prepare(t.fiber, thread_main);
  }
  checks::block_begins();
}

// True when the block has ended, false when it waits for others.
static bool run_block() {
  Thread* end = running.threads + running.count;
  const auto sleeps = [](const Thread& t) { return t.waits == Waits::kOthers; };
  for (Thread* t = running.threads; t != end; t++)
    if (sleeps(*t)) t->waits = Waits::kNothing;
  do {
    for (int first = 0; first < running.count; first += 32) run_warp(first);
    if (std::any_of(running.threads, end, sleeps)) return false;
  } while (complete_barrier());
  if (!running.suspicion.empty()) throw Error(running.suspicion);
  return true;
}

// Blocks that the GPU holds at once, as far as threads and shared memory limit them.
static size_t most_blocks(const Launch& what) {
  const size_t by_shared =
      static_cast<size_t>(max_shared + kSharedReserved) / (what.smem + kSharedReserved);
  return processors *
         std::max(size_t(1), std::min({size_t(32), size_t(2048 / running.count), by_shared}));
}

// The blocks that have begun and not ended, each in a place of its own.
class Live {
 public:
  ~Live() {
    for (Block* b : blocks_) release(*b);
    running.shared = nullptr;
    running.self = nullptr;
  }
  size_t size() const { return blocks_.size(); }

  void begin(uint64_t index) {
    if (free().empty()) {
      static int places = 0;
      free().push_back(new Block{places++});  // kept for all launches
    }
    Block& b = *free().back();
    free().pop_back();
    blocks_.push_back(&b);
    b.index = index;
    while (b.threads.size() < static_cast<size_t>(running.count)) {
      b.threads.emplace_back();
      b.stacks.assign(b.threads.back().fiber, static_cast<int>(b.threads.size()) - 1);
    }
    // Exactly as many bytes as asked for, so that AddressSanitizer sees the end.
    if (const size_t bytes = running.launch->smem)
      b.shared = ::operator new(bytes, std::align_val_t(128));
    enter(b);
    begin_block();
  }

  // A turn of each; true if that brought any of them further.
  bool turn() {
    const uint64_t before = counting->barriers + counting->warp_collectives;
    const size_t count = blocks_.size();
    for (size_t i = 0; i < blocks_.size();) {
      enter(*blocks_[i]);
      if (!run_block()) {
        i++;
        continue;
      }
      release(*blocks_[i]);
      blocks_.erase(blocks_.begin() + i);
    }
    return blocks_.size() < count || counting->barriers + counting->warp_collectives > before;
  }

  [[noreturn]] void report_deadlock() {
    enter(*blocks_[0]);
    const Thread* t = running.threads;
    while (t->waits != Waits::kOthers) t++;
    fail("deadlock: every block that runs waits for others, and no other can begin\n  " +
         thread_name(t->id) + " waits at " + where(t->place));
  }

 private:
  static std::vector<Block*>& free() {
    static std::vector<Block*> list;
    return list;
  }
  static void release(Block& b) {
    ::operator delete(b.shared, std::align_val_t(128));
    b.shared = nullptr;
    if (std::uncaught_exceptions()) b.stacks.forget_poison();  // of abandoned frames
    free().push_back(&b);
  }
  std::vector<Block*> blocks_;
};

// `fixed`: bytes of static shared memory.
static void check_launch(const Launch& launch, size_t fixed) {
  const dim3 &g = launch.grid, &b = launch.block;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  std::string wrong;
  if (threads == 0 || threads > kMaxThreads || b.x > 1024 || b.y > 1024 || b.z > 64)
    wrong = "a block must have 1 to 1024 threads (z at most 64)";
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    wrong = "a grid must have 1 to 2147483647, 65535 and 65535 blocks";
  const auto limit = shared_limits.find(launch.kernel);
  const bool raised = limit != shared_limits.end();
  const size_t most = raised ? limit->second : kMaxSharedDefault - fixed;
  if (launch.smem > most || (raised && most + fixed > static_cast<size_t>(max_shared)))
    wrong = "dynamic shared memory is limited to " + std::to_string(most) +
            " bytes (cudaFuncSetAttribute raises it to " + std::to_string(max_shared) + "), less " +
            std::to_string(fixed) + " of static arrays";
  if (!wrong.empty())
    throw Error("invalid launch: " + wrong + "\n  kernel " + function_name(launch.kernel) +
                ", grid " + show(g) + ", block " + show(b) + ", " + std::to_string(launch.smem) +
                " bytes of dynamic shared memory");
}

// What a kernel writes among its library's zeros: its static shared arrays. Their size is known
// only afterwards, and is asked for where it could matter.
class StaticShared {
 public:
  explicit StaticShared(const Launch& launch) {
    if (launch.smem < kMaxSharedDefault / 2) return;
    const Range range = library_of(launch.kernel).zeros;
    const uintptr_t begin = (range.begin + sizeof(Piece) - 1) / sizeof(Piece) * sizeof(Piece);
    begin_ = reinterpret_cast<const Piece*>(begin);  // arrays are aligned as pieces are
    if (begin < range.end) read((range.end - begin) / sizeof(Piece));
  }
  size_t bytes() const { return changed() * sizeof(Piece); }

 private:
  struct Piece {
    uint64_t words[2];
  };
  // Not watched: between arrays lie what the address sanitizer keeps anyone from touching.
  __attribute__((no_sanitize("address"))) void read(size_t pieces) {
    before_.resize(pieces);
    for (size_t i = 0; i < pieces; i++)
      for (int k = 0; k < 2; k++) before_[i].words[k] = begin_[i].words[k];
  }
  __attribute__((no_sanitize("address"))) size_t changed() const {
    size_t found = 0;
    for (size_t i = 0; i < before_.size(); i++)
      found +=
          begin_[i].words[0] != before_[i].words[0] || begin_[i].words[1] != before_[i].words[1];
    return found;
  }
  const Piece* begin_ = nullptr;
  std::vector<Piece> before_;
};

uint64_t last_blocks = 0;

void launch(const Launch& what) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check_launch(what, 0);
  const StaticShared fixed(what);
  running.launch = &what;
  running.count = static_cast<int>(what.block.x * what.block.y * what.block.z);
  running.error.clear();
  running.suspicion.clear();
  simt_grid_dim = what.grid;
  simt_block_dim = what.block;
  counting = &counters[what.kernel];
  counting->launches++;
  launch_records.push_back({what.kernel, what.grid, what.block, what.smem});
  const uint64_t blocks = uint64_t(what.grid.x) * what.grid.y * what.grid.z;
  counting->blocks += blocks;
  counting->threads += blocks * running.count;

  checks::launch_begins();
  Live live;
  uint64_t next = last_blocks ? blocks - std::min(last_blocks, blocks) : 0;
  int idle = 0;  // turns in which nobody came further
  while (next < blocks || live.size()) {
    if (live.size() && live.turn()) {
      idle = 0;
    } else if (next < blocks && live.size() < most_blocks(what)) {
      live.begin(next++);
    } else if (++idle > kPatience) {
      live.report_deadlock();
    }
  }
  check_launch(what, fixed.bytes());
}

void* dynamic_shared() {
  if (!running.shared)
    fail("the kernel uses dynamic shared memory, but was launched with 0 bytes of it",
         __builtin_return_address(0));
  return running.shared;
}

void device_fence() { checks::fence(); }

void on_atomic(const void* p, int size, const void* pc, bool writes) {
  if (reinterpret_cast<uintptr_t>(p) % size) fail("misaligned atomic", pc);
  checks::atomic(p, size, pc, writes);
}

void trap() { fail("__trap()", __builtin_return_address(0)); }

cudaError_t get_device(int* device) {
  *device = 0;
  return cudaSuccess;
}

int processors = 132, max_shared = 227 << 10;
bool asked_shared = false;

// Another GPU has been told nothing about its kernels.
void set_max_shared(int bytes) { max_shared = bytes, shared_limits.clear(); }

// The figures of an H100, these two aside.
cudaError_t get_attribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = processors, cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = kMaxThreads, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 2048, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = kMaxSharedDefault, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      asked_shared = true;
      return *value = max_shared, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      asked_shared = true;
      return *value = max_shared + kSharedReserved, cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      return *value = 0x7fffffff, cudaSuccess;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return *value = 65535, cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = 32, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = 50 << 20, cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t memset_async(void* p, int value, size_t bytes, void*) {
  std::memset(p, value, bytes);
  checks::written_by_host(p, bytes);
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > max_shared) return cudaErrorInvalidValue;
  shared_limits[kernel] = value;
  return cudaSuccess;
}

static std::vector<Export>& all_exports() {
  static std::vector<Export> list;
  return list;
}
bool add_export(const Export& launcher) {
  all_exports().push_back(launcher);
  return true;
}
const std::vector<Export>& exports() { return all_exports(); }

}  // namespace simt
