"""attention_varlen, attention_decode, merge_attention against reference.py and against attention itself."""

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
    opcheck,
    randn,
    run,
    wide,
)
from hypothesis import given
from hypothesis import strategies as st

import palm_kernels as pk

MASKS = [{}, {"causal": True, "window": 6}, {"window": (3, 2)}, {"causal": True}]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(lq, lk, H, K, D, dtype=torch.float32):
    q, k, v = randn(sum(lq), H, D, dtype=dtype), randn(sum(lk), K, D, dtype=dtype), randn(sum(lk), K, D, dtype=dtype)
    return q, k, v, offsets(lq), offsets(lk)


def bias(*shape, dtype=torch.float32):
    x = randn(*shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32).detach()
    x[..., ::4] = -torch.inf
    return x.requires_grad_()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_varlen_matches_reference(mask, dtype):
    for lq, lk, H, K, D in [
        ([3, 0, 5, 40], [7, 2, 0, 40], 4, 1, 64),
        ([1, 2], [1, 2], 2, 2, 5),
        ([130], [70], 3, 1, 33),
    ]:
        check_op("attention_varlen", *packed(lq, lk, H, K, D, dtype), return_lse=True, **mask)
        check_op("attention_varlen", *packed(lq, lk, H, K, D, dtype), key_bias=bias(sum(lk), dtype=dtype), **mask)


@pytest.mark.kernel
@given(data=st.data())
def test_varlen_any_lengths(data):
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5))
    lq, lk = [a for a, _ in lengths], [b for _, b in lengths]
    K, G, D = (data.draw(st.integers(1, n)) for n in (2, 3, 20))
    dtype = data.draw(st.sampled_from(DTYPES))
    kwargs = {"return_lse": True, **data.draw(st.sampled_from(MASKS))}
    if data.draw(st.booleans()):
        kwargs["key_bias"] = bias(sum(lk), dtype=dtype)
    check_op("attention_varlen", *packed(lq, lk, K * G, K, D, dtype), **kwargs)


@pytest.mark.kernel
def test_varlen_sequences_do_not_see_each_other():
    """NaN in one sequence stays in it, forward and backward."""
    q, k, v, cq, ck = packed([5, 6], [5, 6], 2, 1, 8)
    bad = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        for x in bad:
            x[:5] = torch.nan
    outs, grads = run(pk.attention_varlen, (*bad, cq, ck), {"causal": True})
    clean, clean_grads = run(pk.attention_varlen, (q, k, v, cq, ck), {"causal": True})
    for a, b in zip((*outs, *grads), (*clean, *clean_grads), strict=True):
        assert torch.equal(a[5:], b[5:]) and a[:5].isnan().all()


def test_varlen_gradcheck():
    q, k, v, cq, ck = packed([2, 0, 3], [3, 1, 2], 4, 2, 3, torch.float64)

    def call(q, k, v, b):
        return pk.attention_varlen(q, k, v, cq, ck, key_bias=b, window=(2, 1))

    assert torch.autograd.gradcheck(call, (q, k, v, randn(6, dtype=torch.float64)), nondet_tol=0.0)
    gradcheck("attention_varlen", *packed([2, 2], [2, 2], 2, 1, 3, torch.float64), causal=True, return_lse=True)


def test_varlen_contract():
    args = packed([40, 300, 7], [40, 300, 7], 6, 1, 16)
    assert_bitwise_repeatable("attention_varlen", *args, causal=True)
    assert_compiles(
        "attention_varlen", packed([3, 2], [3, 2], 2, 1, 8), packed([4, 2, 1], [3, 2, 5], 2, 1, 8), causal=True
    )
    assert_refuses_double_backward("attention_varlen", *packed([3], [3], 2, 1, 8))
    q, k, v, cq, ck = (x.detach() for x in packed([3, 2], [3, 2], 2, 1, 8))
    options = (None, True, 0.3, -1, -1)
    out, lse = torch.ops.palm_kernels.attention_varlen_fwd(q, k, v, cq, ck, *options)
    opcheck(torch.ops.palm_kernels.attention_varlen_fwd.default, q, k, v, cq, ck, *options)
    opcheck(torch.ops.palm_kernels.attention_varlen_bwd.default, out, None, q, k, v, out, lse, cq, ck, *options, False)


@pytest.mark.parametrize(
    ("cq", "ck", "message"),
    [
        ([0, 3, 4], [0, 3, 5], "must ascend from 0 to 5 and 5 rows; entry 2 holds 4 and 5"),
        ([0, 6, 5], [0, 3, 5], "entry 2 holds 5 and 5"),
        ([1, 3, 5], [0, 3, 5], "entry 0 holds 1 and 0"),
        ([0, 5], [0, 3, 5], r"cu_seqlens_k has shape \[3\], need cu_seqlens_q's shape"),
        ([], [], "cu_seqlens_q is empty"),
    ],
)
def test_varlen_offsets_errors(cq, ck, message):
    q, k, v, *_ = packed([5], [5], 2, 1, 8)
    with pytest.raises(ValueError, match=message):
        pk.attention_varlen(q, k, v, torch.tensor(cq, dtype=torch.int32), torch.tensor(ck, dtype=torch.int32))


