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
      for (int64_t i = 0; i < I; i++)
        for (int64_t o = 0; o < kWide; o += kLanes) {
          const int64_t at = panel * kWide + o;
          turn_taps(u + panel * kTaps * place_stride(I * kWide) + i * kWide + o,
                    place_stride(I * kWide), w.data + at * w.out_stride + i * w.in_stride,
                    w.out_stride, O - at);
        }
  });
}

// Output pixels that meet the same taps: all of a convolution, every other row and column of a
// transposed one. Pixel t of [rows, columns, N] is at (step * row + y, step * column + x): pixels
// in a row are those of several samples, which meet the edge of the image together.
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
      n[r] = at % out.N;
      column[r] = p.step * (at / out.N % p.columns) + p.x;
      row[r] = p.step * (at / (out.N * p.columns)) + p.y;
    }
    vf sum[kTall][2] = {};
    for (int64_t ky = 0; ky < 4; ky++)
      for (int64_t kx = 0; kx < 4; kx++) {
        if (!p.meets(p.y, ky) || !p.meets(p.x, kx)) continue;
        const float* from[kTall];
        bool any = false;
        for (int64_t r = 0; r < kTall; r++) {
          const int64_t i = p.sample(row[r], ky), j = p.sample(column[r], kx);
          const bool inside = i >= 0 && i < in.H && j >= 0 && j < in.W;
          from[r] = inside ? x + ((n[r] * in.H + i) * in.W + j) * in.C : zeros;
          any |= inside;
        }
        if (!any) continue;
        const float* w = u + (ky * 4 + kx) * place_stride(in.C * kWide);
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
// m[t][o] v[the sample that t meets with tap][i]. t runs over [rows, columns, N].

constexpr int64_t kPixels = 256;  // about, that are read before their products are added up

// The places of `size` whose samples with tap k are among `samples`.
struct Meeting {
  int64_t begin, end;
  Meeting(int64_t k, int64_t size, int64_t samples)
      : begin(k == 0), end((samples + 2 - k) / 2 < size ? (samples + 2 - k) / 2 : size) {}
};

// to[pixel][kWide]: channels [c, c + kWide) of the samples that rows [first, last) meet with a tap,
// those outside the image left out.
void gather(float* to, const float* v, const Images& in, int64_t ky, const Meeting& columns,
            int64_t kx, int64_t c, int64_t first, int64_t last) {
  const int64_t left = in.C - c < kWide ? in.C - c : kWide;
  for (int64_t row = first; row < last; row++)
    for (int64_t column = columns.begin; column < columns.end; column++) {
      const float* from = v + ((2 * row + ky - 1) * in.W + 2 * column + kx - 1) * in.C + c;
      for (int64_t n = 0; n < in.N; n++, to += kWide, from += in.H * in.W * in.C) {
        if (left == kWide) {
          memcpy(to, from, kWide * sizeof(float));
        } else {
          memset(to, 0, kWide * sizeof(float));
          memcpy(to, from, static_cast<size_t>(left) * sizeof(float));
        }
      }
    }
}

// sums[r][kWide] (rows kTaps apart) = Σ a[pixel][r] b[pixel]: `rows` runs of `run` pixels each,
// which lie one after another in b, and `apart` pixels from each other in a.
void sum_products(float* sums, const float* a, const float* b, int64_t rows, int64_t run,
                  int64_t apart) {
  vf sum[kTall][2] = {};
  for (int64_t row = 0; row < rows; row++, a += apart * kTall) {
    const float* p = a;
    for (int64_t t = 0; t < run; t++, p += kTall, b += kWide) {
      const vf v = load(b), w = load(b + kLanes);
      for (int64_t r = 0; r < kTall; r++) {
        sum[r][0] += v * p[r];
        sum[r][1] += w * p[r];
      }
    }
  }
  for (int64_t r = 0; r < kTall; r++)
    for (int64_t j = 0; j < 2; j++) store(sums + r * kTaps * kWide + j * kLanes, sum[r][j]);
}

void weight_gradient(float* dw, const float* m, const float* v, const Images& out,
                     const Images& in) {
  const int64_t width = out.W * out.N, count = out.H * width, pixels = out.H * out.W;
  const int64_t groups = (out.C + kTall - 1) / kTall, panels = (in.C + kWide - 1) / kWide;
  const int64_t parts = (groups + 10) / 11, step = width < kPixels ? kPixels / width : 1;
  Buffer<float> a(groups * count * kTall);  // [group][t][kTall]
  parallel(groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++)
      for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < kTall; r++) {
          const int64_t o = g * kTall + r, at = t % out.N * pixels + t / out.N;
          a[(g * count + t) * kTall + r] = o < out.C ? m[at * out.C + o] : 0.f;
        }
  });
  parallel(panels * parts, 1, [&](int64_t first, int64_t last) {
    Buffer<float> b(kTaps * step * width * kWide), sums(kTall * kTaps * kWide);
    for (int64_t item = first; item < last; item++) {
      const int64_t c = item / parts * kWide, part = item % parts;
      const int64_t left = in.C - c < kWide ? in.C - c : kWide;
      for (int64_t begin = 0; begin < out.H; begin += step) {
        // Of each tap, what it meets of rows [begin, begin + step).
        struct Met {
          int64_t first, rows, column, run;
          float* samples;
        } met[kTaps];
        for (int64_t k = 0; k < kTaps; k++) {
          const Meeting rows(k / 4, out.H, in.H), columns(k % 4, out.W, in.W);
          const int64_t from = begin < rows.begin ? rows.begin : begin;
          const int64_t stop = begin + step < rows.end ? begin + step : rows.end;
          met[k] = {from, stop - from, columns.begin, (columns.end - columns.begin) * out.N,
                    &b[k * step * width * kWide]};
          gather(met[k].samples, v, in, k / 4, columns, k % 4, c, from, stop);
        }
        for (int64_t g = part * groups / parts; g < (part + 1) * groups / parts; g++) {
          for (int64_t k = 0; k < kTaps; k++) {
            const Met& p = met[k];
            const int64_t t = p.first * width + p.column * out.N;
            sum_products(&sums[k * kWide], &a[(g * count + t) * kTall], p.samples, p.rows, p.run,
                         width);
          }
          for (int64_t r = 0; r < kTall && g * kTall + r < out.C; r++)
            for (int64_t i = 0; i < left; i += kLanes)
              for (int64_t k = 0; k < kTaps; k += kLanes) {
                vf taps[kLanes];
                for (int64_t j = 0; j < kLanes; j++)
                  taps[j] = load(&sums[(r * kTaps + k + j) * kWide + i]);
                transpose(taps);
                float* to = dw + ((g * kTall + r) * in.C + c + i) * kTaps + k;
                for (int64_t j = 0; j < kLanes && i + j < left; j++, to += kTaps)
                  store(to, begin == 0 ? taps[j] : load(to) + taps[j]);
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
  const int64_t panels = (O + kWide - 1) / kWide, panel = kTaps * place_stride(I * kWide);
  Buffer<float> u(panels * panel), zeros(I);
  for (int64_t i = 0; i < I; i++) zeros[i] = 0;
  pack(&u[0], {static_cast<const float*>(w), w_out, w_in, false}, O, I);
  // A panel's weights stay in the cache while a thread goes through the pixels of a phase.
  const int64_t phases = transposed ? 4 : 1;
  const int64_t parts = (Phase(0, 0, transposed, out).count + kSome - 1) / kSome;
  parallel(phases * panels * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t phase = item / (panels * parts), o = item / parts % panels;
      const Phase p(phase / 2, phase % 2, transposed, out);
      const int64_t begin = item % parts * kSome;
      const int64_t stop = begin + kSome < p.count ? begin + kSome : p.count;
      sum_up(static_cast<float*>(y), static_cast<const float*>(x), &u[o * panel], &zeros[0], in,
             out, p, o * kWide, begin, stop);
    }
  });
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
