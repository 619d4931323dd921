// cross_entropy, linear_cross_entropy's rows: forward reads the logits once (online, by blocks that stay in
// the first cache), backward once more. Row scalars are double; every row is summed in one order, whatever
// the thread.
#include "parallel.h"
#include "simd.h"

namespace palm::cpu::ISA {

constexpr int64_t kBlock = 1024;   // logits a block: its maximum is found first, its exponentials from cache
constexpr int64_t kGrain = 16384;  // logits a thread takes at least
constexpr int64_t kCut = 32768;    // columns a task of backward takes at most

template <class C>
constexpr C kLargest = C(sizeof(C) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308);

// v with `fill` from lane n on.
template <class V, class C>
PALM_INLINE V first_lanes(V v, int64_t n, C fill) {
  for (int64_t i = n; i < int64_t(sizeof(V) / sizeof(C)); ++i) v[i] = fill;
  return v;
}

// One row's kept target: y, token weight t, class weight w_y.
struct Label {
  int64_t y;
  double t, w;
};

// False where the row is ignored, or its target bad: then it is reported, and nothing of it may be read.
template <class C>
static bool read_label(const CrossEntropy& p, int64_t r, Label& label, FirstBad& bad) {
  label.y = *row<int64_t>(p.rows, p.target, r);
  if (label.y == p.ignore_index) return false;
  if (label.y < 0 || label.y >= p.cols) {
    bad.report(r);
    return false;
  }
  label.t = p.token_weight.data ? *row<C>(p.rows, p.token_weight, r) : 1;
  label.w = p.weight ? static_cast<const C*>(p.weight)[label.y] : 1;
  return true;
}

// sum_c w_c, in four chains.
template <class C>
static double sum_weights(const CrossEntropy& p) {
  const C* w = static_cast<const C*>(p.weight);
  if (!w || !p.label_smoothing) return double(p.cols);
  double sum[4] = {};
  for (int64_t c = 0; c < p.cols; ++c) sum[c % 4] += w[c];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// max of `low` and the logits, NaN left aside.
template <class E, class C = typename Of<E>::C>
static C block_top(const E* x, int64_t n, C scale, C low) {
  using V = typename Of<E>::V;
  V top[4] = {set1(low), set1(low), set1(low), set1(low)};
  int64_t i = 0;
  for (; i + 4 * W<E> <= n; i += 4 * W<E>)
    for (int u = 0; u < 4; ++u) top[u] = vmax(load(x + i + u * W<E>) * set1(scale), top[u]);
  for (; i + W<E> <= n; i += W<E>) top[0] = vmax(load(x + i) * set1(scale), top[0]);
  if (i < n) top[0] = vmax(first_lanes(load(x + i, n - i) * set1(scale), n - i, low), top[0]);
  return hmax(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));
}

// sum of exp(z - top), by lanes; the next block is asked for meanwhile.
template <class E, class C = typename Of<E>::C, class V = typename Of<E>::V>
static V block_sum(const E* x, int64_t n, C scale, C top) {
  V sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * W<E> <= n; i += 2 * W<E>)
    for (int u = 0; u < 2; ++u) {
      prefetch(x + kBlock + i + u * W<E>);
      sum[u] += vexp_term(load(x + i + u * W<E>) * set1(scale) - set1(top));
    }
  for (; i + W<E> <= n; i += W<E>) sum[0] += vexp_term(load(x + i) * set1(scale) - set1(top));
  if (i < n) {
    const V z = first_lanes(load(x + i, n - i) * set1(scale), n - i, -C(__builtin_inf()));
    sum[0] += vexp_term(z - set1(top));
  }
  return sum[0] + sum[1];
}

// sum of w_c (pivot - z_c).
template <class E, class C = typename Of<E>::C>
static double block_gap(const E* x, const C* w, int64_t n, C scale, C pivot) {
  typename Of<E>::V sum{};
  int64_t i = 0;
  for (; i + W<E> <= n; i += W<E>) {
    const auto gap = set1(pivot) - load(x + i) * set1(scale);
    sum += w ? gap * load(w + i) : gap;
  }
  if (i < n) {
    const auto gap = first_lanes(set1(pivot) - load(x + i, n - i) * set1(scale), n - i, C(0));
    sum += w ? gap * load(w + i, n - i) : gap;
  }
  return hsum(sum);
}

