"""Correctness first: nobody is timed who does not reproduce reference.py in float64 within the tests' error budget."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import palm_kernels as pk
from palm_kernels import reference

from .common import Bench, Provider, brief, outputs_of  # first: it puts tests/ on the path

# isort: split
from helpers import assert_close, check_op, make_douts, rms, run  # noqa: F401  check_op for tune.py


def _sampled(*tensors: Tensor, most: int = 2**20) -> list[Tensor]:
    """The tensors at the same random million places: float64 comparison of every element would cost more than the run."""
    n = tensors[0].numel()
    if n <= most:
        return list(tensors)
    where = tensors[0].device
    at = torch.randint(n, (most,), generator=torch.Generator(where).manual_seed(0), device=where)
    return [t.reshape(-1)[at] for t in tensors]


def compare(kind: str, ours, yardstick, truth, dtype: torch.dtype, dout_rms: float) -> None:
    """AssertionError where one of several tensors is over the tests' error budget."""
    assert len(ours) == len(truth), f"{len(ours)} {kind}s, the reference has {len(truth)}"
    for i, (x, y, z) in enumerate(zip(ours, yardstick, truth, strict=True)):
        assert x.shape == z.shape, f"{kind} {i}: shape {list(x.shape)}, expected {list(z.shape)}"
        assert_close(*_sampled(x, y, z), dtype, dout_rms, f"{kind} {i}")


def verdict(check: Callable) -> dict[str, str]:
    """{status, reason}: "ok" may be timed; "wrong" is over the budget, "failed" raised, "absent" cannot be had here."""
    try:
        check()
    except AssertionError as error:
        return {"status": "wrong", "reason": str(error)}
    except (NotImplementedError, ImportError) as error:
        return {"status": "absent", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": brief(error)}
    return {"status": "ok", "reason": ""}


def gate(bench: Bench, case: dict, providers: Sequence[Provider]) -> dict[str, dict[str, str]]:
    """The verdict on every provider's outputs and gradients, and on its outputs without grad; a floor has nothing to reproduce."""
    args, kwargs, _ = bench.make(**{**case, **bench.gate})
    spec = getattr(reference, bench.op)
    yardstick = run(spec, args, kwargs)
    douts = make_douts(yardstick[0])
    truth = run(spec, args, kwargs, douts, to=torch.float64)
    dout_rms = max(rms(d) for d in douts)

    def check(provider: Provider):
        def against(kind, found, which):
            compare(f"{bench.op} {kind}", found, yardstick[which], truth[which], case["dtype"], dout_rms)

        with pk.backend(provider.backend):
            with torch.no_grad():
                against("output without grad", outputs_of(provider.call(*args, **kwargs)), 0)
            outs, grads = run(provider.call, args, kwargs, douts)
        against("output", outs, 0)
        against("gradient", grads, 1)

    return {p.name: verdict(lambda p=p: p.kind == "floor" or check(p)) for p in providers}
