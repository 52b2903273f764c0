// upfirdn2d: one kernel reads a tile of the input into shared memory and filters it there, or, in
// march, into registers.
//
// Polyphase: output o starts at sample first + (o / up) * down and meets every up-th tap, so no
// inserted zero is loaded or multiplied. Filters of 4 taps that are outer products are applied
// along x, then along y. The kernels, from the most special:
//   march: NCHW, 4 taps, factors 1 and 2, rows of whole vectors. A thread walks down the image.
//   lines: NCHW, 4 taps at one rate, other rows of the result. A block walks down, and copies the
//     next rows as they lie while it filters.
//   planes: NCHW, factors 1, 2, 4 and 2 to 12 taps compiled in. A thread makes 4 columns; columns
//     are kept split into phases, so that a warp reads and writes them without bank conflicts.
//     Separable filters of 8 and 12 taps take two passes through shared memory.
//   walk: channels-last, 4 taps, factors 1 and 2. A block walks down a strip for 128 bytes of
//     channels, and copies the next rows while it filters.
//   strips: channels-last, separable filters of more than 6 taps, in two passes.
//   pixels: channels-last, every other filter. A block has a tile of 32 bytes of channels.
//   any: every other filter, factor, layout and dtype.
#include "upfirdn2d_lines.cuh"
#include "upfirdn2d_march.cuh"
#include "upfirdn2d_pixels.cuh"
#include "upfirdn2d_planes.cuh"
#include "upfirdn2d_strips.cuh"
#include "upfirdn2d_walk.cuh"

