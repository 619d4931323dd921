"""Cross entropy with class weights, label smoothing and the z-loss of PaLM (section 5), on logits or on hidden states.

`cross_entropy` is kernels alone. `linear_cross_entropy` walks over chunks of rows: torch.mm makes a chunk of logits, the backend's
`linear_cross_entropy_rows` turns it into losses and, in the same place, into their gradient, torch.mm takes that to the hidden
states and the weight (the plan of Cut Your Losses, Wijmans 2024, and Liger, Hsu 2024, with whole rows of logits a chunk).
"""

import math

import torch
from torch import Tensor

from .. import gemm
from ..checks import autocast, check_device, check_dim, check_floats, check_integers, check_shape, companion, distinct
from ..dispatch import define, empty, flops, last_contiguous, needs_autograd, public, refuse_double_backward, select

REDUCTIONS = ("none", "mean", "sum")
# Chunks of logits: bytes at a time, but no fewer rows, because each chunk reads and writes all of the float32 dweight once: on a
# CPU a twentieth of the three GEMMs' time at 384 rows (C = 1024), by an H100's data sheet a tenth at 2048.
CHUNKS = {"cpu": (2**25, 384), "cuda": (2**29, 2048)}
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float logit_scale"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bad_target(op: str, row: int, target: Tensor, classes: int, ignore_index: int):
    flat = target.reshape(-1)
    place = [int(i) for i in torch.unravel_index(torch.tensor(row), target.shape)] if target.dim() else ""
    raise ValueError(
        f"{op}: target{place} is {int(flat[row])}, need 0 <= target < V = {classes}, or ignore_index = {ignore_index}"
    )


# ---- cross_entropy ----
def _allocate_fwd(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, logit_scale, reduction):
    """loss, z, lse, scale: a value a row, or one value (loss and z of mean and sum, and scale)."""
    dtype, shape = _wide(logits.dtype), target.shape if reduction == "none" else ()
    return tuple(empty(logits, s, dtype) for s in (shape, shape, target.shape, ()))


_fwd = define(
    "cross_entropy",
    "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
    f"{_OPTIONS}, str reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    _allocate_fwd,
    check=lambda row, logits, target, *args: _bad_target("cross_entropy", row, target, logits.shape[-1], args[2]),
)
_bwd = define(
    "cross_entropy",
    "cross_entropy_bwd(Tensor logits, Tensor dloss, Tensor lse, Tensor scale, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, {_OPTIONS}) -> Tensor",
    lambda logits, *_: empty(logits, logits.shape),
    check=lambda row, logits, dloss, lse, scale, target, *args: _bad_target(
        "cross_entropy", row, target, logits.shape[-1], args[2]
    ),
)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, logit_scale, reduction
    ):
        ctx.options = ignore_index, label_smoothing, z_loss, logit_scale
        loss, z, lse, scale = _fwd(logits, target, weight, token_weight, *ctx.options, reduction)
        ctx.save_for_backward(logits, lse, scale, target, weight, token_weight)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, dz):
        refuse_double_backward("cross_entropy")
        logits, *rest = ctx.saved_tensors
        return _bwd(logits, dloss, *rest, *ctx.options), *(None,) * 8


def _check_losses(op, scores, classes, rows, target, weight, token_weight, label_smoothing, reduction):
    """What both losses ask of everything but the logits; returns the class and token weights in their dtype."""
    check_integers(op, "target", target, (torch.int64,))
    check_shape(op, "target", target, rows, f"{scores[0]}'s leading shape")
    check_device(op, **{scores[0]: scores[1]}, target=target, weight=weight, token_weight=token_weight)
    if weight is not None:
        check_shape(op, "weight", weight, (classes,), "[V]")
        weight = companion(op, "weight", weight, scores[1])
    if token_weight is not None:
        check_shape(op, "token_weight", token_weight, rows, "target's shape")
        token_weight = companion(op, "token_weight", token_weight, scores[1])
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, need 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, need 'none', 'mean' or 'sum'")
    return weight, token_weight


