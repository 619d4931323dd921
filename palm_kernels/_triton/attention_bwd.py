"""Attention backward in two passes and no atomics: dq by tiles of query rows, dk, dv and dbias by tiles of keys over all heads' rows.

With p = exp(scale q k^T + bias - lse), dp = dout v^T, delta = rowsum(dout out) - dlse, ds = p (dp - delta) (Dao 2022, algorithm 4):
dq = scale ds k, dk = scale ds^T q, dv = p^T dout, dbias = the sum of ds over rows. The first pass leaves lse and delta of its rows,
in the packed order, for the second; rows that see nothing, and those that fill up a tile, get lse = inf, so that their p is 0.

A row that sees one key has ds = dlse: dp and delta cancel. In float32 their rounding alone would be over the error budget, so there
dp is multiplied by a third statistic, 0 in such rows (EXACT).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    LOG2E,
    again,
    around,
    bias_row,
    bias_strides,
    common_options,
    first_row,
    first_tile,
    geometry,
    keys_of_tile,
    last_tile,
    load_rows,
    locate,
    lse_offsets,
    lse_strides,
    mask_options,
    present_tiles,
    product,
    query_tile,
    row_offsets,
    rows_of_tile,
    seen_at,
    sequence,
    steps,
    store_rows,
    strides4,
    tile_config,
    tile_of_rows,
    visible,
)


@triton.jit
def _probability(qk, lse, bias, scale):
    """exp(scale qk + bias - lse) for tiles with lse and bias already broadcast; bias may be None."""
    if bias is None:
        return tl.exp2(tl.fma(qk, scale * LOG2E, lse * -LOG2E))
    else:
        return tl.exp2((qk * scale + bias - lse) * LOG2E)


# fmt: off
@triton.jit
def _dq_tiles(
    dq, q, q_rows, do, do_rows, lse, delta, weight, begin, end, full0, full1, k, v, bias, tiles, sk, sv, sb, lo, hi, S, scale,
    MASKED: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """dq + ds k over key tiles [full0, full1), or with MASKED the others of [begin, end)."""
    # fmt: on
    for j in tl.range(first_tile(begin, full0, MASKED), last_tile(end, full0, full1, MASKED)):
        i = around(j, full0, full1, MASKED)
        if tiles is not None:
            i = tl.load(tiles + i)
        n, here, b = keys_of_tile(i, bias, sb, S, BN)
        k_rows, v_rows = rows_of_tile(k, i, sk, here, WIDE, BN), rows_of_tile(v, i, sv, here, WIDE, BN)
        row_bias = None
        if bias is not None:
            row_bias = b[None, :]
        kn = load_rows(*k_rows, MASKED or bias is not None, D, BD)
        vn = load_rows(*v_rows, MASKED or bias is not None, D, BD)
        p = _probability(product(q, q_rows, kn, k_rows, D, BD, DC, PREC), lse[:, None], row_bias, scale)
        keep = here[None, :]
        if MASKED:
            keep = keep & (n[None, :] >= lo[:, None]) & (n[None, :] <= hi[:, None])
        if MASKED or bias is not None:
            p = tl.where(keep, p, 0.0)
        dp = product(do, do_rows, vn, v_rows, D, BD, DC, PREC)
        if weight is not None:
            dp *= weight[:, None]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(kn.dtype), kn, dq, input_precision=PREC)
    return dq


# fmt: off
@triton.jit
def _dq(
    dout, dlse, q, k, v, out, lse, dq, stats, bias, tiles, ranks, seen, prefix_lengths, cu_q, cu_k,
    sd, sdl, sq, sk, sv, so, sl, sdq, sb, B, T, S, G, K, scale, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """Tensors [B,T,H,D], [B,S,K,D] by strides (batch, token, head); stats [2 or 3, slots, BM] float32 gets each row's."""
    # fmt: on
    b, kh, tile, slot = query_tile(tl.program_id(0), cu_q, B, T, G, K, BM)
    slots = tl.num_programs(0)
    q_row, k_row, T, S, prefix = sequence(b, T, S, cu_q, cu_k, prefix_lengths)
    if tile * BM < T * G:
        r, here, lo, hi, begin, end, full0, full1, first = tile_of_rows(
            tile, b, k_row, T, S, G, prefix, left, right, ranks, cu_k, CAUSAL, LEFT, RIGHT, BM, BN)
        k_base, v_base = first_row(k, b, k_row, kh, sk), first_row(v, b, k_row, kh, sv)
        bias_base, list_base = bias, tiles
        if bias is not None:
            bias_base, list_base = bias_row(bias, b, k_row, sb), tiles + first
        do_rows = dout, row_offsets(r, G, kh * G, q_row, b, sd), here
        do = load_rows(*do_rows, True, D, BD)
        ot = load_rows(out, row_offsets(r, G, kh * G, q_row, b, so), here, True, D, BD)
        delta = tl.sum(do.to(tl.float32) * ot.to(tl.float32), 1)
        at = stats + slot.to(tl.int64) * BM + tl.arange(0, BM)
        plane = slots.to(tl.int64) * BM
        weight = None
        if EXACT:
            count = hi - lo + 1
            if bias is not None:
                row_seen = seen + seen_at(b, k_row, S, cu_k)
                count = tl.load(row_seen + hi + 1, mask=count > 0, other=0) - tl.load(row_seen + lo, mask=count > 0, other=0)
            weight = tl.where(count == 1, 0.0, 1.0)
            delta *= weight
            tl.store(at + 2 * plane, weight)
        if dlse is not None:
            delta -= tl.load(dlse + lse_offsets(r, G, kh * G, q_row, b, sdl), mask=here, other=0.0)
        row_lse = tl.load(lse + lse_offsets(r, G, kh * G, q_row, b, sl), mask=here, other=-float("inf"))
        row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
        tl.store(at, row_lse)
        tl.store(at + plane, delta)
        q_rows = q, row_offsets(r, G, kh * G, q_row, b, sq), here
        qt = load_rows(*q_rows, True, D, BD)
        acc = tl.zeros([BM, BD], tl.float32)
        acc = _dq_tiles(
            acc, qt, q_rows, do, do_rows, row_lse, delta, weight, begin, end, full0, full1, k_base, v_base, bias_base, list_base,
            sk[1], sv[1], sb[1], lo, hi, S, scale, False, WIDE, D, BD, DC, BN, PREC)
        acc = _dq_tiles(
            acc, qt, q_rows, do, do_rows, row_lse, delta, weight, begin, end, full0, full1, k_base, v_base, bias_base, list_base,
            sk[1], sv[1], sb[1], lo, hi, S, scale, True, WIDE, D, BD, DC, BN, PREC)
        acc = tl.where((row_lse == float("inf"))[:, None], 0.0, acc * scale)
        r = again(tile) * BM + tl.arange(0, BM)
        store_rows(dq, row_offsets(r, G, kh * G, q_row, b, sdq), acc, r < T * G, D, BD)


