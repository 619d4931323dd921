"""decode_linear: the kernel against reference.py. The CPU alone has one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    ON_CPU_KERNELS,
    assert_bitwise_repeatable,
    assert_compiles,
    check_op,
    far_rows,
    name_of,
    opcheck,
    permuted,
    randn,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import palm_kernels as pk

pytestmark = pytest.mark.skipif(not ON_CPU_KERNELS, reason="decode_linear has CPU kernels only")
PAIRS = [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]  # x, weight
over_pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(name_of, p)))
ROWS = [*range(1, 18), 40]  # more than 16 are F.linear's
# (F, C): nothing, one, tails of every vector width, of 4 weight rows, of a cache line, several cuts of the columns
SIZES = [(0, 5), (5, 0), (1, 1), (1, 3), (3, 1), (4, 64), (7, 60), (9, 33), (50, 257), (130, 1000), (6, 9001)]


def made(shape, dtype, scale=1.0):
    return randn(*shape, dtype=dtype, grad=False, scale=scale)


def operands(rows, F, C, pair, bias=True):
    x, weight = made((rows, C), pair[0]), made((F, C), pair[1])
    return (x, weight), {"bias": made((F,), pair[0]) if bias else None}


@pytest.mark.kernel
@over_pairs
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def test_matches_reference(size, pair):
    for rows in (0, 1, 2, 3, 4, 7, 16, 17):
        args, kwargs = operands(rows, *size, pair, bias=rows % 2 == 1)
        check_op("decode_linear", *args, **kwargs)


@pytest.mark.kernel
@over_pairs
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, pair):
    args, kwargs = operands(rows, 37, 300, pair)
    check_op("decode_linear", *args, **kwargs)


@pytest.mark.kernel
@over_pairs
def test_each_output_is_its_own_product(pair):
    """One weight is not zero, in every place: a lane or row that goes elsewhere is seen, whatever its size."""
    rows, outputs, C = 5, 6, 75
    x = torch.arange(1, rows * C + 1).view(rows, C).remainder(251).to(pair[0])
    for c in range(C):
        weight = torch.zeros(outputs, C, dtype=pair[1])
        weight[c % outputs, c] = 1
        assert torch.equal(pk.decode_linear(x, weight), F.linear(x, weight.to(x.dtype))), c


@pytest.mark.kernel
@over_pairs
def test_strides(pair):
    x, weight = made((2, 3, 70), pair[0]), made((22, 70), pair[1])
    for shaped in (x, permuted(x), wide(x), x[:, :1].expand(2, 3, 70), x[0, 0], x[:, ::2]):
        check_op("decode_linear", shaped, weight)
    check_op("decode_linear", x.transpose(0, 2), made((5, 2), pair[1]))
    for offset in range(1, 4):
        check_op("decode_linear", wide(x, 9, offset), wide(weight, 9, offset), bias=wide(made((22,), pair[0])))
    check_op("decode_linear", x, weight[::3])
    check_op("decode_linear", x, made((70, 22), pair[1]).t())
    check_op("decode_linear", x, weight[:1].expand(9, 70), bias=made((1,), pair[0]).expand(9))
    check_op("decode_linear", x, weight, bias=made((22,), pair[1]))


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    check_op("decode_linear", made((3, 8), torch.bfloat16), far_rows(2, 8))
    check_op("decode_linear", far_rows(2, 8), made((3, 8), torch.bfloat16))


@pytest.mark.kernel
@given(
    leading=st.sampled_from([(1,), (2,), (3,), (4,), (5,), (2, 3), (13,), (4, 4), (17,), ()]),
    F=st.integers(0, 40),
    C=st.one_of(st.integers(0, 140), st.sampled_from([1023, 1025, 4100])),
    pair=st.sampled_from(PAIRS),
    layouts=st.tuples(*[st.sampled_from([wide, permuted, lambda x: x])] * 2),
    bias=st.booleans(),
)
def test_any_shape_and_stride(leading, F, C, pair, layouts, bias):
    x, weight = layouts[0](made((*leading, C), pair[0])), layouts[1](made((F, C), pair[1]))
    check_op("decode_linear", x, weight, bias=wide(made((F,), pair[0])) if bias else None)


@pytest.mark.kernel
@over_pairs
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_extreme_values(value, pair):
    for rows in (1, 6):
        for at in (0, 31, 74):
            (x, weight), _ = operands(rows, 7, 75, pair)
            x[rows - 1, at] = value
            check_op("decode_linear", x, weight)
            (x, weight), kwargs = operands(rows, 7, 75, pair)
            weight[5, at] = value
            check_op("decode_linear", x, weight)
            kwargs["bias"][2] = value
            check_op("decode_linear", x.abs(), weight.abs(), **kwargs)


@pytest.mark.kernel
@over_pairs
def test_range_of_the_dtypes(pair):
    """Products far beyond 16 bits in a sum that fits, and subnormal weights.

    That they cancel to the last bit is asked for where each product is exact in float32: of others a multiply-add rounds one of two.
    """
    x, weight = made((3, 64), pair[0]), made((5, 64), pair[1])
    x[:, 1::2] = x[:, ::2]
    for odd, of_x in ((-2.9e4, x), (-3e4, x.bfloat16().to(pair[0]))):
        weight[:, ::2], weight[:, 1::2] = 3e4, odd
        check_op("decode_linear", of_x, weight)
    check_op("decode_linear", made((3, 64), pair[0], 1e3), made((5, 64), torch.float32, 1e-6).to(pair[1]))


@pytest.mark.kernel
def test_rows_do_not_meet():
    """Each row's bits are the same whatever stands beside it, up to where the columns are cut."""
    (x, weight), _ = operands(16, 130, 250, (torch.float32,) * 2)
    whole = pk.decode_linear(x, weight)
    for r in range(16):
        assert torch.equal(pk.decode_linear(x[r], weight), whole[r])
    x[3] = torch.nan
    kept = [r for r in range(16) if r != 3]
    assert torch.equal(pk.decode_linear(x, weight)[kept], whole[kept])


