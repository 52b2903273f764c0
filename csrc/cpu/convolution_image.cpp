// 4x4 convolutions of stride 2 and padding 1 between images of few channels and channels-last
// memory of many: a matrix product of 4x4 patches, which a copy of the images with zeros around it
// holds as four runs each.
#include "convolution.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kTaps = 16;
// Rows of the smaller grid that a thread takes at once: to it, and from it, where bands overlap.
constexpr int64_t kRowsDown = 4, kRowsUp = 16;

// Images [N, H, W, C] with a pixel of zeros above and to the left, as [2 rows + 2][2 columns + 2]
// of the smaller grid take them; places of C numbers, or planes.
struct Patches {
  Images in;
  int64_t rows, columns, run, pitch;  // run: of a patch's row; pitch: of the copy's
  bool planes;
  Patches(const Images& in, const Images& small, bool planes)
      : in(in),
        rows(2 * small.H + 2),
        columns(2 * small.W + 2),
        run(4 * in.C),
        pitch(columns * in.C),
        planes(planes) {}
  int64_t count() const { return 4 * run; }  // of numbers in a patch

  // Calls f(number of the images, place in `copy`) for rows [begin, end) of the copy of sample n
  // that lie in the images.
  template <typename F>
  void each(int64_t n, int64_t begin, int64_t end, const F& f) const {
    const int64_t width = columns - 1 < in.W ? columns - 1 : in.W;
    const int64_t step = planes ? 1 : in.C, apart = planes ? in.H * in.W : 1;
    for (int64_t row = begin < 1 ? 1 : begin; row < end && row <= in.H; row++)
      for (int64_t c = 0; c < in.C; c++) {
        int64_t at = n * in.C * in.H * in.W + (row - 1) * in.W * step + c * apart;
        int64_t place = (row - begin) * pitch + in.C + c;
        for (int64_t column = 0; column < width; column++, at += step, place += in.C) f(at, place);
      }
  }
  void copy(float* to, const float* x, int64_t n, int64_t begin, int64_t end) const {
    memset(to, 0, static_cast<size_t>((end - begin) * pitch) * sizeof(float));
    each(n, begin, end, [&](int64_t at, int64_t place) { to[place] = x[at]; });
  }
};

// f(c, place of (c, ky, kx) in a patch, tap) for all taps of c channels.
template <typename F>
void each_tap(int64_t C, const F& f) {
  for (int64_t c = 0; c < C; c++)
    for (int64_t k = 0; k < kTaps; k++) f(c, k * C + c, k);
}

// f(n, first, last) for bands of at most `size` rows of N grids of H rows.
template <typename F>
void each_band(int64_t N, int64_t H, int64_t size, const F& f) {
  const int64_t bands = (H + size - 1) / size;
  parallel(N * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t first = item % bands * size;
      f(item / bands, first, first + size < H ? first + size : H);
    }
  });
}

// kWide outputs of a row, kTall at a time.
void sum_up(float* y, const float* x, const float* u, const Patches& p, const Images& out,
            int64_t o) {
  for (int64_t t = 0; t < out.W; t += kTall) {
    const float* from[kTall];
    for (int64_t r = 0; r < kTall; r++)
      from[r] = x + 2 * (t + r < out.W ? t + r : out.W - 1) * p.in.C;
    vf sum[kTall][2] = {};
    const float* w = u;
    for (int64_t ky = 0; ky < 4; ky++)
      for (int64_t k = ky * p.pitch; k < ky * p.pitch + p.run; k++, w += kWide) {
        const vf a = load(w), b = load(w + kLanes);
        for (int64_t r = 0; r < kTall; r++) {
          sum[r][0] += a * from[r][k];
          sum[r][1] += b * from[r][k];
        }
      }
    for (int64_t r = 0; r < kTall && t + r < out.W; r++)
      for (int64_t j = 0; j < 2; j++) {
        const int64_t left = out.C - o - j * kLanes;
        float* to = y + (t + r) * out.C + o + j * kLanes;
        if (left >= kLanes)
          store(to, sum[r][j]);
        else if (left > 0)
          store_part(to, sum[r][j], left);
      }
  }
}