@public
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    return_z_loss: bool = False,
):
    """t [ (1-eps) w_y (lse - z_y) + (eps/V) sum_c w_c (lse - z_c) + z_loss w_y lse^2 ], z = logit_scale logits (PaLM section 5).

    logits: [..., V], class last, float32, bfloat16, float16 (float64 on the CPU). target y: int64 [...]; rows at ignore_index are
    never read. weight w: [V] class weights, token_weight t: target's shape, both float32 (float64 beside float64), no gradients.
    Returns float32 (float64): "none" target's shape, 0 where ignored; "sum"; "mean", which divides by the sum over kept rows
    of t w_y (by 1 where that is 0: nothing kept is loss 0 with zero gradients). return_z_loss adds the z-loss term, reduced alike,
    part of the loss already, without gradient. Sums and lse in float32, row terms in float64.
    Raises ValueError for shapes, devices, a target outside [0, V) that is not ignore_index (CPU), TypeError for dtypes.
    """
    check_floats("cross_entropy", logits=logits)
    if logits.dim() == 0:
        raise ValueError("cross_entropy: logits has no dimensions, need [..., V]")
    V, rows = logits.shape[-1], logits.shape[:-1]
    weight, token_weight = _check_losses(
        "cross_entropy", ("logits", logits), V, rows, target, weight, token_weight, label_smoothing, reduction
    )
    tensors = distinct(logits, target, weight, token_weight)
    args = (*tensors, ignore_index, label_smoothing, z_loss, logit_scale, reduction)
    loss, z = CrossEntropy.apply(*args) if needs_autograd(logits) else _fwd(*args)[:2]
    return (loss, z) if return_z_loss else loss


# ---- linear_cross_entropy ----
def _allocate_linear(hidden, linear_weight, linear_bias, target, weight, token_weight, dloss, *options):
    """loss, z, scale, dhidden, dweight, dbias: gradients that are not wanted are empty, the parameters' are float32."""
    reduction, grad_hidden, grad_weight, grad_bias = options[4], *options[6:]
    wide, shape = _wide(hidden.dtype), target.shape if reduction == "none" else ()
    loss, z, scale = (empty(hidden, s, wide) for s in (shape, shape, ()))
    dhidden = empty(hidden, hidden.shape if grad_hidden else (0,))
    dweight = empty(hidden, linear_weight.shape if grad_weight else (0,), wide)
    dbias = empty(hidden, linear_weight.shape[:1] if grad_bias else (0,), wide)
    return loss, z, scale, dhidden, dweight, dbias


