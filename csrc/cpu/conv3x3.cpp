// 3x3 convolutions in float32 on the CPU, of stride 1 and 2 and transposed, by minimal filtering
// (winograd.h): 16 products for four outputs of stride 1 in place of 36, 25 in place of 36 with
// stride 2. And the gradient of their weights, likewise.
//
// Forward: a thread takes a block of tiles through all three stages, so that transformed inputs and
// products stay in its cache. Weight gradient: chunks of tiles are transformed by all threads, then
// multiplied by all, each with places and channels of its own. No sum depends on the threads.
#include "winograd.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTile = 64;             // tiles of a block
constexpr int64_t kRow = kTile + kLanes;  // what they take: the last vector may begin anywhere
constexpr int64_t kWide = 2 * kLanes;     // tiles of a register tile
constexpr int64_t kDepth = 256;           // channels of a panel that the first cache level holds
constexpr int64_t kGroup = 16;            // channels that lie together for the weight gradient
constexpr int64_t kChunk = 1 << 21;       // transformed elements of a chunk, about

struct Weights {
  const float* data;
  int64_t out_stride, in_stride;
  bool flip;
};

// u[place][o / kPanel][i][o % kPanel]; channels beyond O are zero.
template <int kMode>
void transform_weights(float* u, const Weights& w, int64_t O, int64_t I) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  const int64_t panels = (O + kPanel - 1) / kPanel, place = panels * I * kPanel;
  parallel(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * kPanel; o < end * kPanel; o++)
      for (int64_t i = 0; i < I; i++) {
        float rows[kP][3] = {}, all[kP][kP];
        const float* k = w.data + o * w.out_stride + i * w.in_stride;
        for (int x = 0; x < 3 && o < O; x++) {
          float column[kP];
          const int at = w.flip ? 2 - x : x, top = w.flip ? 6 : 0, bottom = w.flip ? 0 : 6;
          A::weight(k[top + at], k[3 + at], k[bottom + at], column);
          for (int p = 0; p < kP; p++) rows[p][x] = column[p];
        }
        float* to = u + (o / kPanel * I + i) * kPanel + o % kPanel;
        for (int p = 0; p < kP; p++) {
          A::weight(rows[p][0], rows[p][1], rows[p][2], all[p]);
          for (int q = 0; q < kP; q++) to[(p * kP + q) * place] = all[p][q];
        }
      }
  });
}

// A block of tiles of all channels: v[place][channel][tile].
template <int kMode>
using InputReader = Reader<Axis<kMode>::kIn, Axis<kMode>::kInStep, Axis<kMode>::kProducts>;

struct Padding {
  int64_t y, x;
};

// The transformed inputs of tiles [begin, stop) of channel c: to[place * place_stride + tile].
template <int kMode>
void transform_input(float* to, int64_t place_stride, InputReader<kMode>& reader, const float* x,
                     const Images& im, const Tiles& tiles, Padding pad, int64_t c, int64_t begin,
                     int64_t stop) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  each_run(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    reader.run(
        x + (n * im.C + c) * im.H * im.W, im.H, im.W, row * A::kInStep - pad.y,
        first * A::kInStep - pad.x, end - first, [](const vf* d, vf* v) { A::input(d, v); },
        [&](int64_t j, const vf(*d)[A::kIn]) {
          for (int p = 0; p < kP; p++) {
            vf v[kP];
            A::input(d[p], v);
            for (int q = 0; q < kP; q++) store(to + (p * kP + q) * place_stride + at + j, v[q]);
          }
        });
  });
}

// The outputs of tiles [begin, stop) of channel o from products m[place * place_stride + tile].
template <int kMode>
void transform_output(float* y, const float* m, int64_t place_stride, float* lines,
                      const Images& im, const Tiles& tiles, int64_t o, int64_t begin,
                      int64_t stop) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kOut = A::kOut;
  constexpr int64_t kPitch = kRow * kOut;
  each_run(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    for (int64_t j = 0; j < end - first; j += kLanes) {
      vf half[kOut][kP];
      for (int q = 0; q < kP; q++) {
        vf column[kP], y_of[kOut];
        for (int p = 0; p < kP; p++) column[p] = load(m + (p * kP + q) * place_stride + at + j);
        A::output(column, y_of);
        for (int r = 0; r < kOut; r++) half[r][q] = y_of[r];
      }
      for (int r = 0; r < kOut; r++) {
        vf y_of[kOut];
        A::output(half[r], y_of);
        scatter<kOut>(lines + r * kPitch + j * kOut, y_of);
      }
    }
    const int64_t left = im.W - first * kOut, width = (end - first) * kOut;
    const int64_t bytes = (width < left ? width : left) * static_cast<int64_t>(sizeof(float));
    for (int r = 0; r < kOut && row * kOut + r < im.H; r++)
      memcpy(y + ((n * im.C + o) * im.H + row * kOut + r) * im.W + first * kOut, lines + r * kPitch,
             static_cast<size_t>(bytes));
  });
}

