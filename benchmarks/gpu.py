"""What the report measures on a GPU: PaLM 8B's widths at 16,384 tokens in bfloat16, in order of interest.

Inputs are those of bench_<stem>.py. Gates run on fewer rows, heads or batch entries, where float64 would not fit or take minutes.
"""

import torch

from . import (
    bench_attention,
    bench_cross_entropy,
    bench_norm,
    bench_parallel_block,
    bench_rotary,
    bench_swiglu,
    gpu_peers,
    peers,
)
from . import bench_soft_weak_embedding as bench_embedding
from .common import Bench, cases, eager_and_compiled

BF16 = {"dtypes": [torch.bfloat16]}
MASK = "B T H K D causal"


def _others(op: str, eager) -> dict:
    return {**eager_and_compiled(eager), **gpu_peers.liger(op)}


LINEAR = {
    "eager": peers.linear_then_cross_entropy,
    "torch.compile": eager_and_compiled(peers.linear_then_cross_entropy)["torch.compile"],
    "F.linear_cross_entropy": peers.linear_cross_entropy,
    "F.linear_cross_entropy chunked": peers.linear_cross_entropy_chunked,
    **gpu_peers.liger("linear_cross_entropy"),
}
BLOCK = {
    **eager_and_compiled(peers.block),
    "torch.compile of PaLM-pytorch": eager_and_compiled(gpu_peers.palm_pytorch_block)["torch.compile"],
}
LONG = cases(MASK, (2, 8192, 16, 1, 256, True), (2, 8192, 32, 1, 128, True), **BF16)
GROUPED = cases(MASK, (2, 8192, 32, 8, 128, True), **BF16)
NORM = cases("N C", (16384, 4096), **BF16)

BENCHES = {  # stem: benches
    "attention": [
        Bench("attention", LONG, bench_attention.attention, gpu_peers.attention(), quick=2, gate={"B": 1, "H": 4}),
        Bench(
            "attention_decode",
            cases("B S H D", (64, 8192, 16, 256), **BF16),
            bench_attention.decode,
            gpu_peers.decode(),
            gate={"B": 8},
            cold=True,
            bandwidth="read",
        ),
        Bench(
            "attention",
            GROUPED,
            bench_attention.attention,
            gpu_peers.attention(),
            quick=0,
            gate={"B": 1, "H": 8, "K": 2},
            variant="grouped",
        ),
    ],
    "cross_entropy": [
        Bench(
            "linear_cross_entropy",
            cases("N C V ignored", (16384, 4096, 128000, 0.0), **BF16),
            bench_cross_entropy.linear_cross_entropy,
            LINEAR,
            floors={"GEMMs": bench_cross_entropy.gemms},
            gate={"N": 256, "V": 32000},
        ),
        Bench(
            "cross_entropy",
            cases("N V", (16384, 32000), (4096, 256000), **BF16),
            bench_cross_entropy.cross_entropy,
            _others("cross_entropy", peers.cross_entropy),
            gate={"N": 256},
        ),
    ],
    "parallel_block": [
        Bench(
            "parallel_block",
            cases("B T C D", (8, 2048, 4096, 256), **BF16),
            bench_parallel_block.block,
            BLOCK,
            floors={"GEMMs": bench_parallel_block.gemms, "attention": bench_parallel_block.attention},
            gate={"B": 1, "T": 256},
        ),
    ],
    "swiglu": [
        Bench(
            "swiglu",
            cases("N F", (16384, 16384), **BF16),
            bench_swiglu.swiglu,
            _others("swiglu", peers.silu_up),
            gate={"N": 512},
        ),
        Bench(
            "swiglu_packed",
            cases("N F", (16384, 16384), **BF16),
            bench_swiglu.swiglu_packed,
            _others("swiglu_packed", peers.silu_up_packed),
            quick=0,
            gate={"N": 512},
        ),
    ],
    "decode_linear": [],  # the CPU's alone
    "norm": [
        Bench("rms_norm", NORM, bench_norm.norm, _others("rms_norm", peers.rms_norm), gate={"N": 1024}),
        Bench("layer_norm", NORM, bench_norm.norm, _others("layer_norm", peers.layer_norm), gate={"N": 1024}),
        Bench(
            "rms_norm",
            NORM,
            bench_norm.norm_with_residual,
            eager_and_compiled(peers.rms_norm),
            quick=0,
            gate={"N": 1024},
            variant="residual",
        ),
    ],
    "rotary": [
        Bench(
            "rotary",
            cases("B T H D", (8, 2048, 16, 256), **BF16),
            bench_rotary.rotary,
            eager_and_compiled(peers.rotate),
            gate={"B": 1},
        ),
    ],
    "soft_weak_embedding": [
        Bench(
            "soft_weak_embedding",
            cases("N V C", (16384, 128000, 4096), **BF16),
            bench_embedding.embedding,
            eager_and_compiled(peers.mixed_embedding),
            gate={"N": 2048, "V": 8000},
        ),
    ],
}
