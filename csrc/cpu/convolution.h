// Convolutions as matrix products over channels: what both memory formats share.
#pragma once

#include "act.h"
#include "finish.h"
#include "winograd.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTile = 64;          // tiles of a block
constexpr int64_t kWide = 2 * kLanes;  // columns of a register tile
constexpr int64_t kDepth = 256;        // channels of a panel that the first cache level holds
constexpr int64_t kGroup = kLanes;     // channels that lie together for the weight gradient
constexpr int64_t kSpan = 16;          // channels that a thread transforms for it at once
constexpr int64_t kChunk = 1 << 20;    // transformed elements of a chunk, about

struct Weights {
  const float* data;
  int64_t out_stride, in_stride;
  bool flip;
};

// From a place's transformed weights to the next's: odd in cache lines, so that all places of a
// channel do not meet in one set of the cache.
inline int64_t place_stride(int64_t weights) { return ((weights + 15) / 16 | 1) * 16; }

// 4x4 taps of kLanes outputs, `apart` from each other: to[tap * step + output].
GK_INLINE void turn_taps(float* to, int64_t step, const float* from, int64_t apart, int64_t count) {
  for (int64_t k = 0; k < 16; k += kLanes) {
    vf taps[kLanes];
    for (int64_t r = 0; r < kLanes; r++) taps[r] = r < count ? load(from + r * apart + k) : vf{};
    transpose(taps);
    for (int64_t r = 0; r < kLanes; r++) store(to + (k + r) * step, taps[r]);
  }
}

// u[place][o / kWidth][i][o % kWidth]; channels beyond O are zero.
template <int kMode, int kWidth>
void transform_weights(float* u, const Weights& w, int64_t O, int64_t I) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kT = A::kTaps, kAll = kT * kT;
  const int64_t panels = (O + kWidth - 1) / kWidth, place = place_stride(panels * I * kWidth);
  parallel(panels, 1, [&](int64_t begin, int64_t end) {
    float taps[kAll][kWidth] = {}, rows[kP][kT][kWidth], all[kP][kWidth];
    // Axis::weight of kT rows, lane by lane: a loop that becomes vectors.
    const auto turn = [&](const float* w, int w_step, float* u, int step) {
      for (int o = 0; o < kWidth; o++) {
        float in[kT], found[kP];
        for (int k = 0; k < kT; k++) in[k] = w[k * w_step + o];
        A::weight(in, found);
        for (int p = 0; p < kP; p++) u[p * step + o] = found[p];
      }
    };
    for (int64_t panel = begin; panel < end; panel++)
      for (int64_t i = 0; i < I; i++) {
        const float* from = w.data + panel * kWidth * w.out_stride + i * w.in_stride;
        const int64_t left = O - panel * kWidth, width = left < kWidth ? left : kWidth;
        if constexpr (kT == 4) {  // which are never flipped
          for (int64_t o = 0; o < kWidth; o += kLanes)
            turn_taps(taps[0] + o, kWidth, from + o * w.out_stride, w.out_stride, width - o);
        } else {
          memset(taps, 0, sizeof taps);
          for (int64_t o = 0; o < width; o++, from += w.out_stride)
            for (int k = 0; k < kAll; k++) taps[k][o] = from[w.flip ? kAll - 1 - k : k];
        }
        for (int x = 0; x < kT; x++) turn(taps[x], kT * kWidth, rows[0][x], kT * kWidth);
        for (int p = 0; p < kP; p++) {
          turn(rows[p][0], kWidth, all[0], kWidth);
          float* to = u + p * kP * place + (panel * I + i) * kWidth;
          for (int q = 0; q < kP; q++) memcpy(to + q * place, all[q], sizeof all[q]);
        }
      }
  });
}

struct Padding {
  int64_t y, x;
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// f(mode, padding) for a convolution of 3x3 taps.
template <typename F>
void by_form(int stride, bool transposed, Padding pad, const F& f) {
  if (stride == 1)
    f(Count<kSame>{}, pad);
  else if (transposed)
    f(Count<kUp>{}, Padding{1, 1});
  else
    f(Count<kDown>{}, Padding{0, 0});
}

// --- What becomes of the outputs: nothing, the epilogue, or the gradients of x * d.

GK_INLINE vf some(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : load_part(p, left);
}

// The epilogue's operands; kPwl as in act.h.
template <bool kPwl>
struct Epilogue {
  const Finish& f;
  ActArgs<float> p;
  int64_t C, pixels;
  Epilogue(const Finish& f, const Images& out)
      : f(f),
        p(act_args<float>(f.act, f.alpha, f.gain, f.clamp)),
        C(out.C),
        pixels(out.H * out.W) {}
  const float* noise(int64_t n) const {
    return f.noise ? f.noise + (f.noise_n == 1 ? 0 : n * pixels) : nullptr;
  }
  GK_INLINE vf operator()(vf y) const { return clamped(value<kPwl>(y, p) * p.gain, p); }
};

// Sums of y * x by block and sample, a row each: as blocks and samples both follow the tiles,
// block + sample is one. begin(block): its first tile.
struct Dots {
  const Finish& f;
  int64_t C, pixels, row, rows;
  Buffer<float> sums;
  Dots(const Finish& f, const Images& out, int64_t blocks)
      : f(f),
        C(out.C),
        pixels(out.H * out.W),
        row((C + kWide - 1) / kWide * kWide),
        rows(blocks + out.N),
        sums(rows * row) {
    memset(&sums[0], 0, static_cast<size_t>(rows * row) * sizeof(float));
  }
  float* at(int64_t block, int64_t n, int64_t c) const { return &sums[(block + n) * row + c]; }

