// Filters of 4x4 taps at one rate on NCHW planes of any width, as upfirdn2d and synthesis_epilogue
// have them.
//
// A block walks down a strip of some planes, a step of rows at a time. Rows of the input are copied
// to shared memory as they are, by asynchronous copies of aligned packs, a step ahead. There rows
// lie a pitch apart that equals their length modulo a pack, so that they keep the alignment that
// they have in global memory, whatever it is; what belongs to the neighbours of a plane's columns
// is cleared by the thread that copied it. A thread has two columns (of float64 one); of each row
// it takes the sum along x once, and adds it to the three results below that wait for it in
// registers: no row is filtered twice, none is read twice but at a strip's ends. Result rows of odd
// length are stored through shared memory, in whole packs.
#pragma once

#include "lines_plan.cuh"

namespace gankern {
namespace {

// Where p lies in its 16 bytes.
template <typename T>
__device__ __forceinline__ int first_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T)) &
         (16 / static_cast<int>(sizeof(T)) - 1);
}

// A bit for each of the R rows from `row` on that is in [from, behind).
template <int R>
__device__ __forceinline__ unsigned rows_between(int row, int from, int behind) {
  const auto below = [row](int n) { return (1u << min(max(n - row, 0), R)) - 1; };
  return below(behind) & ~below(from);
}

// The packs that a thread copies of each step's R rows of an image: rows' alignment returns with
// every step.
template <typename T, int R>
struct LineCopies {
  static constexpr int V = 16 / static_cast<int>(sizeof(T));
  static constexpr int kCount = kLineCopies<T, R>;
  static_assert(V <= R && R <= 8, "else a pack's place differs from step to step");
  // Bytes from the stage on << 16, elements to be cleared << 8, kExists, kInside if some of it is
  // of the image, and its row; 0: there is none.
  unsigned what[kCount];
  static constexpr unsigned kRow = 7, kInside = 8, kExists = 16;

  // Columns [left, left + columns) of rows, the first of which begins at `begin` there.
  __device__ __forceinline__ void plan(const LineImage& m, const T* begin, int lane, int lanes,
                                       int left, int columns, int width) {
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = lane + k * lanes, q = quotient(i, m.magic);
      const int start = first_of(begin) + q * m.pitch;
      // From the begin of a sector on, if it is one in every step.
      const uintptr_t there = reinterpret_cast<uintptr_t>(begin + static_cast<int64_t>(q) * width);
      const int at = (start & -V) + (i - q * m.packs) * V - (there & 16 ? V : 0);
      const int c = at - start;
      // A bit for each of the pack's elements: of [c, c + V), those in [from, behind).
      const auto those = [c](int from, int behind) {
        const auto below = [](int n) { return (1u << min(max(n, 0), V)) - 1; };
        return below(behind - c) & ~below(from - c);
      };
      const unsigned wanted = those(0, columns), inside = wanted & those(-left, width - left);
      what[k] = 0;
      if (i >= R * m.packs || !wanted) continue;
      what[k] = at * static_cast<int>(sizeof(T)) << 16 | (wanted & ~inside) << 8 | kExists |
                (inside ? kInside : 0u) | q;
    }
  }
  // Whether packs of a plane may reach beyond the tensor.
  static __device__ __forceinline__ bool near_end(int64_t plane, int64_t planes, int h, int w) {
    const int64_t area = static_cast<int64_t>(h) * w;
    return plane * area < V || (planes - 1 - plane) * area < V;
  }
  __device__ __forceinline__ void none() {
#pragma unroll
    for (unsigned& w : what) w = 0;
  }
  // To and from shared memory, where a thread's words lie `lanes` apart.
  __device__ __forceinline__ void keep(unsigned* to, int lanes) const {
#pragma unroll
    for (int k = 0; k < kCount; k++) to[k * lanes] = what[k];
  }
  __device__ __forceinline__ void find(const unsigned* kept, int lanes) {
#pragma unroll
    for (int k = 0; k < kCount; k++) what[k] = kept[k * lanes];
  }
  // rows: a bit for each that the image has, of `width` columns; row: column `left` of the first of
  // them; careful: see near_end().
  __device__ __forceinline__ void copy(const LineImage& m, T* stage, const T* row, int width,
                                       unsigned rows, bool careful, const T* begin,
                                       const T* end) const {
    // Where the stage's begin would be, and what a row of the image is longer: whole packs.
    const uintptr_t base = reinterpret_cast<uintptr_t>(row) & ~uintptr_t(15);
    const int64_t longer = static_cast<int64_t>(width - m.pitch) * static_cast<int>(sizeof(T));
    const auto each = [&](auto f) {
#pragma unroll
      for (int k = 0; k < kCount; k++) {
        const unsigned w = what[k];
        if (w)
          f(reinterpret_cast<T*>(reinterpret_cast<char*>(stage) + (w >> 16)),
            reinterpret_cast<const T*>(base + (w >> 16) + longer * (w & kRow)),
            (w & kInside) && rows >> (w & kRow) & 1);
      }
    };
    if (!careful) {
      each([](T* to, const T* p, bool inside) { copy_pack<T, V>(to, p, inside); });
      return;
    }
    each([&](T* to, const T* p, bool inside) {
      if (inside && (p < begin || p + V > end)) {
#pragma unroll 1
        for (int e = 0; e < V; e++) to[e] = p + e >= begin && p + e < end ? p[e] : T{};
      } else {
        copy_pack<T, V>(to, p, inside);
      }
    });
  }
  // Clears what is not of the image in packs that have come.
  __device__ __forceinline__ void clear(T* stage) const {
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const unsigned w = what[k];
      if (!(w & 0xff00)) continue;
      for (int e = 0; e < V; e++)
        if (w >> (8 + e) & 1)
          reinterpret_cast<T*>(reinterpret_cast<char*>(stage) + (w >> 16))[e] = T{};
    }
  }
};

