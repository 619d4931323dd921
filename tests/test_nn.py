"""The modules: each is its op (or PaLM's formula), and ParallelBlock's two paths agree."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import nn
from torch.nn.utils import parametrize

import palm_kernels as pk
from palm_kernels.nn import (
    LayerNorm,
    LinearCrossEntropyLoss,
    MultiQueryAttention,
    ParallelBlock,
    RMSNorm,
    RotaryEmbedding,
    SoftWeakEmbedding,
    SwiGLU,
)
from palm_kernels.ops.parallel_block import decode_blocks

F64 = torch.float64


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(offset):
    x, residual = torch.randn(2, 5, 12, dtype=F64), torch.randn(2, 5, 12, dtype=F64)
    rms, layer = RMSNorm(12, offset=offset).to(F64), LayerNorm(12, offset=offset, bias=True).to(F64)
    close(rms(x), F.rms_norm(x, (12,), eps=1e-6))
    close(layer(x), F.layer_norm(x, (12,), eps=1e-5))
    normed, total = rms(x, residual)
    close(total, x + residual)
    close(normed, F.rms_norm(total, (12,), eps=1e-6))
    assert set(rms.state_dict()) == {"weight"} and set(layer.state_dict()) == {"weight", "bias"}
    assert set(LayerNorm(12).state_dict()) == {"weight"}


def test_swiglu():
    module, x = SwiGLU(6, 10).to(F64), torch.randn(3, 6, dtype=F64)
    gate, up = F.linear(x, module.gate_up.weight).chunk(2, -1)
    close(module(x), F.linear(F.silu(gate) * up, module.down.weight))
    assert set(module.state_dict()) == {"gate_up.weight", "down.weight"}


def test_rotary_embedding_keeps_its_tables():
    module = RotaryEmbedding(8, max_positions=300)
    cos = module.cos.clone()
    assert not module.state_dict() and cos.dtype == torch.float32
    for cast in (module.bfloat16, module.half, module.double, module.float):
        cast()
        assert module.cos.dtype == torch.float32 and torch.equal(module.cos, cos)
    with torch.device("meta"):
        empty = RotaryEmbedding(8, max_positions=300)
    assert empty.cos.is_meta
    assert torch.equal(empty.to_empty(device="cpu").cos, cos)
    x, positions = torch.randn(2, 3, 4, 8), torch.tensor([[0, 7, 299], [5, 5, 5]])
    angle = positions[:, :, None, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    expected = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(module(x, positions), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_multi_query_attention(kv_heads):
    module, x = MultiQueryAttention(10, 4, 6, kv_heads=kv_heads).to(F64), torch.randn(2, 7, 10, dtype=F64)
    q = module.q_proj(x).view(2, 7, 4, 6).transpose(1, 2)
    k, v = (t.view(2, 7, kv_heads, 6).transpose(1, 2) for t in module.kv_proj(x).chunk(2, -1))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    close(module(x, causal=True), module.out_proj(expected.transpose(1, 2).flatten(-2)))
    out, lse = module(x, causal=True, return_lse=True)
    close(out, module(x, causal=True))
    assert lse.shape == (2, 4, 7)
    table = RotaryEmbedding(6)
    assert not torch.allclose(module(x, table.cos, table.sin), module(x))
    with pytest.raises(ValueError, match="cos and sin go together"):
        module(x, table.cos)
    with pytest.raises(ValueError, match="kv_heads"):
        MultiQueryAttention(10, 4, 6, kv_heads=3)


def test_soft_weak_embedding():
    module, ids = SoftWeakEmbedding(11, 6), torch.tensor([[1, 2, 3]])
    close(module(ids), module.weight[ids])
    strength = torch.tensor([[0.0, 0.25, 1.0]])
    row, mask = module.weight[ids[0]], module.mask_embedding
    torch.testing.assert_close(module(ids, strength)[0], torch.stack((row[0], 0.75 * row[1] + 0.25 * mask, mask)))
    sources = torch.tensor([[4, 5, -1]])
    torch.testing.assert_close(module(ids, strength, sources)[0, 1], 0.75 * row[1] + 0.25 * module.weight[5])
    assert set(module.state_dict()) == {"weight", "mask_embedding"}
    with pytest.raises(ValueError, match="source_ids without strength"):
        module(ids, source_ids=sources)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss(bias):
    weight = torch.rand(9) + 0.5
    ours = LinearCrossEntropyLoss(6, 9, bias=bias, weight=weight, label_smoothing=0.1)
    hidden, target = torch.randn(2, 5, 6), torch.randint(0, 9, (2, 5))
    target[0, 0] = -100
    logits = ours.linear(hidden).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(ours(hidden, target), expected, rtol=1e-5, atol=1e-5)
    assert set(ours.state_dict()) == {"weight", "linear.weight"} | ({"linear.bias"} if bias else set())


def block(dtype=torch.float32, **keywords):
    torch.manual_seed(0)
    module = ParallelBlock(24, 4, 8, 40, **keywords)
    with torch.no_grad():
        module.norm.weight.add_(torch.randn(24) * 0.2)
    return module.to(dtype)


def run(module, x, **mask):
    table = RotaryEmbedding(module.head_dim)
    x = x.detach().requires_grad_()
    out = module(x, table.cos, table.sin, **mask)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(out.dtype)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return out, *torch.autograd.grad(out, [x, *parameters], dout)


MASKS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "padded": {"causal": False, "key_bias": torch.tensor([[True] * 9, [True] * 5 + [False] * 4])},
    "window": {"window": 3},
    "prefix": {"prefix_lengths": torch.tensor([4, 0], dtype=torch.int32)},
    "positions": {"positions": torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9, 10, 11]])},
}


def composed(module):
    """The same block with a hook that changes nothing, so that it calls its children."""
    module.in_proj.register_forward_hook(lambda *_: None)
    assert module.path() == "composition: in_proj has hooks"
    return module


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_both_paths_within_the_budget(mask, dtype):
    for keywords in ({}, {"kv_heads": 2, "norm": "layer_norm", "norm_offset": 0.0, "interleaved": True}):
        module, x = block(dtype, **keywords), torch.randn(2, 9, 24, dtype=dtype)
        assert module.path() == "parallel_block"
        with pk.backend("reference"):
            yardstick = run(module, x, **MASKS[mask])
            truth = run(block(dtype, **keywords).to(F64), x.to(F64), **MASKS[mask])
        for path in (module, composed(block(dtype, **keywords))):
            for i, results in enumerate(zip(run(path, x, **MASKS[mask]), yardstick, truth, strict=True)):
                assert_close(*results, dtype, what=f"{path.path()} {mask} {i}")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_what_makes_a_block_call_its_children():
    module, x = block(), torch.randn(1, 4, 24)
    expected = run(module, x)[0]
    module.out_proj.register_forward_pre_hook(lambda *_: None)
    assert "hooks" in module.path()
    module = block()
    module.norm.forward = module.norm.forward
    assert module.path() == "composition: norm has a forward of its own"
    torch.testing.assert_close(run(module, x)[0], expected, rtol=1e-5, atol=1e-5)
    module = block()
    with torch.no_grad():
        module.in_proj.weight.mul_(0.5)
    parametrize.register_parametrization(module.in_proj, "weight", Doubled())
    assert "ParametrizedLinear" in module.path()
    torch.testing.assert_close(run(module, x)[0], expected, rtol=1e-5, atol=1e-5)
    module = block()
    module.in_proj.bias = nn.Parameter(torch.zeros(module.in_proj.out_features))
    assert module.path() == "composition: in_proj has a bias"
    torch.testing.assert_close(run(module, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    module, x, table = block(), torch.randn(1, 4, 24), RotaryEmbedding(8)
    with torch.no_grad():
        expected = module(x, table.cos, table.sin)
        accelerate.cpu_offload(module)
        assert module.in_proj.weight.is_meta and module.path().startswith("composition")
        torch.testing.assert_close(module(x, table.cos, table.sin), expected, rtol=1e-5, atol=1e-5)


def test_attend_replaces_attention():
    module, x, table = block(), torch.randn(2, 5, 24), RotaryEmbedding(8)
    seen = []

    def attend(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return pk.attention(q, k, v, causal=True)

    torch.testing.assert_close(
        module(x, table.cos, table.sin, attend=attend), module(x, table.cos, table.sin), rtol=1e-5, atol=1e-5
    )
    assert seen == [((2, 5, 4, 8), (2, 5, 1, 8), (2, 5, 1, 8))]


def test_block_names_and_errors():
    assert set(block().state_dict()) == {"norm.weight", "in_proj.weight", "out_proj.weight"}
    with pytest.raises(ValueError, match="heads is 4"):
        ParallelBlock(24, 4, 8, 40, kv_heads=3)
    with pytest.raises(ValueError, match="rms_norm"):
        ParallelBlock(24, 4, 8, 40, norm="batch_norm")


def test_meta_block():
    with torch.device("meta"):
        module, table, x = ParallelBlock(24, 4, 8, 40), RotaryEmbedding(8), torch.randn(2, 3, 24)
    assert module(x, table.cos, table.sin).shape == (2, 3, 24)


@pytest.mark.parametrize("keywords", [{}, {"window": 3}], ids=str)
def test_block_over_a_cache(keywords):
    """attend stands in for attention, with gradients, and decode_blocks is the same without."""
    block = ParallelBlock(40, 4, 16, 48, kv_heads=2)
    x, (cos, sin), positions = torch.randn(2, 3, 40, requires_grad=True), pk.rotary_tables(8, 16), torch.arange(5, 8)
    old = torch.randn(2, 2, 5, 2, 16)

    def attend(q, k, v):
        k, v = (torch.cat((o, new), 1) for o, new in zip(old, (k, v), strict=True))
        return pk.attention(q, k, v, causal=True, **keywords)

    out = block(x, cos, sin, positions=positions, attend=attend, **keywords)
    caches = torch.cat((old, torch.full((2, 2, 4, 2, 16), torch.nan)), 2).transpose(2, 3)  # room for one more
    with torch.no_grad():
        weights = [block.norm.weight], [block.in_proj.weight], [block.out_proj.weight]
        step = decode_blocks(
            *(x, weights, cos, sin, [caches[0]], [caches[1]], 8),
            **{"heads": 4, "norm": "rms_norm", "eps": 1e-6, "norm_offset": 1.0, "window": None, **keywords},
            **{"positions": None, "start": 5, "key_bias": None, "interleaved": False},
        )
    assert caches[..., :8, :].isfinite().all() and caches[..., 8, :].isnan().all()
    torch.testing.assert_close(step, out, rtol=2e-5, atol=2e-5)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))
