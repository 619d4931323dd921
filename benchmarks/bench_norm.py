"""rms_norm, layer_norm: bound by memory. Backward reads x and dout and writes dx."""

import torch

from . import peers
from .common import Bench, cases, eager_and_compiled, memory_work, randn

SHAPES = cases("N C", (4096, 4096)) + cases("N C", (8192, 512), dtypes=[torch.float32])


def norm(N, C, dtype):
    x = randn(N, C, dtype=dtype)
    return (x, randn(C, dtype=dtype)), {}, memory_work(x.nbytes, (2, 5), (5 * N * C, 15 * N * C))


def norm_with_residual(N, C, dtype):
    x, residual = randn(N, C, dtype=dtype), randn(N, C, dtype=dtype)
    return (x, randn(C, dtype=dtype)), {"residual": residual}, memory_work(x.nbytes, (4, 9), (6 * N * C, 17 * N * C))


BENCHES = [
    Bench("rms_norm", SHAPES, norm, eager_and_compiled(peers.rms_norm), given=True),
    Bench("rms_norm", SHAPES[:1], norm_with_residual, eager_and_compiled(peers.rms_norm), quick=0, variant="residual"),
    Bench("layer_norm", SHAPES, norm, eager_and_compiled(peers.layer_norm), given=True),
]
