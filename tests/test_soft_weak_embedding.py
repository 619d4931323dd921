"""soft_weak_embedding: kernels against reference.py."""

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    INTERPRETED,
    ON_CPU_KERNELS,
    assert_bitwise_repeatable,
    assert_compiles,
    assert_refuses_double_backward,
    check_op,
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
from palm_kernels import dispatch, reference

OP = "soft_weak_embedding"
SHAPES = [((), 1, 1), ((5,), 3, 8), ((2, 37), 23, 33), ((3, 2, 8), 30 if INTERPRETED else 100, 130)]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}


def make(shape, vocab, cols, dtype, *, mask=True, sources=True, edges=True, grad=True):
    """(ids, weight, strength) and the keywords: strengths mix 0, 1 and what lies between; a third of the sources is the mask."""
    ids = torch.randint(0, vocab, shape)
    companion = torch.float64 if dtype == torch.float64 else torch.float32
    strength = torch.rand(shape, dtype=companion) * 0.8 + 0.1
    if edges:
        pick = torch.randint(0, 4, shape)
        strength = strength.masked_fill(pick == 0, 0).masked_fill(pick == 1, 1)
    keywords = {}
    if mask:
        keywords["mask_embedding"] = randn(cols, dtype=dtype, grad=grad)
    if sources:
        chosen = torch.randint(0, vocab, shape)
        keywords["source_ids"] = torch.where(torch.rand(shape) < 0.3, -chosen - 1, chosen).int()
    return (ids, randn(vocab, cols, dtype=dtype, grad=grad), strength.requires_grad_(grad)), keywords


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("shape, vocab, cols", SHAPES)
def test_matches_reference(shape, vocab, cols, dtype, preserving):
    for mask in (True, False):
        for sources in (True, False):
            args, keywords = make(shape, vocab, cols, dtype, mask=mask, sources=sources)
            check_op(OP, *args, **keywords, variance_preserving=preserving)


@pytest.mark.kernel
@pytest.mark.parametrize("shape, vocab, cols", [((0,), 4, 8), ((2, 0), 4, 8), ((0,), 0, 3), ((3, 2), 4, 0)])
def test_empty(shape, vocab, cols):
    args, keywords = make(shape, max(vocab, 1), cols, torch.float32)
    args = (args[0], args[1].detach()[:vocab].requires_grad_(), args[2])
    check_op(OP, *args, **keywords)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_frequent_tokens(dtype):
    """Segments beyond what one thread (one program) sums, of one token, of the mask and of a source."""
    n, vocab = (1200, 12) if INTERPRETED else (2000, 50)
    ids = torch.where(torch.rand(n) < 0.5, 3, torch.randint(0, vocab, (n,)))
    strength = torch.rand(n).requires_grad_()
    sources = torch.where(torch.rand(n) < 0.5, torch.tensor(-1), 7)
    weight, mask = randn(vocab, 20, dtype=dtype), randn(20, dtype=dtype)
    check_op(OP, ids, weight, strength.to(torch.float64) if dtype == torch.float64 else strength, mask_embedding=mask)
    check_op(OP, ids, weight, strength, mask_embedding=mask, source_ids=sources, function=_widened)
    same = torch.zeros(n, dtype=torch.int64)
    check_op(OP, same, weight, torch.zeros(n), source_ids=same, function=_widened)


def _widened(ids, weight, strength, **keywords):
    """A float32 strength beside a float64 weight is widened by the public function."""
    return pk.soft_weak_embedding(ids, weight, strength, **keywords)


@pytest.mark.kernel
@pytest.mark.parametrize("cols", [1, 7, 64])
def test_equals_index_add(cols):
    """dweight of an ordinary embedding (strength 0) is index_add of dout, in float64."""
    dtype, tolerance = (torch.float64, 1e-12) if ON_CPU_KERNELS else (torch.float32, 2e-5)
    ids, weight = torch.randint(0, 40, (3000,), dtype=torch.int32), randn(60, cols, dtype=dtype)
    dout = torch.randn(3000, cols, dtype=dtype)
    out = pk.soft_weak_embedding(ids, weight, torch.zeros(3000))
    out.backward(dout)
    wanted = torch.zeros(60, cols).double().index_add(0, ids.long(), dout.double()).to(dtype)
    torch.testing.assert_close(weight.grad, wanted, rtol=tolerance, atol=tolerance)
    assert (weight.grad[40:] == 0).all()


