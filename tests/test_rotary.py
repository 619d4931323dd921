"""rotary, rotary_tables: kernels against reference.py."""

import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
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
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import palm_kernels as pk
from palm_kernels import dispatch

# empty batch, no tokens, no heads, one of everything, an odd rest, tails of every vector width, one head without its dimension
SHAPES = [
    (0, 3, 2, 8),
    (2, 0, 2, 8),
    (2, 3, 0, 8),
    (1, 1, 1, 2),
    (2, 5, 3, 7),
    (2, 9, 4, 64),
    (1, 3, 2, 78),
    (2, 50, 256),
    (3, 4, 1),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
pairing = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(length, half, dtype=torch.float32):
    return tuple(t.to(torch.promote_types(dtype, torch.float32)) for t in pk.rotary_tables(length, 2 * half))


@pytest.mark.kernel
@pairing
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_reference(shape, dtype, interleaved):
    x, D = randn(*shape, dtype=dtype), shape[-1]
    for half in {D // 2, D // 4, 0}:
        check_op("rotary", x, *tables(shape[1] + 3, half, dtype), interleaved=interleaved)


@pytest.mark.kernel
@pairing
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=name_of)
@pytest.mark.parametrize("shape", [(2, 5, 3, 12), (2, 5, 12)], ids=name_of)
def test_positions(shape, kind, interleaved):
    x, cos_sin = randn(*shape), tables(9, 6)
    for positions in (torch.tensor([8, 0, 3, 3, 1]), torch.randint(0, 9, (2, 5)), torch.arange(5).expand(2, 5)):
        check_op("rotary", x, *cos_sin, positions=positions.to(kind), interleaved=interleaved)
    strided = torch.randint(0, 9, (5, 2), dtype=kind).T
    check_op("rotary", x, *cos_sin, positions=strided, interleaved=interleaved)
    short = tables(2, 6)
    check_op("rotary", x, *short, positions=torch.ones(5, dtype=kind), interleaved=interleaved)


@pytest.mark.kernel
@pairing
@every_dtype
def test_strides(dtype, interleaved):
    x, (cos, sin) = randn(2, 6, 3, 10, dtype=dtype), tables(6, 5, dtype)
    check_op("rotary", wide(x), wide(cos), sin, interleaved=interleaved)
    check_op("rotary", permuted(wide(x)), cos.T.contiguous().T, sin, interleaved=interleaved)
    check_op("rotary", x.detach().transpose(1, 3).requires_grad_(), *tables(10, 3, dtype), interleaved=interleaved)
    check_op("rotary", x.detach()[:, :, :1].expand(2, 6, 3, 10).requires_grad_(), cos, sin, interleaved=interleaved)
    check_op("rotary", wide(randn(2, 6, 10, dtype=dtype)), cos[:1].expand(6, 5), sin, interleaved=interleaved)


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    check_op("rotary", far_rows(2, 8)[None].requires_grad_(), *tables(2, 4))
    check_op("rotary", far_rows(2, 8)[None, None].requires_grad_(), *tables(1, 4))


@pytest.mark.kernel
@given(
    shape=st.lists(st.integers(0, 6), min_size=2, max_size=3),
    D=st.integers(0, 70),
    rest=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([wide, permuted, lambda x: x]),
    interleaved=st.booleans(),
    positions=st.sampled_from([None, 1, 2]),
)
def test_any_shape_and_stride(shape, D, rest, dtype, layout, interleaved, positions):
    length = shape[1] + 2
    if positions:
        positions = torch.randint(0, length, shape[2 - positions : 2])
    x = layout(randn(*shape, D + rest, dtype=dtype))
    check_op("rotary", x, *tables(length, D // 2, dtype), positions=positions, interleaved=interleaved)


@pytest.mark.kernel
@pairing
@every_dtype
def test_backend_function_in_place(dtype, interleaved):
    """parallel_block turns q and k inside its fused projection, and turns dq and dk back there."""
    buffer = randn(2, 5, 100, dtype=dtype, grad=False)
    kernel = dispatch.select("rotary", "rotary", buffer.device, dtype)
    before = buffer.clone()
    for half in (9, 11):
        for view, copy in (
            (buffer[..., 3:69].unflatten(-1, (3, 22)), before[..., 3:69].unflatten(-1, (3, 22))),
            (buffer[..., 70:92], before[..., 70:92]),
        ):
            cos, sin = tables(5, half, dtype)
            wanted = pk.rotary(copy, cos, sin, interleaved=interleaved)
            assert kernel(view, cos, sin, None, interleaved, False, view) in (None, -1)
            assert torch.equal(view, wanted)
            back = torch.ops.palm_kernels.rotary(wanted, cos, sin, None, interleaved, True)
            kernel(view, cos, sin, None, interleaved, True, view)
            assert torch.equal(view, back)
            torch.testing.assert_close(view, copy, atol=16 * max(torch.finfo(dtype).eps, 1e-7), rtol=0)
            view.copy_(copy)
    assert torch.equal(buffer, before)


@pytest.mark.kernel
def test_never_aliases():
    x, cos_sin = randn(1, 4, 2, 6, grad=False), tables(4, 0)
    out = pk.rotary(x, *cos_sin)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


@pairing
def test_gradcheck(interleaved):
    x, cos_sin = randn(2, 3, 2, 7, dtype=torch.float64), tables(5, 3, torch.float64)
    gradcheck("rotary", x, *cos_sin, interleaved=interleaved)
    positions = torch.tensor([[4, 0, 2], [1, 1, 3]])
    gradcheck(
        "rotary", wide(x[:, :, 0].detach().requires_grad_()), *cos_sin, positions=positions, interleaved=interleaved
    )


@pytest.mark.kernel
@pairing
@every_dtype
def test_extreme_values(dtype, interleaved):
    big = torch.finfo(dtype).max / 4
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -big, big, 0.0, -0.0, 1e-7] * 3, dtype=dtype).view(1, 3, 8)
    check_op("rotary", x, *tables(3, 4, dtype), interleaved=interleaved)
    rest = pk.rotary(x, *tables(3, 1, dtype), interleaved=interleaved)[..., 2:]
    assert torch.equal(rest.nan_to_num(7.0), x[..., 2:].nan_to_num(7.0))


def test_repeatable():
    assert_bitwise_repeatable("rotary", randn(3, 70, 4, 64), *tables(70, 32))


def test_tables():
    cos, sin = pk.rotary_tables(3000, 64, base=500.0)
    angles = torch.arange(3000).double()[:, None] * 500.0 ** (-torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == torch.float32 and cos.shape == (3000, 32)
    assert torch.equal(cos, angles.cos().float()) and torch.equal(sin, angles.sin().float())
    assert pk.rotary_tables(0, 8)[0].shape == (0, 4) and pk.rotary_tables(4, 0, device="meta")[1].shape == (4, 0)
    with pytest.raises(ValueError, match="dim is 3"):
        pk.rotary_tables(4, 3)


@pytest.mark.kernel
def test_interleaved_is_a_permutation_of_halves():
    x, cos_sin = randn(2, 5, 3, 16, grad=False), tables(5, 8)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    assert torch.equal(pk.rotary(x, *cos_sin, interleaved=True)[..., order], pk.rotary(x[..., order], *cos_sin))


def test_tables_have_no_gradient_and_are_widened_beside_float64():
    cos, sin = (t.requires_grad_() for t in pk.rotary_tables(4, 6))
    x = randn(1, 4, 2, 6, dtype=torch.float64)
    grads = torch.autograd.grad(pk.rotary(x, cos, sin).sum(), (x, cos, sin), allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None
    assert torch.equal(pk.rotary(x, cos, sin), pk.rotary(x, cos.double(), sin.double()))


def test_registration():
    x, (cos, sin) = randn(2, 4, 3, 9), tables(6, 4)
    for positions in (None, torch.tensor([5, 0, 1, 1])):
        opcheck(torch.ops.palm_kernels.rotary.default, x, cos, sin, positions, False, False)
    opcheck(
        torch.ops.palm_kernels.rotary.default, x[:, :, 0], cos, sin, torch.ones(2, 4, dtype=torch.int32), True, True
    )


def test_compiles():
    cos, sin = tables(9, 4)
    assert_compiles("rotary", (randn(2, 4, 3, 9), cos, sin), (randn(3, 7, 2, 8), cos, sin))
    assert_compiles("rotary", (randn(2, 4, 8), cos, sin), positions=torch.tensor([5, 0, 1, 1]), interleaved=True)
    assert_compiles("rotary", (randn(2, 4, 8), cos, cos))


def test_autocast_and_reference_backend():
    x, (cos, sin) = randn(2, 4, 3, 8, grad=False), tables(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.rotary(x, cos, sin).dtype == torch.float32
        assert pk.rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    with pk.backend("reference"):
        assert torch.equal(pk.rotary(x, cos, sin), pk.reference.rotary(x, cos, sin))


@pytest.mark.kernel
def test_retain_graph_and_double_backward():
    x, cos_sin = randn(2, 4, 3, 8), tables(4, 4)
    out = pk.rotary(x, *cos_sin)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), x)[0])
    assert_refuses_double_backward("rotary", x, *cos_sin)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=name_of)