// A thread's columns, of `all`: neighbours where two are a word, else as far apart as there are
// lanes, so that lanes meet different banks. What is read for one that does not exist is another's.
template <typename T>
struct LineColumns {
  static constexpr int K = kLineColumns<T>;
  static constexpr bool kNeighbours = sizeof(T) == 2;
  int first, apart;
  __device__ __forceinline__ LineColumns(const LinePlan& m, int lane, int all)
      : first(kNeighbours ? lane * K : lane),
        apart(kNeighbours ? 1 : min(m.lanes, all - 1 - lane)) {}
  __device__ __forceinline__ int at(const LinePlan& m, int e) const {
    return first + e * (kNeighbours ? 1 : m.lanes);
  }
};

// What the filter meets of a row, kWide columns for each of a thread's, from the first of them on:
// from a stage of T, or from results of the filter.
template <typename T, int kWide>
struct LineWindow {
  using A = Acc<T>;
  using Columns = LineColumns<T>;
  static constexpr int K = Columns::K;
  A v[Columns::kNeighbours ? 1 : K][Columns::kNeighbours ? K + kWide - 1 : kWide];
  __device__ __forceinline__ A operator()(int e, int k) const {
    return Columns::kNeighbours ? v[0][e + k] : v[e][k];
  }
  __device__ __forceinline__ void read(const T* row, const Columns& columns, Format<T> format) {
    if constexpr (Columns::kNeighbours) {  // whole words, and from them the elements
      constexpr int N = K + kWide - 1, kWords = N / 2 + 1;
      const int shift = (first_of(row) & 1) * 16;
      unsigned w[kWords];
#pragma unroll
      for (int i = 0; i < kWords; i++) {
        w[i] = 0;
        if (i + 1 < kWords || N % 2 || shift)  // not what none of the elements lies in
          w[i] = *reinterpret_cast<const unsigned*>(row + (2 * i - shift / 16));
      }
#pragma unroll
      for (int i = 0; i < (N + 1) / 2; i++) {
        const uint64_t both = w[i] | static_cast<uint64_t>(i + 1 < kWords ? w[i + 1] : 0u) << 32;
        const unsigned pair = static_cast<unsigned>(both >> shift);
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2 && e < N; e++)
          v[0][e] = to_acc(Half16{static_cast<unsigned short>(e % 2 ? pair >> 16 : pair & 0xffff)},
                           format);
      }
    } else {
#pragma unroll
      for (int e = 0; e < K; e++)
#pragma unroll
        for (int k = 0; k < kWide; k++) v[e][k] = row[e * columns.apart + k];
    }
  }
  // Of numbers as the filter reckons with. They are aligned where columns are neighbours.
  __device__ __forceinline__ void read(const A* row, const Columns& columns) {
#pragma unroll
    for (int e = 0; e < (Columns::kNeighbours ? 1 : K); e++) {
      constexpr int N = Columns::kNeighbours ? K + kWide - 1 : kWide;
      constexpr int P = Columns::kNeighbours ? K : 1;
#pragma unroll
      for (int k = 0; k < N; k += P) {
        const auto pack = load_pack<A, P>(row + e * columns.apart + k);
#pragma unroll
        for (int j = 0; j < P && k + j < N; j++) v[e][k + j] = pack.v[j];
      }
    }
  }
};

