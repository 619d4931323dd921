"""swiglu, swiglu_packed: bound by memory. PaLM 8B has F = 16384."""

import torch

from . import peers
from .common import Bench, cases, eager_and_compiled, memory_work, randn

SHAPES = cases("N F", (2048, 8192)) + cases("N F", (512, 16384), dtypes=[torch.float32])


def swiglu(N, F, dtype):
    return (
        (randn(N, F, dtype=dtype), randn(N, F, dtype=dtype)),
        {},
        memory_work(N * F * dtype.itemsize, (3, 8), (5 * N * F, 17 * N * F)),
    )


def swiglu_packed(N, F, dtype):
    return (randn(N, 2 * F, dtype=dtype),), {}, memory_work(N * F * dtype.itemsize, (3, 8), (5 * N * F, 17 * N * F))


BENCHES = [
    Bench("swiglu", SHAPES, swiglu, eager_and_compiled(peers.silu_up), given=True),
    Bench("swiglu_packed", SHAPES, swiglu_packed, eager_and_compiled(peers.silu_up_packed), quick=0, given=True),
]
