// Attention forward and backward (Dao 2022, algorithms 1 and 4, in the form that suits one K/V head under
// many query heads).
//
// Scores are held transposed, S^T[key][query]: lanes are queries, so maximum, sum, mask and exp are vertical,
// and P^T is already the packed left operand of P V. Gradients: see reference.py.
#include "attention.h"

namespace palm::cpu::ISA {

// ---- forward ----

constexpr int kForwardPanels =
    2;  // 96 rows of queries (AVX-512): within 3 % for 1 to 2 panels and 192 to 512 keys
constexpr int kForwardKeys = 144;

// Online softmax of one panel of scores [count][MP]: exponentials in place, m and l updated, alpha = the
// factor of what was before.
template <class C>
static void softmax_panel(C* scores, int64_t count, bool masked, const C* position, const C* bias,
                          const C* lo, const C* hi, C* m, C* l, C* alpha) {
  using T = Tile<C>;
  using V = typename T::V;
  const V none = set1(C(-__builtin_inf()));
  V top[3], old[3], sum[3] = {}, low[3], high[3];
  for (int j = 0; j < 3; ++j) {
    top[j] = old[j] = load(m + j * T::L);
    low[j] = load(lo + j * T::L);
    high[j] = load(hi + j * T::L);
  }
  for (int64_t n = 0; n < count; ++n) {
    const V here = set1(position[n]), add = bias ? set1(bias[n]) : V{};
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      V s = load(scores + n * T::MP + j * T::L);
      if (bias) s += add;
      if (masked) s = (low[j] <= here) & (here <= high[j]) ? s : none;
      if (bias || masked) store(scores + n * T::MP + j * T::L, s);
      top[j] = vmax(top[j], s);
    }
  }
  V base[3];
  for (int j = 0; j < 3; ++j)
    base[j] = top[j] == none ? V{} : top[j];  // nothing visible yet: exp(-inf - 0) = 0
  for (int64_t n = 0; n < count; ++n) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      C* s = scores + n * T::MP + j * T::L;
      const V e = vexp_softmax(load(s) - base[j]);
      store(s, e);
      sum[j] += e;
    }
  }
  for (int j = 0; j < 3; ++j) {
    const V factor = vexp_softmax(old[j] - base[j]);
    store(alpha + j * T::L, factor);
    store(l + j * T::L, load(l + j * T::L) * factor + sum[j]);
    store(m + j * T::L, top[j]);
  }
}

// A thread's buffers for one tile.
template <class C>
struct ForwardState {
  static constexpr int M = kForwardPanels * Tile<C>::MP;
  Scratch<C> queries, out, scores, m, l, alpha;
  RowPlan<C> plan;
  ForwardState(int64_t D, int64_t width)
      : queries(M * D), out(M * width), scores(kForwardKeys * Tile<C>::MP), m(M), l(M), alpha(M), plan(M) {}
};