// A block's tiles of one channel, v[place][kRow], into panels of kWide tiles and all channels,
// which fit in the first cache level: to[place][panel][channel][kWide].
template <int kPlaces>
GK_INLINE void to_panels(float* to, const float* v, int64_t channel, int64_t channels) {
  for (int64_t t = 0; t < kPlaces * kTile; t += kLanes) {
    const int64_t place = t / kTile, tile = t % kTile, panel = t / kWide;
    store(to + (panel * channels + channel) * kWide + t % kWide, load(v + place * kRow + tile));
  }
}

// One place's products m[o][kRow] of u and v, kDepth channels after another.
void multiply(float* m, const float* u, const float* v, int64_t panels, int64_t I, int64_t tiles) {
  for (int64_t i = 0; i < I; i += kDepth) {
    const int64_t count = I - i < kDepth ? I - i : kDepth;
    for (int64_t t = 0; t < tiles; t += kWide)
      for (int64_t o = 0; o < panels; o++) {
        float* to = m + o * kPanel * kRow + t;
        const float *a = u + (o * I + i) * kPanel, *b = v + t * I + i * kWide;
        if (i == 0)
          register_tile<2, false>(to, kRow, kLanes, a, kPanel, b, kWide, kLanes, count);
        else
          register_tile<2, true>(to, kRow, kLanes, a, kPanel, b, kWide, kLanes, count);
      }
  }
}

template <int kMode>
void forward(const float* x, const Weights& w, float* y, const Images& in, const Images& out,
             Padding pad) {
  using A = Axis<kMode>;
  constexpr int kPlaces = A::kProducts * A::kProducts;
  const int64_t I = in.C, O = out.C, panels = (O + kPanel - 1) / kPanel;
  const Tiles tiles(in.N, out.H, out.W, A::kOut);
  Buffer<float> u(kPlaces * panels * I * kPanel);
  transform_weights<kMode>(&u[0], w, O, I);
  const int64_t m_place = panels * kPanel * kRow;
  parallel((tiles.count + kTile - 1) / kTile, 1, [&](int64_t first, int64_t last) {
    InputReader<kMode> reader;
    Buffer<float> v(kPlaces * I * kTile), m(kPlaces * m_place), lines(A::kOut * A::kOut * kRow);
    Buffer<float> channel(kPlaces * kRow);
    for (int64_t block = first; block < last; block++) {
      const int64_t begin = block * kTile;
      const int64_t stop = begin + kTile < tiles.count ? begin + kTile : tiles.count;
      for (int64_t i = 0; i < I; i++) {
        transform_input<kMode>(&channel[0], kRow, reader, x, in, tiles, pad, i, begin, stop);
        to_panels<kPlaces>(&v[0], &channel[0], i, I);
      }
      for (int64_t place = 0; place < kPlaces; place++)
        multiply(&m[place * m_place], &u[place * panels * I * kPanel], &v[place * kTile * I],
                 panels, I, stop - begin);
      for (int64_t o = 0; o < O; o++)
        transform_output<kMode>(y, &m[o * kRow], m_place, &lines[0], out, tiles, o, begin, stop);
    }
  });
}

// --- The weight gradient: places of Σ over tiles of A' dy and B x, turned back by G'.

// to[t][c] from from[c][t], kGroup x n, whole vectors of t.
GK_INLINE void transpose_group(float* to, const float* from, int64_t from_row, int64_t n) {
  for (int64_t t = 0; t < n; t += kLanes)
    for (int64_t c = 0; c < kGroup; c += kLanes) {
      vf v[kLanes];
      for (int i = 0; i < kLanes; i++) v[i] = load(from + (c + i) * from_row + t);
    // Halves of the distance s between rows change places, for s = 1, 2, 4, ...
#pragma GCC unroll 4
      for (int s = 1; s < kLanes; s *= 2) {
        vi lo, hi;
        for (int i = 0; i < kLanes; i++) {
          lo[i] = i & s ? i - s + kLanes : i;
          hi[i] = i & s ? i + kLanes : i + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++)
          if (!(i & s)) {
            const vf a = v[i], b = v[i + s];
            v[i] = __builtin_shuffle(a, b, lo);
            v[i + s] = __builtin_shuffle(a, b, hi);
          }
      }
      for (int i = 0; i < kLanes; i++) store(to + (t + i) * kGroup + c, v[i]);
    }
}

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

  // Tiles [begin, stop) of a group, at place `to` of the chunk, by transform(channel, out).
  template <typename F>
  void fill(float* scratch, int64_t group, int64_t to, int64_t tiles, const F& transform) const {
    for (int64_t c = 0; c < kGroup; c++) {
      float* out = scratch + c * kRow;
      if (group * kGroup + c < channels)
        transform(group * kGroup + c, out, kGroup * kRow);
      else
        for (int place = 0; place < kPlaces; place++)
          memset(out + place * kGroup * kRow, 0, kTile * sizeof(float));
    }
    for (int place = 0; place < kPlaces; place++)
      transpose_group(at(place, group) + to * kGroup, scratch + place * kGroup * kRow, kRow, tiles);
  }
};

