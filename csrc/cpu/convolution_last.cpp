// Convolutions in channels-last memory, of 4x4 taps too (stride 2, padding 1: 36 products for 64):
// vectors run along the channels, and nothing is rearranged.
#include "convolution.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

GK_INLINE int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// The samples that a tile meets, kSide a side; null outside of the image.
template <int kSide>
struct Window {
  const float* at[kSide][kSide];
  const float* factors;
  Window(const float* x, const Images& im, int64_t n, int64_t row, int64_t column) {
    for (int64_t r = 0; r < kSide; r++)
      for (int64_t c = 0; c < kSide; c++) {
        const bool inside = row + r >= 0 && row + r < im.H && column + c >= 0 && column + c < im.W;
        at[r][c] = inside ? x + ((n * im.H + row + r) * im.W + column + c) * im.C : nullptr;
      }
    factors = im.factors ? im.factors + n * im.C : nullptr;
  }
  GK_INLINE vf read(int r, int c, int64_t channel, int64_t left) const {
    return some(at[r][c], channel, left);
  }
  // What the samples of a channel are multiplied by.
  GK_INLINE vf factor(int64_t channel, int64_t left) const {
    return factors ? some(factors, channel, left) : vf{} + 1.f;
  }

 private:
  GK_INLINE static vf some(const float* p, int64_t channel, int64_t left) {
    return !p || left <= 0  ? vf{}
           : left >= kLanes ? load(p + channel)
                            : load_part(p + channel, left);
  }
};

// f(n, row, column, at) for each tile of the batch in [begin, stop), `at` counted from begin.
template <typename F>
GK_INLINE void each_tile(const Tiles& t, int64_t begin, int64_t stop, const F& f) {
  each_run(t, begin, stop, [&](int64_t n, int64_t row, int64_t first, int64_t end, int64_t at) {
    for (int64_t i = first; i < end; i++) f(n, row, i, at + i - first);
  });
}

// B x of channels [first, end) of the tiles [begin, stop): put(place, tile, channel, value).
template <int kMode, typename F>
GK_INLINE void transform_input(const float* x, const Images& im, const Tiles& tiles, Padding pad,
                               int64_t begin, int64_t stop, int64_t first, int64_t end,
                               const F& put) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kIn = A::kIn;
  each_tile(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t column, int64_t tile) {
    const Window<kIn> window(x, im, n, row * A::kInStep - pad.y, column * A::kInStep - pad.x);
    for (int64_t c = first; c < end; c += kLanes) {
      vf half[kP][kIn];
      const vf factor = window.factor(c, im.C - c);
      for (int j = 0; j < kIn; j++) {
        vf d[kIn], v[kP];
        for (int r = 0; r < kIn; r++) d[r] = window.read(r, j, c, im.C - c) * factor;
        A::input(d, v);
        for (int p = 0; p < kP; p++) half[p][j] = v[p];
      }
      for (int p = 0; p < kP; p++) {
        vf v[kP];
        A::input(half[p], v);
        for (int q = 0; q < kP; q++) put(p * kP + q, tile, c, v[q]);
      }
    }
  });
}

// A' dy, likewise.
template <int kMode, typename F>
GK_INLINE void transform_output_grad(const float* dy, const Images& im, const Tiles& tiles,
                                     int64_t begin, int64_t stop, int64_t first, int64_t end,
                                     const F& put) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts;
  each_tile(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t column, int64_t tile) {
    const Window<2> window(dy, im, n, row * 2, column * 2);
    for (int64_t c = first; c < end; c += kLanes) {
      vf half[2][kP];
      const vf factor = window.factor(c, im.C - c);
      for (int r = 0; r < 2; r++) {
        const vf g[2] = {window.read(r, 0, c, im.C - c) * factor,
                         window.read(r, 1, c, im.C - c) * factor};
        A::output_grad(g, half[r]);
      }
      for (int q = 0; q < kP; q++) {
        const vf g[2] = {half[0][q], half[1][q]};
        vf m[kP];
        A::output_grad(g, m);
        for (int p = 0; p < kP; p++) put(p * kP + q, tile, c, m[p]);
      }
    }
  });
}

// What becomes of kLanes channels' outputs of a tile.
struct Plain {
  struct Channels {
    GK_INLINE vf operator()(vf y, int64_t) { return y; }
    GK_INLINE void done() {}
  };
  GK_INLINE Channels at(int64_t, int64_t, int64_t, int64_t) const { return {}; }
};

