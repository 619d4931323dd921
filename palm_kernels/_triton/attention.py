"""Attention forward: softmax(scale q k^T + bias) v, one tile of packed query rows a program (Dao 2022, algorithm 1; PaLM section 2).

Softmax works on base 2. Without a bias (and with scale > 0) scores stay unscaled and the scale goes into the exponent's factor; with
one they are natural, so that finite stand-ins for -inf, such as the smallest float32, do not overflow.
"""

import triton
import triton.language as tl

from .attention_bwd import attention_bwd, attention_varlen_bwd
from .attention_decode import attention_decode
from .attention_tiles import (
    again,
    attend,
    bias_row,
    bias_strides,
    check_offsets,
    common_options,
    first_row,
    geometry,
    load_rows,
    lse_offsets,
    lse_strides,
    mask_options,
    present_tiles,
    query_tile,
    row_offsets,
    sequence,
    store_attended,
    strides4,
    tile_config,
    tile_of_rows,
)

__all__ = ["attention_bwd", "attention_decode", "attention_fwd", "attention_varlen_bwd", "attention_varlen_fwd"]


# fmt: off
@triton.jit
def _fwd(
    q, k, v, out, lse, bias, tiles, ranks, prefix_lengths, cu_q, cu_k, sq, sk, sv, so, sl, sb,
    B, T, S, G, K, scale, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """q, out [B,T,H,D], k, v [B,S,K,D] by strides s* (batch, token, head); lse [B,H,T] float32; packed where cu_q is given."""
    # fmt: on
    b, kh, tile, _ = query_tile(tl.program_id(0), cu_q, B, T, G, K, BM)
    q_row, k_row, T, S, prefix = sequence(b, T, S, cu_q, cu_k, prefix_lengths)
    if tile * BM < T * G:
        r, here, lo, hi, begin, end, full0, full1, first = tile_of_rows(
            tile, b, k_row, T, S, G, prefix, left, right, ranks, cu_k, CAUSAL, LEFT, RIGHT, BM, BN)
        k_base, v_base = first_row(k, b, k_row, kh, sk), first_row(v, b, k_row, kh, sv)
        bias_base, list_base = bias, tiles
        if bias is not None:
            bias_base, list_base = bias_row(bias, b, k_row, sb), tiles + first
        q_rows = q, row_offsets(r, G, kh * G, q_row, b, sq), here
        qt = load_rows(*q_rows, True, D, BD)
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BD], tl.float32)
        top, total, acc = attend(
            qt, q_rows, top, total, acc, begin, end, full0, full1, k_base, v_base, bias_base, list_base, sk[1], sv[1], sb[1],
            lo, hi, S, scale, False, FOLD, WIDE, D, BD, DC, BN, PREC)
        top, total, acc = attend(
            qt, q_rows, top, total, acc, begin, end, full0, full1, k_base, v_base, bias_base, list_base, sk[1], sv[1], sb[1],
            lo, hi, S, scale, True, FOLD, WIDE, D, BD, DC, BN, PREC)
        if FOLD:
            top = top * scale
        r = again(tile) * BM + tl.arange(0, BM)
        store_attended(
            out, lse, acc, total, top, row_offsets(r, G, kh * G, q_row, b, so), lse_offsets(r, G, kh * G, q_row, b, sl),
            r < T * G, D, BD)


def _forward(q, k, v, cu_q, cu_k, key_bias, prefix_lengths, causal, scale, left, right, out, lse):
    if out.numel() == 0:
        return
    shape, options = geometry(q, k, cu_q), tile_config("fwd", q, key_bias)
    tiles, ranks, _ = present_tiles(key_bias, cu_k, shape.B, shape.S, options["BN"])
    _fwd[(shape.query_programs(options["BM"]),)](
        q, k, v, out, lse, key_bias, tiles, ranks, prefix_lengths, cu_q, cu_k,
        strides4(q), strides4(k), strides4(v), strides4(out), lse_strides(lse), bias_strides(key_bias),
        *shape.sizes, scale, *shape.window(left, right),
        **mask_options(causal, left, right), FOLD=key_bias is None and scale > 0, **common_options(q, k, v), **options,
    )  # fmt: skip


def attention_fwd(q, k, v, key_bias, prefix_lengths, causal, scale, left, right, out, lse) -> None:
    _forward(q, k, v, None, None, key_bias, prefix_lengths, causal, scale, left, right, out, lse)


def attention_varlen_fwd(q, k, v, cu_q, cu_k, key_bias, causal, scale, left, right, out, lse) -> None:
    check_offsets(cu_q, cu_k, q, k)
    _forward(q, k, v, cu_q, cu_k, key_bias, None, causal, scale, left, right, out, lse)
