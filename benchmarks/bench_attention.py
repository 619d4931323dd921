"""attention, attention_varlen, attention_decode: bound by arithmetic, decode by reading the cache."""

import torch

from . import peers
from .common import FORWARD, Bench, attention_work, cases, randn

DENSE = cases("B T H K D causal", (1, 1024, 16, 1, 64, True), (1, 2048, 16, 1, 128, True), (1, 1024, 8, 1, 256, True))
DENSE += cases("B T H K D causal", (1, 1024, 16, 1, 64, False), (2, 1000, 32, 8, 80, True), dtypes=[torch.float32])
SDPA = {"SDPA": peers.sdpa, "SDPA gqa": peers.sdpa_gqa}


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


BENCHES = [
    Bench("attention", DENSE, attention, SDPA, quick=2),
    Bench(
        "attention_varlen",
        cases("lengths H D", ((1000, 700, 350, 90), 16, 64), dtypes=[torch.float32]),
        varlen,
        {"SDPA padded": peers.sdpa_padded},
        quick=0,
    ),
    Bench(
        "attention_decode",
        cases("B S H D", (1, 4096, 16, 256), (1, 4096, 16, 128), (8, 2048, 16, 128)),
        decode,
        {**SDPA, "matmul pair": peers.matmul_pair},
        cold=True,
        bandwidth="read",
    ),
]
