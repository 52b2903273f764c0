// How lines.cuh cuts images into blocks, and a block's shared memory into what it holds.
#pragma once

#include "taps.cuh"

namespace gankern {
namespace {

template <typename T>
constexpr int kLineColumns = sizeof(T) == 8 ? 1 : 2;  // of a thread: see LineColumns
template <typename T>
constexpr int kLineRows = sizeof(T) == 2 ? 8 : 4;  // of a step
// Rows of du at once: a step's, or half of them. As many of the result are then written into x's
// stage, and end before the rows of x that are still to be read: these have the greater pitch.
constexpr int kDuRows = 4;
// Columns of the backward's result beyond two of each lane: the gradient of an image has a few more
// than it.
constexpr int kLineRest = 3;
// Packs of a step that a thread copies, at most: what its columns are and one more, since rows have
// some beside their columns.
template <typename T, int R>
constexpr int kLineCopies = R * kLineColumns<T> * static_cast<int>(sizeof(T)) / 16 + 1;
template <typename T>
constexpr int kLineThreads = sizeof(T) == 8 ? 288 : 512;  // at most
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename T>
constexpr int kLineBlocks = 1;  // on a multiprocessor
#else
template <typename T>
constexpr int kLineBlocks = sizeof(T) == 8 ? 1 : 2;
#endif

constexpr int kLineSlot = 56;  // bytes of a LineSlot, at most

// Rows of a strip, but for its halo, and steps of the backward, at most.
constexpr int kLineStrip = 100, kLineSteps = 32;

// Into how many strips to cut `height` rows, so that blocks(strips), of rows(strips) and a halo,
// take the least time of `slots` that run at once: the last round, if it is not full, takes less
// than another, but more than its share. Strips are not longer than `longest`, nor, where there is
// a choice, shorter than 14 halos; many are not worth a search.
template <typename Rows, typename Blocks>
int cut_strips(int height, int longest, int halo, int64_t slots, Rows rows, Blocks blocks) {
  const int fewest = static_cast<int>(ceil_div(height, longest));
  int best = fewest;
  double least = 0;
  const int most = min(fewest + 8, max(fewest, height / (14 * halo)));
  for (int strips = fewest; strips <= most; strips++) {
    const int64_t all = blocks(strips);
    const double rounds = static_cast<double>(all) / static_cast<double>(slots);
    const double time =
        (rows(strips) + halo) * (static_cast<double>(ceil_div(all, slots)) + rounds);
    if (strips == fewest || time < least) least = time, best = strips;
  }
  return best;
}

// Rows of an image in shared memory.
struct LineImage {
  int pitch, packs, magic;  // elements from a row to the next; packs of a row; see quotient()
  int at, stage;            // bytes from the begin of a plane's share; of a step
};

struct LinePlan {
  int tile_w, tile_h, tiles_x, tiles_y;
  int across;                // columns that are filtered; the backward's: of dv
  int wide;                  // the most of these and of the result's
  int lanes, magic, planes;  // threads of a plane; see quotient(); planes of a block
  LineImage x;
  int dus, du_pitch, sums, copies, rests;  // backward: bytes, elements, bytes, bytes, bytes
  // Where rows are stored through shared memory: out_stage > 0. The backward's lie where x was.
  int outs, out_stage, out_pitch;
  int share, noises, shared;  // bytes of a plane; where the noise is; of a block
  int threads() const { return (lanes * planes + 31) / 32 * 32; }
  int64_t tiles() const { return static_cast<int64_t>(tiles_x) * tiles_y; }
  // Those of the same planes follow each other.
  int64_t blocks(int64_t N, int64_t C) const { return tiles() * N * ceil_div(C, planes); }
};

// Bytes that a block can have: 64 KiB on Turing, 99 and more since.
inline int shared_limit() {
  int device = 0, most = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return most;
}

// Columns of dv before the first that exists, of those that a tile meets from `left` on: as many as
// can be left out, lanes having pairs of neighbours in 16 bits.
template <typename T>
__host__ __device__ inline int columns_before(int left) {
  return left < 0 ? -left & (sizeof(T) == 2 ? ~1 : ~0) : 0;
}

// width, height: of the result, forward y and backward dx; w, out_w: of rows
// of x and y; x0: padding; aligned: so is the result; limit: bytes of shared memory that a block
// can have. The backward's tiles do not depend on `aligned`.
template <typename T>
LinePlan plan_lines(bool backward, bool noise, int64_t N, int64_t C, int width, int height, int w,
                    int out_w, int x0, bool aligned, int limit) {
  constexpr int bytes = sizeof(T), word = sizeof(Acc<T>), V = 16 / bytes, K = kLineColumns<T>;
  constexpr int rows_of_step = kLineRows<T>, threads = kLineThreads<T>;
  constexpr int copies = kLineCopies<T, rows_of_step>;
  const int halo = backward ? kHalo : 0, row = backward ? w : out_w;
  const auto up_to = [](int64_t n, int unit) { return static_cast<int>(ceil_div(n, unit)) * unit; };
  // Of a row, whole sectors of them.
  const auto packs = [&](int columns) { return up_to(ceil_div(columns + 2 * V - 1, V), 2); };
  const int64_t sms = sm_count();
  // What a block may have, with room for another one where there is that much.
  const int room = limit < 128 * 1024 ? limit - 2 * 1024 : limit / 2 - 1280;
  LinePlan t{};
  const auto place = [&](int& at, int64_t size) {
    at = t.share;
    t.share += up_to(size, 16);
  };
  // Pitches equal the images' rows modulo a pack.
  const auto pitch = [](int least, int like, int unit) {
    return least + ((like - least) % unit + unit) % unit;
  };
  const auto image = [&](LineImage& i, int columns, int like) {
    i.packs = packs(columns), i.magic = magic_of(i.packs);
    i.pitch = pitch(columns + 2 * V - 2, like, V);
    i.stage = up_to((rows_of_step * (columns + 3 * V - 3) + 2 * V) * bytes, 16);  // of any image
    place(i.at, 2 * i.stage);
  };
  // Strips are of whole steps.
  const auto in_steps = [&](int rows) {
    return up_to(rows + halo + kHalo, rows_of_step) - halo - kHalo;
  };
  // The forward's next rows come while a step's are read, the backward's once they have been.
  const auto noise_bytes = [&] {
    return noise ? (backward ? kDuRows : 2 * rows_of_step) * t.across * word : 0;
  };
  // Whole rows, as far as there are threads and memory.
  for (t.tiles_x = static_cast<int>(ceil_div(width, K * threads));; t.tiles_x++) {
    t.tile_w = static_cast<int>(ceil_div(width, t.tiles_x));
    if (t.tiles_x > 1) t.tile_w = up_to(t.tile_w, 32 / bytes);
    int across = t.tile_w + halo;
    if (backward && t.tiles_x == 1) {  // those that exist
      const int left = x0 - kHalo, before = columns_before<T>(left);
      across = max(1, min(out_w - left, across) - before);
    }
    t.across = up_to(across, K);
    t.wide = max(t.across, t.tile_w);
    const int64_t lanes =
        max(ceil_div(max(t.across, t.tile_w - (backward ? kLineRest : 0)), K),
            ceil_div(rows_of_step * static_cast<int64_t>(packs(t.wide + kHalo)), copies));
    // Of whole rows: store_lines() has warps of a plane.
    t.lanes = lanes <= 32 ? pow2_between(lanes, 4, 32) : up_to(lanes, t.tiles_x > 1 ? 32 : 4);
    t.share = up_to(kLineSlot, 16);  // it comes first
    image(t.x, t.wide + kHalo, w);
    if (backward) {
      t.du_pitch = up_to(t.wide + kHalo + 2, 2);
      place(t.dus, kDuRows * t.du_pitch * word);
      place(t.sums, 3 * t.lanes * word);
      place(t.copies, copies * t.lanes * 4);
      place(t.rests, kLineRest * kHalo * word);
    }
    t.out_pitch = t.tiles_x == 1 ? row : pitch(t.tile_w + 2 * V - 2, row, V);
    t.out_stage = up_to((rows_of_step * t.out_pitch + 2 * V) * bytes, 16);
    const bool whole = aligned && row * bytes % 32 == 0;
    if (!backward && !whole) place(t.outs, t.out_stage);
    if (whole) t.out_stage = 0;
    if (t.lanes <= threads && max(1, 32 / t.lanes) * t.share + noise_bytes() <= room) break;
  }
  t.tiles_x = static_cast<int>(ceil_div(width, t.tile_w));
  t.magic = magic_of(t.lanes);

  // Several planes: of 256 threads, since four blocks of them wait less at barriers than two of
  // 512. More share the noise where that is a large part of what a step does, or of its memory.
  const int least = max(1, 32 / t.lanes);
  const bool many = noise && !backward && bytes == 2;
  t.planes = max(1, (many ? threads : 256) / t.lanes);
  const auto part = [&] { return (t.planes * t.share + noise_bytes()) * threads; };
  while (noise && 2 * t.planes * t.lanes <= threads && part() > room * t.planes * t.lanes)
    t.planes *= 2;
  t.planes = max(min(t.planes, up_to(C, least)), least) / least * least;
  while (t.planes > least && t.planes * t.share + noise_bytes() > room) t.planes -= least;
  const auto rows = [&](int strips) {
    return min(in_steps(static_cast<int>(ceil_div(height, strips))), height);
  };
  const auto blocks = [&](int strips) {
    t.tile_h = rows(strips);
    t.tiles_y = static_cast<int>(ceil_div(height, t.tile_h));
    return t.blocks(N, C);
  };
  const int64_t slots = sms * max(1, 2 * kLineThreads<float> / t.threads());
  int strips = cut_strips(height, kLineStrip, halo + kHalo, slots, rows, blocks);
  while (4 * blocks(strips) < 3 * sms && height > 4 * strips) strips *= 2;
  while (t.planes > least && 4 * blocks(strips) < 3 * sms) t.planes -= least;
  t.shared = t.planes * t.share + noise_bytes();
  t.noises = t.planes * t.share;
  return t;
}

}  // namespace
}  // namespace gankern
