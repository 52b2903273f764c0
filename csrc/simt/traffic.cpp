// Counts accesses as the hardware makes them: a warp's lanes at one place in the code are one
// request.
#ifdef GANKERN_SIMT_RACE
#include <algorithm>
#include <unordered_map>

#include "checks.h"

namespace simt::traffic {

struct Entry {
  const void* pc;
  uintptr_t address;
  int size;
  bool write, shared;
};

static std::vector<Entry> lanes[32];  // of the running warp, since it last paused

void log(const Access& a) {
  if (a.atomic)
    (a.shared ? counting->shared_atomics : counting->global_atomics)++;
  else
    lanes[running.self->id % 32].push_back({a.pc, a.address, a.size, a.write, a.shared});
}

// The lanes' entries of one request; lane[i] is null if lane i has no part in it.
struct Request {
  const Entry* lane[32] = {};
};

static void count_global(const Request& r, const Entry& first) {
  uintptr_t sectors[32 * 3];
  uint32_t masks[32 * 3];  // the bytes used of each sector
  int n = 0;
  uint64_t bytes = 0;
  for (const Entry* e : r.lane) {
    if (!e) continue;
    bytes += e->size;
    for (uintptr_t p = e->address; p < e->address + e->size;) {
      const uintptr_t sector = p >> 5, stop = std::min(e->address + e->size, (sector + 1) << 5);
      int i = n - 1;
      while (i >= 0 && sectors[i] != sector) i--;
      if (i < 0) {
        i = n++;
        sectors[i] = sector;
        masks[i] = 0;
      }
      masks[i] |= static_cast<uint32_t>(((uint64_t(1) << (stop - p)) - 1) << (p & 31));
      p = stop;
    }
  }
  uint64_t used = 0;
  for (int i = 0; i < n; i++) used += __builtin_popcount(masks[i]);
  Counters& c = *counting;
  (first.write ? c.global_store_bytes : c.global_load_bytes) += bytes;
  (first.write ? c.global_store_requests : c.global_load_requests)++;
  (first.write ? c.global_store_sectors : c.global_load_sectors) += n;
  (first.write ? c.global_store_used_bytes : c.global_load_used_bytes) += used;
}

// Cycles that the 32 banks of 4 bytes need for lanes [begin, end): distinct words in the fullest
// bank.
static int wavefronts(const Request& r, int begin, int end) {
  uintptr_t words[32][32];
  int count[32] = {}, most = 0;
  for (int lane = begin; lane < end; lane++) {
    const Entry* e = r.lane[lane];
    if (!e) continue;
    for (uintptr_t word = e->address >> 2; word <= (e->address + e->size - 1) >> 2; word++) {
      uintptr_t* bank = words[word & 31];
      int& n = count[word & 31];
      if (std::find(bank, bank + n, word) == bank + n && n < 32) bank[n++] = word;
      most = std::max(most, n);
    }
  }
  return most;
}

static void count_shared(const Request& r, const Entry& first) {
  // 8-byte accesses go by half-warps, 16-byte accesses by quarter-warps.
  const int step = first.size > 8 ? 8 : first.size > 4 ? 16 : 32;
  uint64_t bytes = 0, cycles = 0, conflicts = 0;
  for (const Entry* e : r.lane) bytes += e ? e->size : 0;
  for (int lane = 0; lane < 32; lane += step) {
    const int n = wavefronts(r, lane, lane + step);
    cycles += n;
    conflicts += n > 1 ? n - 1 : 0;
  }
  Counters& c = *counting;
  (first.write ? c.shared_store_bytes : c.shared_load_bytes) += bytes;
  (first.write ? c.shared_store_requests : c.shared_load_requests)++;
  (first.write ? c.shared_store_wavefronts : c.shared_load_wavefronts) += cycles;
  (first.write ? c.shared_store_conflicts : c.shared_load_conflicts) += conflicts;
}

static void count(const Request& r) {
  const Entry* first = *std::find_if(r.lane, r.lane + 32, [](const Entry* e) { return e; });
  // A wide copy of a structure is several instructions; the hardware moves at most 16 bytes by one.
  if (first->size > 16) {
    Request part;
    Entry parts[32];
    for (int offset = 0; offset < first->size; offset += 16) {
      for (int i = 0; i < 32; i++) {
        if (!r.lane[i]) continue;
        parts[i] = *r.lane[i];
        parts[i].address += offset;
        parts[i].size = std::min(16, first->size - offset);
        part.lane[i] = &parts[i];
      }
      count(part);
    }
    return;
  }
  first->shared ? count_shared(r, *first) : count_global(r, *first);
}

// True if all lanes that did anything made the same sequence of accesses.
static bool in_step() {
  const std::vector<Entry>* model = nullptr;
  for (const auto& lane : lanes) {
    if (lane.empty()) continue;
    if (!model) model = &lane;
    if (lane.size() != model->size()) return false;
    for (size_t i = 0; i < lane.size(); i++)
      if (lane[i].pc != (*model)[i].pc) return false;
  }
  return true;
}

// Of lanes that went different ways: the n-th time each came to a place belongs together.
static void count_diverged() {
  struct Visit {
    const void* pc;
    uint32_t nth;
    uint32_t lane;
    const Entry* entry;
  };
  static std::vector<Visit> visits;
  static std::unordered_map<const void*, uint32_t> times;
  visits.clear();
  for (uint32_t i = 0; i < 32; i++) {
    times.clear();
    for (const Entry& e : lanes[i]) visits.push_back({e.pc, times[e.pc]++, i, &e});
  }
  std::sort(visits.begin(), visits.end(), [](const Visit& a, const Visit& b) {
    return std::tie(a.pc, a.nth) < std::tie(b.pc, b.nth);
  });
  for (size_t i = 0; i < visits.size();) {
    Request r;
    const Visit& v = visits[i];
    for (; i < visits.size() && visits[i].pc == v.pc && visits[i].nth == v.nth; i++)
      r.lane[visits[i].lane] = visits[i].entry;
    count(r);
  }
}

void flush() {
  if (in_step()) {
    size_t n = 0;
    for (const auto& lane : lanes) n = std::max(n, lane.size());
    for (size_t k = 0; k < n; k++) {
      Request r;
      for (int i = 0; i < 32; i++)
        if (!lanes[i].empty()) r.lane[i] = &lanes[i][k];
      count(r);
    }
  } else {
    count_diverged();
  }
  for (auto& lane : lanes) lane.clear();
}

}  // namespace simt::traffic
#endif
