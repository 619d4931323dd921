// What attention's forward and backward share: the keys of all sequences, packed once, and a tile of query
// rows.
//
// All G = H / K query heads that share a key/value head stand as rows of one tall matrix (row r is token r /
// G, head r % G), so K and V are packed once and read by all of them. Removed keys (bias -inf) are left out
// while packing: they cost nothing and nothing of theirs is ever read.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace palm::cpu::ISA {

template <class E>
PALM_INLINE E* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<E*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

// One batch entry, or one packed sequence.
struct Sequence {
  int64_t batch, q_row, k_row;  // of its first rows: a dense entry has rows 0, a packed one batch 0
  int64_t T, S, prefix;
  int64_t kept;         // keys that are not removed
  int64_t room;         // S rounded up to Keys::block
  int64_t keys, ranks;  // where its part of Keys::position, bias and of Keys::rank begins
  int64_t tile;         // first row tile
};

struct Bounds {
  int64_t lo, hi;
};
PALM_INLINE Bounds visible(const Attention& p, const Sequence& s, int64_t t) {
  const int64_t o = t + s.S - s.T;
  int64_t hi = s.S - 1;
  if (p.right >= 0) hi = least(hi, o + p.right);
  if (p.causal) hi = least(hi, most(o, s.prefix - 1));
  return {p.left < 0 ? 0 : most(0, o - p.left), most(hi, -1)};
}

// The keys of all sequences that are not removed, in order, with what a tile asks of them.
template <class C>
struct Keys {
  const Attention& p;
  const int64_t block;  // keys that the packing takes together
  Scratch<Sequence> seq;
  int64_t room, ranks, tiles;
  Scratch<C> position, bias;  // of kept key n; positions beyond the last are larger than any bound
  Scratch<int32_t> rank;      // rank[j]: kept keys before position j, j <= S

  Keys(const Attention& p, int64_t tile_rows, int64_t block = Tile<C>::NB)
      : p(p),
        block(block),
        seq(p.B + 1),
        position(lay_out(tile_rows)),
        bias(p.key_bias ? room : 0),
        rank(ranks) {
    parallel_for(p.B, 1 + 16384 / most(1, p.S), [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; ++b) compact(seq[b]);
    });
  }

  int64_t lay_out(int64_t tile_rows) {
    room = ranks = tiles = 0;
    for (int64_t b = 0; b < p.B; ++b) {
      Sequence& s = seq[b];
      s = {b, 0, 0, p.T, p.S, 0, 0, 0, room, ranks, tiles};
      if (p.cu_q)
        s = {0,    p.cu_q[b], p.cu_k[b], p.cu_q[b + 1] - p.cu_q[b], p.cu_k[b + 1] - p.cu_k[b], 0, 0, 0,
             room, ranks,     tiles};
      if (p.prefix_lengths) s.prefix = least(most(p.prefix_lengths[b], 0), s.S);
      s.room = round_up(s.S, block);
      room += s.room;
      ranks += s.S + 1;
      tiles += (s.T * (p.H / p.K) + tile_rows - 1) / tile_rows;
    }
    return room;
  }

  void compact(Sequence& s) {
    const C* given = static_cast<const C*>(p.key_bias);
    if (given) given += s.batch * p.bias_batch + s.k_row * p.bias_token;
    for (int64_t j = 0; j < s.S; ++j) {
      rank[s.ranks + j] = int32_t(s.kept);
      const C value = given ? given[j * p.bias_token] : C(0);
      if (value == C(-__builtin_inf())) continue;
      position[s.keys + s.kept] = C(j);
      if (given) bias[s.keys + s.kept] = value;
      ++s.kept;
    }
    rank[s.ranks + s.S] = int32_t(s.kept);
    for (int64_t n = s.kept; n < s.room; ++n) {
      position[s.keys + n] = C(1e30);
      if (given) bias[s.keys + n] = 0;
    }
  }

  // The sequence that row tile `tile` belongs to.
  int64_t sequence_of(int64_t tile) const {
    int64_t lo = 0, hi = p.B;
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2;
      (seq[middle].tile <= tile ? lo : hi) = middle;
    }
    return lo;
  }
};

