"""A block written in plain PyTorch, and the same block with four lines changed: `python -m examples.drop_in.torch_block`.

Both share their parameters. Outputs and gradients must agree, and forward and backward are timed.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import palm_kernels as pk

from .timing import compare, show


class Block(nn.Module):
    """Pre-norm attention with rotary positions and one key/value head, then a SwiGLU feed-forward layer."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(dim)) for _ in range(2)])
        self.qkv = nn.Linear(dim, (heads + 2) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 8 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split([self.heads * self.head_dim, self.head_dim, self.head_dim], -1)
        return q.unflatten(-1, (self.heads, self.head_dim)), k.unsqueeze(2), v.unsqueeze(2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        raise NotImplementedError


class Before(Block):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x, cos, sin):
        q, k, v = self.split(F.rms_norm(x, x.shape[-1:], self.norms[0], 1e-6))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.norms[1], 1e-6)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class After(Block):
    def forward(self, x, cos, sin):
        q, k, v = self.split(pk.rms_norm(x, self.norms[0]))
        q, k = pk.rotary(q, cos, sin), pk.rotary(k, cos, sin)
        x = x + self.out(pk.attention(q, k, v, causal=True).flatten(2))
        return x + self.down(pk.swiglu_packed(self.gate_up(pk.rms_norm(x, self.norms[1]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="model dim")
    parser.add_argument("--heads", type=int, default=8, help="query heads of 64, over one key/value head")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each, of which the median is shown")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    before, after = Before(args.dim, args.heads, 64), After(args.dim, args.heads, 64)
    after.load_state_dict(before.state_dict())
    x = torch.randn(2, args.tokens, args.dim, requires_grad=True)
    dout = torch.randn(2, args.tokens, args.dim)
    tables = pk.rotary_tables(args.tokens, 64)

    def run(block: Block):
        out = block(x, *tables)
        return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dout)]

    found = compare({"plain PyTorch": lambda: run(before), "palm_kernels": lambda: run(after)}, args.rounds)
    show(f"a block, forward and backward, 2 x {args.tokens} tokens", found)


if __name__ == "__main__":
    main()
