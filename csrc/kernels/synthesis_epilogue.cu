// synthesis_epilogue: y = clamp(act(filter(x) * d + noise * strength + b) * gain) and its gradient.
//
// With a filter, of 4x4 taps (fewer are padded with zeros), a block walks down strips of its input
// and filters by rows and columns where the taps are of rank one. The backward filters twice, and
// between them keeps dL/d(filter(x)) in shared memory. NCHW (lines): a thread has two columns of
// a plane; a block has several channels, which share the noise. Channels-last (pixels): a thread
// has some channels of two columns.
#include "synthesis_epilogue_lines.cuh"
#include "synthesis_epilogue_pixels.cuh"
#include "synthesis_epilogue_second.cuh"

namespace gankern {
namespace {

// A tile of lanes x rows of threads.
struct Plan {
  int lanes, rows, tile_w, tile_h, tiles_x, tiles_y, threads;
  int groups;  // of channels, by blocks; without a filter, NCHW, forward: rounds of a block
  // With a filter, channels-last: channels of a block, columns, rows of a step, and bytes.
  int channels, across, step, shared;
  int span;        // without a filter: channels of a block
  LinePlan lines;  // with a filter, NCHW
  int64_t tiles() const { return static_cast<int64_t>(tiles_x) * tiles_y; }
};

constexpr int vec_of(int dtype) { return dtype == kF64 ? 2 : dtype == kF32 ? 4 : 8; }

int threads_of(int n) { return static_cast<int>(ceil_div(n, 32)) * 32; }

// Channels-last with a filter: 64 bytes of a pixel's channels; fewer where half of them would not
// exist.
int pixel_channels(int dtype, int64_t C) {
  const int V = vec_of(dtype);
  int channels = 4 * V;
  while (channels > V && 2 * (ceil_div(C, channels) * channels - C) >= channels) channels /= 2;
  return channels;
}

// Where the kernels of channels-last images with a filter have what in shared memory, in bytes.
struct PixelShared {
  int xs = 0, dys = 0, sources = 0, noises, x_stage, dy_stage, noise_stage, all;
  PixelShared(const Plan& t, int bytes, bool backward, bool noise) {
    const int word = bytes == 8 ? 8 : 4;
    x_stage = t.step * (t.across + kHalo) * t.channels * bytes;
    dy_stage = t.step * t.across * t.channels * bytes;
    noise_stage = noise ? t.step * t.across * word : 0;
    if (backward) {
      // Room for rows of du, and then for the sums of warps.
      xs = max(t.step * t.across, t.threads / 32 * 3) * t.channels * word;
      dys = xs + x_stage, sources = dys + dy_stage, noises = sources + 8 * t.threads;
    } else {
      sources = 3 * x_stage, noises = sources + 8 * t.threads;
    }
    all = noises + (backward ? 1 : 3) * noise_stage;
  }
};

// Strips as wide as there are threads, and as long as cut_strips() finds best.
Plan plan_pixels(int dtype, bool backward, bool noise, int64_t N, int64_t C, int width,
                 int height) {
  const int V = vec_of(dtype), bytes = 16 / V;
  Plan t{};
  t.channels = pixel_channels(dtype, C);
  t.lanes = t.channels / thread_channels(bytes, backward);
  // Threads for the samples of a row, and for 16 bytes each of a row of x.
  const int halo = backward ? kHalo : 0, packs = t.channels / V;
  const int widest = min(kPixelThreads / t.lanes, (kPixelThreads / packs - kHalo) / kColumns);
  t.groups = static_cast<int>(ceil_div(C, t.channels));
  const auto rows = [&](int strips) { return static_cast<int>(ceil_div(height, strips)); };
  const auto blocks_of = [&](int strips) {
    t.tile_h = rows(strips);
    t.tiles_y = static_cast<int>(ceil_div(height, t.tile_h));
    return t.tiles() * N * t.groups;
  };
  const int64_t sms = sm_count();
  for (int strips_x = static_cast<int>(ceil_div(width, widest * kColumns - halo));; strips_x *= 2) {
    t.tile_w = static_cast<int>(ceil_div(width, strips_x));
    t.tiles_x = static_cast<int>(ceil_div(width, t.tile_w));
    const int pairs = static_cast<int>(ceil_div(t.tile_w + halo, kColumns));
    t.across = pairs * kColumns;
    t.threads = threads_of(max(pairs * t.lanes, (t.across + kHalo) * packs));
    const int64_t slots = sms * (4 * kPixelThreads / t.threads);
    int strips = cut_strips(height, 128, halo + kHalo, slots, rows, blocks_of);
    while (4 * blocks_of(strips) < 3 * sms && t.tile_h > 4) strips *= 2;
    if (4 * blocks_of(strips) >= 3 * sms || t.tile_w * t.lanes <= 32 * kColumns) break;
  }
  // Steps as long as there is room for four blocks on a multiprocessor, or else for fewer. kFixed:
  // more than the kernels' own arrays, and what the system takes of a block.
  constexpr int kFixed = 1024;
  const auto fits = [&](int blocks) {
    const int shared = PixelShared(t, bytes, backward, noise).all;
    return blocks * (shared + 2 * kFixed) <= shared_limit() + kFixed;
  };
  int blocks = static_cast<int>(ceil_div(4 * kPixelThreads, t.threads));
  const int most = backward ? 8 : 4;
  for (t.step = most; blocks > 1 && !fits(blocks); t.step--)
    if (t.step == 2) t.step = most + 1, blocks--;
  while (t.step > 1 && !fits(1)) t.step--;
  t.shared = PixelShared(t, bytes, backward, noise).all;
  return t;
}

Plan of_lines(const LinePlan& lines, int64_t C) {
  Plan t{};
  t.lines = lines;
  t.tile_w = lines.tile_w, t.tile_h = lines.tile_h;
  t.tiles_x = lines.tiles_x, t.tiles_y = lines.tiles_y;
  t.threads = lines.threads(), t.shared = lines.shared;
  t.groups = static_cast<int>(ceil_div(C, lines.planes));
  return t;
}

// Without a filter a plane is one row. NCHW: rows of threads have channels of their own.
Plan plan_flat(int V, bool noise, int64_t planes, int channels, int area) {
  const int sms = sm_count();
  Plan t{};
  t.tiles_y = t.groups = 1;
  const auto blocks = [&] { return ceil_div(area, t.lanes * V) * planes / max(t.rows, 1); };
  t.lanes = pow2_between(ceil_div(area, V), 1, noise ? 32 : 128);
  while (t.lanes > 32 && blocks() < sms) t.lanes /= 2;
  t.rows = min(128 / t.lanes, kFlatChannels);
  while (t.rows > 1 && t.rows * t.lanes > 32 && blocks() < sms) t.rows /= 2;
  t.threads = t.lanes * t.rows;
  t.tile_h = t.rows;
  t.tile_w = t.lanes * V;
  t.tiles_x = static_cast<int>(ceil_div(area, t.tile_w));
  while (noise && t.groups < 8 && t.groups * t.rows < channels &&
         2 * t.groups * t.rows <= kFlatChannels &&
         t.tiles() * planes / (t.rows * 2 * t.groups) >= 2 * sms)
    t.groups *= 2;
  t.span = t.rows * t.groups;
  return t;
}

// Without a filter, channels-last or the backward; unit: elements that a worker has at once.
Plan plan_workers(int unit, bool last, bool noise, int64_t N, int64_t C, int area) {
  constexpr int kRun = 4;  // units of a worker that are worth a block
  const int sms = sm_count(), units = last ? area : area / unit;
  Plan t{};
  t.tiles_y = t.groups = 1;
  if (last) {
    t.lanes = pow2_between(ceil_div(C, unit), 1, 32);
    t.threads = pow2_between(ceil_div(units, kRun) * t.lanes, 64, kFlatThreads);
  } else {
    // Rows of threads have channels of their own and share the noise, unless a block has all of a
    // plane; none stands beyond the last channel.
    const bool whole = units <= kRun * kFlatThreads;
    const int even = static_cast<int>(min(C & -C, int64_t(kFlatChannels)));
    t.lanes = whole ? pow2_between(ceil_div(units, kRun), 4, kFlatThreads) : kFlatThreads / 8;
    if (!whole && !noise) t.lanes = kFlatThreads;
    const int rows = min(kFlatThreads / t.lanes, even);
    t.lanes = max(whole ? t.lanes : kFlatThreads / rows, 32 / rows);
    t.threads = rows * t.lanes;
  }
  const auto workers = [&] { return last ? t.threads / t.lanes : t.lanes; };
  const auto tiles = [&](int run) {
    return ceil_div(units, static_cast<int64_t>(workers()) * run);
  };
  const auto blocks = [&](int run) {
    t.span = last ? t.lanes * unit : t.threads / t.lanes;
    return tiles(run) * ceil_div(C, t.span) * N;
  };
  // More blocks: of fewer channels, if that leaves no tiles to add up, or of fewer threads.
  while (blocks(kRun) < sms) {
    if (last && tiles(kRun) == 1 && t.lanes > 8)
      t.lanes /= 2;
    else if (t.threads > 64 && (last ? tiles(kRun) > 1 : t.threads > t.lanes))
      t.threads /= 2;
    else
      break;
  }
  int run = kRun;
  const int shared = unit == 1 ? kFlatNoise<double> : kFlatNoise<float>;
  const int most = last || !noise ? 8 * kRun : shared / (t.lanes * unit);
  while (run > most || (run > 1 && tiles(run) > 1 && blocks(run) < sms)) run /= 2;
  // Long runs, while there are blocks enough, or more tiles than a block adds up at once.
  while (2 * run <= most &&
         (blocks(2 * run) >= (run < 4 * kRun ? 6 : 20) * sms || tiles(run) > 16 * workers()))
    run *= 2;
  // Offsets in a tile have 32 bits.
  while (last && run > 1 && C * workers() * run > INT32_MAX) run /= 2;
  t.groups = static_cast<int>(ceil_div(C, t.span));
  t.tile_w = workers() * run * (last ? 1 : unit);
  t.tiles_x = static_cast<int>(tiles(run));
  return t;
}

// H, W: of the result; w, out_w: of rows of x and y; x0: padding; unit: see plan_workers().
Plan make_plan(int dtype, bool last, bool backward, bool filtered, bool noise, int unit, int64_t N,
               int64_t C, int64_t H, int64_t W, int64_t w, int64_t out_w, int64_t x0,
               bool aligned) {
  const int V = vec_of(dtype), channels = static_cast<int>(C);
  const int width = static_cast<int>(W), height = static_cast<int>(H);
  if (!filtered && (last || backward)) return plan_workers(unit, last, noise, N, C, width * height);
  if (!filtered) return plan_flat(V, noise, N * channels, channels, width * height);
  if (last) return plan_pixels(dtype, backward, noise, N, C, width, height);
  const auto lines = [&](auto zero) {
    return of_lines(plan_lines<decltype(zero)>(backward, noise, N, C, width, height,
                                               static_cast<int>(w), static_cast<int>(out_w),
                                               static_cast<int>(x0), aligned, shared_limit()),
                    C);
  };
  return dtype == kF64 ? lines(double{}) : dtype == kF32 ? lines(float{}) : lines(Half16{});
}

// Elements of a worker's unit, where rows of them are aligned.
int unit_of(int dtype, bool last, bool backward) {
  return dtype == kF64 ? 1 : last && backward ? 4 : vec_of(dtype);
}

template <typename T>
struct Launcher {
  Args<T> a;
  ActArgs<Acc<T>> p;
  Plan plan;
  bool last, filtered, packed, loops;  // loops: over the channels
  void* stream;