@pytest.mark.kernel
def test_ids_of_several_bytes():
    """Keys that a radix sort takes byte by byte, most rows without an entry."""
    vocab = 300 if dispatch.simulated("triton") else 70_000
    args, keywords = make((1500,), vocab, 8, torch.float32)
    check_op(OP, torch.where(torch.rand(1500) < 0.5, vocab - 1, args[0]), *args[1:], **keywords)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_edges_are_exact(dtype):
    """Strength 0 gives the row's bits and 1 the source's: NaN payloads, infinities, -0.0; the other side is not read."""
    top = torch.iinfo(BITS[dtype])
    weight = torch.randint(top.min, top.max, (16, 37), dtype=BITS[dtype]).view(dtype)
    weight[1], weight[2, :5] = torch.nan, -0.0
    mask = torch.full((37,), torch.nan, dtype=dtype)
    ids, sources = torch.arange(16), torch.arange(16).flip(0)
    bits = weight.view(BITS[dtype])

    def call(a, **keywords):
        return pk.soft_weak_embedding(ids, weight, torch.full((16,), a), **keywords).view(BITS[dtype])

    for keywords in ({}, {"mask_embedding": mask}, {"source_ids": sources}):
        for preserving in (False, True):
            assert torch.equal(call(0.0, **keywords, variance_preserving=preserving), bits)
            assert torch.equal(call(-0.0, **keywords, variance_preserving=preserving), bits)
    assert torch.equal(call(1.0, source_ids=sources), bits.flip(0))
    assert torch.equal(call(1.0, mask_embedding=mask), mask.view(BITS[dtype]).expand(16, 37))
    assert torch.equal(call(1.0), torch.zeros_like(bits))


@pytest.mark.kernel
@pytest.mark.parametrize("a", [0.0, 1.0])
def test_what_is_not_used_gets_no_gradient(a):
    """a = 1 over the mask is replacing ids by a mask id: no gradient for the rows; a = 0 is a plain embedding: none for the mask."""
    args, keywords = make((4, 9), 12, 17, torch.float32, edges=False, sources=False)
    ids, weight, _ = args
    strength = torch.full((4, 9), a, requires_grad=True)
    check_op(OP, ids, weight, strength, **keywords)
    check_op(OP, ids, weight, strength, **keywords, variance_preserving=True)
    _, (dweight, _, dmask) = run(pk.soft_weak_embedding, (ids, weight, strength), keywords)
    assert (dmask == 0).all() == (a == 0) and (dweight == 0).all() == (a == 1)


