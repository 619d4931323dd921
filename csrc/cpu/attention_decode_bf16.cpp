// attention_decode on bf16 by products of bf16 pairs (pairs.h): rows of K are left operands as they stand in
// the cache; probabilities become left operands by a transposition, V by pairing its rows.
#include "attention_decode.h"
#include "pairs.h"

namespace palm::cpu::ISA {

constexpr int kBlock = 64;             // keys a step
constexpr int kProbsLd = kBlock + 32;  // from row to row of probabilities: an odd number of cache lines

struct PairsDecode {
  const DecodePlan& x;
  Scratch<bf16> queries, keys, values, probs;
  Scratch<float> scores, alpha, lo, hi;
  Tiles tiles;
  PairsDecode(const DecodePlan& x, int64_t)
      : x(x),
        queries(x.room * x.width),
        keys(kBlock * kRowsLd),
        values(kBlock * x.width),
        probs(16 * kProbsLd),
        scores(kBlock * x.room),
        alpha(x.room),
        lo(x.room),
        hi(x.room) {
    memset(probs, 0, 16 * kProbsLd * sizeof(bf16));
  }

  const bf16* row(const DecodeChunk<bf16>& c, const Heads& cache, int64_t n, int64_t end) const {
    return n < end && !c.removed(n) ? c.key(cache, n) : nullptr;
  }

  // The rows of K of one block, in place where they are whole.
  const bf16* rows_of_keys(const DecodeChunk<bf16>& c, int64_t n0, int64_t end, int64_t& stride) {
    stride = c.p.k.token;
    if (!c.p.key_bias && c.p.D % 32 == 0 && end - n0 >= kBlock) return c.key(c.p.k, n0);
    stride = kRowsLd;
    for (int i = 0; i < kBlock; ++i) {
      const bf16* from = row(c, c.p.k, n0 + i, end);
      for (int64_t d = 0; d < c.p.D; d += 32)
        _mm512_storeu_si512(keys + i * kRowsLd + d, load_32(from, d, c.p.D));
    }
    return keys;
  }

  // Probabilities [kBlock][16 of room] as left operand [16][kBlock], zero from `count` on.
  void turn_probs(const float* from, int64_t count) {
    for (int64_t n = 0; n < kBlock; n += 32) {
      vf r[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 16; ++i) {
          const int64_t at = n + 16 * half + i;
          r[half][i] = at < count ? load(from + at * x.room) : vf{};
        }
        transpose<8>(r[half]);
      }
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(probs + i * kProbsLd + n, halves(r[0][i], r[1][i]));
    }
  }

  void block(const DecodeChunk<bf16>& c, int64_t n0, int64_t end) {
    const Attention& p = c.p;
    const int64_t count = least(kBlock, end - n0);
    int64_t stride;
    const bf16* k = rows_of_keys(c, n0, end, stride);
    Ahead next_values = c.ahead(p.v, n0, count);
    for (int64_t r = 0; r < x.room; r += 16)
      product_tall(k, stride, queries + r * x.width, x.width, scores + r, x.room, [&] {
        for (int i = 0; i < kBlock; ++i) next_values.fetch();
      });
    const vf scale = set1(float(p.scale));
    for (int64_t i = 0; i < count * x.room; i += 16) store(scores + i, load(scores + i) * scale);
    c.softmax(scores, n0, count, lo, hi, alpha);
    Ahead next_keys = c.ahead(p.k, n0 + count, least(kBlock, end - n0 - count));
    for (int64_t n = 0; n < kBlock; n += 2) {
      pack_pair(row(c, p.v, n0 + n, end), row(c, p.v, n0 + n + 1, end), p.D, values + n * kPanel,
                kBlock * kPanel);
      for (int64_t d = 0; d < 2 * x.width; d += 32) next_keys.fetch();
    }
    for (int64_t r = 0; r < x.room; r += 16) {
      turn_probs(scores + r, count);
      for (int i = 0; i < 16; ++i) {
        if (alpha[r + i] == 1) continue;  // most blocks hold no new maximum
        float* out = c.out + (r + i) * x.width;
        for (int64_t d = 0; d < x.width; d += 16) store(out + d, load(out + d) * set1(alpha[r + i]));
      }
      for (int64_t d = 0; d < x.width; d += kPanel)
        product_16(probs, kProbsLd, values + d * kBlock, kBlock, c.out + r * x.width + d, x.width);
    }
  }

  void run(const DecodeChunk<bf16>& c, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < x.room; r += 16) {
      const bf16* rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = c.query(r + i);
      pack_transposed(rows, c.p.D, queries + r * x.width, 32);
    }
    for (int64_t n = most(begin, c.begin(lo, hi) / kBlock * kBlock); n < end; n += kBlock) block(c, n, end);
  }
};

int64_t attention_decode(const Attention& p) {
  const int64_t bad = bad_length(p);
  if (bad < 0) decode<bf16, PairsDecode>(p, DecodePlan(p, kBlock, 16, 32));
  return bad;
}

}  // namespace palm::cpu::ISA
