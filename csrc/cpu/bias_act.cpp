// bias_act on the CPU: y = clamp(act(x + b) * gain), its gradient and the gradient's gradient.
//
// x is dense, seen as [outer, C, inner] in memory order. "Planes" (inner > 1) have one bias each;
// "rows" (inner == 1) run along C. The bias gradient is summed per thread share, then in order.
#include "act.h"

namespace gankern::cpu::GANKERN_ISA {
namespace {

enum Op : int { kFwd, kBwd, kBwd2 };

constexpr int64_t kGrain = 16384;  // elements a thread takes at least
constexpr int64_t kShares = 64;    // parts of outer whose bias gradients are summed apart

// in0 is x (kFwd) or dy; ref the reference; v the gradient of dx.
template <int kOp, bool kPwl, typename V, typename S>
GK_INLINE V element(V in0, V ref, V v, V bias, const ActArgs<S>& p) {
  if constexpr (kOp == kFwd) {
    V y = act_value<kPwl>(in0 + bias, p) * p.gain;
    if (p.clamp >= 0) {
      const V c = splat<V>(p.clamp);
      y = y > c ? c : y;
      y = y < -c ? -c : y;
    }
    return y;
  } else {
    V u = ref, a = ref * p.inv_gain, y = ref;
    if (p.from_x) {
      u = ref + bias;
      a = act_value<kPwl>(u, p);
      y = a * p.gain;
    }
    V d = in0 * p.gain;
    if constexpr (kOp == kBwd)
      d = d * act_slope<kPwl>(a, u, p);
    else
      d = in0 * v * act_curve(a, u, p);
    if (p.clamp >= 0) {
      const V c = splat<V>(p.clamp);
      d = (y > -c) & (y < c) ? d : V{};
    }
    return d;
  }
}

template <typename T>
struct Tensors {
  const T* in0;
  const T* ref;
  const T* v;
  T* out;
};

template <int kOp, bool kPwl, typename T>
GK_INLINE Vec<T> process(const Tensors<T>& t, int64_t i, Vec<T> bias, const ActArgs<Scalar<T>>& p) {
  const Vec<T> a = load(t.in0 + i);
  Vec<T> ref = a, v = a;
  if constexpr (kOp != kFwd) ref = load(t.ref + i);
  if constexpr (kOp == kBwd2) v = load(t.v + i);
  const Vec<T> out = element<kOp, kPwl>(a, ref, v, bias, p);
  store(t.out + i, out);
  return out;
}

template <int kOp, bool kPwl, typename T>
__attribute__((noinline)) Vec<T> process_part(const Tensors<T>& t, int64_t i, int64_t n,
                                              Vec<T> bias, const ActArgs<Scalar<T>>& p) {
  const Vec<T> a = load_part(t.in0 + i, n);
  Vec<T> ref = a, v = a;
  if constexpr (kOp != kFwd) ref = load_part(t.ref + i, n);
  if constexpr (kOp == kBwd2) v = load_part(t.v + i, n);
  Vec<T> out = element<kOp, kPwl>(a, ref, v, bias, p);
  store_part(t.out + i, out, n);
  for (int64_t j = n; j < kLanes; j++) out[j] = 0;
  return out;
}

// n elements from i on with one bias; returns their sum (kBwd).
template <int kOp, bool kPwl, typename T>
inline Scalar<T> run_of(const Tensors<T>& t, int64_t i, int64_t n, Vec<T> bias,
                        const ActArgs<Scalar<T>>& p) {
  Vec<T> sum{}, sum2{};
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
    sum += process<kOp, kPwl>(t, i + k, bias, p);
    sum2 += process<kOp, kPwl>(t, i + k + kLanes, bias, p);
  }
  for (; k + kLanes <= n; k += kLanes) sum += process<kOp, kPwl>(t, i + k, bias, p);
  if (k < n) sum += process_part<kOp, kPwl>(t, i + k, n - k, bias, p);
  return kOp == kBwd ? sum_lanes(sum + sum2) : Scalar<T>(0);
}

struct Shape {
  int64_t outer, C, inner;
};

// Forward and bwd2 of planes; plane by plane, or one plane cut into pieces.
template <int kOp, bool kPwl, typename T>
void planes(const Tensors<T>& t, const void* b, bool b_f32, Shape s, const ActArgs<Scalar<T>>& p) {
  if (!b) {
    const int64_t n = s.outer * s.C * s.inner;
    parallel((n + kLanes - 1) / kLanes, kGrain / kLanes, [&](int64_t begin, int64_t end) {
      const int64_t stop = end * kLanes < n ? end * kLanes : n;
      run_of<kOp, kPwl>(t, begin * kLanes, stop - begin * kLanes, Vec<T>{}, p);
    });
    return;
  }
  parallel(s.outer * s.C, kGrain / s.inner + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; plane++) {
      const Vec<T> bias = splat<Vec<T>>(load_param<T>(b, b_f32, plane % s.C));
      run_of<kOp, kPwl>(t, plane * s.inner, s.inner, bias, p);
    }
  });
}

