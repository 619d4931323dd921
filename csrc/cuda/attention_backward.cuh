// What attention's two backward passes share: a block's work, products, probabilities and their gradients,
// and tiles of rows on their way.
#pragma once

#include "attention.cuh"

namespace palm::cuda {

// Of a packed row. Those that see nothing, or only fill up a tile, have lse inf and no bounds: p and ds are 0
// there, and q and dout are not read. lse is in base 2 unless there is a bias (see `gradients`).
struct alignas(16) Row {
  float lse, delta;
  int lo, hi;  // kept keys
};

// What a block works on. It stands in shared memory, since the sums take the registers.
template <class T>
struct Backward {
  Sequence s;
  int head, first, count;  // key/value head; rows (of the second pass: kept keys) first.. of the sequence
  Range range;             // tiles that it moves along
  const T* moved[2];       // their first rows
  Row* rows;               // first pass: of the tile, second: of the sequence
  int G, tokens, heads;    // G, and a cursor's step
  float scale;
};

// A warp has M tiles of 16 held rows and COLUMNS of the D columns of their sums: in 16 bits 128 sums a thread
// in the second pass. Where PARTS warps have the same rows, each computes the scores of its part of the moved
// rows and they trade p and ds through shared memory. Few held rows, since multi-query attention has few
// blocks in the second pass; 8 warps a multiprocessor, whose scores and sums take the registers. LARGE
// rows leave shared memory for one stage; so does a chip with little of it (SMALL).
template <class Element, int HeadDim, bool SMALL = false>
struct Plan {
  using T = Element;
  static constexpr int D = HeadDim;
  static constexpr bool EXACT = std::is_same_v<T, float>, LARGE = EXACT && D > 64;
  static constexpr int HELD = LARGE || SMALL ? 32 : 64, MOVED = 32, STAGES = LARGE || SMALL ? 1 : 2;
  static constexpr int M = !EXACT && D == 64 ? 2 : 1;
  static constexpr int PARTS = D == 256 || LARGE ? 2 : 1, COLUMNS = D / PARTS;
  static constexpr int GROUPS = HELD / (16 * M), THREADS = 32 * GROUPS * PARTS;
  static constexpr int N = MOVED / PARTS / 8;      // tiles of 8 moved rows in a warp's scores
  static constexpr int STEPS = MOVED / Mma<T>::K;  // left fragments along the moved rows
  static_assert(HELD % MOVED == 0);  // rows that the first pass leaves are whole tiles of the second
  using Scores = float[M][N][4];
  using Sums = float[M][COLUMNS / 8][4];
  static constexpr int CHUNKS = D / kChunk<T>, STEP = THREADS / CHUNKS;  // rows that a block copies at once

  struct Shared {
    Backward<T> work;
    T held[2][HELD * D], moved[STAGES][2][MOVED * D];
    Row held_rows[HELD], moved_rows[4][MOVED];
    float moved_bias[STAGES][MOVED], held_bias[HELD], dbias[PARTS][HELD];
    uint4 left[2][PARTS > 1 ? GROUPS * M * STEPS * 32 : 1];  // p and ds as fragments
  };
  static_assert(sizeof(Shared) <= (D == 256 && !SMALL ? 163 : 99) * 1024);  // of sm_80, of sm_86 and sm_89
};

// A thread's place: its warp's rows and columns, and its row g and columns 2 t, 2 t + 1 of accumulators.
template <class P>
struct Lane {
  int id = threadIdx.x % 32, g = id / 4, t = id % 4;
  int group = threadIdx.x / 32 / P::PARTS, part = threadIdx.x / 32 % P::PARTS;
  int row = group * 16 * P::M, column = part * P::COLUMNS, moved = part * P::N * 8;
  PALM_DEVICE int held_row(int i) const { return row + i * 8 + g; }
  PALM_DEVICE int moved_row(int c) const { return moved + c / 2 * 8 + t * 2 + c % 2; }
};

template <class P, class T = typename P::T>
PALM_DEVICE void begin_work(Backward<T>& w, const Attention& p, const Sequence& s, int head, int first,
                            int count) {
  w.s = s;
  w.head = head;
  w.first = first;
  w.count = count;
  w.G = max(group(p), 1);  // without heads there are no rows to step over
  w.tokens = P::STEP / w.G;
  w.heads = P::STEP % w.G;
  w.scale = float(p.scale);
}

// ---- products
// Leaves this warp's part of c, rounded to T, to the warps with the same rows.
template <class P>
PALM_DEVICE void share(uint4* left, const typename P::Scores& c, const Lane<P>& lane) {
  using F = Mma<typename P::T>;
  constexpr int OWN = P::STEPS / P::PARTS;
#pragma unroll
  for (int m = 0; m < P::M; ++m)
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const auto a = F::a_of(&c[m][i * F::K / 8]);
      left[((lane.group * P::M + m) * P::STEPS + lane.part * OWN + i) * 32 + lane.id] =
          make_uint4(a.r[0], a.r[1], a.r[2], a.r[3]);
    }
}

