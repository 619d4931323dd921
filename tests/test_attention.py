"""attention: the dense kernels against reference.py over shapes, masks, strides and dtypes; hard cases; contract."""

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_refuses_double_backward,
    check_op,
    gradcheck,
    name_of,
    needs_float64,
    opcheck,
    permuted,
    randn,
    run,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import palm_kernels as pk
from palm_kernels import reference

# B, T, S, H, K, D: one element; T > S; T < S with groups; many heads on a tile edge; the largest D; a tail of every tile
SHAPES = [
    (2, 3, 3, 1, 1, 1),
    (2, 70, 50, 6, 2, 80),
    (1, 100, 300, 4, 4, 60),
    (1, 130, 130, 16, 1, 64),
    (1, 50, 60, 2, 1, 256),
    (3, 1, 9, 5, 1, 8),
]
if INTERPRETED:  # a tile takes milliseconds there
    SHAPES = [
        (2, 3, 3, 1, 1, 1),
        (2, 35, 50, 6, 2, 80),
        (1, 20, 140, 4, 1, 64),
        (1, 9, 20, 2, 1, 256),
        (3, 1, 9, 5, 1, 8),
    ]
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 5},
    "band": {"window": (3, 4)},
    "left": {"causal": True, "window": (6, -1)},
    "prefix": {"causal": True, "prefix_lengths": [4, 300, -1]},
    "prefix_window": {"causal": True, "window": 7, "prefix_lengths": [9, 2, 0]},
}


def qkv(B, T, S, H, K, D, dtype=torch.float32, **kwargs):
    heads = (K,) if K > 1 else ()
    return (
        randn(B, T, H, D, dtype=dtype, **kwargs),
        randn(B, S, *heads, D, dtype=dtype, **kwargs),
        randn(B, S, *heads, D, dtype=dtype, **kwargs),
    )


def bias(B, S, dtype=torch.float32, removed=3):
    x = randn(B, S, dtype=torch.float64 if dtype == torch.float64 else torch.float32).detach()
    x[:, ::removed] = -torch.inf
    return x.requires_grad_()


def options(name, B):
    kwargs = dict(OPTIONS[name])
    if "prefix_lengths" in kwargs:
        kwargs["prefix_lengths"] = torch.tensor(kwargs["prefix_lengths"][:B], dtype=torch.int32)
    return kwargs


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_of_zero_or_less(scale, dtype):
    check_op("attention", *qkv(2, 20, 30, 4, 1, 64, dtype), causal=True, scale=scale, return_lse=True)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_reference(option, dtype):
    for case, (B, T, S, H, K, D) in enumerate(SHAPES):
        kwargs = {"return_lse": True, **options(option, B)}
        for biased in (case % 2 == 1,) if INTERPRETED else (False, True):
            key_bias = bias(B, S, dtype) if biased else None
            check_op("attention", *qkv(B, T, S, H, K, D, dtype), key_bias=key_bias, **kwargs)


@pytest.mark.kernel
@given(data=st.data())
def test_any_shape_stride_and_mask(data):
    draw, ints = data.draw, st.integers
    dtype = draw(st.sampled_from(DTYPES))
    B, K, D = draw(ints(0, 3)), draw(ints(1, 3)), draw(ints(1, 70))
    T, S, H = draw(ints(0, 40)), draw(ints(0, 40)), K * draw(ints(1, 3))
    layouts = [draw(st.sampled_from([wide, permuted, lambda x: x])) for _ in range(3)]
    q, k, v = (f(x) for f, x in zip(layouts, qkv(B, T, S, H, K, D, dtype), strict=True))
    kwargs = {
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.1, 2 * D**-0.5])),
        "return_lse": True,
    }
    limit = ints(-1, 45)
    kwargs["window"] = draw(st.one_of(st.none(), st.tuples(limit, limit), *([ints(1, 45)] if kwargs["causal"] else [])))
    if kwargs["causal"] and draw(st.booleans()):
        kwargs["prefix_lengths"] = torch.tensor(draw(st.lists(ints(-2, 45), min_size=B, max_size=B)), dtype=torch.int32)
    if draw(st.booleans()):
        kwargs["key_bias"] = bias(draw(st.sampled_from([1, B])) if B else B, S, dtype, draw(ints(1, 4)))
    check_op("attention", q, k, v, **kwargs)