struct Normalizer {
  double top, log_sum;  // lse = top + log_sum
  double gap;           // sum_c w_c (lse - z_c), where smoothing asks for it
};

// The running maximum is kept finite, so that neither -inf - -inf nor inf - inf arises: a row of -inf has
// lse -inf, one +inf makes it +inf.
template <class E, class C = typename Of<E>::C>
static Normalizer normalize(const CrossEntropy& p, const E* x, double weight_sum) {
  const C scale = C(p.logit_scale);
  const C* w = static_cast<const C*>(p.weight);
  C top = -kLargest<C>, pivot = 0;
  typename Of<E>::V sum{};
  double gap = 0;
  for (int64_t c = 0; c < p.cols; c += kBlock) {
    const int64_t n = p.cols - c < kBlock ? p.cols - c : kBlock;
    C higher = block_top(x + c, n, scale, top);
    if (higher > kLargest<C>) higher = kLargest<C>;
    if (higher > top) {
      sum *= vexp(set1(top - higher));
      top = higher;
    }
    sum += block_sum(x + c, n, scale, top);
    if (!p.label_smoothing) continue;
    if (c == 0 && top > -kLargest<C>) pivot = top;  // near the logits: differences keep their digits
    gap += block_gap(x + c, w ? w + c : nullptr, n, scale, pivot);
  }
  const double log_sum = __builtin_log(double(hsum(sum)));
  return {top, log_sum, gap + weight_sum * (log_sum + (double(top) - pivot))};
}

struct RowLoss {
  double loss, z;
};

template <class E>
static RowLoss row_loss(const CrossEntropy& p, const E* x, const Label& label, const Normalizer& q) {
  const double eps = p.label_smoothing, lse = q.top + q.log_sum;
  const double target = typename Of<E>::C(p.logit_scale) * load1(x + label.y);
  double loss = (1 - eps) * label.w * (q.log_sum + (q.top - target));
  if (eps) loss += eps / double(p.cols) * q.gap;
  const double z = p.z_loss ? label.t * p.z_loss * label.w * lse * lse : 0;
  return {label.t * loss + z, z};
}

// dx_c = a p_c - b w_c - d [c = y] over columns [begin, end); dx may be x.
// a = g t ((1-eps) w_y + eps/V sum w + 2 z_loss w_y lse), b = g t eps/V, d = g t (1-eps) w_y, g = dloss
// logit_scale.
template <class E, class C = typename Of<E>::C>
static void gradient(const CrossEntropy& p, const E* x, E* dx, const Label& label, double g, C lse,
                     double weight_sum, int64_t begin, int64_t end, bool streamed) {
  const double eps = p.label_smoothing, gt = g * label.t * p.logit_scale;
  double slope = (1 - eps) * label.w + eps / double(p.cols) * weight_sum;
  if (p.z_loss) slope += 2 * p.z_loss * label.w * double(lse);
  const C* w = static_cast<const C*>(p.weight);
  const auto a = set1(C(gt * slope)), b = set1(C(gt * eps / double(p.cols))), scale = set1(C(p.logit_scale));
  const auto at = [&](int64_t c, int64_t n) PALM_INLINED {
    const auto v = a * vexp_term(load(x + c, n) * scale - set1(lse));
    return eps == 0 ? v : w ? v - b * load(w + c, n) : v - b;
  };
  const bool here = begin <= label.y && label.y < end;
  const auto at_target = here ? at(label.y, 1) - set1(C(gt * (1 - eps) * label.w)) : a;
  each<E>(end - begin,
          [&](int64_t i, int64_t n) PALM_INLINED { put(dx + begin + i, at(begin + i, n), n, streamed); });
  if (here) store(dx + label.y, at_target, 1);
}

template <class E>
static void clear(E* dx, int64_t begin, int64_t end) {
  memset(static_cast<void*>(dx + begin), 0, (end - begin) * sizeof(E));
}

