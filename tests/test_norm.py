"""rms_norm, layer_norm: kernels against reference.py."""

import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
    ON_CPU_KERNELS,
    assert_bitwise_repeatable,
    assert_close,
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
from palm_kernels import dispatch

NORMS = ["rms_norm", "layer_norm"]
# empty, no columns, one row, short rows, tails of every vector width, several chunks, whole packets, long rows
SHAPES = [
    (0, 8),
    (3, 0),
    (16,),
    (1, 1),
    (40, 3),
    (2, 129, 33),
    (1100, 5),
    (40, 130),
    (5, 2, 3, 64),
    (300, 64),
    (20, 2064),
]
SHAPES += [(1, 18_432), (1, 9_001)] if INTERPRETED else [(3, 18_432), (2, 9_001)]
both = pytest.mark.parametrize("norm", NORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def options(norm, cols, dtype, **kwargs):
    return {**kwargs, "bias": randn(cols, dtype=dtype)} if norm == "layer_norm" else kwargs


def assert_same(ours, theirs, dtype):
    """Bit for bit with the CPU kernels. A GPU's sum in an order that alignment decides: there within the error budget."""
    if ON_CPU_KERNELS:
        assert torch.equal(ours, theirs)
    else:
        assert_close(ours, theirs, theirs, dtype)


@pytest.mark.kernel
@both
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_reference(norm, shape, dtype):
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    check_op(norm, x, weight, **options(norm, shape[-1], dtype))
    check_op(norm, x, weight, offset=1.0, residual=randn(*shape, dtype=dtype))


@pytest.mark.kernel
@both
@every_dtype
def test_absent_and_frozen_gains(norm, dtype):
    x, residual = randn(6, 37, dtype=dtype), randn(6, 37, dtype=dtype)
    check_op(norm, x, None, offset=3.0)
    check_op(norm, x, None, residual=residual, **options(norm, 37, dtype))
    check_op(norm, x, randn(37, dtype=dtype, grad=False), **options(norm, 37, dtype))
    check_op(norm, x.detach(), randn(37, dtype=dtype))
    check_op(norm, x, randn(37, dtype=dtype, grad=False), residual=residual.detach())


@pytest.mark.kernel
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_float32_gain_beside_16_bits(norm, dtype):
    x = randn(70, 45, dtype=dtype)
    _, grads = check_op(norm, x, randn(45), **options(norm, 45, torch.float32))
    assert [g.dtype for g in grads] == [dtype] + [torch.float32] * (len(grads) - 1)
    if norm == "layer_norm":
        check_op(norm, x, randn(45, dtype=dtype), **options(norm, 45, torch.float32))
        check_op(norm, x, None, **options(norm, 45, torch.float32))


@pytest.mark.kernel
@both
@every_dtype
def test_strides(norm, dtype):
    x, weight = randn(4, 6, 10, dtype=dtype), wide(randn(10, dtype=dtype))
    check_op(norm, wide(x), weight, residual=permuted(x))
    check_op(norm, x.detach().transpose(0, 2).requires_grad_(), randn(4, dtype=dtype))
    check_op(norm, x.detach()[:, :1, :].expand(4, 6, 10).requires_grad_(), weight)
    check_op(norm, permuted(wide(x)), randn(20, dtype=dtype).detach()[::2].requires_grad_())
    x = randn(2, 3, 2, 3, 2, 5, dtype=dtype)
    check_op(norm, permuted(x), randn(5, dtype=dtype), residual=wide(x))


@pytest.mark.kernel
@both
def test_stride_beyond_32_bits(norm):
    check_op(norm, far_rows(2, 8).requires_grad_(), randn(8, dtype=torch.bfloat16))


@pytest.mark.kernel
@given(
    norm=st.sampled_from(NORMS),
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    cols=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from([wide, permuted, lambda x: x])] * 2),
    residual=st.booleans(),
    weight=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_any_shape_and_stride(norm, shape, cols, dtype, layouts, residual, weight, offset):
    x, r = (layout(randn(*shape, cols, dtype=dtype)) for layout in layouts)
    gain = randn(cols, dtype=dtype) if weight else None
    check_op(norm, x, gain, offset=offset, **({"residual": r} if residual else options(norm, cols, dtype)))


@pytest.mark.kernel
@both
@every_dtype
def test_mean_far_above_deviation(norm, dtype):
    """|mean| / deviation near what the dtype resolves: the variance is taken about the mean, and constant rows give 0."""
    level = {torch.float16: 30.0, torch.bfloat16: 30.0, torch.float32: 3e4, torch.float64: 1e4}[
        dtype
    ]  # the truth is float64
    x = (randn(9, 1003, dtype=torch.float64, grad=False) + level).to(dtype).requires_grad_()
    check_op(norm, x, randn(1003, dtype=dtype))
    if norm == "layer_norm":
        constant = torch.full((3, 1003), 0.1, dtype=dtype)
        assert torch.equal(pk.layer_norm(constant, None), torch.zeros_like(constant))


