"""What others wrote computes what we compute: PyPI's PaLM-pytorch and palm-rlhf-pytorch, at random weights.

`make parity` installs each version in a folder of its own; the process that imports it runs this file as a script.
"""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[1] / "build" / "parity"
SIZES = [
    {"dim": 48, "num_tokens": 97, "depth": 3, "dim_head": 16, "heads": 4},
    {"dim": 40, "num_tokens": 61, "depth": 1, "dim_head": 24, "heads": 3, "ff_mult": 2},
]
GAINS = {"palm-rlhf-pytorch-0.2.3": 0.0, "palm-rlhf-pytorch-0.8.0": 1.0}  # our norm_offset


def build(peer: str, folder: Path, sizes: dict):
    sys.path.insert(0, str(folder))
    if peer.startswith("PaLM-pytorch"):
        from palm_pytorch import PaLM

        return PaLM(**sizes)
    package = types.ModuleType("palm_rlhf_pytorch")  # its __init__ imports what reinforcement learning needs
    package.__path__ = [str(folder / "palm_rlhf_pytorch")]
    sys.modules["palm_rlhf_pytorch"] = package
    from palm_rlhf_pytorch.palm import PaLM

    return PaLM(**sizes, rotary_xpos_scale_base=1e30)  # xPos has no switch: a scale of 1


def write(peer: str, size: int, out: str) -> None:
    """The peer's weights, logits, loss and gradients on random ids, as safetensors."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    model = build(peer, FOLDER / peer, sizes)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        if name.endswith("gamma") and GAINS.get(peer, 0.0) == 0.0:
            p.data += 1
    ids = torch.randint(1, sizes["num_tokens"], (2, 23))
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = {"ids": ids, "logits": logits.detach(), "loss": loss.detach()}
    found |= {f"weight {n}": t.clone() for n, t in model.state_dict().items()}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters()}
    save_file({n: t.contiguous() for n, t in found.items()}, out)


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("peer", ["PaLM-pytorch-0.2.2", *GAINS])
def test_logits_and_gradients(peer, size, tmp_path):
    if not (FOLDER / peer / "ready").exists():
        pytest.skip(f"{peer} is not there: make parity")
    from palm_kernels.models import PaLMForCausalLM, convert

    subprocess.run([sys.executable, __file__, peer, str(size), str(tmp_path / "theirs")], check=True, timeout=300)
    theirs = load_file(tmp_path / "theirs")
    weights, grads = (
        {n.removeprefix(kind): t for n, t in theirs.items() if n.startswith(kind)} for kind in ("weight ", "grad ")
    )

    def converted(state):
        if peer.startswith("PaLM-pytorch"):
            return convert.from_palm_pytorch(state)
        return convert.from_palm_rlhf(state, norm_offset=GAINS[peer])

    def close(found, expected, what):
        error = (found - expected).abs().max().item() / expected.abs().max().item()
        assert error < 1e-4, f"{what}: {error:.2e}"

    config, state = converted(weights)
    model = PaLMForCausalLM(config)
    model.load_state_dict(state)
    out = model(theirs["ids"], labels=theirs["ids"], return_logits=True)
    close(out.logits, theirs["logits"], "logits")
    close(out.loss, theirs["loss"], "loss")
    out.loss.backward()
    for name, grad in converted(grads)[1].items():
        close(model.get_parameter(name).grad, grad, name)


def test_what_a_state_dict_must_be():
    from palm_kernels.models import convert

    with pytest.raises(ValueError, match="no name of the state dict looks like"):
        convert.from_palm_pytorch({"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"norm_offset is 0.5, need 0.0 \(below 0.2.4\)"):
        convert.from_palm_rlhf({}, norm_offset=0.5)
    C, F_, H, D = 8, 32, 2, 4
    state = {
        "token_emb.weight": torch.randn(5, C),
        "norm.gamma": torch.ones(C),
        "layers.0.fn.norm.gamma": torch.ones(C),
        "layers.0.fn.norm.beta": torch.zeros(C),
        "layers.0.fn.rotary_emb.inv_freq": torch.ones(2),
        "layers.0.fn.fused_attn_ff_proj.weight": torch.randn((H + 2) * D + 2 * F_, C),
        "layers.0.fn.attn_out.weight": torch.randn(C, H * D),
        "layers.0.fn.ff_out.2.weight": torch.randn(C, F_),
    }
    config, ours = convert.from_palm_rlhf(state, norm_offset=0.0, max_position_embeddings=99)
    assert (config.num_attention_heads, config.head_dim, config.intermediate_size) == (H, D, F_)
    assert config.max_position_embeddings == 99 and config.tie_word_embeddings
    assert torch.equal(ours["lm_head.weight"], state["token_emb.weight"])
    for name, tensor, message in (
        ("layers.0.fn.norm.beta", torch.ones(C), "is not zero, our norms have no bias"),
        ("layers.0.fn.q_scale", torch.ones(D), "'layers.0.fn.q_scale' has no place"),
        ("finetune_modules.a.0.0.A", torch.ones(1), "merge adapters first"),
        ("to_logits.weight", torch.ones(4, C), "differ in shape"),
        ("layers.0.fn.attn_out.weight", torch.randn(C, H * D - 1), "is no PaLM's"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_palm_rlhf({**state, name: tensor}, norm_offset=0.0)
    untied = convert.from_palm_rlhf({**state, "to_logits.weight": torch.randn(5, C)}, norm_offset=1.0)[0]
    assert not untied.tie_word_embeddings and untied.norm_offset == 1.0


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), sys.argv[3])
