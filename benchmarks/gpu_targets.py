"""What the kernels are to reach on an H100."""

from .common import BOTH, FORWARD
from .targets import Target, each, percent, share, speedup, tflops


def _scratch(row: dict, r: dict) -> float | None:
    """What backward holds beside dq, over dk and dv (bfloat16)."""
    if r.get("backward_mib") is None:
        return None
    B, T, H, K, D = (row["case"][x] for x in "BTHKD")
    token = 2 * B * T * D / 2**20
    return (r["backward_mib"] - token * H) / (2 * token * K)


LONG = {"K": 1, "T": 8192}
BLOCK = "torch.compile of PaLM-pytorch"


def _attention(mode: str, D: int, value, worst=min):
    return each("attention", mode, value, worst, D=D, **LONG)


def _loss(key: str):
    return each("linear_cross_entropy", BOTH, share(key, "eager"), max)


TARGETS = [
    Target("attention forward, MQA, D=256, T=8k", "TFLOP/s", 300, 510, _attention(FORWARD, 256, tflops)),
    Target("attention forward+backward, D=256, SDPA's best", "x", 0.6, 1.0, _attention(BOTH, 256, speedup("SDPA"))),
    Target("attention forward, MQA, D=128, T=8k", "TFLOP/s", 370, 520, _attention(FORWARD, 128, tflops)),
    Target("dK, dV and scratch over dK+dV, D=256", "x", 1.1, None, _attention(BOTH, 256, _scratch, max), low=True),
    *(
        Target(f"{op} {mode}, of copy bandwidth", "%", 85, 92, each(op, mode, percent))
        for op in ("swiglu", "rms_norm", "layer_norm", "rotary", "cross_entropy")
        for mode in (FORWARD, BOTH)
    ),
    Target("linear_cross_entropy V=128k, memory of eager's", "x", 0.25, None, _loss("memory_mib"), low=True),
    Target("linear_cross_entropy V=128k, time of eager's", "x", 1.0, 0.7, _loss("ms"), low=True),
    Target("decode S=8k, batch 64, of bandwidth", "%", 80, 90, each("attention_decode", FORWARD, percent)),
    Target(f"parallel_block, {BLOCK}", "x", 1.2, 1.4, each("parallel_block", BOTH, speedup(BLOCK))),
    Target(
        f"parallel_block, saved of {BLOCK}",
        "x",
        0.5,
        None,
        each("parallel_block", BOTH, share("saved_mib", BLOCK), max),
        low=True,
    ),
]
