"""The ops as `nn.Module`s with plain names in their state dicts, for other people's models and for `palm_kernels.models`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .ops.attention import attention
from .ops.cross_entropy import linear_cross_entropy
from .ops.norm import layer_norm, rms_norm
from .ops.parallel_block import parallel_block
from .ops.rotary import rotary, rotary_tables
from .ops.soft_weak_embedding import soft_weak_embedding
from .ops.swiglu import swiglu, swiglu_packed

__all__ = [
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiQueryAttention",
    "ParallelBlock",
    "RMSNorm",
    "RotaryEmbedding",
    "SoftWeakEmbedding",
    "SwiGLU",
]


class RMSNorm(nn.Module):
    """`rms_norm` over the last dimension; the gain is weight + offset, weight [dim] starts at 1 - offset."""

    def __init__(self, dim: int, *, eps: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.dim, self.eps, self.offset = dim, eps, offset
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """x [..., dim] -> the same shape; with residual (norm(x + residual), x + residual)."""
        return rms_norm(x, self.weight, eps=self.eps, offset=self.offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, offset={self.offset}"


class LayerNorm(nn.Module):
    """`layer_norm` over the last dimension; the gain is weight + offset, weight [dim] starts at 1 - offset."""

    def __init__(self, dim: int, *, eps: float = 1e-5, offset: float = 0.0, bias: bool = False):
        super().__init__()
        self.dim, self.eps, self.offset = dim, eps, offset
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None):
        """x [..., dim] -> the same shape; with residual (norm(x + residual), x + residual)."""
        return layer_norm(x, self.weight, bias=self.bias, eps=self.eps, offset=self.offset, residual=residual)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, offset={self.offset}, bias={self.bias is not None}"


class SwiGLU(nn.Module):
    """down(silu(gate) * up) with [gate | up] = gate_up(x) (Shazeer 2020, equation 6; PaLM section 2)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        return self.down(swiglu_packed(self.gate_up(x)))


