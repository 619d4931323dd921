"""What the launchers share: the chip, float32's product precision, rows of tensors with any leading strides.

Kernels upcast whatever they load to float32 and hand 16-bit values only to `tl.dot`; offsets of rows are 64-bit.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

INTERPRET = triton.knobs.runtime.interpret
MAX_LEADING = 3  # leading dimensions that a kernel walks over by itself


def arch() -> int:
    """Compute capability as one number (80, 90, 100): the key of the configuration tables. The interpreter stands for 90."""
    return 90 if INTERPRET else driver.active.get_current_target().arch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at least. The interpreter and the compiler without a GPU stand for an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: float32 in three tf32 products (its own error budget), in one where torch's setting allows that.

    An `ieee` dot has no tensor-core form: it spills thousands of bytes at any useful tile.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def leading(*tensors: Tensor) -> tuple[list[int], list[list[int]]]:
    """Sizes of the leading dimensions of tensors of one leading shape, and strides per tensor, merged as far as all of them allow.

    Sizes has at least MAX_LEADING entries (1s at the end).
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for i, n in enumerate(tensors[0].shape[:-1]):
        if n == 1:
            continue
        if sizes and all(s[-1] == t.stride(i) * n for s, t in zip(strides, tensors, strict=True)):
            sizes[-1] *= n
            for s, t in zip(strides, tensors, strict=True):
                s[-1] = t.stride(i)
        else:
            sizes.append(n)
            for s, t in zip(strides, tensors, strict=True):
                s.append(t.stride(i))
    missing = max(0, MAX_LEADING - len(sizes))
    return sizes + [1] * missing, [s + [0] * missing for s in strides]


def over_rows(launch, *tensors: Tensor) -> None:
    """launch(rows, sizes, strides, *tensors) for tensors of one leading shape; a kernel finds row r with `row_offset`.

    One launch, unless more than MAX_LEADING dimensions are left that do not merge: then one for each index of those in front.
    """
    sizes, strides = leading(*tensors)
    if 0 in sizes:
        return
    if len(sizes) > MAX_LEADING:
        for index in range(tensors[0].shape[0]):
            over_rows(launch, *(t[index] for t in tensors))
        return
    launch(math.prod(sizes), sizes, strides, *tensors)


@triton.jit
def row_offset(r, n1, n2, s0, s1, s2):
    """Where row r of [n0, n1, n2] rows begins, in elements, 64-bit (n1 = n2 = 1 and zero strides compile to one product)."""
    r = r.to(tl.int64)
    return r // n2 // n1 * s0 + r // n2 % n1 * s1 + r % n2 * s2
