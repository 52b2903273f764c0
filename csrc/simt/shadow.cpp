// Remembers, for each piece of memory, its last write and two reads since, and finds races.
#ifdef GANKERN_SIMT_RACE
#include <cstring>
#include <memory>
#include <unordered_map>

#include "checks.h"

namespace simt::shadow {

struct Cell {
  Event write, reads[2];
};

// 64 bytes of memory in cells of 4, 2 or 1 bytes, as fine as the accesses were.
struct Line {
  uint64_t loaded, stored;  // by byte, in this launch
  Cell* cells;
  int shift;
};
struct Page {
  Line lines[64];
};

// Memory for cells, given back as a whole when the next launch begins.
static std::vector<std::unique_ptr<char[]>> chunks;
static size_t chunk, used;
static constexpr size_t kChunk = 4 << 20;

static Cell* new_cells(int count) {
  const size_t bytes = count * sizeof(Cell);
  if (chunks.empty() || used + bytes > kChunk) {
    if (!chunks.empty()) chunk++;
    if (chunk >= chunks.size()) chunks.emplace_back(new char[kChunk]);
    chunk = std::min(chunk, chunks.size() - 1);
    used = 0;
  }
  char* p = chunks[chunk].get() + used;
  used += bytes;
  std::memset(p, 0, bytes);
  return reinterpret_cast<Cell*>(p);
}

static std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
static struct {
  uintptr_t number = ~uintptr_t(0);
  Page* page;
} cache[256];

void launch_begins() {
  pages.clear();
  for (auto& entry : cache) entry.number = ~uintptr_t(0);
  chunk = used = 0;
  if (chunks.size() > 128) chunks.resize(128);  // keep 512 MB at most
}

static Line& line_of(uintptr_t address) {
  const uintptr_t number = address >> 12;
  auto& entry = cache[number % 256];
  if (entry.number != number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    entry = {number, page.get()};
  }
  return entry.page->lines[address >> 6 & 63];
}

// Makes a line's cells no larger than 1 << shift bytes.
static void refine(Line& line, int shift) {
  if (!line.cells) {
    line.cells = new_cells(64 >> shift);
    line.shift = shift;
  }
  if (line.shift <= shift) return;
  Cell* finer = new_cells(64 >> shift);
  for (int i = 0; i < 64 >> shift; i++) finer[i] = line.cells[i >> (line.shift - shift)];
  line.cells = finer;
  line.shift = shift;
}

[[noreturn]] static void race(const Access& a, const Event& e, bool other_wrote) {
  const auto kind = [](bool atomic, bool write) {
    return atomic ? "atomic" : write ? "write" : "read";
  };
  fail(std::string("race on ") + describe_place(a.address, a.shared) + ": " +
           kind(a.atomic, a.write) + " of " + std::to_string(a.size) +
           " bytes, unordered with the " + kind(e.atomic, other_wrote) + " by " +
           thread_name(e.thread) + " of " + block_name(e.block - 1) + "\n  at " +
           where(reinterpret_cast<const void*>(e.pc)) + "\n  and this",
       a.pc);
}

static void touch(Cell& cell, const Access& a, const Event& now) {
  // Shared memory of another block is other memory.
  const auto clashes = [&](const Event& e) {
    return e.block && (!a.shared || e.block == now.block) && !(a.atomic && e.atomic) &&
           !(e.thread == now.thread && e.block == now.block) && !order::before_now(e, a.address);
  };
  if (a.shared && !a.write && cell.write.block != now.block)
    suspect("read of unwritten " + describe_place(a.address, true) + ", " + std::to_string(a.size) +
                " bytes",
            a.pc);
  if (clashes(cell.write)) race(a, cell.write, true);
  if (!a.write) {
    Event& first = cell.reads[0];
    Event& second = cell.reads[1];
    Event& slot = !first.block || (first.block == now.block && first.thread == now.thread) ||
                          (a.shared && first.block != now.block) ||
                          order::before_now(first, a.address)
                      ? first
                      : second;
    slot = now;
    return;
  }
  for (const Event& read : cell.reads)
    if (clashes(read)) race(a, read, false);
  cell.write = now;
  cell.reads[0].block = cell.reads[1].block = 0;
}

static void count_unique(Line& line, int begin, int bytes, bool write) {
  const uint64_t mask = (bytes == 64 ? ~uint64_t(0) : (uint64_t(1) << bytes) - 1) << begin;
  uint64_t& seen = write ? line.stored : line.loaded;
  const uint64_t fresh = mask & ~seen;
  if (!fresh) return;
  uint64_t sectors = 0;
  for (const uint64_t half : {uint64_t(0xffffffff), uint64_t(0xffffffff) << 32})
    sectors += fresh & half && !(seen & half);
  seen |= mask;
  (write ? counting->unique_store_bytes : counting->unique_load_bytes) +=
      __builtin_popcountll(fresh);
  (write ? counting->unique_store_sectors : counting->unique_load_sectors) += sectors;
}

void access(const Access& a) {
  const Event now = order::now(a);
  const uintptr_t end = a.address + a.size;
  for (uintptr_t p = a.address; p < end;) {
    Line& line = line_of(p);
    const uintptr_t stop = std::min(end, (p | 63) + 1);
    const uintptr_t odd = p | stop;
    refine(line, odd & 1 ? 0 : odd & 2 ? 1 : 2);
    for (int i = (p & 63) >> line.shift; i <= static_cast<int>((stop - 1) & 63) >> line.shift; i++)
      touch(line.cells[i], a, now);
    if (!a.shared) {
      if (!a.write || a.atomic) count_unique(line, p & 63, stop - p, false);
      if (a.write) count_unique(line, p & 63, stop - p, true);
    }
    p = stop;
  }
}

}  // namespace simt::shadow
#endif
