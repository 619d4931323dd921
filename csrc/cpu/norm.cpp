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

template <class C>
struct Statistics {
  C mean, rstd;
};

// Of the row whose vectors `read` gives the first time and `again` later. The mean is measured from `about`:
// one pass does where that is no farther from it than the deviation.
template <class E, bool kCentred, class Read, class Again>
PALM_INLINE Statistics<typename Of<E>::C> statistics(int64_t cols, double eps, typename Of<E>::C about,
                                                     Read&& read, Again&& again) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  C mean = 0, variance;
  if constexpr (kCentred) {
    const auto moments = [&](C from, auto&& get) {  // whether `from` was near enough
      const V at = set1(from);
      const auto sums = fold<E, 2>(cols, [&](int64_t i, int64_t n, V* sum) PALM_INLINED {
        const V c = first(get(i, n) - at, n);
        sum[0] += c;
        sum[1] += c * c;
      });
      const C left = sums.of[0] / C(cols), square = left * left;
      mean = from + left;
      variance = sums.of[1] / C(cols);
      const bool near = square <= C(0.5) * variance;
      variance -= square < variance ? square : C(0);
      return near;
    };
    if (!moments(about, read)) moments(mean, again);
  } else {
    const auto add = [&](int64_t i, int64_t n, V* squares) PALM_INLINED {
      const V v = read(i, n);
      squares[0] += v * v;
    };
    variance = fold<E, 1>(cols, add).of[0] / C(cols);
  }
  if constexpr (sizeof(C) == 4) return {mean, 1 / __builtin_sqrtf(variance + C(eps))};
  return {mean, C(1 / __builtin_sqrt(variance + eps))};
}

// One row of forward; row `next` is asked for while this one comes from cache, so that memory does not wait.
template <class E, class G, bool kCentred>
PALM_INLINE void forward_row(const Norm& p, int64_t r, int64_t next, bool streamed) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  const int64_t cols = p.cols;
  const E *x = row<E>(p.rows, p.x, r), *x_next = row<E>(p.rows, p.x, next);
  const E* residual = p.residual.data ? row<E>(p.rows, p.residual, r) : nullptr;
  const E* residual_next = residual ? row<E>(p.rows, p.residual, next) : x_next;
  E *sum = residual ? row<E>(p.rows, p.sum, r) : nullptr, *out = row<E>(p.rows, p.out, r);
  const G *weight = static_cast<const G*>(p.weight), *bias = static_cast<const G*>(p.bias);
  const E* s = residual ? sum : x;  // as stored: the norm is of the rounded sum
  const auto again = [=](int64_t i, int64_t n) PALM_INLINED { return load(s + i, n); };
  const auto total = [=](int64_t i, int64_t n) PALM_INLINED {
    const V v = load(x + i, n);
    return residual ? v + load(residual + i, n) : v;
  };
  const auto read = [=](int64_t i, int64_t n) PALM_INLINED {
    if (residual) store(sum + i, total(i, n), n);
    return load(s + i, n);
  };
  const int64_t few = cols < W<E> ? cols : W<E>;
  const C about = kCentred && cols ? hsum(total(0, few)) / C(few) : C(0);
  const auto [mean, rstd] = statistics<E, kCentred>(cols, p.eps, about, read, again);
  if (p.mean) static_cast<C*>(p.mean)[r] = mean;
  if (p.rstd) static_cast<C*>(p.rstd)[r] = rstd;
  const V m = set1(mean), scale = set1(rstd), offset = set1(C(p.offset));
  each<E>(cols, [=](int64_t i, int64_t n) PALM_INLINED {
    prefetch(x_next + i);
    prefetch(residual_next + i);
    V v = load(s + i, n);
    if constexpr (kCentred) v -= m;
    v *= scale;
    if (weight) v *= load(weight + i, n) + offset;
    if (bias) v += load(bias + i, n);
    put(out + i, v, n, streamed);
  });
}

template <class E, class G, bool kCentred>
static void fwd(const Norm& p) {
  const bool streamed = streams<E>(p.rows, p.out, p.cols, p.x, p.residual, p.sum);
  parallel_for(p.rows.count, p.cols < kGrain ? kGrain / (p.cols + 1) + 1 : 1, [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) forward_row<E, G, kCentred>(p, r, r + 1 < hi ? r + 1 : r, streamed);
    end_stream();
  });
}

// One row of backward, with x^ = (x - mean) rstd, h = dout gain: dx = rstd (h - mean h - x^ mean(h x^)) +
// dsum, dweight += dout x^, dbias += dout. dx may be the memory of dout, dsum or x. Row `next` is asked for
// as above.
template <class E, class G, bool kCentred>
PALM_INLINE void backward_row(const Norm& p, int64_t r, int64_t next, bool streamed,
                              typename Of<E>::C* dweight, typename Of<E>::C* dbias) {
  using C = typename Of<E>::C;
  using V = typename Of<E>::V;
  const E *x = row<E>(p.rows, p.x, r), *dout = row<E>(p.rows, p.dout, r);
  const E *x_next = row<E>(p.rows, p.x, next), *dout_next = row<E>(p.rows, p.dout, next);
  const E* dsum = p.dsum.data ? row<E>(p.rows, p.dsum, r) : nullptr;
  const G* weight = static_cast<const G*>(p.weight);
  E* dx = row<E>(p.rows, p.dx, r);
  const V m = set1(kCentred ? static_cast<const C*>(p.mean)[r] : C(0));
  const V s = set1(static_cast<const C*>(p.rstd)[r]), offset = set1(C(p.offset));
  const auto normed = [&](int64_t i, int64_t n) PALM_INLINED {
    const V v = load(x + i, n);
    return kCentred ? (v - m) * s : v * s;
  };
  const auto slope = [&](V d, int64_t i, int64_t n) {
    return weight ? rounded(d * (load(weight + i, n) + offset)) : d;
  };
  const auto sums = fold<E, kCentred ? 3 : 1>(p.cols, [&](int64_t i, int64_t n, V* sum) PALM_INLINED {
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
  each<E>(p.cols, [&](int64_t i, int64_t n) PALM_INLINED {
    prefetch(x_next + i);
    prefetch(dout_next + i);
    V h = slope(load(dout + i, n), i, n), v = normed(i, n);
    if constexpr (kCentred) {
      h -= h0;
      v -= x0;
    }
    V d = s * (h - v * slant);
    if (dsum) d += load(dsum + i, n);
    put(dx + i, d, n, streamed);
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
  const bool streamed = streams<E>(p.rows, p.dx, cols, p.x, p.dout, p.dsum);
  parallel_for(chunks, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t chunk = lo; chunk < hi; ++chunk) {
      C* sums = partial + chunk * width;
      for (int64_t i = 0; i < width; ++i) sums[i] = 0;
      C *dweight = p.dweight ? sums : nullptr, *dbias = p.dbias ? sums + width - cols : nullptr;
      const int64_t end = (chunk + 1) * length < rows ? (chunk + 1) * length : rows;
      for (int64_t r = chunk * length; r < end; ++r)
        backward_row<E, G, kCentred>(p, r, r + 1 < rows ? r + 1 : r, streamed, dweight, dbias);
    }
    end_stream();
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