template <class E, class C = typename Of<E>::C>
static void forward_tile(const Keys<C>& keys, const Packed<E>& K, const Packed<E>& V, int64_t tile,
                         int64_t kh, ForwardState<C>& w) {
  using T = Tile<C>;
  const Attention& p = keys.p;
  const RowTile<E> rows(keys, tile, kh, w.M, w.plan);
  const Sequence& s = rows.s;
  rows.columns(p.q, C(p.scale), nullptr, w.queries);
  for (int i = 0; i < w.M; ++i) w.m[i] = C(-__builtin_inf()), w.l[i] = 0;
  const C *position = keys.position + s.keys, *bias = p.key_bias ? keys.bias + s.keys : nullptr;
  for (int64_t n0 = rows.n_begin; n0 < rows.n_end; n0 += kForwardKeys) {
    const int64_t nn = least(kForwardKeys, rows.n_end - n0);
    for (int64_t panel = 0; panel < rows.panels(); ++panel) {
      const int64_t at = panel * T::MP;
      for (int64_t n = 0; n < nn; n += T::NB) {
        typename T::V c[T::NB][3];
        scores_tile(K.part(s, kh) + (n0 + n) * p.D, w.queries + at * p.D, p.D, c);
#pragma GCC unroll 8
        for (int i = 0; i < T::NB; ++i)
          for (int j = 0; j < 3; ++j) store(w.scores + (n + i) * T::MP + j * T::L, c[i][j]);
      }
      softmax_panel<C>(w.scores, nn, rows.masked(position, n0, nn, at), position + n0,
                       bias ? bias + n0 : nullptr, rows.lo + at, rows.hi + at, w.m + at, w.l + at,
                       w.alpha + at);
      for (int64_t d = 0; d < V.width; d += T::NP) {
        const C* values = V.part(s, kh) + d * s.room + n0 * T::NP;
        for (int i = 0; i < T::MP; i += T::R) {
          C* out = w.out + (at + i) * V.width + d;
          if (n0 == rows.n_begin)
            accumulate_rows<C, true, false>(w.scores + i, values, nn, out, V.width, nullptr);
          else
            accumulate_rows<C, false, true>(w.scores + i, values, nn, out, V.width, w.alpha + at + i);
        }
      }
    }
  }
  for (int64_t i = 0; i < w.M; i += T::L) store(w.m + i, load(w.m + i) + vlog(load(w.l + i)));
  for (int64_t i = 0; i < rows.count; ++i) {
    const bool none = w.l[i] == 0;  // no visible key: 0, whatever stands in the accumulator
    const auto inverse = set1(none ? C(0) : 1 / w.l[i]);
    E* out = rows.template row<E>(p.out, i);
    for (int64_t d = 0; d < p.D; d += T::L)
      store(out + d, none ? inverse : load(w.out + i * V.width + d) * inverse, p.D - d);
    *rows.template row<C>(p.lse, i) = none ? C(-__builtin_inf()) : w.m[i];
  }
}

template <class E>
static void forward(const Attention& p) {
  using C = typename Of<E>::C;
  using T = Tile<C>;
  const Keys<C> keys(p, ForwardState<C>::M);
  const Packed<E> K(keys, p.D), V(keys, round_up(p.D, T::NP));
  over_keys(keys, p.K, [&](const Sequence& s, int64_t kh, int64_t n0, int64_t n1) {
    K.blocks(p.k, s, kh, n0, n1);
    V.panels(p.v, s, kh, n0, n1);
  });
  const int64_t tasks =
      keys.tiles * p.K;  // from the last tile down: with a causal mask the longest come first
  parallel_tasks(
      tasks, [&] { return ForwardState<C>(p.D, V.width); },
      [&](ForwardState<C>& w, int64_t i) { forward_tile<E>(keys, K, V, (tasks - 1 - i) / p.K, i % p.K, w); });
}

int64_t attention_fwd(const Attention& p) {
  const int64_t bad = bad_offsets(p);
  if (bad < 0) with_dtype(p.dtype, [&](auto e) { forward<decltype(e)>(p); });
  return bad;
}

// ---- backward ----

constexpr int kBackwardKeys = 96;

template <class C>
struct BackwardState {
  int64_t M;
  Scratch<C> queries, douts, query_panels, dout_panels, dq, probs, dscores, lse, delta;
  Scratch<bool> dead;
  RowPlan<C> plan;
  BackwardState(int64_t M, int64_t D, int64_t width)
      : M(M),
        queries(M * D),
        douts(M * D),
        query_panels(M * width),
        dout_panels(M * width),
        dq(M * width),
        probs(M * kBackwardKeys),
        dscores(M * kBackwardKeys),
        lse(M),
        delta(M),
        dead(M),
        plan(M) {}
};

// What the backward tiles read and write beside their own rows.
template <class E, class C = typename Of<E>::C>
struct Backward {
  const Keys<C>& keys;
  const Packed<E>&K, &V, &key_panels;
  int64_t width;
};