def test_bad_positions(kind):
    x, cos_sin = torch.ones(2, 3, 2, 8), tables(5, 4)
    with pytest.raises(ValueError, match=r"rotary: positions\[1\] is 5, cos and sin hold positions 0 to 4"):
        pk.rotary(x, *cos_sin, positions=torch.tensor([4, 5, -1], dtype=kind))
    with pytest.raises(ValueError, match=r"rotary: positions\[1, 2\] is -1"):
        pk.rotary(x, *cos_sin, positions=torch.tensor([[0, 1, 2], [0, 1, -1]], dtype=kind))


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETED, reason="a device assertion ends a CUDA context, the CPU raises ValueError")
@pytest.mark.parametrize("bad", [-1, 5])
def test_bad_positions_are_asserted(bad):
    x, cos_sin = torch.ones(2, 3, 2, 8), tables(5, 4)
    with pytest.raises(Exception, match="rotary: every position must be a row of cos and sin"):
        pk.rotary(x, *cos_sin, positions=torch.tensor([4, bad, 0]))


def test_errors():
    x, (cos, sin) = torch.ones(2, 3, 2, 8), tables(5, 4)
    with pytest.raises(ValueError, match="rotary: x has 3 tokens, cos and sin hold 2 positions"):
        pk.rotary(x, cos[:2], sin[:2])
    with pytest.raises(ValueError, match=r"rotary: x has shape \[2, 8\], need \[B,T,H,D\] or \[B,T,D\]"):
        pk.rotary(x[:, 0, 0], cos, sin)
    with pytest.raises(
        ValueError, match=r"rotary: cos has shape \[5, 4\], x has 6 dims a head: need at most 3 columns"
    ):
        pk.rotary(x[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"rotary: sin has shape \[5, 3\]"):
        pk.rotary(x, cos, sin[:, :3])
    with pytest.raises(ValueError, match=r"rotary: cos has shape \[4\], need \[length, half\]"):
        pk.rotary(x, cos[0], sin)
    with pytest.raises(ValueError, match=r"rotary: positions has shape \[2\], need \[T\] = \[3\]"):
        pk.rotary(x, cos, sin, positions=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"rotary: positions has shape \[1, 3\], need \[B,T\] = \[2, 3\]"):
        pk.rotary(x, cos, sin, positions=torch.tensor([[0, 1, 2]]))
    with pytest.raises(TypeError, match="rotary: positions is torch.float32, need int32 or int64"):
        pk.rotary(x, cos, sin, positions=torch.ones(3))
    with pytest.raises(TypeError, match="rotary: cos is torch.bfloat16, need float32"):
        pk.rotary(x.bfloat16(), cos.bfloat16(), sin)
    with pytest.raises(TypeError, match="rotary: x is torch.int64"):
        pk.rotary(x.long(), cos, sin)
    with pytest.raises(ValueError, match="sin is on meta"):
        pk.rotary(x, cos, sin.to("meta"))
    with pk.backend("triton"), pytest.raises(NotImplementedError, match="rotary: not served by backend 'triton'"):
        pk.rotary(x, cos, sin)


def test_meta_and_vmap():
    cos_sin = tables(4, 4)
    meta = [t.to("meta") for t in cos_sin]
    assert pk.rotary(torch.empty(3, 4, 2, 8, device="meta"), *meta).shape == (3, 4, 2, 8)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(lambda x: pk.rotary(x, *cos_sin))(randn(2, 1, 4, 8, grad=False))
