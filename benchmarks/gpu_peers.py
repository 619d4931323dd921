"""What others offer on a GPU, in our layouts and signatures. A package that is not installed is not listed."""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import peers

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in packages)


def _sdpa(name: str, function: Callable, **options) -> Callable:
    def call(q, k, v, **kwargs):
        with sdpa_kernel(BACKENDS[name]):
            try:
                return function(q, k, v, **options, **kwargs)
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise NotImplementedError(f"{name} does not take this: {error}") from error
                raise

    return call


def _heads_as_rows(q, k, v, *, cache_lengths):
    """Decoding with one key head: the query heads are the rows of one attention without a mask. The caches are full."""
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))  # q [B,1,H,D] as it is


@functools.cache
def _causal(T: int, S: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: j <= i, None, None, T, S, device=device)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, *, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = _causal(q.shape[2], k.shape[2], q.device) if causal else None
    return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


flex.compiles = True


def _flash_attn_2(q, k, v, *, causal):
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=causal)


def _flash_attn_3(q, k, v, *, causal):
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v, causal=causal)
    return out[0] if isinstance(out, tuple) else out


def attention() -> dict[str, Callable]:
    """SDPA by backend, key heads expanded or shared; FlexAttention; flash-attn."""
    found = {f"SDPA {name}": _sdpa(name, peers.sdpa) for name in BACKENDS}
    found |= {f"SDPA {name} gqa": _sdpa(name, peers.sdpa, gqa=True) for name in BACKENDS}
    found["FlexAttention"] = flex
    if installed("flash_attn"):
        found["flash-attn 2"] = _flash_attn_2
    if installed("flash_attn_interface"):
        found["flash-attn 3"] = _flash_attn_3
    return found


def decode() -> dict[str, Callable]:
    found = {f"SDPA {name} gqa": _sdpa(name, peers.sdpa, gqa=True) for name in BACKENDS}
    found |= {f"SDPA {name}, heads as rows": _sdpa(name, _heads_as_rows) for name in BACKENDS}
    return {**found, "matmul pair": peers.matmul_pair}


def palm_pytorch_block(x, norm_weight, w_in, w_out, cos, sin, *, heads, head_dim):
    """The block of lucidrains' PaLM-pytorch: the [T,T] scores stand in memory, key and value head shared by einsum."""
    B, T, C = x.shape
    width = (w_in.shape[0] - (heads + 2) * head_dim) // 2
    sizes = [heads * head_dim, head_dim, head_dim, width, width]
    q, k, v, gate, up = F.linear(F.rms_norm(x, (C,), 1 + norm_weight, 1e-6), w_in).split(sizes, -1)
    q = peers.rotate(q.reshape(B, T, heads, head_dim), cos, sin) * head_dim**-0.5
    k = peers.rotate(k[:, :, None], cos, sin)[:, :, 0]
    scores = torch.einsum("bihd,bjd->bhij", q, k)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    scores = scores.masked_fill(later, -torch.finfo(scores.dtype).max)
    mixed = torch.einsum("bhij,bjd->bihd", scores.softmax(-1), v).flatten(2)
    attended, fed = w_out.split([heads * head_dim, width], -1)
    return x + F.linear(mixed, attended) + F.linear(F.silu(gate) * up, fed)


def _liger(name: str, function: Callable) -> dict[str, Callable]:
    """{name: function(Liger's functional module, ...)} where Liger is installed."""
    if not installed("liger_kernel"):
        return {}

    def call(*args, **kwargs):
        from liger_kernel.transformers import functional

        return function(functional, *args, **kwargs)

    return {f"Liger {name}": call}


def liger(op: str) -> dict[str, Callable]:
    functions = {
        "swiglu": lambda m, gate, up: m.liger_swiglu(gate, up),
        "rms_norm": lambda m, x, weight: m.liger_rms_norm(x, weight, 1e-6, in_place=False),
        "layer_norm": lambda m, x, weight: m.liger_layer_norm(x, weight, torch.zeros_like(weight), 1e-5),
        "cross_entropy": lambda m, logits, target: m.liger_cross_entropy(logits, target),
        "linear_cross_entropy": lambda m, hidden, weight, target: m.liger_fused_linear_cross_entropy(
            hidden, weight, target
        ),
    }
    return _liger(op, functions[op]) if op in functions else {}
