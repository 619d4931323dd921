// attention on bf16 by products of bf16 pairs with float sums (pairs.h): P and dS are rounded to bf16, as on
// a GPU. Rows are queries (token, head), lanes are keys, so that q, P and dS are left operands as they stand.
// Everything else is as in attention.cpp.
#include "attention.h"
#include "pairs.h"

namespace palm::cpu::ISA {

constexpr int kStrip = 32;  // rows of a product
constexpr float kLog2e = 1.44269504088896341f;

// How many keys a block has, and from row to row of its scores (floats) and probabilities (bf16): an odd
// number of cache lines.
template <int64_t keys>
struct Block {
  static constexpr int64_t N = keys, scores = keys + 16, probs = keys + 32;
};

// One operand of all kept keys per sequence and key/value head: columns are keys (k runs along D), or columns
// are head dims (k runs over keys).
struct PackedPairs {
  const Keys<float>& keys;
  int64_t width;
  Scratch<bf16> data;

  explicit PackedPairs(const Keys<float>& keys)
      : keys(keys), width(round_up(keys.p.D, 32)), data(keys.room * keys.p.K * width + 64) {}
  bf16* part(const Sequence& s, int64_t kh) const { return data + (s.keys * keys.p.K + kh * s.room) * width; }
  const bf16* columns_of_keys(const Sequence& s, int64_t kh, int64_t n) const {
    return part(s, kh) + n * width;
  }
  const bf16* columns_of_dims(const Sequence& s, int64_t kh, int64_t n, int64_t d) const {
    return part(s, kh) + d * s.room + n * kPanel;
  }
  const bf16* source(const Heads& x, const Sequence& s, int64_t kh, int64_t n) const {
    return n < s.kept ? at<bf16>(x, s.batch, s.k_row + int64_t(keys.position[s.keys + n]), kh) : nullptr;
  }
  void pack_keys(const Heads& x, const Sequence& s, int64_t kh, int64_t n0, int64_t n1) const {
    for (int64_t n = n0; n < n1; n += 16) {
      const bf16* rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = source(x, s, kh, n + i);
      pack_transposed(rows, keys.p.D, part(s, kh) + n / kPanel * kPanel * width + n % kPanel * 2, 2 * kPanel);
    }
  }
  void pack_dims(const Heads& x, const Sequence& s, int64_t kh, int64_t n0, int64_t n1) const {
    for (int64_t n = n0; n < n1; n += 2)
      pack_pair(source(x, s, kh, n), source(x, s, kh, n + 1), keys.p.D, part(s, kh) + n * kPanel,
                s.room * kPanel);
  }
};

// One tile of `rows` as left operand [M][kRowsLd], zero beyond D, beyond the last row and where `dead`.
static void load_tile(const RowTile<bf16>& rows, const Heads& x, const bool* dead, bf16* to) {
  const int64_t D = rows.p.D, count = round_up(rows.count, kStrip);
  for (int64_t i = 0; i < count; ++i) {
    const bf16* from = i < rows.count && !(dead && dead[i]) ? rows.row<const bf16>(x, i) : nullptr;
    for (int64_t d = 0; d < D; d += 32) _mm512_storeu_si512(to + i * kRowsLd + d, load_32(from, d, D));
  }
}

// What scores need beside the products: s = scale q k + bias where `natural`, else the bare q k, and -inf
// where the key is not visible.
struct Scores {
  const float *position, *bias;  // of the sequence's kept keys
  float scale;
  bool natural;  // with a bias, and where a scale of 0 or less would turn -inf or the maximum over

  Scores(const Keys<float>& keys, const Sequence& s)
      : position(keys.position + s.keys),
        bias(keys.p.key_bias ? keys.bias + s.keys : nullptr),
        scale(float(keys.p.scale)),
        natural(bias || !(scale > 0)) {}
  float unit() const { return natural ? 1.0f : scale; }

