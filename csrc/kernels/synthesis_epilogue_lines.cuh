// The kernels of synthesis_epilogue with a filter, NCHW: see lines.cuh.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

// A pair of neighbours in 16 bits, as they lie: in one word where they are `paired`; `first` and
// `second`: whether it exists.
__device__ __forceinline__ unsigned load_pair(const Half16* p, bool paired, bool first,
                                              bool second) {
  if (paired) return *reinterpret_cast<const unsigned*>(p);
  return (first ? p[0].bits : 0u) | (second ? p[1].bits << 16 : 0u);
}

// Whether pairs from even columns of `left` on, and their rows, are words.
__device__ __forceinline__ bool paired(const void* image, int width, int left) {
  return (reinterpret_cast<uintptr_t>(image) & 3) == 0 && (width | left) % 2 == 0;
}

// Rows of noise in shared memory, zero outside of y, for all planes of a block: plane p copies rows
// p, p + planes, ..., of each a lane its own columns.
template <typename T>
struct LineNoise {
  using A = Acc<T>;
  using Columns = LineColumns<T>;
  const Args<T>& a;

  // f(q, where a thread's columns lie, columns) for each of its rows.
  template <typename F>
  __device__ __forceinline__ void each_row(A* to, const LanePlace& me, int rows, F f) const {
    const LinePlan& m = a.lines;
    if (!me.has(0)) return;
    const Columns columns(m, me.lane(), m.across);
    to += columns.first;
#pragma unroll 1
    for (int q = quotient(thread_again(), m.magic); q < rows; q += m.planes)
      f(q, to + q * m.across, columns);
  }
  // Where a pair of 16 bits waits in its place: half of a warp in the other banks.
  static __device__ __forceinline__ unsigned* lies_at(A* to, const Columns& columns) {
    return reinterpret_cast<unsigned*>(to) + (columns.first >> 5 & 1);
  }
  // row: the first, counted in the strip; exists(q): whether y has the q-th.
  template <typename F>
  __device__ __forceinline__ void copy(A* to, const volatile LineStrip& strip, const LanePlace& me,
                                       int row, int rows, F exists) const {
    const int64_t begin =
        (static_cast<int64_t>(a.one_noise ? 0 : strip.n) * a.out_h + strip.dy_top + row) * a.out_w +
        strip.dy_left;
    each_row(to, me, rows, [&](int q, A* to, const Columns& columns) {
      const int64_t i = begin + static_cast<int64_t>(q) * a.out_w + columns.first;
      const bool there = exists(q);
      const auto inside = [&](int e) {
        return there && me.has(e) &&
               (!Columns::kNeighbours || strip.dy_left + columns.first + e >= 0);
      };
      if constexpr (sizeof(T) == 2) {
        if (!(a.f32 & 2)) {  // as they lie, until have()
          const T* from = static_cast<const T*>(a.noise) + i;
          unsigned* pair = lies_at(to, columns);
          if (paired(a.noise, a.out_w, strip.dy_left))
            copy_pack<unsigned, 1>(pair, reinterpret_cast<const unsigned*>(from), there);
          else
            *pair = load_pair(from, false, inside(0), inside(1));
          return;
        }
      }
#pragma unroll
      for (int e = 0; e < Columns::K; e++) {
        if (e > 0 && !Columns::kNeighbours && !me.has(e)) continue;
        if (sizeof(T) == 8 && (a.f32 & 2))
          to[e] = inside(e) ? static_cast<const float*>(a.noise)[i + e] : 0.f;
        else
          copy_pack<A, 1>(to + e * columns.apart,
                          static_cast<const A*>(a.noise) + (i + e * columns.apart), inside(e));
      }
    });
  }
  // Numbers of what has come, by the thread that copied it.
  __device__ __forceinline__ void have(A* to, const LanePlace& me, int rows) const {
    if constexpr (sizeof(T) == 2) {
      if (a.f32 & 2) return;
      each_row(to, me, rows, [&](int, A* to, const Columns& columns) {
        const unsigned pair = *lies_at(to, columns);
        const Pack<T, 2> lies{{T{static_cast<unsigned short>(pair & 0xffff)},
                               T{static_cast<unsigned short>(pair >> 16)}}};
        Pack<A, 2> numbers;
        widen(lies, a.format, numbers.v);
        store_pack<A, 2>(to, numbers);
      });
    }
  }
};

