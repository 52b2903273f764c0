// Winograd's minimal filtering for 3x3 and 4x4 convolutions on the CPU (Lavin & Gray 2016,
// arXiv:1509.09308): the transforms of an axis, and the tiles of a batch.
//
// A tile of outputs is A (G w ⊙ B x), per axis: `kProducts` products of transformed weights and
// inputs, where the plain sum takes three an output. With two axes the products are matrix
// products over the channels, one for each of kProducts² places. The coefficients are 0, ±1 and
// 1/2, so that the result is as exact as the plain sum's.
#pragma once

#include "vec.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

// kSame: y[j] = Σ w[k] x[j + k - pad]. kDown: y[j] = Σ w[k] x[2 j + k].
// kUp: y[j] = Σ w[k] x[i] over 2 i + k = j, the adjoint of kDown.
// kDown4: y[j] = Σ w[k] x[2 j + k - 1], four taps; kUp4 its adjoint.
enum Mode : int { kSame, kDown, kUp, kDown4, kUp4 };

// kIn inputs, kInStep apart from tile to tile, give kOut outputs.
template <int kMode>
struct Axis;

template <>
struct Axis<kSame> {  // F(2, 3)
  static constexpr int kTaps = 3, kIn = 4, kInStep = 2, kProducts = 4, kOut = 2;
  template <typename V>
  GK_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
  GK_INLINE static void weight(const float* w, float* u) {
    u[0] = w[0], u[1] = (w[0] + w[1] + w[2]) * 0.5f, u[2] = (w[0] - w[1] + w[2]) * 0.5f;
    u[3] = w[2];
  }
  template <typename V>
  GK_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  template <typename V>  // the adjoint of output
  GK_INLINE static void output_grad(const V* g, V* m) {
    m[0] = g[0], m[1] = g[0] + g[1], m[2] = g[0] - g[1], m[3] = -g[1];
  }
  template <typename V>  // the adjoint of weight
  GK_INLINE static void weight_grad(const V* u, V* w) {
    const V half = (u[1] + u[2]) * 0.5f;
    w[0] = u[0] + half, w[1] = (u[1] - u[2]) * 0.5f, w[2] = half + u[3];
  }
};

template <>
struct Axis<kDown> {  // the even taps are F(2, 2), the odd tap is plain
  static constexpr int kTaps = 3, kIn = 5, kInStep = 4, kProducts = 5, kOut = 2;
  template <typename V>
  GK_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[2], v[1] = d[2], v[2] = d[4] - d[2], v[3] = d[1], v[4] = d[3];
  }
  GK_INLINE static void weight(const float* w, float* u) {
    u[0] = w[0], u[1] = w[0] + w[2], u[2] = w[2], u[3] = w[1], u[4] = w[1];
  }
  template <typename V>
  GK_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[3], y[1] = m[1] + m[2] + m[4];
  }
  template <typename V>
  GK_INLINE static void output_grad(const V* g, V* m) {
    m[0] = g[0], m[1] = g[0] + g[1], m[2] = g[1], m[3] = g[0], m[4] = g[1];
  }
  template <typename V>
  GK_INLINE static void weight_grad(const V* u, V* w) {
    w[0] = u[0] + u[1], w[1] = u[3] + u[4], w[2] = u[1] + u[2];
  }
};

template <>
struct Axis<kUp> {  // likewise; a tile starts one input before its first
  static constexpr int kTaps = 3, kIn = 3, kInStep = 2, kProducts = 5, kOut = 4;
  template <typename V>
  GK_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[1], v[1] = d[1], v[2] = d[2] - d[1], v[3] = d[1], v[4] = d[2];
  }
  GK_INLINE static void weight(const float* w, float* u) {
    u[0] = w[2], u[1] = w[0] + w[2], u[2] = w[0], u[3] = w[1], u[4] = w[1];
  }
  template <typename V>
  GK_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + m[1], y[1] = m[3], y[2] = m[1] + m[2], y[3] = m[4];
  }
};

