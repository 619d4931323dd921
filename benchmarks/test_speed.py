"""The --quick cases under pytest-benchmark, for its comparisons of runs: `make bench`. CPU."""

import functools

import pytest
import torch

import palm_kernels as pk

from .common import BOTH, FORWARD, Plan, Provider, describe_case, providers_of
from .report import STEMS, chosen
from .timing import plan_of

CASES = [(bench, case) for _, bench, case in chosen(STEMS, quick=True)]
PARAMETERS = [
    pytest.param(i, p, mode, id=f"{bench.op}-{describe_case(case).replace(' ', '-')}-{mode}-{p.name}")
    for i, (bench, case) in enumerate(CASES)
    for p in providers_of(bench, "cpu")
    for mode in (FORWARD, BOTH)
]


@functools.lru_cache(maxsize=1)
def ready(index: int, provider: Provider) -> Plan:
    """One case for one provider, so that nobody waits for the gate of those that were not asked for."""
    torch.compiler.reset()
    torch.manual_seed(0)
    return plan_of(*CASES[index], [provider])


@pytest.mark.parametrize(("index", "provider", "mode"), PARAMETERS)
def test_speed(benchmark, index, provider, mode):
    plan, (bench, case) = ready(index, provider), CASES[index]
    verdict = plan.verdicts[provider.name]
    if mode not in plan.modes or verdict["status"] == "absent":
        pytest.skip(verdict["reason"] or f"there is no {mode}")
    if verdict["status"] != "ok":
        pytest.fail(f"{verdict['status']}: {verdict['reason']}")
    benchmark.group = f"{bench.op} {describe_case(case)} {mode}"
    call = plan.modes[mode][0]()[provider.name]
    with pk.backend(provider.backend):
        call()
        benchmark(call)