  // Sums that the backward's blocks leave for each other, and its tickets.
  int64_t partials() const { return 3 * a.N * static_cast<int64_t>(a.C) * plan.tiles(); }
  int64_t tickets() const { return (a.N + int64_t(1)) * plan.groups; }

  int64_t filtered_blocks() const { return plan.tiles() * a.N * plan.groups; }

  dim3 grid() const {
    if (filtered) return dim3(static_cast<unsigned>(filtered_blocks()));
    const int64_t groups = ceil_div(a.C, plan.span);
    return dim3(static_cast<unsigned>(plan.tiles()),
                static_cast<unsigned>(loops ? min(groups, int64_t(65535)) : groups),
                static_cast<unsigned>(min(a.N, 65535)));
  }

  template <typename Kernel, typename... Rest>
  int launch(Kernel kernel, int shared, const Rest&... rest) {
    // Of the 48 KiB that need no attribute, the kernels' own arrays take some.
    if (shared > 44 * 1024) {
      const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      if (e != cudaSuccess) return static_cast<int>(e);
    }
    GK_LAUNCH((kernel), grid(), dim3(plan.threads), shared, stream, a, p, rest...);
    return static_cast<int>(cudaGetLastError());
  }

  bool pwl() const { return kFast<T> && p.act <= kLrelu; }

