"""The one comparison that every op test makes: outputs and all gradients against reference.py, within one error budget."""

import numpy as np
import pytest
import torch
from torch import Tensor

import palm_kernels as pk
from palm_kernels import dispatch, reference

INTERPRETED = dispatch.simulated("triton") or dispatch.simulated("cuda")  # GPU kernels, on CPU tensors
ON_CPU_KERNELS = torch.get_default_device().type == "cpu" and not INTERPRETED
DTYPES = list(dispatch.dtypes("cpu" if ON_CPU_KERNELS else "triton"))  # float64 on the CPU alone
needs_float64 = pytest.mark.skipif(
    not ON_CPU_KERNELS, reason="gradcheck needs float64, which the CPU kernels alone serve"
)
BUDGET = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def name_of(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def randn(*shape, dtype=torch.float32, grad=True, seed=None, scale=1.0) -> Tensor:
    """A normal leaf tensor; pass seed=None inside one test and the global generator gives each its own values."""
    g = None if seed is None else torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu") * scale
    return x.to(dtype).to(torch.get_default_device()).requires_grad_(grad)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def run(function, args, kwargs, douts=None, to=None):
    """(outputs, gradients of every floating leaf that wants one): leaves keep their strides, `to` casts all floats."""

    def leaf(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        y = x.detach() if to is None else x.detach().to(to)
        return y.requires_grad_(x.requires_grad)

    args = [leaf(a) for a in args]
    kwargs = {k: leaf(v) for k, v in kwargs.items()}
    outs = _tuple(function(*args, **kwargs))
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    pairs = [(o, d.to(o.dtype)) for o, d in zip(outs, douts or make_douts(outs), strict=True) if o.requires_grad]
    if not leaves or not pairs:
        return outs, ()
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    return outs, tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def make_douts(outs):
    g = torch.Generator().manual_seed(7)
    return [
        torch.randn(o.shape, generator=g, dtype=torch.float64, device="cpu").to(o.dtype).to(o.device)
        for o in _tuple(outs)
    ]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(ours: Tensor, yardstick: Tensor, truth: Tensor, dtype, dout_rms=1.0, what=""):
    """rms(ours - truth) <= 2 rms(yardstick - truth) + c max(rms(truth), 0.1 rms(dout)); non-finite values must be the same ones."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    ours, yardstick, truth = (
        ours.detach().double().cpu(),
        yardstick.detach().double().cpu(),
        truth.detach().double().cpu(),
    )
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(7e77), truth[~finite].nan_to_num(7e77)), (
        f"{what}: other non-finite values"
    )
    assert ours[finite].isfinite().all(), f"{what}: {int((~ours[finite].isfinite()).sum())} values are not finite"
    error = rms(ours[finite] - truth[finite])
    yard = yardstick[finite].nan_to_num(0.0, 0.0, 0.0)
    budget = 2 * rms(yard - truth[finite]) + BUDGET[dtype] * max(rms(truth[finite]), 0.1 * dout_rms)
    assert error <= budget, f"{what}: rms error {error:.3e} over budget {budget:.3e}"


def check_op(name: str, *args, function=None, **kwargs):
    """Run pk.<name> (or `function`) and reference.<name> on the same leaves; compare every output and every gradient."""
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    spec = getattr(reference, name)
    wanted = run(spec, args, kwargs, to=torch.float64)[0]
    ours_outs = run(function or getattr(pk, name), args, kwargs, make_douts(wanted))[0]
    for ours, truth in zip(ours_outs, wanted, strict=True):
        assert ours.shape == truth.shape and ours.device == next(a.device for a in args if isinstance(a, Tensor))
    douts = [d.to(o.dtype) for d, o in zip(make_douts(wanted), ours_outs, strict=True)]
    truth = run(spec, args, kwargs, douts, to=torch.float64)
    yardstick = run(spec, args, kwargs, douts)
    ours = run(function or getattr(pk, name), args, kwargs, douts)
    dout_rms = max((rms(d) for d in douts), default=1.0)
    for kind, a, b, c in zip(("output", "gradient"), ours, yardstick, truth, strict=True):
        for i, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            if kind == "output":
                assert x.dtype == y.dtype, f"{name}: output {i} is {x.dtype}, the reference's {y.dtype}"
            assert_close(x, y, z, dtype, dout_rms, f"{name} {kind} {i}")
    return ours


def gradcheck(name: str, *args, **kwargs):
    """torch.autograd.gradcheck of the real kernels: float64 leaves, no tolerance for non-determinism."""
    names = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.requires_grad]
    rest = {k: v for k, v in kwargs.items() if k not in names}

    def call(*tensors):
        return getattr(pk, name)(*tensors[: len(args)], **dict(zip(names, tensors[len(args) :], strict=True)), **rest)

    assert torch.autograd.gradcheck(call, (*args, *(kwargs[k] for k in names)), nondet_tol=0.0)


def wide(x: Tensor, pad: int = 5, offset: int = 1) -> Tensor:
    """The same values as a slice of a wider buffer (NaN around it): other strides, a misaligned start."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + pad), float("nan") if x.is_floating_point() else 10**6)
    view = buffer[..., offset : offset + x.shape[-1]]
    with torch.no_grad():
        view.copy_(x)
    return view.detach().requires_grad_(x.requires_grad)


def far_rows(rows: int, cols: int) -> Tensor:
    """Random bfloat16 rows 2^31 + 8 elements apart, in memory that is reserved but (on the CPU) hardly touched."""
    step = 2**31 + 8
    size = (rows - 1) * step + cols
    if torch.get_default_device().type == "cpu":
        storage = torch.from_numpy(np.zeros(size, dtype="uint16")).view(torch.bfloat16)
    else:
        storage = torch.empty(size, dtype=torch.bfloat16)
    return storage.as_strided((rows, cols), (step, 1)).copy_(torch.randn(rows, cols))


def permuted(x: Tensor) -> Tensor:
    """The same values with the leading dimensions stored in another order."""
    if x.dim() < 3:
        return x
    order = [*range(x.dim() - 2, -1, -1), x.dim() - 1]
    return x.detach().permute(order).contiguous().permute(order).requires_grad_(x.requires_grad)


def assert_bitwise_repeatable(name: str, *args, **kwargs):
    """Same inputs, same bits: three runs, and any thread count."""
    first = run(getattr(pk, name), args, kwargs)
    before = torch.get_num_threads()
    try:
        for threads in (before, 1, 2, 3):
            torch.set_num_threads(threads)
            again = run(getattr(pk, name), args, kwargs)
            for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{name} differs with {threads} threads"
    finally:
        torch.set_num_threads(before)


def assert_refuses_double_backward(name: str, *args, **kwargs):
    outs = _tuple(getattr(pk, name)(*args, **kwargs))
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    try:
        torch.autograd.grad(sum(o.sum() for o in outs if o.requires_grad), leaves, create_graph=True)
    except NotImplementedError as error:
        assert name in str(error)
    else:
        raise AssertionError(f"{name}: double backward was not refused")


def opcheck(op, *args):
    """All of torch.library.opcheck on a raw op (inputs do not require grad: raw ops give no gradient)."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(op, tuple(args))


def assert_compiles(name: str, *variants, **kwargs):
    """torch.compile(fullgraph, dynamic shapes) of forward and backward gives eager's results on each variant of the arguments."""
    function = getattr(pk, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a, **k: function(*a, **k), fullgraph=True, dynamic=True, backend="aot_eager")
    for args in variants:
        eager, traced = run(function, args, kwargs), run(compiled, args, kwargs)
        for a, b in zip((*eager[0], *eager[1]), (*traced[0], *traced[1]), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, equal_nan=True)
