"""What attention's kernels share: which keys a query sees, where a tile's rows are, tile sizes.

All G = H / K query heads of a key/value head stand as rows of one tall matrix, row r being token r // G and head r % G, so one tile of
K and V serves every head. Which keys a row sees is an interval lo..hi whose ends grow with the token, so a tile of rows meets a run of
key tiles: masked ones, full ones (no mask is computed there), masked ones.

With a key_bias, tiles whose keys are all removed (-inf) are not visited: `present_tiles` lists the others in order. `ranks` says
how many of a sequence's tiles before a given one are listed, so an interval of tiles becomes an interval of the list.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import arch, dot_precision, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)

# (kernel, 16-bit?, padded head dim): BM query rows, BN keys, num_warps, num_stages; for "dkdv" a fifth number means two passes, dk's by
# so many query rows. "+bias" stands where a key_bias would otherwise make the kernel spill. Of the tiles that were tried, the largest that
# do not spill under any mask (triton 3.9); what they take stands in benchmarks/results/triton-resources. No GPU has timed them yet.
HOPPER = {
    ("fwd", True, 256): (128, 64, 8, 2),
    ("fwd+bias", True, 256): (128, 32, 8, 2),
    ("fwd", True, 128): (128, 128, 8, 2),
    ("fwd+bias", True, 128): (128, 64, 8, 2),
    ("fwd", True, 64): (128, 128, 8, 2),
    ("fwd", True, 32): (128, 64, 4, 2),
    ("dq", True, 256): (128, 32, 8, 2),
    ("dq", True, 128): (128, 64, 8, 2),
    ("dq", True, 64): (128, 64, 8, 2),
    ("dq", True, 32): (64, 64, 4, 2),
    # at D = 256 dk and dv of 64 keys together spill (272 bytes): dk and dv of 128 keys apart, 8 products instead of 7
    ("dkdv", True, 256): (64, 128, 8, 2, 32),
    ("dkdv", True, 128): (32, 128, 8, 2),
    ("dkdv", True, 64): (64, 128, 8, 2),
    ("dkdv", True, 32): (64, 64, 4, 2),
    ("decode", True, 256): (64, 32, 4, 3),
    ("decode", True, 128): (64, 64, 4, 3),
    ("decode", True, 64): (64, 128, 4, 3),
    ("decode", True, 32): (64, 128, 4, 3),
    ("fwd", False, 256): (32, 16, 8, 2),
    ("fwd", False, 128): (64, 32, 8, 2),
    ("fwd", False, 64): (64, 32, 4, 2),
    ("fwd", False, 32): (64, 32, 4, 2),
    ("dq", False, 256): (32, 16, 8, 2),
    ("dq", False, 128): (32, 16, 4, 1),
    ("dq", False, 64): (64, 32, 4, 2),
    ("dq", False, 32): (64, 32, 4, 2),
    ("dkdv", False, 256): (16, 32, 8, 1, 16),
    ("dkdv", False, 128): (16, 32, 8, 1),
    ("dkdv", False, 64): (16, 32, 8, 1),
    ("dkdv", False, 32): (32, 64, 4, 2),
    ("decode", False, 256): (32, 32, 8, 1),
    ("decode", False, 128): (32, 32, 8, 2),
    ("decode", False, 64): (32, 32, 4, 2),
    ("decode", False, 32): (32, 64, 4, 2),
}
AMPERE = {
    **HOPPER,
    ("fwd", True, 256): (64, 64, 8, 2),
    ("fwd+bias", True, 256): (64, 64, 8, 2),
    ("fwd", True, 128): (128, 64, 8, 3),
    ("dq", True, 256): (64, 32, 8, 2),
    ("dq", True, 128): (128, 32, 8, 2),
    ("dkdv", True, 256): (32, 64, 8, 2),
    ("dkdv+bias", True, 256): (64, 64, 8, 2, 32),
    ("dkdv", True, 128): (64, 64, 8, 2),
    ("decode", True, 256): (64, 32, 8, 3),
    ("fwd", False, 128): (64, 16, 8, 2),
    ("fwd", False, 64): (64, 32, 8, 2),
    ("dq", False, 64): (32, 32, 4, 2),
    ("fwd", False, 32): (32, 32, 4, 2),
    ("dq", False, 256): (32, 16, 8, 1),
    ("dkdv", False, 32): (16, 32, 4, 2),
    ("dq", True, 32): (64, 64, 8, 2),
    ("dkdv", True, 32): (64, 64, 8, 2),
    ("decode", True, 64): (64, 64, 4, 3),
}


def config(kernel: str, arch: int, D: int, dtype: torch.dtype, bias: bool = False) -> dict:
    """Tile sizes and launch options of "fwd", "dq", "dkdv", "decode": by chip, head dim, dtype and bias, never by length."""
    table = HOPPER if arch >= 90 else AMPERE
    key = dtype.itemsize == 2, max(32, padded(D))
    biased = table.get((kernel + "+bias", *key)) if bias else None
    BM, BN, warps, stages, *dk_rows = biased or table[(kernel, *key)]
    options = {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": stages}
    return {**options, "BM_DK": dk_rows[0] if dk_rows else 0} if kernel == "dkdv" else options


def padded(D: int) -> int:
    return max(16, next_power_of_2(D))


def common_options(q: Tensor, *others: Tensor) -> dict:
    """Head dim, its chunks, product precision, and whether a tile's offsets need 64 bits (128 rows of the widest stride)."""
    D = q.shape[-1]
    wide = max(s for x in (q, *others) for s in x.stride()[-3:-1]) >= 2**24
    DC = min(64, padded(D)) if q.dtype == torch.float32 else padded(D)
    return {"D": D, "BD": padded(D), "DC": DC, "PREC": dot_precision(q.dtype), "WIDE": wide}


