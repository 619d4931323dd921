"""swiglu against torch: bound by memory. PaLM 8B has F = 16384."""

import torch
import torch.nn.functional as F

from .common import BOTH, FORWARD, Bench, Work, compiled, randn

CASES = [
    {"N": 2048, "F": 8192, "dtype": torch.float32},
    {"N": 2048, "F": 8192, "dtype": torch.bfloat16},
    {"N": 512, "F": 16384, "dtype": torch.float32},
]


def eager(gate, up):
    return F.silu(gate) * up


def eager_packed(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def work(N, F, dtype):
    n = N * F * dtype.itemsize
    return {FORWARD: Work(0, 3 * n), BOTH: Work(0, 8 * n)}


BENCHES = [
    Bench(
        op="swiglu",
        cases=CASES,
        inputs=lambda N, F, dtype: ((randn(N, F, dtype=dtype), randn(N, F, dtype=dtype)), {}),
        work=work,
        peers={"eager": eager, "torch.compile": compiled(eager)},
    ),
    Bench(
        op="swiglu_packed",
        cases=CASES,
        quick=0,
        inputs=lambda N, F, dtype: ((randn(N, 2 * F, dtype=dtype),), {}),
        work=work,
        peers={"eager": eager_packed, "torch.compile": compiled(eager_packed)},
    ),
]