  // One 32 x 32 block at key n and row r of the tile.
  void finish(const RowTile<bf16>& rows, float* s, int64_t ld, int64_t n, int64_t r) const {
    const bool masked = rows.masked(position, n, kStrip, r, kStrip);
    if (!masked && !natural) return;
    const vf none = set1(-__builtin_inff());
    for (int j = 0; j < kStrip; j += 16) {
      const vf here = load(position + n + j), add = bias ? load(bias + n + j) : vf{};
      for (int i = 0; i < kStrip; ++i) {
        vf x = load(s + i * ld + j);
        if (natural) x *= set1(scale);
        if (bias) x += add;
        if (masked) x = (set1(rows.lo[r + i]) <= here) & (here <= set1(rows.hi[r + i])) ? x : none;
        store(s + i * ld + j, x);
      }
    }
  }
};

// Sixteen vectors into one, lane i of it from vector i, by a tree of two-operand steps.
template <class F>
PALM_INLINE vf fold_lanes(vf* r, F combine) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    butterfly<8>(r[i], r[i + 8]);
    r[i] = combine(r[i], r[i + 8]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    butterfly<4>(r[i], r[i + 4]);
    r[i] = combine(r[i], r[i + 4]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    butterfly<2>(r[i], r[i + 2]);
    r[i] = combine(r[i], r[i + 2]);
  }
  butterfly<1>(r[0], r[1]);
  return combine(r[0], r[1]);
}
PALM_INLINE vf row_sums(vf* r) {
  return fold_lanes(r, [](vf a, vf b) { return a + b; });
}

// The maxima of 16 rows of n floats, row i in lane i.
PALM_INLINE vf row_maxima(const float* s, int64_t ld, int64_t n) {
  vf top[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    vf a = load(s + i * ld), b = load(s + i * ld + 16);
    for (int64_t j = 32; j < n; j += 32) {
      a = vmax(a, load(s + i * ld + j));
      b = vmax(b, load(s + i * ld + j + 16));
    }
    top[i] = vmax(a, b);
  }
  return fold_lanes(top, [](vf a, vf b) { return vmax(a, b); });
}

// ---- forward ----

struct PairsForward {
  using B = Block<256>;
  static constexpr int64_t M = 64;
  Scratch<bf16> queries, probs;
  Scratch<float> scores, out, m, l;
  RowPlan<float> plan;
  Tiles tiles;
  explicit PairsForward(int64_t width)
      : queries(M * kRowsLd),
        probs(kStrip * B::probs),
        scores(kStrip * B::scores),
        out(M * width),
        m(M),
        l(M * 16),  // a vector a row
        plan(M) {}
};

// One block of scores [32][nn] into w.probs; m, l and the rows of out are brought to the new maxima.
static void softmax_strip(PairsForward& w, int64_t r, int64_t nn, float unit, int64_t width, bool first) {
  using B = PairsForward::B;
  const vf none = set1(-__builtin_inff()), log2 = set1(unit * kLog2e);
  float alpha[kStrip], base_of[kStrip];
  bool moved = false;
  for (int i = 0; i < kStrip; i += 16) {
    const vf old = load(w.m + r + i), top = vmax(row_maxima(w.scores + i * B::scores, B::scores, nn), old);
    const vf base = top == none ? vf{} : top;  // nothing visible yet: exp(-inf - 0) = 0
    store(w.m + r + i, top);
    store(base_of + i, base);
    store(alpha + i, exp2_low((old - base) * log2));
    moved |= _mm512_cmp_ps_mask((__m512)old, (__m512)top, _CMP_NEQ_UQ) != 0;
  }
  for (int i = 0; i < kStrip; ++i) {
    const vf base = set1(base_of[i]);
    vf sum0 = load(w.l + (r + i) * 16) * set1(alpha[i]), sum1{};
    const float* s = w.scores + i * B::scores;
    for (int64_t n = 0; n < nn; n += 32) {
      const vf x = exp2_low((load(s + n) - base) * log2), y = exp2_low((load(s + n + 16) - base) * log2);
      sum0 += x;
      sum1 += y;
      _mm512_storeu_si512(w.probs + i * B::probs + n, halves(x, y));
    }
    store(w.l + (r + i) * 16, sum0 + sum1);
  }
  if (first || !moved) return;
  for (int i = 0; i < kStrip; ++i)
    for (int64_t d = 0; d < width; d += 16) {
      float* out = w.out + (r + i) * width + d;
      store(out, load(out) * set1(alpha[i]));
    }
}

static void store_tile(const RowTile<bf16>& rows, const PairsForward& w, int64_t width, float unit) {
  const Attention& p = rows.p;
  for (int64_t r = 0; r < rows.count; r += 16) {
    vf sums[16];
    for (int i = 0; i < 16; ++i) sums[i] = load(w.l + (r + i) * 16);
    const vf sum = row_sums(sums), inverse = set1(1.0f) / sum;
    const vf lse = load(w.m + r) * set1(unit) + vlog(sum);
    for (int64_t i = 0; i < least(16, rows.count - r); ++i) {
      const bool none = sum[i] == 0;  // no visible key: 0, whatever stands in the accumulator
      const vf factor = set1(none ? 0.0f : inverse[i]);
      bf16* out = rows.row<bf16>(p.out, r + i);
      for (int64_t d = 0; d < p.D; d += 16)
        store(out + d, none ? factor : load(w.out + (r + i) * width + d) * factor, p.D - d);
      *rows.row<float>(p.lse, r + i) = none ? -__builtin_inff() : lse[i];
    }
  }
}

static void forward_tile(const Keys<float>& keys, const PackedPairs& K, const PackedPairs& V, int64_t tile,
                         int64_t kh, PairsForward& w) {
  using B = PairsForward::B;
  const Attention& p = keys.p;
  const RowTile<bf16> rows(keys, tile, kh, w.M, w.plan);
  const Sequence& s = rows.s;
  const int64_t width = V.width;
  const Scores scores(keys, s);
  const float unit = scores.unit();
  load_tile(rows, p.q, nullptr, w.queries);
  for (int i = 0; i < w.M; ++i) w.m[i] = -__builtin_inff(), store(w.l + i * 16, vf{});
  for (int64_t n0 = rows.n_begin; n0 < rows.n_end; n0 += B::N) {
    const int64_t nn = least(B::N, rows.n_end - n0);
    const bool first = n0 == rows.n_begin;
    for (int64_t r = 0; r < rows.count; r += kStrip) {
      for (int64_t n = 0; n < nn; n += kStrip) {
        product(w.queries + r * kRowsLd, kRowsLd, K.columns_of_keys(s, kh, n0 + n), width, w.scores + n,
                B::scores, true);
        scores.finish(rows, w.scores + n, B::scores, n0 + n, r);
      }
      softmax_strip(w, r, nn, unit, width, first);
      for (int64_t d = 0; d < width; d += kPanel)
        product(w.probs, B::probs, V.columns_of_dims(s, kh, n0, d), nn, w.out + r * width + d, width, first);
    }
  }
  store_tile(rows, w, width, unit);
}

int64_t attention_fwd(const Attention& p) {
  const int64_t bad = bad_offsets(p);
  if (bad >= 0) return bad;
  const Keys<float> keys(p, PairsForward::M, kStrip);
  const PackedPairs K(keys), V(keys);
  over_keys(keys, p.K, [&](const Sequence& s, int64_t kh, int64_t n0, int64_t n1) {
    K.pack_keys(p.k, s, kh, n0, n1);
    V.pack_dims(p.v, s, kh, n0, n1);
  });
  const int64_t tasks =
      keys.tiles * p.K;  // from the last tile down: with a causal mask the longest come first
  parallel_tasks(
      tasks, [&] { return PairsForward(V.width); },
      [&](PairsForward& w, int64_t i) { forward_tile(keys, K, V, (tasks - 1 - i) / p.K, i % p.K, w); });
  return -1;
}

// ---- backward ----

struct PairsBackward {
  using B = Block<128>;
  int64_t M, columns_ld;
  Scratch<bf16> queries, douts, query_columns, dout_columns, dscore_rows, probs, dscores;
  Scratch<float> scores, dprobs, dq, lse, delta;
  Scratch<bool> dead;
  RowPlan<float> plan;
  Tiles tiles;
  PairsBackward(int64_t M, int64_t width)
      : M(M),
        columns_ld(M + 32),
        queries(M * kRowsLd),
        douts(M * kRowsLd),
        query_columns(width * columns_ld),
        dout_columns(width * columns_ld),
        dscore_rows(kStrip * B::probs),
        probs(M * B::N),
        dscores(M * B::N),
        scores(kStrip * B::scores),
        dprobs(kStrip * B::scores),
        dq(M * width),
        lse(M),
        delta(M),
        dead(M),
        plan(M) {}
};

// What the backward tiles read beside their own rows.
struct PairsKeys {
  const Keys<float>& keys;
  const PackedPairs &K, &V, &K_dims;
};

// q and dout of a tile in both packings, lse and delta = rowsum(dout out) - dlse. Rows that see nothing count
// as zeros.
static void load_rows(const RowTile<bf16>& rows, PairsBackward& w) {
  const Attention& p = rows.p;
  const int64_t count = round_up(rows.count, kStrip);
  for (int64_t i = 0; i < count; ++i) {
    const float lse = i < rows.count ? *rows.row<const float>(p.lse, i) : -__builtin_inff();
    w.dead[i] = lse == -__builtin_inff();
    w.lse[i] = w.dead[i] ? __builtin_inff() : lse;  // exp(s - inf) = 0
    w.delta[i] = 0;
    if (w.dead[i]) continue;
    const bf16 *dout = rows.row<const bf16>(p.dout, i), *out = rows.row<const bf16>(p.out, i);
    vf sum{};
    for (int64_t d = 0; d < p.D; d += 16) sum += load(dout + d, p.D - d) * load(out + d, p.D - d);
    w.delta[i] = hsum(sum) - (p.dlse.data ? *rows.row<const float>(p.dlse, i) : 0.0f);
  }
  load_tile(rows, p.q, w.dead, w.queries);
  load_tile(rows, p.dout, w.dead, w.douts);
  const bf16 *from[2] = {w.queries, w.douts}, *lines[kStrip];
  bf16* to[2] = {w.query_columns, w.dout_columns};
  for (int x = 0; x < 2; ++x)
    for (int64_t r = 0; r < count; r += kStrip) {
      for (int i = 0; i < kStrip; ++i) lines[i] = from[x] + (r + i) * kRowsLd;
      pack_columns(lines, p.D, to[x] + r, w.columns_ld);
    }
}

// P = exp(s - lse) and dS = P (dP - delta) of one strip: rows of dS for dQ, pairs of rows of both for dK, dV.
static void gradients_strip(PairsBackward& w, int64_t r, int64_t nn, float scale, float* dbias) {
  using B = PairsBackward::B;
  const vf log2 = set1(kLog2e), unit = set1(scale);
  for (int i = 0; i < kStrip; i += 2) {
    const vf lse[2] = {set1(w.lse[r + i]), set1(w.lse[r + i + 1])};
    const vf delta[2] = {set1(w.delta[r + i]), set1(w.delta[r + i + 1])};
    for (int64_t n = 0; n < nn; n += 32) {
      vf prob[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int a = 0; a < 2; ++a)
#pragma GCC unroll 2
        for (int b = 0; b < 2; ++b) {
          const int64_t cell = (i + a) * B::scores + n + 16 * b;
          prob[a][b] = exp2_low((load(w.scores + cell) * unit - lse[a]) * log2);
          ds[a][b] = prob[a][b] * (load(w.dprobs + cell) - delta[a]);
        }
      const int64_t pair = n * w.M + (r + i) * kPanel;
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        _mm512_storeu_si512(w.probs + pair + 32 * b, pairs(prob[0][b], prob[1][b]));
        _mm512_storeu_si512(w.dscores + pair + 32 * b, pairs(ds[0][b], ds[1][b]));
        _mm512_storeu_si512(w.dscore_rows + (i + b) * B::probs + n, halves(ds[b][0], ds[b][1]));
        if (dbias) store(dbias + n + 16 * b, load(dbias + n + 16 * b) + (ds[0][b] + ds[1][b]));
      }
    }
  }
}

