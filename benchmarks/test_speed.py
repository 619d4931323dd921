"""The --quick cases under pytest-benchmark, for its comparisons of runs: `pytest benchmarks --benchmark-only`. CPU."""

import functools

import pytest
import torch

import palm_kernels as pk

from .common import BOTH, FORWARD, describe_case, providers_of
from .report import STEMS, chosen
from .timing import plan_of

CASES = [(bench, case) for _, bench, case in chosen(STEMS, quick=True)]
PARAMETERS = [
    pytest.param(i, mode, p.name, id=f"{bench.op}-{describe_case(case).replace(' ', '-')}-{mode}-{p.name}")
    for i, (bench, case) in enumerate(CASES)
    for mode in (FORWARD, BOTH)
    for p in providers_of(bench, "cpu")
]


@functools.lru_cache(maxsize=1)
def ready(index: int):
    """(providers by name, plan) of one case."""
    torch.compiler.reset()
    torch.manual_seed(0)
    bench, case = CASES[index]
    providers = providers_of(bench, "cpu")
    return {p.name: p for p in providers}, plan_of(bench, case, providers)


@pytest.mark.parametrize(("index", "mode", "name"), PARAMETERS)
def test_speed(benchmark, index, mode, name):
    providers, plan = ready(index)
    verdict = plan.verdicts[name]
    if mode not in plan.modes or verdict["status"] == "absent":
        pytest.skip(verdict["reason"] or f"there is no {mode}")
    if verdict["status"] != "ok":
        pytest.fail(f"{verdict['status']}: {verdict['reason']}")
    bench, case = CASES[index]
    benchmark.group = f"{bench.op} {describe_case(case)} {mode}"
    call = plan.modes[mode][0]()[name]
    with pk.backend(providers[name].backend):
        call()
        benchmark(call)