@needs_float64
@pytest.mark.kernel
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck(option):
    q, k, v = qkv(2, 5, 6, 4, 2, 3, torch.float64)
    visible = randn(2, 6, dtype=torch.float64).detach()
    visible[1, 2:5] = -torch.inf

    def both(q, k, v, kept):
        key_bias = torch.where(visible == -torch.inf, -torch.inf, kept)
        return pk.attention(q, k, v, key_bias=key_bias, return_lse=True, **options(option, 2))

    kept = visible.nan_to_num(0.0, 0.0, 0.0).requires_grad_()
    sees_all = not torch.isinf(both(q, k, v, kept)[1]).any()  # finite differences cannot pass through lse = -inf
    first = both if sees_all else lambda *a: both(*a)[0]
    assert torch.autograd.gradcheck(first, (q, k, v, kept), nondet_tol=0.0)


def test_gradcheck_scale_and_broadcast_bias():
    q, k, v = qkv(2, 4, 4, 3, 1, 5, torch.float64)
    gradcheck("attention", q, k, v, scale=0.7, key_bias=randn(1, 4, dtype=torch.float64))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_removed_keys_are_never_read(dtype):
    """NaN and inf under a bias of -inf reach nothing, and get gradient 0; the rest is what it would be without those keys."""
    q, k, v = qkv(2, 40, 60, 4, 1, 24, dtype)
    keep = torch.rand(2, 60) < 0.6
    keep[1] = False  # a row of the batch that sees nothing
    poisoned = [
        x.detach().masked_fill(~keep[..., None], bad).requires_grad_() for x, bad in ((k, torch.nan), (v, torch.inf))
    ]
    for causal in (False, True):
        outs, grads = run(pk.attention, (q, *poisoned), {"key_bias": keep, "causal": causal, "return_lse": True})
        clean, clean_grads = run(pk.attention, (q, k, v), {"key_bias": keep, "causal": causal, "return_lse": True})
        for a, b in zip((*outs, *grads), (*clean, *clean_grads), strict=True):
            assert torch.equal(a, b)
        assert not grads[1][~keep].any() and not grads[2][~keep].any() and not outs[0][1].any()
        assert (outs[1][1] == -torch.inf).all()


@pytest.mark.kernel
def test_removed_key_bias_gradient_is_zero():
    b = bias(2, 20)
    _, grads = run(pk.attention, qkv(2, 9, 20, 2, 1, 8), {"key_bias": b})
    assert not grads[3][:, ::3].any() and grads[3][:, 1::3].all()


@pytest.mark.kernel
def test_nothing_visible():
    """T > S under causal, all keys removed, no keys at all: 0, lse -inf, gradients 0, whatever the data."""
    q, k, v = qkv(1, 6, 2, 2, 1, 8)
    with torch.no_grad():
        q[:, :4] = torch.nan  # those queries see nothing
    outs, grads = run(pk.attention, (q, k, v), {"causal": True, "return_lse": True})
    assert not outs[0][:, :4].any() and (outs[1][..., :4] == -torch.inf).all() and outs[0].isfinite().all()
    assert not grads[0][:, :4].any() and all(g.isfinite().all() for g in grads)
    check_op("attention", *qkv(2, 3, 0, 2, 1, 8), return_lse=True)


@pytest.mark.kernel
def test_one_visible_key_has_no_score_gradient():
    """With all the weight on one key dP - delta cancels exactly: dq, dk and the bias gradient are 0, not rounding."""
    _, grads = run(pk.attention, qkv(2, 3, 1, 4, 1, 37), {"key_bias": randn(2, 1)})
    assert not grads[0].any() and not grads[1].any() and not grads[3].any() and grads[2].all()


@pytest.mark.kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_non_finite_data_reaches_who_sees_it(value):
    q, k, v = qkv(1, 6, 6, 2, 1, 8)
    with torch.no_grad():
        k[0, 3, 2] = value
    out, want = pk.attention(q, k, v), reference.attention(q, k, v)
    assert torch.equal(out.isnan(), want.isnan())
    causal = pk.attention(q, k, v, causal=True)
    assert torch.equal(causal[:, :3].isnan(), reference.attention(q, k, v, causal=True)[:, :3].isnan())


@pytest.mark.kernel
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinite_bias_propagates(value):
    q, k, v = qkv(1, 3, 4, 2, 1, 8, grad=False)
    b = torch.zeros(1, 4)
    b[0, 1] = value
    assert torch.equal(pk.attention(q, k, v, key_bias=b).isnan(), reference.attention(q, k, v, key_bias=b).isnan())


