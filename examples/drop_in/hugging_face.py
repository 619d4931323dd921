"""A transformers model before and after `attn_implementation="palm_kernels"`: `python -m examples.drop_in.hugging_face`.

The model is a Llama with one key/value head at random weights (no download); any model that asks transformers for its attention
function will do. Gradients of one step and greedy tokens must agree, and are timed.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import palm_kernels.integrations

from .timing import compare, show


def build(attention: str, args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=1,
        max_position_embeddings=args.tokens + 64,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="model dim, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="blocks")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each, of which the median is shown")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    args = parser.parse_args()
    palm_kernels.integrations.register()
    models = {"sdpa": build("sdpa", args), "palm_kernels": build("palm_kernels", args)}
    ids = torch.randint(1, 4096, (2, args.tokens))

    def gradients(model):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    def tokens(model):
        keywords = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
        return [model.eval().generate(ids, **keywords).double()]

    for title, what in (("loss and gradients", gradients), ("16 greedy tokens", tokens)):
        show(
            f"{title}, 2 x {args.tokens} tokens",
            compare({n: lambda m=m, f=what: f(m) for n, m in models.items()}, args.rounds),
        )


if __name__ == "__main__":
    main()
