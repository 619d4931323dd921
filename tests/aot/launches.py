"""What is compiled: calls of the launchers with the shapes, strides and options that models have, on meta tensors.

A launcher's arguments are those of the CPU out-variant of the same name (csrc/cpu/bindings.cpp).
"""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from palm_kernels import dispatch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT32, INT64 = torch.int32, torch.int64
B, T = 4, 2048
H, D, F, V = 16, 256, 16384, 256_000  # PaLM 8B
FUSED = (H + 2) * D + 2 * F  # its projection [q | k | v | gate | up]
STEM_OF = {
    launcher: stem for op, pairs in dispatch.KERNELS.items() if op not in dispatch.CPU_ONLY for stem, launcher in pairs
}


@dataclasses.dataclass(frozen=True)
class Case:
    launcher: str
    name: str
    args: tuple
    tf32: bool = False  # under torch.backends.cuda.matmul.fp32_precision = "tf32"

    def call(self) -> None:
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32" if self.tf32 else before
        try:
            module = importlib.import_module(f"palm_kernels._triton.{STEM_OF[self.launcher]}")
            getattr(module, self.launcher)(*self.args)
        finally:
            matmul.fp32_precision = before


def case(launcher: str, name: str, *args, tf32: bool = False) -> Case:
    return Case(launcher, f"{launcher} {name}", args, tf32)


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def options(**flags: bool) -> str:
    return "".join(f" {name}" for name, on in flags.items() if on)


