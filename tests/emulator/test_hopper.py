"""Hopper's instructions against layouts written from CUTLASS's canonical forms, not from hopper.cuh, and its attention kernel.

In the emulator, or with PALM_KERNELS_TEST_DEVICE=cuda by nvcc on a GPU of compute capability 9.0.
"""

import ctypes
import pathlib
import re
import sys

import emulator
import pytest
import torch

from palm_kernels import reference

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from helpers import assert_close

DEVICE = torch.get_default_device()
other_gpu = DEVICE.type == "cuda" and torch.cuda.get_device_capability() != (9, 0)
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not()),
    pytest.mark.skipif(other_gpu, reason="not a Hopper"),
]
SEEDS = (0,) if DEVICE.type == "cuda" else (0, 1, 3)  # 3: copies land at once, products when they are waited for


def load(path):
    library = ctypes.CDLL(str(path))
    for name in ("probe_wgmma", "probe_box", "probe_attention"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def probes():
    return load(
        emulator.probes("hopper_probes", on_gpu=DEVICE.type == "cuda", arch="-gencode=arch=compute_90a,code=sm_90a")
    )


def call(function, *args):
    """Call a probe; tensors go in as pointers, lists as arrays on the host."""
    said = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args))
    if said:
        raise RuntimeError(said.decode())


def ints(*values, type=ctypes.c_int):
    return (type * len(values))(*values)


# ---- instructions
def swizzled(byte):
    """CuTe's Swizzle<3, 4, 3>: bits 4 to 6 of an address ^= bits 7 to 9."""
    return byte ^ (byte >> 7 & 7) << 4


