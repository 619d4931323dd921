"""soft_weak_embedding: bound by memory. Backward reads dout and the rows again, and writes the dense gradient of the table."""

import torch

from . import peers
from .common import BOTH, FORWARD, Bench, Work, cases, eager_and_compiled, randn


def embedding(N, V, C, dtype):
    ids, weight, mask_embedding = torch.randint(V, (N,)), randn(V, C, dtype=dtype), randn(C, dtype=dtype)
    strength = (2 * torch.rand(N) - 0.5).clamp(0, 1).requires_grad_()  # a quarter untouched, a quarter masked
    rows = N * C * dtype.itemsize
    work = {FORWARD: Work(3 * N * C, 2 * rows), BOTH: Work(8 * N * C, 4 * rows + weight.nbytes)}
    return (ids, weight, strength), {"mask_embedding": mask_embedding}, work


BENCHES = [
    Bench(
        "soft_weak_embedding",
        cases("N V C", (4096, 32000, 1024)),
        embedding,
        eager_and_compiled(peers.mixed_embedding),
        given=True,
    )
]