// Backward of planes with db: one sum a plane, added up in order.
template <bool kPwl, typename T>
void planes_db(const Tensors<T>& t, const void* b, bool b_f32, void* db, Shape s,
               const ActArgs<Scalar<T>>& p) {
  Buffer<Scalar<T>> sums(s.outer * s.C);
  parallel(s.outer * s.C, kGrain / s.inner + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; plane++) {
      const Vec<T> bias = splat<Vec<T>>(b ? load_param<T>(b, b_f32, plane % s.C) : Scalar<T>(0));
      sums[plane] = run_of<kBwd, kPwl>(t, plane * s.inner, s.inner, bias, p);
    }
  });
  for (int64_t c = 0; c < s.C; c++) {
    double sum = 0;
    for (int64_t n = 0; n < s.outer; n++) sum += sums[n * s.C + c];
    store_param<T>(db, b_f32, c, static_cast<Scalar<T>>(sum));
  }
}

// Rows [begin, end) of C elements; sums, if given, gains the column sums.
template <int kOp, bool kPwl, typename T>
void rows(const Tensors<T>& t, const Scalar<T>* bias, Scalar<T>* sums, int64_t begin, int64_t end,
          int64_t C, const ActArgs<Scalar<T>>& p) {
  using V = Vec<T>;
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t n = C - c < kLanes ? C - c : kLanes;
    const V bias_c = !bias ? V{} : n < kLanes ? load_part(bias + c, n) : load(bias + c);
    V sum{};
    for (int64_t r = begin; r < end; r++)
      sum += n < kLanes ? process_part<kOp, kPwl>(t, r * C + c, n, bias_c, p)
                        : process<kOp, kPwl>(t, r * C + c, bias_c, p);
    if (sums)
      for (int64_t j = 0; j < n; j++) sums[c + j] += sum[j];
  }
}

// Rows in blocks that stay in cache; few channels are unrolled to whole vectors first.
template <int kOp, bool kPwl, typename T>
void rows_of(const Tensors<T>& t, const void* b, bool b_f32, void* db, Shape s,
             const ActArgs<Scalar<T>>& p) {
  using S = Scalar<T>;
  int64_t fold = 1;
  while ((s.C * fold) % kLanes && fold < kLanes && s.C * fold < 8 * kLanes) fold *= 2;
  const int64_t columns = s.C * fold, whole = s.outer / fold, left = s.outer % fold;
  Buffer<S> bias(columns), sums(db ? columns * (kShares + 1) : 0);
  if (b)
    for (int64_t i = 0; i < columns; i++) bias[i] = load_param<T>(b, b_f32, i % s.C);
  const int64_t share = (whole + kShares - 1) / kShares, block = 4096 / columns + 1;
  for (int64_t i = 0; db && i < columns * (kShares + 1); i++) sums[i] = 0;
  parallel(db ? kShares : whole, db ? kGrain / (share * columns + 1) + 1 : kGrain / columns + 1,
           [&](int64_t begin, int64_t end) {
             for (int64_t k = begin; k < (db ? end : begin + 1); k++) {
               const int64_t first = db ? k * share : begin;
               int64_t last = db ? first + share : end;
               if (last > whole) last = whole;
               for (int64_t r = first; r < last; r += block)
                 rows<kOp, kPwl>(t, b ? &bias[0] : nullptr, db ? &sums[k * columns] : nullptr, r,
                                 r + block < last ? r + block : last, columns, p);
             }
           });
  if (left) {
    const int64_t offset = whole * columns;
    const Tensors<T> rest{t.in0 + offset, t.ref ? t.ref + offset : nullptr,
                          t.v ? t.v + offset : nullptr, t.out + offset};
    rows<kOp, kPwl>(rest, b ? &bias[0] : nullptr, db ? &sums[kShares * columns] : nullptr, 0, left,
                    s.C, p);
  }
  if (!db) return;
  for (int64_t c = 0; c < s.C; c++) {
    double sum = 0;
    for (int64_t k = 0; k <= kShares; k++)
      for (int64_t j = c; j < columns; j += s.C) sum += sums[k * columns + j];
    store_param<T>(db, b_f32, c, static_cast<S>(sum));
  }
}

