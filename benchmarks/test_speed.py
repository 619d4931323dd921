"""The --quick cases under pytest-benchmark, for its comparisons of runs: `pytest benchmarks --benchmark-only`. CPU."""

import functools

import pytest
import torch

import palm_kernels as pk

from .common import BOTH, FORWARD, describe_case, gate, inputs, prepare, providers_of
from .report import STEMS, chosen

CASES = [(bench, case) for _, bench, case in chosen(STEMS, quick=True)]
PARAMETERS = [
    pytest.param(i, mode, p.name, id=f"{bench.op}-{describe_case(case).replace(' ', '-')}-{mode}-{p.name}")
    for i, (bench, case) in enumerate(CASES)
    for mode in (FORWARD, BOTH)
    for p in providers_of(bench, "cpu")
]


@functools.lru_cache(maxsize=1)
def ready(index: int):
    """(providers, the gate's verdicts, inputs, work) of one case."""
    torch.compiler.reset()
    torch.manual_seed(0)
    bench, case = CASES[index]
    providers = {p.name: p for p in providers_of(bench, "cpu")}
    return providers, gate(bench, case, list(providers.values())), *inputs(bench, case)


@pytest.mark.parametrize(("index", "mode", "name"), PARAMETERS)
def test_speed(benchmark, index, mode, name):
    providers, verdicts, sets, works = ready(index)
    if mode not in works or verdicts[name]["status"] == "absent":
        pytest.skip(verdicts[name]["reason"] or f"there is no {mode}")
    if verdicts[name]["status"] != "ok":
        pytest.fail(f"{verdicts[name]['status']}: {verdicts[name]['reason']}")
    bench, case = CASES[index]
    benchmark.group = f"{bench.op} {describe_case(case)} {mode}"
    provider = providers[name]
    call = prepare(sets, [provider], mode)[name]
    with pk.backend(provider.backend):
        call()
        benchmark(call)
