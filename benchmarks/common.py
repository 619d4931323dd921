"""The one benchmark frame: correctness first, then all providers of a case interleaved call by call in one process.

A `bench_<stem>.py` holds `BENCHES`; report.py and test_speed.py run them. Fresh outputs and their page faults are part of
every provider's time, inputs are not.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import palm_kernels as pk
from palm_kernels import dispatch, reference

from .machine import cpu_clock, gpu_clock, peak_memory

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the error budget is the tests': there is one
from helpers import assert_close, check_op, make_douts, rms, run  # noqa: F401  check_op for tune.py

OURS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}  # our backends on a device, each a provider of its own
FORWARD, BOTH = "forward", "forward+backward"


class Work(NamedTuple):
    """What a call cannot do without: floating-point operations, and bytes read and written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Bench:
    """One op. make(**case) gives (args, kwargs, {mode: Work}): every provider takes args and kwargs as palm_kernels.<op> does."""

    op: str
    cases: Sequence[dict]  # each has a dtype; the first `quick` make up --quick
    make: Callable[..., tuple]  # the modes of its Works are the ones that are timed
    peers: dict[str, Callable]
    floors: dict[str, Callable] = field(default_factory=dict)  # not the op but a part that bounds it: timed, not gated
    quick: int = 1
    gate: dict = field(default_factory=dict)  # shape overrides for the gate, where float64 would not fit
    cold: bool = False  # every call gets inputs that no cache holds
    bandwidth: str = "copy"  # the peak that bytes are held against: "copy" or "read"
    variant: str = ""  # tells benches of one op apart


@dataclass(frozen=True)
class Provider:
    name: str
    kind: str  # "ours", "peer" or "floor"
    call: Callable
    backend: str = "auto"


@dataclass(frozen=True)
class Effort:
    """How long a case may take: seconds of measuring, rounds at least and at most, seconds that make a call too slow to repeat."""

    seconds: float
    least: int
    most: int
    patience: float


FULL = Effort(3.0, 3, 60, 8.0)
QUICK = Effort(0.5, 3, 20, 2.0)
GPU_FULL = Effort(1.2, 5, 100, 4.0)
GPU_QUICK = Effort(0.3, 5, 30, 2.0)


def randn(*shape: int, dtype=torch.float32, scale=1.0, grad=True) -> Tensor:
    """A normal tensor on the default device, by default a leaf that wants a gradient."""
    return (torch.randn(shape, dtype=dtype) * scale).requires_grad_(grad)


def memory_work(size: float, forward: float, both: float) -> dict[str, Work]:
    """Work of an op bound by memory: how often it moves `size` bytes."""
    return {FORWARD: Work(0, forward * size), BOTH: Work(0, both * size)}


def attention_work(pairs: float, size: float, D: int, dtype: torch.dtype) -> dict[str, Work]:
    """Work for `pairs` of a query and a visible key, and `size` elements in q and k together.

    Backward has five products for forward's two, and moves q, k, v, out, dout, dq, dk, dv.
    """
    flops, moved = 4 * pairs * D, 2 * size * dtype.itemsize
    return {FORWARD: Work(flops, moved), BOTH: Work(3.5 * flops, 3 * moved)}


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
        else:
            words.append(str(value).removeprefix("torch.") if name == "dtype" else f"{name}{value}".replace(" ", ""))
    return " ".join(words)


def providers_of(bench: Bench, device: str) -> list[Provider]:
    """Ours (one a backend; the reference where it is forced), the peers, the floors."""
    forced = os.environ.get("PALM_KERNELS_BACKEND", "auto")
    backends = OURS[device] if forced == "auto" else (forced,)
    backends = [
        b for b in backends if b == backends[0] or b not in dispatch._load_errors
    ]  # a library that is not built is no gap

    def ours(*args, **kwargs):
        if not hasattr(pk, bench.op):
            raise NotImplementedError(f"palm_kernels has no {bench.op}")
        return getattr(pk, bench.op)(*args, **kwargs)

    return [
        *(Provider(f"palm {b}", "ours", ours, b) for b in backends),
        *(Provider(name, "peer", call) for name, call in bench.peers.items()),
        *(Provider(name, "floor", call) for name, call in bench.floors.items()),
    ]


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _sampled(*tensors: Tensor, most: int = 2**20) -> list[Tensor]:
    """The tensors at the same random million places: float64 comparison of every element would cost more than the run."""
    n = tensors[0].numel()
    if n <= most:
        return list(tensors)
    where = tensors[0].device
    at = torch.randint(n, (most,), generator=torch.Generator(where).manual_seed(0), device=where)
    return [t.reshape(-1)[at] for t in tensors]