// `length` neighbours from shared memory, which have the alignment there that they have at `to`, by
// thread i of `threads`: whole packs, and what lies beside them one by one.
template <typename T>
__device__ __forceinline__ void store_line(T* to, const T* s, int length, int i, int threads) {
  constexpr int P = 16 / static_cast<int>(sizeof(T));
  // From the begin of a sector on.
  const int low = static_cast<int>(reinterpret_cast<uintptr_t>(to) / sizeof(T)) & (2 * P - 1);
  int e = i * P - low;
  const unsigned packs = max(length - P + 1, 0);  // may begin before this
  to += e, s += e;
#pragma unroll 1
  for (; e < length; e += threads * P, to += threads * P, s += threads * P) {
    if (static_cast<unsigned>(e) < packs) {
      store_whole<T, P>(to, load_pack<T, P>(s));
    } else {
#pragma unroll
      for (int j = 0; j < P; j++)
        if (static_cast<unsigned>(e + j) < static_cast<unsigned>(length)) to[j] = s[j];
    }
  }
}

// Rows [lo, hi) of a step's results; first: where the step's first row begins, `width` the length
// of rows there, `columns` how many of them are stored.
template <typename T>
__device__ __forceinline__ void store_lines(const LinePlan& m, T* first, const T* outs, int lo,
                                            int hi, int width, int columns, int lane) {
  const T* s = outs + first_of(first);
  const auto row = [&](int q) {
    return first + uint64_t(static_cast<unsigned>(q)) * static_cast<unsigned>(width);
  };
  if (m.tiles_x == 1) {  // rows follow each other
    store_line(row(lo), s + lo * width, max(hi - lo, 0) * width, lane, m.lanes);
    return;
  }
  for (int q = lo + lane / 32; q < hi; q += m.lanes / 32)
    store_line(row(q), s + q * m.out_pitch, columns, lane % 32, 32);
}

constexpr int64_t kNoPlane = INT64_MIN;

// What belongs to a plane of a block.
template <typename T>
struct alignas(8) LineSlot {
  Acc<T> params[3];
  int careful;  // see LineCopies
  // Elements of the tensors where the strip's first rows begin; of the result kNoPlane.
  int64_t x, dy, out;
};
static_assert(sizeof(LineSlot<double>) <= kLineSlot, "a plan counts on it");

// The strip that a block makes. It lies in shared memory, since registers are short, and is read
// anew where it is needed.
struct LineStrip {
  int n, index, row0, col0, c0, end;  // end: behind the last channel
  int rows, columns;                  // of the result
  int all, steps;                     // rows of x
  int top, left, dy_top, dy_left;     // of the images
  // Backward: of dv, what is part of no other strip, all columns that exist, and those before them
  // that a result meets.
  int own_first, own_last, own_cols, dv_cols, before;
  template <typename T, typename Args>
  __device__ __forceinline__ void set(const Args& a, bool backward, int rows_of_step, T) {
    const LinePlan& m = a.lines;
    const int tiles = m.tiles_x * m.tiles_y, of_all = static_cast<int>(blockIdx.x) / tiles;
    index = static_cast<int>(blockIdx.x) - of_all * tiles;
    const int group = of_all / a.N;
    n = of_all - group * a.N;
    const int y = index / m.tiles_x;
    row0 = y * m.tile_h, col0 = (index - y * m.tiles_x) * m.tile_w;
    c0 = group * m.planes, end = min(c0 + m.planes, a.C);
    const int halo = backward ? kHalo : 0;
    rows = min(m.tile_h, (backward ? a.H : a.out_h) - row0);
    columns = min(m.tile_w, (backward ? a.W : a.out_w) - col0);
    all = rows + halo + kHalo;
    steps = (all + rows_of_step - 1) / rows_of_step;
    top = row0 - (backward ? kHalo : a.y0), left = col0 - (backward ? kHalo : a.x0);
    dy_top = top + a.y0 - kHalo, dy_left = left + a.x0;
    own_first = max(kHalo, -dy_top);
    own_last = min(row0 + m.tile_h < a.H ? m.tile_h + kHalo : all, a.out_h - dy_top);
    const int met = min(columns + halo, a.out_w - dy_left);
    before = backward ? columns_before<T>(dy_left) : 0;
    dv_cols = met - before;
    own_cols = (col0 + m.tile_w < a.W ? min(m.tile_w, met) : met) - before;
    left += before, dy_left += before;
  }
};