// A parameter is d, b or the strength of the noise.
template <typename T, bool kPwl>
struct LineEpilogue {
  using A = Acc<T>;
  const Args<T>& a;
  const ActArgs<A>& p;
  __device__ __forceinline__ A param(int n, int c, int which) const {
    return gankern::param(a, which, n, c);
  }
  __device__ __forceinline__ void copy_noise(A* shared, const volatile LineStrip& strip,
                                             const LanePlace& me, int row) const {
    if (!a.noise) return;
    LineNoise<T>{a}.copy(shared, strip, me, row, kLineRows<T>, [&](int q) {
      return static_cast<unsigned>(row + q - kHalo) < static_cast<unsigned>(strip.rows);
    });
  }
  __device__ __forceinline__ void have_noise(A* shared, const LanePlace& me) const {
    if (a.noise) LineNoise<T>{a}.have(shared, me, kLineRows<T>);
  }
  template <int K, typename Read, typename Noise>
  __device__ __forceinline__ void finish(A (&u)[K], const A (&params)[3], Read read,
                                         const Noise& noise) const {
    const A d = params[0], b = params[1], s = params[2];
    A z[K] = {};
    if (a.noise) {
      read();
#pragma unroll
      for (int e = 0; e < K; e++) z[e] = noise(e, 0);
    }
    if constexpr (kPwl) {
      const Pwl pwl(p);
#pragma unroll
      for (int e = 0; e < K; e++) u[e] = pwl.value(u[e] * d + (z[e] * s + b));
    } else {
      each<false, 1>([&](int, A& v, A noise) { v = value<false>(v, d, noise, s, b, p); }, u, z);
    }
  }
};

template <typename T, bool kPwl>
__global__ void __launch_bounds__(kLineThreads<T>, kLineBlocks<T>)
    synthesis_epilogue_fwd_lines_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  filter_lines<T, kPwl ? 2 : 1>(a, LineEpilogue<T, kPwl>{a, p});
}