  template <bool kLast>
  int forward() {
    if constexpr (kLast) {
      constexpr int N = kUnit<T, true, false>;
      if (!filtered)
        return launch(!packed ? synthesis_epilogue_flat_pixels_kernel<T, false, 1>
                      : pwl() ? synthesis_epilogue_flat_pixels_kernel<T, kFast<T>, N>
                              : synthesis_epilogue_flat_pixels_kernel<T, false, N>,
                      0);
      return launch(pwl() ? synthesis_epilogue_fwd_pixels_kernel<T, kFast<T>>
                          : synthesis_epilogue_fwd_pixels_kernel<T, false>,
                    plan.shared);
    } else {
      if (!filtered)
        return launch(pwl() ? synthesis_epilogue_flat_planes_kernel<T, kFast<T>>
                            : synthesis_epilogue_flat_planes_kernel<T, false>,
                      0);
      return launch(pwl() ? synthesis_epilogue_fwd_lines_kernel<T, kFast<T>>
                          : synthesis_epilogue_fwd_lines_kernel<T, false>,
                    plan.shared);
    }
  }

  template <bool kLast>
  int backward() {
    constexpr int N = kUnit<T, kLast, true>;
    if (!filtered)
      return launch(!packed ? synthesis_epilogue_bwd_kernel<T, kLast, false, 1>
                    : pwl() ? synthesis_epilogue_bwd_kernel<T, kLast, kFast<T>, N>
                            : synthesis_epilogue_bwd_kernel<T, kLast, false, N>,
                    0);
    if constexpr (kLast)
      return launch(pwl() ? synthesis_epilogue_bwd_pixels_kernel<T, kFast<T>>
                          : synthesis_epilogue_bwd_pixels_kernel<T, false>,
                    plan.shared);
    else
      return launch(pwl() ? synthesis_epilogue_bwd_lines_kernel<T, kFast<T>>
                          : synthesis_epilogue_bwd_lines_kernel<T, false>,
                    plan.shared);
  }

