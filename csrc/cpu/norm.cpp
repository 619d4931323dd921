// rms_norm and layer_norm (kCentred) in one source. A row comes from memory once and is read again from
// cache: forward reads x (and residual) and writes out (and sum), backward reads dout, x (and dsum) and
// writes dx.
#include "parallel.h"
#include "simd.h"

namespace palm::cpu::ISA {

constexpr int64_t kGrain = 32768;     // elements a thread takes at least: a few microseconds of work
constexpr int64_t kShortest = 16;     // rows a chunk: partial sums then take at most 1/16 of x,
constexpr int64_t kLongest = 512;     // and no float32 sum has over 512 terms one after the other
constexpr int64_t kMostChunks = 256;  // unless the rows are so many that chunks would be longer than kLongest

// Lanes from n on become 0.
template <class V>
PALM_INLINE V first(V v, int64_t n) {
  decltype(v < v) index;
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  for (int i = 0; i < lanes; ++i) index[i] = i;
  return index < decltype(index[0] + index[0])(n) ? v : V{};
}

template <class C, int N>
struct Sums {
  C of[N];
};

// The N sums to which f(col, n, sums) adds the vectors of a row, in four chains so that adds overlap.
template <class E, int N, class F>
PALM_INLINE Sums<typename Of<E>::C, N> fold(int64_t cols, F&& f) {
  typename Of<E>::V a[N] = {}, b[N] = {}, c[N] = {}, d[N] = {};
  constexpr int64_t w = W<E>;
  int64_t i = 0;
  for (; i + 4 * w <= cols; i += 4 * w) {
    f(i, w, a);
    f(i + w, w, b);
    f(i + 2 * w, w, c);
    f(i + 3 * w, w, d);
  }
  for (; i + w <= cols; i += w) f(i, w, a);
  if (i < cols) f(i, cols - i, b);
  Sums<typename Of<E>::C, N> sums;
  for (int k = 0; k < N; ++k) sums.of[k] = hsum((a[k] + b[k]) + (c[k] + d[k]));
  return sums;
}

// f(col, n) for the vectors of a row.
template <class E, class F>
PALM_INLINE void each(int64_t cols, F&& f) {
  int64_t i = 0;
  for (; i + W<E> <= cols; i += W<E>) f(i, int64_t(W<E>));
  if (i < cols) f(i, cols - i);
}

template <class C>
struct Statistics {
  C mean, rstd;
};

template <class E, bool kCentred>
PALM_INLINE Statistics<typename Of<E>::C> statistics(const E* x, int64_t cols, double eps) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  C mean = 0, variance;
  if constexpr (kCentred) {
    mean = fold<E, 1>(cols, [&](int64_t i, int64_t n, V* sum) { sum[0] += load(x + i, n); }).of[0] / C(cols);
    const V at = set1(mean);
    const auto moments = fold<E, 2>(cols, [&](int64_t i, int64_t n, V* sum) {
      const V c = first(load(x + i, n) - at, n);
      sum[0] += c;
      sum[1] += c * c;
    });
    // What rounding left of the mean is taken out of both: |mean| may be far above the deviation.
    const C left = moments.of[0] / C(cols);
    mean += left;
    variance = moments.of[1] / C(cols);
    variance -= left * left < variance ? left * left : C(0);
  } else {
    const auto add = [&](int64_t i, int64_t n, V* squares) {
      const V v = load(x + i, n);
      squares[0] += v * v;
    };
    variance = fold<E, 1>(cols, add).of[0] / C(cols);
  }
  if constexpr (sizeof(C) == 4) return {mean, 1 / __builtin_sqrtf(variance + C(eps))};
  return {mean, C(1 / __builtin_sqrt(variance + eps))};
}

template <class E, class G, bool kCentred>
static void fwd(const Norm& p) {
  using C = typename Of<E>::C;
  const G *weight = static_cast<const G*>(p.weight), *bias = static_cast<const G*>(p.bias);
  const auto offset = set1(C(p.offset));
  parallel_for(p.rows.count, p.cols < kGrain ? kGrain / (p.cols + 1) + 1 : 1, [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      const E* x = row<E>(p.rows, p.x, r);
      if (p.residual.data) {
        const E* residual = row<E>(p.rows, p.residual, r);
        E* sum = row<E>(p.rows, p.sum, r);
        each<E>(p.cols,
                [&](int64_t i, int64_t n) { store(sum + i, load(x + i, n) + load(residual + i, n), n); });
        x = sum;  // as stored: the norm is of the rounded sum
      }
      const auto [mean, rstd] = statistics<E, kCentred>(x, p.cols, p.eps);
      if (p.mean) static_cast<C*>(p.mean)[r] = mean;
      if (p.rstd) static_cast<C*>(p.rstd)[r] = rstd;
      E* out = row<E>(p.rows, p.out, r);
      const auto m = set1(mean), s = set1(rstd);
      each<E>(p.cols, [&](int64_t i, int64_t n) {
        auto v = load(x + i, n);
        if constexpr (kCentred) v -= m;
        v *= s;
        if (weight) v *= load(weight + i, n) + offset;
        if (bias) v += load(bias + i, n);
        store(out + i, v, n);
      });
    }
  });
}