// Rows of du = dL/d(filter(x)) go through shared memory, from which their own filter takes them:
// row r of x, counted in the strip, makes row r - 3 of dv and du, and that row r - 6 of dx.
template <typename T, bool kPwl>
__global__ void __launch_bounds__(kLineThreads<T>, kLineBlocks<T>)
    synthesis_epilogue_bwd_lines_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int K = kLineColumns<T>, R = kLineRows<T>, D = kDuRows;
  constexpr int kUnroll = kPwl && sizeof(T) == 4 ? 2 : 1, kAhead = kPwl ? D : 1;
  using Copies = LineCopies<T, R>;
  GK_DYNAMIC_SHARED(char, shared);
  __shared__ Taps<A> taps, adjoint;
  __shared__ LineStrip in_shared;
  // Of each step, which rows count: of x, dy, dv and the result, eight bits each.
  __shared__ unsigned step_rows[kLineSteps];
  const volatile LineStrip& strip = in_shared;
  const LinePlan& m = a.lines;
  const LineShared<T> s{shared, m};
  if (threadIdx.x == 0) in_shared.set(a, true, R, T{});
  __syncthreads();
  if (threadIdx.x < kLineSteps) {
    const int row = static_cast<int>(threadIdx.x) * R;
    const auto rows = [row](int from, int behind) { return rows_between<R>(row, from, behind); };
    step_rows[threadIdx.x] = rows(-strip.top, min(a.H - strip.top, strip.all)) |
                             rows(-strip.dy_top, min(a.out_h - strip.dy_top, strip.all)) << 8 |
                             rows(strip.own_first, strip.own_last) << 16 |
                             rows(2 * kHalo, 2 * kHalo + strip.rows) << 24;
  }
  __syncthreads();

  const LanePlace me(m, in_shared, T{});
  // Registers are short: what a thread copies waits in shared memory.
  const auto kept = [&](int share, int lane) { return s.copies(share) + lane; };
  const auto own_sums = [&] { return s.sums(me.share()) + me.lane(); };
  const auto begin = [&](int step) {
    const int share = me.share(), lane = me.lane();
    LineSlot<T>& slot = s.slot(share);
    int64_t x;
    bool careful;
    if (step == 0) {
      const int c = strip.c0 + quotient(thread_again(), m.magic);
      const int64_t plane = static_cast<int64_t>(strip.n) * a.C + c;
      x = (plane * a.H + strip.top) * a.W + strip.left;
      careful = Copies::near_end(plane, static_cast<int64_t>(a.N) * a.C, a.H, a.W);
      if (lane < m.lanes) {
        Copies copies;
        copies.plan(m.x, a.x + x, lane, m.lanes, strip.left, m.wide + kHalo, a.W);
        if (c >= strip.end) copies.none();
        copies.keep(kept(share, lane), m.lanes);
      }
      if (lane < 3 && c < strip.end) slot.params[lane] = param(a, lane, strip.n, c);
      if (lane == 3) {
        slot.x = x, slot.careful = careful;
        slot.dy = (plane * a.out_h + strip.dy_top) * a.out_w + strip.dy_left;
        slot.out =
            c < strip.end ? (plane * a.H + strip.row0 - 2 * kHalo) * a.W + strip.col0 : kNoPlane;
      }
    } else {
      x = slot.x + static_cast<int64_t>(step * R) * a.W;
      careful = slot.careful;
    }
    if (lane >= m.lanes) return;
    Copies copies;
    copies.find(kept(share, lane), m.lanes);
    copies.copy(m.x, s.xs(share, step % 2), a.x + x, a.W, step_rows[step], careful, a.x, a.x_end);
  };
  // Of D rows, from row `first` of a step on.
  const auto copy_noise = [&](int step, int first) {
    if (!a.noise || step == strip.steps) return;
    const unsigned rows = step_rows[step] >> 8 >> first;
    LineNoise<T>{a}.copy(s.noises(), strip, me, step * R + first, D,
                         [&](int q) { return (rows >> q & 1) != 0; });
  };
  const auto have_noise = [&] {
    if (a.noise) LineNoise<T>{a}.have(s.noises(), me, D);
  };
  copy_noise(0, 0);
  begin(0);
  copy_batch();
  // Columns of du that no lane makes are 0, and what lies behind them is read, and not used.
  if (me.lane() < m.lanes)
    for (int i = me.lane(); i < D * m.du_pitch; i += m.lanes) s.dus(me.share())[i] = A(0);
