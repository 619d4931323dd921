"""A small call of every op: several tiles, ragged ends, masks. What must hold of each of them on a GPU runs over this table.

`python tests/cases.py NAME ...` runs these on the GPU, forward and backward (for compute-sanitizer, without pytest).
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from helpers import randn, run
from torch import Tensor

import palm_kernels as pk


class Case(NamedTuple):
    op: str
    args: tuple
    kwargs: dict
    exact: bool = True  # the same bits however it is launched; torch's products may be made another way

    @property
    def function(self):
        return getattr(pk, self.op)

    def run(self, douts=None, function=None):
        """(outputs, gradients of every leaf), also for `function` in the op's place."""
        return run(function or self.function, self.args, self.kwargs, douts)

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]


def _bias(*shape):
    bias = randn(*shape, grad=False)
    bias.view(-1)[::5] = -torch.inf
    return bias.requires_grad_()


def _attention(dtype, T=70, S=150, H=6, K=1, D=64, **kwargs):
    q, k, v = (randn(2, n, heads, D, dtype=dtype) for n, heads in ((T, H), (S, K), (S, K)))
    return Case("attention", (q, k, v), kwargs)


def _varlen(dtype):
    q, k, v = (randn(n, heads, 64, dtype=dtype) for n, heads in ((90, 4), (140, 2), (140, 2)))
    starts = [torch.tensor(s, dtype=torch.int32) for s in ((0, 1, 60, 60, 90), (0, 9, 70, 70, 140))]
    return Case("attention_varlen", (q, k, v, *starts), {"causal": True, "key_bias": _bias(140)})


def _decode(dtype):
    q, k, v = (randn(3, n, heads, 128, dtype=dtype, grad=False) for n, heads in ((2, 8), (200, 1), (200, 1)))
    return Case("attention_decode", (q, k, v), {"cache_lengths": torch.tensor([200, 2, 77], dtype=torch.int32)})


def _rotary(dtype):
    return Case("rotary", (randn(2, 33, 3, 80, dtype=dtype), *pk.rotary_tables(40, 64)), {})


def _rms_norm(dtype):
    x, residual = randn(37, 600, dtype=dtype), randn(37, 600, dtype=dtype)
    return Case("rms_norm", (x, randn(600, dtype=dtype)), {"offset": 1.0, "residual": residual})


def _layer_norm(dtype):
    return Case("layer_norm", (randn(37, 600, dtype=dtype), randn(600, dtype=dtype)), {"bias": randn(600, dtype=dtype)})


def _targets(N, V, ignored=()):
    target = torch.randint(V, (N,))
    target[list(ignored)] = -100
    return target


def _cross_entropy(dtype):
    options = {"weight": torch.rand(1111), "label_smoothing": 0.1, "z_loss": 1e-2}
    return Case("cross_entropy", (randn(29, 1111, dtype=dtype), _targets(29, 1111, [3])), options)


def _linear_cross_entropy(dtype, ignored=(), **options):
    hidden, weight = randn(40, 64, dtype=dtype), randn(300, 64, dtype=dtype, scale=0.125)
    return Case("linear_cross_entropy", (hidden, weight, _targets(40, 300, ignored)), options, exact=False)


def _soft_weak_embedding(dtype):
    ids, source_ids = torch.randint(50, (3, 40)), torch.randint(-1, 50, (3, 40))
    strength = (2 * torch.rand(3, 40) - 0.5).clamp(0, 1).requires_grad_()
    options = {"mask_embedding": randn(96, dtype=dtype), "source_ids": source_ids}
    return Case("soft_weak_embedding", (ids, randn(50, 96, dtype=dtype), strength), options)


def _parallel_block(dtype):
    H, D, C, F = 4, 64, 128, 256
    x, norm_weight = randn(2, 70, C, dtype=dtype), randn(C, dtype=dtype, scale=0.1)
    w_in = randn((H + 2) * D + 2 * F, C, dtype=dtype, scale=C**-0.5)
    w_out = randn(C, H * D + F, dtype=dtype, scale=(H * D + F) ** -0.5)
    options = {"heads": H, "head_dim": D, "key_bias": _bias(2, 70)}
    return Case("parallel_block", (x, norm_weight, w_in, w_out, *pk.rotary_tables(70, D)), options, exact=False)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "attention": lambda dtype: _attention(dtype, causal=True),
    "attention_256": lambda dtype: _attention(dtype, H=4, D=256, causal=True, window=40),
    "attention_bias": lambda dtype: _attention(dtype, K=2, D=80, key_bias=_bias(2, 150)),
    "attention_varlen": _varlen,
    "attention_decode": _decode,
    "swiglu": lambda dtype: Case("swiglu", (randn(33, 500, dtype=dtype), randn(33, 500, dtype=dtype)), {}),
    "swiglu_packed": lambda dtype: Case("swiglu_packed", (randn(33, 1000, dtype=dtype),), {"gate_first": False}),
    "rotary": _rotary,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_kept": lambda dtype: _linear_cross_entropy(dtype, range(3, 40), max_kept=5),
    "soft_weak_embedding": _soft_weak_embedding,
    "parallel_block": _parallel_block,
}


def main(names: list[str]) -> None:
    torch.set_default_device("cuda")
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            CASES[name](dtype).run()
            torch.cuda.synchronize()
        print(f"ran {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
