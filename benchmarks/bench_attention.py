"""attention, attention_varlen, attention_decode: bound by arithmetic, decode by reading the cache."""

import torch

from . import peers
from .common import FORWARD, Bench, attention_work, cases, randn

FP32 = {"dtypes": [torch.float32]}
MASK = "B T H K D causal"
SHAPES = (1, 1024, 16, 1, 64, True), (1, 2048, 16, 1, 128, True), (1, 1024, 8, 1, 256, True)
DENSE = cases(MASK, *SHAPES, dtypes=[torch.float32, torch.bfloat16, torch.float16])
DENSE += cases(MASK, (1, 1024, 16, 1, 64, False), (1, 2048, 16, 1, 128, False), **FP32)
ODD_HEADS = (16, 1, 80), (16, 1, 96), (71, 1, 64), (32, 8, 128)
ODD = cases(MASK, *((1, 1000, *heads, True) for heads in ODD_HEADS), **FP32)
LONG = cases(MASK, *((1, 1024 << i, 8, 1, 64, True) for i in range(4)), **FP32)
CACHES = cases("B S H D", (1, 4096, 16, 256), (1, 4096, 16, 128), (8, 2048, 16, 128))
LONG_CACHES = cases("B S H D", *((1, 4096 << i, 16, 256) for i in range(3)), **FP32)
SDPA = {"SDPA": peers.sdpa, "SDPA gqa": peers.sdpa_gqa}
READ = {"cold": True, "bandwidth": "read"}


def attention(B, T, H, K, D, causal, dtype):
    q, k, v = (randn(B, T, heads, D, dtype=dtype) for heads in (H, K, K))
    return (q, k, v), {"causal": causal}, attention_work(B * H * T * T / (1 + causal), B * T * (H + K) * D, D, dtype)


def varlen(lengths, H, D, dtype):
    q, k, v = (randn(sum(lengths), heads, D, dtype=dtype) for heads in (H, 1, 1))
    starts = torch.tensor((0, *lengths)).cumsum(0).int()
    pairs = H * sum(n * n for n in lengths) / 2
    return (q, k, v, starts, starts), {"causal": True}, attention_work(pairs, sum(lengths) * (H + 1) * D, D, dtype)


def decode(B, S, H, D, dtype):
    q, k, v = (randn(B, *shape, D, dtype=dtype, grad=False) for shape in ((1, H), (S, 1), (S, 1)))
    lengths = torch.full((B,), S, dtype=torch.int32)
    work = {FORWARD: attention_work(B * H * S, B * (S + H) * D, D, dtype)[FORWARD]}
    return (q, k, v), {"cache_lengths": lengths}, work


PACKED = cases("lengths H D", ((1000, 700, 350, 90), 16, 64), **FP32)
PADDED = {"palm padded": peers.palm_padded}
BENCHES = [
    Bench("attention", DENSE, attention, SDPA, quick=2),
    Bench("attention", ODD, attention, SDPA, quick=0, variant="odd sizes"),
    Bench("attention", LONG, attention, SDPA, quick=0, gate={"T": 1024}, variant="growth", grows="T"),
    Bench("attention_varlen", PACKED, varlen, {"SDPA padded": peers.sdpa_padded}, floors=PADDED, quick=0),
    Bench("attention_decode", CACHES, decode, {**SDPA, "matmul pair": peers.matmul_pair}, **READ),
    Bench("attention_decode", LONG_CACHES, decode, {**SDPA}, quick=0, variant="growth", grows="S", **READ),
]
