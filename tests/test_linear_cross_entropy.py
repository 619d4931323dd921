"""linear_cross_entropy: chunks of GEMMs and kernels against reference.py and torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    INTERPRETED,
    assert_compiles,
    assert_refuses_double_backward,
    check_op,
    gradcheck,
    name_of,
    opcheck,
    permuted,
    randn,
    run,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st
from test_cross_entropy import EVERYTHING, targets, weights

import palm_kernels as pk
from palm_kernels.ops import cross_entropy as module

# leading shape, C, V
SHAPES = [((0,), 4, 8), ((2, 0), 4, 5), ((3,), 0, 4), ((5,), 3, 1), ((), 8, 7), ((1,), 8, 33), ((2, 3, 5), 16, 70)]
REDUCTIONS = ["none", "mean", "sum"]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows, so that a few rows already make several, the last one shorter."""
    monkeypatch.setattr(module, "CHUNKS", {"cpu": (1, 4), "cuda": (1, 4)})


@pytest.fixture(params=["by data", "by shape"])
def rows(request, monkeypatch):
    """Both ways to find the rows that count, whatever the device: with a look at the data, and without (CUDA)."""
    choose = module._rows_by_data if request.param == "by data" else module._rows_by_shape
    monkeypatch.setattr(module, "_which_rows", choose)
    return request.param


def operands(shape, C, V, dtype=torch.float32, bias=True):
    """hidden, linear_weight, linear_bias or None; logits of order 1."""
    hidden, weight = randn(*shape, C, dtype=dtype), randn(V, C, dtype=dtype, scale=max(1, C) ** -0.5)
    return hidden, weight, randn(V, dtype=dtype) if bias else None


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_reference(shape, dtype):
    lead, C, V = shape
    hidden, weight, bias = operands(lead, C, V, dtype)
    y = targets(lead, V)
    check_op("linear_cross_entropy", hidden, weight, y)
    for reduction in REDUCTIONS:
        options = {**EVERYTHING, **weights(y, V, dtype)}
        check_op("linear_cross_entropy", hidden, weight, y, linear_bias=bias, reduction=reduction, **options)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [False, True])
def test_several_chunks(dtype, reduction, ignored, small_chunks):
    hidden, weight, bias = operands((3, 7), 16, 70, dtype)
    y = targets((3, 7), 70) if ignored else torch.randint(70, (3, 7))
    check_op("linear_cross_entropy", hidden, weight, y, linear_bias=bias, reduction=reduction, **weights(y, 70, dtype))


def test_chunk_sizes():
    """Tens (CUDA: hundreds) of MB of logits, never fewer than 384 (2048) rows where there are as many, nearly equal chunks."""
    assert module._chunk_rows(8192, 256_000, 4) == 373
    assert module._chunk_rows(8192, 32_000, 4) == 373
    assert module._chunk_rows(300, 32_000, 4) == 300
    assert module._chunk_rows(5000, 9, 4) == 5000
    assert module._chunk_rows(0, 9, 4) == 0
    assert module._chunk_rows(16384, 128_000, 2, "cuda") == 2048
    assert module._chunk_rows(16384, 32_000, 2, "cuda") == 8192


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype, small_chunks):
    hidden, weight, bias = operands((4, 6), 10, 12, dtype)
    y = targets((4, 6), 12)
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "token_weight": wide(torch.rand(4, 6)), "weight": torch.rand(24)[::2]}
        check_op("linear_cross_entropy", wide(hidden), wide(weight), wide(y), linear_bias=wide(bias), **options)
        check_op("linear_cross_entropy", permuted(hidden), wide(weight), y, **options)
    check_op("linear_cross_entropy", hidden.detach()[:, :-1].requires_grad_(), weight, y[:, 1:])
    check_op("linear_cross_entropy", hidden.detach()[:, :1].expand(4, 6, 10).requires_grad_(), weight, y)
    check_op("linear_cross_entropy", hidden, weight.detach().t().contiguous().t().requires_grad_(), y)
    check_op("linear_cross_entropy", hidden.detach().transpose(0, 1).requires_grad_(), weight, y.t())