// One block of keys [n0, n0 + nn) against one tile of rows: dQ of the tile, dK^T, dV^T (panels of 32 keys,
// [width][32]) and dbias of the chunk.
static void backward_block(const PairsKeys& x, const RowTile<bf16>& rows, const Scores& scores, int64_t n0,
                           int64_t nn, PairsBackward& w, float* dk, float* dv, float* dbias) {
  using B = PairsBackward::B;
  const Sequence& s = rows.s;
  const int64_t width = x.K.width, kh = rows.kh, count = round_up(rows.count, kStrip);
  for (int64_t r = 0; r < count; r += kStrip) {
    for (int64_t n = 0; n < nn; n += kStrip) {
      product(w.queries + r * kRowsLd, kRowsLd, x.K.columns_of_keys(s, kh, n0 + n), width, w.scores + n,
              B::scores, true);
      scores.finish(rows, w.scores + n, B::scores, n0 + n, r);
      product(w.douts + r * kRowsLd, kRowsLd, x.V.columns_of_keys(s, kh, n0 + n), width, w.dprobs + n,
              B::scores, true);
    }
    gradients_strip(w, r, nn, scores.unit(), dbias ? dbias + n0 : nullptr);
    for (int64_t d = 0; d < width; d += kPanel)
      product(w.dscore_rows, B::probs, x.K_dims.columns_of_dims(s, kh, n0, d), nn, w.dq + r * width + d,
              width, n0 == rows.n_begin);
  }
  for (int64_t n = 0; n < nn; n += kPanel)
    for (int64_t d = 0; d < width; d += 32) {
      const int64_t at = (n0 + n) * width + d * kPanel;
      product(w.dout_columns + d * w.columns_ld, w.columns_ld, w.probs + n * w.M, count, dv + at, kPanel,
              false);
      product(w.query_columns + d * w.columns_ld, w.columns_ld, w.dscores + n * w.M, count, dk + at, kPanel,
              false);
    }
}

