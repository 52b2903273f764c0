// 4x4 convolutions of stride 2 and padding 1 of few small images, in channels-last memory: plain
// sums over taps and channels, where minimal filtering would spend more on transforming the weights
// than it saves.
#include "convolution.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTaps = 16, kSome = 8 * kTall;  // pixels of a piece of work

// u[panel][tap][i][kWide]; channels beyond O are zero.
void pack(float* u, const Weights& w, int64_t O, int64_t I) {
  parallel((O + kWide - 1) / kWide, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
      for (int64_t i = 0; i < I; i++) {
        float taps[kTaps][kWide] = {};
        for (int64_t o = 0; o < kWide && panel * kWide + o < O; o++) {
          const float* from = w.data + (panel * kWide + o) * w.out_stride + i * w.in_stride;
          for (int64_t k = 0; k < kTaps; k++) taps[k][o] = from[k];
        }
        for (int64_t k = 0; k < kTaps; k++)
          memcpy(u + ((panel * kTaps + k) * I + i) * kWide, taps[k], sizeof taps[k]);
      }
  });
}

// Output pixels that meet the same taps: all of a convolution, every other row and column of a
// transposed one. Pixel t of [N, rows, columns] is at (step * row + y, step * column + x).
struct Phase {
  int64_t y, x, step, rows, columns, count;
  Phase(int64_t y, int64_t x, bool transposed, const Images& out)
      : y(y),
        x(x),
        step(transposed ? 2 : 1),
        rows((out.H - y + step - 1) / step),
        columns((out.W - x + step - 1) / step),
        count(out.N * rows * columns) {}
  // Whether output coordinate `at` meets a sample with tap k; which one.
  bool meets(int64_t at, int64_t k) const { return step == 1 || (at + 1 - k) % 2 == 0; }
  int64_t sample(int64_t at, int64_t k) const {
    return step == 1 ? 2 * at + k - 1 : (at + 1 - k) / 2;
  }
};

// kWide outputs of pixels [begin, stop), kTall at a time. Each tap's channels are summed apart: one
// sum of all 16 I products would round four times as much.
void sum_up(float* y, const float* x, const float* u, const float* zeros, const Images& in,
            const Images& out, const Phase& p, int64_t o, int64_t begin, int64_t stop) {
  for (int64_t t = begin; t < stop; t += kTall) {
    int64_t n[kTall], row[kTall], column[kTall];
    for (int64_t r = 0; r < kTall; r++) {
      const int64_t at = t + r < stop ? t + r : stop - 1;
      column[r] = p.step * (at % p.columns) + p.x;
      row[r] = p.step * (at / p.columns % p.rows) + p.y;
      n[r] = at / (p.columns * p.rows);
    }
    vf sum[kTall][2] = {};
    for (int64_t ky = 0; ky < 4; ky++)
      for (int64_t kx = 0; kx < 4; kx++) {
        if (!p.meets(p.y, ky) || !p.meets(p.x, kx)) continue;
        const float* from[kTall];
        for (int64_t r = 0; r < kTall; r++) {
          const int64_t i = p.sample(row[r], ky), j = p.sample(column[r], kx);
          const bool inside = i >= 0 && i < in.H && j >= 0 && j < in.W;
          from[r] = inside ? x + ((n[r] * in.H + i) * in.W + j) * in.C : zeros;
        }
        const float* w = u + (ky * 4 + kx) * in.C * kWide;
        vf part[kTall][2] = {};
        for (int64_t c = 0; c < in.C; c++, w += kWide) {
          const vf a = load(w), b = load(w + kLanes);
          for (int64_t r = 0; r < kTall; r++) {
            part[r][0] += a * from[r][c];
            part[r][1] += b * from[r][c];
          }
        }
        for (int64_t r = 0; r < kTall; r++)
          for (int64_t j = 0; j < 2; j++) sum[r][j] += part[r][j];
      }
    for (int64_t r = 0; r < kTall && t + r < stop; r++) {
      float* to = y + ((n[r] * out.H + row[r]) * out.W + column[r]) * out.C + o;
      for (int64_t j = 0; j < 2; j++) {
        const int64_t left = out.C - o - j * kLanes;
        if (left >= kLanes)
          store(to + j * kLanes, sum[r][j]);
        else if (left > 0)
          store_part(to + j * kLanes, sum[r][j], left);
      }
    }
  }
}

// --- The weight gradient: dw[o][i][tap] = Σ over pixels t of the lower resolution of
// m[t][o] v[the sample that t meets with tap][i].

constexpr int64_t kPixels = 256;  // that are read before their products are added up