  // To f.dots, block after block.
  template <typename Begin>
  void add_up(int64_t N, const Tiles& tiles, int64_t blocks, const Begin& begin) const {
    const int64_t each = tiles.count / N;
    memset(f.dots, 0, static_cast<size_t>(N * C) * sizeof(float));
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t n = begin(block) / each; n * each < begin(block + 1); n++)
        for (int64_t c = 0; c < C; c++) f.dots[n * C + c] += at(block, n, 0)[c];
  }
};

// --- The weight gradient: places of Σ over tiles of A' dy and B x, turned back by G'.

// One side of the products: the transformed tiles of a chunk as [place][group][tile][kGroup].
template <int kPlaces>
struct Side {
  int64_t channels, spans, groups;
  int64_t apart, place_stride;  // of groups, of places
  Buffer<float> data;
  Side(int64_t channels, int64_t chunk)
      : channels(channels),
        spans((channels + kSpan - 1) / kSpan),
        groups(spans * (kSpan / kGroup)),
        apart(chunk * kGroup + kLine),
        // Odd in cache lines, so that a tile's places do not meet in one set of the cache.
        place_stride((groups * apart / kLine | 1) * kLine),
        data(kPlaces * place_stride) {}
  float* at(int64_t place, int64_t group) const {
    return &data[place * place_stride + group * apart];
  }

 private:
  static constexpr int64_t kLine = 16;
};

// du[place][o][i] += Σ over the first `count` tiles of a chunk, kSome tiles after another, which
// with their columns of v and a group of m the first cache level holds.
template <int kPlaces>
void accumulate(float* du, const Side<kPlaces>& m, const Side<kPlaces>& v, int64_t count) {
  constexpr int64_t kSome = 128, kColumns = 3;  // with kPanel rows, 12 sums of AVX2
  const int64_t rows = m.groups * kGroup, row = v.groups * kGroup;
  const int64_t items = (v.groups + kColumns - 1) / kColumns;
  parallel(kPlaces * items, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t place = item / items, begin = item % items * v.groups / items;
      const int64_t width = (item % items + 1) * v.groups / items - begin;
      for (int64_t t = 0; t < count; t += kSome) {
        const int64_t tiles = count - t < kSome ? count - t : kSome;
        const float* b = v.at(place, begin) + t * kGroup;
        for (int64_t o = 0; o < rows; o += kPanel) {
          float* to = du + (place * rows + o) * row + begin * kGroup;
          const float* a = m.at(place, o / kGroup) + t * kGroup + o % kGroup;
          const auto run = [&](auto columns) {
            register_tile<kPanel, decltype(columns)::value, true>(to, row, kLanes, a, 1, kGroup, b,
                                                                  kGroup, v.apart, tiles);
          };
          if (width == 3)
            run(Count<3>{});
          else if (width == 2)
            run(Count<2>{});
          else
            run(Count<1>{});
        }
      }
    }
  });
}

// dw[o][i][kTaps][kTaps] from du[place][o][i].
template <int kMode>
void restore_weights(float* dw, const float* du, int64_t O, int64_t I, int64_t rows, int64_t row) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kT = A::kTaps, kAll = kT * kT;
  parallel(O, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t i = 0; i < I; i += kLanes) {
        vf half[kT][kP], w[kT][kT];
        for (int q = 0; q < kP; q++) {
          vf column[kP], taps[kT];
          for (int p = 0; p < kP; p++) column[p] = load(du + ((p * kP + q) * rows + o) * row + i);
          A::weight_grad(column, taps);
          for (int r = 0; r < kT; r++) half[r][q] = taps[r];
        }
        for (int r = 0; r < kT; r++) A::weight_grad(half[r], w[r]);
        for (int64_t j = 0; j < kLanes && i + j < I; j++)
          for (int k = 0; k < kAll; k++) dw[(o * I + i + j) * kAll + k] = w[k / kT][k % kT][j];
      }
  });
}

// fill_m(scratch, side, tiles, span, to, begin, stop) and fill_v put the transformed tiles
// [begin, stop) of a span of channels at place `to` of the chunk; each thread has a Scratch.
template <int kMode, typename Scratch, typename M, typename V>
void weight_gradient(float* dw, const Images& out, const Images& in, const M& fill_m,
                     const V& fill_v) {
  using A = Axis<kMode>;
  constexpr int kPlaces = A::kProducts * A::kProducts;
  const Tiles tiles(in.N, out.H, out.W, A::kOut);
  const int64_t fits = kChunk / (kPlaces * (out.C + in.C)) / kTile * kTile;
  const int64_t chunk = fits < kTile ? kTile : fits;
  const Side<kPlaces> m(out.C, chunk), v(in.C, chunk);
  const int64_t row = v.groups * kGroup, rows = m.groups * kGroup;
  Buffer<float> du(kPlaces * rows * row);
  memset(&du[0], 0, static_cast<size_t>(kPlaces * rows * row) * sizeof(float));
  for (int64_t begin = 0; begin < tiles.count; begin += chunk) {
    const int64_t count = tiles.count - begin < chunk ? tiles.count - begin : chunk;
    const int64_t blocks = (count + kTile - 1) / kTile;
    parallel(blocks * (m.spans + v.spans), 1, [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t item = first; item < last; item++) {
        const int64_t to = item % blocks * kTile, span = item / blocks, from = begin + to;
        const int64_t stop = from + (count - to < kTile ? count - to : kTile);
        if (span < m.spans)
          fill_m(scratch, m, tiles, span, to, from, stop);
        else
          fill_v(scratch, v, tiles, span - m.spans, to, from, stop);
      }
    });
    accumulate(&du[0], m, v, count);
  }
  restore_weights<kMode>(dw, &du[0], out.C, in.C, rows, row);
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
