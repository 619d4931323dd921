"""rotary: bound by memory."""

import palm_kernels as pk

from . import peers
from .common import Bench, cases, eager_and_compiled, memory_work, randn

SHAPES = cases("B T H D", (1, 2048, 16, 256))


def rotary(B, T, H, D, dtype):
    x, tables = randn(B, T, H, D, dtype=dtype), pk.rotary_tables(T, D)
    return (x, *tables), {}, memory_work(x.nbytes, (2, 4), (3 * x.numel(), 6 * x.numel()))


BENCHES = [Bench("rotary", SHAPES, rotary, eager_and_compiled(peers.rotate), given=True)]
