"""parallel_block against reference.py: outputs and every gradient, each option, memory, contract."""

import functools

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_compiles,
    assert_refuses_double_backward,
    check_op,
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
from palm_kernels import reference

OPTIONS = {
    "default": {},
    "layer_norm": {"norm": "layer_norm", "causal": False, "eps": 1e-5, "norm_offset": 0.0},
    "window": {"window": 3, "interleaved": True},
    "prefix": {"prefix_lengths": [2, 0, 5]},
    "bias": {"key_bias": True},
    "positions": {"positions": True, "interleaved": True},
}
# B, T, C, H, K, D, F: several heads; grouped, H D != C; one element of everything; no tokens; no feed-forward part
SHAPES = [
    (2, 7, 12, 3, 1, 8, 20),
    (1, 33, 16, 4, 2, 6, 9),
    (1, 1, 3, 1, 1, 2, 1),
    (2, 0, 4, 2, 1, 4, 3),
    (1, 5, 8, 2, 2, 4, 0),
]


def block(B, T, C, H, K, D, F, dtype=torch.float32, rotated=None):
    """x, norm_weight, w_in, w_out, cos, sin and the sizes."""

    def weight(rows, cols):
        return randn(rows, cols, dtype=dtype, scale=max(rows, cols) ** -0.5)  # amplifies neither way

    tables = pk.rotary_tables(T + 3, D // 2 * 2 if rotated is None else rotated)
    tables = [t.double() if dtype == torch.float64 else t for t in tables]
    tensors = [randn(B, T, C, dtype=dtype), randn(C, dtype=dtype, scale=0.1)]
    tensors += [weight((H + 2 * K) * D + 2 * F, C), weight(C, H * D + F), *tables]
    return tensors, {"heads": H, "kv_heads": K, "head_dim": D}


def options(name, B, T, dtype):
    kwargs = dict(OPTIONS[name])
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if "key_bias" in kwargs:
        kwargs["key_bias"] = randn(B, T, dtype=wide_dtype)
    if "positions" in kwargs:
        kwargs["positions"] = torch.arange(T).flip(0) + 2
    if "prefix_lengths" in kwargs:
        kwargs["prefix_lengths"] = torch.tensor(kwargs["prefix_lengths"][:B], dtype=torch.int32)
    return kwargs


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_reference(option, dtype):
    for shape in SHAPES:
        tensors, sizes = block(*shape, dtype)
        check_op("parallel_block", *tensors, **sizes, **options(option, *shape[:2], dtype))


@given(data=st.data())
def test_any_size_and_stride(data):
    ints = st.integers
    B, T, C, K, D, F = (data.draw(ints(*r)) for r in ((1, 3), (1, 20), (8, 40), (1, 2), (1, 24), (0, 30)))
    H, dtype = K * data.draw(ints(1, 3)), data.draw(st.sampled_from(DTYPES))
    tensors, sizes = block(B, T, C, H, K, D, F, dtype, rotated=data.draw(ints(0, D // 2)) * 2)
    for i in (0, 2, 3):
        tensors[i] = data.draw(st.sampled_from([wide, permuted, lambda x: x]))(tensors[i])
    kwargs = options(data.draw(st.sampled_from(list(OPTIONS))), B, T, dtype)
    check_op("parallel_block", *tensors, **sizes, **kwargs)


@pytest.mark.parametrize("option", [*OPTIONS, "no_gain", "grouped"])
def test_gradcheck(option):
    H, K = (4, 2) if option == "grouped" else (2, 1)
    (x, norm_weight, *weights, cos, sin), sizes = block(2, 4, 6, H, K, 4, 3, torch.float64)
    kwargs = options(option, 2, 4, torch.float64) if option in OPTIONS else {}
    leaves = {"x": x, "w_in": weights[0], "w_out": weights[1]}
    if option != "no_gain":
        leaves["norm_weight"] = norm_weight
    if "key_bias" in kwargs:
        leaves["key_bias"] = kwargs.pop("key_bias")

    def call(*values):
        given = {"norm_weight": None, **dict(zip(leaves, values, strict=True))}
        return pk.parallel_block(**given, cos=cos, sin=sin, **sizes, **kwargs)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), nondet_tol=0.0)


@pytest.mark.parametrize("frozen", ["x", "norm", "in", "out", "x norm in", "in out norm bias", "x norm in out"])
def test_only_what_is_wanted(frozen):
    """Frozen tensors get no gradient and leave the others' as they were."""
    tensors, sizes = block(2, 7, 12, 3, 1, 8, 20)
    bias = randn(2, 7)
    leaves, kwargs = [*tensors[:4], bias], {**sizes, "key_bias": bias}
    everything = run(pk.parallel_block, tensors, kwargs)[1]
    for leaf, name in zip(leaves, ("x", "norm", "in", "out", "bias"), strict=True):
        leaf.requires_grad_(name not in frozen.split())
    grads = iter(run(pk.parallel_block, tensors, kwargs)[1])
    for x, want in zip(leaves, everything, strict=True):
        if x.requires_grad:
            assert torch.equal(next(grads), want)


def test_float32_gain_and_no_gain():
    tensors, sizes = block(2, 7, 12, 3, 1, 8, 20, torch.bfloat16)
    tensors[1] = randn(12, scale=0.1)
    check_op("parallel_block", *tensors, **sizes)
    for norm in ("rms_norm", "layer_norm"):
        check_op("parallel_block", tensors[0], None, *tensors[2:], **sizes, norm=norm)


def _strided(x):
    """The same values with a last dimension that is not contiguous."""
    return x.detach().unsqueeze(-1).repeat_interleave(2, -1)[..., 0].requires_grad_(x.requires_grad)


def test_arguments_with_strided_last_dimensions():
    tensors, sizes = block(4, 7, 12, 3, 1, 8, 20)
    prefix, positions = torch.tensor([3, 0, 7, 1], dtype=torch.int32), torch.arange(7).flip(0)
    kwargs = {"key_bias": _strided(randn(4, 7)), "positions": _strided(positions), "prefix_lengths": _strided(prefix)}
    check_op("parallel_block", *map(_strided, tensors), **sizes, **kwargs)
    kwargs = {"prefix_lengths": prefix[:1].expand(4), "positions": positions[:1].expand(4, 7), "key_bias": randn(1, 7)}
    tensors[1] = tensors[1].detach()[:1].expand(12).requires_grad_()
    check_op("parallel_block", *tensors, **sizes, **kwargs)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e4])
