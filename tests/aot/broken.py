"""Kernels that break the budgets, to see that the reader sees it."""

import torch
import triton
import triton.language as tl


@triton.jit
def _spills(a, b, out, N: tl.constexpr):
    """A float32 product that no tensor core serves: all of it in registers, more than there are."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@triton.jit
def _narrow(x, out, step, N: tl.constexpr):
    """Every second element: 2 bytes an access."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at * step, tl.load(x + at * step))


def spills():
    a = torch.empty(64, 64, device="meta")
    _spills[(1,)](a, a, a, N=64)


def narrow():
    x = torch.empty(2**16, dtype=torch.bfloat16, device="meta")
    _narrow[(8,)](x, x, 2, N=4096)
