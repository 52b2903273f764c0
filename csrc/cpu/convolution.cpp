// 3x3 convolutions in float32 on the CPU, of stride 1 and 2 and transposed, by minimal filtering
// (winograd.h): 16 products for four outputs of stride 1 in place of 36, 25 in place of 36 with
// stride 2. And the gradient of their weights, likewise.
//
// Forward: a thread takes a block of tiles through all three stages, so that transformed inputs and
// products stay in its cache. Weight gradient: chunks of tiles are transformed by all threads, then
// multiplied by all, each with places and channels of its own. No sum depends on the threads.
#include "convolution.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

constexpr int64_t kRow = kTile + kLanes;  // what a block's tiles take: a vector may begin anywhere

// A block of tiles of all channels: v[place][channel][tile].
template <int kMode>
using InputReader = Reader<Axis<kMode>::kIn, Axis<kMode>::kInStep, Axis<kMode>::kProducts>;

float factor_of(const Images& im, int64_t n, int64_t c) {
  return im.factors ? im.factors[n * im.C + c] : 1.f;
}

// The transformed inputs of tiles [begin, stop) of channel c: to[place * place_stride + tile].
template <int kMode>
void transform_input(float* to, int64_t place_stride, InputReader<kMode>& reader, const float* x,
                     const Images& im, const Tiles& tiles, Padding pad, int64_t c, int64_t begin,
                     int64_t stop) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  each_run(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    const float factor = factor_of(im, n, c);
    reader.run(
        x + (n * im.C + c) * im.H * im.W, im.H, im.W, row * A::kInStep - pad.y,
        first * A::kInStep - pad.x, end - first,
        [factor](const vf* d, vf* v) {
          vf by[A::kIn];
          for (int k = 0; k < A::kIn; k++) by[k] = d[k] * factor;
          A::input(by, v);
        },
        [&](int64_t j, const vf(*d)[A::kIn]) {
          for (int p = 0; p < kP; p++) {
            vf v[kP];
            A::input(d[p], v);
            for (int q = 0; q < kP; q++) store(to + (p * kP + q) * place_stride + at + j, v[q]);
          }
        });
  });
}

// What becomes of `count` outputs in a row of channel c, from pixel `pixel` of sample n on.
struct Plain {
  GK_INLINE void operator()(float* to, const float* y, int64_t count, int64_t, int64_t, int64_t,
                            int64_t) const {
    memcpy(to, y, static_cast<size_t>(count) * sizeof(float));
  }
};

GK_INLINE void store_some(float* to, vf v, int64_t left) {
  if (left >= kLanes)
    store(to, v);
  else
    store_part(to, v, left);
}

template <bool kPwl>
struct Finished : Epilogue<kPwl> {
  using Epilogue<kPwl>::Epilogue;
  GK_INLINE void operator()(float* to, const float* y, int64_t count, int64_t, int64_t n, int64_t c,
                            int64_t pixel) const {
    const Finish& f = this->f;
    const float d = f.d ? f.d[n * this->C + c] : 1.f, b = f.b ? f.b[c] : 0.f;
    const float strength = f.strength ? f.strength[f.strength_n == 1 ? 0 : c] : 1.f;
    const float* noise = this->noise(n);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i;
      vf v = some(y + i, left) * d;
      if (noise) v += some(noise + pixel + i, left) * strength;
      store_some(to + i, (*this)(v + b), left);
    }
  }
  using Epilogue<kPwl>::operator();
};

struct Dotted {
  const Dots& dots;
  GK_INLINE void operator()(float* to, const float* y, int64_t count, int64_t block, int64_t n,
                            int64_t c, int64_t pixel) const {
    const float d = dots.f.d[n * dots.C + c];
    const float* x = dots.f.x + (n * dots.C + c) * dots.pixels + pixel;
    vf sum{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i;
      const vf v = some(y + i, left);
      sum += v * some(x + i, left);
      store_some(to + i, v * d, left);
    }
    *dots.at(block, n, c) += sum_lanes(sum);
  }
};

// The outputs of tiles [begin, stop) of channel o from products m[place * place_stride + tile].
template <int kMode, typename End>
void transform_output(float* y, const float* m, int64_t place_stride, float* lines,
                      const Images& im, const Tiles& tiles, int64_t o, int64_t block, int64_t begin,
                      int64_t stop, const End& end_of) {
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
    for (int r = 0; r < kOut && row * kOut + r < im.H; r++) {
      const int64_t pixel = (row * kOut + r) * im.W + first * kOut;
      end_of(y + (n * im.C + o) * im.H * im.W + pixel, lines + r * kPitch,
             width < left ? width : left, block, n, o, pixel);
    }
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
        float* to = m + o * kTall * kRow + t;
        const float *a = u + (o * I + i) * kTall, *b = v + t * I + i * kWide;
        if (i == 0)
          register_tile<kTall, 2, false>(to, kRow, kLanes, a, 1, kTall, b, kWide, kLanes, count);
        else
          register_tile<kTall, 2, true>(to, kRow, kLanes, a, 1, kTall, b, kWide, kLanes, count);
      }
  }
}

template <int kMode, typename End>
void forward(const float* x, const Weights& w, float* y, const Images& in, const Images& out,
             Padding pad, const End& end_of) {
  using A = Axis<kMode>;
  constexpr int kPlaces = A::kProducts * A::kProducts;
  const int64_t I = in.C, O = out.C, panels = (O + kTall - 1) / kTall;
  const Tiles tiles(in.N, out.H, out.W, A::kOut);
  const int64_t u_place = place_stride(panels * I * kTall);
  Buffer<float> u(kPlaces * u_place);
  transform_weights<kMode, kTall>(&u[0], w, O, I);
  const int64_t m_place = panels * kTall * kRow;
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
        multiply(&m[place * m_place], &u[place * u_place], &v[place * kTile * I], panels, I,
                 stop - begin);
      for (int64_t o = 0; o < O; o++)
        transform_output<kMode>(y, &m[o * kRow], m_place, &lines[0], out, tiles, o, block, begin,
                                stop, end_of);
    }
  });
}