static void backward_tile(const PairsKeys& x, int64_t tile, int64_t kh, PairsBackward& w, float* dk,
                          float* dv, float* dbias) {
  const Attention& p = x.keys.p;
  const RowTile<bf16> rows(x.keys, tile, kh, w.M, w.plan);
  const Scores scores(x.keys, rows.s);
  const bool any = rows.n_end > rows.n_begin;
  if (any) load_rows(rows, w);
  for (int64_t n0 = rows.n_begin; n0 < rows.n_end; n0 += PairsBackward::B::N)
    backward_block(x, rows, scores, n0, least(PairsBackward::B::N, rows.n_end - n0), w, dk, dv, dbias);
  const vf scale = set1(float(p.scale));
  for (int64_t i = 0; i < rows.count; ++i) {
    bf16* dq = rows.row<bf16>(p.dq, i);
    for (int64_t d = 0; d < p.D; d += 16)
      store(dq + d, any && !w.dead[i] ? load(w.dq + i * x.K.width + d) * scale : vf{}, p.D - d);
  }
}

// Adds the chunks of kept keys [n, n + 16) of one key/value head: sums are [chunk][width 32-key panels].
static void reduce_keys(const Keys<float>& keys, const Sequence& s, int64_t kh, int64_t n, const float* sums,
                        int64_t chunks, int64_t step, int64_t width, const Heads& to, float scale) {
  const int64_t D = keys.p.D;
  for (int64_t d = 0; d < D; d += 16) {
    vf r[16] = {};
    for (int64_t c = 0; c < chunks; ++c)
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] += load(sums + c * step + n / kPanel * kPanel * width + (d + i) * kPanel + n % kPanel);
    transpose<8>(r);
    for (int i = 0; i < 16 && n + i < s.kept; ++i) {
      const int64_t j = int64_t(keys.position[s.keys + n + i]);
      store(at<bf16>(to, s.batch, s.k_row + j, kh) + d, r[i] * set1(scale), D - d);
    }
  }
}

