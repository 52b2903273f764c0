// Convolutions as matrix products over channels: what both memory formats share.
#pragma once

#include "winograd.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTile = 64;          // tiles of a block
constexpr int64_t kWide = 2 * kLanes;  // columns of a register tile
constexpr int64_t kDepth = 256;        // channels of a panel that the first cache level holds
constexpr int64_t kGroup = 16;         // channels that lie together for the weight gradient
constexpr int64_t kChunk = 1 << 21;    // transformed elements of a chunk, about

struct Weights {
  const float* data;
  int64_t out_stride, in_stride;
  bool flip;
};

// u[place][o / kWidth][i][o % kWidth]; channels beyond O are zero.
template <int kMode, int kWidth>
void transform_weights(float* u, const Weights& w, int64_t O, int64_t I) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kT = A::kTaps, kAll = kT * kT;
  const int64_t panels = (O + kWidth - 1) / kWidth, place = panels * I * kWidth;
  parallel(panels, 4, [&](int64_t begin, int64_t end) {
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
        memset(taps, 0, sizeof taps);
        for (int64_t o = 0; o < width; o++, from += w.out_stride)
          for (int k = 0; k < kAll; k++) taps[k][o] = from[w.flip ? kAll - 1 - k : k];
        for (int x = 0; x < kT; x++) turn(taps[x], kT * kWidth, rows[0][x], kT * kWidth);
        for (int p = 0; p < kP; p++) {
          turn(rows[p][0], kWidth, all[0], kWidth);
          float* to = u + (p * kP * panels * I + panel * I + i) * kWidth;
          for (int q = 0; q < kP; q++) memcpy(to + q * place, all[q], sizeof all[q]);
        }
      }
  });
}

struct Padding {
  int64_t y, x;
};

// --- The weight gradient: places of Σ over tiles of A' dy and B x, turned back by G'.

// One side of the products: the transformed tiles of a chunk as [place][group][tile][kGroup].
template <int kPlaces>
struct Side {
  int64_t channels, groups, chunk;
  Buffer<float> data;
  Side(int64_t channels, int64_t chunk)
      : channels(channels),
        groups((channels + kGroup - 1) / kGroup),
        chunk(chunk),
        data(kPlaces * groups * chunk * kGroup) {}
  float* at(int64_t place, int64_t group) const {
    return &data[(place * groups + group) * chunk * kGroup];
  }
};

// du[place][o][i] += Σ over the first `count` tiles of a chunk.
template <int kPlaces>
void accumulate(float* du, const Side<kPlaces>& m, const Side<kPlaces>& v, int64_t count) {
  const int64_t rows = m.groups * kGroup, row = v.groups * kGroup;
  const int64_t columns = (row + kWide - 1) / kWide;
  parallel(kPlaces * columns, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t place = item / columns, i = item % columns * kWide, next = i + kLanes;
      const float* b = v.at(place, i / kGroup) + i % kGroup;
      for (int64_t o = 0; o < rows; o += kPanel) {
        float* to = du + (place * rows + o) * row + i;
        const float* a = m.at(place, o / kGroup) + o % kGroup;
        if (next < row)
          register_tile<2, true>(to, row, kLanes, a, 1, kGroup, b, kGroup,
                                 v.at(place, next / kGroup) + next % kGroup - b, count);
        else
          register_tile<1, true>(to, row, kLanes, a, 1, kGroup, b, kGroup, 0, count);
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

// fill_m(scratch, side, tiles, group, to, begin, stop) and fill_v put the transformed tiles
// [begin, stop) of a group of channels at place `to` of the chunk; each thread has a Scratch.
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
    parallel(blocks * (m.groups + v.groups), 1, [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t item = first; item < last; item++) {
        const int64_t to = item % blocks * kTile, group = item / blocks, from = begin + to;
        const int64_t stop = from + (count - to < kTile ? count - to : kTile);
        if (group < m.groups)
          fill_m(scratch, m, tiles, group, to, from, stop);
        else
          fill_v(scratch, v, tiles, group - m.groups, to, from, stop);
      }
    });
    accumulate(&du[0], m, v, count);
  }
  restore_weights<kMode>(dw, &du[0], out.C, in.C, rows, row);
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