template <int kMode>
void forward_dotted(const float* x, const Weights& w, float* y, const Images& in, const Images& out,
                    Padding pad, const Finish& finish) {
  const Tiles tiles(in.N, out.H, out.W, Axis<kMode>::kOut);
  const int64_t blocks = (tiles.count + kTile - 1) / kTile;
  const Dots dots(finish, out, blocks);
  forward<kMode>(x, w, y, in, out, pad, Dotted{dots});
  dots.add_up(in.N, tiles, blocks, [&](int64_t block) {
    return block * kTile < tiles.count ? block * kTile : tiles.count;
  });
}

// --- The weight gradient.

// to[t][c] from from[c][t], kGroup channels, whole vectors of t.
GK_INLINE void transpose_group(float* to, const float* from, int64_t from_row, int64_t n) {
  for (int64_t t = 0; t < n; t += kLanes) {
    vf v[kLanes];
    for (int i = 0; i < kLanes; i++) v[i] = load(from + i * from_row + t);
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
    for (int i = 0; i < kLanes; i++) store(to + (t + i) * kGroup, v[i]);
  }
}

// The transformed output gradients of tiles [begin, stop) of channel o.
template <int kMode>
void transform_output_grad(float* to, int64_t place_stride, Reader<2, 2, 2>& reader,
                           const float* dy, const Images& im, const Tiles& tiles, int64_t o,
                           int64_t begin, int64_t stop) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  each_run(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    const float factor = factor_of(im, n, o);
    reader.run(
        dy + (n * im.C + o) * im.H * im.W, im.H, im.W, row * 2, first * 2, end - first,
        [factor](const vf* d, vf* v) { v[0] = d[0] * factor, v[1] = d[1] * factor; },
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

template <int kMode>
struct Scratch {
  static constexpr int64_t kPlaces = Axis<kMode>::kProducts * Axis<kMode>::kProducts;
  InputReader<kMode> reader;
  Reader<2, 2, 2> grad_reader;
  Buffer<float> channels{kPlaces * kSpan * kRow};

  // Tiles of a span of a side, by transform(channel, out, place stride).
  template <typename Side, typename F>
  void fill(const Side& side, int64_t span, int64_t to, int64_t tiles, const F& transform) {
    for (int64_t c = 0; c < kSpan; c++) {
      float* out = &channels[c * kRow];
      if (span * kSpan + c < side.channels)
        transform(span * kSpan + c, out, kSpan * kRow);
      else
        for (int place = 0; place < kPlaces; place++)
          memset(out + place * kSpan * kRow, 0, kTile * sizeof(float));
    }
    for (int place = 0; place < kPlaces; place++)
      for (int64_t c = 0; c < kSpan; c += kGroup)
        transpose_group(side.at(place, (span * kSpan + c) / kGroup) + to * kGroup,
                        &channels[(place * kSpan + c) * kRow], kRow, tiles);
  }
};

template <int kMode>
void weight_gradient(const float* dy, const float* x, float* dw, const Images& out,
                     const Images& in, Padding pad) {
  weight_gradient<kMode, Scratch<kMode>>(
      dw, out, in,
      [&](auto& own, const auto& m, const Tiles& tiles, int64_t span, int64_t to, int64_t begin,
          int64_t stop) {
        own.fill(m, span, to, stop - begin, [&](int64_t c, float* at, int64_t place) {
          transform_output_grad<kMode>(at, place, own.grad_reader, dy, out, tiles, c, begin, stop);
        });
      },
      [&](auto& own, const auto& v, const Tiles& tiles, int64_t span, int64_t to, int64_t begin,
          int64_t stop) {
        own.fill(v, span, to, stop - begin, [&](int64_t c, float* at, int64_t place) {
          transform_input<kMode>(at, place, own.reader, x, in, tiles, pad, c, begin, stop);
        });
      });
}

}  // namespace

int convolution(int, const void* x, const void* factors, const void* w, void* y, int64_t N,
                int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
                int64_t w_out, int64_t w_in, int, int stride, bool transposed, int64_t pad_y,
                int64_t pad_x, const Finish* finish) {
  const Images in{N, I, H, W, static_cast<const float*>(factors)}, out{N, O, out_h, out_w};
  const Weights weights{static_cast<const float*>(w), w_out, w_in, transposed && stride == 1};
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(y);
  by_form(stride, transposed, {pad_y, pad_x}, [&](auto mode, Padding pad) {
    constexpr int kMode = decltype(mode)::value;
    if (!finish)
      forward<kMode>(from, weights, to, in, out, pad, Plain());
    else if (finish->x)
      forward_dotted<kMode>(from, weights, to, in, out, pad, *finish);
    else if constexpr (kMode != kUp)
      by_act(finish->act, [&](auto pwl) {
        const Finished<decltype(pwl)::value> end(*finish, out);
        forward<kMode>(from, weights, to, in, out, pad, end);
      });
  });
  return 0;
}

int convolution_weight_gradient(int, const void* dy, const void* dy_factors, const void* x,
                                const void* x_factors, void* dw, int64_t N, int64_t O,
                                int64_t out_h, int64_t out_w, int64_t I, int64_t H, int64_t W, int,
                                int stride, int64_t pad_y, int64_t pad_x) {
  const Images out{N, O, out_h, out_w, static_cast<const float*>(dy_factors)};
  const Images in{N, I, H, W, static_cast<const float*>(x_factors)};
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