@pytest.mark.kernel
@both
def test_long_rows_that_begin_far_from_their_mean(norm):
    """Beyond what stays in registers the variance is taken about the mean of a row's first piece."""
    x = randn(2, 20_000, grad=False)
    x[0, 4096:] += 1e4
    x[1] += 3e4
    check_op(norm, x.requires_grad_(), randn(20_000))


@pytest.mark.kernel
@both
@every_dtype
def test_extreme_values(norm, dtype):
    """Large and tiny rows, and rows with an infinity or a NaN, beside an ordinary one that they must not touch."""
    large = {torch.float16: 6e4, torch.bfloat16: 1e18, torch.float32: 1e18, torch.float64: 1e150}[dtype]
    x = randn(6, 33, dtype=dtype, grad=False)
    scales = torch.tensor([large / 8, 1e-4, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    x = (x.double() * scales[:, None]).to(dtype)
    x[2, 5], x[3, 32] = torch.inf, torch.nan
    for row in x:
        check_op(norm, row.clone(), randn(33, dtype=dtype, grad=False))
    whole = run(getattr(pk, norm), (x, None), {})[0][0]
    assert_same(whole[4], getattr(pk, norm)(x[4], None), dtype)
    finite = x[[0, 1, 4, 5]].requires_grad_()
    check_op(norm, finite, None)


@both
def test_gradcheck(norm):
    f64 = torch.float64
    x, residual, weight = randn(3, 5, dtype=f64), randn(3, 5, dtype=f64), randn(5, dtype=f64)
    gradcheck(norm, x, weight, offset=1.0, eps=0.1, residual=residual)
    gradcheck(norm, x, weight, **options(norm, 5, f64))
    gradcheck(norm, wide(x), None)


@pytest.mark.kernel
@both
def test_gradient_of_either_output_alone(norm):
    x, residual, weight = randn(3, 7), randn(3, 7), randn(7)
    out, total = getattr(pk, norm)(x, weight, residual=residual)
    dx, dresidual, dweight = torch.autograd.grad(total.sum(), (x, residual, weight))
    assert torch.equal(dx, torch.ones(3, 7)) and torch.equal(dx, dresidual) and not dweight.any()
    assert torch.equal(total, x + residual)
    out, total = getattr(pk, norm)(x, weight, residual=residual)
    plain = run(getattr(pk, norm), (total.detach().requires_grad_(), weight), {}, [torch.ones(3, 7)])[1]
    for ours, wanted in zip(torch.autograd.grad(out.sum(), (x, weight)), plain, strict=True):
        assert torch.equal(ours, wanted)


@both
@pytest.mark.parametrize("shape", [(3000, 7), (700, 130), (33, 5000)], ids=name_of)
def test_repeatable(norm, shape):
    args = randn(*shape), randn(shape[-1])
    assert_bitwise_repeatable(norm, *args, residual=randn(*shape), **options(norm, shape[-1], torch.float32))


@pytest.mark.kernel
@both
def test_many_rows_of_one_column_sum_accurately(norm):
    check_op(norm, randn(30_000 if INTERPRETED else 300_000, 2), randn(2), **options(norm, 2, torch.float32))


@pytest.mark.kernel
@both
def test_same_tensor_twice_and_retain_graph(norm):
    x, weight = randn(4, 9), randn(9)
    check_op(norm, x, weight, residual=x)
    check_op(norm, weight, weight, residual=weight)
    out = getattr(pk, norm)(x, weight)
    first = torch.autograd.grad(out.sum(), (x, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out.sum(), (x, weight))))


@pytest.mark.kernel
@both
@every_dtype
def test_backend_functions(norm, dtype):
    """What parallel_block calls: statistics written, strided dx, dsum added before rounding, dx over dout's or dsum's memory."""
    layer = norm == "layer_norm"
    x, dout, dsum = (wide(randn(2, 20, 37, dtype=dtype, grad=False)) for _ in range(3))
    weight = randn(37, dtype=dtype, grad=False)
    wanted = run(getattr(pk, norm), (x.requires_grad_(), weight.requires_grad_()), {}, [dout])
    x, weight = x.detach(), weight.detach()
    kind = torch.promote_types(dtype, torch.float32)
    stats = [torch.empty(40, dtype=kind) for _ in range(2 if layer else 1)]
    out = wide(torch.empty_like(x))
    absent = (None, weight, None) if layer else (None, weight)
    eps = 1e-5 if layer else 1e-6
    forward, backward = (dispatch.select("norm", f"{norm}_{way}", x.device, dtype) for way in ("fwd", "bwd"))
    forward(x, *absent, eps, 0.0, out, None, *stats)
    assert_same(out, wanted[0][0], dtype)
    s = x.reshape(40, 37).double()
    centred = s - s.mean(-1, keepdim=True) if layer else s
    torch.testing.assert_close(stats[-1].double(), (centred.square().mean(-1) + eps).rsqrt(), rtol=1e-5, atol=0)
    if layer:
        torch.testing.assert_close(stats[0].double(), s.mean(-1), rtol=1e-5, atol=1e-6)
    rest = (None,) if layer else ()
    dx, dweight = wide(torch.empty_like(x)), torch.empty_like(weight)
    backward(dout, x, weight, *stats, None, 0.0, dx, dweight, *rest)
    for ours, theirs in ((dx, wanted[1][0]), (dweight, wanted[1][1])):
        assert_same(ours, theirs, dtype)
    backward(dout, x, weight, *stats, dsum, 0.0, dx, None, *rest)
    assert (dx.double() - wanted[1][0].double() - dsum.double()).abs().max() <= 16 * torch.finfo(dtype).eps
    for place in range(2):
        inputs = [dout.clone(), dsum.clone()]
        backward(inputs[0], x, weight, *stats, inputs[1], 0.0, inputs[place], None, *rest)
        assert_same(inputs[place], dx, dtype)


def test_registration():
    x, residual, weight, stat = randn(4, 9), randn(4, 9), randn(9), randn(4)
    ops = torch.ops.palm_kernels
    for r in (None, residual):
        opcheck(ops.rms_norm_fwd.default, x, r, weight, 1e-6, 0.0)
        opcheck(ops.layer_norm_fwd.default, x, r, weight, None, 1e-6, 0.0)
    for dsum, gain_grads in ((None, True), (residual, False)):
        opcheck(ops.rms_norm_bwd.default, randn(4, 9), x, weight, stat, dsum, 1.0, gain_grads)
        opcheck(ops.layer_norm_bwd.default, randn(4, 9), x, weight, randn(9), stat, stat, dsum, 1.0, gain_grads)
    opcheck(ops.layer_norm_bwd.default, randn(4, 9), x, None, None, stat, stat, None, 1.0, True)


@both
def test_compiles(norm):
    assert_compiles(norm, (randn(4, 9), randn(9)), (randn(7, 33), randn(33)), offset=1.0)
    assert_compiles(norm, (randn(4, 9), randn(9)), residual=randn(4, 9), **options(norm, 9, torch.float32))
    assert_compiles(norm, (randn(4, 9), None), (randn(2, 3, 8), None))


@both
def test_autocast_and_reference_backend(norm):
    x, weight = randn(4, 9, dtype=torch.bfloat16), randn(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(pk, norm)(x, weight).dtype == torch.bfloat16
        assert getattr(pk, norm)(x.float(), weight).dtype == torch.float32
    with pk.backend("reference"):
        assert torch.equal(getattr(pk, norm)(x, None), getattr(pk.reference, norm)(x, None))


@both
def test_refuses_double_backward(norm):
    assert_refuses_double_backward(norm, randn(2, 3), randn(3))


@both
def test_errors(norm):
    op, x, weight = getattr(pk, norm), torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=norm + r": weight has shape \[3\], need \[C\] = \[4\]"):
        op(x, torch.ones(3))
    with pytest.raises(ValueError, match=norm + r": residual has shape \[4\], need x's shape = \[2, 4\]"):
        op(x, weight, residual=weight)
    with pytest.raises(TypeError, match=f"{norm}: residual is torch.bfloat16, x is torch.float32"):
        op(x, weight, residual=x.bfloat16())
    with pytest.raises(TypeError, match=f"{norm}: weight is torch.bfloat16, need torch.float32"):
        op(x, weight.bfloat16())
    with pytest.raises(TypeError, match=f"{norm}: weight is torch.float32, need torch.float64"):
        op(x.double(), weight)
    with pytest.raises(TypeError, match=f"{norm}: x is torch.int64"):
        op(x.long(), weight)
    with pytest.raises(ValueError, match="x has no dimensions"):
        op(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match="weight is on meta"):
        op(x, weight.to("meta"))
    with pk.backend("triton"), pytest.raises(NotImplementedError, match=f"{norm}: not served by backend 'triton'"):
        op(x, weight)
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \[2\]"):
        pk.layer_norm(x, weight, bias=torch.ones(2))


@both
def test_meta_and_vmap(norm):
    op, x = getattr(pk, norm), torch.empty(3, 4, device="meta")
    out, total = op(x, None, residual=torch.empty_like(x))
    assert out.shape == total.shape == (3, 4)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda x: op(x, None))(randn(2, 3, grad=False))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_stored_sum_is_rounded_to_nearest_even(dtype):
    """x + residual of any two bit patterns, ties, overflow and NaN among them, bit for bit as torch rounds (subnormals aside)."""
    bits = torch.randint(-(2**15), 2**15, (2, 4096, 33), dtype=torch.int16)
    bits[:, :2048] = bits[:, :2048] % 2**11 + 2**13  # neighbouring exponents: many ties
    x, residual = bits.view(dtype)
    _, total = pk.rms_norm(x, None, residual=residual)
    want = (x.float() + residual.float()).to(dtype)
    compared = (want.abs() >= torch.finfo(dtype).tiny) | (want == 0)
    assert torch.equal(total[compared], want[compared]) and torch.equal(total.isnan(), want.isnan())


@pytest.mark.kernel
def test_rows_of_two_far_from_zero():
    """What rounding leaves of the mean is a large share of a row of two: it is taken out of the gradient too."""
    x = (randn(400, 2, grad=False) + 100).requires_grad_()
    check_op("layer_norm", x, randn(2))