def test_varlen_errors():
    q, k, v, cq, ck = packed([5], [5], 2, 1, 8)
    with pytest.raises(TypeError, match="cu_seqlens_q is torch.int64, need int32"):
        pk.attention_varlen(q, k, v, cq.long(), ck)
    with pytest.raises(ValueError, match=r"key_bias has shape \[4\], need \[sum S\] = \[5\]"):
        pk.attention_varlen(q, k, v, cq, ck, key_bias=torch.zeros(4))


def cache(B, T, S, H, K, D, lengths, dtype=torch.float32):
    """q and caches whose rows beyond the lengths hold NaN."""
    q, k, v = (randn(*s, dtype=dtype, grad=False) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, D)))
    for b, n in enumerate(lengths):
        k[b, n:] = v[b, n:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


# one token, an empty and a full row, many heads at the largest D, a chunk of a prompt longer than a cache row, one element
CACHES = [
    (2, 1, 50, 4, 1, 64, [50, 7]),
    (3, 5, 300, 4, 2, 40, [0, 3, 300]),
    (1, 1, 1700, 16, 1, 256, [1699]),
    (2, 17, 60, 8, 1, 33, [60, 20]),
    (1, 1, 5, 1, 1, 1, [4]),
    (0, 1, 5, 2, 1, 8, []),
]


if INTERPRETED:  # a tile takes milliseconds there
    CACHES[2] = (1, 1, 200, 16, 1, 256, [199])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mask", [{}, {"window": 6}, {"window": (3, 0)}], ids=str)
def test_decode_matches_reference(mask, dtype):
    for B, T, S, H, K, D, lengths in CACHES:
        q, k, v, n = cache(B, T, S, H, K, D, lengths, dtype)
        check_op("attention_decode", q, k, v, cache_lengths=n, return_lse=True, **mask)
        b = bias(B, S, dtype=dtype).detach()
        check_op("attention_decode", wide(q), wide(k), wide(v), cache_lengths=n, key_bias=b, return_lse=True, **mask)


@pytest.mark.kernel
def test_decode_equals_attention_step_by_step():
    q, k, v = randn(2, 9, 4, 16, grad=False), randn(2, 9, 16, grad=False), randn(2, 9, 16, grad=False)
    whole = pk.attention(q, k, v, causal=True)
    for t in range(9):
        n = torch.full((2,), t + 1, dtype=torch.int32)
        step = pk.attention_decode(q[:, t : t + 1], k, v, cache_lengths=n)
        torch.testing.assert_close(step, whole[:, t : t + 1], rtol=1e-5, atol=1e-6)


def test_decode_contract():
    q, k, v, n = cache(2, 1, 900, 8, 1, 64, [900, 500])
    assert_bitwise_repeatable("attention_decode", q, k.nan_to_num(), v.nan_to_num(), cache_lengths=n)
    opcheck(torch.ops.palm_kernels.attention_decode.default, q, k.nan_to_num(), v.nan_to_num(), n, None, 0.3, -1, -1)
    compiled = torch.compile(pk.attention_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, cache_lengths=n), pk.attention_decode(q, k, v, cache_lengths=n))
    with pytest.raises(RuntimeError, match="attention_decode: has no backward"):
        pk.attention_decode(q.requires_grad_(), k, v, cache_lengths=n)
    with torch.no_grad():
        pk.attention_decode(q, k, v, cache_lengths=n)


def test_decode_errors():
    q, k, v, n = cache(2, 1, 9, 2, 1, 8, [9, 5])
    with pytest.raises(ValueError, match=r"cache_lengths\[1\] is 10, the cache holds 0 to 9 rows"):
        pk.attention_decode(q, k, v, cache_lengths=n + torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cache_lengths\[0\] is -1"):
        pk.attention_decode(q, k, v, cache_lengths=n - 10)
    with pytest.raises(TypeError, match="cache_lengths is torch.int64"):
        pk.attention_decode(q, k, v, cache_lengths=n.long())
    with pytest.raises(ValueError, match="k_cache has batch 1, q has 2"):
        pk.attention_decode(q, k[:1], v[:1], cache_lengths=n)


def test_merge_is_attention_over_the_union():
    """Parts over disjoint keys, one of them at batch 1 (a shared prompt), one row that sees nothing in a part or at all."""
    q, k, v = (
        randn(2, 5, 3, 8, dtype=torch.float64),
        randn(2, 9, 8, dtype=torch.float64),
        randn(2, 9, 8, dtype=torch.float64),
    )
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :4] = False
    parts = [
        pk.attention(q, k[:, s], v[:, s], key_bias=keep[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 9))
    ]
    out, lse = pk.merge_attention(parts)
    want, want_lse = pk.attention(q, k, v, key_bias=keep, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b)
    nothing = (torch.zeros(1, 2, 1, 4), torch.full((1, 1, 2), -torch.inf))
    out, lse = pk.merge_attention([nothing, nothing])
    assert not out.any() and (lse == -torch.inf).all()
    half = [(o.bfloat16(), l.float()) for o, l in parts]
    assert pk.merge_attention(half)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no parts"):
        pk.merge_attention([])
