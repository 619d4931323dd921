"""Small models of ours and batches for them."""

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from palm_kernels.models import PaLMConfig, PaLMForCausalLM


def tiny(**fields):
    return PaLMConfig.preset("palm-tiny", **{"vocab_size": 120, "hidden_size": 48, "head_dim": 12, **fields})


def build(kind=PaLMForCausalLM, seed=0, **fields):
    torch.manual_seed(seed)
    return kind(tiny(**fields)).eval()


def batch(B=3, T=13, V=100, seed=1):
    """ids, a mask with left and right padding, labels of the unpadded tokens, some ignored."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, V, (B, T), generator=g)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[0, : T // 3] = 0
    mask[-1, -(T // 4) :] = 0
    labels = torch.randint(0, V, (B, T), generator=g).masked_fill(mask == 0, -100)
    return ids, mask, labels.masked_fill(torch.rand(B, T, generator=g) < 0.2, -100)


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), [p.grad.clone() for p in model.parameters()]


def same(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def generate_compiled(model, ids, **keywords):
    """(tokens, graphs): `generate` over a static cache with its steps compiled whole, as it does by itself on a GPU."""
    config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters["stats"].clear()
    tokens = model.generate(ids, cache_implementation="static", compile_config=config, **keywords)
    return tokens, counters["stats"]["unique_graphs"]