def _chunk_rows(kept: int, classes: int, itemsize: int, device: str = "cpu") -> int:
    """Rows of logits at a time, the chunks nearly equal."""
    size, rows = CHUNKS.get(device, CHUNKS["cuda"])
    most = max(rows, size // max(1, classes * itemsize))
    return -(-kept // max(1, -(-kept // most)))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool, scratch: Tensor | None) -> None:
    """total (+)= a b; where total is wider than a and b by way of scratch, or by a GEMM that adds to float32."""
    if gemm.widens(a):
        gemm.mm(a, b, total) if first else gemm.addmm(total, a, b, total)
    elif scratch is not None:
        torch.mm(a, b, out=scratch)
        total.copy_(scratch) if first else total.add_(scratch)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif first:
        torch.mm(a, b, out=total, out_dtype=total.dtype)
    else:
        torch.addmm(total, a, b, out=total, out_dtype=total.dtype)


def _chunks(hidden, linear_weight, linear_bias, kept, ignored, row_inputs, row_outputs, weight, options, grads):
    """One GEMM, one kernel and up to two GEMMs a chunk; returns the first bad row, or -1.

    kept: indices of hidden's rows, None for all; ignored: which of these do not count after all ([n, 1] bool), None for none. row_inputs
    (target, token weight, dloss) and row_outputs (loss, z, t w_y) hold these rows only. grads: dhidden, dweight, dbias, each may be None.
    """
    kernel = select("cross_entropy", "linear_cross_entropy_rows", hidden.device, hidden.dtype)
    dhidden, dweight, dbias = grads
    wanted = any(g is not None for g in grads)
    n, V = row_outputs.shape[1], linear_weight.shape[0]
    step = _chunk_rows(n, V, hidden.element_size(), hidden.device.type)
    buffer = empty(hidden, (step, V))
    narrow = dweight is not None and dweight.dtype != hidden.dtype and hidden.device.type == "cpu"
    narrow = narrow and not gemm.widens(hidden)
    scratch = empty(hidden, (V, hidden.shape[1])) if narrow else None
    for lo in range(0, n, max(1, step)):
        part = slice(lo, min(n, lo + step))
        h = hidden[part] if kept is None else hidden.index_select(0, kept[part])
        if ignored is not None:  # their logits have no gradient, but 0 times a NaN would reach dweight
            h = h.masked_fill(ignored[part], 0)
        x = buffer[: h.shape[0]]
        if linear_bias is None:
            gemm.mm(h, linear_weight.t(), x)
        else:
            gemm.addmm(linear_bias, h, linear_weight.t(), x)
        target, token_weight, dloss = (t if t is None else t[part] for t in row_inputs)
        bad = kernel(x, target, weight, token_weight, dloss, *options, wanted, *row_outputs[:, part])
        if bad is not None and bad >= 0:
            return lo + bad
        if dhidden is not None:
            product = gemm.mm(x, linear_weight, dhidden[part] if kept is None else empty(h, h.shape))
            if ignored is not None:
                product.masked_fill_(ignored[part], 0)
            if kept is not None:
                dhidden.index_copy_(0, kept[part], product)
        if dweight is not None:
            _add_product(dweight, x.t(), h, lo == 0, scratch)
        if dbias is not None:
            dbias.add_(x.sum(0, dtype=dbias.dtype))
    return -1


def _rows_by_data(target: Tensor, ignore_index: int, max_kept: int | None) -> tuple[Tensor | None, None]:
    """Indices of the rows that count (None: all do), and no ignored ones among them."""
    kept = (target.reshape(-1) != ignore_index).nonzero()[:, 0]
    if max_kept is not None and len(kept) > max_kept:
        raise ValueError(f"linear_cross_entropy: {len(kept)} rows are kept, max_kept is {max_kept}")
    return None if len(kept) == target.numel() else kept, None


def _rows_by_shape(target: Tensor, ignore_index: int, max_kept: int | None) -> tuple[Tensor | None, Tensor]:
    """The same without a look at the data from the host: all rows, or max_kept of them, those that count first and in order.

    Every row appears once, so that what is made for the ignored ones at the end goes to their own places.
    """
    ignored = target.reshape(-1) == ignore_index
    if max_kept is None or max_kept >= len(ignored):
        return None, ignored[:, None]
    few = (~ignored).sum() <= max_kept
    torch.ops.aten._assert_async.msg(few, f"linear_cross_entropy: more rows are kept than max_kept = {max_kept}")
    kept = ignored.byte().sort(stable=True).indices[:max_kept]
    return kept, ignored.index_select(0, kept)[:, None]


def _which_rows(target: Tensor, ignore_index: int, max_kept: int | None):
    """On the CPU ignored rows cost nothing; elsewhere the host never waits for the device, and shapes are static (CUDA graphs)."""
    choose = _rows_by_data if target.device.type == "cpu" else _rows_by_shape
    return choose(target, ignore_index, max_kept)


def _linear_body(hidden, linear_weight, linear_bias, target, weight, token_weight, dloss, *args):
    outs = _allocate_linear(hidden, linear_weight, linear_bias, target, weight, token_weight, dloss, *args)
    loss, z, scale, *grads = outs
    options, reduction, max_kept, wants = args[:4], args[4], args[5], args[6:]
    N, C = target.numel(), hidden.shape[-1]
    weight = weight if weight is None else last_contiguous(weight)
    kept, ignored = _which_rows(target, options[0], max_kept)
    row_inputs = [t if t is None else t.reshape(-1) for t in (target, token_weight, dloss)]
    if kept is not None:
        row_inputs = [t if t is None else t.index_select(0, kept) for t in row_inputs]
    n = N if kept is None else len(kept)
    for grad, written in zip(grads, (n == N, n > 0, False), strict=True):  # dbias is added to
        if not written:
            grad.zero_()
    views = (
        grads[0].view(N, C) if wants[0] else None,
        *(g if w else None for g, w in zip(grads[1:], wants[1:], strict=True)),
    )
    rows = loss.new_empty(3, n)
    inputs = hidden.reshape(N, C), linear_weight, linear_bias, kept, ignored, row_inputs
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        bad = _chunks(*inputs, rows, weight, options, views)
    if bad >= 0:
        row = bad if kept is None else int(kept[bad])
        _bad_target("linear_cross_entropy", row, target, linear_weight.shape[0], options[0])
    _reduce(rows, kept, reduction, loss, z, scale)
    return outs


def _reduce(rows: Tensor, kept: Tensor | None, reduction: str, loss: Tensor, z: Tensor, scale: Tensor) -> None:
    """Row values (loss, z, t w_y of the kept rows) to the op's outputs; scale is what the mean multiplies by."""
    scale.fill_(1)
    if reduction == "none":
        for out, values in ((loss, rows[0]), (z, rows[1])):
            if kept is None:
                out.view(-1).copy_(values)
            else:
                out.zero_().view(-1).index_copy_(0, kept, values)
        return
    sums = rows.sum(1, dtype=torch.float64)
    factor = 1 / torch.where(sums[2] == 0, 1.0, sums[2]) if reduction == "mean" else torch.ones_like(sums[2])
    for out, value in ((loss, sums[0] * factor), (z, sums[1] * factor), (scale, factor)):
        out.copy_(value)


_linear = define(
    "cross_entropy",
    "linear_cross_entropy_fwd_bwd(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
    f"Tensor? token_weight, Tensor? dloss, {_OPTIONS}, str reduction, int? max_kept, bool grad_hidden, bool grad_weight, "
    "bool grad_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _allocate_linear,
    body=_linear_body,
)


def _linear_flops(hidden, linear_weight, *args, out_shape=None, **_):
    """2 N C V a GEMM: the logits and each wanted gradient that is a product (ignored rows counted too: shapes are all it sees)."""
    *_, grad_hidden, grad_weight, _ = args
    return 2 * math.prod(hidden) * linear_weight[0] * (1 + grad_hidden + grad_weight)


flops(_linear, _linear_flops)


class LinearCrossEntropy(torch.autograd.Function):
    """mean and sum: the gradients of the sum are made in forward, where each chunk of logits still is at hand, and wait in ctx.grads
    for their factor. none: backward walks over the chunks again, with dloss."""

    @staticmethod
    def forward(ctx, hidden, linear_weight, linear_bias, target, weight, token_weight, options, wants):
        ctx.options, ctx.wants, ctx.none = options, wants, options[4] == "none"
        early = (False, False, False) if ctx.none else wants
        tensors = hidden, linear_weight, linear_bias, target, weight, token_weight
        loss, z, ctx.scale, *grads = _linear(*tensors, None, *options, *early)
        ctx.grads = None if ctx.none else grads
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, dz):
        refuse_double_backward("linear_cross_entropy")
        tensors, grads = ctx.saved_tensors, ctx.grads
        if grads is None:  # none, or a second backward
            grads = _linear(*tensors, dloss if ctx.none else None, *ctx.options, *ctx.wants)[3:]
        factor = None if ctx.none else dloss * ctx.scale
        if torch.compiler.is_compiling():
            grads = grads if factor is None else [g * factor for g in grads]
        else:
            ctx.grads = None
            grads = grads if factor is None else [g.mul_(factor) for g in grads]
        dtype = tensors[0].dtype
        return *(g.to(dtype) if want else None for g, want in zip(grads, ctx.wants, strict=True)), *(None,) * 5


@public
def linear_cross_entropy(
    hidden: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    return_z_loss: bool = False,
    max_kept: int | None = None,
):
    """cross_entropy(hidden linear_weight^T + linear_bias, target), never holding more than a chunk of logits.

    hidden: [..., C], linear_weight: [V, C], linear_bias: [V], one dtype: float32, bfloat16, float16 (float64 on the CPU). target,
    weight, token_weight, the other options and the result: as cross_entropy. Ignored rows are never read; on the CPU they cost
    nothing, on CUDA as much as kept ones, unless max_kept is given: then that many rows are multiplied. The logits are rounded to
    hidden's dtype, the gradients of linear_weight and linear_bias summed in float32 (float64).
    For "mean" and "sum" forward makes the gradients and keeps them (dweight in float32) for the first backward, which empties them;
    another one computes them again, to the same bits. max_kept: no more rows than this are kept.
    Under autocast hidden, linear_weight and linear_bias are cast; the loss stays float32.
    Raises ValueError for shapes, devices, a target outside [0, V) that is not ignore_index, more than max_kept kept rows (CUDA: these
    two are assertions on the device), TypeError for dtypes.
    """
    op = "linear_cross_entropy"
    hidden, linear_weight, linear_bias = autocast(hidden, linear_weight, linear_bias)
    check_floats(op, hidden=hidden, linear_weight=linear_weight, linear_bias=linear_bias)
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden has no dimensions, need [..., C]")
    check_dim(op, "linear_weight", linear_weight, (2,), "[V,C]")
    V, rows = linear_weight.shape[0], hidden.shape[:-1]
    check_shape(op, "linear_weight", linear_weight, (V, hidden.shape[-1]), "[V,C]")
    if linear_bias is not None:
        check_shape(op, "linear_bias", linear_bias, (V,), "[V]")
    weight, token_weight = _check_losses(
        op, ("hidden", hidden), V, rows, target, weight, token_weight, label_smoothing, reduction
    )
    if max_kept is not None and max_kept < 0:
        raise ValueError(f"{op}: max_kept is {max_kept}, need 0 or more")
    tensors = hidden, linear_weight, *_ = distinct(hidden, linear_weight, linear_bias, target, weight, token_weight)
    options = ignore_index, label_smoothing, z_loss, logit_scale, reduction, max_kept
    if needs_autograd(hidden, linear_weight, linear_bias):
        wants = tuple(
            torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, linear_weight, linear_bias)
        )
        loss, z = LinearCrossEntropy.apply(*tensors, options, wants)
    else:
        loss, z = _linear(*tensors, None, *options, False, False, False)[:2]
    return (loss, z) if return_z_loss else loss