// to[t][kWide]: channels [c, c + kWide) of the samples that pixels [begin, stop) meet with a tap.
void gather(float* to, const float* v, const Images& in, const Images& out, int64_t ky, int64_t kx,
            int64_t c, int64_t begin, int64_t stop) {
  const Phase p(0, 0, false, out);
  const int64_t left = in.C - c < kWide ? in.C - c : kWide;
  for (int64_t t = begin; t < stop; t++, to += kWide) {
    const int64_t i = p.sample(t / p.columns % p.rows, ky), j = p.sample(t % p.columns, kx);
    const bool inside = i >= 0 && i < in.H && j >= 0 && j < in.W;
    if (!inside || left < kWide) memset(to, 0, kWide * sizeof(float));
    if (!inside) continue;
    const float* from = v + ((t / (p.columns * p.rows) * in.H + i) * in.W + j) * in.C + c;
    if (left == kWide)
      memcpy(to, from, kWide * sizeof(float));
    else
      memcpy(to, from, static_cast<size_t>(left) * sizeof(float));
  }
}

void weight_gradient(float* dw, const float* m, const float* v, const Images& out,
                     const Images& in) {
  const int64_t count = out.N * out.H * out.W, groups = (out.C + kTall - 1) / kTall;
  const int64_t panels = (in.C + kWide - 1) / kWide, parts = (groups + 10) / 11;
  Buffer<float> a(groups * count * kTall);  // [group][t][kTall]
  parallel(groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++)
      for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < kTall; r++) {
          const int64_t o = g * kTall + r;
          a[(g * count + t) * kTall + r] = o < out.C ? m[t * out.C + o] : 0.f;
        }
  });
  parallel(panels * parts, 1, [&](int64_t first, int64_t last) {
    Buffer<float> b(kTaps * kPixels * kWide), sums(kTall * kTaps * kWide);
    for (int64_t item = first; item < last; item++) {
      const int64_t c = item / parts * kWide, part = item % parts;
      const int64_t width = in.C - c < kWide ? in.C - c : kWide;
      for (int64_t t = 0; t < count; t += kPixels) {
        const int64_t stop = t + kPixels < count ? t + kPixels : count;
        for (int64_t k = 0; k < kTaps; k++)
          gather(&b[k * kPixels * kWide], v, in, out, k / 4, k % 4, c, t, stop);
        for (int64_t g = part * groups / parts; g < (part + 1) * groups / parts; g++) {
          for (int64_t k = 0; k < kTaps; k++)
            register_tile<kTall, 2, false>(&sums[k * kWide], kTaps * kWide, kLanes,
                                           &a[(g * count + t) * kTall], 1, kTall,
                                           &b[k * kPixels * kWide], kWide, kLanes, stop - t);
          for (int64_t r = 0; r < kTall && g * kTall + r < out.C; r++)
            for (int64_t i = 0; i < width; i++) {
              float* to = dw + ((g * kTall + r) * in.C + c + i) * kTaps;
              for (int64_t k = 0; k < kTaps; k++) {
                const float sum = sums[(r * kTaps + k) * kWide + i];
                to[k] = t == 0 ? sum : to[k] + sum;
              }
            }
        }
      }
    }
  });
}

}  // namespace

int convolution_few(int, const void* x, const void* w, void* y, int64_t N, int64_t I, int64_t H,
                    int64_t W, int64_t O, int64_t out_h, int64_t out_w, int64_t w_out, int64_t w_in,
                    bool transposed) {
  const Images in{N, I, H, W}, out{N, O, out_h, out_w};
  const int64_t panels = (O + kWide - 1) / kWide, panel = kTaps * I * kWide;
  Buffer<float> u(panels * panel), zeros(I);
  for (int64_t i = 0; i < I; i++) zeros[i] = 0;
  pack(&u[0], {static_cast<const float*>(w), w_out, w_in, false}, O, I);
  // A panel's weights stay in the cache while a thread goes through its pixels.
  for (int64_t y0 = 0; y0 < (transposed ? 2 : 1); y0++)
    for (int64_t x0 = 0; x0 < (transposed ? 2 : 1); x0++) {
      const Phase p(y0, x0, transposed, out);
      const int64_t parts = (p.count + kSome - 1) / kSome;
      parallel(panels * parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t item = first; item < last; item++) {
          const int64_t o = item / parts, begin = item % parts * kSome;
          const int64_t stop = begin + kSome < p.count ? begin + kSome : p.count;
          sum_up(static_cast<float*>(y), static_cast<const float*>(x), &u[o * panel], &zeros[0], in,
                 out, p, o * kWide, begin, stop);
        }
      });
    }
  return 0;
}

int convolution_few_weight_gradient(int, const void* dy, const void* x, void* dw, int64_t N,
                                    int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H,
                                    int64_t W) {
  weight_gradient(static_cast<float*>(dw), static_cast<const float*>(dy),
                  static_cast<const float*>(x), {N, O, out_h, out_w}, {N, I, H, W});
  return 0;
}

}  // namespace gankern::cpu::GANKERN_ISA