// Channels [o, o + kWide) of `count` pixels [count][C], as [count][kWide]; zeros beyond C.
void take_panel(float* to, const float* from, int64_t count, int64_t C, int64_t o) {
  for (int64_t t = 0; t < count; t++)
    for (int64_t j = 0; j < 2; j++) {
      const int64_t at = o + j * kLanes, left = C - at;
      store(to + t * kWide + j * kLanes, left > 0 ? some(from + t * C + at, left) : vf{});
    }
}

// sums[r][kWide] += Σ over the pixels of `rows` rows of dy[rows][columns][kWide] and the numbers
// `at[r]` of their patches.
void sum_products(float* sums, const float* dy, const float* x, const int64_t* at, const Patches& p,
                  int64_t rows, int64_t columns) {
  vf sum[kTall][2] = {};
  for (int64_t row = 0; row < rows; row++) {
    const float* from[kTall];
    for (int64_t r = 0; r < kTall; r++) from[r] = x + 2 * row * p.pitch + at[r];
    for (int64_t k = 0; k < 2 * columns * p.in.C; k += 2 * p.in.C, dy += kWide) {
      const vf a = load(dy), b = load(dy + kLanes);
      for (int64_t r = 0; r < kTall; r++) {
        sum[r][0] += a * from[r][k];
        sum[r][1] += b * from[r][k];
      }
    }
  }
  for (int64_t r = 0; r < kTall; r++)
    for (int64_t j = 0; j < 2; j++) {
      float* to = sums + r * kWide + j * kLanes;
      store(to, load(to) + sum[r][j]);
    }
}

// Patches of `count` pixels [count][K] = x [count][I] u [I][K].
void products(float* patches, const float* x, const float* u, int64_t count, int64_t I, int64_t K) {
  const auto run = [&](auto rows, int64_t t) {
    constexpr int kRows = decltype(rows)::value;
    int64_t k = 0;
    for (; k + kWide <= K; k += kWide)
      register_tile<kRows, 2, false>(patches + t * K + k, K, kLanes, x + t * I, I, 1, u + k, K,
                                     kLanes, I);
    if (k < K)
      register_tile<kRows, 1, false>(patches + t * K + k, K, kLanes, x + t * I, I, 1, u + k, K,
                                     kLanes, I);
  };
  int64_t t = 0;
  for (; t + kTall <= count; t += kTall) run(Count<kTall>{}, t);
  for (; t < count; t++) run(Count<1>{}, t);
}

}  // namespace

int convolution_image(int, const void* x, const void* w, void* y, int64_t N, int64_t I, int64_t H,
                      int64_t W, int64_t O, int64_t out_h, int64_t out_w, int64_t w_out,
                      int64_t w_in, bool planes) {
  const Images out{N, O, out_h, out_w};
  const Patches p({N, I, H, W}, out, planes);
  const int64_t panels = (O + kWide - 1) / kWide, panel = p.count() * kWide;
  Buffer<float> u(panels * panel);  // [panel][place in a patch][kWide]
  memset(&u[0], 0, static_cast<size_t>(panels * panel) * sizeof(float));
  for (int64_t o = 0; o < O; o++)
    each_tap(I, [&](int64_t c, int64_t place, int64_t k) {
      u[o / kWide * panel + place * kWide + o % kWide] =
          static_cast<const float*>(w)[o * w_out + c * w_in + k];
    });
  each_band(N, out_h, kRowsDown, [&](int64_t n, int64_t first, int64_t last) {
    Buffer<float> copy((2 * kRowsDown + 2) * p.pitch);
    p.copy(&copy[0], static_cast<const float*>(x), n, 2 * first, 2 * last + 2);
    for (int64_t row = first; row < last; row++)
      for (int64_t o = 0; o < panels; o++)
        sum_up(static_cast<float*>(y) + (n * out_h + row) * out_w * O,
               &copy[2 * (row - first) * p.pitch], &u[o * panel], p, out, o * kWide);
  });
  return 0;
}