def tile_config(kernel: str, q: Tensor, key_bias: Tensor | None) -> dict:
    return config(kernel, arch(), q.shape[-1], q.dtype, key_bias is not None)


# ---- which keys a query sees, where rows are ----
@triton.jit
def visible(t, T, S, prefix, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Query t of T sees keys lo..hi of S (none if hi < lo): causal j <= t + S - T or j < prefix, a window on either side of t + S - T."""
    diagonal = t + S - T
    lo = diagonal * 0
    hi = lo + S - 1
    if CAUSAL:
        hi = tl.minimum(hi, tl.maximum(diagonal, prefix - 1))
    if RIGHT:
        hi = tl.minimum(hi, diagonal + right)
    if LEFT:
        lo = tl.maximum(lo, diagonal - left)
    return lo, hi


@triton.jit
def locate(slot, cu, B, factor, BLOCK: tl.constexpr):
    """(sequence, tile in it) of a slot of a packed batch: sequence b begins at slot cu[b] factor // BLOCK + b.

    That leaves every sequence at least as many slots as it has tiles; a slot behind its last tile has nothing to do.
    """
    b = -1
    for chunk in range(0, B, 128):
        i = chunk + tl.arange(0, 128)
        start = tl.load(cu + i, mask=i < B, other=0) * factor // BLOCK + i
        b += tl.sum(((start <= slot) & (i < B)).to(tl.int32))
    return b, slot - (tl.load(cu + b) * factor // BLOCK + b)


@triton.jit
def sequence(b, T, S, cu_q, cu_k, prefix_lengths):
    """Of sequence b: first query row, first key row, T, S, prefix (rows 0 and the common T, S in a dense batch)."""
    q_row, k_row, prefix = 0, 0, 0
    if cu_q is not None:
        q_row = tl.load(cu_q + b)
        k_row = tl.load(cu_k + b)
        T = tl.load(cu_q + b + 1) - q_row
        S = tl.load(cu_k + b + 1) - k_row
    if prefix_lengths is not None:
        prefix = tl.minimum(tl.maximum(tl.load(prefix_lengths + b), 0), S)
    return q_row, k_row, T, S, prefix


@triton.jit
def query_tile(pid, cu_q, B, T, G, K, BM: tl.constexpr):
    """(sequence, key/value head, tile, slot) of a program. Later tiles first: under causal they see more keys."""
    if cu_q is None:
        tiles = tl.cdiv(T * G, BM)
        bk = pid // tiles
        tile = tiles - 1 - pid % tiles
        return bk // K, bk % K, tile, bk * tiles + tile
    else:
        slots = T * G // BM + B
        b, tile = locate(pid % slots, cu_q, B, G, BM)
        return b, pid // slots, tile, pid


@triton.jit
def key_tiles(
    t0, t1, T, S, prefix, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BN: tl.constexpr
):
    """Tiles of keys that queries t0..t1 meet: [begin, end), of which [full0, full1) are visible to all of them."""
    lo0, hi0 = visible(t0, T, S, prefix, left, right, CAUSAL, LEFT, RIGHT)
    lo1, hi1 = visible(t1, T, S, prefix, left, right, CAUSAL, LEFT, RIGHT)
    begin = lo0 // BN
    end = tl.maximum(begin, tl.cdiv(tl.maximum(hi1 + 1, 0), BN))
    full0 = tl.minimum(tl.maximum(tl.cdiv(lo1, BN), begin), end)
    full1 = tl.minimum(tl.maximum(tl.maximum(hi0 + 1, 0) // BN, full0), end)
    return begin, full0, full1, end


# fmt: off
@triton.jit
def tile_of_rows(
    tile, b, k_row, T, S, G, prefix, left, right, ranks, cu_k,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """Packed rows r of a tile, which exist, their bounds lo, hi, and the run of key tiles that they meet (begin, end, full0, full1).

    With a bias (ranks) the run is one of the sequence's entries in `tiles`, which begin at the last number returned.
    """
    # fmt: on
    rows = T * G
    r = tile * BM + tl.arange(0, BM)
    here = r < rows
    lo, hi = visible(r // G, T, S, prefix, left, right, CAUSAL, LEFT, RIGHT)
    t1 = (tl.minimum(tile * BM + BM, rows) - 1) // G
    begin, full0, full1, end = key_tiles(tile * BM // G, t1, T, S, prefix, left, right, CAUSAL, LEFT, RIGHT, BN)
    first = 0
    if ranks is not None:
        first = listed(b, k_row, S, cu_k, BN)
        begin, full0 = tl.load(ranks + first + begin), tl.load(ranks + first + full0)
        full1, end = tl.load(ranks + first + full1), tl.load(ranks + first + end)
    return r, here, lo, hi, begin, end, full0, full1, first


@triton.jit
def keys_of_tile(i, bias, stride, S, BN: tl.constexpr):
    """Keys n of tile i, which of them are there (not beyond S, not removed), their bias (0 without)."""
    n = i * BN + tl.arange(0, BN)
    here = n < S
    b = 0.0
    if bias is not None:
        b = tl.load(bias + n.to(tl.int64) * stride, mask=here, other=-float("inf"))
        here = b != -float("inf")
    return n, here, b


@triton.jit
def rows_of_tile(base, i, stride, here, WIDE: tl.constexpr, BN: tl.constexpr):
    """The rows of k or v that belong to the keys of tile i (base, offsets, which exist)."""
    return base + tl.full((), i * BN, tl.int64) * stride, steps(tl.arange(0, BN), stride, WIDE), here


@triton.jit
def first_tile(begin, full0, MASKED: tl.constexpr):
    """Of the loop over the tiles [full0, full1), or with MASKED over the others of [begin, end), in one loop whichever side they are."""
    return begin if MASKED else full0


@triton.jit
def last_tile(end, full0, full1, MASKED: tl.constexpr):
    return end - (full1 - full0) if MASKED else full1


@triton.jit
def around(j, full0, full1, MASKED: tl.constexpr):
    """The tile that step j of that loop visits."""
    if MASKED:
        return j + tl.where(j >= full0, full1 - full0, 0)
    else:
        return j


@triton.jit
def listed(b, k_row, S, cu_k, BN: tl.constexpr):
    """Where the entries of sequence b begin in `tiles` and `ranks`: cdiv(S, BN) + 1 fit before the next one's."""
    if cu_k is None:
        return b * S // BN + 2 * b
    else:
        return k_row // BN + 2 * b


@triton.jit
def load_rows(base, offsets, here, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """[rows, BD] from base + offsets ([rows]), zeros beyond D and, with ROWS, where `here` is false."""
    d = tl.arange(0, BD)
    pointers = base + (offsets[:, None] + d[None, :])
    if ROWS and D != BD:
        return tl.load(pointers, mask=here[:, None] & (d < D)[None, :], other=0.0)
    elif ROWS:
        return tl.load(pointers, mask=here[:, None], other=0.0)
    elif D != BD:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def product(a, a_rows, b, b_rows, D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, PREC: tl.constexpr):
    """a b^T over the head dim, [rows of a, rows of b], of tiles that stand in rows (base, offsets, which exist).

    With DC < BD (float32 beyond 64) the tiles are loaded again by chunks of DC: a tile that stays in registers would stay there in the
    two tf32 parts that its products need, which is more than there are.
    """
    if DC == BD:
        return tl.dot(a, tl.trans(b), input_precision=PREC)
    else:
        total = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
        for c in tl.range(0, D, DC):
            d = c + tl.arange(0, DC)
            ac = tl.load(
                a_rows[0] + (a_rows[1][:, None] + d[None, :]), mask=a_rows[2][:, None] & (d < D)[None, :], other=0.0
            )
            bc = tl.load(
                b_rows[0] + (b_rows[1][:, None] + d[None, :]), mask=b_rows[2][:, None] & (d < D)[None, :], other=0.0
            )
            total = tl.dot(ac, tl.trans(bc), total, input_precision=PREC)
        return total


@triton.jit
def steps(n, stride, WIDE: tl.constexpr):
    """n stride within a tile: 32-bit, which halves the registers of a loop's pointers, unless WIDE says that strides are too large."""
    if WIDE:
        return n.to(tl.int64) * stride
    else:
        return n * stride


@triton.jit
def store_rows(base, offsets, value, here, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = here[:, None]
    if D != BD:
        mask = mask & (d < D)[None, :]
    tl.store(base + offsets[:, None] + d[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def first_row(base, b, row, head, strides):
    """Where row `row` of (b, head) begins in a [B,rows,heads,D] tensor, 64-bit."""
    b, row, head = tl.full((), b, tl.int64), tl.full((), row, tl.int64), tl.full((), head, tl.int64)
    return base + b * strides[0] + row * strides[1] + head * strides[2]


@triton.jit
def again(tile):
    """tile, in a way that the compiler cannot see (grids are one-dimensional): what an epilogue derives from it is then computed there
    and does not occupy registers, a few dozen of them, during the loop."""
    return tile + tl.num_programs(2) - 1


@triton.jit
def row_offsets(r, G, h0, row, b, strides):
    """Offsets of packed query rows r of a [B,T,H,D] tensor: token row + r // G, head h0 + r % G."""
    t = (row + r // G).to(tl.int64)
    h = (h0 + r % G).to(tl.int64)
    return tl.full((), b, tl.int64) * strides[0] + t * strides[1] + h * strides[2]


@triton.jit
def lse_offsets(r, G, h0, row, b, strides):
    """Offsets of packed query rows r in [B,H,T]."""
    return tl.full((), b, tl.int64) * strides[0] + (h0 + r % G).to(tl.int64) * strides[1] + row + r // G


@triton.jit
def bias_row(bias, b, row, strides):
    return bias + tl.full((), b, tl.int64) * strides[0] + tl.full((), row, tl.int64) * strides[1]


# ---- keys that are not removed ----
@triton.jit
def seen_at(b, k_row, S, cu_k):
    """Where the S + 1 entries of sequence b begin in `seen`."""
    if cu_k is None:
        return tl.full((), b, tl.int64) * (S + 1)
    else:
        return tl.full((), k_row + b, tl.int64)


@triton.jit
def _present_tiles(bias, tiles, ranks, seen, cu_k, S, sb, BN: tl.constexpr, BT: tl.constexpr):
    """One program a sequence, BT tiles a step: `tiles` gets those with a key in order, `ranks` how many of them come before each tile,
    `seen`, where it is given, how many kept keys come before each key."""
    b = tl.program_id(0)
    k_row = 0
    if cu_k is not None:
        k_row = tl.load(cu_k + b)
        S = tl.load(cu_k + b + 1) - k_row
    first = listed(b, k_row, S, cu_k, BN)
    row = bias_row(bias, b, k_row, sb)
    count, keys = 0, 0
    for start in range(0, tl.cdiv(S, BN) + 1, BT):
        i = start + tl.arange(0, BT)
        n = i.to(tl.int64)[:, None] * BN + tl.arange(0, BN)[None, :]
        value = tl.load(row + n * sb[1], mask=n < S, other=-float("inf"))
        kept = (value != -float("inf")).to(tl.int32)
        present = tl.max(kept, 1)
        before = count + tl.cumsum(present, 0) - present
        tl.store(ranks + first + i, before, mask=i <= tl.cdiv(S, BN))
        tl.store(tiles + first + before, i, mask=present > 0)
        count += tl.sum(present)
        if seen is not None:
            in_tile = tl.sum(kept, 1)
            earlier = keys + tl.cumsum(in_tile, 0) - in_tile
            tl.store(seen + seen_at(b, k_row, S, cu_k) + n, earlier[:, None] + tl.cumsum(kept, 1) - kept, mask=n <= S)
            keys += tl.sum(in_tile)


def present_tiles(bias: Tensor | None, cu_k: Tensor | None, B: int, S: int, BN: int, count_keys: bool = False) -> tuple:
    """(tiles, ranks, seen) int32, or Nones without a bias. bias [B,S], or [sum S] with cu_k and S = sum S."""
    if bias is None:
        return None, None, None
    rows = S if cu_k is not None else B * S
    tiles, ranks = torch.empty(2, rows // BN + 2 * B + 2, dtype=torch.int32, device=bias.device)
    seen = torch.empty(rows + B, dtype=torch.int32, device=bias.device) if count_keys else None
    if B:
        _present_tiles[(B,)](bias, tiles, ranks, seen, cu_k, S, bias_strides(bias), BN=BN, BT=max(16, 4096 // BN))
    return tiles, ranks, seen


def bias_strides(bias: Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias is None else (0, bias.stride(0)) if bias.dim() == 1 else bias.stride()


def strides4(x: Tensor) -> tuple[int, ...]:
    """(batch, token, head) strides of [B,T,H,D], or of packed [rows,H,D] with batch stride 0."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def lse_strides(x: Tensor | None) -> tuple[int, int]:
    """(batch, head) strides of [B,H,T], or of packed [H,rows]."""
    return (0, 0) if x is None else (0, x.stride(0)) if x.dim() == 2 else x.stride()[:2]


# ---- the forward step, for attention and decode ----
# fmt: off
@triton.jit
def attend(
    q, q_rows, top, total, acc, begin, end, full0, full1, k, v, bias, tiles, sk, sv, sb, lo, hi, S, scale,
    MASKED: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """Online softmax over key tiles: running maximum `top`, sum of exponentials `total`, acc = their sum times v.

    The tiles are [full0, full1), or with MASKED the others of [begin, end).
    k, v, bias point to the sequence's first key, sk, sv, sb are its rows' strides. FOLD: scores and `top` are q k^T alone.
    """
    # fmt: on
    unit = scale * LOG2E if FOLD else LOG2E
    for j in tl.range(first_tile(begin, full0, MASKED), last_tile(end, full0, full1, MASKED)):
        i = around(j, full0, full1, MASKED)
        if tiles is not None:
            i = tl.load(tiles + i)
        n, here, b = keys_of_tile(i, bias, sb, S, BN)
        k_rows = rows_of_tile(k, i, sk, here, WIDE, BN)
        kn = load_rows(*k_rows, MASKED or bias is not None, D, BD)
        s = product(q, q_rows, kn, k_rows, D, BD, DC, PREC)
        if not FOLD:
            s = s * scale
        keep = here[None, :]
        if bias is not None:
            s = s + b[None, :]
        if MASKED:
            keep = keep & (n[None, :] >= lo[:, None]) & (n[None, :] <= hi[:, None])
        if MASKED or bias is not None:
            s = tl.where(keep, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = higher
        if MASKED or bias is not None:
            base = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2((s - base[:, None]) * unit)  # not s unit - base unit in one fma: its rounding of base blows up beyond 1e8
        shrink = tl.exp2((top - base) * unit)
        total = total * shrink + tl.sum(p, 1)
        vn = load_rows(*rows_of_tile(v, i, sv, here, WIDE, BN), MASKED or bias is not None, D, BD)
        acc = tl.dot(p.to(vn.dtype), vn, acc * shrink[:, None], input_precision=PREC)
        top = higher
    return top, total, acc


@triton.jit
def store_attended(out, lse, acc, total, top, offsets, lse_at, here, D: tl.constexpr, BD: tl.constexpr):
    """out = acc / total, lse = top + log total with top in natural units; 0 and -inf where nothing was seen."""
    safe = tl.where(total == 0, 1.0, total)
    store_rows(out, offsets, acc / safe[:, None], here, D, BD)
    tl.store(lse + lse_at, tl.where(total == 0, -float("inf"), top + tl.log(safe)), mask=here)


# ---- host side ----
class Geometry(NamedTuple):
    """Sizes as the kernels take them: T and S are the rows of all sequences where the batch is packed."""

    B: int
    T: int
    S: int
    G: int
    K: int
    packed: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        return self[:5]

    def tiles(self, rows: int, factor: int, block: int) -> int:
        """Of one key/value head: of all batch entries, or slots enough for all sequences."""
        return rows * factor // block + self.B if self.packed else self.B * triton.cdiv(rows * factor, block)

    def query_programs(self, BM: int) -> int:
        return self.K * self.tiles(self.T, self.G, BM)

    def key_programs(self, BN: int) -> int:
        return self.K * self.tiles(self.S, 1, BN)

    def window(self, left: int, right: int) -> tuple[int, int]:
        """Beyond every length a bound means nothing; so clipped, 32-bit sums with it do not overflow."""
        return min(left, self.S + self.T), min(right, self.S + self.T)


def geometry(q: Tensor, k: Tensor, cu_q: Tensor | None = None) -> Geometry:
    T, H = q.shape[-3:-1]
    S, K = k.shape[-3:-1]
    return Geometry(len(q) if cu_q is None else len(cu_q) - 1, T, S, H // K, K, cu_q is not None)


def mask_options(causal: bool, left: int, right: int) -> dict:
    return {"CAUSAL": causal, "LEFT": left >= 0, "RIGHT": right >= 0}


@triton.jit(debug=True)
def _check_offsets(cu_q, cu_k, B, T, S):
    last_q, last_k = tl.load(cu_q + B), tl.load(cu_k + B)
    tl.device_assert((last_q == T) & (last_k == S), "attention_varlen: cu_seqlens must end at the row counts")
    tl.device_assert((tl.load(cu_q) == 0) & (tl.load(cu_k) == 0), "attention_varlen: cu_seqlens must begin at 0")
    for chunk in range(0, B, 128):
        i = chunk + tl.arange(0, 128)
        for cu in tl.static_range(2):
            base = cu_q if cu == 0 else cu_k
            step = tl.load(base + i + 1, mask=i < B, other=0) - tl.load(base + i, mask=i < B, other=0)
            tl.device_assert(step >= 0, "attention_varlen: cu_seqlens must ascend")


def check_offsets(cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor) -> None:
    """Device-side assertions: offsets ascend from 0 to the row counts."""
    _check_offsets[(1,)](cu_q, cu_k, len(cu_q) - 1, len(q), len(k), num_warps=4, sanitize_overflow=False)
