"""Kernels for PaLM-shaped models: multi-query attention, SwiGLU, soft weak masking, the parallel block."""

import torch as _torch

if tuple(int(x) for x in _torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise ImportError(
        f"palm_kernels needs torch 2.11 or later, this is {_torch.__version__}: pip install -U 'torch>=2.11'"
    )

__version__ = "0.1.0"

from .dispatch import backend, info, release_memory
from .ops.attention import attention, attention_decode, attention_varlen, merge_attention
from .ops.cross_entropy import cross_entropy, linear_cross_entropy
from .ops.decode_linear import decode_linear
from .ops.norm import layer_norm, rms_norm
from .ops.parallel_block import parallel_block
from .ops.rotary import rotary, rotary_tables
from .ops.soft_weak_embedding import soft_weak_embedding
from .ops.swiglu import swiglu, swiglu_packed

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "backend",
    "cross_entropy",
    "decode_linear",
    "info",
    "layer_norm",
    "linear_cross_entropy",
    "merge_attention",
    "parallel_block",
    "release_memory",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "soft_weak_embedding",
    "swiglu",
    "swiglu_packed",
]