class RotaryEmbedding(nn.Module):
    """`rotary` of the first head_dim dimensions of each head, with its tables.

    cos, sin: float32 buffers [max_positions, head_dim / 2], not in the state dict. They stay float32 under `.to(torch.bfloat16)`
    (a bfloat16 position loses whole tokens: 257 rounds to 256) and are made anew on leaving the meta device.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, *, max_positions: int = 2048, base: float = 10000.0, interleaved: bool = False):
        super().__init__()
        self.head_dim, self.max_positions, self.base, self.interleaved = head_dim, max_positions, base, interleaved
        cos, sin = rotary_tables(max_positions, head_dim, base=base, device=torch.get_default_device())
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def reset_tables(self) -> None:
        """Write the tables again where the buffers are."""
        self.cos, self.sin = rotary_tables(self.max_positions, self.head_dim, base=self.base, device=self.cos.device)

    def _apply(self, fn, recurse=True):
        was_meta = self.cos.is_meta
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32 or (was_meta and not self.cos.is_meta):
            self.reset_tables()
        return self

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, T, H, D] or [B, T, D], positions [T] or [B, T] (absent: 0..T-1) -> x's shape."""
        return rotary(x, self.cos, self.sin, positions=positions, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, max_positions={self.max_positions}, base={self.base}, interleaved={self.interleaved}"


class MultiQueryAttention(nn.Module):
    """out_proj(attention(q, k, v)): `heads` query heads over `kv_heads` shared key/value heads (Shazeer 2019)."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, kv_heads: int = 1):
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"MultiQueryAttention: heads is {heads}, need a multiple of kv_heads = {kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x, cos=None, sin=None, *, positions=None, interleaved=False, return_lse=False, **keywords):
        """x [B, T, dim] -> [B, T, dim]; with cos and sin q and k are rotated first; keywords are `attention`'s."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv_proj(x).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        if (cos is None) != (sin is None):
            raise ValueError("MultiQueryAttention: cos and sin go together, one is None")
        if cos is not None and sin is not None:
            q = rotary(q, cos, sin, positions=positions, interleaved=interleaved)
            k = rotary(k, cos, sin, positions=positions, interleaved=interleaved)
        if return_lse:
            out, lse = attention(q, k, v, return_lse=True, **keywords)
            return self.out_proj(out.flatten(-2)), lse
        return self.out_proj(attention(q, k, v, **keywords).flatten(-2))  # type: ignore


def why_called(name: str, module: nn.Module, kind: type) -> str | None:
    """Why a module must be called, and nothing may reach past its forward; None if it is exactly its kind."""
    own = module.__dict__
    if type(module) is not kind:
        return f"{name} is {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in own:
        return f"{name} has a forward of its own"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"{name} has hooks"
    return None


def why_not_plain(name: str, module: nn.Module, kind: type, x: Tensor | None = None) -> str | None:
    """Why an op must not reach past module.forward to module.weight (for the input x, where given); None if it may."""
    if reason := why_called(name, module, kind):
        return reason
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{name}.weight is no parameter"
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return f"{name}.weight is a {type(weight).__name__}"
    if x is not None and weight.is_meta and not x.is_meta:
        return f"{name} is offloaded"
    return None


class ParallelBlock(nn.Module):
    """PaLM's block (section 2): x + out_proj([attention | swiglu]), [q | k | v | gate | up] = in_proj(norm(x)).

    Children: norm, in_proj [(heads + 2 kv_heads) head_dim + 2 hidden_dim, dim], out_proj [dim, heads head_dim + hidden_dim],
    without biases. Takes the fused `parallel_block` if all three are exactly themselves: no hooks, parametrizations, offloaded
    weights or subclasses (LoRA, quantised). Otherwise, with `attend`, and with dropout (of what it adds) in training, it calls its
    children one by one; `path()` says which.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        hidden_dim: int,
        *,
        kv_heads: int = 1,
        norm: str = "rms_norm",
        eps: float = 1e-6,
        norm_offset: float = 1.0,
        interleaved: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"ParallelBlock: heads is {heads}, need a multiple of kv_heads = {kv_heads}")
        if norm not in ("rms_norm", "layer_norm"):
            raise ValueError(f"ParallelBlock: norm is {norm!r}, need 'rms_norm' or 'layer_norm'")
        self.heads, self.kv_heads, self.head_dim, self.hidden_dim = heads, kv_heads, head_dim, hidden_dim
        self.norm_kind, self.interleaved, self.dropout = norm, interleaved, dropout
        self.norm = (RMSNorm if norm == "rms_norm" else LayerNorm)(dim, eps=eps, offset=norm_offset)
        self.in_proj = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim + 2 * hidden_dim, bias=False)
        self.out_proj = nn.Linear(heads * head_dim + hidden_dim, dim, bias=False)

    def why_composed(self, x: Tensor | None = None) -> str | None:
        """Why this block calls its children one by one (for x, where given); None if it takes the fused op."""
        if self.dropout and self.training:
            return "dropout"
        norm = RMSNorm if self.norm_kind == "rms_norm" else LayerNorm
        children = self._modules  # in a decode step the way through nn.Module.__getattr__ is felt
        for name, kind in (("norm", norm), ("in_proj", nn.Linear), ("out_proj", nn.Linear)):
            module: nn.Module = children[name]  # type: ignore
            if reason := why_not_plain(name, module, kind, x):
                return reason
            if module._parameters.get("bias") is not None:
                return f"{name} has a bias"
        return None

    def path(self) -> str:
        """The path that a call without `attend` takes."""
        reason = self.why_composed()
        return "parallel_block" if reason is None else f"composition: {reason}"

    def forward(
        self,
        x,
        cos,
        sin,
        *,
        causal=True,
        key_bias=None,
        window=None,
        prefix_lengths=None,
        positions=None,
        attend=None,
    ):
        """x [B, T, dim], cos and sin as `rotary_tables` gives them, the rest as in `parallel_block` -> [B, T, dim].

        attend(q, k, v) [B, T, heads, head_dim], where given, stands in for `attention` under these masks (a cache, packed rows).
        """
        mask = {"causal": causal, "key_bias": key_bias, "window": window, "prefix_lengths": prefix_lengths}
        if attend is not None or self.why_composed(x) is not None:
            return self._compose(x, cos, sin, attend or (lambda q, k, v: attention(q, k, v, **mask)), positions)
        weights = self.norm.weight, self.in_proj.weight, self.out_proj.weight
        return parallel_block(
            *(x, *weights, cos, sin),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            norm=self.norm_kind,
            eps=self.norm.eps,
            norm_offset=self.norm.offset,
            positions=positions,
            interleaved=self.interleaved,
            **mask,
        )

    def _compose(self, x, cos, sin, attend, positions):
        H, K, D = self.heads, self.kv_heads, self.head_dim
        sizes = (H * D, K * D, K * D, self.hidden_dim, self.hidden_dim)
        q, k, v, gate, up = self.in_proj(self.norm(x)).split(sizes, -1)
        q = rotary(q.unflatten(-1, (H, D)), cos, sin, positions=positions, interleaved=self.interleaved)
        k = rotary(k.unflatten(-1, (K, D)), cos, sin, positions=positions, interleaved=self.interleaved)
        mixed = attend(q, k, v.unflatten(-1, (K, D)))
        added = self.out_proj(torch.cat((mixed.flatten(-2), swiglu(gate, up)), -1))
        return x + F.dropout(added, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, interleaved={self.interleaved}"


class SoftWeakEmbedding(nn.Module):
    """`soft_weak_embedding` with its table weight [num_embeddings, dim] and the mask's own row mask_embedding [dim]."""

    def __init__(self, num_embeddings: int, dim: int, *, variance_preserving: bool = False):
        super().__init__()
        self.num_embeddings, self.dim, self.variance_preserving = num_embeddings, dim, variance_preserving
        self.weight = nn.Parameter(torch.empty(num_embeddings, dim))
        self.mask_embedding = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.normal_(self.mask_embedding)

    def forward(self, ids: Tensor, strength: Tensor | None = None, source_ids: Tensor | None = None) -> Tensor:
        """ids, strength, source_ids [...] -> [..., dim]; without strength a plain lookup."""
        if strength is None:
            if source_ids is not None:
                raise ValueError("SoftWeakEmbedding: source_ids without strength, pass both")
            return F.embedding(ids, self.weight)
        return soft_weak_embedding(
            ids,
            self.weight,
            strength,
            mask_embedding=self.mask_embedding,
            source_ids=source_ids,
            variance_preserving=self.variance_preserving,
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.dim}"


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its own classifier, as torch's: child `linear`, class weights in the buffer `weight`."""

    weight: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = False, weight: Tensor | None = None, **keywords
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias)
        self.register_buffer("weight", weight)
        self.keywords = keywords

    def forward(self, input: Tensor, target: Tensor):
        """input [..., in_features], target int64 [...] -> the loss."""
        linear, weight = self.linear, self.weight
        return linear_cross_entropy(
            input, linear.weight, target, linear_bias=linear.bias, weight=weight, **self.keywords
        )


def fan_in_init_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """N(0, scale / sqrt(n_in)) in place, as PaLM's kernels (section 5)."""
    return nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[-1]))


def sequence_bounds(first_BT: Tensor) -> Tensor:
    """The int32 [sequences + 1] that attention_varlen takes, of rows laid end to end; first_BT bool: where a sequence begins."""
    return F.pad(first_BT.flatten().nonzero()[:, 0], (0, 1), value=first_BT.numel()).to(torch.int32)