// P = exp(S - lse) of one panel into probs [count][MP]; what is masked gives 0.
template <class C>
static void probabilities(C* scores, int64_t count, bool masked, const C* position, const C* bias,
                          const C* lo, const C* hi, const C* lse) {
  using T = Tile<C>;
  using V = typename T::V;
  const V none = set1(C(-__builtin_inf()));
  V base[3], low[3], high[3];
  for (int j = 0; j < 3; ++j) {
    base[j] = load(lse + j * T::L);
    low[j] = load(lo + j * T::L);
    high[j] = load(hi + j * T::L);
  }
  for (int64_t n = 0; n < count; ++n) {
    const V here = set1(position[n]), add = bias ? set1(bias[n]) : V{};
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      C* cell = scores + n * T::MP + j * T::L;
      V s = load(cell);
      if (bias) s += add;
      if (masked) s = (low[j] <= here) & (here <= high[j]) ? s : none;
      store(cell, vexp_softmax(s - base[j]));
    }
  }
}

// Loads a tile's rows: q and dout in both packings, lse and delta = rowsum(dout out) - dlse. Rows that see
// nothing count as zeros.
template <class E, class C = typename Of<E>::C>
static void load_rows(const RowTile<E>& rows, BackwardState<C>& w) {
  using T = Tile<C>;
  const Attention& p = rows.p;
  for (int64_t i = 0; i < rows.panels() * T::MP; ++i) {
    w.lse[i] = i < rows.count ? *rows.template row<const C>(p.lse, i) : C(-__builtin_inf());
    w.dead[i] = w.lse[i] == C(-__builtin_inf());
    if (w.dead[i]) w.lse[i] = C(__builtin_inf());  // exp(s - inf) = 0
    const E* q = w.dead[i] ? nullptr : rows.template row<const E>(p.q, i);
    const E* dout = w.dead[i] ? nullptr : rows.template row<const E>(p.dout, i);
    pack_row(q, p.D, C(p.scale), w.query_panels + i * T::NP, w.M * T::NP);
    pack_row(dout, p.D, C(1), w.dout_panels + i * T::NP, w.M * T::NP);
  }
  rows.columns(p.q, C(p.scale), w.dead, w.queries);
  rows.columns(p.dout, C(1), w.dead, w.douts);
  rows.columns(p.out, C(1), w.dead, w.dq);  // dq is free until the first block of keys
  // In the order in which scores_tile sums dP: where one key has all the weight, dP - delta cancels exactly.
  for (int64_t i = 0; i < rows.panels() * T::MP; i += T::L) {
    const int64_t at = i / T::MP * T::MP * p.D + i % T::MP;
    typename T::V sum{};
    for (int64_t d = 0; d < p.D; ++d) sum += load(w.dq + at + d * T::MP) * load(w.douts + at + d * T::MP);
    store(w.delta + i, sum);
  }
  for (int64_t i = 0; p.dlse.data && i < rows.count; ++i)
    if (!w.dead[i]) w.delta[i] -= *rows.template row<const C>(p.dlse, i);
}

// out[n][width] += A[n][rows] B[rows][width] over count keys, A being [panel][kBackwardKeys][MP].
template <class C>
static void add_keys(const C* a, int64_t count, int panels, const C* b, int64_t M, C* out, int64_t width) {
  using T = Tile<C>;
  constexpr int64_t panel = int64_t(T::MP) * kBackwardKeys;
  for (int64_t d = 0; d < width; d += T::NP) {
    const C* right = b + d * M;
    int64_t n = 0;
    for (; n + T::R <= count; n += T::R)
      accumulate_keys<T::R, C>(a + n * T::MP, panel, panels, right, out + n * width + d, width);
    for (; n + T::R * 2 / 3 <= count; n += T::R * 2 / 3)
      accumulate_keys<T::R * 2 / 3, C>(a + n * T::MP, panel, panels, right, out + n * width + d, width);
    for (; n < count; n += T::R / 3)
      accumulate_keys<T::R / 3, C>(a + n * T::MP, panel, panels, right, out + n * width + d, width);
  }
}