@pytest.mark.kernel
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=3),
    C=st.integers(1, 20),
    V=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([wide, permuted, lambda x: x]),
    reduction=st.sampled_from(REDUCTIONS),
    ignore_index=st.sampled_from([-100, 0]),
    bias=st.booleans(),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    logit_scale=st.sampled_from([1.0, 0.3]),
)
def test_any_shape_and_option(shape, C, V, dtype, layout, ignore_index, bias, weighted, **options):
    hidden, weight, linear_bias = operands(shape, C, V, dtype, bias)
    y = targets(shape, V, ignore_index)
    options |= weights(y, V, dtype) if weighted else {}
    options |= {"linear_bias": linear_bias, "ignore_index": ignore_index, "return_z_loss": True}
    check_op("linear_cross_entropy", layout(hidden), layout(weight), y, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, small_chunks):
    hidden, weight, bias = operands((6,), 3, 5, torch.float64)
    y = targets((6,), 5)
    options = {k: v for k, v in EVERYTHING.items() if k != "return_z_loss"}
    gradcheck("linear_cross_entropy", hidden, weight, y, reduction=reduction)
    options |= weights(y, 5, torch.float64)
    gradcheck("linear_cross_entropy", hidden, weight, y, linear_bias=bias, reduction=reduction, **options)


@pytest.mark.kernel
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_of_some_inputs(wanted, reduction, small_chunks):
    leaves = [x.detach().requires_grad_(bool(w)) for x, w in zip(operands((9,), 8, 11), wanted, strict=True)]
    hidden, weight, bias = leaves
    check_op("linear_cross_entropy", hidden, weight, targets((9,), 11), linear_bias=bias, reduction=reduction)


@pytest.mark.kernel
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_costs_one_gemm(reduction, monkeypatch):
    """Nothing but the losses where no input wants a gradient, or grad is off; for "none" gradients are left to backward."""
    calls = []
    real = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *args: calls.append([g is not None for g in args[-1]]) or real(*args))
    hidden, weight, _ = operands((9,), 8, 11)
    y = targets((9,), 11)
    pk.linear_cross_entropy(hidden.detach(), weight.detach(), y, reduction=reduction)
    with torch.no_grad():
        pk.linear_cross_entropy(hidden, weight, y, reduction=reduction)
    assert calls == [[False] * 3] * 2
    pk.linear_cross_entropy(hidden, weight.detach(), y, reduction=reduction).sum().backward()
    assert calls[2:] == ([[False] * 3, [True, False, False]] if reduction == "none" else [[True, False, False]])


def test_sixteen_bit_products_into_float32():
    """CUDA's GEMM that adds 16-bit products to a float32 dweight is called as torch wants it (meta tensors: no numbers)."""
    total = torch.empty(4, 5, device="meta")
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((4, 3), (3, 5)))
    for first in (True, False):
        module._add_product(total, a, b, first, None)