@over_pairs
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_repeatable(rows, pair):
    args, kwargs = operands(rows, 301, 2100, pair)
    assert_bitwise_repeatable("decode_linear", *args, **kwargs)


def test_more_rows_are_torchs():
    (x, weight), kwargs = operands(17, 30, 40, (torch.float32,) * 2)
    assert torch.equal(pk.decode_linear(x, weight, **kwargs), F.linear(x, weight, kwargs["bias"]))
    with torch.profiler.profile() as profile:
        pk.decode_linear(x[:16], weight)
    assert not any("mm" in e.key for e in profile.key_averages())


def test_registration():
    for pair in PAIRS[1:6]:
        (x, weight), kwargs = operands(4, 7, 33, pair)
        opcheck(torch.ops.palm_kernels.decode_linear.default, x, weight, kwargs["bias"])
    opcheck(torch.ops.palm_kernels.decode_linear.default, made((2, 3, 9), torch.float32), wide(randn(4, 9)), None)


def test_compiles():
    small = operands(4, 9, 16, PAIRS[0])[0]
    assert_compiles("decode_linear", small, operands(7, 33, 20, PAIRS[0])[0], operands(30, 33, 20, PAIRS[0])[0])
    with torch.no_grad():
        assert_compiles("decode_linear", operands(4, 9, 16, PAIRS[-2])[0])


def test_export_and_flops():
    from torch.utils.flop_counter import FlopCounterMode

    class Head(torch.nn.Module):
        def forward(self, x, weight):
            return pk.decode_linear(x, weight)

    args, _ = operands(4, 9, 16, PAIRS[0])
    assert torch.equal(torch.export.export(Head(), args).module()(*args), pk.decode_linear(*args))
    with FlopCounterMode(display=False) as counter:
        pk.decode_linear(*args)
    assert counter.get_total_flops() == 2 * 4 * 9 * 16


def test_autocast_and_reference_backend():
    (x, weight), _ = operands(3, 5, 8, PAIRS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.decode_linear(x, weight).dtype == torch.bfloat16
    with pk.backend("reference"):
        assert torch.equal(pk.decode_linear(x, weight), F.linear(x, weight))


def test_errors():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    for bad, bias, message in (
        (torch.ones(3, 5), None, r"weight has shape \[3, 5\], need \[F, C\] = \[3, 4\]"),
        (torch.ones(4), None, r"weight has shape \[4\], need \[F, C\]"),
        (weight, torch.ones(4), r"bias has shape \[4\], need \[F\] = \[3\]"),
        (weight.to("meta"), None, "weight is on meta"),
    ):
        with pytest.raises(ValueError, match=f"decode_linear: {message}"):
            pk.decode_linear(x, bad, bias=bias)
    with pytest.raises(ValueError, match="no dimensions"):
        pk.decode_linear(torch.tensor(1.0), weight)
    with pytest.raises(TypeError, match=r"weight is torch.float64, need torch.float32 \(or bfloat16"):
        pk.decode_linear(x, weight.double())
    with pytest.raises(TypeError, match="weight is torch.float32"):
        pk.decode_linear(x.bfloat16(), weight)
    with pytest.raises(TypeError, match="x is torch.int64"):
        pk.decode_linear(x.long(), weight)
    with pytest.raises(TypeError, match="bias is torch.float64"):
        pk.decode_linear(x, weight, bias=torch.ones(3).double())
    for backend in ("triton", "cuda"):
        with pk.backend(backend), pytest.raises(NotImplementedError, match=f"not served by backend '{backend}'"):
            pk.decode_linear(x, weight)


def test_cuda_names_the_way_out():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.ones(2, 4, device="cuda"), torch.ones(3, 4, device="cuda")
        with pytest.raises(NotImplementedError, match=r"torch\.nn\.functional\.linear"):
            pk.decode_linear(x, weight)


def test_has_no_backward():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    for args in ((x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=r"decode_linear: has no backward; use torch\.no_grad\(\) or F\.linear"):
            pk.decode_linear(*args)
        with torch.no_grad():
            assert pk.decode_linear(*args).tolist() == [[4.0] * 3] * 2


def test_meta():
    assert pk.decode_linear(torch.empty(2, 3, 4, device="meta"), torch.empty(5, 4, device="meta")).shape == (2, 3, 5)