def test_removed_keys_are_never_read(junk):
    """Padding may hold anything: with a bias of -inf it reaches no other token, forward or backward."""
    tensors, sizes = block(2, 6, 8, 2, 1, 4, 5)
    keep = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    dout = keep[..., None].expand(2, 6, 8).float()
    want, want_grads = run(pk.parallel_block, tensors, {**sizes, "key_bias": keep}, [dout])
    with torch.no_grad():
        tensors[0][1, :2] = junk
    got, got_grads = run(pk.parallel_block, tensors, {**sizes, "key_bias": keep}, [dout])
    assert torch.equal(got[0][keep], want[0][keep]) and torch.equal(got_grads[0][keep], want_grads[0][keep])


def test_keeps_less_than_half_of_what_plain_pytorch_keeps():
    sizes = {"heads": 4, "kv_heads": 1, "head_dim": 16}

    def bytes_saved(function):
        seen = {}

        def keep(t):
            seen[t.untyped_storage().data_ptr()] = (
                t.untyped_storage().nbytes(),
                t,
            )  # alive, so that no address comes twice
            return t

        tensors, _ = block(2, 64, 64, *sizes.values(), 256)
        known = {t.untyped_storage().data_ptr() for t in tensors[1:]}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = function(*tensors, **sizes)
        assert out.requires_grad
        return sum(n for p, (n, _) in seen.items() if p not in known)

    def composition(x, norm_weight, w_in, w_out, cos, sin, *, ops, heads, kv_heads, head_dim):
        split = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, 256, 256]
        q, k, v, gate, up = (ops.rms_norm(x, norm_weight, offset=1.0) @ w_in.t()).split(split, -1)
        q = ops.rotary(q.unflatten(-1, (heads, head_dim)), cos, sin)
        k = ops.rotary(k, cos, sin)
        if ops is pk:
            mixed = pk.attention(q, k, v, causal=True)
        else:
            q, k, v = q.transpose(1, 2), k[:, None], v[:, None]
            sdpa = torch.nn.functional.scaled_dot_product_attention
            mixed = sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        return x + torch.cat((mixed.flatten(-2), ops.swiglu(gate, up)), -1) @ w_out.t()

    ours = bytes_saved(pk.parallel_block)
    assert ours <= 0.5 * bytes_saved(functools.partial(composition, ops=reference))
    assert ours <= 0.65 * bytes_saved(functools.partial(composition, ops=pk))