template <int kOp, bool kPwl, typename T>
void layout(const Tensors<T>& t, const void* b, bool b_f32, void* db, Shape s,
            const ActArgs<Scalar<T>>& p) {
  if (s.inner == 1 && s.C > 1 && (b || db)) {
    rows_of<kOp, kPwl>(t, b, b_f32, db, s, p);
  } else if constexpr (kOp == kBwd) {
    if (db)
      planes_db<kPwl>(t, b, b_f32, db, s, p);
    else
      planes<kOp, kPwl>(t, p.from_x ? b : nullptr, b_f32, s, p);
  } else {
    planes<kOp, kPwl>(t, b, b_f32, s, p);
  }
}

template <int kOp>
int run(int dtype, int bdtype, const void* in0, const void* ref, const void* v, const void* b,
        void* out, void* db, Shape s, int act, double alpha, double gain, double clamp,
        bool from_x) {
  if (s.outer * s.C * s.inner == 0) return 0;
  return by_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const double slope = act == kLinear ? 1 : act == kRelu ? 0 : alpha;
    ActArgs<S> p{act, S(slope), S(gain), gain == 0 ? S(0) : S(1 / gain), S(clamp), from_x};
    if (kOp != kFwd && !from_x) {  // y, as it was stored, meets the clamp as it was stored
      T stored;
      store1(&stored, p.clamp);
      p.clamp = load1(&stored);
    }
    const Tensors<T> t{static_cast<const T*>(in0), static_cast<const T*>(ref),
                       static_cast<const T*>(v), static_cast<T*>(out)};
    const bool b_f32 = bdtype == kF32;
    if (kOp != kBwd2 && act <= kLrelu)
      layout<kOp, true>(t, b, b_f32, db, s, p);
    else
      layout<kOp, false>(t, b, b_f32, db, s, p);
    return 0;
  });
}

}  // namespace

int bias_act(int dtype, int bdtype, const void* x, const void* b, void* y, int64_t outer, int64_t C,
             int64_t inner, int act, double alpha, double gain, double clamp, void*) {
  return run<kFwd>(dtype, bdtype, x, nullptr, nullptr, b, y, nullptr, {outer, C, inner}, act, alpha,
                   gain, clamp, false);
}

int64_t bias_act_bwd_workspace(int, int64_t, int64_t, int64_t) { return 0; }

int bias_act_bwd(int dtype, int bdtype, const void* dy, const void* ref, const void* b, void* dx,
                 void* db, void*, int64_t outer, int64_t C, int64_t inner, int act, double alpha,
                 double gain, double clamp, bool from_x, void*) {
  return run<kBwd>(dtype, bdtype, dy, ref, nullptr, b, dx, db, {outer, C, inner}, act, alpha, gain,
                   clamp, from_x);
}

int bias_act_bwd2(int dtype, int bdtype, const void* dy, const void* v, const void* ref,
                  const void* b, void* dref, int64_t outer, int64_t C, int64_t inner, int act,
                  double alpha, double gain, double clamp, bool from_x, void*) {
  return run<kBwd2>(dtype, bdtype, dy, ref, v, b, dref, nullptr, {outer, C, inner}, act, alpha,
                    gain, clamp, from_x);
}

}  // namespace gankern::cpu::GANKERN_ISA
