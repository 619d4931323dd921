"""Attention of a few new tokens to a cache (Flash-Decoding): the cache is split over programs, a second kernel merges their results.

A program reads its part of the cache once for all the query heads of a key/value head. With one part the result is stored at once.
"""

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    attend,
    bias_row,
    bias_strides,
    common_options,
    first_row,
    geometry,
    key_tiles,
    load_rows,
    lse_offsets,
    lse_strides,
    padded,
    row_offsets,
    store_attended,
    strides4,
    tile_config,
    visible,
)
from .common import multiprocessors, next_power_of_2

MAX_PARTS = 128


# fmt: off
@triton.jit(debug=True)
def _decode(
    q, k, v, out, lse, bias, lengths, sq, sk, sv, so, sl, sb, part_out, part_lse,
    B, T, S, G, K, scale, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """Part program_id(1) of num_programs(1) of the key tiles that a tile of query rows sees; results part_out, part_lse apart."""
    # fmt: on
    tiles = tl.cdiv(T * G, BM)
    tile, bk = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kh = bk // K, bk % K
    part = tl.program_id(1)
    length = tl.load(lengths + b)
    tl.device_assert((length >= 0) & (length <= S), "attention_decode: cache_lengths must be 0 to Smax")
    length = tl.minimum(tl.maximum(length, 0), S)
    r = tile * BM + tl.arange(0, BM)
    here = r < T * G
    lo, hi = visible(r // G, T, length, 0, left, right, True, LEFT, RIGHT)
    t1 = (tl.minimum(tile * BM + BM, T * G) - 1) // G
    begin, _, _, end = key_tiles(tile * BM // G, t1, T, length, 0, left, right, True, LEFT, RIGHT, BN)
    share = tl.cdiv(end - begin, tl.num_programs(1))
    begin += part * share
    end = tl.minimum(begin + share, end)
    bias_base = bias
    if bias is not None:
        bias_base = bias_row(bias, b, 0, sb)
    q_rows = q, row_offsets(r, G, kh * G, 0, b, sq), here
    qt = load_rows(*q_rows, True, D, BD)
    top, total, acc = attend(
        qt, q_rows, tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32), begin, end,
        end, end, first_row(k, b, 0, kh, sk), first_row(v, b, 0, kh, sv), bias_base, None, sk[1], sv[1], sb[1],
        lo, hi, length, scale, True, FOLD, WIDE, D, BD, DC, BN, PREC)
    if FOLD:
        top = top * scale
    store_attended(
        out + part.to(tl.int64) * part_out, lse + part.to(tl.int64) * part_lse, acc, total, top,
        row_offsets(r, G, kh * G, 0, b, so), lse_offsets(r, G, kh * G, 0, b, sl), here, D, BD)


# fmt: off
@triton.jit
def _merge(
    parts_out, parts_lse, out, lse, so, sl, T, H, N, parts, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):
    """out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i) of one row; parts_out [parts,B,T,H,D], parts_lse [parts,B,H,T]."""
    # fmt: on
    row = tl.program_id(0)
    b, t, h = row // (T * H), row // H % T, row % H
    i, d = tl.arange(0, BP), tl.arange(0, BD)
    lses = tl.load(parts_lse + i.to(tl.int64) * N + (b * H + h) * T + t, mask=i < parts, other=-float("inf"))
    top = tl.max(lses, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp(lses - top)
    total = tl.sum(weights, 0)
    safe = tl.where(total == 0, 1.0, total)
    values = tl.load(
        parts_out + (i.to(tl.int64) * N + row)[:, None] * D + d[None, :], mask=(i < parts)[:, None] & (d < D)[None, :], other=0.0)
    value = tl.sum(values * (weights / safe)[:, None], 0)
    at = b.to(tl.int64) * so[0] + t.to(tl.int64) * so[1] + h.to(tl.int64) * so[2]
    tl.store(out + at + d, value.to(out.dtype.element_ty), mask=d < D)
    tl.store(
        lse + b.to(tl.int64) * sl[0] + h.to(tl.int64) * sl[1] + t,
        tl.where(total == 0, -float("inf"), top + tl.log(safe)))


def attention_decode(q, k_cache, v_cache, cache_lengths, key_bias, scale, left, right, out, lse) -> None:
    if out.numel() == 0:
        return
    shape = geometry(q, k_cache)
    options = tile_config("decode", q, key_bias)
    options["BM"] = min(options["BM"], max(16, next_power_of_2(shape.T * shape.G)))
    programs = shape.query_programs(options["BM"])
    parts = min(MAX_PARTS, triton.cdiv(shape.S, options["BN"]), 2 * multiprocessors(q.device) // programs)
    parts = max(1, parts)
    part_out, part_lse, steps = out, lse, (0, 0)
    if parts > 1:
        part_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
        steps = part_out.stride(0), part_lse.stride(0)
    part_strides = strides4(out) if parts == 1 else part_out.stride()[1:4]
    _decode[(programs, parts)](
        q, k_cache, v_cache, part_out, part_lse, key_bias, cache_lengths, strides4(q), strides4(k_cache), strides4(v_cache),
        part_strides, lse_strides(lse) if parts == 1 else part_lse.stride()[1:3], bias_strides(key_bias), *steps,
        *shape.sizes, scale, *shape.window(left, right),
        LEFT=left >= 0, RIGHT=right >= 0, FOLD=key_bias is None and scale > 0, **common_options(q, k_cache, v_cache), **options,
        sanitize_overflow=False,
    )  # fmt: skip
    if parts > 1:
        _merge[(lse.numel(),)](
            part_out, part_lse, out, lse, strides4(out), lse_strides(lse), shape.T, shape.G * shape.K, lse.numel(), parts,
            D=q.shape[-1], BD=padded(q.shape[-1]), BP=next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