// A thread's place, in one register: its lane of a plane, what columns it has, and where the
// plane's share of shared memory is. Threads behind the last plane are lanes that none has.
struct LanePlace {
  unsigned packed;
  template <typename T>
  __device__ __forceinline__ LanePlace(const LinePlan& m, const LineStrip& strip, T) {
    const int t = static_cast<int>(threadIdx.x);
    const int plane = quotient(t, m.magic);
    const bool idle = plane >= m.planes;
    const int lane = idle ? kNoLane : t - plane * m.lanes;
    packed = lane | (idle ? 0u : plane * m.share / 16u) << 18;
    const LineColumns<T> columns(m, lane, m.across);
#pragma unroll
    for (int e = 0; e < columns.K; e++) {
      const int at = columns.at(m, e);
      if (at < strip.dv_cols) packed |= 1u << (12 + e);
      if (strip.dy_left + at >= 0 && at < strip.own_cols) packed |= 1u << (14 + e);
      if (at < strip.columns) packed |= 1u << (16 + e);
    }
    forget(packed);  // or a flag would be looked for in what it was made from
  }
  static constexpr int kNoLane = 4095;
  // Taken out anew each time: registers are short for these and for addresses made of them.
  __device__ __forceinline__ unsigned again() const {
    unsigned p = packed;
    forget(p);
    return p;
  }
  __device__ __forceinline__ int lane() const { return static_cast<int>(again() & 4095); }
  __device__ __forceinline__ int share() const { return static_cast<int>(again() >> 18 << 4); }
  // Whether its column e of dv exists; is part of no other strip; that of the result exists.
  __device__ __forceinline__ bool has(int e) const { return packed >> (12 + e) & 1; }
  __device__ __forceinline__ bool owns(int e) const { return packed >> (14 + e) & 1; }
  __device__ __forceinline__ bool stores(int e) const { return packed >> (16 + e) & 1; }
};

// Where a block has what in shared memory; share: where that of a plane begins.
template <typename T>
struct LineShared {
  char* shared;
  const LinePlan& m;
  __device__ __forceinline__ T* xs(int share, int turn) const {
    return reinterpret_cast<T*>(shared + (share + m.x.at + turn * m.x.stage));
  }
  __device__ __forceinline__ Acc<T>* dus(int share) const {
    return reinterpret_cast<Acc<T>*>(shared + (share + m.dus));
  }
  // A lane's sums lie m.lanes apart.
  __device__ __forceinline__ Acc<T>* sums(int share) const {
    return reinterpret_cast<Acc<T>*>(shared + (share + m.sums));
  }
  // The results of columns beyond all lanes' that wait for rows, kHalo of each.
  __device__ __forceinline__ Acc<T>* rests(int share) const {
    return reinterpret_cast<Acc<T>*>(shared + (share + m.rests));
  }
  // What the backward copies.
  __device__ __forceinline__ unsigned* copies(int share) const {
    return reinterpret_cast<unsigned*>(shared + (share + m.copies));
  }
  __device__ __forceinline__ T* outs(int share) const {
    return reinterpret_cast<T*>(shared + (share + m.outs));
  }
  __device__ __forceinline__ Acc<T>* noises() const {
    return reinterpret_cast<Acc<T>*>(shared + m.noises);
  }
  __device__ __forceinline__ LineSlot<T>& slot(int share) const {
    return *reinterpret_cast<LineSlot<T>*>(shared + share);
  }
};

