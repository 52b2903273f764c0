#pragma once

#include "synthesis_epilogue_bwd.cuh"

namespace gankern {
namespace {

// With a filter: a block walks down a strip of dx, `step` rows at a time, a row of threads each.
// Row j of the strip's dv needs rows j to j + 3 of x, and row j - 3 of dx rows j - 3 to j of du =
// dv * d. Both lie in rings of step + 3 rows, so that the halo along y is that of the whole strip;
// rows of dy become du in place.
template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads<T>, kBlocks)
    synthesis_epilogue_bwd_filter_kernel(Args<T> a, ActArgs<Acc<T>> p) {
  using A = Acc<T>;
  constexpr int V = kVec<T>, kStep = kChannels<T, kLast>, kPlanes = kLast ? V / kPiece<T> : V;
  // At once: more would not fit into registers. Channels-last: threads with sums of a pixel.
  constexpr int kPart = kPiece<T>, kParts = kLast ? 2 * V / kPart : V / kPart;
  constexpr int kLanes = kLast ? kParts : 1;
  constexpr bool kStored = kLast && V > 4;  // the sums wait in shared memory
  GK_DYNAMIC_SHARED(A, shared);
  __shared__ __align__(16) A taps[2 * kTaps * kTaps];
  __shared__ A scratch[kThreads<T> / 32 * 3 * kStep], params[3 * kStep];
  // What threads look up again and again, since registers are short: the tile's row and column, the
  // rows and columns of dv whose sums are this block's, and the sample.
  __shared__ volatile int kept[7];
  const auto row0 = [&] { return kept[0]; };
  const auto col0 = [&] { return kept[1]; };
  const auto orow0 = [&] { return kept[0] + a.y0 - kHalo; };  // of dv
  const auto ocol0 = [&] { return kept[1] + a.x0 - kHalo; };
  const auto width = [&] { return min(a.tile_w, a.W - kept[1]); };
  const auto height = [&] { return min(a.tile_h, a.H - kept[0]); };
  const auto n = [&] { return kept[6]; };
  if (threadIdx.x == 0) {
    const int sample = static_cast<int>(blockIdx.x) / a.tiles;
    const int tile = static_cast<int>(blockIdx.x) - sample * a.tiles;
    const int tile_y = tile / a.tiles_x, tile_x = tile - tile_y * a.tiles_x;
    const int r = tile_y * a.tile_h, c = tile_x * a.tile_w;
    kept[6] = sample;
    kept[0] = r;
    kept[1] = c;
    kept[2] = (tile_y ? r : 0) - (r + a.y0 - kHalo);
    kept[3] = (r + a.tile_h < a.H ? r + a.tile_h : a.out_h) - (r + a.y0 - kHalo);
    kept[4] = (tile_x ? c : 0) - (c + a.x0 - kHalo);
    kept[5] = (c + a.tile_w < a.W ? c + a.tile_w : a.out_w) - (c + a.x0 - kHalo);
  }
  // NCHW: a word before the first, which pieces of dx that begin left of the strip read.
  A* xs = shared;
  A* dus = xs + kPlanes * a.plane + (kLast ? 0 : 1);
  A* noises = dus + kPlanes * a.plane2;
  A* edges = noises + V * a.noise_plane;  // of rows of dx
  A* stored = noises;
  // The thread's row and its place in it, computed again in each phase rather than kept.
  int row, at;
  const auto locate = [&] {
    const unsigned t = thread_again();
    row = static_cast<int>(t * static_cast<unsigned>(a.lap_magic) >> 20);
    at = static_cast<int>(t) - row * a.lap;
  };
  locate();
  const auto lx = [&] { return kLast ? at >> 1 : at; };
  const auto half = [&] { return kLast ? at & 1 : 0; };
  const auto c_first = [&] { return static_cast<int>(blockIdx.y) * a.groups * kStep; };
  const auto slot = [&](int i) { return i < a.ring ? i : i - a.ring; };
  const auto granule = [&](int pixel) { return (2 * pixel + half()) * kPiece<T>; };

  for (int i = threadIdx.x; i < kPlanes * (a.plane + a.plane2) + (kLast ? 0 : 1); i += blockDim.x)
    shared[i] = A(0);
  __syncthreads();
  // Taps and parameters are read by other threads than the first rows of x, at the same time.
  load_taps(taps, a, static_cast<int>(blockDim.x) / 2 - 1 - static_cast<int>(threadIdx.x));
  for (int c0 = c_first(); c0 < min(a.C, c_first() + a.groups * kStep); c0 += kStep) {
    const auto c = [&] { return c0 + half() * V; };
    Sums<T, kLast, kLast ? kPart : 1> sums;
    if constexpr (kStored) sums.store(stored);
    // NCHW: the columns of the image among those of the tile of x, and of dy.
    const auto x_lo = [&] { return max(0, kHalo - col0()); };
    const auto x_hi = [&] { return min(a.tile_w + 2 * kHalo, a.W + kHalo - col0()); };
    const auto y_lo = [&] { return max(0, -ocol0()); };
    const auto y_hi = [&] { return min(a.tile_w + kHalo, a.out_w - ocol0()); };
    // Row j of x to where row i of the ring is, and of dy.
    const auto fetch_x = [&](int j, int l) {
      if constexpr (kLast)
        return fetch_pixel<T>(a.x + offset<true>(a.C, n(), 0, a.H, a.W, 0, 0), a.C, c(), a.vec_x,
                              a.H, a.W, row0() - kHalo + j, col0() - kHalo + l);
      else
        return fetch_piece<T>(a.x + offset<false>(a.C, n(), c0, a.H, a.W, 0, 0), a.x, a.x_end, a.H,
                              a.W, row0() - kHalo + j, col0() - kHalo, x_lo(), x_hi(), l);
    };
    const auto put_x = [&](int i, int l, const auto& v) {
      if constexpr (kLast)
        put_pixel<T>(xs + i * a.pitch * kPiece<T> + granule(l), v, a.plane, a.format);
      else
        put_piece<A, V>(xs + i * a.pitch, v, x_lo(), x_hi(), a.pitch, a.plane, a.format);
    };
    const auto fetch_dy = [&](int j) {
      if constexpr (kLast)
        return fetch_pixel<T>(a.dy + offset<true>(a.C, n(), 0, a.out_h, a.out_w, 0, 0), a.C, c(),
                              a.vec_x, a.out_h, a.out_w, orow0() + j, ocol0() + lx());
      else
        return fetch_piece<T>(a.dy + offset<false>(a.C, n(), c0, a.out_h, a.out_w, 0, 0), a.dy,
                              a.dy_end, a.out_h, a.out_w, orow0() + j, ocol0(), y_lo(), y_hi(),
                              lx());
    };
    const auto put_dy = [&](int i, const auto& v) {
      if constexpr (kLast)
        put_pixel<T>(dus + i * a.pitch2 * kPiece<T> + granule(lx()), v, a.plane2, a.format);
      else
        put_piece<A, V>(dus + i * a.pitch2, v, y_lo(), y_hi(), a.pitch2, a.plane2, a.format);
    };
    // NCHW: a piece of the noise, read with the first channel, whose type may be float32.
    const auto fetch_noise = [&](const auto* noise, int j, int l) {
      const int64_t area = static_cast<int64_t>(a.out_h) * a.out_w;
      const auto* plane = noise + (a.one_noise ? 0 : n() * area);
      return fetch_piece(plane, noise, noise + (a.one_noise ? 1 : a.N) * area, a.out_h, a.out_w,
                         orow0() + j, ocol0(), y_lo(), y_hi(), l);
    };
    const auto put_noise = [&](const auto& v, int j, auto format) {
      put_piece<A, V>(noises + j * a.pitch, v, y_lo(), y_hi(), a.pitch, a.noise_plane, format);
    };
    const auto extra = [&] { return kLast && at < 2 * kHalo; };  // pixels of x beyond those of dv
    share_params<T, kStep>(params, a, n(), c0, static_cast<int>(blockDim.x - 1 - thread_again()));
    for (int r = row; row < a.step && r < kHalo; r += a.step) {
      put_x(r, lx(), fetch_x(r, lx()));
      if (extra()) put_x(r, lx() + a.lap / 2, fetch_x(r, lx() + a.lap / 2));
    }
    int i = row;  // of row j in the rings
    for (int j = row; j - row < height() + kHalo; j += a.step, i = slot(i + a.step)) {
      locate();
      const bool busy = row < a.step && j < height() + kHalo;
      if (busy) {
        const auto x_piece = fetch_x(j + kHalo, lx());
        const auto dy_piece = fetch_dy(j);
        constexpr bool kF32 = sizeof(T) == 4;
        const bool noise = !kLast && a.noise && c0 == c_first();
        if constexpr (!kLast)
          if (noise && (kF32 || !(a.f32 & 2)))
            put_noise(fetch_noise(static_cast<const T*>(a.noise), j, lx()), j, a.format);
        put_x(slot(i + kHalo), lx(), x_piece);
        put_dy(i, dy_piece);
        if constexpr (!kLast && !kF32)
          if (noise && a.f32 & 2)
            for (int l = lx(); l < a.noise_pieces; l += a.lap)
              put_noise(fetch_noise(static_cast<const float*>(a.noise), j, l), j,
                        Format<float>(kF32));
        if (extra()) put_x(slot(i + kHalo), lx() + a.lap / 2, fetch_x(j + kHalo, lx() + a.lap / 2));
      }
      __syncthreads();
      locate();
      const auto j_own = [&](int e) { return lx() * V + e >= kept[4] && lx() * V + e < kept[5]; };
      const bool row_own = j >= kept[2] && j < kept[3];
      // Outside of the image dy is zero, and so is dv.
      // z(e): the noise of element e; du: dy, and then du.
      const auto make_du = [&](auto& du, const auto& u, const auto& k, const auto& z,
                               const auto& is_own) {
        A v[kPart];
#pragma unroll
        for (int e = 0; e < kPart; e++) v[e] = u[e] * k.d(e) + (z(e) * k.s(e) + k.b(e));
        if (kFast<T> && p.act <= kLrelu)
          grad<true>(du, v, p);
        else
          grad<false>(du, v, p);
#pragma unroll
        for (int e = 0; e < kPart; e++) {
          if (is_own(e)) sums.add(kLast ? e : 0, du[e], u[e], z(e));
          du[e] *= k.d(e);
        }
      };
      if constexpr (kLast) {
#pragma unroll 1
        for (int pass = 0; pass < V / kPart; pass++) {
          const int t = at + pass * a.lap;
          if (!busy || t >= kParts * a.across) break;
          forget(i);
          if constexpr (kStored) sums.load(stored);
          const int pixel = t / kParts, part = t % kParts * kPart, col = ocol0() + pixel;
          const int cell = (2 * pixel + part / V) * kPiece<T>, plane = part % V / kPiece<T>;
          A z[1] = {};
          if (a.noise && orow0() + j >= 0 && orow0() + j < a.out_h && col >= 0 && col < a.out_w)
            load_noise<T, true>(z, a, n(), orow0() + j, col, 1);
          A u[1][kPart];
          filter<kLast>(u, taps, [&](A* v, int q, int kx) {
            const A* line = xs + plane * a.plane + slot(i + q) * a.pitch * kPiece<T>;
            read_pixel<T, kPart>(v, line + cell + 2 * kx * kPiece<T>, a.plane);
          });
          A* at_du = dus + plane * a.plane2 + i * a.pitch2 * kPiece<T> + cell;
          Piece<T> du = *reinterpret_cast<const Piece<T>*>(at_du);
          const Params<T, kLast, kStep> k(params + part);
          const bool is_own = row_own && pixel >= kept[4] && pixel < kept[5];
          make_du(du.v, u[0], k, [&](int) { return z[0]; }, [&](int) { return is_own; });
          *reinterpret_cast<Piece<T>*>(at_du) = du;
          if constexpr (kStored) sums.store(stored);
        }
      } else if (busy && lx() < a.across) {
        const Params<T, kLast, kStep> k(params);
#pragma unroll
        for (int part = 0; part < V; part += kPart) {
          forget(i);
          A u[1][kPart];
          filter<kLast>(u, taps, [&](A* v, int q, int) {
            read_planes<T, kPart + kHalo>(v, xs + slot(i + q) * a.pitch + lx(), part, a.plane);
          });
          A du[kPart], z[kPart];
          A* cell = dus + part * a.plane2 + i * a.pitch2 + lx();
#pragma unroll
          for (int e = 0; e < kPart; e++) {
            const int in_noise = (part + e) * a.noise_plane + j * a.pitch + lx();
            z[e] = a.noise && lx() * V + part + e < a.tile_w + kHalo ? noises[in_noise] : A(0);
            du[e] = cell[e * a.plane2];
          }
          make_du(
              du, u[0], k, [&](int e) { return z[e]; },
              [&](int e) { return row_own && j_own(part + e); });
#pragma unroll
          for (int e = 0; e < kPart; e++) cell[e * a.plane2] = du[e];
        }
      }
      __syncthreads();
      const int h = j - kHalo;  // row of dx
      locate();
      if (busy && h >= 0 && h < height()) {
        int from = slot(i + a.step);  // row h in the ring
        if constexpr (kLast) {
          const int count = lx() < width() ? min(a.C - c(), V) : 0;
          A dx[V];
#pragma unroll
          for (int part = 0; part < V && count > 0; part += kPart) {
            forget(from);
            A sum[1][kPart];
            filter<kLast>(sum, taps + kTaps * kTaps, [&](A* v, int q, int kx) {
              const A* line = dus + slot(from + q) * a.pitch2 * kPiece<T> + granule(lx() + kx);
              read_pixel<T, kPart>(v, line + part / kPiece<T> * a.plane2, a.plane2);
            });
#pragma unroll
            for (int e = 0; e < kPart; e++) dx[part + e] = sum[0][e];
          }
          store_some<T>(a.out + offset<kLast>(a.C, n(), c(), a.H, a.W, row0() + h, col0() + lx()),
                        dx, a.vec_out, count, a.format);
        } else {
          // The thread's 16 bytes begin where memory's do, whatever the alignment of the row.
          T* out = a.out + offset<kLast>(a.C, n(), c0, a.H, a.W, row0() + h, col0());
          const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(out) / sizeof(T) % V);
          const int first = lx() * V - shift;
          if (first < width()) {
            int word[V];
#pragma unroll
            for (int e = 0; e < V; e++)
              word[e] = ((e - shift) & (V - 1)) * a.plane2 + lx() + (e < shift ? -1 : 0);
            A dx[1][V];
            filter<kLast>(dx, taps + kTaps * kTaps, [&](A* v, int q, int) {
              const A* line = dus + slot(from + q) * a.pitch2;
#pragma unroll
              for (int e = 0; e < V + kHalo; e++) v[e] = line[word[e % V] + e / V];
            });
            if (first >= 0 && first + V <= width()) {
              int to = first;
              forget(to);  // else the compiler splits the store
              store_pack<T, V>(out + to, narrow<T, V>(dx[0], a.format));
            } else {
#pragma unroll
              for (int e = 0; e < V; e++) edges[(2 * row + (first >= 0)) * V + e] = dx[0][e];
            }
          }
        }
      }
      __syncthreads();
      // NCHW: what lies beside the whole 16 bytes of a row, together with its neighbours.
      for (int t = threadIdx.x; !kLast && t < 2 * V * a.step; t += blockDim.x) {
        const int r = j - row + t / (2 * V) - kHalo;
        if (r < 0 || r >= height()) continue;
        T* out = a.out + offset<kLast>(a.C, n(), c0, a.H, a.W, row0() + r, col0());
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(out) / sizeof(T) % V);
        const bool right = t / V % 2;
        const int first = (right ? (width() + shift) / V * V : 0) - shift, col = first + t % V;
        if (right == (first >= 0) && col >= 0 && col < width())
          out[col] = from_acc<T>(edges[t], a.format);
      }
      locate();
    }
    if constexpr (kStored) sums.load(stored);
    sums.template reduce<kLanes>(scratch, 0, kPart);
    write_partials<T, kLast>(scratch, a, n(), c0, static_cast<int>(blockIdx.x) - n() * a.tiles);
  }
  finish<T>(a, a.groups * kStep);
}

}  // namespace
}  // namespace gankern