def test_repeatable_and_retain_graph():
    tensors, sizes = block(2, 40, 32, 4, 1, 16, 64)
    first, again = (run(pk.parallel_block, tensors, sizes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True))
    out = pk.parallel_block(*tensors, **sizes)
    grads = [torch.autograd.grad(out.sum(), tensors[:4], retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_inference_equals_training():
    tensors, sizes = block(2, 9, 12, 3, 1, 8, 20)
    with torch.no_grad():
        assert torch.equal(
            pk.parallel_block(*tensors, **sizes), pk.parallel_block(*(t.detach() for t in tensors), **sizes)
        )
        inference = pk.parallel_block(*tensors, **sizes)
    assert torch.equal(inference, pk.parallel_block(*tensors, **sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_autocast(norm, dtype):
    """The products run in its dtype, norm and residual in x's; held to the budget of the plain composition under autocast."""
    tensors, sizes = block(2, 9, 16, 3, 1, 8, 20)
    kwargs = {**sizes, "norm": norm, "key_bias": randn(2, 9)}
    dout = [torch.randn(2, 9, 16)]
    truth = run(reference.parallel_block, tensors, kwargs, dout, to=torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        ours, yardstick = (run(f, tensors, kwargs, dout) for f in (pk.parallel_block, reference.parallel_block))
    assert len(ours[1]) == 5
    for a, b, c in zip((*ours[0], *ours[1]), (*yardstick[0], *yardstick[1]), (*truth[0], *truth[1]), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, c, dtype)
    out = pk.parallel_block(*tensors, **kwargs)
    want = torch.autograd.grad(out.sum(), tensors[:4], retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        inside = torch.autograd.grad(out.sum(), tensors[:4])
    assert all(torch.equal(a, b) for a, b in zip(inside, want, strict=True))


def test_registration():
    (x, g, w_in, w_out, cos, sin), _ = block(2, 5, 6, 2, 1, 4, 3)
    options = (2, 1, 4, "rms_norm", 1e-6, 1.0, True, -1, -1, False)
    tensors = (x, g, w_in, w_out, cos, sin, None, torch.randn(2, 5), None)
    for save in (True, False):
        opcheck(torch.ops.palm_kernels.parallel_block_fwd.default, *tensors, *options, save)
    detached = tuple(t.detach() if t is not None else None for t in tensors)
    out, *kept = torch.ops.palm_kernels.parallel_block_fwd(*detached, *options, True)
    for wants in ([True] * 5, [False, True, False, True, False]):
        opcheck(torch.ops.palm_kernels.parallel_block_bwd.default, out, *tensors, *kept, *options, wants)


def test_compiles_and_exports():
    tensors, sizes = block(2, 5, 8, 2, 1, 4, 3)
    other, _ = block(3, 7, 8, 2, 1, 4, 3)
    assert_compiles("parallel_block", tensors, other, **sizes)
    x, norm_weight, w_in, w_out, cos, _ = tensors
    assert_compiles("parallel_block", (*tensors[:5], cos), **sizes, key_bias=randn(2, 5), positions=torch.arange(5))

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList([norm_weight, w_in, w_out])

        def forward(self, x):
            return pk.parallel_block(x, *self.weights, *tensors[4:], **sizes)

    exported = torch.export.export(Module(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), pk.parallel_block(*tensors, **sizes))


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    B, T, C, H, K, D, F = 2, 5, 8, 2, 1, 4, 3
    tensors, sizes = block(B, T, C, H, K, D, F)
    gemms, product = 2 * B * T * C * ((H + 2 * K) * D + 2 * F + H * D + F), 2 * B * H * T * T * D
    with FlopCounterMode(display=False) as counter:
        out = pk.parallel_block(*tensors, **sizes)
    assert counter.get_total_flops() == gemms + 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * gemms + 5 * product


def test_refuses_double_backward():
    tensors, sizes = block(1, 3, 4, 1, 1, 2, 2)
    assert_refuses_double_backward("parallel_block", *tensors, **sizes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"w_in": (31, 8)},
            ValueError,
            r"w_in has shape \[31, 8\], need \[\(H\+2K\)\*D \+ 2F, C\] = \[16 \+ 2F, 8\] for heads=2",
        ),
        ({"w_in": (22, 7)}, ValueError, r"w_in has shape \[22, 7\]"),
        ({"w_out": (8, 12)}, ValueError, r"w_out has shape \[8, 12\], need \[C, H\*D \+ F\] = \[8, 11\]"),
        ({"norm_weight": (9,)}, ValueError, r"norm_weight has shape \[9\]"),
        ({"x": (5, 8)}, ValueError, r"x has shape \[5, 8\], need \[B,T,C\]"),
        ({"cos": (4, 2), "sin": (4, 2)}, ValueError, "x has 5 tokens, cos and sin hold 4 positions"),
        ({"cos": (9, 3), "sin": (9, 3)}, ValueError, "x has 4 dims a head: need at most 2 columns"),
        ({"heads": 3, "kv_heads": 2}, ValueError, "heads is 3, kv_heads 2"),
        ({"norm": "batch_norm"}, ValueError, "norm is 'batch_norm', need 'rms_norm' or 'layer_norm'"),
        ({"head_dim": 300}, NotImplementedError, "the head dim is 300"),
        ({"window": 0}, ValueError, "window is 0"),
        (
            {"positions": torch.tensor([0, 1, 2, 9, 1])},
            ValueError,
            r"parallel_block: positions\[3\] is 9, cos and sin hold",
        ),
        ({"key_bias": torch.zeros(2, 4)}, ValueError, r"key_bias has shape \[2, 4\]"),
        (
            {"prefix_lengths": torch.zeros(2, dtype=torch.int32), "causal": False},
            ValueError,
            "prefix_lengths needs causal",
        ),
    ],
)
def test_errors(change, error, message):
    shapes = {"x": (2, 5, 8), "norm_weight": (8,), "w_in": (22, 8), "w_out": (8, 11), "cos": (8, 2), "sin": (8, 2)}
    tensors = [torch.zeros(change.get(n, shapes[n])) for n in shapes]
    kwargs = {"heads": 2, "head_dim": 4, **{n: v for n, v in change.items() if n not in shapes}}
    with pytest.raises(error, match=message):
        pk.parallel_block(*tensors, **kwargs)


def test_dtype_errors():
    tensors, sizes = block(1, 3, 4, 1, 1, 2, 2)
    x, *rest = (t.detach() for t in tensors)
    with pytest.raises(TypeError, match="w_in is torch.float32, x is torch.float64"):
        pk.parallel_block(x.double(), rest[0].double(), *rest[1:], **sizes)
    with pytest.raises(TypeError, match="norm_weight is torch.float64"):
        pk.parallel_block(x, rest[0].double(), *rest[1:], **sizes)
    with pytest.raises(ValueError, match="w_out is on meta"):
        pk.parallel_block(x, *rest[:2], rest[2].to("meta"), *rest[3:], **sizes)