template <>
struct Axis<kDown4> {  // even and odd taps are F(2, 2) each
  static constexpr int kTaps = 4, kIn = 6, kInStep = 4, kProducts = 6, kOut = 2;
  template <typename V>
  GK_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[2], v[1] = d[2], v[2] = d[4] - d[2];
    v[3] = d[1] - d[3], v[4] = d[3], v[5] = d[5] - d[3];
  }
  GK_INLINE static void weight(const float* w, float* u) {
    u[0] = w[0], u[1] = w[0] + w[2], u[2] = w[2], u[3] = w[1], u[4] = w[1] + w[3], u[5] = w[3];
  }
  template <typename V>
  GK_INLINE static void output(const V* m, V* y) {
    const V middle = m[1] + m[4];
    y[0] = m[0] + m[3] + middle, y[1] = m[2] + m[5] + middle;
  }
  template <typename V>
  GK_INLINE static void output_grad(const V* g, V* m) {
    m[0] = m[3] = g[0], m[1] = m[4] = g[0] + g[1], m[2] = m[5] = g[1];
  }
  template <typename V>
  GK_INLINE static void weight_grad(const V* u, V* w) {
    w[0] = u[0] + u[1], w[1] = u[3] + u[4], w[2] = u[1] + u[2], w[3] = u[4] + u[5];
  }
};

template <>
struct Axis<kUp4> {  // likewise for odd and even outputs; a tile starts one input before its first
  static constexpr int kTaps = 4, kIn = 4, kInStep = 2, kProducts = 6, kOut = 4;
  template <typename V>
  GK_INLINE static void input(const V* d, V* v) {
    v[0] = d[0] - d[1], v[1] = d[1], v[2] = d[2] - d[1];
    v[3] = d[1] - d[2], v[4] = d[2], v[5] = d[3] - d[2];
  }
  GK_INLINE static void weight(const float* w, float* u) {
    u[0] = w[3], u[1] = w[1] + w[3], u[2] = w[1], u[3] = w[2], u[4] = w[0] + w[2], u[5] = w[0];
  }
  template <typename V>
  GK_INLINE static void output(const V* m, V* y) {
    y[0] = m[0] + m[1], y[1] = m[3] + m[4], y[2] = m[1] + m[2], y[3] = m[4] + m[5];
  }
};

// Images, and if there are some the factors [N, C] that they are read with.
struct Images {
  int64_t N, C, H, W;
  const float* factors = nullptr;
};
// NCHW images cut into tiles, and the tiles' inputs or outputs along an axis.
struct Tiles {
  int64_t rows, columns, count;  // rows and columns of one image; count of the batch
  Tiles(int64_t N, int64_t out_h, int64_t out_w, int per_tile)
      : rows((out_h + per_tile - 1) / per_tile),
        columns((out_w + per_tile - 1) / per_tile),
        count(N * rows * columns) {}
};

// f(n, row, first, end, at) for each run of tiles [first, end) in a tile row of an image among the
// tiles [begin, stop) of the batch; `at` is the run's place behind `begin`.
template <typename F>
GK_INLINE void each_run(const Tiles& t, int64_t begin, int64_t stop, const F& f) {
  for (int64_t i = begin; i < stop;) {
    const int64_t row = i / t.columns, first = i % t.columns;
    const int64_t left = t.columns - first, n = stop - i < left ? stop - i : left;
    f(row / t.rows, row % t.rows, first, first + n, i - begin);
    i += n;
  }
}

// in[j * kStep + k] for kLanes values of j, k < kTaps; kStep is 1, 2 or 4.
template <int kStep, int kTaps>
GK_INLINE void gather(const float* in, vf* d) {
  if constexpr (kStep == 1) {
    for (int k = 0; k < kTaps; k++) d[k] = load(in + k);
  } else {
    // The elements from `at` on, every kStep-th.
    const auto strided = [&](int at, vf& a, vf& b) {
      vf even[2], odd[2];
      unzip(load(in + at), load(in + at + kLanes), even[0], odd[0]);
      if constexpr (kStep == 4) {
        unzip(load(in + at + 2 * kLanes), load(in + at + 3 * kLanes), even[1], odd[1]);
        vf rest;
        unzip(even[0], even[1], a, rest);
        unzip(odd[0], odd[1], b, rest);
      } else {
        a = even[0], b = odd[0];
      }
    };
    vf unused;
    for (int k = 0; k + 1 < kTaps; k += 2) strided(k, d[k], d[k + 1]);
    if constexpr (kTaps % 2) strided(kTaps - 1, d[kTaps - 1], unused);
  }
}