// One row of backward, with x^ = (x - mean) rstd, h = dout gain: dx = rstd (h - mean h - x^ mean(h x^)) +
// dsum, dweight += dout x^, dbias += dout. dx may be the memory of dout, dsum or x.
template <class E, class G, bool kCentred>
PALM_INLINE void backward_row(const Norm& p, int64_t r, typename Of<E>::C* dweight,
                              typename Of<E>::C* dbias) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  const E *x = row<E>(p.rows, p.x, r), *dout = row<E>(p.rows, p.dout, r);
  const E* dsum = p.dsum.data ? row<E>(p.rows, p.dsum, r) : nullptr;
  const G* weight = static_cast<const G*>(p.weight);
  E* dx = row<E>(p.rows, p.dx, r);
  const V m = set1(kCentred ? static_cast<const C*>(p.mean)[r] : C(0));
  const V s = set1(static_cast<const C*>(p.rstd)[r]), offset = set1(C(p.offset));
  const auto normed = [&](int64_t i, int64_t n) {
    const V v = load(x + i, n);
    return kCentred ? (v - m) * s : v * s;
  };
  const auto slope = [&](V d, int64_t i, int64_t n) {
    return weight ? rounded(d * (load(weight + i, n) + offset)) : d;
  };
  const auto sums = fold<E, kCentred ? 3 : 1>(p.cols, [&](int64_t i, int64_t n, V* sum) {
    const V d = load(dout + i, n), h = slope(d, i, n), v = normed(i, n);
    sum[0] += h * v;
    if constexpr (kCentred) {
      sum[1] += h;
      sum[2] += first(v, n);
    }
    if (dweight) store(dweight + i, load(dweight + i, n) + d * v, n);
    if (dbias) store(dbias + i, load(dbias + i, n) + d, n);
  });
  C mean_hx = sums.of[0] / C(p.cols), mean_h = 0, mean_x = 0;
  if constexpr (kCentred) {  // mean_x is what rounding left of the saved mean: all but 0, and seen in rows of
                             // two
    mean_h = sums.of[1] / C(p.cols);
    mean_x = sums.of[2] / C(p.cols);
    mean_hx -= mean_x * mean_h;
  }
  const V h0 = set1(mean_h), x0 = set1(mean_x), slant = set1(mean_hx);
  each<E>(p.cols, [&](int64_t i, int64_t n) {
    V h = slope(load(dout + i, n), i, n), v = normed(i, n);
    if constexpr (kCentred) {
      h -= h0;
      v -= x0;
    }
    V d = s * (h - v * slant);
    if (dsum) d += load(dsum + i, n);
    store(dx + i, d, n);
  });
}

// Rows are summed in chunks, then the chunks in order: both depend on the shape only, so every thread count
// gives the same bits.
template <class E, class G, bool kCentred>
static void bwd(const Norm& p) {
  using C = typename Of<E>::C;
  const int64_t rows = p.rows.count, cols = p.cols;
  int64_t length = kGrain / (cols + 1) + 1;
  if (length < rows / kMostChunks) length = rows / kMostChunks;
  length = length < kShortest ? kShortest : length > kLongest ? kLongest : length;
  const int64_t chunks = (rows + length - 1) / length,
                width = cols * ((p.dweight ? 1 : 0) + (p.dbias ? 1 : 0));
  Scratch<C> partial(chunks * width);
  parallel_for(chunks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t chunk = lo; chunk < hi; ++chunk) {
      C* sums = partial + chunk * width;
      for (int64_t i = 0; i < width; ++i) sums[i] = 0;
      C *dweight = p.dweight ? sums : nullptr, *dbias = p.dbias ? sums + width - cols : nullptr;
      const int64_t end = (chunk + 1) * length < rows ? (chunk + 1) * length : rows;
      for (int64_t r = chunk * length; r < end; ++r) backward_row<E, G, kCentred>(p, r, dweight, dbias);
    }
  });
  const auto total = [&](G* to, const C* from) {
    parallel_for(to ? cols : 0, kGrain / (chunks + 1) + W<E>, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; i += W<E>) {
        auto sum = set1(C(0));
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load(from + chunk * width + i, hi - i);
        store(to + i, sum, hi - i);
      }
    });
  };
  total(static_cast<G*>(p.dweight), partial);
  total(static_cast<G*>(p.dbias), partial + width - cols);
}

// f(E{}, G{}): the element types of x and of the gain, which may be float beside 16-bit x.
template <class F>
PALM_INLINE int64_t with_dtypes(const Norm& p, F&& f) {
  with_dtype(p.dtype, [&](auto e) {
    if constexpr (sizeof(e) == 2)
      if (p.gain_dtype == Dtype::f32) return f(e, float{});
    f(e, e);
  });
  return -1;
}

int64_t rms_norm_fwd(const Norm& p) {
  return with_dtypes(p, [&](auto e, auto g) { fwd<decltype(e), decltype(g), false>(p); });
}
int64_t rms_norm_bwd(const Norm& p) {
  return with_dtypes(p, [&](auto e, auto g) { bwd<decltype(e), decltype(g), false>(p); });
}
int64_t layer_norm_fwd(const Norm& p) {
  return with_dtypes(p, [&](auto e, auto g) { fwd<decltype(e), decltype(g), true>(p); });
}
int64_t layer_norm_bwd(const Norm& p) {
  return with_dtypes(p, [&](auto e, auto g) { bwd<decltype(e), decltype(g), true>(p); });
}

}  // namespace palm::cpu::ISA