@pytest.mark.kernel
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward(reduction, small_chunks):
    """The first backward hands its buffers over; another one computes the gradients again, to the same bits."""
    hidden, weight, bias = leaves = operands((9,), 8, 11, torch.bfloat16)
    y = targets((9,), 11)
    out = pk.linear_cross_entropy(hidden, weight, y, linear_bias=bias, reduction=reduction)
    node = out.grad_fn
    out = out.sum() if reduction == "none" else out
    kept = node.grads
    first = torch.autograd.grad(out, leaves, torch.tensor(3.0), retain_graph=True)
    assert node.grads is None and (reduction == "none" or first[0].data_ptr() == kept[0].data_ptr())
    for _ in range(2):
        again = torch.autograd.grad(out, leaves, torch.tensor(3.0), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_repeatable(dtype, small_chunks):
    hidden, weight, bias = operands((33,), 24, 50, dtype)
    y = targets((33,), 50)
    runs = [run(pk.linear_cross_entropy, (hidden, weight, y), {"linear_bias": bias}) for _ in range(4)]
    for outs, grads in runs[1:]:
        pairs = zip((*outs, *grads), (*runs[0][0], *runs[0][1]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.kernel
def test_small_gradients_of_float16():
    """dhidden is made before the mean divides it and dweight waits in float32: neither underflows ahead of a loss scale."""
    hidden, weight, _ = operands((2048,), 8, 16, torch.float16)
    y = torch.randint(16, (2048,))
    scale = torch.tensor(2.0**14)
    ours = torch.autograd.grad(pk.linear_cross_entropy(hidden, weight, y), (hidden, weight), scale)
    wide_leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*wide_leaves), y), wide_leaves, scale.double())
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).square().mean().sqrt() < 1e-3 * b.square().mean().sqrt()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 or later")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}], ids=name_of)
def test_matches_torch(reduction, options, small_chunks):
    hidden, weight, bias = operands((30,), 8, 17, torch.float64)
    y = targets((30,), 17, options.get("ignore_index", -100))
    kwargs = {**options, "linear_bias": bias, "weight": torch.rand(17, dtype=torch.float64), "reduction": reduction}
    ours, theirs = (run(f, (hidden, weight, y), kwargs) for f in (pk.linear_cross_entropy, F.linear_cross_entropy))
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows_are_never_read(dtype, reduction, small_chunks, rows):
    hidden, weight, _ = operands((3, 7), 8, 19, dtype)
    y = targets((3, 7), 19)
    hidden = hidden.detach().masked_fill((y == -100)[..., None], torch.nan).requires_grad_()
    token_weight = torch.rand(3, 7).masked_fill(y == -100, torch.nan)
    (loss,), (dhidden, dweight) = check_op(
        "linear_cross_entropy", hidden, weight, y, reduction=reduction, token_weight=token_weight
    )
    assert loss.isfinite().all() and dweight.isfinite().all() and (dhidden[y == -100] == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(reduction, rows):
    leaves = [torch.full(s, torch.nan, requires_grad=True) for s in ((3, 5), (7, 5), (7,))]
    y = torch.full((3,), -100)
    loss = pk.linear_cross_entropy(leaves[0], leaves[1], y, linear_bias=leaves[2], reduction=reduction)
    assert loss.requires_grad and (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("max_kept", [14, 17, 99])
def test_max_kept(max_kept, dtype, small_chunks, rows):
    """Any bound from the number of kept rows on gives the same; NaN in ignored rows, which may fill the places left, goes nowhere."""
    hidden, weight, bias = operands((3, 7), 16, 33, dtype)
    y = targets((3, 7), 33)  # 14 kept
    hidden = hidden.detach().masked_fill((y == -100)[..., None], torch.nan).requires_grad_()
    for reduction in ("none", "mean"):
        options = {"linear_bias": bias, "reduction": reduction, "return_z_loss": True, **weights(y, 33, dtype)}
        check_op("linear_cross_entropy", hidden, weight, y, max_kept=max_kept, z_loss=0.01, **options)


@pytest.mark.kernel
@pytest.mark.parametrize("max_kept", [0, 3])
def test_max_kept_of_nothing(max_kept, rows):
    leaves = [torch.full(s, torch.nan, requires_grad=True) for s in ((9, 5), (7, 5))]
    loss = pk.linear_cross_entropy(*leaves, torch.full((9,), -100), max_kept=max_kept)
    assert loss.requires_grad and loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, leaves))


def test_max_kept_errors(rows):
    """Too many rows: a ValueError on the CPU, an assertion on the device where the host does not look (here torch raises at once)."""
    hidden, weight, _ = operands((9,), 8, 11)
    y = targets((9,), 11)  # 6 kept
    error, message = {
        "by data": (ValueError, "linear_cross_entropy: 6 rows are kept, max_kept is 5"),
        "by shape": (RuntimeError, "linear_cross_entropy: more rows are kept than max_kept = 5"),
    }[rows]
    with pytest.raises(error, match=message):
        pk.linear_cross_entropy(hidden, weight, y, max_kept=5)
    with pytest.raises(ValueError, match="max_kept is -1, need 0 or more"):
        pk.linear_cross_entropy(hidden, weight, y, max_kept=-1)