// One block of keys [n0, n0 + nn) against one tile of rows: dQ of the tile, dK, dV and dbias of the chunk.
template <class E, class C = typename Of<E>::C>
static void backward_block(const Backward<E>& x, const RowTile<E>& rows, int64_t n0, int64_t nn,
                           BackwardState<C>& w, C* dk, C* dv, C* dbias) {
  using T = Tile<C>;
  const Attention& p = x.keys.p;
  const Sequence& s = rows.s;
  const C *position = x.keys.position + s.keys + n0, *bias = p.key_bias ? x.keys.bias + s.keys + n0 : nullptr;
  const int panels = int(rows.panels());
  for (int panel = 0; panel < panels; ++panel) {
    const int64_t at = panel * T::MP;
    C *probs = w.probs + at * kBackwardKeys, *dscores = w.dscores + at * kBackwardKeys;
    typename T::V c[T::NB][3];
    for (int64_t n = 0; n < nn; n += T::NB) {
      scores_tile(x.K.part(s, rows.kh) + (n0 + n) * p.D, w.queries + at * p.D, p.D, c);
#pragma GCC unroll 8
      for (int i = 0; i < T::NB; ++i)
        for (int j = 0; j < 3; ++j) store(probs + (n + i) * T::MP + j * T::L, c[i][j]);
    }
    probabilities<C>(probs, nn, rows.masked(x.keys.position + s.keys, n0, nn, at), position, bias,
                     rows.lo + at, rows.hi + at, w.lse + at);
    for (int64_t n = 0; n < nn; n += T::NB) {
      scores_tile(x.V.part(s, rows.kh) + (n0 + n) * p.D, w.douts + at * p.D, p.D, c);
#pragma GCC unroll 8
      for (int i = 0; i < T::NB; ++i)
        for (int j = 0; j < 3; ++j) {
          const int64_t cell = (n + i) * T::MP + j * T::L;
          store(dscores + cell, load(probs + cell) * (c[i][j] - load(w.delta + at + j * T::L)));
        }
    }
    for (int64_t d = 0; d < x.width; d += T::NP) {
      const C* right = x.key_panels.part(s, rows.kh) + d * s.room + n0 * T::NP;
      for (int i = 0; i < T::MP; i += T::R) {
        C* dq = w.dq + (at + i) * x.width + d;
        if (n0 == rows.n_begin)
          accumulate_rows<C, true, false>(dscores + i, right, nn, dq, x.width, nullptr);
        else
          accumulate_rows<C, false, false>(dscores + i, right, nn, dq, x.width, nullptr);
      }
    }
  }
  add_keys<C>(w.probs, nn, panels, w.dout_panels, w.M, dv + n0 * x.width, x.width);
  add_keys<C>(w.dscores, nn, panels, w.query_panels, w.M, dk + n0 * x.width, x.width);
  for (int64_t n = 0; dbias && n < nn; ++n) {
    typename T::V sum{};
    for (int panel = 0; panel < panels; ++panel)
      for (int j = 0; j < 3; ++j) sum += load(w.dscores + (panel * kBackwardKeys + n) * T::MP + j * T::L);
    dbias[n0 + n] += hsum(sum);
  }
}

template <class E, class C = typename Of<E>::C>
static void backward_tile(const Backward<E>& x, int64_t tile, int64_t kh, BackwardState<C>& w, C* dk, C* dv,
                          C* dbias) {
  using T = Tile<C>;
  const Attention& p = x.keys.p;
  const RowTile<E> rows(x.keys, tile, kh, w.M, w.plan);
  const bool any = rows.n_end > rows.n_begin;
  if (any) load_rows<E>(rows, w);
  for (int64_t n0 = rows.n_begin; n0 < rows.n_end; n0 += kBackwardKeys)
    backward_block<E>(x, rows, n0, least(kBackwardKeys, rows.n_end - n0), w, dk, dv, dbias);
  const auto scale = set1(C(p.scale));
  for (int64_t i = 0; i < rows.count; ++i) {
    E* dq = rows.template row<E>(p.dq, i);
    for (int64_t d = 0; d < p.D; d += T::L)
      store(dq + d, any && !w.dead[i] ? load(w.dq + i * x.width + d) * scale : scale * C(0), p.D - d);
  }
}