// y = op(filter(x)). Op: param(n, c, which) is a parameter of a channel; copy_noise(shared, strip,
// me, row) begins to copy the noise of the step from that row on, and have_noise(shared, me) makes
// numbers of what has come; finish(u, params, read, z) makes results of filtered samples and, once
// read() has read it, their noise. kUnroll: rows at a time.
template <typename T, int kUnroll, typename Args, typename Op>
__device__ __forceinline__ void filter_lines(const Args& a, const Op op) {
  using A = Acc<T>;
  constexpr int K = kLineColumns<T>, R = kLineRows<T>;
  using Copies = LineCopies<T, R>;
  GK_DYNAMIC_SHARED(char, shared);
  __shared__ Taps<A> taps;
  __shared__ LineStrip in_shared;
  const volatile LineStrip& strip = in_shared;
  const LinePlan& m = a.lines;
  const LineShared<T> s{shared, m};
  if (threadIdx.x == 0) in_shared.set(a, false, R, T{});
  __syncthreads();

  const LanePlace me(m, in_shared, T{});
  Copies copies;
  const auto noises = [&](int step) { return s.noises() + step % 2 * R * m.across; };
  const auto begin = [&](int step) {
    const int share = me.share(), lane = me.lane();
    LineSlot<T>& slot = s.slot(share);
    int64_t x;
    bool careful;
    if (step == 0) {
      const int c = strip.c0 + quotient(thread_again(), m.magic);
      const int64_t plane = static_cast<int64_t>(strip.n) * a.C + c;
      careful = Copies::near_end(plane, static_cast<int64_t>(a.N) * a.C, a.H, a.W);
      x = (plane * a.H + strip.top) * a.W + strip.left;
      copies.plan(m.x, a.x + x, lane, m.lanes, strip.left, m.across + kHalo, a.W);
      if (c >= strip.end) copies.none();
      if (lane < 3 && c < strip.end) slot.params[lane] = op.param(strip.n, c, lane);
      if (lane == 3) {
        slot.x = x, slot.careful = careful;
        slot.out = c < strip.end ? (plane * a.out_h + strip.row0 - kHalo) * a.out_w + strip.col0
                                 : kNoPlane;
      }
    } else {
      x = slot.x + static_cast<int64_t>(step * R) * a.W;
      careful = slot.careful;
    }
    copies.copy(m.x, s.xs(share, step % 2), a.x + x, a.W,
                rows_between<R>(strip.top + step * R, 0, min(a.H, strip.top + strip.all)), careful,
                a.x, a.x_end);
    op.copy_noise(noises(step), strip, me, step * R);
  };
  begin(0);
  copy_batch();
  if (threadIdx.x < 32) share_taps<A>(&taps, nullptr, a);

  const auto walk = [&](Format<T> format) {
    A waiting[kHalo][K] = {};
#pragma unroll 1
    for (int step = 0;; step++) {
      copy_wait<0>();
      copies.clear(s.xs(me.share(), step % 2));
      if (step < strip.steps) op.have_noise(noises(step), me);
      __syncthreads();
      if (m.out_stage && step > 0) {  // the results of the step before
        const int row = (step - 1) * R, o = row - kHalo;
        const int64_t out = s.slot(me.share()).out;
        if (out != kNoPlane)
          store_lines(m, a.out + (out + static_cast<int64_t>(row) * a.out_w), s.outs(me.share()),
                      max(0, -o), min(R, strip.rows - o), a.out_w, strip.columns, me.lane());
      }
      if (step == strip.steps) break;
      if (step + 1 < strip.steps) {
        begin(step + 1);
      } else {
        copies.none();
      }
      copy_batch();
      if (m.out_stage) __syncthreads();  // the results before are on their way
      const LineSlot<T>& slot = s.slot(me.share());
      const int64_t out = slot.out;
      const LineColumns<T> columns(m, me.lane(), strip.dv_cols);
      if (out != kNoPlane && me.stores(0)) {
        const A params[3] = {slot.params[0], slot.params[1], slot.params[2]};
        const T* const stage = s.xs(me.share(), step % 2) + first_of(a.x + slot.x) + columns.first;
        T* to = a.out + (out + static_cast<int64_t>(step * R) * a.out_w);
        T* kept = s.outs(me.share()) + first_of(to) + columns.first;
        to += columns.first;
        const int rows = strip.rows, o0 = step * R - kHalo;
        const A* noise = noises(step) + columns.first;
        with_taps<(kUnroll > 1)>(taps, [&](auto filter) {
          const auto walk_rows = [&](auto whole, auto stores) {
            const T* row = stage;
#pragma unroll kUnroll
            for (int q = 0; q < R; q++) {
              LineWindow<T, kTaps> window;
              window.read(row, columns, format);
              A u[K];
              filter(waiting, window, u);
              if (decltype(whole)::value ||
                  static_cast<unsigned>(o0 + q) < static_cast<unsigned>(rows)) {
                LineWindow<T, 1> z;
                op.finish(u, params, [&] { z.read(noise, columns); }, z);
                const Pack<T, K> result = narrow<T, K>(u, format);
                if constexpr (decltype(stores)::value && sizeof(T) == 2) {
                  store_pack<T, K>(to, result);
                } else {
#pragma unroll
                  for (int e = 0; e < K; e++)
                    if (e == 0 || me.stores(e))
                      (decltype(stores)::value ? to : kept)[e * columns.apart] = result.v[e];
                }
              }
              row += m.x.pitch, noise += m.across;
              if constexpr (decltype(stores)::value)
                to += a.out_w;
              else
                kept += m.out_pitch;
            }
          };
          const bool whole = o0 >= 0 && o0 + R <= rows;
          if (m.out_stage)
            whole ? walk_rows(std::true_type{}, std::false_type{})
                  : walk_rows(std::false_type{}, std::false_type{});
          else
            whole ? walk_rows(std::true_type{}, std::true_type{})
                  : walk_rows(std::false_type{}, std::true_type{});
        });
      }
    }
  };
  with_format(a.format, walk);
}

}  // namespace
}  // namespace gankern