@pytest.mark.kernel
@pytest.mark.parametrize("max_kept", [None, 6])
def test_rows_by_shape_need_no_data(max_kept):
    """Which rows are kept changes no shape: the same call may be captured in a CUDA graph."""
    for y in (targets((9,), 11), torch.full((9,), -100), torch.randint(11, (9,)).index_fill(0, torch.arange(3), -100)):
        kept, ignored = module._rows_by_shape(y, -100, max_kept)
        assert ignored.shape == (max_kept or 9, 1)
        if kept is None:
            assert torch.equal(ignored[:, 0], y == -100)
        else:
            wanted = (y != -100).nonzero()[:, 0]
            assert len(kept.unique()) == max_kept and torch.equal(kept[: len(wanted)], wanted)
            assert torch.equal(ignored[:, 0], y[kept] == -100)


@pytest.mark.kernel
@pytest.mark.skipif(
    not INTERPRETED, reason="a ValueError on the CPU; on CUDA an assertion ends the process's use of the device"
)
def test_bad_target_is_asserted():
    hidden, weight, _ = operands((9,), 8, 11)
    with pytest.raises(Exception, match="need 0 <= target < V"):
        pk.linear_cross_entropy(hidden, weight, torch.full((9,), 11))


@pytest.mark.kernel
def test_same_tensor_twice():
    x = randn(6, 6)
    check_op("linear_cross_entropy", x, x, torch.arange(6))
    ones = torch.ones(6)
    check_op("linear_cross_entropy", x, randn(6, 6), torch.arange(6), linear_bias=ones, weight=ones, token_weight=ones)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_registration(reduction):
    op = torch.ops.palm_kernels.linear_cross_entropy_fwd_bwd.default
    for wants in ((True, True, True), (False, True, False), (False, False, False)):
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, bias = operands((2, 3), 8, 11, dtype)
            y = targets((2, 3), 11)
            options = (-100, 0.1, 0.1, 0.5, reduction, None)
            dloss = torch.rand(2, 3) if reduction == "none" else None
            opcheck(op, hidden, weight, bias, y, torch.rand(11), torch.rand(2, 3), dloss, *options, *wants)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(reduction):
    variants = []
    for n, C, V in ((4, 8, 9), (7, 12, 33)):
        hidden, weight, bias = operands((n,), C, V)
        variants.append((hidden, weight, targets((n,), V)))
    assert_compiles("linear_cross_entropy", *variants, reduction=reduction, **EVERYTHING)
    assert_compiles("linear_cross_entropy", variants[-1], reduction=reduction, linear_bias=bias, label_smoothing=0.1)


def test_compiled_second_backward_and_no_grad():
    hidden, weight, _ = operands((9,), 8, 11)
    y = targets((9,), 11)
    compiled = torch.compile(lambda h, w: pk.linear_cross_entropy(h, w, y), fullgraph=True, backend="aot_eager")
    out = compiled(hidden, weight)
    first, second = (torch.autograd.grad(out, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight), out)