template <bool kPwl>
struct Finished : Epilogue<kPwl> {
  using Epilogue<kPwl>::Epilogue;
  struct Channels {
    const Finished& all;
    vf d, strength, b;
    const float* noise;
    GK_INLINE vf operator()(vf y, int64_t pixel) {
      y = y * d;
      if (noise) y += noise[pixel] * strength;
      return all(y + b);
    }
    GK_INLINE void done() {}
  };
  GK_INLINE Channels at(int64_t, int64_t n, int64_t c, int64_t left) const {
    const Finish& f = this->f;
    const vf one = vf{} + 1.f;
    const vf strength = !f.strength         ? one
                        : f.strength_n == 1 ? vf{} + f.strength[0]
                                            : some(f.strength + c, left);
    return {*this, f.d ? some(f.d + n * this->C + c, left) : one, strength,
            f.b ? some(f.b + c, left) : vf{}, this->noise(n)};
  }
};

struct Dotted {
  struct Channels {
    const float* x;
    float* sums;
    vf d, sum;
    int64_t C, left;
    GK_INLINE vf operator()(vf y, int64_t pixel) {
      sum += y * some(x + pixel * C, left);
      return y * d;
    }
    GK_INLINE void done() { store(sums, load(sums) + sum); }
  };
  const Dots& dots;
  GK_INLINE Channels at(int64_t block, int64_t n, int64_t c, int64_t left) const {
    const Finish& f = dots.f;
    return {f.x + n * dots.pixels * dots.C + c,
            dots.at(block, n, c),
            some(f.d + n * dots.C + c, left),
            vf{},
            dots.C,
            left};
  }
};

// Channels [o, o + kWide) of the outputs of tiles [begin, stop) from products
// m[place][kBlock tiles][kWide].
template <int kMode, int64_t kBlock, typename End>
void transform_output(float* y, const float* m, int64_t o, const Images& im, const Tiles& tiles,
                      int64_t block, int64_t begin, int64_t stop, const End& end) {
  using A = Axis<kMode>;
  constexpr int kP = A::kProducts, kOut = A::kOut;
  each_tile(tiles, begin, stop, [&](int64_t n, int64_t row, int64_t column, int64_t tile) {
    for (int64_t j = 0; j < kWide && o + j < im.C; j += kLanes) {
      vf half[kOut][kP], all[kOut];
      for (int q = 0; q < kP; q++) {
        vf d[kP];
        for (int p = 0; p < kP; p++) d[p] = load(m + ((p * kP + q) * kBlock + tile) * kWide + j);
        A::output(d, all);
        for (int r = 0; r < kOut; r++) half[r][q] = all[r];
      }
      const int64_t left = im.C - o - j;
      auto channels = end.at(block, n, o + j, left);
      for (int r = 0; r < kOut && row * kOut + r < im.H; r++) {
        A::output(half[r], all);
        const int64_t pixel = (row * kOut + r) * im.W + column * kOut;
        float* to = y + (n * im.H * im.W + pixel) * im.C + o + j;
        for (int c = 0; c < kOut && column * kOut + c < im.W; c++, to += im.C) {
          const vf value = channels(all[c], pixel + c);
          if (left >= kLanes)
            store(to, value);
          else
            store_part(to, value, left);
        }
      }
      channels.done();
    }
  });
}

// One place's products m[tile][kWide] of v [tile][I] and u [I][kWide], kDepth channels after
// another.
void multiply(float* m, const float* v, const float* u, int64_t tiles, int64_t v_row, int64_t I) {
  for (int64_t i = 0; i < I; i += kDepth) {
    const int64_t count = I - i < kDepth ? I - i : kDepth;
    for (int64_t t = 0; t < tiles; t += kTall) {
      float* to = m + t * kWide;
      const float *a = v + t * v_row + i, *b = u + i * kWide;
      if (i == 0)
        register_tile<kTall, 2, false>(to, kWide, kLanes, a, v_row, 1, b, kWide, kLanes, count);
      else
        register_tile<kTall, 2, true>(to, kWide, kLanes, a, v_row, 1, b, kWide, kLanes, count);
    }
  }
}

// Blocks of whole register tiles, an even number of them: as long as each other.
template <int kMode>
struct Blocks {
  static constexpr int64_t kPlaces = Axis<kMode>::kProducts * Axis<kMode>::kProducts;
  static constexpr int64_t kMost = kPlaces > 16 ? 24 : 48;  // tiles
  int64_t tiles, count;
  explicit Blocks(int64_t tiles) : tiles(tiles), count(whole((tiles + kMost - 1) / kMost, 2)) {}
  int64_t begin(int64_t block) const {
    const int64_t at = block * ((tiles + kTall - 1) / kTall) / count * kTall;
    return at < tiles ? at : tiles;
  }
};