def _compare(bench: Bench, provider: Provider, args, kwargs, dtype, truth, yardstick, douts) -> None:
    """AssertionError where an output, a gradient or the output without grad is over the tests' error budget."""
    dout_rms = max(rms(d) for d in douts)

    def check(kind, ours, exact, yard):
        assert len(ours) == len(exact), f"{len(ours)} {kind}s, the reference has {len(exact)}"
        for i, (x, y, z) in enumerate(zip(ours, yard, exact, strict=True)):
            assert x.shape == z.shape, f"{bench.op} {kind} {i}: shape {list(x.shape)}, expected {list(z.shape)}"
            assert_close(*_sampled(x, y, z), dtype, dout_rms, f"{bench.op} {kind} {i}")

    with pk.backend(provider.backend):
        with torch.no_grad():
            check("output without grad", _outputs(provider.call(*args, **kwargs)), truth[0], yardstick[0])
        outs, grads = run(provider.call, args, kwargs, douts)
    check("output", outs, truth[0], yardstick[0])
    check("gradient", grads, truth[1], yardstick[1])


def gate(bench: Bench, case: dict, providers: Sequence[Provider]) -> dict[str, dict[str, str]]:
    """{status, reason} by provider: "ok" may be timed; "wrong" is over the budget, "failed" raised, "absent" cannot be had here."""
    args, kwargs, _ = bench.make(**{**case, **bench.gate})
    spec = getattr(reference, bench.op)
    yardstick = run(spec, args, kwargs)
    douts = make_douts(yardstick[0])
    truth = run(spec, args, kwargs, douts, to=torch.float64)
    verdicts = {}
    for p in providers:
        verdicts[p.name] = {"status": "ok", "reason": ""}
        if p.kind == "floor":
            continue
        try:
            _compare(bench, p, args, kwargs, case["dtype"], truth, yardstick, douts)
        except AssertionError as error:
            verdicts[p.name] = {"status": "wrong", "reason": str(error)}
        except (NotImplementedError, ImportError) as error:
            verdicts[p.name] = {"status": "absent", "reason": str(error)}
        except Exception as error:
            verdicts[p.name] = {"status": "failed", "reason": brief(error)}
    return verdicts


def inputs(bench: Bench, case: dict) -> tuple[list[tuple], dict[str, Work]]:
    """The (args, kwargs) that calls take in turn, one unless cold (then half a GB of them, 64 at most), and the work by mode."""
    args, kwargs, work = bench.make(**case)
    size = sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    copies = min(64, max(2, int(5e8 // size))) if bench.cold else 1
    return [(args, kwargs), *(bench.make(**case)[:2] for _ in range(copies - 1))], work


def prepare(sets: list[tuple], providers: Sequence[Provider], mode: str) -> dict[str, Callable]:
    """A function of no arguments by provider: one forward, or forward and backward, on the next of the inputs they share."""
    turn = itertools.cycle(sets)

    def forward(provider: Provider):
        def call():
            args, kwargs = next(turn)
            with torch.no_grad():
                return provider.call(*args, **kwargs)

        return call

    def both(provider: Provider):
        douts = []

        def call():
            args, kwargs = next(turn)
            outs = [o for o in _outputs(provider.call(*args, **kwargs)) if o.requires_grad]
            if not douts:  # by the first call, which warms up
                douts.extend(torch.randn_like(o) for o in outs)
            leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
            return outs, torch.autograd.grad(outs, leaves, douts, allow_unused=True)

        return call

    return {p.name: (forward if mode == FORWARD else both)(p) for p in providers}


def clock_of(device: str) -> Callable[[Callable], float]:
    return gpu_clock() if device == "cuda" else cpu_clock


def _first_calls(calls: dict[str, Callable], providers: Sequence[Provider], device: str, clock) -> tuple[dict, dict]:
    """Seconds of each provider's first call (second where the first compiles), and why some failed: these calls warm up."""
    first, failures = {}, {}
    for p in providers:
        try:
            with pk.backend(p.backend):
                for _ in range(2 if device == "cuda" or getattr(p.call, "compiles", False) else 1):
                    first[p.name] = clock(calls[p.name])
        except Exception as error:
            failures[p.name] = {"status": "failed", "reason": brief(error)}
    return first, failures


def measure(calls: dict[str, Callable], providers: Sequence[Provider], device: str, effort: Effort) -> dict[str, dict]:
    """By provider: median, p20 and p80 in ms, the number of calls, peak memory in MiB.

    The order within a round is shuffled, so nobody always runs behind the same neighbour. A first call slower than the
    patience stands as its provider's only measurement.
    """
    clock, order = clock_of(device), random.Random(0)
    first, results = _first_calls(calls, providers, device, clock)
    times = {name: [t] if t > effort.patience else [] for name, t in first.items() if name not in results}
    repeated = [p for p in providers if times.get(p.name) == []]
    rounds = int(effort.seconds / max(1e-9, sum(first[p.name] for p in repeated)))
    for _ in range(min(max(rounds, effort.least), effort.most) if repeated else 0):
        for p in order.sample(repeated, len(repeated)):
            with pk.backend(p.backend):
                times[p.name].append(clock(calls[p.name]))
    for p in providers:
        if p.name not in times:
            continue
        ms = torch.tensor(times[p.name], device="cpu") * 1e3
        low, median, high = ms.quantile(torch.tensor([0.2, 0.5, 0.8], device="cpu")).tolist()
        with pk.backend(p.backend):
            memory = peak_memory(calls[p.name], device) if p in repeated else None
        results[p.name] = {"ms": median, "p20": low, "p80": high, "calls": len(ms), "memory_mib": memory}
    return results