// dk, dv and dbias of the keys [n0, n1) of a sequence; a removed key's are 0.
static void reduce(const Keys<float>& keys, const Sequence& s, int64_t n0, int64_t n1, const float* sums,
                   int64_t chunks, int64_t width) {
  const Attention& p = keys.p;
  const int64_t cell = 2 * width + 1, step = s.room * cell;
  const auto dbias = [&](int64_t j) {
    return static_cast<float*>(p.dbias) + s.batch * p.dbias_batch + (s.k_row + j) * p.dbias_token;
  };
  for (int64_t j = n0; s.kept < s.S && j < least(n1, s.S); ++j) {
    if (keys.rank[s.ranks + j + 1] > keys.rank[s.ranks + j]) continue;
    for (int64_t kh = 0; kh < p.K; ++kh)
      for (int64_t d = 0; d < p.D; d += 16) {
        store(at<bf16>(p.dk, s.batch, s.k_row + j, kh) + d, vf{}, p.D - d);
        store(at<bf16>(p.dv, s.batch, s.k_row + j, kh) + d, vf{}, p.D - d);
      }
    if (p.dbias) *dbias(j) = 0;
  }
  for (int64_t n = n0; n < least(n1, s.kept); n += 16) {
    float total[16] = {};
    for (int64_t kh = 0; kh < p.K; ++kh) {
      const float* first = sums + s.keys * p.K * chunks * cell + kh * chunks * step;
      reduce_keys(keys, s, kh, n, first, chunks, step, width, p.dk, float(p.scale));
      reduce_keys(keys, s, kh, n, first + s.room * width, chunks, step, width, p.dv, 1.0f);
      for (int64_t c = 0; p.dbias && c < chunks; ++c)
        for (int i = 0; i < 16; ++i) total[i] += first[c * step + 2 * s.room * width + n + i];
    }
    for (int i = 0; p.dbias && i < 16 && n + i < s.kept; ++i)
      *dbias(int64_t(keys.position[s.keys + n + i])) = total[i];
  }
}