// The transformed output gradients of tiles [begin, stop) of channel o.
template <int kMode>
void transform_output_grad(float* to, int64_t place_stride, Reader<2, 2, 2>& reader,
                           const float* dy, const Images& im, const Tiles& tiles, int64_t o,
                           int64_t begin, int64_t stop) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  each_run(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    reader.run(
        dy + (n * im.C + o) * im.H * im.W, im.H, im.W, row * 2, first * 2, end - first,
        [](const vf* d, vf* v) { v[0] = d[0], v[1] = d[1]; },
        [&](int64_t j, const vf(*d)[2]) {
          vf half[2][kP];
          for (int r = 0; r < 2; r++) A::output_grad(d[r], half[r]);
          for (int q = 0; q < kP; q++) {
            const vf column[2] = {half[0][q], half[1][q]};
            vf m[kP];
            A::output_grad(column, m);
            for (int p = 0; p < kP; p++) store(to + (p * kP + q) * place_stride + at + j, m[p]);
          }
        });
  });
}

// dw[o][i][3][3] from du[place][o][i].
template <int kMode>
void restore_weights(float* dw, const float* du, int64_t O, int64_t I, int64_t rows, int64_t row) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  parallel(O, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t i = 0; i < I; i += kLanes) {
        vf half[3][kP], w[3][3];
        for (int q = 0; q < kP; q++) {
          vf column[kP], three[3];
          for (int p = 0; p < kP; p++) column[p] = load(du + ((p * kP + q) * rows + o) * row + i);
          A::weight_grad(column, three);
          for (int r = 0; r < 3; r++) half[r][q] = three[r];
        }
        for (int r = 0; r < 3; r++) A::weight_grad(half[r], w[r]);
        for (int64_t j = 0; j < kLanes && i + j < I; j++)
          for (int k = 0; k < 9; k++) dw[(o * I + i + j) * 9 + k] = w[k / 3][k % 3][j];
      }
  });
}

template <int kMode>
void weight_gradient(const float* dy, const float* x, float* dw, const Images& out,
                     const Images& in, Padding pad) {
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
      InputReader<kMode> reader;
      Reader<2, 2, 2> grad_reader;
      Buffer<float> scratch(kPlaces * kGroup * kRow);
      for (int64_t item = first; item < last; item++) {
        const int64_t to = item % blocks * kTile, group = item / blocks;
        const int64_t from = begin + to, n = count - to < kTile ? count - to : kTile;
        if (group < m.groups)
          m.fill(&scratch[0], group, to, n, [&](int64_t c, float* out_at, int64_t place) {
            transform_output_grad<kMode>(out_at, place, grad_reader, dy, out, tiles, c, from,
                                         from + n);
          });
        else
          v.fill(
              &scratch[0], group - m.groups, to, n, [&](int64_t c, float* out_at, int64_t place) {
                transform_input<kMode>(out_at, place, reader, x, in, tiles, pad, c, from, from + n);
              });
      }
    });
    const int64_t columns = (row + kWide - 1) / kWide;
    parallel(kPlaces * columns, 1, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; item++) {
        const int64_t place = item / columns, i = item % columns * kWide, next = i + kLanes;
        const float* b = v.at(place, i / kGroup) + i % kGroup;
        for (int64_t o = 0; o < rows; o += kPanel) {
          float* to = &du[(place * rows + o) * row + i];
          const float* a = m.at(place, o / kGroup) + o % kGroup;
          if (next < row)
            register_tile<2, true>(to, row, kLanes, a, kGroup, b, kGroup,
                                   v.at(place, next / kGroup) + next % kGroup - b, count);
          else
            register_tile<1, true>(to, row, kLanes, a, kGroup, b, kGroup, 0, count);
        }
      }
    });
  }
  restore_weights<kMode>(dw, &du[0], out.C, in.C, rows, row);
}

}  // namespace

int conv3x3(int, const void* x, const void* w, void* y, int64_t N, int64_t I, int64_t H, int64_t W,
            int64_t O, int64_t out_h, int64_t out_w, int64_t w_out, int64_t w_in, int stride,
            bool transposed, int64_t pad_y, int64_t pad_x) {
  const Images in{N, I, H, W}, out{N, O, out_h, out_w};
  const Weights weights{static_cast<const float*>(w), w_out, w_in, transposed && stride == 1};
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(y);
  if (stride == 1)
    forward<kSame>(from, weights, to, in, out, {pad_y, pad_x});
  else if (transposed)
    forward<kUp>(from, weights, to, in, out, {1, 1});
  else
    forward<kDown>(from, weights, to, in, out, {0, 0});
  return 0;
}

int conv3x3_weight_gradient(int, const void* dy, const void* x, void* dw, int64_t N, int64_t O,
                            int64_t out_h, int64_t out_w, int64_t I, int64_t H, int64_t W,
                            int stride, int64_t pad_y, int64_t pad_x) {
  const Images out{N, O, out_h, out_w}, in{N, I, H, W};
  const auto* grad = static_cast<const float*>(dy);
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(dw);
  if (stride == 1)
    weight_gradient<kSame>(grad, from, to, out, in, {pad_y, pad_x});
  else
    weight_gradient<kDown>(grad, from, to, out, in, {0, 0});
  return 0;
}

}  // namespace gankern::cpu::GANKERN_ISA
