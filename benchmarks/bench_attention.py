"""attention, attention_varlen, attention_decode against SDPA (expanded keys, enable_gqa) and, for decode, two matmuls and a softmax."""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention, softmax
from torch.nn.utils.rnn import pad_sequence

from .common import BOTH, FORWARD, Bench, Work, randn

FP32, BF16 = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
SHAPES = [
    {"B": 1, "T": 1024, "H": 16, "K": 1, "D": 64, "causal": True},
    {"B": 1, "T": 2048, "H": 16, "K": 1, "D": 128, "causal": True},
    {"B": 1, "T": 1024, "H": 8, "K": 1, "D": 256, "causal": True},
]
OTHERS = [
    {"B": 1, "T": 1024, "H": 16, "K": 1, "D": 64, "causal": False},
    {"B": 1, "T": 1000, "H": 32, "K": 8, "D": 80, "causal": True},
]