def place(image, start, matrix, *, along_k, lead, stride):
    """Put matrix [m or n, k] into shared memory's image by the canonical layouts of 128 bytes, of which T = 8 numbers are one unit.

    Along K: ((8, m), (T, 2 k)) : ((8 T, stride), (1, T)); along M or N: ((T, 8, m), (8, k)) : ((1, T, lead), (8 T, stride)).
    """
    for i, row in enumerate(matrix):
        for k, x in enumerate(row):
            if along_k:
                byte = i % 8 * 128 + i // 8 * stride + k * 2
            else:
                byte = i % 64 * 2 + i // 64 * lead + k % 8 * 128 + k // 8 * stride
            image[swizzled(start + byte) // 2] = x


def accumulators(atoms, n, d):
    """[128, n / 2]: what every thread of a warpgroup holds of d [64, n]."""
    layout = atoms.SM90_64x256x16_F32F16F16_SS.c_layout  # smaller ones are its first values
    flat = d.t().contiguous().flatten()
    return torch.stack([flat[[layout(t, v) for v in range(n // 2)]] for t in range(128)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [64, 80, 128, 256])
def test_wgmma(probes, n, seed, monkeypatch):
    """d + a b: with a in registers b stands along N, else both along K and in the middle of their 128 bytes."""
    atoms = pytest.importorskip("tensor_layouts.atoms_nv")
    monkeypatch.setenv("PALM_EMULATOR_SEED", str(seed))
    a, b, d = (torch.randint(-8, 8, shape).float() for shape in ((64, 16), (n, 16), (64, n)))
    image = torch.full((32768,), torch.nan, dtype=torch.float16)
    rows, registers = n in (64, 256), None
    if rows:
        place(image, 2048, b, along_k=False, lead=3072, stride=1024)
        flat = a.half().reshape(4, 16, 16).transpose(1, 2).reshape(4, 256)  # column-major, a warp each
        layout = atoms.SM80_16x8x16_F32F16F16F32_TN.a_layout
        registers = torch.stack([flat[t // 32][[layout(t % 32, v) for v in range(8)]] for t in range(128)]).contiguous()
        places = ints(0, 0, 0, 2048, 3072, 1024)
    else:
        place(image, 1024 + 32, a, along_k=True, lead=0, stride=1024)
        place(image, 16384 + 64, b, along_k=True, lead=0, stride=2048)
        places = ints(1024 + 32, 0, 1024, 16384 + 64, 0, 2048)
    got = accumulators(atoms, n, d).contiguous()
    call(probes.probe_wgmma, n, image, registers, places, got)
    assert torch.equal(got, accumulators(atoms, n, d + a @ b.t()))


@pytest.mark.parametrize("seed", SEEDS)
def test_box(probes, seed, monkeypatch):
    """A box over the edges of a strided tensor: zeros beyond them, rows of 128 bytes, swizzled."""
    monkeypatch.setenv("PALM_EMULATOR_SEED", str(seed))
    x = torch.randn(2, 20, 3, 128).half()[:, :, :, :96].transpose(1, 2)  # [batch, head, token, 96], token stride 384
    batch, head, token, _ = x.stride()
    out = torch.empty(24 * 64, dtype=torch.float16)
    size = ints(96, 20, 3, 2, type=ctypes.c_uint64)
    stride = ints(2 * token, 2 * head, 2 * batch, type=ctypes.c_uint64)
    call(probes.probe_box, x, size, stride, ints(64, 24, 1, 1), ints(64, 7, 2, 1), out)
    box = torch.zeros(24, 64, dtype=torch.float16)
    box[:13, :32] = x[1, 2, 7:, 64:]
    want = torch.empty_like(out)
    for byte in range(0, 24 * 128, 2):
        want[swizzled(byte) // 2] = box.flatten()[byte // 2]
    assert torch.equal(out, want)


# ---- attention
class Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "token", "head"))]


class Attention(ctypes.Structure):  # csrc/ops.h
    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((n, ctypes.c_int64) for n in "BTSHKD"),
        *((n, ctypes.c_bool) for n in ("causal", "tf32")),
        ("scale", ctypes.c_double),
        *((n, ctypes.c_int64) for n in ("left", "right")),
        *((n, Heads) for n in ("q", "k", "v", "out", "lse")),
        ("key_bias", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("bias_batch", "bias_token")),
        *((n, ctypes.c_void_p) for n in ("prefix_lengths", "cu_q", "cu_k", "cache_lengths")),
        *((n, ctypes.c_int64) for n in ("q_rows", "k_rows")),
        *((n, Heads) for n in ("dout", "dlse", "dq", "dk", "dv")),
        ("dbias", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("dbias_batch", "dbias_token")),
    ]


def heads(x):
    return Heads(x.data_ptr(), x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def attention(probes, q, k, v, *, causal=False, window=(-1, -1), scale=None, arch=90, **pointers):
    packed = q.dim() == 3
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.nan)
    p = Attention()
    p.dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[q.dtype]
    p.H, p.K, p.D = q.shape[-2], k.shape[-2], q.shape[-1]
    p.causal, (p.left, p.right), p.scale = causal, window, p.D**-0.5 if scale is None else scale
    p.q, p.k, p.v, p.out = map(heads, (q, k, v, out))
    p.lse = Heads(lse.data_ptr(), 0 if packed else lse.stride(0), lse.stride(-1), lse.stride(-2))
    for name, x in pointers.items():
        setattr(p, name, x.data_ptr())
    if packed:
        p.B, p.q_rows, p.k_rows = len(pointers["cu_q"]) - 1, len(q), len(k)
    else:
        (p.B, p.T), p.S = q.shape[:2], k.shape[1]
    call(probes.probe_attention, ctypes.byref(p), arch)
    return out, lse


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def leaves(tokens, keys, H, K, D, dtype, batch=()):
    return (torch.randn(*batch, n, h, D).to(dtype) for n, h in ((tokens, H), (keys, K), (keys, K)))


DENSE = {  # B, T, S, H, K, options
    "one": (1, 1, 1, 1, 1, {}),
    "plain": (2, 70, 300, 2, 1, {"scale": 0.3}),
    "long": (1, 130, 900, 1, 1, {"causal": True}),  # the ring turns
    "heads": (2, 45, 290, 6, 2, {"causal": True}),  # 128 rows are no whole tokens
    "more queries": (1, 300, 90, 2, 1, {"causal": True}),  # the first ones see nothing
    "window": (1, 200, 420, 2, 2, {"window": (37, 5)}),
    "prefix": (3, 90, 90, 4, 2, {"causal": True, "prefix_lengths": torch.tensor([0, 33, 200]).int()}),
}
PACKED = {"none": {}, "causal": {"causal": True}, "window": {"causal": True, "window": (20, -1)}}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", DENSE)
def test_dense(probes, name, D, seed, monkeypatch):
    monkeypatch.setenv("PALM_EMULATOR_SEED", str(seed))
    B, T, S, H, K, options = DENSE[name]
    dtype = (torch.bfloat16, torch.float16)[seed % 2]
    q, k, v = leaves(T, S, H, K, D, dtype, (B,))
    k = torch.cat([k, k], -1)[..., D:]  # a slice of wider rows
    options = {n: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    ours = attention(probes, q, k, v, **options)
    spec = {**options, "return_lse": True}
    truth = reference.attention(q.double(), k.double(), v.double(), **spec)
    for x, y, z in zip(ours, reference.attention(q, k, v, **spec), truth, strict=True):
        assert_close(x, y, z, dtype, what=name)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", PACKED)
def test_packed(probes, name, D, seed, monkeypatch):
    """Sequences of no queries, of no keys; NaN in one stays in it, though its rows share tiles with others."""
    monkeypatch.setenv("PALM_EMULATOR_SEED", str(seed))
    cu_q, cu_k = offsets([5, 0, 140, 31, 9]), offsets([77, 12, 0, 300, 9])
    dtype = (torch.float16, torch.bfloat16)[seed % 2]
    q, k, v = leaves(int(cu_q[-1]), int(cu_k[-1]), 6, 2, D, dtype)
    k[77:89] = v[77:89] = v[-9:] = torch.nan  # keys of the second and the last sequence
    ours = attention(probes, q, k, v, cu_q=cu_q, cu_k=cu_k, **PACKED[name])
    spec = {**PACKED[name], "return_lse": True}
    k, v = k.nan_to_num(), v.nan_to_num()
    truth = reference.attention_varlen(q.double(), k.double(), v.double(), cu_q, cu_k, **spec)
    yardstick = reference.attention_varlen(q, k, v, cu_q, cu_k, **spec)
    assert ours[0][-9:].isnan().all()
    for x, y, z in zip(ours, yardstick, truth, strict=True):
        rows = (slice(None), slice(-9)) if x.dim() == 2 else slice(-9)
        assert_close(x[rows], y[rows], z[rows], dtype, what=name)


def test_others_are_left_to_the_general_kernel(probes):
    q, k, v = leaves(8, 8, 2, 1, 64, torch.bfloat16, (2,))
    attention(probes, q, k, v)
    refused = {
        "another chip": {"arch": 80},
        "a bias": {"key_bias": torch.zeros(2, 8)},
        "a scale that is not positive": {"scale": 0.0},
        "float32": {"q": q.float(), "k": k.float(), "v": v.float()},
        "another head dim": {"q": q[..., :56], "k": k[..., :56], "v": v[..., :56]},
        "a misaligned start": {"k": torch.cat([k, k], -1)[..., 1:65]},
        "a misaligned stride": {"v": torch.cat([v, v[..., :4]], -1)[..., :64]},
        "one batch entry as two": {"k": k[:1].expand(2, -1, -1, -1)},
        "no keys": {"k": k[:, :0], "v": v[:, :0]},
    }
    for what, changes in refused.items():
        with pytest.raises(RuntimeError, match="not served"):
            attention(probes, **{"q": q, "k": k, "v": v, **changes})
            pytest.fail(what)


# What stands in attention_hopper.cu, what is planted, what a failure under one of the schedules says.
MISTAKES = {
    "keys not waited for": ("      mbarrier_wait(ring.k_full[stage.index], stage.parity);\n", "", "more arrivals"),
    "stage not empty": ("      mbarrier_wait(ring.k_empty[k.index], k.parity);\n", "", "more arrivals"),
    "released too early": (
        "      wgmma_wait<0>(o);\n      release(ring.v_empty[before.index]);\n",
        "      release(ring.v_empty[before.index]);\n      wgmma_wait<0>(o);\n",
        "budget",
    ),
    "products not waited for": ("wgmma_wait<1>(scores)", "wgmma_wait<2>(scores)", "budget"),
    "wrong descriptor": ("BN * 128, 1024)", "1024, 1024)", "budget"),
    "no proxy fence": ("  wait_copies<0>();\n  fence_proxy_async();\n", "  wait_copies<0>();\n", "finite"),
    "no wgmma fence": ("      wgmma_fence(scores);\n", "", "wgmma.fence"),
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="mistakes are for the emulator")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_seen(name, tmp_path, monkeypatch):
    right, wrong, said = MISTAKES[name]
    tree = emulator.changed(tmp_path, "attention_hopper.cu", right, wrong)
    probes = load(emulator.probes("hopper_probes", on_gpu=False, tree=tree))
    failures = []
    for seed in range(5):
        try:
            test_dense(probes, "long", 128, seed, monkeypatch)
        except (RuntimeError, AssertionError) as e:
            failures.append(str(e))
    assert any(re.search(said, f) for f in failures), failures
