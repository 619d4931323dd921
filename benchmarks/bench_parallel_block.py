"""parallel_block, with F = 4 C as in PaLM: bound by its six GEMMs (its floor, with the slice between them) and the attention."""

import torch
import torch.nn.functional as F

import palm_kernels as pk

from . import peers
from .common import BOTH, FORWARD, Bench, Work, attention_work, cases, eager_and_compiled, randn

SHAPES = cases("B T C D", (2, 512, 512, 64), (2, 512, 1024, 64), (2, 2048, 512, 64), dtypes=[torch.float32])
SHAPES += cases("B T C D", (2, 512, 1024, 64), dtypes=[torch.bfloat16])


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


def gemms(x, norm_weight, w_in, w_out, cos, sin, *, heads, head_dim):
    return F.linear(F.linear(x, w_in)[..., : w_out.shape[1]], w_out)


BENCHES = [
    Bench("parallel_block", SHAPES, block, eager_and_compiled(peers.block), floors={"GEMMs": gemms}),
]