  template <bool kLast>
  int second(const Cotangents<T>& w) {
    constexpr int N = kUnit<T, kLast, true>;
    return launch(packed ? synthesis_epilogue_bwd2_kernel<T, kLast, N>
                         : synthesis_epilogue_bwd2_kernel<T, kLast, 1>,
                  0, w);
  }

  // Whether offsets in a tile have 32 bits, and with a filter, channels-last, 16 bytes in a sample.
  bool fits() const {
    constexpr int64_t kMost = int64_t(INT32_MAX) * kVec<T>;
    if (filtered && last && a.C * (max(a.H, a.out_h) + int64_t(16)) * max(a.W, a.out_w) > kMost)
      return false;
    if (filtered) return filtered_blocks() <= INT32_MAX;
    return !loops || !last || static_cast<int64_t>(min(plan.tile_w, a.out_w)) * a.C <= INT32_MAX;
  }

  int run(bool back) {
    if (!fits()) return static_cast<int>(cudaErrorInvalidValue);
    if (last) return back ? backward<true>() : forward<true>();
    return back ? backward<false>() : forward<false>();
  }

  // What the backwards add up, with dd, in `workspace`; clears the tickets.
  int add_up(const void* dy, void* dd, void* workspace) {
    a.dy = static_cast<const T*>(dy);
    a.vec_x = a.vec_x && aligned16(dy);
    a.dd = static_cast<Acc<T>*>(dd);
    a.partials = static_cast<Acc<T>*>(workspace);
    a.tickets = reinterpret_cast<int*>(a.partials + partials());
    return static_cast<int>(
        cudaMemsetAsync(a.tickets, 0, tickets() * sizeof(int), static_cast<cudaStream_t>(stream)));
  }
};

template <typename T>
Launcher<T> launcher(int dtype, int f32, const void* x, const void* f, const void* d,
                     const void* noise, const void* strength, const void* b, const void* dy,
                     void* out, int64_t N, int64_t C, int64_t H, int64_t W, int64_t out_h,
                     int64_t out_w, int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                     int64_t strength_n, int64_t x0, int64_t y0, bool flip, double filter_gain,
                     bool last, int act, double alpha, double gain, double clamp, bool backward,
                     void* stream) {
  using A = Acc<T>;
  constexpr int V = kVec<T>;
  Launcher<T> l{};
  l.last = last, l.filtered = f != nullptr, l.stream = stream;
  const double slope = act == kLinear ? 1.0 : act == kRelu ? 0.0 : alpha;
  l.p = ActArgs<A>{act, A(slope), A(gain), A(0), A(clamp), true};
  const int unit = unit_of(dtype, last, backward);
  l.loops = !f && (last || backward);
  l.packed = (last ? C : H * W) % unit == 0 && aligned16(x) && aligned16(dy) && aligned16(out);
  const Plan t = l.plan =
      make_plan(dtype, last, backward, l.filtered, noise != nullptr, l.packed ? unit : 1, N, C,
                backward ? H : out_h, backward ? W : out_w, W, out_w, x0, aligned16(out));
  Args<T>& a = l.a;
  a.x = static_cast<const T*>(x), a.x_end = a.x + N * C * H * W, a.out = static_cast<T*>(out);
  a.f = static_cast<const float*>(f);
  a.d = d, a.noise = noise, a.strength = strength, a.b = b;
  a.N = static_cast<int>(N), a.C = static_cast<int>(C);
  a.H = static_cast<int>(H), a.W = static_cast<int>(W);
  a.out_h = static_cast<int>(out_h), a.out_w = static_cast<int>(out_w);
  if (!l.filtered) a.W *= a.H, a.out_w *= a.out_h, a.H = a.out_h = 1;
  a.taps_y = static_cast<int>(taps_y), a.taps_x = static_cast<int>(taps_x);
  a.x0 = static_cast<int>(x0), a.y0 = static_cast<int>(y0);
  a.tiles = static_cast<int>(t.tiles()), a.tiles_x = t.tiles_x;
  a.tile_h = t.tile_h, a.tile_w = t.tile_w, a.groups = t.groups;
  while ((1 << a.lanes_log2) < t.lanes) a.lanes_log2++;
  a.lines = t.lines;
  if (l.filtered && last) {
    const int packs = t.channels / V;
    while ((1 << a.packs_log2) < packs) a.packs_log2++;
    a.across = t.across, a.threads = t.threads, a.step = t.step, a.channels = t.channels;
    a.packs = (a.across + kHalo) * packs, a.dy_packs = a.across * packs;
    a.evens = t.across / 2 + 2, a.odd = a.evens * a.channels, a.dy_odd = t.across / 2 * a.channels;
    a.magic = magic_of(a.packs), a.dy_magic = magic_of(a.dy_packs);
    a.noise_magic = magic_of(a.across);
    a.x_apart = a.threads / a.packs, a.dy_apart = a.threads / a.dy_packs;
    const int64_t x_line = W * C, y_line = out_w * C, size = sizeof(T);
    a.pixel = C * size;
    a.out_line = (backward ? x_line : y_line) * size;
    a.x_jump = a.x_apart * x_line * size, a.dy_jump = a.dy_apart * y_line * size;
    a.x_sample = H * x_line * size, a.dy_sample = out_h * y_line * size;
    a.x_step = static_cast<int>(a.step * x_line / V);
    a.dy_step = static_cast<int>(a.step * y_line / V);
    const PixelShared s(t, sizeof(T), backward, noise != nullptr);
    a.xs = s.xs, a.dys = s.dys, a.sources = s.sources, a.noises = s.noises;
    a.x_stage = s.x_stage, a.noise_stage = s.noise_stage;
  }
  a.f32 = f32;
  a.format = Format<T>(dtype);
  a.filter_gain = static_cast<A>(filter_gain);
  a.separable = separable, a.flip = flip;
  a.one_noise = noise_n == 1, a.one_strength = strength_n == 1;
  const int64_t in_row = last         ? C
                         : l.filtered ? 0
                                      : a.W,
                out_row = last       ? C
                          : backward ? a.W
                                     : a.out_w;
  a.vec_x = aligned16(x) && in_row % V == 0;
  a.vec_out = aligned16(out) && out_row % V == 0;
  a.vec_noise = noise && aligned16(noise) && a.out_w % V == 0;
  return l;
}

}  // namespace

namespace GANKERN_BACKEND {

// With f: at most 4 taps a side, and a padding between 0 and taps - 1.
int synthesis_epilogue(int dtype, int f32, const void* x, const void* f, const void* d,
                       const void* noise, const void* strength, const void* b, void* y, int64_t N,
                       int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                       int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                       int64_t strength_n, int64_t x0, int64_t y0, bool flip, double filter_gain,
                       bool channels_last, int act, double alpha, double gain, double clamp,
                       void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  if (max(max(H * W, out_h * out_w), max(N, C)) > (int64_t(1) << 30)) return cudaErrorInvalidValue;
  return by_width(dtype, [&](auto zero, auto) {
    return launcher<decltype(zero)>(dtype, f32, x, f, d, noise, strength, b, nullptr, y, N, C, H, W,
                                    out_h, out_w, taps_y, taps_x, separable, noise_n, strength_n,
                                    x0, y0, flip, filter_gain, channels_last, act, alpha, gain,
                                    clamp, false, stream)
        .run(false);
  });
}

// Bytes of scratch for synthesis_epilogue_bwd.
int64_t synthesis_epilogue_bwd_workspace(int dtype, int64_t N, int64_t C, int64_t H, int64_t W,
                                         int64_t out_w, int64_t x0, bool filtered, bool noise,
                                         bool channels_last) {
  if (N * C * H * W == 0) return 0;
  int64_t bytes = 0;
  for (const int unit : {1, unit_of(dtype, channels_last, true)}) {
    const Plan t = make_plan(dtype, channels_last, true, filtered, noise, unit, N, C, H, W, W,
                             out_w, x0, true);
    const int64_t tickets = (N + 1) * t.groups;
    bytes = max(bytes, 3 * N * C * t.tiles() * (dtype == kF64 ? 8 : 4) + tickets * 4);
  }
  return bytes;
}

// dd [N, C], db [C] and ds [C] are float32, or float64 for float64; ds may be null.
int synthesis_epilogue_bwd(int dtype, int f32, const void* dy, const void* x, const void* f,
                           const void* d, const void* noise, const void* strength, const void* b,
                           void* dx, void* dd, void* db, void* ds, void* workspace, int64_t N,
                           int64_t C, int64_t H, int64_t W, int64_t out_h, int64_t out_w,
                           int64_t taps_y, int64_t taps_x, bool separable, int64_t noise_n,
                           int64_t strength_n, int64_t x0, int64_t y0, bool flip,
                           double filter_gain, bool channels_last, int act, double alpha,
                           double gain, double clamp, void* stream) {
  if (N * C * out_h * out_w == 0) return 0;
  if (max(max(H * W, out_h * out_w), max(N, C)) > (int64_t(1) << 30)) return cudaErrorInvalidValue;
  return by_width(dtype, [&](auto zero, auto) {
    using T = decltype(zero);
    auto l = launcher<T>(dtype, f32, x, f, d, noise, strength, b, dy, dx, N, C, H, W, out_h, out_w,
                         taps_y, taps_x, separable, noise_n, strength_n, x0, y0, flip, filter_gain,
                         channels_last, act, alpha, gain, clamp, true, stream);
    l.a.db = static_cast<Acc<T>*>(db), l.a.ds = static_cast<Acc<T>*>(ds);
    if (const int error = l.add_up(dy, dd, workspace)) return error;
    return l.run(true);
  });
}

// Without a filter, of a piecewise linear activation; the workspace is that of the first. vd, vs,
// vb and d_d [N, C] are float32, or float64 for float64; any cotangent may be null, d_x without vd.
int synthesis_epilogue_bwd2(int dtype, int f32, const void* dy, const void* x, const void*,
                            const void* d, const void* noise, const void* strength, const void* b,
                            const void* vx, const void* vd, const void* vs, const void* vb,
                            void* d_dy, void* d_x, void* d_d, void* workspace, int64_t N, int64_t C,
                            int64_t H, int64_t W, int64_t, int64_t, int64_t, int64_t, bool,
                            int64_t noise_n, int64_t strength_n, int64_t, int64_t, bool, double,
                            bool channels_last, int act, double alpha, double gain, double clamp,
                            void* stream) {
  if (N * C * H * W == 0) return 0;
  if (max(H * W, max(N, C)) > (int64_t(1) << 30) || act > kLrelu) return cudaErrorInvalidValue;
  return by_width(dtype, [&](auto zero, auto) {
    using T = decltype(zero);
    using A = Acc<T>;
    // The plan takes units of 16 bytes only where every image is aligned.
    const void* unaligned = nullptr;
    for (const void* image : {dy, vx, static_cast<const void*>(d_x)})
      if (image && !aligned16(image)) unaligned = image;
    auto l = launcher<T>(dtype, f32, x, nullptr, d, noise, strength, b, unaligned, d_dy, N, C, H, W,
                         H, W, 1, 1, false, noise_n, strength_n, 0, 0, false, 1.0, channels_last,
                         act, alpha, gain, clamp, true, stream);
    if (!l.fits()) return static_cast<int>(cudaErrorInvalidValue);
    if (const int error = l.add_up(dy, d_d, workspace)) return error;
    const Cotangents<T> w{static_cast<const T*>(vx), static_cast<const A*>(vd),
                          static_cast<const A*>(vs), static_cast<const A*>(vb),
                          static_cast<T*>(d_x)};
    return channels_last ? l.template second<true>(w) : l.template second<false>(w);
  });
}

GK_EXPORT(synthesis_epilogue);
GK_EXPORT(synthesis_epilogue_bwd_workspace);
GK_EXPORT(synthesis_epilogue_bwd);
GK_EXPORT(synthesis_epilogue_bwd2);

}  // namespace GANKERN_BACKEND
}  // namespace gankern