// Adds the chunks of one key: dk, dv, dbias in their own dtype; a removed key's are 0.
template <class E, class C = typename Of<E>::C>
static void reduce_key(const Keys<C>& keys, const Sequence& s, int64_t j, const C* sums, int64_t chunks,
                       int64_t width) {
  using T = Tile<C>;
  const Attention& p = keys.p;
  const int64_t n = keys.rank[s.ranks + j];
  const bool kept = keys.rank[s.ranks + j + 1] > n;
  const int64_t pair = chunks * s.room * (2 * width + 1);  // per key/value head: chunks of [dk | dv | dbias]
  C total = 0;
  for (int64_t kh = 0; kh < p.K; ++kh) {
    const C* first = sums + s.keys * p.K * chunks * (2 * width + 1) + kh * pair;
    for (int64_t d = 0; d < p.D; d += T::L) {
      typename T::V dk{}, dv{};
      for (int64_t c = 0; kept && c < chunks; ++c) {
        const C* chunk = first + c * s.room * (2 * width + 1);
        dk += load(chunk + n * width + d);
        dv += load(chunk + (s.room + n) * width + d);
      }
      store(at<E>(p.dk, s.batch, s.k_row + j, kh) + d, dk, p.D - d);
      store(at<E>(p.dv, s.batch, s.k_row + j, kh) + d, dv, p.D - d);
    }
    for (int64_t c = 0; p.dbias && kept && c < chunks; ++c)
      total += first[c * s.room * (2 * width + 1) + 2 * s.room * width + n];
  }
  if (p.dbias) static_cast<C*>(p.dbias)[s.batch * p.dbias_batch + (s.k_row + j) * p.dbias_token] = total;
}

template <class E>
static void backward(const Attention& p) {
  using C = typename Of<E>::C;
  using T = Tile<C>;
  const int64_t width = round_up(p.D, T::NP), M = (p.D <= 64 ? 2 : 4) * T::MP;
  const Keys<C> keys(p, M);
  const Packed<E> K(keys, p.D), V(keys, p.D), key_panels(keys, width);
  over_keys(keys, p.K, [&](const Sequence& s, int64_t kh, int64_t n0, int64_t n1) {
    K.blocks(p.k, s, kh, n0, n1);
    V.blocks(p.v, s, kh, n0, n1);
    key_panels.panels(p.k, s, kh, n0, n1);
  });
  const int64_t chunks = chunk_count(p, keys.tiles), cell = 2 * width + 1;
  Scratch<C> sums(keys.room * p.K * chunks * cell + 64);
  const Backward<E> x{keys, K, V, key_panels, width};
  over_chunks(
      keys, chunks, cell, sums.data, [&] { return BackwardState<C>(M, p.D, width); },
      [&](BackwardState<C>& w, const Sequence& s, int64_t tile, int64_t kh, C* dk) {
        backward_tile<E>(x, tile, kh, w, dk, dk + s.room * width,
                         p.dbias ? dk + 2 * s.room * width : nullptr);
      });
  over_keys(keys, 1, [&](const Sequence& s, int64_t, int64_t n0, int64_t n1) {
    for (int64_t j = n0; j < least(n1, s.S); ++j) reduce_key<E>(keys, s, j, sums.data, chunks, width);
  });
}

int64_t attention_bwd(const Attention& p) {
  const int64_t bad = bad_offsets(p);
  if (bad < 0) with_dtype(p.dtype, [&](auto e) { backward<decltype(e)>(p); });
  return bad;
}

}  // namespace palm::cpu::ISA
