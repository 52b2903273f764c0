// The kernels of synthesis_epilogue with a filter, NCHW: see lines.cuh.
#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

// The noise of `rows` rows of y from (row, col) on, zero outside of it; each warp has rows of its
// own.
template <typename T>
__device__ __forceinline__ void line_noise(Acc<T>* s, const Args<T>& a, int n, int row, int col,
                                           int rows) {
  const int columns = a.lines.across, lane = static_cast<int>(threadIdx.x) % 32;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < rows;
       r += static_cast<int>(blockDim.x) / 32) {
    const int64_t i = offset<false>(1, a.one_noise ? 0 : n, 0, a.out_h, a.out_w, row + r, col);
    const bool in_row = static_cast<unsigned>(row + r) < static_cast<unsigned>(a.out_h);
    // From the begin of a sector of float32 on.
    for (int k = lane - static_cast<int>(i & 7); k < columns; k += 32) {
      if (k < 0) continue;
      const bool inside = in_row && static_cast<unsigned>(col + k) < static_cast<unsigned>(a.out_w);
      s[r * columns + k] = inside ? load_param<T>(a.noise, a.f32 & 2, i + k, a.format) : Acc<T>(0);
    }
  }
}

// A parameter is d, b or the strength of the noise.
template <typename T, bool kPwl>
struct LineEpilogue {
  using A = Acc<T>;
  const Args<T>& a;
  const ActArgs<A>& p;
  __device__ __forceinline__ A param(int n, int c, int which) const {
    return gankern::param(a, which, n, c);
  }
  __device__ __forceinline__ void noise(A* shared, const LineStrip& strip) const {
    if (a.noise) line_noise(shared, a, strip.n, strip.row0, strip.col0, strip.rows);
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
  constexpr int K = kLineColumns<T>, R = kGradRows<T>;
  using Copies = LineCopies<T, R>;
  GK_DYNAMIC_SHARED(char, shared);
  __shared__ Taps<A> taps, adjoint;
  __shared__ A scratch[kLineThreads<T> / 4][3];
  __shared__ LineStrip in_shared;
  const volatile LineStrip& strip = in_shared;
  const LinePlan& m = a.lines;
  const LineShared<T> s{shared, m};
  if (threadIdx.x == 0) in_shared.set(a, true, R);
  __syncthreads();

  Copies x_copies, dy_copies;
  const auto begin = [&](LineCursor cursor) {
    const int round = cursor.round(), step = cursor.step();
    const LanePlace me(m);
    LineSlot<T>& slot = s.slot(me.plane, round);
    const int row = step * R;
    int64_t x, dy;
    if (step == 0) {
      const int c = strip.c0 + me.plane + round * m.planes;
      const int64_t plane = static_cast<int64_t>(strip.n) * a.C + c;
      const int64_t planes = static_cast<int64_t>(a.N) * a.C;
      x = (plane * a.H + strip.top) * a.W + strip.left;
      x_copies.plan(m.x, a.x + x, me.lane, m.lanes, strip.left, m.across + kHalo, a.W,
                    Copies::near_end(plane, planes, a.H, a.W));
      dy = (plane * a.out_h + strip.dy_top) * a.out_w + strip.dy_left;
      dy_copies.plan(m.dy, a.dy + dy, me.lane, m.lanes, strip.dy_left, m.across, a.out_w,
                     Copies::near_end(plane, planes, a.out_h, a.out_w));
      if (c >= strip.end) x_copies.none(), dy_copies.none();
      if (me.lane < 3 && c < strip.end) slot.params[me.lane] = param(a, me.lane, strip.n, c);
      if (me.lane == 3) {
        slot.x = x, slot.dy = dy;
        slot.out =
            c < strip.end ? (plane * a.H + strip.row0 - 2 * kHalo) * a.W + strip.col0 : kNoPlane;
      }
    } else {
      x = slot.x + static_cast<int64_t>(row) * a.W,
      dy = slot.dy + static_cast<int64_t>(row) * a.out_w;
    }
    x_copies.copy(m.x, s.xs(me.plane, cursor.turn()), a.x + x, strip.top + row,
                  max(0, min(a.H, strip.top + strip.all)), a.W, a.x, a.x_end);
    dy_copies.copy(m.dy, s.dys(me.plane, cursor.turn()), a.dy + dy, strip.dy_top + row,
                   max(0, min(a.out_h, strip.dy_top + strip.all)), a.out_w, a.dy, a.dy_end);
  };
  begin({});
  copy_batch();
  if (a.noise)
    line_noise(s.noises(), a, in_shared.n, in_shared.dy_top + kHalo, in_shared.dy_left,
               in_shared.all - kHalo);
  // What lies behind the columns of du is read, and not used.
  {
    const LanePlace me(m);
    for (int i = me.lane; i < R * m.du_pitch; i += m.lanes) s.dus(me.plane)[i] = A(0);
  }
  if (threadIdx.x < 32) share_taps<A>(&taps, &adjoint, a);

  const auto walk = [&](Format<T> format) {
    A waiting[kHalo][K], du_waiting[kHalo][K];
    LineCursor cursor;
#pragma unroll 1
    for (;;) {
      copy_wait<0>();
      {
        const LanePlace me(m);
        x_copies.clear(s.xs(me.plane, cursor.turn())),
            dy_copies.clear(s.dys(me.plane, cursor.turn()));
      }
      __syncthreads();
      if (m.out_stage && cursor.at) {  // the results of the step before
        const LanePlace me(m);
        const int row = (cursor.step() ? cursor.step() - 1 : strip.steps - 1) * R,
                  o = row - 2 * kHalo;
        const int64_t out =
            s.slot(me.plane, cursor.step() ? cursor.round() : cursor.round() - 1).out;
        if (out != kNoPlane)
          store_lines(m, a.out + (out + static_cast<int64_t>(row) * a.W), s.outs(me.plane, 0),
                      max(0, -o), min(R, strip.rows - o), a.W, strip.columns, me.lane);
      }
      if (cursor.step() == 0 && cursor.at) {  // the sums of the channels that are done
        const int groups = max(1, m.lanes / 32), c0 = strip.c0 + (cursor.round() - 1) * m.planes;
        for (int i = thread_again(); i < 3 * m.planes; i += blockDim.x) {
          const int c = c0 + i / 3;
          A sum = 0;
          for (int w = 0; w < groups; w++) sum += scratch[i / 3 * groups + w][i % 3];
          if (c < strip.end)
            a.partials[((static_cast<int64_t>(i % 3) * a.N + strip.n) * a.C + c) * a.tiles +
                       strip.index] = sum;
        }
      }
      if (cursor.round() == strip.rounds) break;
      const LineCursor next = cursor.next(strip.steps);
      if (next.round() < strip.rounds) {
        begin(next);
      } else {
        x_copies.none(), dy_copies.none();
      }
      copy_batch();
      if (cursor.step() == 0) {
        const LanePlace me(m);
#pragma unroll
        for (int j = 0; j < kHalo; j++) {
          s.sums(me.plane)[j * m.lanes + me.lane] = A(0);
#pragma unroll
          for (int e = 0; e < K; e++) waiting[j][e] = du_waiting[j][e] = A(0);
        }
      }
      {
        const LanePlace me(m);
        const LineColumns<T> columns(m, me.lane);
        const LineSlot<T>& slot = s.slot(me.plane, cursor.round());
        if (slot.out != kNoPlane && columns.has(m, me.lane, 0, m.across)) {
          const A d = slot.params[0], b = slot.params[1], strength = slot.params[2];
          const T *const stage = s.xs(me.plane, cursor.turn()), *const dy =
                                                                    s.dys(me.plane, cursor.turn());
          A* du = s.dus(me.plane);
          int row = cursor.step() * R;
          int at = first_of(a.x + (slot.x + static_cast<int64_t>(row) * a.W));
          int dy_at = first_of(a.dy + (slot.dy + static_cast<int64_t>(row) * a.out_w));
          // Rows of dv that count, and whether its columns do.
          const int own_first = strip.own_first;
          const unsigned own = max(strip.own_last - own_first, 0);
          bool has[K], owned[K];
#pragma unroll
          for (int e = 0; e < K; e++) {
            has[e] = columns.has(m, me.lane, e, m.across);
            owned[e] =
                has[e] && strip.dy_left + columns.at[e] >= 0 && columns.at[e] < strip.own_cols;
          }
          A sums[3] = {};
          const A* noise = s.noises() + (row - kHalo) * m.across;
          const unsigned noisy = a.noise ? strip.all - kHalo : 0;
          with_taps<false>(taps, [&](auto filter) {
#pragma unroll 1
            do {
              A u[K], v[K], dv[K], z[K];
              {
                LineWindow<T, kTaps> window;
                window.read(stage, at, columns, format);
                filter(waiting, window, u);
              }
              {
                LineWindow<T, 1> window;
                window.read(dy, dy_at, columns, format);
#pragma unroll
                for (int e = 0; e < K; e++) dv[e] = window(e, 0);
              }
              const auto read_noise = [&] {
#pragma unroll
                for (int e = 0; e < K; e++) z[e] = A(0);
                if (static_cast<unsigned>(row - kHalo) >= noisy) return;
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
                for (int e = 0; e < K; e++) dv[e] = pwl.grad(dv[e], v[e]);
              } else {
                grad(dv, v, p);
                read_noise();  // again, since registers are short
              }
              if (static_cast<unsigned>(row - own_first) < own) {
#pragma unroll
                for (int e = 0; e < K; e++) {
                  const A mine = owned[e] ? dv[e] : A(0);
                  sums[0] += mine * u[e];
                  sums[1] += mine;
                  sums[2] += mine * z[e];
                }
              }
              if constexpr (LineColumns<T>::kNeighbours) {
                Pack<A, K> piece;
#pragma unroll
                for (int e = 0; e < K; e++) piece.v[e] = dv[e] * d;
                store_pack<A, K>(du + columns.at[0], piece);
              } else {
#pragma unroll
                for (int e = 0; e < K; e++)
                  if (has[e]) du[columns.at[e]] = dv[e] * d;
              }
              at += m.x.pitch, dy_at += m.dy.pitch, du += m.du_pitch, noise += m.across;
            } while (++row & (R - 1));
          });
#pragma unroll
          for (int k = 0; k < 3; k++)  // registers are short
            s.sums(me.plane)[k * m.lanes + me.lane] += sums[k];
        }
      }
      __syncthreads();
      const LanePlace me(m);
      const int64_t out = s.slot(me.plane, cursor.round()).out;
      {
        const LineColumns<T> columns(m, me.lane);
        bool has[K];
#pragma unroll
        for (int e = 0; e < K; e++) has[e] = columns.has(m, me.lane, e, strip.columns);
        if (out != kNoPlane && has[0]) {
          const A* du = s.dus(me.plane);
          T* to = a.out + (out + static_cast<int64_t>(cursor.step() * R) * a.W);
          T* kept = s.outs(me.plane, 0) + first_of(to);
          const unsigned rows = strip.rows;
          int row = cursor.step() * R;
          with_taps<sizeof(T) == 2>(adjoint, [&](auto filter) {
            const auto walk_rows = [&](auto stores) {
#pragma unroll 1
              do {
                LineWindow<T, kTaps> window;
                window.read(du, columns);
                A dx[K];
                filter(du_waiting, window, dx);
                if (static_cast<unsigned>(row - 2 * kHalo) < rows) {
                  const Pack<T, K> result = narrow<T, K>(dx, format);
#pragma unroll
                  for (int e = 0; e < K; e++)
                    if (e == 0 || has[e])
                      (decltype(stores)::value ? to : kept)[columns.at[e]] = result.v[e];
                }
                du += m.du_pitch;
                if constexpr (decltype(stores)::value)
                  to += a.W;
                else
                  kept += m.out_pitch;
              } while (++row & (R - 1));
            };
            m.out_stage ? walk_rows(std::false_type{}) : walk_rows(std::true_type{});
          });
        }
      }
      if (cursor.step() + 1 == strip.steps) {
        const int width = min(m.lanes, 32);
#pragma unroll
        for (int k = 0; k < 3; k++) {
          const A own = s.sums(me.plane)[k * m.lanes + me.lane];
          const A sum = warp_sum(own, width);
          if (me.lane % 32 == 0) scratch[me.plane * max(1, m.lanes / 32) + me.lane / 32][k] = sum;
        }
      }
      cursor = cursor.next(strip.steps);
    }
  };
  with_format(a.format, walk);
  finish<T>(a, m.channels);
}

}  // namespace
}  // namespace gankern
