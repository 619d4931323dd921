"""cross_entropy, bound by memory; linear_cross_entropy, bound by its three GEMMs, which are its floor."""

import torch
import torch.nn.functional as F

from . import peers
from .common import BOTH, FORWARD, Bench, Work, cases, eager_and_compiled, memory_work, randn

FP32 = {"dtypes": [torch.float32]}
LINEAR = cases("N C V ignored", (1024, 512, 32000, 0.0), (1024, 1024, 256000, 0.0), (1024, 512, 32000, 0.85), **FP32)


def targets(N, V, ignored):
    return torch.where(torch.rand(N) < ignored, -100, torch.randint(V, (N,)))


def cross_entropy(N, V, dtype):
    logits = randn(N, V, dtype=dtype)
    return (logits, targets(N, V, 0.0)), {}, memory_work(logits.nbytes, 1, 3)


def linear_cross_entropy(N, C, V, ignored, dtype):
    hidden, weight, target = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, scale=C**-0.5), targets(N, V, ignored)
    flops = 2 * int((target != -100).sum()) * C * V
    work = {FORWARD: Work(flops, hidden.nbytes + weight.nbytes), BOTH: Work(3 * flops, 3 * weight.nbytes)}
    return (hidden, weight, target), {}, work


def gemms(hidden, linear_weight, target):
    return F.linear(hidden[target != -100], linear_weight)


BENCHES = [
    Bench("cross_entropy", cases("N V", (1024, 32000)), cross_entropy, eager_and_compiled(F.cross_entropy)),
    Bench(
        "linear_cross_entropy",
        LINEAR,
        linear_cross_entropy,
        {
            "F.cross_entropy(F.linear)": peers.linear_then_cross_entropy,
            "F.linear_cross_entropy": peers.linear_cross_entropy,
            "F.linear_cross_entropy chunked": peers.linear_cross_entropy_chunked,
        },
        floors={"GEMMs": gemms},
        gate={"N": 256, "V": 32000},
    ),
]