def fused(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, gate, up as the parallel block has them: slices of one tensor."""
    q, k, v, gate, up = new(B, T, FUSED, dtype=dtype).split([H * D, D, D, F, F], -1)
    return q.unflatten(-1, (H, D)), k.unflatten(-1, (1, D)), v.unflatten(-1, (1, D)), gate, up


def swiglu(short: str, dtype: torch.dtype) -> Iterator[Case]:
    *_, gate, up = fused(dtype)
    beside = new(B, T, H * D + F, dtype=dtype)[..., H * D :]
    yield case("swiglu_fwd", f"{short} block", gate, up, beside)
    yield case("swiglu_bwd", f"{short} block", beside, gate, up, *fused(dtype)[3:])
    small = [new(B, T, 192, dtype=dtype) for _ in range(5)]
    yield case("swiglu_fwd", f"{short} F=192", *small[:3])
    yield case("swiglu_bwd", f"{short} F=192", *small)


def rotary(short: str, dtype: torch.dtype) -> Iterator[Case]:
    sizes = ((256, 128), (128, 64), (128, 32), (64, 32))  # head dim, pairs that rotate
    indices = {"": None, " int32": new(T, dtype=INT32), " int64": new(B, T, dtype=INT64)}
    for (head, half), interleaved, conjugate in itertools.product(sizes, (False, True), (False, True)):
        for kind, positions in indices.items():
            x, tables = new(B, T, H, head, dtype=dtype), (new(T, half), new(T, half))
            name = f"{short} D={head} half={half}{options(interleaved=interleaved, conjugate=conjugate)}{kind}"
            yield case("rotary", name, x, *tables, positions, interleaved, conjugate, new(*x.shape, dtype=dtype))
    tables = new(T, D // 2), new(T, D // 2)
    for name, x in (("block q", fused(dtype)[0]), ("block k", fused(dtype)[1]), ("3-D", new(B, T, D, dtype=dtype))):
        yield case("rotary", f"{short} {name}", x, *tables, None, False, False, x)


def norm(short: str, dtype: torch.dtype) -> Iterator[Case]:
    gains = {"": None, f" {short} gain": dtype, " fp32 gain": torch.float32}
    for C, (gain, kind), summed in itertools.product((256, 4096, 18432), gains.items(), (False, True)):
        x, residual, out, total = (new(B, T, C, dtype=dtype) for _ in range(4))
        residual, total = (residual, total) if summed else (None, None)
        mean, rstd = new(B, T), new(B, T)
        weight, bias, dweight, dbias = (None if kind is None else new(C, dtype=kind) for _ in range(4))
        name = f"{short} C={C}{gain}{options(residual=summed)}"
        yield case("rms_norm_fwd", name, x, residual, weight, 1e-6, 1.0, out, total, rstd)
        yield case("rms_norm_bwd", name, out, x, weight, rstd, total, 1.0, x, dweight)
        yield case("layer_norm_fwd", name, x, residual, weight, bias, 1e-5, 0.0, out, total, mean, rstd)
        yield case("layer_norm_bwd", name, out, x, weight, mean, rstd, total, 0.0, x, dweight, dbias)


def cross_entropy(short: str, dtype: torch.dtype) -> Iterator[Case]:
    N = B * T
    for classes, weights, smoothing, z_loss in itertools.product((V, 512), *((False, True),) * 3):
        name = f"{short} V={classes}{options(weights=weights, smoothing=smoothing, z_loss=z_loss)}"
        x, target = new(N, classes, dtype=dtype), new(N, dtype=INT64)
        w, t = (new(classes), new(N)) if weights else (None, None)
        scalars = (-100, 0.1 * smoothing, 1e-4 * z_loss, 1.0)
        for reduction, shape in (("mean", ()), ("none", (N,))):
            outs = (new(*shape), new(*shape), new(N), new())
            yield case("cross_entropy_fwd", f"{name} {reduction}", x, target, w, t, *scalars, reduction, *outs)
            ins = (x, new(*shape), new(N), new(), target, w, t)
            yield case("cross_entropy_bwd", f"{name} {reduction}", *ins, *scalars, new(N, classes, dtype=dtype))
        for kind, gradient, dloss in (("", False, None), (" gradient", True, None), (" dloss", True, new(N))):
            outs = (gradient, new(N), new(N), new(N))
            yield case("linear_cross_entropy_rows", name + kind, x, target, w, t, dloss, *scalars, *outs)


def soft_weak_embedding(short: str, dtype: torch.dtype) -> Iterator[Case]:
    for C, masked, sourced, preserving in itertools.product((4096, 128), *((False, True),) * 3):
        name = f"{short} C={C}{options(mask=masked, sources=sourced, preserving=preserving)}"
        ids, strength, weight = new(B, T, 1, dtype=INT64), new(B, T, 1), new(V, C, dtype=dtype)
        mask, dmask = (new(C, dtype=dtype), new(C, dtype=dtype)) if masked else (None, None)
        sources, rows = ids if sourced else None, new(B, T, C, dtype=dtype)
        yield case("soft_weak_embedding_fwd", name, ids, weight, strength, mask, sources, preserving, rows)
        saved = (rows, ids, strength, weight, mask, sources, preserving, V)
        yield case("soft_weak_embedding_bwd", name, *saved, weight, dmask, new(B, T, 1))


MASKS = {  # causal, key_bias, prefix_lengths, left, right
    "full": (False, False, False, -1, -1),
    "causal": (True, False, False, -1, -1),
    "bias": (False, True, False, -1, -1),
    "causal window": (True, False, False, 1023, -1),
    "band": (False, False, False, 512, 512),
    "causal prefix": (True, False, True, -1, -1),
    "causal prefix window bias": (True, True, True, 1023, -1),
}


def attention(short: str, dtype: torch.dtype) -> Iterator[Case]:
    masks = (
        MASKS if short != "fp16" else ("full", "causal", "causal prefix window bias")
    )  # fp16 differs from bf16 in types alone
    for head in (16, 32, 64, 128, 256):
        for mask in masks:
            yield from _dense(f"{short} D={head} {mask}", dtype, (H, 1, head), *MASKS[mask])
        for mask in ("causal", "bias", "band"):
            yield from _packed(f"{short} D={head} {mask}", dtype, (H, 1, head), *MASKS[mask])
        for mask, tokens in (("causal", 1), ("causal", 8), ("causal window", 1), ("bias", 1)):
            yield _decode(f"{short} D={head} {mask} T={tokens}", dtype, (H, 1, head), tokens, *MASKS[mask])
        name, sizes, causal = f"{short} D={head} causal", (32, 8, head), MASKS["causal"]
        yield from _dense(f"{name} grouped", dtype, sizes, *causal)
        yield from _packed(f"{name} grouped", dtype, sizes, *causal)
        yield _decode(f"{name} grouped T=1", dtype, sizes, 1, *causal)
        if short == "fp32":
            yield from _dense(f"{name} tf32", dtype, (H, 1, head), *causal, tf32=True)
    q, k, v, *_ = fused(dtype)
    out = new(B, T, H * D + F, dtype=dtype)[..., : H * D].unflatten(-1, (H, D))
    yield case("attention_fwd", f"{short} block", q, k, v, None, None, True, D**-0.5, -1, -1, out, new(B, H, T))


def _dense(name, dtype, sizes, causal, biased, prefixed, left, right, tf32=False) -> Iterator[Case]:
    heads, kv, head = sizes
    q, k = new(B, T, heads, head, dtype=dtype), new(B, T, kv, head, dtype=dtype)
    bias, lse = new(B, T) if biased else None, new(B, heads, T)
    how = (bias, new(B, dtype=INT32) if prefixed else None, causal, head**-0.5, left, right)
    yield case("attention_fwd", name, q, k, k, *how, q, lse, tf32=tf32)
    yield case("attention_bwd", name, q, lse if biased else None, q, k, k, q, lse, *how, q, k, k, bias, tf32=tf32)


def _packed(name, dtype, sizes, causal, biased, prefixed, left, right) -> Iterator[Case]:
    heads, kv, head = sizes
    q, k, cu = new(B * T, heads, head, dtype=dtype), new(B * T, kv, head, dtype=dtype), new(B + 1, dtype=INT32)
    bias, lse = new(B * T) if biased else None, new(heads, B * T)
    how = (cu, cu, bias, causal, head**-0.5, left, right)
    yield case("attention_varlen_fwd", name, q, k, k, *how, q, lse)
    yield case("attention_varlen_bwd", name, q, lse if biased else None, q, k, k, q, lse, *how, q, k, k, bias)


def _decode(name, dtype, sizes, tokens, causal, biased, prefixed, left, right) -> Case:
    heads, kv, head = sizes
    q, cache = new(64, tokens, heads, head, dtype=dtype), new(64, 8192, kv, head, dtype=dtype)
    bias, lengths = new(64, 8192) if biased else None, new(64, dtype=INT32)
    outs = (q, new(64, heads, tokens))
    return case("attention_decode", name, q, cache, cache, lengths, bias, head**-0.5, left, right, *outs)


MAKERS = (attention, cross_entropy, norm, rotary, soft_weak_embedding, swiglu)
CASES = {c.name: c for make in MAKERS for short, dtype in DTYPES.items() for c in make(short, dtype)}
QUICK = (  # in `make test`: the forms that models run most, and those with the most registers
    "attention_fwd bf16 D=64 bias",
    "attention_fwd bf16 D=128 causal",
    "attention_fwd bf16 D=256 causal",
    "attention_fwd fp32 D=256 causal",
    "attention_fwd fp16 D=256 causal prefix window bias",
    "attention_bwd bf16 D=128 causal prefix window bias",
    "attention_bwd bf16 D=256 causal",
    "attention_bwd fp32 D=256 causal",
    "attention_varlen_fwd bf16 D=128 causal",
    "attention_varlen_bwd bf16 D=128 causal",
    "attention_decode bf16 D=256 causal T=1",
    "cross_entropy_fwd bf16 V=256000 mean",
    "cross_entropy_bwd bf16 V=256000 weights smoothing z_loss mean",
    "linear_cross_entropy_rows bf16 V=256000 weights smoothing z_loss gradient",
    "rms_norm_fwd bf16 C=4096 fp32 gain residual",
    "rms_norm_bwd bf16 C=4096 fp32 gain residual",
    "rms_norm_fwd bf16 C=18432 bf16 gain",
    "layer_norm_fwd bf16 C=256 fp32 gain",
    "layer_norm_bwd fp32 C=4096 fp32 gain residual",
    "rotary bf16 block q",
    "rotary bf16 D=128 half=64 interleaved int64",
    "rotary fp32 D=128 half=32 conjugate",
    "soft_weak_embedding_fwd bf16 C=4096 mask sources preserving",
    "soft_weak_embedding_bwd bf16 C=4096 mask sources preserving",
    "soft_weak_embedding_bwd bf16 C=128 preserving",
    "swiglu_fwd bf16 block",
    "swiglu_bwd bf16 block",
    "swiglu_bwd fp32 F=192",
)
