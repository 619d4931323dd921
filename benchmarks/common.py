"""The frame of the benchmarks: what a bench, a provider and a case's plan are, and what bench files are written with.

A `bench_<stem>.py` holds `BENCHES`; report.py and test_speed.py run them through gate.py and timing.py.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import palm_kernels as pk
from palm_kernels import dispatch

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the error budget is the tests': there is one

OURS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # our backends on a device, each a provider of its own
FORWARD, BOTH = "forward", "forward+backward"
EAGER = (
    "eager",
    "SDPA",
    "SDPA padded",
    "PaLM-pytorch",
    "Cohere",
)  # the peers that are plain torch, as most people write it
GIVEN = ", outputs given"  # behind a mode: our kernels alone, on outputs that are already there


class Work(NamedTuple):
    """What a call cannot do without: floating-point operations, and bytes read and written once. tokens: what it serves, if told."""

    flops: float
    bytes: float
    tokens: int = 0


class Plan(NamedTuple):
    """A case made ready. modes: {mode: (prepare, work)}, where prepare() gives a call of no arguments by provider.

    training: by provider, a forward of no arguments under grad, and its inputs, for which no graph is charged.
    """

    verdicts: dict[str, dict[str, str]]
    modes: dict[str, tuple[Callable[[], dict[str, Callable]], Work]]
    training: dict[str, tuple[Callable, list[Tensor]]]
    gated_at: str


@dataclass(frozen=True)
class Bench:
    """One op. make(**case) gives (args, kwargs, {mode: Work}): every provider takes args and kwargs as palm_kernels.<op> does."""

    op: str
    cases: Sequence[dict]  # each has a dtype; the first `quick` make up --quick
    make: Callable[..., tuple] | None  # the modes of its Works are the ones that are timed
    peers: dict[str, Callable]
    floors: dict[str, Callable] = field(default_factory=dict)  # parts that bound the op: see Provider
    quick: int = 1
    gate: dict = field(default_factory=dict)  # shape overrides for the gate, where float64 would not fit
    cold: bool = False  # every call gets inputs that no cache holds
    given: bool = False  # time our kernels on outputs that are already there, too
    bandwidth: str = "copy"  # the peak that bytes are held against: "copy" or "read"
    variant: str = ""  # tells benches of one op apart
    grows: str = ""  # the letter of the case that doubles from one to the next: the report shows what a doubling costs
    ours: Callable | None = None  # instead of palm_kernels.<op>
    plan: Callable[..., Plan] | None = None  # plan(bench, case, providers) instead of timing.plan_op


@dataclass(frozen=True)
class Provider:
    """kind "ours" and "peer": call has the op's signature. "floor": call(mode, *args, **kwargs) makes the call that is timed."""

    name: str
    kind: str
    call: Callable
    backend: str = "auto"


def randn(*shape: int, dtype=torch.float32, scale=1.0, grad=True) -> Tensor:
    """A normal tensor on the default device, by default a leaf that wants a gradient."""
    return (torch.randn(shape, dtype=dtype) * scale).requires_grad_(grad)


def memory_work(size: float, moves: tuple[float, float], flops: tuple[float, float]) -> dict[str, Work]:
    """Work, forward and both, of an op bound by memory: how often it moves `size` bytes, and its flops (exp counts as one)."""
    return {mode: Work(f, m * size) for mode, m, f in zip((FORWARD, BOTH), moves, flops, strict=True)}


def attention_work(pairs: float, size: float, D: int, dtype: torch.dtype) -> dict[str, Work]:
    """Work for `pairs` of a query and a visible key, and `size` elements in q and k together.

    Backward has five products for forward's two, and moves q, k, v, out, dout, dq, dk, dv.
    """
    flops, moved = 4 * pairs * D, 2 * size * dtype.itemsize
    return {FORWARD: Work(flops, moved), BOTH: Work(3.5 * flops, 3 * moved)}


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def in_mode(mode: str, forward: Callable, leaves: Sequence[Tensor]) -> Callable:
    """A call of no arguments: forward() without grad, or forward() and the gradients of all leaves."""
    douts = []

    def both():
        outs = [o for o in outputs_of(forward()) if o.requires_grad]
        if not douts:  # by the first call, which warms up
            douts.extend(torch.randn_like(o) for o in outs)
        return outs, torch.autograd.grad(outs, leaves, douts, allow_unused=True)

    return both if mode == BOTH else torch.no_grad()(forward)


def products(*triples: tuple[Tensor, Tensor, Tensor]) -> Callable:
    """A floor's call: a @ b into c for every (a, b, c)."""

    def call():
        with torch.no_grad():
            for a, b, c in triples:
                torch.mm(a, b, out=c)

    return call


def compiled(function: Callable) -> Callable:
    """function under torch.compile, as one graph of static shapes."""
    graph = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*args, **kwargs):
        return graph(*args, **kwargs)

    call.compiles = True  # its first call is not a measurement, however long
    return call


def eager_and_compiled(function: Callable) -> dict[str, Callable]:
    return {"eager": function, "torch.compile": compiled(function)}


def cases(names: str, *shapes: tuple, dtypes=(torch.float32, torch.bfloat16)) -> list[dict]:
    """A case for every shape and dtype: cases("N F", (2048, 8192)) gives two."""
    return [{**dict(zip(names.split(), s, strict=True)), "dtype": d} for s in shapes for d in dtypes]


def describe_case(case: dict) -> str:
    """{"B": 1, "causal": True, "dtype": torch.float32} in one line: B1 causal float32."""
    words = []
    for name, value in case.items():
        if isinstance(value, bool):
            words += [name] if value else []
        elif isinstance(value, str | torch.dtype):
            words.append(str(value).removeprefix("torch."))
        else:
            words.append(f"{name}{value}".replace(" ", ""))
    return " ".join(words)


def providers_of(bench: Bench, device: str) -> list[Provider]:
    """Ours (one a backend; the reference where it is forced), the peers, the floors."""
    forced = os.environ.get("PALM_KERNELS_BACKEND", "auto")
    backends = OURS[device] if forced == "auto" else (forced,)
    backends = [
        b for b in backends if b == backends[0] or b not in dispatch._load_errors
    ]  # a library that is not built is no gap

    def op(*args, **kwargs):
        if not hasattr(pk, bench.op):
            raise NotImplementedError(f"palm_kernels has no {bench.op}")
        return getattr(pk, bench.op)(*args, **kwargs)

    return [
        *(Provider(f"palm {b}", "ours", bench.ours or op, b) for b in backends),
        *(Provider(name, "peer", call) for name, call in bench.peers.items()),
        *(Provider(name, "floor", call) for name, call in bench.floors.items()),
    ]


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