// One operand of all kept keys, packed per sequence and key/value head: blocks [room / NB][D][NB] for
// scores_tile, or panels [Dp / NP][room][NP] for the other kernels.
template <class E, class C = typename Of<E>::C>
struct Packed {
  using T = Tile<C>;
  const Keys<C>& keys;
  int64_t width;
  Scratch<C> data;

  Packed(const Keys<C>& keys, int64_t width)
      : keys(keys), width(width), data(keys.room * keys.p.K * width + 64) {}
  C* part(const Sequence& s, int64_t kh) const { return data + (s.keys * keys.p.K + kh * s.room) * width; }

  const E* source(const Heads& x, const Sequence& s, int64_t kh, int64_t n) const {
    return n < s.kept ? at<E>(x, s.batch, s.k_row + int64_t(keys.position[s.keys + n]), kh) : nullptr;
  }
  void blocks(const Heads& x, const Sequence& s, int64_t kh, int64_t n0, int64_t n1) const {
    const int64_t D = keys.p.D;
    C columns[256 * T::L];
    for (int64_t n = n0; n < n1; n += T::L) {
      const E* rows[T::L];
      for (int i = 0; i < T::L; ++i) rows[i] = source(x, s, kh, n + i);
      pack_columns(rows, D, C(1), columns, T::L);
      constexpr int step = T::L < T::NB ? T::L : T::NB;
      for (int64_t i = n; i < least(n + T::L, s.room); i += step) {
        C* block = part(s, kh) + i / T::NB * D * T::NB + i % T::NB;
        for (int64_t d = 0; d < D; ++d)
          memcpy(block + d * T::NB, columns + d * T::L + (i - n), step * sizeof(C));
      }
    }
  }
  void panels(const Heads& x, const Sequence& s, int64_t kh, int64_t n0, int64_t n1) const {
    for (int64_t n = n0; n < least(n1, s.room); ++n)
      pack_row(source(x, s, kh, n), keys.p.D, C(1), part(s, kh) + n * T::NP, s.room * T::NP);
  }
};

// body(sequence, head, n0, n1) for `heads` heads of each sequence, its keys cut so that every thread has
// work.
template <class C, class F>
static void over_keys(const Keys<C>& keys, int64_t heads, F&& body) {
  const int64_t pairs = keys.p.B * heads, cuts = pairs ? 1 + 15 / pairs : 0;
  parallel_for(pairs * cuts, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const Sequence& s = keys.seq[i / cuts / heads];
      const int64_t part = round_up((s.room + cuts - 1) / cuts, 2 * Tile<C>::L), n0 = i % cuts * part;
      if (n0 < s.room) body(s, i / cuts % heads, n0, least(n0 + part, s.room));
    }
  });
}

// The first sequence whose offsets do not ascend from 0 to the row counts, or -1.
inline int64_t bad_offsets(const Attention& p) {
  if (!p.cu_q) return -1;
  if (p.cu_q[0] != 0 || p.cu_k[0] != 0) return 0;
  for (int64_t b = 0; b < p.B; ++b)
    if (p.cu_q[b + 1] < p.cu_q[b] || p.cu_k[b + 1] < p.cu_k[b]) return b + 1;
  return p.cu_q[p.B] == p.q_rows && p.cu_k[p.B] == p.k_rows ? -1 : p.B;
}

// ---- backward's chunks ----

// Query rows are dealt to chunks, each with its own dK and dV, which are added in fixed order at the end. The
// number of chunks comes from shapes alone, so the bits do not depend on the number of threads, and not from
// T, so that memory grows as T: enough for 32 tasks, while the chunks take no more memory than q.
inline int64_t chunk_count(const Attention& p, int64_t tiles) {
  const int64_t pairs = most(1, p.B * p.K);
  const int64_t room = most(4, least(8, p.H / p.K / 2));
  return most(1, least(least((31 + pairs) / pairs, room), tiles));
}