// kOut = 2 or 4 vectors y[c] as y[j * kOut + c].
template <int kOut>
GK_INLINE void scatter(float* out, const vf* y) {
  vf a[4];
  if constexpr (kOut == 2) {
    zip(y[0], y[1], a[0], a[1]);
  } else {
    vf even[2], odd[2];
    zip(y[0], y[2], even[0], even[1]);
    zip(y[1], y[3], odd[0], odd[1]);
    zip(even[0], odd[0], a[0], a[1]);
    zip(even[1], odd[1], a[2], a[3]);
  }
  for (int i = 0; i < kOut; i++) store(out + i * kLanes, a[i]);
}

// A run of tiles of one plane, kTaps samples a side each, `kStep` samples from tile to tile from
// sample `first` of row `row` on (zeros outside): f(j, d) with d[kTaps][kTaps] vectors of tiles j
// and on, after `rows` has turned each column of kTaps rows into kRows.
template <int kTaps, int kStep, int kRows>
class Reader {
 public:
  Reader() : lines_(kRows * stride(kMost)) {}

  template <typename R, typename F>
  GK_INLINE void run(const float* plane, int64_t H, int64_t W, int64_t row, int64_t first,
                     int64_t tiles, const R& rows, const F& f) {
    const int64_t width = (tiles - 1) * kStep + kTaps, pitch = stride(tiles);
    const int64_t begin = first < 0 ? -first : 0;
    const int64_t end = W - first < width ? W - first : width;
    const float* from[kTaps];
    for (int k = 0; k < kTaps; k++)
      from[k] = row + k >= 0 && row + k < H ? plane + (row + k) * W + first : nullptr;
    for (int r = 0; r < kRows; r++)
      memset(&lines_[r * pitch], 0, static_cast<size_t>(pitch) * sizeof(float));
    for (int64_t i = begin; i < end; i += kLanes) {
      vf d[kTaps], v[kRows];
      for (int k = 0; k < kTaps; k++)
        d[k] = !from[k]            ? vf{}
               : end - i >= kLanes ? load(from[k] + i)
                                   : load_part(from[k] + i, end - i);
      rows(d, v);
      for (int r = 0; r < kRows; r++) store(&lines_[r * pitch + i], v[r]);
    }
    for (int64_t j = 0; j < tiles; j += kLanes) {
      vf d[kRows][kTaps];
      for (int r = 0; r < kRows; r++) gather<kStep, kTaps>(&lines_[r * pitch + j * kStep], d[r]);
      f(j, d);
    }
  }

  static constexpr int64_t kMost = 64;  // tiles of a run

 private:
  static int64_t stride(int64_t tiles) { return (tiles + kLanes) * kStep + 3 * kLanes; }
  Buffer<float> lines_;
};

// --- Matrix products.

#if defined(__AVX512F__)
constexpr int kPanel = 8, kTall = 8;  // rows of a register tile; kTall: where any number will do
#else
constexpr int kPanel = 4, kTall = 6;  // with two columns, 12 of 16 registers
#endif

// c[r][j] (+)= Σ_k a[r * a_row + k * a_step] * b[k * b_step + j], r < kRows, for kCols vectors of
// j, the vectors b_col and c_col apart.
template <int kRows, int kCols, bool kAdd>
GK_INLINE void register_tile(float* c, int64_t c_row, int64_t c_col, const float* a, int64_t a_row,
                             int64_t a_step, const float* b, int64_t b_step, int64_t b_col,
                             int64_t count) {
  vf sum[kRows][kCols] = {};
  for (int64_t k = 0; k < count; k++) {
    vf v[kCols];
    for (int j = 0; j < kCols; j++) v[j] = load(b + k * b_step + j * b_col);
    for (int r = 0; r < kRows; r++)
      for (int j = 0; j < kCols; j++) sum[r][j] += v[j] * a[r * a_row + k * a_step];
  }
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kCols; j++) {
      float* at = c + r * c_row + j * c_col;
      store(at, kAdd ? load(at) + sum[r][j] : sum[r][j]);
    }
}

}  // namespace
}  // namespace gankern::cpu::GANKERN_ISA
