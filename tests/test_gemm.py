"""GEMMs in a dtype that torch has only a scalar loop for: widened in pieces, right for every shape, layout and output."""

import pytest
import torch
from helpers import check_op, randn
from test_parallel_block import block

from palm_kernels import gemm


@pytest.fixture
def widening(monkeypatch):
    """Every machine as one without AVX-512, and pieces so small that each side is cut."""
    monkeypatch.setattr(gemm, "_scalar_loop", lambda dtype: dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(gemm, "PIECE", 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 3, 7), (3, 40, 7), (3, 7, 40), (1, 1, 1), (5, 0, 3), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_products(widening, shape, dtype, turned):
    M, K, N = shape
    a, b, x = (torch.randn(*s).to(dtype) for s in ((M, K), (K, N), (M, N)))
    a, b = (a.t().contiguous().t(), b.t().contiguous().t()) if turned else (a, b)
    exact = a.double() @ b.double()
    assert gemm.widens(a) and not gemm.widens(a.double())
    out = torch.full((M, 2 * N), torch.nan, dtype=dtype)[:, ::2]
    assert gemm.mm(a, b, out) is out
    torch.testing.assert_close(out, exact.to(dtype))
    torch.testing.assert_close(gemm.addmm(x[0], a, b, out), (exact + x[0]).to(dtype))
    total = torch.randn(M, N)
    expected = (total + exact).float()
    torch.testing.assert_close(gemm.addmm(total, a, b, total), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ops_on_it(widening, dtype):
    """The ops that have GEMMs keep to the error budget."""
    hidden, head, bias = (randn(*shape, dtype=dtype) for shape in ((33, 24), (50, 24), (50,)))
    target = torch.randint(50, (33,)).masked_fill(torch.rand(33) < 0.2, -100)
    check_op("linear_cross_entropy", hidden, head, target, linear_bias=bias, z_loss=1e-3)
    tensors, sizes = block(2, 7, 12, 3, 1, 8, 20, dtype=dtype)
    check_op("parallel_block", *tensors, **sizes)