// body(state, s, tile, kh, sums) for every row tile, the tiles of a chunk one after the other: its sums,
// `cell` elements a key and zeroed, stand by [kh][chunk] behind those of the sequences before. To and fro, so
// that a causal mask loads the chunks alike.
template <class C, class S, class F>
static void over_chunks(const Keys<C>& keys, int64_t chunks, int64_t cell, C* sums, S&& setup, F&& body) {
  const Attention& p = keys.p;
  parallel_tasks(p.B * p.K * chunks, setup, [&](auto& state, int64_t i) {
    const int64_t b = i / chunks / p.K, kh = i / chunks % p.K, c = i % chunks;
    const Sequence& s = keys.seq[b];
    C* own = sums + (s.keys * p.K + kh * s.room) * chunks * cell + c * s.room * cell;
    memset(own, 0, s.room * cell * sizeof(C));
    const int64_t tiles = (b + 1 < p.B ? keys.seq[b + 1].tile : keys.tiles) - s.tile;
    for (int64_t j = 0; j * chunks < tiles; ++j) {
      const int64_t tile = j * chunks + (j & 1 ? chunks - 1 - c : c);
      if (tile < tiles) body(state, s, s.tile + tile, kh, own);
    }
  });
}

// ---- a tile of query rows ----

// A thread's memory for the rows of one tile: where each stands and which keys it sees.
template <class C>
struct RowPlan {
  Scratch<int32_t> token, head;
  Scratch<C> lo, hi;
  explicit RowPlan(int64_t rows) : token(rows), head(rows), lo(rows), hi(rows) {}
};

// Rows [first, first + count) of (sequence, kh), token by token; rows of the plan beyond them repeat the last
// one (their results are dropped).
template <class E, class C = typename Of<E>::C>
struct RowTile {
  using T = Tile<C>;
  const Attention& p;
  const Sequence& s;
  int64_t kh, count;
  const int32_t *token, *head;
  const C *lo, *hi;
  int64_t n_begin, n_end;  // kept keys that some row sees, on packing blocks

  RowTile(const Keys<C>& keys, int64_t tile, int64_t kh, int64_t tile_rows, RowPlan<C>& plan)
      : p(keys.p),
        s(keys.seq[keys.sequence_of(tile)]),
        kh(kh),
        token(plan.token),
        head(plan.head),
        lo(plan.lo),
        hi(plan.hi) {
    const int64_t G = p.H / p.K, first = (tile - s.tile) * tile_rows;
    count = least(tile_rows, s.T * G - first);
    int64_t t = first / G, h = first % G;
    Bounds see = visible(p, s, t);
    for (int64_t i = 0; i < tile_rows; ++i) {
      plan.token[i] = int32_t(t);
      plan.head[i] = int32_t(kh * G + h);
      plan.lo[i] = C(see.lo);
      plan.hi[i] = C(see.hi);
      if (i + 1 < count && ++h == G) {
        h = 0;
        see = visible(p, s, ++t);
      }
    }
    const int64_t from = keys.rank[s.ranks + least(int64_t(lo[0]), s.S)];
    const int64_t to = keys.rank[s.ranks + int64_t(hi[count - 1]) + 1];
    n_begin = from / keys.block * keys.block;
    n_end = to > from ? round_up(to, keys.block) : n_begin;
  }
  // Whether some row of [r0, r0 + rows) does not see some key of [n0, n0 + nn).
  bool masked(const C* position, int64_t n0, int64_t nn, int64_t r0, int64_t rows = T::MP) const {
    return position[n0 + nn - 1] > hi[r0] || position[n0] < lo[r0 + rows - 1];
  }
  template <class X>
  X* row(const Heads& x, int64_t i) const {
    return at<X>(x, s.batch, s.q_row + token[i], head[i]);
  }
  int64_t panels() const { return (count + T::MP - 1) / T::MP; }

  // dst[panel][D][MP] = scale * rows, transposed; rows beyond count, and those that `dead` names, are zeros.
  void columns(const Heads& x, C scale, const bool* dead, C* dst) const {
    for (int64_t i = 0; i < panels() * T::MP; i += T::L) {
      const E* rows[T::L];
      for (int j = 0; j < T::L; ++j)
        rows[j] = i + j < count && !(dead && dead[i + j]) ? row<const E>(x, i + j) : nullptr;
      pack_columns(rows, p.D, scale, dst + i / T::MP * T::MP * p.D + i % T::MP, T::MP);
    }
  }
};

}  // namespace palm::cpu::ISA