@pytest.mark.kernel
def test_checkpoint():
    hidden, weight, _ = operands((9,), 8, 11)
    y = targets((9,), 11)
    plain = torch.autograd.grad(pk.linear_cross_entropy(hidden, weight, y), (hidden, weight))
    out = torch.utils.checkpoint.checkpoint(pk.linear_cross_entropy, hidden, weight, y, use_reentrant=False)
    again = torch.autograd.grad(out, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_and_reference_backend():
    hidden, weight, bias = operands((9,), 8, 11)
    y = targets((9,), 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pk.linear_cross_entropy(hidden, weight, y, linear_bias=bias)
        loss.backward()  # inside: the second GEMMs must not be cast either
    casted = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pk.linear_cross_entropy(casted[0], casted[1], y, linear_bias=casted[2]))
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.linear_cross_entropy(*leaves, y).dtype == torch.float64
    with pk.backend("reference"):
        expected = F.cross_entropy(F.linear(hidden, weight, bias), y)
        torch.testing.assert_close(pk.linear_cross_entropy(hidden, weight, y, linear_bias=bias), expected)


def test_refuses_double_backward():
    hidden, weight, _ = operands((4,), 3, 5)
    assert_refuses_double_backward("linear_cross_entropy", hidden, weight, targets((4,), 5))


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flops_are_counted_in_a_fresh_process():
    """The formula waits for torch.utils.flop_counter, which imports triton: importing palm_kernels imports neither."""
    code = """
import sys, palm_kernels as pk, torch
assert not {"triton", "transformers", "torch.utils.flop_counter"} & sys.modules.keys()
from torch.utils.flop_counter import FlopCounterMode
h, w, y = torch.randn(2, 3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True), torch.zeros(2, 3).long()
for args, reduction in (((h, w), "mean"), ((h, w.detach()), "mean"), ((h, w), "none"), ((h.detach(), w.detach()), "sum")):
    with FlopCounterMode(display=False) as counter:
        loss = pk.linear_cross_entropy(*args, y, reduction=reduction).sum()
        if loss.requires_grad:
            loss.backward()
    print(counter.get_total_flops() // (2 * 6 * 5 * 7), end=" ")
"""
    assert python(code) == "3 2 4 1 "
    assert python("import torch.utils.flop_counter as f, palm_kernels, torch; "
                  "print(torch.ops.palm_kernels.linear_cross_entropy_fwd_bwd in f.flop_registry)") == "True\n"  # fmt: skip


def test_memory():
    """512 MB of logits are never there: one chunk, and the gradients."""
    code = """
import resource, torch, palm_kernels as pk
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(n, **options):
    h, w, y = torch.randn(n, 64, requires_grad=True), torch.randn(V, 64, requires_grad=True), torch.randint(V, (n,))
    pk.linear_cross_entropy(h, w, y, **options).sum().backward()
V = 65536
step(8)
before = peak()
step(2048)
step(2048, reduction="none")
print(peak() - before)
"""
    assert float(python(code)) < 128


def test_errors():
    hidden, weight = torch.ones(2, 3), torch.ones(4, 3)
    y = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"linear_cross_entropy: target\[3\] is 4, need 0 <= target < V = 4"):
        pk.linear_cross_entropy(torch.ones(5, 3), weight, torch.tensor([0, -100, 1, 4, 9]))
    with pytest.raises(ValueError, match=r"target\[1, 0\] is -7"):
        pk.linear_cross_entropy(torch.ones(2, 1, 3), weight, torch.tensor([[0], [-7]]), reduction="none")
    with pytest.raises(ValueError, match=r"linear_weight has shape \[4, 2\], need \[V,C\] = \[4, 3\]"):
        pk.linear_cross_entropy(hidden, torch.ones(4, 2), y)
    with pytest.raises(ValueError, match=r"linear_weight has shape \[3\], need \[V,C\]"):
        pk.linear_cross_entropy(hidden, torch.ones(3), y)
    with pytest.raises(ValueError, match=r"linear_bias has shape \[3\], need \[V\] = \[4\]"):
        pk.linear_cross_entropy(hidden, weight, y, linear_bias=torch.ones(3))
    with pytest.raises(TypeError, match="linear_weight is torch.float64, hidden is torch.float32"):
        pk.linear_cross_entropy(hidden, weight.double(), y)
    with pytest.raises(TypeError, match="target is torch.int32"):
        pk.linear_cross_entropy(hidden, weight, y.int())
    with pytest.raises(ValueError, match=r"target has shape \[1\], need hidden's leading shape = \[2\]"):
        pk.linear_cross_entropy(hidden, weight, y[:1])
    with pytest.raises(ValueError, match="hidden has no dimensions"):
        pk.linear_cross_entropy(torch.tensor(1.0), weight, y)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        pk.linear_cross_entropy(hidden, weight, y, reduction="avg")
    with pytest.raises(ValueError, match="linear_weight is on meta"):
        pk.linear_cross_entropy(hidden, weight.to("meta"), y)
    with pk.backend("triton"), pytest.raises(NotImplementedError, match="linear_cross_entropy.*not served by backend"):
        pk.linear_cross_entropy(hidden, weight, y)


def test_meta_and_vmap():
    hidden, weight = torch.empty(3, 5, device="meta"), torch.empty(7, 5, device="meta", requires_grad=True)
    y = torch.empty(3, device="meta", dtype=torch.int64)
    loss = pk.linear_cross_entropy(hidden, weight, y)
    loss.backward()
    assert loss.shape == () and weight.grad.shape == (7, 5)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda h: pk.linear_cross_entropy(h, torch.ones(4, 3), torch.zeros(2).long()))(torch.ones(2, 3))