// Row losses, or their sum (in row order) times scale = 1 / sum of t w_y (mean; 1 where that is 0).
template <class E, class C = typename Of<E>::C>
static int64_t fwd(const CrossEntropy& p) {
  const bool none = p.reduction == Reduction::none;
  const double weight_sum = sum_weights<C>(p);
  FirstBad bad;
  Scratch<double> terms(none ? 0 : 3 * p.rows.count);  // loss, z, t w_y of each row
  parallel_for(p.rows.count, 1 + kGrain / (p.cols + 1), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      Label label{};
      RowLoss l{};
      double lse = 0;
      if (read_label<C>(p, r, label, bad)) {
        const E* x = row<E>(p.rows, p.logits, r);
        const Normalizer q = normalize(p, x, weight_sum);
        l = row_loss(p, x, label, q);
        lse = q.top + q.log_sum;
      }
      *row<C>(p.rows, p.lse, r) = C(lse);
      if (none) {
        *row<C>(p.rows, p.loss, r) = C(l.loss);
        *row<C>(p.rows, p.z, r) = C(l.z);
      } else {
        terms[3 * r] = l.loss, terms[3 * r + 1] = l.z, terms[3 * r + 2] = label.t * label.w;
      }
    }
  });
  double loss = 0, z = 0, total = 0;
  for (int64_t r = 0; r < (none ? 0 : p.rows.count); ++r)
    loss += terms[3 * r], z += terms[3 * r + 1], total += terms[3 * r + 2];
  const double scale = p.reduction == Reduction::mean && total != 0 ? 1 / total : 1;
  *static_cast<C*>(p.scale) = C(scale);
  if (!none) {
    *static_cast<C*>(p.loss.data) = C(loss * scale);
    *static_cast<C*>(p.z.data) = C(z * scale);
  }
  return bad.result();
}

template <class E, class C = typename Of<E>::C>
static int64_t bwd(const CrossEntropy& p) {
  const double weight_sum = sum_weights<C>(p), scale = *static_cast<const C*>(p.scale);
  const int64_t cuts = (p.cols + kCut - 1) / kCut;
  const bool streamed = streams<E>(p.rows, p.dlogits, p.cols, p.logits);
  FirstBad bad;
  parallel_for(p.rows.count * cuts, 1 + kGrain / (p.cols + 1), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t r = i / cuts, begin = i % cuts * kCut,
                    end = p.cols - begin < kCut ? p.cols : begin + kCut;
      E* dx = row<E>(p.rows, p.dlogits, r);
      Label label;
      if (!read_label<C>(p, r, label, bad)) {
        clear(dx, begin, end);
        continue;
      }
      const double g = double(*row<C>(p.rows, p.dloss, r)) * scale;
      gradient(p, row<E>(p.rows, p.logits, r), dx, label, g, *row<C>(p.rows, p.lse, r), weight_sum, begin,
               end, streamed);
    }
    end_stream();
  });
  return bad.result();
}

// Row losses, and the gradient in the logits' place while the row is in cache.
template <class E, class C = typename Of<E>::C>
static int64_t rows_in_place(const CrossEntropy& p) {
  const double weight_sum = sum_weights<C>(p);
  FirstBad bad;
  parallel_for(p.rows.count, 1 + kGrain / (p.cols + 1), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      E* x = row<E>(p.rows, p.logits, r);
      Label label{};
      RowLoss l{};
      if (read_label<C>(p, r, label, bad)) {
        const Normalizer q = normalize(p, x, weight_sum);
        l = row_loss(p, x, label, q);
        const double g = p.dloss.data ? double(*row<C>(p.rows, p.dloss, r)) : 1;
        if (p.gradient) gradient(p, x, x, label, g, C(q.top + q.log_sum), weight_sum, 0, p.cols, false);
      } else if (p.gradient) {
        clear(x, 0, p.cols);
      }
      *row<C>(p.rows, p.loss, r) = C(l.loss);
      *row<C>(p.rows, p.z, r) = C(l.z);
      *row<C>(p.rows, p.row_weight, r) = C(label.t * label.w);
    }
  });
  return bad.result();
}

int64_t cross_entropy_fwd(const CrossEntropy& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = fwd<decltype(e)>(p); });
  return bad;
}

int64_t cross_entropy_bwd(const CrossEntropy& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = bwd<decltype(e)>(p); });
  return bad;
}

int64_t linear_cross_entropy_rows(const CrossEntropy& p) {
  int64_t bad = -1;
  with_dtype(p.dtype, [&](auto e) { bad = rows_in_place<decltype(e)>(p); });
  return bad;
}

}  // namespace palm::cpu::ISA