@pytest.mark.kernel
def test_finite_mask_of_other_libraries():
    """torch.finfo.min as a bias: beside visible keys it vanishes; alone it cancels (the float32 lse then holds nothing else, so
    the gradients of such a row are finite and no more)."""
    q, k, v = qkv(1, 3, 4, 2, 1, 8)
    lowest = torch.finfo(torch.float32).min
    check_op("attention", q, k, v, key_bias=torch.tensor([[0.0, lowest, 0.5, lowest]]))
    alone = {"key_bias": torch.full((1, 4), lowest)}
    check_op("attention", *(x.detach() for x in (q, k, v)), return_lse=True, **alone)
    assert all(g.isfinite().all() for g in run(pk.attention, (q, k, v), alone)[1])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype):
    """Slices of one fused projection, as the parallel block hands them out; permuted; one tensor twice; stride 0."""
    B, T, H, D = 2, 21, 4, 16
    fused = randn(B, T, (H + 2) * D + 7, dtype=dtype).detach()
    q, k, v = (
        fused[..., : H * D].view(B, T, H, D),
        fused[..., H * D : (H + 1) * D],
        fused[..., (H + 1) * D : (H + 2) * D],
    )
    check_op("attention", *(x.requires_grad_() for x in (q, k, v)), causal=True)
    check_op("attention", *(permuted(wide(x)) for x in qkv(2, 9, 12, 6, 3, 10, dtype)), causal=True)
    q, k, _ = qkv(2, 9, 12, 6, 3, 10, dtype)
    check_op("attention", q, k, k)
    same = randn(1, 1, 6, dtype=dtype).detach().expand(2, 12, 6).requires_grad_()
    check_op("attention", randn(2, 5, 3, 6, dtype=dtype), same, same)
    strided = randn(2, 6, 12, dtype=dtype).detach().transpose(1, 2).requires_grad_()
    check_op("attention", randn(2, 5, 3, 6, dtype=dtype), strided, strided)


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    storage = torch.from_numpy(np.zeros(2**31 + 64, dtype="uint16")).view(torch.bfloat16)
    q = storage.as_strided((1, 2, 2, 8), (0, 2**31 + 8, 8, 1))
    q.copy_(torch.randn(1, 2, 2, 8))
    check_op("attention", q.requires_grad_(), *qkv(1, 2, 3, 2, 1, 8, torch.bfloat16)[1:], causal=True)


@pytest.mark.kernel
def test_expanded_gradient():
    """sum().backward() hands out stride 0 everywhere."""
    q, k, v = qkv(2, 7, 7, 3, 1, 8)
    pk.attention(q, k, v).sum().backward()
    want = torch.autograd.grad(reference.attention(q, k, v).sum(), (q, k, v))
    for x, g in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(x.grad, g, rtol=1e-4, atol=1e-5)