@triton.jit
def _query_tiles(
    n0, n1, T, S, G, prefix, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tiles of packed rows that see keys n0..n1: [begin, end), of which every row of [full0, full1) sees all of them."""
    shift = S - T
    t0, full = 0, 0
    if CAUSAL:
        t0 = tl.where(n0 < prefix, 0, n0 - shift)
        full = tl.where(n1 < prefix, 0, n1 - shift)
    if RIGHT:
        t0 = tl.maximum(t0, n0 - right - shift)
        full = tl.maximum(full, n1 - right - shift)
    t1, full_end = T, T
    if LEFT:
        t1 = tl.minimum(T, n1 + left - shift + 1)
        full_end = tl.minimum(T, n0 + left - shift + 1)
    begin = tl.minimum(tl.maximum(t0, 0), T) * G // BM
    end = tl.maximum(begin, tl.cdiv(tl.maximum(t1, 0) * G, BM))
    full0 = tl.minimum(tl.maximum(tl.cdiv(tl.minimum(tl.maximum(full, 0), T) * G, BM), begin), end)
    full1 = tl.minimum(tl.maximum(tl.maximum(full_end, 0) * G // BM, full0), end)
    return begin, full0, full1, end


# fmt: off
@triton.jit
def _dkdv_tiles(
    dk, dv, db, kn, k_rows, vn, v_rows, bias, begin, end, full0, full1, q, dout, stats, plane, n, sq, sd,
    G, T, S, prefix, left, right, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DBIAS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, PREC: tl.constexpr,
):
    """dk + ds^T q, dv + p^T dout, db + rowsum(ds^T) over tiles of packed rows of all heads; p stands [BN, BM].

    The tiles are [full0, full1), or with MASKED the others of [begin, end).
    """
    # fmt: on
    for step in tl.range(first_tile(begin, full0, MASKED), last_tile(end, full0, full1, MASKED)):
        j = around(step, full0, full1, MASKED)
        r = j * BM + tl.arange(0, BM)
        t, t0 = r // G, j * BM // G
        lse = tl.load(stats + r)
        sees = lse < float("inf")  # what stands in the others' q and dout must not matter
        some_blind: tl.constexpr = MASKED or bias is not None
        first = tl.full((), t0, tl.int64)
        q_rows = q + first * sq[1], steps(t - t0, sq[1], WIDE) + steps(r % G, sq[2], WIDE), sees
        do_rows = dout + first * sd[1], steps(t - t0, sd[1], WIDE) + steps(r % G, sd[2], WIDE), sees
        qt = load_rows(*q_rows, some_blind, D, BD)
        do = load_rows(*do_rows, some_blind, D, BD)
        p = _probability(product(kn, k_rows, qt, q_rows, D, BD, DC, PREC), lse[None, :], bias, scale)
        if MASKED:
            lo, hi = visible(t, T, S, prefix, left, right, CAUSAL, LEFT, RIGHT)
            p = tl.where((n[:, None] >= lo[None, :]) & (n[:, None] <= hi[None, :]), p, 0.0)
        if DV:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
        if DK:
            delta = tl.load(stats + plane + r)
            dp = product(vn, v_rows, do, do_rows, D, BD, DC, PREC)
            if EXACT:
                dp *= tl.load(stats + 2 * plane + r)[None, :]
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PREC)
            if DBIAS:
                db += tl.sum(ds, 1)
    return dk, dv, db


# fmt: off
@triton.jit
def _keys(
    dout, q, k, v, dk, dv, dbias, stats, bias, prefix_lengths, cu_q, cu_k, sd, sq, sk, sv, sdk, sdv, sb, sdb,
    B, T, S, G, K, slots, scale, left, right,
    DK: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, PREC: tl.constexpr,
):
    """dk (with dbias) or dv or both of one tile of keys of one key/value head."""
    # fmt: on
    pid = tl.program_id(0)
    if cu_q is None:
        tiles = tl.cdiv(S, BN)
        bk = pid // tiles
        b, kh, tile = bk // K, bk % K, pid % tiles
        stats_row = bk.to(tl.int64) * tl.cdiv(T * G, BQ) * BQ
    else:
        tiles = S // BN + B
        b, tile = locate(pid % tiles, cu_k, B, 1, BN)
        kh = pid // tiles
        stats_row = (kh.to(tl.int64) * (slots // K) + tl.load(cu_q + b) * G // BQ + b) * BQ
    q_row, k_row, T, S, prefix = sequence(b, T, S, cu_q, cu_k, prefix_lengths)
    if tile * BN < S:
        n = tile * BN + tl.arange(0, BN)
        here = n < S
        bn = None
        begin, full0, full1, end = _query_tiles(
            tile * BN, tl.minimum(tile * BN + BN, S) - 1, T, S, G, prefix, left, right, CAUSAL, LEFT, RIGHT, BM)
        if bias is not None:
            bn = tl.load(bias_row(bias, b, k_row, sb) + n.to(tl.int64) * sb[1], mask=here, other=-float("inf"))
            kept = bn != -float("inf")
            here = here & kept
            any_kept = tl.max(kept.to(tl.int32), 0)
            begin, full0, full1, end = begin * any_kept, full0 * any_kept, full1 * any_kept, end * any_kept
            bn = bn[:, None]
        n64 = n.to(tl.int64)
        k_rows = first_row(k, b, k_row, kh, sk), n64 * sk[1], here
        v_rows = first_row(v, b, k_row, kh, sv), n64 * sv[1], here
        kn = load_rows(*k_rows, True, D, BD)
        vn = load_rows(*v_rows, True, D, BD)
        q_base, d_base = first_row(q, b, q_row, kh * G, sq), first_row(dout, b, q_row, kh * G, sd)
        stats_base, plane = stats + stats_row, tl.full((), slots, tl.int64) * BQ
        DBIAS: tl.constexpr = DK and dbias is not None
        dk_sum = tl.zeros([BN, BD], tl.float32)
        dv_sum = tl.zeros([BN, BD], tl.float32)
        db_sum = tl.zeros([BN], tl.float32)
        dk_sum, dv_sum, db_sum = _dkdv_tiles(
            dk_sum, dv_sum, db_sum, kn, k_rows, vn, v_rows, bn, begin, end, full0, full1, q_base, d_base, stats_base, plane,
            n, sq, sd, G, T, S, prefix, left, right, scale, False, CAUSAL, LEFT, RIGHT, DK, DV, DBIAS, EXACT, WIDE, D, BD, DC, BM, PREC)
        dk_sum, dv_sum, db_sum = _dkdv_tiles(
            dk_sum, dv_sum, db_sum, kn, k_rows, vn, v_rows, bn, begin, end, full0, full1, q_base, d_base, stats_base, plane,
            n, sq, sd, G, T, S, prefix, left, right, scale, True, CAUSAL, LEFT, RIGHT, DK, DV, DBIAS, EXACT, WIDE, D, BD, DC, BM, PREC)
        n = again(tile) * BN + tl.arange(0, BN)
        n64 = n.to(tl.int64)
        if DK:
            if bias is not None:
                dk_sum = tl.where(here[:, None], dk_sum, 0.0)
            store_rows(first_row(dk, b, k_row, kh, sdk), n64 * sdk[1], dk_sum * scale, n < S, D, BD)
        if DV:
            if bias is not None:
                dv_sum = tl.where(here[:, None], dv_sum, 0.0)
            store_rows(first_row(dv, b, k_row, kh, sdv), n64 * sdv[1], dv_sum, n < S, D, BD)
        if DBIAS:
            at = bias_row(dbias, b, kh, sdb) + k_row
            tl.store(at + n, tl.where(here, db_sum, 0.0), mask=n < S)


# fmt: off
@triton.jit
def _dkdv(
    dout, q, k, v, dk, dv, dbias, stats, bias, prefix_lengths, cu_q, cu_k, sd, sq, sk, sv, sdk, sdv, sb, sdb,
    B, T, S, G, K, slots, scale, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BM_DK: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    PREC: tl.constexpr,
):
    """A tile of keys a program; with BM_DK its program_id(1) 0 makes dk by tiles of BM_DK query rows and 1 makes dv by tiles of BM.

    stats come from the first pass, whose tiles had BQ rows. dbias [B,K,S] by strides (batch, head).
    """
    # fmt: on
    shared = (
        dout, q, k, v, dk, dv, dbias, stats, bias, prefix_lengths, cu_q, cu_k, sd, sq, sk, sv, sdk, sdv, sb, sdb,
        B, T, S, G, K, slots, scale, left, right)
    if BM_DK == 0:
        _keys(*shared, True, True, CAUSAL, LEFT, RIGHT, EXACT, WIDE, D, BD, DC, BM, BN, BQ, PREC)
    elif tl.program_id(1) == 0:
        _keys(*shared, True, False, CAUSAL, LEFT, RIGHT, EXACT, WIDE, D, BD, DC, BM_DK, BN, BQ, PREC)
    else:
        _keys(*shared, False, True, CAUSAL, LEFT, RIGHT, EXACT, WIDE, D, BD, DC, BM, BN, BQ, PREC)


def _head_sums(dbias: Tensor | None, K: int) -> Tensor | None:
    """Where each key/value head's part of dbias [B,S] or [S] goes: [B,K,S] or [K,S], dbias itself if K is 1."""
    if dbias is None or K == 1:
        return None if dbias is None else dbias.unsqueeze(-2)
    return dbias.new_empty(*dbias.shape[:-1], K, dbias.shape[-1])


def _backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, key_bias, prefix_lengths, causal, scale, left, right, dq, dk, dv, dbias):
    shape = geometry(q, k, cu_q)
    masks, window = {**mask_options(causal, left, right), "EXACT": q.dtype == torch.float32}, shape.window(left, right)
    options = tile_config("dq", q, key_bias)
    BQ = options["BM"]
    slots = shape.query_programs(BQ)
    stats = torch.empty(3 if masks["EXACT"] else 2, slots * BQ, dtype=torch.float32, device=q.device)
    tiles, ranks, seen = present_tiles(key_bias, cu_k, shape.B, shape.S, options["BN"], masks["EXACT"])
    if dq.numel():
        _dq[(slots,)](
            dout, dlse, q, k, v, out, lse, dq, stats, key_bias, tiles, ranks, seen, prefix_lengths, cu_q, cu_k,
            strides4(dout), lse_strides(dlse), strides4(q), strides4(k), strides4(v), strides4(out), lse_strides(lse),
            strides4(dq), bias_strides(key_bias), *shape.sizes, scale, *window, **masks, **common_options(q, k, v, dout), **options,
        )  # fmt: skip
    if dk.numel():
        sums = _head_sums(dbias, shape.K)
        options = tile_config("dkdv", q, key_bias)
        assert BQ % options["BM"] == 0, f"{BQ} rows of the first pass must be whole tiles of {options['BM']} in the second"
        _dkdv[(shape.key_programs(options["BN"]), 2 if options["BM_DK"] else 1)](
            dout, q, k, v, dk, dv, sums, stats, key_bias, prefix_lengths, cu_q, cu_k,
            strides4(dout), strides4(q), strides4(k), strides4(v), strides4(dk), strides4(dv), bias_strides(key_bias),
            lse_strides(sums), *shape.sizes, slots, scale, *window, **masks, **common_options(q, k, v, dout), **options, BQ=BQ,
        )  # fmt: skip
        if sums is not None and shape.K > 1:
            torch.sum(sums, -2, out=dbias)


def attention_bwd(
    dout, dlse, q, k, v, out, lse, key_bias, prefix_lengths, causal, scale, left, right, dq, dk, dv, dbias
) -> None:
    tensors = dout, dlse, q, k, v, out, lse, None, None
    _backward(*tensors, key_bias, prefix_lengths, causal, scale, left, right, dq, dk, dv, dbias)


def attention_varlen_bwd(
    dout, dlse, q, k, v, out, lse, cu_q, cu_k, key_bias, causal, scale, left, right, dq, dk, dv, dbias
) -> None:
    tensors = dout, dlse, q, k, v, out, lse, cu_q, cu_k
    _backward(*tensors, key_bias, None, causal, scale, left, right, dq, dk, dv, dbias)