// sums += c moved
template <class P, class T = typename P::T>
PALM_DEVICE void add(typename P::Sums& sums, const typename P::Scores& c, const uint4* left, const T* moved,
                     const Lane<P>& lane, bool tf32) {
  using F = Mma<T>;
  with_tf32<T>(tf32, [&](auto single) {
#pragma unroll(P::PARTS == 1 ? P::STEPS : 1)
    for (int i = 0; i < P::STEPS; ++i) {
      typename F::A a[P::M];
#pragma unroll
      for (int m = 0; m < P::M; ++m) {
        if constexpr (P::PARTS == 1) {
          a[m] = F::a_of(&c[m][i * F::K / 8]);
        } else {
          const uint4 r = left[((lane.group * P::M + m) * P::STEPS + i) * 32 + lane.id];
          a[m] = {{r.x, r.y, r.z, r.w}};
        }
      }
#pragma unroll
      for (int n = 0; n < P::COLUMNS / 8; n += 2) {
        const auto b = F::template load_rows_b<P::D>(moved, i * F::K, lane.column + n * 8);
#pragma unroll
        for (int m = 0; m < P::M; ++m) F::template multiply<single>(sums[m][n], sums[m][n + 1], a[m], b);
      }
    }
  });
}

// Adds the sums of ds over rows, one a held key.
template <class P>
PALM_DEVICE void add_bias(float* dbias, const typename P::Scores& ds, const Lane<P>& lane) {
#pragma unroll
  for (int i = 0; i < P::M * 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < P::N; ++n) sum += ds[i / 2][n][i % 2 * 2] + ds[i / 2][n][i % 2 * 2 + 1];
    sum = warp_sum<4>(sum);
    if (lane.t == 0) dbias[lane.held_row(i)] += sum;
  }
}

// A row and a kept key.
struct Pair {
  Row row;
  float bias;
  int key;
};
// s = q k becomes p, d = dp becomes ds; pair_of(i, c) is the pair of held row i of this lane and its moved
// row c. With a bias lse is natural, so that a finite stand-in for -inf does not overflow. EXACT: a row that
// sees one key has ds = dlse, since dp and delta cancel, but in float32 their rounding alone would be over
// the error budget.
template <class P, class PairOf>
PALM_DEVICE void gradients(typename P::Scores& s, typename P::Scores& d, bool biased, float scale,
                           bool masked, const PairOf& pair_of) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int c = 0; c < P::N * 2; ++c)
#pragma unroll
      for (int i = 0; i < P::M * 2; ++i)
        f(s[i / 2][c / 2][i % 2 * 2 + c % 2], d[i / 2][c / 2][i % 2 * 2 + c % 2], pair_of(i, c));
  };
  const float slope = scale * kLog2e;
  if (biased)
    each([&](float& x, float&, const Pair& at) { x = (x * scale + at.bias - at.row.lse) * kLog2e; });
  else
    each([&](float& x, float&, const Pair& at) { x = x * slope - at.row.lse; });
  each([&](float& x, float& y, const Pair& at) {
    x = exp2_fast(x);
    if (P::EXACT && at.row.lo == at.row.hi) y = 0;
    y = x * (y - at.row.delta);
  });
  if (masked)
    each([&](float& x, float& y, const Pair& at) {
      if (at.key < at.row.lo || at.key > at.row.hi) x = y = 0;
    });
}

