"""swiglu, swiglu_packed: kernels against reference.py."""

import pytest
import torch
from helpers import (
    DTYPES,
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

# empty, no columns, one element, odd, tails of every vector width, several blocks a row, leading dimensions
SHAPES = [(0, 8), (3, 0), (1,), (3, 7), (2, 129, 33), (2, 70_001), (5, 2, 3, 64)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_matches_reference(shape, dtype):
    gate, up = randn(*shape, dtype=dtype, scale=3), randn(*shape, dtype=dtype)
    check_op("swiglu", gate, up)
    check_op("swiglu_packed", randn(*shape[:-1], 2 * shape[-1], dtype=dtype), gate_first=False)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype):
    x = randn(4, 6, 10, dtype=dtype)
    check_op("swiglu", wide(x), permuted(x))
    check_op("swiglu", x.detach().transpose(0, 2).requires_grad_(), randn(10, 6, 4, dtype=dtype))
    check_op("swiglu", x.detach()[:, :1, :].expand(4, 6, 10).requires_grad_(), wide(x))
    check_op("swiglu_packed", permuted(wide(x)))


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    check_op("swiglu", far_rows(2, 8).requires_grad_(), randn(2, 8, dtype=torch.bfloat16))


@pytest.mark.kernel
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    cols=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from([wide, permuted, lambda x: x])] * 2),
)
def test_any_shape_and_stride(shape, cols, dtype, layouts):
    gate, up = (layout(randn(*shape, cols, dtype=dtype)) for layout in layouts)
    check_op("swiglu", gate, up)


def test_gradcheck():
    gradcheck("swiglu", randn(3, 5, dtype=torch.float64), randn(3, 5, dtype=torch.float64))
    for gate_first in (True, False):
        gradcheck("swiglu_packed", randn(3, 10, dtype=torch.float64), gate_first=gate_first)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_extreme_values(dtype):
    big = torch.finfo(dtype).max
    gate = torch.tensor([-torch.inf, torch.inf, torch.nan, -big, big, -100.0, -88.5, 0.0, -0.0, 1e-7] * 3, dtype=dtype)
    check_op("swiglu", gate, torch.ones_like(gate))


def test_repeatable():
    assert_bitwise_repeatable("swiglu", randn(64, 999), randn(64, 999))


@pytest.mark.kernel
def test_same_tensor_twice_and_retain_graph():
    x = randn(4, 9)
    check_op("swiglu", x, x)
    out = pk.swiglu(x, x)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), x)[0])


def test_registration():
    gate, up = randn(4, 9), randn(4, 9)
    opcheck(torch.ops.palm_kernels.swiglu_fwd.default, gate, up)
    opcheck(torch.ops.palm_kernels.swiglu_bwd.default, randn(4, 9), gate, up)
    opcheck(torch.ops.palm_kernels.swiglu_packed_fwd.default, randn(4, 10), False)
    opcheck(torch.ops.palm_kernels.swiglu_packed_bwd.default, randn(4, 5), randn(4, 10), True)


def test_compiles():
    assert_compiles("swiglu", (randn(4, 9), randn(4, 9)), (randn(7, 33), randn(7, 33)))
    assert_compiles("swiglu_packed", (randn(4, 10),), (randn(3, 66),))


def test_autocast_and_reference_backend():
    gate, up = randn(4, 9), randn(4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.swiglu(gate, up).dtype == torch.bfloat16
    with pk.backend("reference"):
        assert torch.equal(pk.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_refuses_double_backward():
    assert_refuses_double_backward("swiglu", randn(2, 3), randn(2, 3))
    assert_refuses_double_backward("swiglu_packed", randn(2, 4))


def test_errors():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"swiglu: up has shape \[2, 3\]"):
        pk.swiglu(x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="swiglu: up is torch.float64"):
        pk.swiglu(x, x.double())
    with pytest.raises(TypeError, match="gate is torch.int64"):
        pk.swiglu(x.long(), x.long())
    with pytest.raises(ValueError, match="no dimensions"):
        pk.swiglu(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="up is on meta"):
        pk.swiglu(x, x.to("meta"))
    with pytest.raises(ValueError, match=r"need \[\.\.\., 2F\]"):
        pk.swiglu_packed(torch.ones(2, 3))
    with pk.backend("triton"), pytest.raises(NotImplementedError, match="swiglu: not served by backend 'triton'"):
        pk.swiglu(x, x)


def test_meta_and_vmap():
    assert pk.swiglu(torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta")).shape == (3, 4)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(pk.swiglu)(randn(2, 3, grad=False), randn(2, 3, grad=False))