namespace gankern {
namespace {

// any: a thread makes one output element at a time. Shared memory: filter, first samples and
// taps of the tile's columns and rows, the input tile [rows][columns][channels], and, if separable,
// the tile filtered along x [rows][tile_w][channels].
template <typename T>
__global__ void __launch_bounds__(256) upfirdn2d_any_kernel(Args p) {
  using S = Acc<T>;
  GK_DYNAMIC_SHARED(S, f);
  const Format<T> format(p.dtype);
  const int ch = 1 << p.log2_c, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int f_size = p.separable ? p.w.taps : p.h.taps * p.w.taps;
  S* tile = f + f_size;
  S* mid = tile + p.in_rows * p.pitch;
  int* first_x = reinterpret_cast<int*>(mid + (p.separable ? p.in_rows * p.tile_w * ch : 0));
  int* tap_x = first_x + p.tile_w;
  int* first_y = tap_x + p.tile_w;
  int* tap_y = first_y + p.tile_h;

  const int ox0 = static_cast<int>(blockIdx.x) % p.tiles_w * p.tile_w;
  const int oy0 = static_cast<int>(blockIdx.x) / p.tiles_w * p.tile_h;
  const int ix0 = first_sample(p.w, ox0), iy0 = first_sample(p.h, oy0);
  for (int i = threadIdx.x; i < f_size; i += blockDim.x)
    f[i] = p.separable ? filter_tap<S>(p, i) : filter_tap<S>(p, i / p.w.taps, i % p.w.taps);
  for (int i = threadIdx.x; i < p.tile_w; i += blockDim.x) {
    const int s = first_sample(p.w, ox0 + i);
    first_x[i] = (s - ix0) << p.log2_c;
    tap_x[i] = first_tap(p.w, ox0 + i, s);
  }
  for (int i = threadIdx.x; i < p.tile_h; i += blockDim.x) {
    const int s = first_sample(p.h, oy0 + i);
    first_y[i] = s - iy0;
    tap_y[i] = first_tap(p.h, oy0 + i, s);
  }
  const int width = p.tile_w << p.log2_c;
  const int rows = min(p.tile_h, p.h.out - oy0);

  for (int64_t part = blockIdx.y; part < p.images * p.chunks; part += gridDim.y) {
    const int64_t image = part / p.chunks;
    const int c0 = static_cast<int>(part % p.chunks) << p.log2_c;
    const T* x = static_cast<const T*>(p.x) + image * p.h.in * p.w.in * p.channels;
    T* y = static_cast<T*>(p.y) + image * p.h.out * p.w.out * p.channels;
    __syncthreads();
    for (int r = warp; r < p.in_rows; r += blockDim.x / 32) {
      const int iy = iy0 + r;
      const T* row = x + static_cast<int64_t>(iy) * p.w.in * p.channels;
      for (int e = lane; e < p.pitch; e += 32) {
        const int ix = ix0 + (e >> p.log2_c), c = c0 + (e & (ch - 1));
        const bool inside = iy >= 0 && iy < p.h.in && ix >= 0 && ix < p.w.in && c < p.channels;
        tile[r * p.pitch + e] =
            inside ? to_acc(row[static_cast<int64_t>(ix) * p.channels + c], format) : S(0);
      }
    }
    __syncthreads();
    if (p.separable) {
      for (int r = warp; r < p.in_rows; r += blockDim.x / 32)
        for (int e = lane; e < width; e += 32) {
          const S* in = tile + r * p.pitch + first_x[e >> p.log2_c] + (e & (ch - 1));
          S sum = S(0);
          for (int k = tap_x[e >> p.log2_c]; k < p.w.taps; k += p.w.up, in += ch) sum += f[k] * *in;
          mid[r * width + e] = sum;
        }
      __syncthreads();
    }
    for (int r = warp; r < rows; r += blockDim.x / 32)
      for (int e = lane; e < width; e += 32) {
        const int ox = ox0 + (e >> p.log2_c), c = c0 + (e & (ch - 1));
        if (ox >= p.w.out || c >= p.channels) continue;
        S sum = S(0);
        if (p.separable) {
          const S* in = mid + first_y[r] * width + e;
          for (int k = tap_y[r]; k < p.h.taps; k += p.h.up, in += width) sum += f[k] * *in;
        } else {
          const S* in = tile + first_y[r] * p.pitch + first_x[e >> p.log2_c] + (e & (ch - 1));
          for (int ky = tap_y[r]; ky < p.h.taps; ky += p.h.up, in += p.pitch) {
            const S* v = in;
            const S* w = f + ky * p.w.taps;
            for (int kx = tap_x[e >> p.log2_c]; kx < p.w.taps; kx += p.w.up, v += ch)
              sum += w[kx] * *v;
          }
        }
        y[(static_cast<int64_t>(oy0 + r) * p.w.out + ox) * p.channels + c] =
            from_acc<T>(sum * static_cast<S>(p.gain), format);
      }
  }
}

Args make_args(int dtype, const void* x, const void* f, void* y, bool last, int64_t N, int64_t C,
               const Axis& h, const Axis& w, bool separable, bool flip, double gain) {
  Args p{};
  p.x = x, p.f = f, p.y = y;
  p.h = h, p.w = w;
  p.images = last ? N : N * C;
  p.channels = last ? static_cast<int>(C) : 1;
  p.chunks = 1;
  p.dtype = dtype;
  p.separable = separable, p.flip = flip;
  p.gain = gain;
  return p;
}

template <typename T>
int launch_any(Args p, void* stream) {
  using S = Acc<T>;
  const int wanted_c = pow2_between(p.channels, 1, 32 / sizeof(T));  // a sector
  const int64_t blocks = sm_count();
  p.log2_c = log2_of(wanted_c);
  p.tile_w = pow2_between(p.w.out, 1, p.channels > 1 ? 16 : 64);
  p.tile_h = pow2_between(p.h.out, 1, 16);
  int64_t shared = 0;
  for (;;) {
    const int64_t ch = 1 << p.log2_c;
    p.chunks = static_cast<int>(ceil_div(p.channels, ch));
    p.tiles_w = static_cast<int>(ceil_div(p.w.out, p.tile_w));
    p.pitch = static_cast<int>(samples_for(p.w, p.tile_w) * ch);
    p.in_rows = samples_for(p.h, p.tile_h);
    const int64_t f = p.separable ? p.w.taps : p.w.taps * p.h.taps;
    const int64_t mid = p.separable ? p.tile_w * ch : 0;
    shared = (f + p.in_rows * (p.pitch + mid)) * static_cast<int64_t>(sizeof(S)) +
             8 * (p.tile_w + p.tile_h);
    const int64_t tiles = ceil_div(p.h.out, p.tile_h) * p.tiles_w * p.images * p.chunks;
    const bool small = p.tile_w * p.tile_h * ch <= 256;
    if (shared <= kSharedBytes && (small || tiles >= blocks)) break;
    if (p.tile_w == 1 && p.tile_h == 1 && p.log2_c == 0) break;
    if (p.tile_w > p.tile_h || (p.tile_h == 1 && p.tile_w > 1))
      p.tile_w /= 2;
    else if (p.tile_h > 1)
      p.tile_h /= 2;
    else
      p.log2_c--;
  }
  GK_LAUNCH((upfirdn2d_any_kernel<T>), grid_of(p), dim3(256), static_cast<int>(shared), stream, p);
  return static_cast<int>(cudaGetLastError());
}

// Separable filters of 7 taps and more.
template <typename T>
int by_strips(const Args& p, void* stream) {
  const bool square = p.w.taps == p.h.taps && p.w.up == p.h.up && p.w.down == p.h.down;
  const auto of_taps = [&](auto up, auto down) {
    constexpr int kUp = decltype(up)::value, kDown = decltype(down)::value;
    if (p.w.taps == 8) return launch_strips<T, kUp, kDown, 8>(p, stream);
    if (p.w.taps == 12) return launch_strips<T, kUp, kDown, 12>(p, stream);
    return launch_strips<T, 0, 0, 0>(p, stream);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  switch (square ? p.w.up * 10 + p.w.down : 0) {
    case 11:
      return of_taps(One{}, One{});
    case 21:
      return of_taps(Two{}, One{});
    case 41:
      return of_taps(Four{}, One{});
    case 12:
      return of_taps(One{}, Two{});
    case 14:
      return of_taps(One{}, Four{});
    default:
      return launch_strips<T, 0, 0, 0>(p, stream);
  }
}

template <typename T, int kUp>
int by_pixels(const Args& p, void* stream) {
  switch (p.w.taps == p.h.taps ? p.w.taps : 0) {
    case 2:
      return launch_pixels<T, kUp, 2>(p, stream);
    case 4:
      return launch_pixels<T, kUp, 4>(p, stream);
    case 6:
      return launch_pixels<T, kUp, 6>(p, stream);
    case 8:
      return launch_pixels<T, kUp, 8>(p, stream);
    case 12:
      return launch_pixels<T, kUp, 12>(p, stream);
    default:
      return launch_pixels<T, 0, 0>(p, stream);
  }
}

template <typename T>
int try_pixels(const Args& p, void* stream) {
  if (p.channels % (16 / sizeof(T))) return -1;
  if (p.separable && p.w.taps > 6) return by_strips<T>(p, stream);
  const bool even = p.w.pad % 2 == 0 && p.h.pad % 2 == 0;
  if (p.w.taps == 4 && p.h.taps == 4 && p.w.up == p.h.up && p.w.down == p.h.down) {
    if (p.w.up == 1 && p.w.down == 1) return launch_walk<T, 1, 1>(p, stream);
    if (p.w.up == 2 && p.w.down == 1 && even) return launch_walk<T, 2, 1>(p, stream);
    if (p.w.up == 1 && p.w.down == 2) return launch_walk<T, 1, 2>(p, stream);
  }
  switch (p.w.up == p.h.up ? p.w.up : 0) {
    case 1:
      return by_pixels<T, 1>(p, stream);
    case 2:
      return by_pixels<T, 2>(p, stream);
    case 4:
      return by_pixels<T, 4>(p, stream);
    default:
      return launch_pixels<T, 0, 0>(p, stream);
  }
}

template <int kUp, int kDown>
int try_planes(const Args& p, void* stream) {
  switch (p.w.taps) {
    case 2:  // with up 4 as many taps as factors, some of them zeros
      return launch_planes<kUp, kDown, kUp == 4 ? 4 : 2, false>(p, stream);
    case 4:
      if constexpr (kUp <= 2 && kDown <= 2) {
        const int error = p.dtype == kF32 ? try_march<float, kUp, kDown>(p, stream)
                                          : try_march<Half16, kUp, kDown>(p, stream);
        if (error >= 0) return error;
      }
      if constexpr (kUp == 1 && kDown == 1)
        if (p.w.out % 4)
          return p.dtype == kF32 ? launch_lines<float>(p, stream) : launch_lines<Half16>(p, stream);
      return launch_planes<kUp, kDown, 4, false>(p, stream);
    case 6:
      return launch_planes<kUp, kDown, kUp == 4 ? 8 : 6, false>(p, stream);
    case 8:
      return p.separable ? launch_planes<kUp, kDown, 8, true>(p, stream)
                         : launch_planes<kUp, kDown, 8, false>(p, stream);
    case 12:
      return p.separable ? launch_planes<kUp, kDown, 12, true>(p, stream)
                         : launch_planes<kUp, kDown, 12, false>(p, stream);
    default:
      return -1;
  }
}

// The specialised kernel for these arguments: its launch's error, or -1 where there is none.
int try_special(const Args& p, bool last, void* stream) {
  if (p.dtype == kF64 || !aligned16(p.x) || !aligned16(p.y)) return -1;
  if (last) return p.dtype == kF32 ? try_pixels<float>(p, stream) : try_pixels<Half16>(p, stream);
  if (p.h.taps != p.w.taps || p.h.up != p.w.up || p.h.down != p.w.down) return -1;
  if (static_cast<int64_t>(p.h.in) * p.w.in > int64_t(1) << 30) return -1;
  const int factor = p.w.up * 10 + p.w.down;
  switch (factor) {
    case 11:
      return try_planes<1, 1>(p, stream);
    case 21:
      return try_planes<2, 1>(p, stream);
    case 41:
      return try_planes<4, 1>(p, stream);
    case 12:
      return try_planes<1, 2>(p, stream);
    case 14:
      return try_planes<1, 4>(p, stream);
    default:
      return -1;
  }
}

}  // namespace

namespace GANKERN_BACKEND {

int upfirdn2d(int dtype, const void* x, const void* f, void* y, bool last, int64_t N, int64_t C,
              int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, int64_t taps_y,
              int64_t taps_x, bool separable, int64_t up_x, int64_t up_y, int64_t down_x,
              int64_t down_y, int64_t pad_x, int64_t pad_y, bool flip, double gain, void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  int64_t largest = 0;
  for (const int64_t v : {in_h, in_w, out_h, out_w, up_x, up_y, down_x, down_y, C})
    largest = max(largest, v);
  if (taps_x > kMaxTaps || taps_y > kMaxTaps || largest > int64_t(1) << 29)
    return static_cast<int>(cudaErrorInvalidValue);
  const auto axis = [](int64_t in, int64_t out, int64_t up, int64_t down, int64_t pad,
                       int64_t taps) {
    return Axis{static_cast<int>(in),   static_cast<int>(out), static_cast<int>(up),
                static_cast<int>(down), static_cast<int>(pad), static_cast<int>(taps)};
  };
  const Args p =
      make_args(dtype, x, f, y, last, N, C, axis(in_h, out_h, up_y, down_y, pad_y, taps_y),
                axis(in_w, out_w, up_x, down_x, pad_x, taps_x), separable, flip, gain);
  const int error = try_special(p, last, stream);
  if (error >= 0) return error;
  return by_width(dtype, [&](auto zero, auto) { return launch_any<decltype(zero)>(p, stream); });
}

GK_EXPORT(upfirdn2d);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
