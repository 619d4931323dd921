"""cross_entropy, bound by memory; linear_cross_entropy, bound by its three GEMMs, which are its floor."""

import torch

from . import peers
from .common import BOTH, FORWARD, Bench, Work, cases, eager_and_compiled, memory_work, products, randn

FP32 = {"dtypes": [torch.float32]}
SIZES = (1024, 512, 32000, 0.0), (1024, 512, 32000, 0.85), (1024, 1024, 256000, 0.0), (1024, 1024, 256000, 0.85)
LINEAR = {
    **eager_and_compiled(peers.linear_then_cross_entropy),
    "F.linear_cross_entropy": peers.linear_cross_entropy,
    "F.linear_cross_entropy chunked": peers.linear_cross_entropy_chunked,
}


def targets(N, V, ignored):
    return torch.where(torch.rand(N) < ignored, -100, torch.randint(V, (N,)))


def cross_entropy(N, V, dtype):
    logits = randn(N, V, dtype=dtype)
    return (logits, targets(N, V, 0.0)), {}, memory_work(logits.nbytes, (1, 3), (4 * N * V, 7 * N * V))


def linear_cross_entropy(N, C, V, ignored, dtype):
    hidden, weight, target = randn(N, C, dtype=dtype), randn(V, C, dtype=dtype, scale=C**-0.5), targets(N, V, ignored)
    flops = 2 * int((target != -100).sum()) * C * V
    work = {FORWARD: Work(flops, hidden.nbytes + weight.nbytes), BOTH: Work(3 * flops, 3 * weight.nbytes)}
    return (hidden, weight, target), {}, work


def gemms(mode, hidden, weight, target):
    """Logits of the rows that count; for backward with their shape in the gradient's place, dhidden and dweight."""
    rows, w = hidden.detach()[target != -100], weight.detach()
    logits = rows.new_empty(len(rows), len(w))
    grads = [(logits, w, torch.empty_like(rows)), (logits.T, rows, torch.empty_like(w))] if mode == BOTH else []
    return products((rows, w.T, logits), *grads)


GIVEN_LOGITS = cases("N V", (1024, 32000))
LINEAR_CASES, FLOORS, SMALL = cases("N C V ignored", *SIZES, **FP32), {"GEMMs": gemms}, {"N": 256, "V": 32000}
BENCHES = [
    Bench("cross_entropy", GIVEN_LOGITS, cross_entropy, eager_and_compiled(peers.cross_entropy), given=True),
    Bench("linear_cross_entropy", LINEAR_CASES, linear_cross_entropy, LINEAR, floors=FLOORS, gate=SMALL),
]
