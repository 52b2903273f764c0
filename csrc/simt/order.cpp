// Happens-before. A thread's clock is (barriers passed) << 16 | (its own synchronisations since).
//
// - After a barrier every access with fewer barriers passed is known to the whole block.
// - A warp collective lets its lanes know of each other: a vector clock over the warp's lanes.
// - A fence followed by an atomic releases what the thread knew at the fence; fences of other
//   threads count once a barrier has passed on that they happened. An atomic on the same address
//   acquires what was released there, for its thread, and through barriers for its block.
#ifdef GANKERN_SIMT_RACE
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "checks.h"

namespace simt::order {

// What a thread has acquired: the first `count` releases at an address.
struct Acquired {
  uintptr_t address;
  size_t count;
};
using Knowledge = std::vector<Acquired>;

struct Release {
  std::vector<uint32_t> cover;  // by thread: accesses up to this clock are released
  Knowledge knowledge;
};
struct Sync {
  std::vector<Release> releases;
  std::unordered_map<uint32_t, std::vector<size_t>> by_block;
};

struct Clocks {
  uint32_t own;
  uint32_t lanes[32];  // of the warp's lanes: their accesses up to here are known
  bool fenced;
  uint32_t fence_barriers;   // barriers passed at the last fence
  uint32_t fence_lanes[32];  // lanes, at the last fence
  Knowledge knowledge;
};

struct State {
  std::vector<Clocks> clocks;  // of the block's threads
  uint32_t barriers;
  // Fences that a barrier has made known to the block.
  bool block_fenced;
  uint32_t block_fence_barriers;
  std::vector<uint32_t> block_fence_clock;  // by thread
  bool any_knowledge;
};

static std::unordered_map<uintptr_t, Sync> syncs;
static std::unordered_map<int, State> states;  // by the block's place
static State* here;

static void tick(Clocks& c, int lane) {
  if ((++c.own & 0xffff) == 0) fail("simt: too many warp synchronisations between two barriers");
  c.lanes[lane] = c.own;
}

static void merge(Knowledge& into, const Knowledge& from) {
  for (const Acquired& a : from) {
    const auto same = std::find_if(into.begin(), into.end(),
                                   [&](const Acquired& b) { return b.address == a.address; });
    if (same == into.end())
      into.push_back(a);
    else
      same->count = std::max(same->count, a.count);
  }
}

void launch_begins() { syncs.clear(); }

void enter(int place) { here = &states[place]; }

void block_begins() {
  here->clocks.resize(running.count);
  here->barriers = 1;
  for (int i = 0; i < running.count; i++) {
    Clocks& c = here->clocks[i];
    std::memset(c.lanes, 0, sizeof(c.lanes));
    c.lanes[i % 32] = c.own = here->barriers << 16;
    c.fenced = false;
    c.knowledge.clear();
  }
  here->any_knowledge = here->block_fenced = false;
  here->block_fence_barriers = 0;
  here->block_fence_clock.clear();
}

void barrier() {
  Knowledge all;
  for (int i = 0; i < running.count; i++) {
    Clocks& c = here->clocks[i];
    if (here->any_knowledge) merge(all, c.knowledge);
    if (!c.fenced) continue;
    here->block_fenced = true;
    here->block_fence_clock.resize(running.count);
    here->block_fence_barriers = std::max(here->block_fence_barriers, c.fence_barriers);
    for (int j = 0; j < 32 && i / 32 * 32 + j < running.count; j++) {
      uint32_t& known = here->block_fence_clock[i / 32 * 32 + j];
      known = std::max(known, c.fence_lanes[j]);
    }
  }
  here->barriers++;
  if (here->barriers >> 16) fail("simt: too many barriers in one block");
  for (int i = 0; i < running.count; i++) {
    here->clocks[i].lanes[i % 32] = here->clocks[i].own = here->barriers << 16;
    if (here->any_knowledge) here->clocks[i].knowledge = all;
  }
}

void rendezvous(int warp, unsigned lanes) {
  uint32_t joined[32] = {};
  Knowledge all;
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    const Clocks& c = here->clocks[warp * 32 + i];
    for (int j = 0; j < 32; j++) joined[j] = std::max(joined[j], c.lanes[j]);
    if (here->any_knowledge) merge(all, c.knowledge);
  }
  for (int i = 0; i < 32; i++) {
    if (!(lanes >> i & 1)) continue;
    Clocks& c = here->clocks[warp * 32 + i];
    std::memcpy(c.lanes, joined, sizeof(joined));
    tick(c, i);
    if (here->any_knowledge) c.knowledge = all;
  }
}