#pragma unroll
  for (int j = 0; j < kHalo; j++) {
    if (me.lane() < m.lanes) own_sums()[j * m.lanes] = A(0);
    if (me.lane() < kLineRest) s.rests(me.share())[me.lane() * kHalo + j] = A(0);
  }
  if (threadIdx.x < 32) share_taps<A>(&taps, &adjoint, a);
  // kAhead rows of dy go to registers as they lie, from row `first` of a step on: pairs of 16 bits
  // as words, which are read as such where they are aligned.
  using Row = std::conditional_t<LineColumns<T>::kNeighbours, unsigned, Pack<T, K>>;
  const auto load_dy = [&](int step, int first, Row(&to)[kAhead]) {
    const LineSlot<T>& slot = s.slot(me.share());
#pragma unroll
    for (int q = 0; q < kAhead; q++) to[q] = Row{};
    if (slot.out == kNoPlane || !me.has(0)) return;
    const LineColumns<T> columns(m, me.lane(), strip.dv_cols);
    const T* dy =
        a.dy + (slot.dy + static_cast<int64_t>(step * R + first) * a.out_w) + columns.first;
    const unsigned rows = step_rows[step] >> 8 >> first;
    const bool words = paired(a.dy, a.out_w, strip.dy_left);
#pragma unroll
    for (int q = 0; q < kAhead; q++) {
      if (rows >> q & 1) {
        if constexpr (!LineColumns<T>::kNeighbours) {
#pragma unroll
          for (int e = 0; e < K; e++)
            if (e == 0 || me.has(e)) to[q].v[e] = dy[e * columns.apart];
        } else {
          to[q] = load_pair(dy, words, columns.first || strip.dy_left >= 0, me.has(1));
        }
      }
      dy += a.out_w;
    }
  };
  const auto dy_of = [](const Row& row, int e) {
    if constexpr (LineColumns<T>::kNeighbours)
      return T{static_cast<unsigned short>(e ? row >> 16 : row & 0xffff)};
    else
      return row.v[e];
  };

  const auto walk = [&](Format<T> format) {
    A waiting[kHalo][K] = {}, du_waiting[kHalo][K] = {};
#pragma unroll 1
    for (int step = 0;; step++) {
      copy_wait<0>();
      if (me.lane() < m.lanes && step < strip.steps) {
        const int share = me.share(), lane = me.lane();
        Copies copies;
        copies.find(kept(share, lane), m.lanes);
        copies.clear(s.xs(share, step % 2));
      }
      if (step < strip.steps) have_noise();
      __syncthreads();
      if (m.out_stage && step > 0) {  // the results of the step before
        const int row = (step - 1) * R, o = row - 2 * kHalo;
        const int64_t out = s.slot(me.share()).out;
        if (out != kNoPlane)
          store_lines(m, a.out + (out + static_cast<int64_t>(row) * a.W),
                      s.xs(me.share(), 1 - step % 2), max(0, -o), min(R, strip.rows - o), a.W,
                      strip.columns, me.lane());
      }
      if (step == strip.steps) break;
      Row dys[kAhead];
      if (kAhead > 1) load_dy(step, 0, dys);
#pragma unroll 1
      for (int part = 0; part < R; part += D) {
        if (part > 0) {
          copy_wait<1>();
          have_noise();
          __syncthreads();  // the rows of du before have been read
        }
        {
          const LineColumns<T> columns(m, me.lane(), strip.dv_cols);
          const LineSlot<T>& slot = s.slot(me.share());
          if (slot.out != kNoPlane && me.has(0)) {
            const A d = slot.params[0], b = slot.params[1], strength = slot.params[2];
            A* du = s.dus(me.share()) + strip.before + columns.first;
            const T* x = s.xs(me.share(), step % 2) + first_of(a.x + slot.x) + part * m.x.pitch +
                         columns.first;
            // Rows of dv that count, eight bits for each column.
            unsigned own = 0;
#pragma unroll
            for (int e = 0; e < K; e++)
              own |= me.owns(e) ? (step_rows[step] >> 16 >> part & 0xff) << 8 * e : 0;
            A sums[3] = {};
            const A* noise = s.noises() + columns.first;
            with_taps<false>(taps, [&](auto filter) {
#pragma unroll kUnroll
              for (int q = 0; q < D; q++) {
                A u[K], v[K], dv[K], z[K];
                {
                  LineWindow<T, kTaps> window;
                  window.read(x, columns, format);
                  filter(waiting, window, u);
                }
                if (kAhead == 1) load_dy(step, part + q, dys);
#pragma unroll
                for (int e = 0; e < K; e++) dv[e] = to_acc(dy_of(dys[0], e), format);
#pragma unroll
                for (int i = 0; i + 1 < kAhead; i++) dys[i] = dys[i + 1];
                const auto read_noise = [&] {
#pragma unroll
                  for (int e = 0; e < K; e++) z[e] = A(0);
                  if (!a.noise) return;
                  LineWindow<T, 1> window;
                  window.read(noise, columns);
#pragma unroll
                  for (int e = 0; e < K; e++) z[e] = window(e, 0);
                };
                read_noise();
#pragma unroll
                for (int e = 0; e < K; e++) v[e] = u[e] * d + (z[e] * strength + b);
                if constexpr (kPwl) {
                  const Pwl pwl(p);
#pragma unroll
                  for (int e = 0; e < K; e++) dv[e] = pwl.grad_within(p.bound, dv[e], v[e]);
                } else {
                  grad(dv, v, p);
                  read_noise();  // again, since registers are short
                }
#pragma unroll
                for (int e = 0; e < K; e++) {
                  if (!(own >> (8 * e + q) & 1)) continue;
                  sums[0] += dv[e] * u[e];
                  sums[1] += dv[e];
                  sums[2] += dv[e] * z[e];
                }
                if constexpr (LineColumns<T>::kNeighbours) {
                  Pack<A, K> piece;
#pragma unroll
                  for (int e = 0; e < K; e++) piece.v[e] = dv[e] * d;
                  store_pack<A, K>(du, piece);
                } else {
#pragma unroll
                  for (int e = 0; e < K; e++)
                    if (e == 0 || me.has(e)) du[e * columns.apart] = dv[e] * d;
                }
                x += m.x.pitch, du += m.du_pitch;
                noise += m.across;
              }
            });
#pragma unroll
            for (int k = 0; k < 3; k++)  // registers are short
              own_sums()[k * m.lanes] += sums[k];
          }
        }
        __syncthreads();
        part + D < R ? copy_noise(step, part + D) : copy_noise(step + 1, 0);
        copy_batch();
        if (part == 0) {
          if (step + 1 < strip.steps) begin(step + 1);
          copy_batch();
        }
        if (kAhead > 1 && part + D < R) load_dy(step, part + D, dys);
        const int64_t out = s.slot(me.share()).out;
        {
          const LineColumns<T> columns(m, me.lane(), m.wide);
          if (out != kNoPlane && me.stores(0)) {
            T* to = a.out + (out + static_cast<int64_t>(step * R) * a.W);
            T* kept = s.xs(me.share(), step % 2) + first_of(to) + part * m.out_pitch;
            to += static_cast<int64_t>(part) * a.W;
            const unsigned rows = step_rows[step] >> 24 >> part;
            with_taps<false>(adjoint, [&](auto filter) {
              // Columns `first` and what lies `apart`, and stores(e) of them; v(du): what they
              // meet.
              const auto walk_rows = [&](auto direct, auto& waits, int first, int apart, auto v,
                                         auto stores) {
                constexpr int N = sizeof waits[0] / sizeof(A);
                const A* du = s.dus(me.share()) + first;
                T* out = (decltype(direct)::value ? to : kept) + first;
#pragma unroll kUnroll
                for (int q = 0; q < D; q++) {
                  A dx[N];
                  filter(waits, v(du), dx);
                  if (!decltype(direct)::value || rows >> q & 1) {
                    const Pack<T, N> result = narrow<T, N>(dx, format);
#pragma unroll
                    for (int e = 0; e < N; e++)
                      if (e == 0 || stores(e)) out[e * apart] = result.v[e];
                  }
                  du += m.du_pitch;
                  out += decltype(direct)::value ? a.W : m.out_pitch;
                }
              };
              const auto walk_all = [&](auto direct) {
                walk_rows(
                    direct, du_waiting, columns.first, columns.apart,
                    [&](const A* du) {
                      LineWindow<T, kTaps> window;
                      window.read(du, columns);
                      return window;
                    },
                    [&](int e) { return me.stores(e); });
                const int rest = me.lane();
                if (K * m.lanes + rest >= strip.columns) return;
                A(&waits)
                [kHalo][1] = *reinterpret_cast<A(*)[kHalo][1]>(s.rests(me.share()) + rest * kHalo);
                walk_rows(
                    direct, waits, K * m.lanes + rest, 0,
                    [](const A* du) { return [du](int, int k) { return du[k]; }; },
                    [](int) { return true; });
              };
              m.out_stage ? walk_all(std::false_type{}) : walk_all(std::true_type{});
            });
          }
        }
      }
    }
  };
  with_format(a.format, walk);
  const int t = static_cast<int>(thread_again()), width = min(m.lanes, 32);
  // Whole warps turn together.
  for (int i = t / width; i - t % 32 / width < 3 * m.planes; i += blockDim.x / width) {
    const int plane = i / 3, k = i - 3 * plane, c = strip.c0 + plane;
    A sum = 0;
    if (plane < m.planes)
      for (int l = t % width; l < m.lanes; l += width)
        sum += s.sums(plane * m.share)[k * m.lanes + l];
    sum = warp_sum(sum, width);
    if (plane < m.planes && t % width == 0 && c < strip.end)
      a.partials[((static_cast<int64_t>(k) * a.N + strip.n) * a.C + c) * a.tiles + strip.index] =
          sum;
  }
  finish<T>(a, strip.n, m.planes, strip.c0 / m.planes);
}

}  // namespace
}  // namespace gankern