int convolution_image_transposed(int, const void* x, const void* w, void* y, int64_t N, int64_t I,
                                 int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
                                 int64_t w_out, int64_t w_in) {
  const Images in{N, I, H, W};
  const Patches p({N, O, out_h, out_w}, in, true);
  const int64_t K = p.count();
  Buffer<float> u(I * K);
  for (int64_t i = 0; i < I; i++)
    each_tap(O, [&](int64_t c, int64_t place, int64_t k) {
      u[i * K + place] = static_cast<const float*>(w)[i * w_in + c * w_out + k];
    });
  each_band(N, H, kRowsUp, [&](int64_t n, int64_t first, int64_t last) {
    // Rows of the grid that the band's rows of the image meet, those of the image from 2 begin on.
    const int64_t begin = first > 0 ? first - 1 : 0, end = last < H ? last + 1 : H;
    Buffer<float> patches(W * K), sums((2 * (end - begin) + 2) * p.pitch);
    memset(&sums[0], 0, static_cast<size_t>((2 * (end - begin) + 2) * p.pitch) * sizeof(float));
    for (int64_t row = begin; row < end; row++) {
      products(&patches[0], static_cast<const float*>(x) + (n * H + row) * W * I, &u[0], W, I, K);
      for (int64_t column = 0; column < W; column++)
        for (int64_t ky = 0; ky < 4; ky++) {
          float* to = &sums[(2 * (row - begin) + ky) * p.pitch + 2 * column * O];
          const float* from = &patches[column * K + ky * p.run];
          for (int64_t k = 0; k < p.run; k++) to[k] += from[k];
        }
    }
    const int64_t stop = last < H ? 2 * last + 1 : p.rows, start = first > 0 ? 2 * first + 1 : 0;
    p.each(n, start, stop, [&](int64_t at, int64_t place) {
      static_cast<float*>(y)[at] = sums[(start - 2 * begin) * p.pitch + place];
    });
  });
  return 0;
}

int convolution_image_weight_gradient(int, const void* dy, const void* x, void* dw, int64_t N,
                                      int64_t O, int64_t out_h, int64_t out_w, int64_t I, int64_t H,
                                      int64_t W, bool planes) {
  const Images out{N, O, out_h, out_w};
  const Patches p({N, I, H, W}, out, planes);
  const int64_t K = p.count(), sample = p.rows * p.pitch;
  Buffer<float> copy(N * sample);
  parallel(N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      p.copy(&copy[n * sample], static_cast<const float*>(x), n, 0, p.rows);
  });
  // A thread takes a panel of dy, some rows at a time that its first cache level holds, for kSome
  // numbers of the patches.
  constexpr int64_t kSome = 3 * kTall, kPixels = 128;
  const int64_t rows = out_w < kPixels ? kPixels / out_w : 1, parts = (K + kSome - 1) / kSome;
  parallel((O + kWide - 1) / kWide * parts, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> sums(kSome * kWide), panel(rows * out_w * kWide);
    for (int64_t item = begin; item < end; item++) {
      const int64_t o = item / parts * kWide, first = item % parts * kSome;
      int64_t at[kSome];
      for (int64_t i = 0; i < kSome; i++) {
        const int64_t k = first + i < K ? first + i : K - 1;
        at[i] = k / p.run * p.pitch + k % p.run;
      }
      memset(&sums[0], 0, kSome * kWide * sizeof(float));
      for (int64_t n = 0; n < N; n++)
        for (int64_t row = 0; row < out_h; row += rows) {
          const int64_t count = row + rows < out_h ? rows : out_h - row;
          take_panel(&panel[0], static_cast<const float*>(dy) + (n * out_h + row) * out_w * O,
                     count * out_w, O, o);
          const float* patches = &copy[n * sample + 2 * row * p.pitch];
          for (int64_t i = 0; i < kSome && first + i < K; i += kTall)
            sum_products(&sums[i * kWide], &panel[0], patches, at + i, p, count, out_w);
        }
      for (int64_t k = first; k < first + kSome && k < K; k++)
        for (int64_t j = 0; j < kWide && o + j < O; j++)
          static_cast<float*>(dw)[((o + j) * I + k % I) * kTaps + k / I] =
              sums[(k - first) * kWide + j];
    }
  });
  return 0;
}

}  // namespace gankern::cpu::GANKERN_ISA