int64_t attention_bwd(const Attention& p) {
  const int64_t bad = bad_offsets(p);
  if (bad >= 0) return bad;
  const int64_t width = round_up(p.D, 32), M = p.D <= 128 ? 256 : 128;
  const Keys<float> keys(p, M, kStrip);
  const PackedPairs K(keys), V(keys), K_dims(keys);
  over_keys(keys, p.K, [&](const Sequence& s, int64_t kh, int64_t n0, int64_t n1) {
    K.pack_keys(p.k, s, kh, n0, n1);
    V.pack_keys(p.v, s, kh, n0, n1);
    K_dims.pack_dims(p.k, s, kh, n0, n1);
  });
  const int64_t chunks = chunk_count(p, keys.tiles), cell = 2 * width + 1;
  Scratch<float> sums(keys.room * p.K * chunks * cell + 64);
  const PairsKeys x{keys, K, V, K_dims};
  over_chunks(
      keys, chunks, cell, sums.data, [&] { return PairsBackward(M, width); },
      [&](PairsBackward& w, const Sequence& s, int64_t tile, int64_t kh, float* dk) {
        backward_tile(x, tile, kh, w, dk, dk + s.room * width, p.dbias ? dk + 2 * s.room * width : nullptr);
      });
  over_keys(keys, 1, [&](const Sequence& s, int64_t, int64_t n0, int64_t n1) {
    reduce(keys, s, n0, n1, sums.data, chunks, width);
  });
  return -1;
}

}  // namespace palm::cpu::ISA
