"""How providers are timed: all of a case interleaved call by call in one process.

Fresh outputs and their page faults are part of every provider's time (but for the modes that say "outputs given"), inputs are not.
"""

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import palm_kernels as pk
from palm_kernels import dispatch

from .common import GIVEN, Bench, Plan, Provider, Work, brief, describe_case, in_mode
from .gate import gate
from .machine import cpu_clock, gpu_clock, peak_memory


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


def inputs(bench: Bench, case: dict) -> tuple[list[tuple], dict[str, Work]]:
    """The (args, kwargs) that calls take in turn, one unless cold (then half a GB of them, 64 at most), and the work by mode."""
    args, kwargs, work = bench.make(**case)
    size = sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    copies = min(64, max(2, int(5e8 // size))) if bench.cold else 1
    return [(args, kwargs), *(bench.make(**case)[:2] for _ in range(copies - 1))], work


def _leaves(args, kwargs) -> list[Tensor]:
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]


def prepare(sets: list[tuple], providers: Sequence[Provider], mode: str) -> dict[str, Callable]:
    """A function of no arguments by provider: one forward, or forward and backward, on the next of the inputs they share."""
    turn = itertools.cycle(range(len(sets)))

    def shared(provider: Provider):
        calls = [in_mode(mode, functools.partial(provider.call, *a, **k), _leaves(a, k)) for a, k in sets]
        return lambda: calls[next(turn)]()

    def floor(provider: Provider):
        make = functools.cache(lambda: provider.call(mode, *sets[0][0], **sets[0][1]))
        return lambda: make()()

    return {p.name: (floor if p.kind == "floor" else shared)(p) for p in providers}


def outputs_given(call: Callable) -> Callable:
    """What call() launches, as a call that does it again with the outputs that are already there: no allocation, no Python of ours."""
    launches, select = [], dispatch.select

    def recording(*which):
        function = select(*which)

        def launch(*args):
            launches.append((function, args))
            return function(*args)

        return launch

    dispatch.select = recording
    try:
        call()
    finally:
        dispatch.select = select
    if not launches:
        raise NotImplementedError("no kernel of ours ran")

    def again():
        for function, args in launches:
            function(*args)

    return again


def _prepare_given(sets: list[tuple], providers: Sequence[Provider], mode: str) -> dict[str, Callable]:
    def given(provider: Provider):
        make = functools.cache(lambda: outputs_given(prepare(sets, [provider], mode)[provider.name]))
        return lambda: make()()

    return {p.name: given(p) for p in providers if p.kind == "ours"}


def plan_op(bench: Bench, case: dict, providers: Sequence[Provider]) -> Plan:
    """The gate, then inputs that all share."""
    verdicts = gate(bench, case, providers)
    fit = [p for p in providers if verdicts[p.name]["status"] == "ok"]
    sets, works = inputs(bench, case)
    modes = {mode: (functools.partial(prepare, sets, fit, mode), work) for mode, work in works.items()}
    if bench.given:
        for mode, work in works.items():
            modes[mode + GIVEN] = functools.partial(_prepare_given, sets, fit, mode), work
    args, kwargs = sets[0]
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    training = {p.name: (functools.partial(p.call, *args, **kwargs), tensors) for p in fit if p.kind != "floor"}
    return Plan(verdicts, modes, training, describe_case({**case, **bench.gate}))


def plan_of(bench: Bench, case: dict, providers: Sequence[Provider]) -> Plan:
    return (bench.plan or plan_op)(bench, case, providers)


def clock_of(device: str) -> Callable[[Callable], float]:
    return gpu_clock() if device == "cuda" else cpu_clock


def _first_calls(calls: dict[str, Callable], providers: Sequence[Provider], device: str, clock) -> tuple[dict, dict]:
    """By provider: (seconds, MiB) of its first call (second where the first compiles), and why some failed: these calls warm up."""
    first, failures = {}, {}
    for p in providers:
        try:
            with pk.backend(p.backend):
                for _ in range(2 if device == "cuda" or getattr(p.call, "compiles", False) else 1):
                    taken = []
                    timed = functools.partial(lambda call, taken: taken.append(clock(call)), calls[p.name], taken)
                    memory = peak_memory(timed, device, collect=False) if device == "cpu" else timed()
                    first[p.name] = taken[0], memory
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
    times = {name: [t] if t > effort.patience else [] for name, (t, _) in first.items() if name not in results}
    repeated = [p for p in providers if times.get(p.name) == []]
    rounds = int(effort.seconds / max(1e-9, sum(first[p.name][0] for p in repeated)))
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
            memory = peak_memory(calls[p.name], device) if p in repeated else first[p.name][1]
        results[p.name] = {"ms": median, "p20": low, "p80": high, "calls": len(ms), "memory_mib": memory}
    return results


def measure_threads(call: Callable, ours: Provider, effort: Effort) -> dict:
    """{"threads": {count: median ms}, "scaling": gain} of one of our calls on one thread and on all of them, turn by turn."""
    most = torch.get_num_threads()

    def on(threads: int):
        def run():
            torch.set_num_threads(threads)
            return call()

        return run

    counts = {str(n): n for n in (1, most)}
    try:
        found = measure(
            {name: on(n) for name, n in counts.items()},
            [Provider(name, "ours", ours.call, ours.backend) for name in counts],
            "cpu",
            effort,
        )
    finally:
        torch.set_num_threads(most)
    ms = {name: r["ms"] for name, r in found.items() if "ms" in r}
    return {"threads": ms, "scaling": ms["1"] / ms[str(most)]} if len(ms) == 2 else {}