// ---- tiles
// compute(j, stage) for tiles begin..end - 1, while load(j + 1, other stage) is under way.
template <int STAGES, class Load, class Compute>
PALM_DEVICE void pipeline(int begin, int end, const Load& load, const Compute& compute) {
  static_assert(STAGES == 1 || STAGES == 2);
  const auto start = [&](int j, int stage) {
    if (j < end) load(j, stage);
    commit_copies();
  };
  if (STAGES == 2) start(begin, 0);
  for (int j = begin; j < end; ++j) {
    const int stage = (j - begin) % STAGES;
    if (STAGES == 1) {
      __syncthreads();
      start(j, 0);
    }
    wait_copies<0>();
    __syncthreads();
    if (STAGES == 2) start(j + 1, stage ^ 1);
    compute(j, stage);
  }
  wait_copies<0>();
  __syncthreads();
}

// The packed row that this thread copies next, one chunk of it, as token and head of the group: its rows are
// STEP apart, and no division is needed from one to the next.
struct Cursor {
  int token, head;
};
template <class P>
PALM_DEVICE Cursor cursor_at(int row, int G) {
  row += threadIdx.x / P::CHUNKS;
  return {row / G, row % G};
}

// Starts to copy the ROWS rows from the cursor on, zeros for those that see nothing: what stands there must
// not matter. x is the sequence's first row, of the key/value head's first head. Returns the cursor behind.
template <class P, int ROWS, class T = typename P::T>
PALM_DEVICE Cursor load_seen(T* tile, const T* x, const Heads& strides, Cursor row, const Row* rows,
                             const Backward<T>& w, int dim, bool aligned) {
  const int G = w.G, tokens = w.tokens, heads = w.heads;
  const int64_t step = tokens * strides.token + heads * strides.head, wrap = strides.token - G * strides.head;
  x += row.token * strides.token + row.head * strides.head;
  load_tile<P::D, ROWS, P::THREADS>(tile, dim, aligned, [&](int i) {
    const T* from = rows[i].lse < INFINITY ? x : nullptr;
    x += step;
    row.token += tokens;
    row.head += heads;
    if (row.head >= G) {
      x += wrap;
      row.head -= G;
      ++row.token;
    }
    return from;
  });
  return row;
}

// row_of(i): where row i of the tile goes, for i < count.
template <class P, class T = typename P::T, class RowOf>
PALM_DEVICE void store_rows(const T* tile, int count, int dim, bool aligned, const RowOf& row_of) {
  const int chunk = threadIdx.x % P::CHUNKS, column = chunk * kChunk<T>;
  for (int i = threadIdx.x / P::CHUNKS; i < count; i += P::STEP)
    store_chunk(row_of(i) + column, chunk_at<P::D>(tile, i, chunk), dim - column, aligned);
}

// sums times factor(i) to a tile, rounded; i counts this lane's held rows.
template <class P, class T = typename P::T, class Factor>
PALM_DEVICE void round_to(T* tile, const typename P::Sums& sums, const Lane<P>& lane, const Factor& factor) {
#pragma unroll
  for (int i = 0; i < P::M * 2; ++i) {
    const float by = factor(i);
#pragma unroll
    for (int n = 0; n < P::COLUMNS / 8; ++n) {
      const float* pair = &sums[i / 2][n][i % 2 * 2];
      store_pair(element_at<P::D>(tile, lane.held_row(i), lane.column + n * 8 + lane.t * 2), pair[0] * by,
                 pair[1] * by);
    }
  }
}

}  // namespace palm::cuda