// A thread takes a block of tiles through all stages: its transformed inputs stay in the second
// level of its cache, as do the products of kWide channels out, which are turned back at once.
template <int kMode, typename End>
void forward(const float* x, const Weights& w, float* y, const Images& in, const Images& out,
             Padding pad, const End& end) {
  constexpr int64_t kPlaces = Blocks<kMode>::kPlaces, kBlock = Blocks<kMode>::kMost;
  const int64_t I = in.C, v_row = whole(I, kLanes) + kLanes, m_row = whole(out.C, kWide);
  const Tiles tiles(in.N, out.H, out.W, Axis<kMode>::kOut);
  const int64_t u_place = place_stride(I * m_row);
  Buffer<float> u(kPlaces * u_place);
  transform_weights<kMode, kWide>(&u[0], w, out.C, I);
  const Blocks<kMode> blocks(tiles.count);
  parallel(blocks.count, 1, [&](int64_t first, int64_t last) {
    Buffer<float> v(kPlaces * kBlock * v_row), m(kPlaces * kBlock * kWide);
    for (int64_t block = first; block < last; block++) {
      const int64_t begin = blocks.begin(block), stop = blocks.begin(block + 1);
      transform_input<kMode>(x, in, tiles, pad, begin, stop, 0, I,
                             [&](int64_t place, int64_t tile, int64_t c, vf value) {
                               store(&v[(place * kBlock + tile) * v_row + c], value);
                             });
      for (int64_t o = 0; o < out.C; o += kWide) {
        for (int64_t place = 0; place < kPlaces; place++)
          multiply(&m[place * kBlock * kWide], &v[place * kBlock * v_row],
                   &u[place * u_place + o * I], stop - begin, v_row, I);
        transform_output<kMode, kBlock>(y, &m[0], o, out, tiles, block, begin, stop, end);
      }
    }
  });
}

template <int kMode>
void forward_dotted(const float* x, const Weights& w, float* y, const Images& in, const Images& out,
                    Padding pad, const Finish& finish) {
  const Tiles tiles(in.N, out.H, out.W, Axis<kMode>::kOut);
  const Blocks<kMode> blocks(tiles.count);
  const Dots dots(finish, out, blocks.count);
  forward<kMode>(x, w, y, in, out, pad, Dotted{dots});
  dots.add_up(in.N, tiles, blocks.count, [&](int64_t block) { return blocks.begin(block); });
}

struct NoScratch {};

template <int kMode>
void weight_gradient(const float* dy, const float* x, float* dw, const Images& out,
                     const Images& in, Padding pad) {
  const auto into = [](const auto& side, int64_t to) {
    return [&side, to](int64_t place, int64_t tile, int64_t c, vf value) {
      store(side.at(place, c / kGroup) + (to + tile) * kGroup, value);
    };
  };
  weight_gradient<kMode, NoScratch>(
      dw, out, in,
      [&](NoScratch&, const auto& m, const Tiles& tiles, int64_t span, int64_t to, int64_t begin,
          int64_t stop) {
        transform_output_grad<kMode>(dy, out, tiles, begin, stop, span * kSpan,
                                     span * kSpan + kSpan, into(m, to));
      },
      [&](NoScratch&, const auto& v, const Tiles& tiles, int64_t span, int64_t to, int64_t begin,
          int64_t stop) {
        transform_input<kMode>(x, in, tiles, pad, begin, stop, span * kSpan, span * kSpan + kSpan,
                               into(v, to));
      });
}

}  // namespace

int convolution_last(int, const void* x, const void* factors, const void* w, void* y, int64_t N,
                     int64_t I, int64_t H, int64_t W, int64_t O, int64_t out_h, int64_t out_w,
                     int64_t w_out, int64_t w_in, int taps, int stride, bool transposed,
                     int64_t pad_y, int64_t pad_x, const Finish* finish) {
  const Images in{N, I, H, W, static_cast<const float*>(factors)}, out{N, O, out_h, out_w};
  const Weights weights{static_cast<const float*>(w), w_out, w_in, transposed && stride == 1};
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(y);
  if (taps == 4 && transposed)
    forward<kUp4>(from, weights, to, in, out, {1, 1}, Plain());
  else if (taps == 4)
    forward<kDown4>(from, weights, to, in, out, {1, 1}, Plain());
  if (taps == 4) return 0;
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

int convolution_last_weight_gradient(int, const void* dy, const void* dy_factors, const void* x,
                                     const void* x_factors, void* dw, int64_t N, int64_t O,
                                     int64_t out_h, int64_t out_w, int64_t I, int64_t H, int64_t W,
                                     int taps, int stride, int64_t pad_y, int64_t pad_x) {
  const Images out{N, O, out_h, out_w, static_cast<const float*>(dy_factors)};
  const Images in{N, I, H, W, static_cast<const float*>(x_factors)};
  const auto* grad = static_cast<const float*>(dy);
  const auto* from = static_cast<const float*>(x);
  auto* to = static_cast<float*>(dw);
  if (taps == 4)
    weight_gradient<kDown4>(grad, from, to, out, in, {1, 1});
  else if (stride == 1)
    weight_gradient<kSame>(grad, from, to, out, in, {pad_y, pad_x});
  else
    weight_gradient<kDown>(grad, from, to, out, in, {0, 0});
  return 0;
}

}  // namespace gankern::cpu::GANKERN_ISA
