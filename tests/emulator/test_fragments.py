"""The tensor-core twins against tables of another source: tensor_layouts, which follows CUTLASS's traits, not our device.cuh.

In the emulator, or with PALM_KERNELS_TEST_DEVICE=cuda by nvcc on a GPU, where the same tests certify the twins.
"""

import ctypes

import emulator
import pytest
import torch

atoms = pytest.importorskip("tensor_layouts.atoms_nv")
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())]
DEVICE = torch.get_default_device()


@pytest.fixture(scope="module")
def probes():
    return ctypes.CDLL(str(emulator.probes(on_gpu=DEVICE.type == "cuda")))


def call(function, *args):
    """Call a probe; tensors go in as pointers."""
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def held(matrix, layout, values):
    """[32, values]: what every lane holds of a matrix, by a table from (lane, value) to its column-major index."""
    flat = matrix.t().contiguous().flatten()
    return torch.stack([torch.stack([flat[layout(t, v)] for v in range(values)]) for t in range(32)])


def integers(*shape):
    return torch.randint(-8, 8, shape).float()


@pytest.mark.parametrize("kind, name", enumerate(["BF16BF16", "F16F16", "TF32TF32"]))
def test_mma(probes, kind, name):
    K, dtype = (8, torch.float32) if kind == 2 else (16, (torch.bfloat16, torch.float16)[kind])
    atom = getattr(atoms, f"SM80_16x8x{K}_F32{name}F32_TN")
    a, b, c = integers(16, K), integers(8, K), integers(16, 8)
    registers = [
        held(x.to(dtype), layout, K * x.shape[0] // 32).contiguous().view(torch.int32)
        for x, layout in ((a, atom.a_layout), (b, atom.b_layout))
    ]
    d = held(c, atom.c_layout, 4).contiguous()
    call(probes.probe_mma, kind, *registers, d)
    assert torch.equal(d, held(a @ b.t() + c, atom.c_layout, 4))


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(probes, trans):
    """Lane l holds two neighbours of row l / 4 of each 8 x 8 matrix, or of its transpose: PTX ISA, ldmatrix."""
    tile = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    got = torch.empty(32, 4, dtype=torch.int32)
    call(probes.probe_ldmatrix, int(trans), tile, got)
    matrices = tile.transpose(1, 2) if trans else tile
    assert torch.equal(got.view(torch.int16).reshape(32, 4, 2).transpose(0, 1).reshape(4, 8, 8), matrices)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_through_tiles(probes, dtype, tf32):
    """Swizzled tiles, both kinds of right operand, accumulators as left operand; no key at the last row of v, no last column of k."""
    q, k, v = (integers(16, 64).to(dtype) for _ in range(3))
    scores, out = torch.empty(16, 16), torch.empty(16, 64)
    code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]
    call(probes.probe_attention, code, int(tf32), q, k, v, scores, out)
    kept_k, kept_v = k.clone(), v.clone()
    kept_k[:, -1], kept_v[-1] = 0, 0
    truth = q.float() @ kept_k.float().t()
    assert torch.equal(scores, truth)
    rounded = truth.to(dtype).float()
    if dtype == torch.float32 and tf32:  # integers up to 2048 are exact in tf32
        assert truth.abs().max() < 2048
    torch.testing.assert_close(out, rounded @ kept_v.float(), rtol=1e-6, atol=1e-3)


def test_split_float32_is_exact_to_float32(probes):
    q, k, v = (torch.randn(16, 64) for _ in range(3))
    errors = {}
    for tf32 in (0, 1):
        scores, out = torch.empty(16, 16), torch.empty(16, 64)
        call(probes.probe_attention, 0, tf32, q, k, v, scores, out)
        truth = q[:, :-1].double() @ k[:, :-1].double().t()
        errors[tf32] = ((scores - truth).norm() / truth.norm()).item()
    assert errors[0] < 1e-6 < 1e-4 < errors[1] < 2e-3, errors


@pytest.mark.parametrize("place", ["q", "v"])
def test_infinity_stays_infinity(probes, place):
    tensors = {"q": torch.ones(16, 64), "k": torch.ones(16, 64), "v": torch.ones(16, 64)}
    tensors[place][3, 5] = torch.inf
    scores, out = torch.empty(16, 16), torch.empty(16, 64)
    call(probes.probe_attention, 0, 0, *tensors.values(), scores, out)
    if place == "q":
        assert scores[3].isposinf().all() and scores.isposinf().sum() == 16 and not scores.isnan().any()
    else:
        assert out[:, 5].isposinf().all() and out.isposinf().sum() == 16 and not out.isnan().any()