@pytest.mark.kernel
def test_lse_alone_and_retain_graph():
    q, k, v = qkv(2, 7, 9, 3, 1, 8)
    out, lse = pk.attention(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.sum(), (q, k), retain_graph=True)
    want = torch.autograd.grad(reference.attention(q, k, v, return_lse=True)[1].sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out.sum(), (q, k, v)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_repeatable(dtype):
    """Long enough for several chunks of dK and dV and for every thread to have work."""
    kwargs = {"causal": True, "key_bias": bias(1, 700), "return_lse": True}
    assert_bitwise_repeatable("attention", *qkv(1, 700, 700, 12, 1, 32, dtype), **kwargs)
    assert_bitwise_repeatable("attention", *qkv(3, 90, 110, 4, 2, 20, dtype), window=(20, 30))


def test_memory_stays_linear():
    """Neither direction holds a [T,S] matrix: the scores alone would take 512 MB here."""
    import subprocess
    import sys

    program = (
        "import resource, torch, palm_kernels as pk\n"
        "q, k, v = (torch.randn(1, 4096, *s, requires_grad=True) for s in ((8, 32), (32,), (32,)))\n"
        "pk.attention(q[:, :64], k[:, :64], v[:, :64], causal=True).sum().backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pk.attention(q, k, v, causal=True).square().sum().backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100, f"{done.stdout} MB"


def test_registration():
    q, k, v = (x.detach() for x in qkv(2, 5, 6, 4, 2, 8))
    b = torch.randn(2, 6)
    out, lse = torch.ops.palm_kernels.attention_fwd(q, k, v, b, None, True, 0.3, -1, -1)
    opcheck(torch.ops.palm_kernels.attention_fwd.default, q, k, v, b, None, True, 0.3, -1, -1)
    opcheck(
        torch.ops.palm_kernels.attention_fwd.default,
        q,
        k,
        v,
        None,
        torch.tensor([1, 2], dtype=torch.int32),
        True,
        0.3,
        3,
        -1,
    )
    for bias_grad in (True, False):
        args = (out, lse, q, k, v, out, lse, b, None, True, 0.3, -1, -1, bias_grad)
        opcheck(torch.ops.palm_kernels.attention_bwd.default, *args)


def test_compiles():
    assert_compiles("attention", qkv(2, 5, 6, 4, 2, 8), qkv(3, 7, 9, 4, 2, 8), causal=True, return_lse=True)
    assert_compiles("attention", qkv(2, 5, 6, 4, 1, 8), key_bias=bias(2, 6), window=(2, 3))


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return pk.attention(q, k, v, causal=True)

    args = tuple(x.detach() for x in qkv(2, 5, 6, 4, 2, 8))
    exported = torch.export.export(Module(), args)
    torch.testing.assert_close(exported.module()(*args), pk.attention(*args, causal=True))


def test_checkpoint_and_autocast():
    from torch.utils.checkpoint import checkpoint

    q, k, v = qkv(1, 9, 9, 2, 1, 8)
    out = checkpoint(pk.attention, q, k, v, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(pk.attention(q, k, v).sum(), q)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.attention(q, k, v).dtype == torch.bfloat16
        assert pk.attention(*(x.double() for x in (q, k, v))).dtype == torch.float64


def test_dataloader_worker():
    """A forked worker may call the kernels after the parent used the thread pool."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return pk.attention(*(x.detach() for x in qkv(1, 64, 64, 4, 1, 32, seed=i)))

    want = [Rows()[i] for i in range(4)]
    got = list(torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=1, timeout=60))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = qkv(2, 5, 7, 4, 1, 8)
    product = 2 * 2 * 4 * 5 * 7 * 8
    with FlopCounterMode(display=False) as counter:
        out = pk.attention(q, k, v)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_refuses_double_backward():
    assert_refuses_double_backward("attention", *qkv(1, 3, 3, 1, 1, 4))


def test_transforms_and_meta():
    q, k, v = (x.detach() for x in qkv(1, 3, 3, 1, 1, 4))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: pk.attention(q, k, v).sum())(q)
    out, lse = pk.attention(*(x.to("meta") for x in (q, k, v)), return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 1, 3) and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"k": (1, 5, 3, 8), "v": (1, 5, 3, 8)},
            ValueError,
            "attention: k has 3 heads, q has 4: q heads must be a multiple",
        ),
        ({"k": (2, 5, 8), "v": (2, 5, 8)}, ValueError, "k has batch 2, q has 1"),
        ({"v": (1, 6, 8)}, ValueError, r"v has shape \[1, 6, 8\], need k's shape"),
        ({"k": (1, 5, 9), "v": (1, 5, 9)}, ValueError, "k has head dim 9, q has 8"),
        ({"q": (3, 4, 8)}, ValueError, r"q has shape \[3, 4, 8\], need \[B,T?"),
        ({"q": (1, 3, 4, 300), "k": (1, 5, 300), "v": (1, 5, 300)}, NotImplementedError, "head dim is 300"),
        ({"q": (1, 3, 4, 0), "k": (1, 5, 0), "v": (1, 5, 0)}, ValueError, "head dim is 0"),
        ({"window": 3}, ValueError, "an int window needs causal=True"),
        ({"window": 0, "causal": True}, ValueError, "window is 0"),
        ({"window": (1, -2)}, ValueError, r"window is \(1, -2\)"),
        ({"prefix_lengths": torch.zeros(1, dtype=torch.int32)}, ValueError, "prefix_lengths needs causal"),
        ({"prefix_lengths": torch.zeros(1), "causal": True}, TypeError, "prefix_lengths is torch.float32, need int32"),
        (
            {"key_bias": torch.zeros(1, 4)},
            ValueError,
            r"key_bias has shape \[1, 4\], need \[B,S\] or \[1,S\] = \[1, 5\]",
        ),
        ({"key_bias": torch.zeros(1, 5).half()}, TypeError, "key_bias is torch.float16, need float32"),
        ({"query_positions": torch.zeros(1, 3)}, NotImplementedError, "query_positions is reserved"),
    ],
)
def test_errors(change, error, message):
    shapes = {"q": (1, 3, 4, 8), "k": (1, 5, 8), "v": (1, 5, 8), **{n: x for n, x in change.items() if n in "qkv"}}
    tensors = [torch.zeros(shapes[n]) for n in "qkv"]
    with pytest.raises(error, match=message):
        pk.attention(*tensors, **{n: x for n, x in change.items() if n not in "qkv"})


def test_dtype_and_device_errors():
    q, k, v = (x.detach() for x in qkv(1, 3, 3, 1, 1, 4))
    with pytest.raises(TypeError, match="attention: k is torch.float64, q is torch.float32"):
        pk.attention(q, k.double(), v)
    with pytest.raises(ValueError, match="attention: v is on meta"):
        pk.attention(q, k, v.to("meta"))
