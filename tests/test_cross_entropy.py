"""cross_entropy: kernels against reference.py and torch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    INTERPRETED,
    ON_CPU_KERNELS,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_refuses_double_backward,
    check_op,
    far_rows,
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

import palm_kernels as pk

LONG = 9_001 if INTERPRETED else 33_001
# nothing, no rows, one class, one row, tails of every vector width, several blocks and several cuts a row, leading dimensions
SHAPES = [(0, 8), (2, 0, 5), (3, 1), (7,), (4, 9), (3, 33), (2, 129, 17), (5, 1023), (2, LONG), (2, 3, 2, 64)]
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 0.7, "return_z_loss": True}


def targets(shape, classes, ignore_index=-100):
    """Random classes, every third one ignored (the first never)."""
    y = torch.randint(classes, shape)
    y.view(-1)[1::3] = ignore_index
    return y


def weights(y, classes, dtype=torch.float32):
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "weight": torch.rand(classes, dtype=wide_dtype) + 0.1,
        "token_weight": torch.rand(y.shape, dtype=wide_dtype),
    }


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_reference(shape, dtype):
    logits, y = randn(*shape, dtype=dtype, scale=3), targets(shape[:-1], shape[-1])
    check_op("cross_entropy", logits, y)
    for reduction in ("none", "mean", "sum"):
        check_op("cross_entropy", logits, y, reduction=reduction, **EVERYTHING, **weights(y, shape[-1], dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype):
    x, y = randn(4, 6, 10, dtype=dtype), targets((4, 6), 10)
    for reduction in ("none", "mean"):
        check_op("cross_entropy", wide(x), wide(y), reduction=reduction, token_weight=wide(torch.rand(4, 6)))
        check_op("cross_entropy", permuted(x), y.t().contiguous().t(), reduction=reduction, **EVERYTHING)
    check_op("cross_entropy", x.detach().transpose(0, 2).requires_grad_(), targets((10, 6), 4), reduction="none")
    check_op(
        "cross_entropy", x.detach()[:, :1].expand(4, 6, 10).requires_grad_(), y, token_weight=torch.ones(6).expand(4, 6)
    )
    check_op("cross_entropy", x.detach()[:, :-1].requires_grad_(), y[:, 1:])  # the shift of a language model
    for reduction in ("none", "mean"):  # row vectors of one stride, which is not 1
        options = {"reduction": reduction, "token_weight": wide(torch.rand(4, 1))}
        check_op("cross_entropy", wide(x[:, :1]), wide(y[:, :1]), **options)
    check_op("cross_entropy", x, y, weight=torch.rand(20)[::2])


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    check_op("cross_entropy", far_rows(2, 8).requires_grad_(), torch.tensor([3, 5]), reduction="none")


@pytest.mark.kernel
@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=3),
    classes=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([wide, permuted, lambda x: x]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    ignore_index=st.sampled_from([-100, 0, 10**9]),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    logit_scale=st.sampled_from([1.0, 0.3, -2.0, 0.0]),
)
def test_any_shape_and_option(shape, classes, dtype, layout, ignore_index, weighted, **options):
    logits, y = layout(randn(*shape, classes, dtype=dtype)), targets(shape, classes, ignore_index)
    options |= weights(y, classes, dtype) if weighted else {}
    check_op("cross_entropy", logits, y, ignore_index=ignore_index, return_z_loss=True, **options)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(reduction):
    logits, y = randn(4, 5, dtype=torch.float64), targets((4,), 5)
    gradcheck("cross_entropy", logits, y, reduction=reduction)
    options = {k: v for k, v in EVERYTHING.items() if k != "return_z_loss"}
    gradcheck("cross_entropy", logits, y, reduction=reduction, **options, **weights(y, 5, torch.float64))


@pytest.mark.kernel
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_torch(reduction, label_smoothing, weighted):
    dtype, rtol, atol = (torch.float64, 1e-12, 1e-14) if ON_CPU_KERNELS else (torch.float32, 1e-5, 1e-6)
    logits, y = randn(30, 77, dtype=dtype), targets((30,), 77)
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "ignore_index": -100}
    options["weight"] = torch.rand(77, dtype=dtype) if weighted else None
    ours, theirs = (run(f, (logits, y), options) for f in (pk.cross_entropy, F.cross_entropy))
    for a, b in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows_are_never_read(dtype, reduction):
    y = targets((3, 7), 19)
    logits = randn(3, 7, 19, dtype=dtype, grad=False)
    logits[y == -100] = torch.nan
    token_weight = torch.rand(3, 7).masked_fill(y == -100, torch.nan)
    (loss,), (dlogits,) = check_op(
        "cross_entropy", logits.requires_grad_(), y, reduction=reduction, token_weight=token_weight
    )
    assert loss.isfinite().all() and (dlogits[y == -100] == 0).all()


@pytest.mark.kernel
def test_nothing_kept():
    """Loss 0 with a graph and zero gradients (torch: NaN); the same where all weights of the kept rows are 0."""
    logits = torch.full((3, 5), torch.nan, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss, z = pk.cross_entropy(logits, torch.full((3,), -100), reduction=reduction, z_loss=0.1, return_z_loss=True)
        assert loss.requires_grad and not z.requires_grad and (loss == 0).all() and (z == 0).all()
        assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()
    check_op("cross_entropy", randn(3, 5), torch.arange(3), token_weight=torch.zeros(3))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_values(dtype, label_smoothing):
    """Huge logits, -inf (p = 0), +inf and NaN, each in the first block of a row or beyond it, at the target or beside it."""
    inf, nan, big = torch.inf, torch.nan, torch.finfo(dtype).max
    rows = randn(64, 1300, dtype=dtype, grad=False)
    y = torch.full((64,), 5)
    for r, value in enumerate((-inf, inf, nan, 3e4, -3e4, 60.0)):
        rows[4 * r, 5], rows[4 * r + 1, 700] = value, value
        rows[4 * r + 2, :600], rows[4 * r + 3, 10:] = value, value
    rows[30] = 1e4 + rows[30]
    rows[31], rows[32] = -inf, inf
    rows[33, :600], rows[34, 600:] = -inf, -inf
    if not label_smoothing:
        rows[35, 6:] = -big
    check_op("cross_entropy", rows.requires_grad_(), y, reduction="none", label_smoothing=label_smoothing)
    finite = rows.detach()[[0, 1, 3 * 4, 30]].requires_grad_()
    check_op("cross_entropy", finite, torch.full((4,), 9), label_smoothing=label_smoothing, z_loss=0.1)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "value", [0.0, 88.0, 3e4, -3e4, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]
)
def test_equal_logits(value):
    """log V for any level of the logits: lse - z_y is never the difference of two large numbers."""
    loss = pk.cross_entropy(torch.full((2, 1300), value), torch.tensor([0, 1299]))
    torch.testing.assert_close(loss, torch.tensor(1300.0).log(), rtol=1e-6, atol=0)


def test_repeatable():
    y = targets((64,), 999)
    for reduction in ("none", "mean"):
        assert_bitwise_repeatable("cross_entropy", randn(64, 999), y, reduction=reduction, **EVERYTHING)
    y = targets((70_000,), 2)
    assert_bitwise_repeatable("cross_entropy", randn(70_000, 2), y, **weights(y, 2))


@pytest.mark.kernel
def test_same_tensor_twice_and_retain_graph():
    x = randn(9)
    check_op("cross_entropy", x, torch.tensor(4), weight=x)
    out = pk.cross_entropy(x, torch.tensor(4), weight=x.detach())
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, x)[0])


def test_registration():
    logits, y, w = randn(4, 9), targets((4,), 9), torch.rand(9)
    fwd, bwd = torch.ops.palm_kernels.cross_entropy_fwd.default, torch.ops.palm_kernels.cross_entropy_bwd.default
    for reduction in ("none", "mean"):
        opcheck(fwd, logits, y, w, torch.rand(4), -100, 0.1, 0.1, 0.5, reduction)
        dloss = torch.rand(4) if reduction == "none" else torch.tensor(0.5)
        opcheck(bwd, logits, dloss, torch.rand(4), torch.tensor(1.0), y, w, None, -100, 0.1, 0.1, 0.5)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles(reduction):
    variants = [(randn(n, v), targets((n,), v)) for n, v in ((4, 9), (7, 33))]
    assert_compiles("cross_entropy", *variants, reduction=reduction, **EVERYTHING)


def test_autocast_and_reference_backend():
    logits, y = randn(4, 9), targets((4,), 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pk.cross_entropy(logits, y), pk.cross_entropy(logits.detach(), y))
        assert pk.cross_entropy(logits.bfloat16(), y).dtype == torch.float32
    with pk.backend("reference"):
        torch.testing.assert_close(pk.cross_entropy(logits, y), F.cross_entropy(logits, y))


def test_refuses_double_backward():
    assert_refuses_double_backward("cross_entropy", randn(2, 3), torch.tensor([0, 2]))


def test_errors():
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"cross_entropy: target\[1\] is 4, need 0 <= target < V = 4"):
        pk.cross_entropy(x, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"target\[1, 2\] is -1, .* or ignore_index = -100"):
        bad = torch.zeros(3, 5, dtype=torch.int64)
        bad[1, 2], bad[2, 0] = -1, 77
        pk.cross_entropy(torch.ones(3, 5, 4), bad)
    with pytest.raises(ValueError, match="target is 4"):
        pk.cross_entropy(x[0], torch.tensor(4))
    with pytest.raises(TypeError, match="target is torch.int32, need int64"):
        pk.cross_entropy(x, y.int())
    with pytest.raises(TypeError, match="logits is torch.int64"):
        pk.cross_entropy(x.long(), y)
    with pytest.raises(ValueError, match=r"target has shape \[3\], need logits's leading shape = \[2\]"):
        pk.cross_entropy(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits has no dimensions"):
        pk.cross_entropy(torch.tensor(1.0), y)
    with pytest.raises(ValueError, match=r"weight has shape \[3\], need \[V\] = \[4\]"):
        pk.cross_entropy(x, y, weight=torch.ones(3))
    with pytest.raises(TypeError, match="weight is torch.bfloat16, need float32"):
        pk.cross_entropy(x, y, weight=torch.ones(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="token_weight has shape"):
        pk.cross_entropy(x, y, token_weight=torch.ones(3))
    with pytest.raises(TypeError, match="token_weight is torch.float64"):
        pk.cross_entropy(x, y, token_weight=torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="target is on meta, logits on cpu"):
        pk.cross_entropy(x, y.to("meta"))
    with pytest.raises(ValueError, match="label_smoothing is 1.5, need 0 to 1"):
        pk.cross_entropy(x, y, label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction is 'avg', need 'none', 'mean' or 'sum'"):
        pk.cross_entropy(x, y, reduction="avg")
    with pk.backend("triton"), pytest.raises(NotImplementedError, match="cross_entropy: not served by backend"):
        pk.cross_entropy(x, y)


@pytest.mark.kernel
@pytest.mark.skipif(
    not INTERPRETED, reason="a ValueError on the CPU; on CUDA an assertion ends the process's use of the device"
)
@pytest.mark.parametrize("bad", [4, -1, 2**40])
def test_bad_target_is_asserted(bad):
    with pytest.raises(Exception, match="need 0 <= target < V"):
        pk.cross_entropy(torch.ones(2, 4), torch.tensor([0, bad]))
    args = torch.ones(2, 4), torch.tensor(1.0), torch.zeros(2), torch.tensor(1.0), torch.tensor([bad, 0])
    with pytest.raises(Exception, match="need 0 <= target < V"):
        torch.ops.palm_kernels.cross_entropy_bwd(*args, None, None, -100, 0.0, 0.0, 1.0)


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 4096, 9000])
def test_many_rows(rows):
    """More rows than one program adds up."""
    y = targets((rows,), 3)
    for reduction in ("mean", "sum"):
        check_op("cross_entropy", randn(rows, 3), y, reduction=reduction, **weights(y, 3))


@pytest.mark.kernel
def test_rows_of_more_than_64_kb():
    """Where the GPU kernels take their largest blocks."""
    y = targets((3,), 33_001)
    check_op("cross_entropy", randn(3, 33_001, scale=3), y, **EVERYTHING, **weights(y, 33_001))
    hidden, weight = randn(3, 4), randn(33_001, 4)
    check_op("linear_cross_entropy", hidden, weight, y, **EVERYTHING, **weights(y, 33_001))


@pytest.mark.kernel
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions_that_do_not_merge(reduction):
    """Five of them in an order of their own, more than a kernel walks over by itself."""
    x = permuted(randn(2, 3, 2, 2, 3, 7))
    check_op("cross_entropy", x, targets(x.shape[:-1], 7), reduction=reduction, **EVERYTHING)


def test_meta_and_vmap():
    x, y = torch.empty(3, 4, device="meta"), torch.empty(3, device="meta", dtype=torch.int64)
    assert pk.cross_entropy(x, y).shape == () and pk.cross_entropy(x, y, reduction="none").shape == (3,)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(pk.cross_entropy)(randn(2, 3, 4, grad=False), torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.kernel
def test_no_subnormal_gradients():
    """Probabilities below the smallest normal number are 0: a GEMM over them would run many times slower."""
    logits = (torch.arange(400.0) * -0.5).repeat(2, 1).requires_grad_()
    pk.cross_entropy(logits, torch.tensor([0, 399]), reduction="sum").backward()
    tiny = torch.finfo(torch.float32).tiny
    assert not ((logits.grad != 0) & (logits.grad.abs() < tiny)).any() and logits.grad[0, 170] != 0
