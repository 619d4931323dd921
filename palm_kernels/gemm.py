"""The GEMMs of the composed ops: torch's, in float32 where torch has only a scalar loop for the dtype.

torch's CPU GEMM in bfloat16 and float16 needs AVX-512 (mkldnn); elsewhere, as on AMD before Zen 4, it runs on one thread at about
1 GFLOP/s. There operands are widened in pieces: their copies stay small, and sums are float32's.
"""

import functools

import torch
from torch import Tensor

PIECE = 2**24  # elements of an operand that are held in float32 at a time


@functools.cache
def _scalar_loop(dtype: torch.dtype) -> bool:
    """Whether that loop is all that torch has here."""
    ask = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return ask is not None and not getattr(torch.ops.mkldnn, ask)()


def widens(a: Tensor) -> bool:
    """Whether a GEMM of a is one of float32 copies."""
    return a.device.type == "cpu" and _scalar_loop(a.dtype)


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [M,N] = a [M,K] b [K,N]."""
    return _widened(None, a, b, out) if widens(a) else torch.mm(a, b, out=out)


def addmm(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [M,N] = x + a [M,K] b [K,N]; x [M,N] or [N], and may be out."""
    return _widened(x.expand(out.shape), a, b, out) if widens(a) else torch.addmm(x, a, b, out=out)


def _widened(x: Tensor | None, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    if max(M, N, K) == K:  # the longest side is cut; here along the sum
        total = torch.zeros_like(out, dtype=torch.float32) if x is None else x.to(torch.float32, copy=True)
        step = max(1, PIECE // max(M, N, 1))
        for k in range(0, K, step):
            total.addmm_(a[:, k : k + step].float(), b[k : k + step].float())
        return out.copy_(total)
    if N > M:
        _widened(None if x is None else x.t(), b.t(), a.t(), out.t())
        return out
    wide, step = b.float(), max(1, PIECE // max(K, N, 1))
    for m in range(0, M, step):
        part = a[m : m + step].float()
        out[m : m + step].copy_(part @ wide if x is None else x[m : m + step].float().addmm(part, wide))
    return out
