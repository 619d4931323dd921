"""parallel_block, with F = 4 C as in PaLM: bound by its six GEMMs and the attention between them, which are its floors."""

import torch

import palm_kernels as pk

from . import peers
from .common import BOTH, FORWARD, Bench, Work, attention_work, cases, eager_and_compiled, in_mode, products, randn

SHAPES = (2, 512, 512, 64), (2, 512, 1024, 64), (2, 2048, 512, 64), (2, 2048, 1024, 64)
CASES = cases("B T C D", *SHAPES, dtypes=[torch.float32]) + cases("B T C D", SHAPES[1], dtypes=[torch.bfloat16])


def block(B, T, C, D, dtype):
    H, width = C // D, 4 * C
    x, norm_weight = randn(B, T, C, dtype=dtype), randn(C, dtype=dtype, scale=0.1)
    w_in = randn((H + 2) * D + 2 * width, C, dtype=dtype, scale=C**-0.5)
    w_out = randn(C, H * D + width, dtype=dtype, scale=(H * D + width) ** -0.5)
    attention = attention_work(B * H * T * T / 2, B * T * (H + 1) * D, D, dtype)
    gemms, moved = 2 * B * T * (w_in.numel() + w_out.numel()), w_in.nbytes + w_out.nbytes + 2 * x.nbytes
    work = {
        FORWARD: Work(gemms + attention[FORWARD].flops, moved),
        BOTH: Work(3 * gemms + attention[BOTH].flops, 3 * moved),
    }
    return (x, norm_weight, w_in, w_out, *pk.rotary_tables(T, D)), {"heads": H, "head_dim": D}, work


def gemms(mode, x, norm_weight, w_in, w_out, cos, sin, *, heads, head_dim):
    """[q | k | v | gate | up] and out, in backward dmixed, dw_out, dx, dw_in."""
    x, w_in, w_out = x.detach().flatten(0, 1), w_in.detach(), w_out.detach()
    mixed, projected, out = (torch.randn(len(x), w.shape[i]).to(x) for w, i in ((w_out, 1), (w_in, 0), (w_out, 0)))
    forward, y = [(x, w_in.T, projected), (mixed, w_out.T, out)], torch.empty_like
    dprojected, dout = torch.randn_like(projected), torch.randn_like(out)
    backward = [
        (dout, w_out, y(mixed)),
        (dout.T, mixed, y(w_out)),
        (dprojected, w_in, y(x)),
        (dprojected.T, x, y(w_in)),
    ]
    return products(*forward, *(backward if mode == BOTH else []))


def attention(mode, x, *_, heads, head_dim):
    q, k, v = leaves = [randn(*x.shape[:2], n, head_dim, dtype=x.dtype) for n in (heads, 1, 1)]
    return in_mode(mode, lambda: pk.attention(q, k, v, causal=True), leaves)


BENCHES = [
    Bench("parallel_block", CASES, block, eager_and_compiled(peers.block), {"GEMMs": gemms, "attention": attention})
]