@pytest.mark.kernel
def test_nan_on_the_side_that_is_not_read():
    """A NaN or inf on the other side reaches no output and no gradient; between 0 and 1 it propagates as in the reference."""
    ids, weight = torch.tensor([0, 1, 2, 3, 0]), randn(4, 19)
    strength = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5]).requires_grad_()
    sources = torch.tensor([-1, 0, -1, 3, 3])
    with torch.no_grad():
        weight[1], weight[2, 3] = torch.nan, torch.inf
    mask = torch.full((19,), torch.nan)
    mask[4] = -torch.inf
    for preserving in (False, True):
        keywords = {"source_ids": sources, "variance_preserving": preserving}
        check_op(OP, ids, weight, strength, mask_embedding=mask.requires_grad_(), **keywords)
        sources = torch.tensor([-1, 0, 3, 3, -1])
    poisoned = randn(5, 19, grad=False)
    poisoned[1] = torch.nan
    out = pk.soft_weak_embedding(
        torch.arange(4).repeat(2)[:5], weight, torch.tensor([0.0, 1, 0, 0, 0]), source_ids=torch.full((5,), 3)
    )
    (grad,) = torch.autograd.grad(out, weight, poisoned)
    assert grad[:3].isfinite().all() and grad[3].isnan().all()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype):
    args, keywords = make((4, 6, 3), 11, 10, dtype)
    ids, weight, strength = args
    mask, sources = keywords["mask_embedding"], keywords["source_ids"]
    check_op(OP, wide(ids), wide(weight), wide(strength), mask_embedding=wide(mask), source_ids=wide(sources))
    turned = ids.transpose(0, 2).contiguous().transpose(0, 2)
    check_op(
        OP,
        turned,
        weight.detach().t().contiguous().t().requires_grad_(),
        permuted(strength),
        source_ids=permuted(sources),
    )
    column = [wide(t.detach()[:, 0, :1]) for t in (ids, strength, sources)]  # [4, 1]: one stride, and not 1
    check_op(OP, column[0], weight, column[1].requires_grad_(), source_ids=column[2], mask_embedding=mask)
    one = [t.detach()[0, 0, 0].expand(5) for t in (ids, strength, sources)]
    check_op(OP, one[0], weight, one[1], source_ids=one[2], mask_embedding=mask)
    same = ids[:1, :, :1].expand(4, 6, 3)
    check_op(
        OP,
        same,
        weight.detach()[:1].expand(11, 10).requires_grad_(),
        strength,
        source_ids=same.int(),
        mask_embedding=mask,
    )
    (grad,) = torch.autograd.grad(pk.soft_weak_embedding(same, weight, strength.detach()).sum(), weight)
    wanted = torch.autograd.grad(reference.soft_weak_embedding(same, weight, strength.detach()).sum(), weight)[0]
    torch.testing.assert_close(grad, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.kernel
def test_stride_beyond_32_bits():
    """Three rows of weight 2^30 + 4 elements apart, in memory that is reserved but hardly touched."""
    storage = torch.from_numpy(np.zeros(2**31 + 16, dtype="uint16")).view(torch.bfloat16)
    weight = storage.as_strided((3, 8), (2**30 + 4, 1))
    weight.copy_(torch.randn(3, 8))
    check_op(
        OP, torch.tensor([2, 0, 2, 1]), weight.requires_grad_(), torch.tensor([0.0, 0.3, 0.6, 1.0]).requires_grad_()
    )


@pytest.mark.kernel
@given(
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=4),
    vocab=st.integers(1, 40),
    cols=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    mask=st.booleans(),
    sources=st.booleans(),
    preserving=st.booleans(),
    layout=st.sampled_from([wide, permuted, lambda x: x]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_option(shape, vocab, cols, dtype, mask, sources, preserving, layout, seed):
    torch.manual_seed(seed)
    args, keywords = make(tuple(shape), vocab, cols, dtype, mask=mask, sources=sources)
    # One row's gradient of strength is one sum, whose terms may cancel to next to nothing: its error is measured against the result. Of
    # several rows the root of the mean square stays near that of the terms.
    args[2].requires_grad_(args[2].numel() >= 8)
    if shape:
        args = (layout(args[0]), wide(args[1]), layout(args[2]))
    check_op(OP, *args, **keywords, variance_preserving=preserving)


@pytest.mark.parametrize("preserving", [False, True])
@pytest.mark.parametrize("mask, sources", [(True, True), (True, False), (False, True), (False, False)])
def test_gradcheck(mask, sources, preserving):
    """Strictly between 0 and 1, where the function has two sides; the edges are held to the reference's formula above."""
    args, keywords = make((3, 4), 5, 3, torch.float64, mask=mask, sources=sources, edges=False)
    gradcheck(OP, *args, **keywords, variance_preserving=preserving)


@pytest.mark.kernel
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_each_gradient_alone(wanted):
    """Only what requires grad is computed, with the bits it has among all; a frozen weight is not even saved."""
    args, keywords = make((6, 50), 20, 33, torch.float32)
    all_three = run(pk.soft_weak_embedding, args, keywords)[1]
    leaves = [args[1], args[2], keywords["mask_embedding"]]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        run(pk.soft_weak_embedding, args, keywords)
    assert max(saved) == (args[1].numel() if 1 in wanted else args[0].numel())
    for a, i in zip(run(pk.soft_weak_embedding, args, keywords)[1], wanted, strict=True):
        assert torch.equal(a, all_three[i])


def test_repeatable():
    args, keywords = make((7, 1000), 60, 65, torch.float32)
    assert_bitwise_repeatable(OP, *args, **keywords)
    args[0][:, ::2] = 5
    keywords["source_ids"][:, ::3] = -1
    assert_bitwise_repeatable(OP, *args, **keywords, variance_preserving=True)


@pytest.mark.kernel
def test_retain_graph_and_same_tensor_twice():
    args, keywords = make((4, 9), 6, 5, torch.float32, sources=False)
    out = pk.soft_weak_embedding(*args, source_ids=args[0], **keywords)
    leaves = (args[1], args[2])
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(a, b)
    table = randn(6, 5)
    check_op(OP, args[0], table, args[2], mask_embedding=table[0].detach().requires_grad_())


def test_registration():
    args, keywords = make((4, 9), 6, 5, torch.float32)
    ids, weight, strength = args
    mask, sources = keywords["mask_embedding"], keywords["source_ids"]
    ops = torch.ops.palm_kernels
    opcheck(ops.soft_weak_embedding_fwd.default, ids, weight, strength, mask, sources, True)
    opcheck(ops.soft_weak_embedding_fwd.default, ids, weight, strength, None, None, False)
    dout = randn(4, 9, 5, grad=False)
    opcheck(ops.soft_weak_embedding_bwd.default, dout, ids, strength, weight, mask, sources, True, 6, True, True)
    opcheck(ops.soft_weak_embedding_bwd.default, dout, ids, strength, None, None, None, False, 6, True, False)


def test_compiles():
    variants = [make(shape, 6, cols, torch.float32)[0] for shape, cols in (((4, 9), 5), ((3, 7), 33))]
    assert_compiles(OP, *variants)
    for preserving in (False, True):
        args, keywords = make((4, 9), 6, 5, torch.float32)
        assert_compiles(OP, args, (args[0].int(), *args[1:]), **keywords, variance_preserving=preserving)


def test_autocast_and_reference_backend():
    args, keywords = make((4, 9), 6, 5, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pk.soft_weak_embedding(*args, **keywords).dtype == torch.float32
    with pk.backend("reference"):
        wanted = pk.soft_weak_embedding(*args, **keywords)
    torch.testing.assert_close(pk.soft_weak_embedding(*args, **keywords), wanted)


def test_refuses_double_backward():
    args, keywords = make((4, 9), 6, 5, torch.float32)
    assert_refuses_double_backward(OP, *args, **keywords)


def test_errors_of_arguments():
    ids, weight, strength = torch.zeros(2, 3, dtype=torch.int64), torch.ones(4, 5), torch.zeros(2, 3)
    cases = [
        (ValueError, r"strength has shape \[3\], need ids' shape = \[2, 3\]", (ids, weight, strength[0]), {}),
        (ValueError, r"weight has shape \[5\], need \[V,C\]", (ids, weight[0], strength), {}),
        (
            ValueError,
            r"mask_embedding has shape \[4\], need \[C\] = \[5\]",
            (ids, weight, strength),
            {"mask_embedding": weight[:, 0]},
        ),
        (ValueError, r"source_ids has shape \[2\]", (ids, weight, strength), {"source_ids": ids[:, 0]}),
        (ValueError, "ids is on meta", (ids.to("meta"), weight, strength), {}),
        (TypeError, "ids is torch.int16, need int32 or int64", (ids.short(), weight, strength), {}),
        (TypeError, "source_ids is torch.float32", (ids, weight, strength), {"source_ids": strength}),
        (TypeError, "strength is torch.bfloat16, need float32", (ids, weight, strength.bfloat16()), {}),
        (TypeError, "mask_embedding is torch.float64", (ids, weight, strength), {"mask_embedding": weight[0].double()}),
        (TypeError, "weight is torch.int64", (ids, ids, strength), {}),
    ]
    for error, message, args, keywords in cases:
        with pytest.raises(error, match=f"{OP}: {message}"):
            pk.soft_weak_embedding(*args, **keywords)


@pytest.mark.parametrize("shape, at", [((2, 3), (1, 2)), ((5,), (0,)), ((), ())])
def test_errors_in_the_data(shape, at):
    """Found by the kernel, also in backward; the first bad row is named."""
    weight = torch.ones(4, 5, requires_grad=True)
    where = f"\\[{', '.join(str(i) for i in at)}\\]" if at else ""
    for bad in (4, -1, 2**31 - 1, -(2**31)):
        ids = torch.zeros(shape, dtype=torch.int32)
        ids[at] = bad
        with pytest.raises(ValueError, match=f"ids{where} is {bad}, need 0 <= id < 4"):
            pk.soft_weak_embedding(ids, weight, torch.ones(shape))
    ids = torch.zeros(shape, dtype=torch.int64)
    for bad in (4, 2**40):
        sources = torch.full(shape, -7, dtype=torch.int64)
        sources[at] = bad
        with pytest.raises(ValueError, match=f"source_ids{where} is {bad}, need below 4"):
            pk.soft_weak_embedding(ids, weight, torch.zeros(shape), source_ids=sources)
    for bad in (-1e-6, 1.0000001, torch.nan, torch.inf):
        strength = torch.zeros(shape)
        strength[at] = bad
        with pytest.raises(ValueError, match=f"strength{where} is .*, need 0 <= strength <= 1"):
            pk.soft_weak_embedding(ids, weight, strength)
    dout, strength = torch.ones(*shape, 5), torch.ones(shape)
    for row_gradients in (True, False):
        args = (weight, None, None, False, 4, row_gradients, False)
        with pytest.raises(ValueError, match="need 0 <= id < 4"):
            torch.ops.palm_kernels.soft_weak_embedding_bwd(dout, ids + 9, strength, *args)


@pytest.mark.kernel
@pytest.mark.skipif(
    not INTERPRETED, reason="a ValueError on the CPU; on CUDA an assertion ends the process's use of the device"
)
def test_errors_in_the_data_are_asserted():
    ids, weight, strength, dout = torch.zeros(3, dtype=torch.int64), randn(4, 5), torch.ones(3), torch.ones(3, 5)
    cases = [
        ("need 0 <= id < V", {"ids": torch.tensor([0, 4, 0])}),
        ("need 0 <= id < V", {"ids": torch.tensor([0, -1, 0], dtype=torch.int32)}),
        ("need source_ids below V", {"source_ids": torch.tensor([-3, 2**40, 0])}),
        ("need 0 <= strength <= 1", {"strength": torch.tensor([0.0, 1.0000001, 0.0])}),
        ("need 0 <= strength <= 1", {"strength": torch.tensor([0.0, 0.0, torch.nan])}),
    ]
    for message, changed in cases:
        a = {"ids": ids, "strength": strength, "source_ids": None, **changed}
        with pytest.raises(Exception, match=message):
            pk.soft_weak_embedding(a["ids"], weight, a["strength"], source_ids=a["source_ids"])
        for rows, row_gradients in ((weight.detach(), False), (None, True)):
            args = dout, a["ids"], a["strength"], rows, None, a["source_ids"], False, 4, row_gradients, False
            with pytest.raises(Exception, match=message):
                torch.ops.palm_kernels.soft_weak_embedding_bwd(*args)


@pytest.mark.kernel
@pytest.mark.parametrize("cols", [3, 1500])
def test_dimensions_that_do_not_merge(cols):
    """Five of them in an order of their own, more than a kernel walks over by itself; rows of several blocks."""
    args, keywords = make((2, 1, 3, 2, 2), 7, cols, torch.float32)
    permuting = torch.randn(2, 3, 2, 1, 2, cols).permute(0, 3, 1, 4, 2, 5)
    out = pk.soft_weak_embedding(*args, **keywords)
    leaves = (args[1], args[2], keywords["mask_embedding"])
    ours = torch.autograd.grad(out, leaves, permuting, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(out, leaves, permuting.contiguous()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_meta():
    ids, weight = torch.empty(3, 4, dtype=torch.int64, device="meta"), torch.empty(6, 5, device="meta")
    assert pk.soft_weak_embedding(ids, weight, torch.empty(3, 4, device="meta")).shape == (3, 4, 5)