void fence() {
  Clocks& c = here->clocks[running.self->id];
  c.fenced = true;
  c.fence_barriers = here->barriers;
  std::memcpy(c.fence_lanes, c.lanes, sizeof(c.lanes));
  tick(c, running.self->id % 32);
}

void atomic(uintptr_t address, bool writes) {
  const int id = running.self->id;
  Clocks& c = here->clocks[id];
  Sync& sync = syncs[address];
  if (writes && (c.fenced || here->block_fenced)) {
    const uint32_t passed = std::max(c.fenced ? c.fence_barriers : 0, here->block_fence_barriers);
    Release release{std::vector<uint32_t>(running.count, (passed << 16) - 1), c.knowledge};
    for (int i = 0; i < running.count; i++) {
      uint32_t& cover = release.cover[i];
      if (here->block_fenced) cover = std::max(cover, here->block_fence_clock[i]);
      if (c.fenced && i / 32 == id / 32) cover = std::max(cover, c.fence_lanes[i % 32]);
    }
    sync.by_block[static_cast<uint32_t>(running.block) + 1].push_back(sync.releases.size());
    sync.releases.push_back(std::move(release));
  }
  merge(c.knowledge, {{address, sync.releases.size()}});
  here->any_knowledge = true;
}

Event now(const Access& a) {
  Event e;
  e.block = static_cast<uint32_t>(running.block) + 1;
  e.clock = here->clocks[running.self->id].own;
  e.pc = reinterpret_cast<uintptr_t>(a.pc);
  e.thread = running.self->id;
  e.atomic = a.atomic;
  return e;
}

// Follows the releases, and what the releasing threads had themselves acquired, each once.
static bool covered(const Event& e, const Knowledge& knowledge) {
  static Knowledge todo, seen;
  todo = knowledge;
  seen.clear();
  while (!todo.empty()) {
    const Acquired a = todo.back();
    todo.pop_back();
    const auto same = std::find_if(seen.begin(), seen.end(),
                                   [&](const Acquired& b) { return b.address == a.address; });
    const size_t first = same == seen.end() ? 0 : same->count;
    if (first >= a.count) continue;
    merge(seen, {a});
    const Sync& sync = syncs[a.address];
    const auto found = sync.by_block.find(e.block);
    if (found != sync.by_block.end())
      for (const size_t i : found->second)
        if (i < a.count && e.clock <= sync.releases[i].cover[e.thread]) return true;
    for (size_t i = first; i < a.count; i++)
      todo.insert(todo.end(), sync.releases[i].knowledge.begin(), sync.releases[i].knowledge.end());
  }
  return false;
}

bool before_now(const Event& e, uintptr_t address) {
  const int id = running.self->id;
  const Clocks& c = here->clocks[id];
  if (e.block == static_cast<uint32_t>(running.block) + 1) {
    if (static_cast<int>(e.thread) == id || e.clock < here->barriers << 16) return true;
    if (static_cast<int>(e.thread) / 32 == id / 32 && e.clock <= c.lanes[e.thread % 32])
      return true;
  }
  if (c.knowledge.empty()) return false;
  if (covered(e, c.knowledge)) return true;
  // An atomic is ordered before a later atomic on its address, and so before what follows that.
  if (!e.atomic) return false;
  for (const Acquired& a : c.knowledge)
    if (a.address == address && a.count == syncs[address].releases.size()) return true;
  return false;
}

}  // namespace simt::order
#endif
