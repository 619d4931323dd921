"""Every op in plain PyTorch: the specification that the kernels are held to.

Same names and signatures as the public API. Run in float64 this is the truth of the tests, run in the dtype at hand their
yardstick, so nothing is upcast here: a float32 companion (key_bias, cos, strength, ...) widens one product and the result is
cast back. Letters: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H // K, D head dim, C model dim,
F feed-forward dim, V vocabulary, N flattened rows.

Gradients, for the kernels' comments to point to:
  attention   P = exp(S - lse), dP = dO V^T, delta = rowsum(dO * O) - dlse, dS = P * (dP - delta),
              dQ = scale dS K, dK = scale dS^T Q (summed over the G heads that share K), dV = P^T dO, dbias_j = sum_hi dS_hij
  swiglu      s = sigmoid(g): dup = dout silu(g), dgate = dout up s (1 + g (1 - s))
  rms_norm    x^ = x r, r = rsqrt(mean x^2 + eps), h = dout * gain: dx = r (h - x^ mean(h x^)), dweight = sum_rows dout x^
  layer_norm  x^ = (x - mean) r: dx = r (h - mean h - x^ mean(h x^)), dweight the same, dbias = sum_rows dout
  losses      p = softmax(z): dz_c = t [ (1-eps) w_y (p_c - [c=y]) + (eps/V) (W p_c - w_c) + 2 z_loss w_y lse p_c ], W = sum_c w_c
  soft_weak   with u = r(a) ub, ub = (1-a) E + a c: dE += (1-a) r g, dc += a r g, da = r g.(c - E) + r'(a) g.ub
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _visible(T: int, S: int, causal, window, prefix_lengths, device) -> Tensor:
    """[B or 1, T, S] bool: which keys each query may see, bottom-right aligned."""
    i = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)[None, :]
    upper = i.expand(T, S)
    if prefix_lengths is not None:
        upper = torch.maximum(upper, prefix_lengths.clamp(0, S).long()[:, None, None] - 1)
    keep = j <= upper if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if isinstance(window, int):  # the upper bound is causal's or the prefix's
        keep = keep & (j > i - window)
    elif window is not None:
        left, right = window
        keep = keep & (j >= i - left) if left >= 0 else keep
        keep = keep & (j <= i + right) if right >= 0 else keep
    return keep if keep.dim() == 3 else keep[None]


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    key_bias=None,
    window=None,
    prefix_lengths=None,
    query_positions=None,
    return_lse=False,
):
    """softmax(scale q k^T + key_bias) v with head h reading key/value head h // (H // K) (PaLM section 2; Shazeer 2019)."""
    if query_positions is not None:
        raise NotImplementedError("attention: query_positions is reserved")
    if k.dim() == 3:
        k, v = k[:, :, None], v[:, :, None]
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    keep = _visible(T, S, causal, window, prefix_lengths, q.device)
    if key_bias is not None:
        if key_bias.dtype == torch.bool:
            key_bias = torch.zeros(key_bias.shape, dtype=q.dtype, device=q.device).masked_fill(~key_bias, -torch.inf)
        removed = key_bias == -torch.inf  # by selection: whatever stands in these rows is never read
        k = k.masked_fill(removed[:, :, None, None], 0)
        v = v.masked_fill(removed[:, :, None, None], 0)
        key_bias = key_bias.masked_fill(removed, 0)
        keep = keep & ~removed[:, None, :]
    sees = keep.any(-1)[:, :, None, None]
    q = q.masked_fill(~sees, 0)
    scores = torch.einsum("btkgd,bskd->bkgts", q.view(B, T, K, H // K, D), k)
    scores = scores * (D**-0.5 if scale is None else scale)
    if key_bias is not None:
        scores = (scores + key_bias[:, None, None, None, :]).to(q.dtype)
    scores = torch.where(keep[:, None, None], scores, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True) if S else scores.new_zeros(B, K, H // K, T, 1)
    top = torch.where(top == -torch.inf, 0.0, top)  # a row that sees nothing gives 0 and lse -inf
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    out = torch.einsum("bkgts,bskd->btkgd", p / torch.where(total == 0, 1.0, total), v)
    out = out.reshape(B, T, H, D)
    if not return_lse:
        return out
    lse = torch.where(total == 0, -torch.inf, torch.log(torch.where(total == 0, 1.0, total)) + top)
    lse = lse.reshape(B, H, T)
    return out, lse if lse.dtype == torch.float64 else lse.float()


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    causal=False,
    scale=None,
    key_bias=None,
    window=None,
    return_lse=False,
):
    """attention of each packed sequence by itself."""
    outs, lses = [q[:0]], [torch.empty(q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32))]
    starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    (q0, k0), *rest = starts
    for q1, k1 in rest:
        out, lse = attention(
            q[None, q0:q1],
            k[None, k0:k1],
            v[None, k0:k1],
            causal=causal,
            scale=scale,
            window=window,
            key_bias=None if key_bias is None else key_bias[None, k0:k1],
            return_lse=True,
        )
        outs.append(out[0])
        lses.append(lse[0])
        q0, k0 = q1, k1
    out = torch.cat(outs)
    return (out, torch.cat([x.to(q.device) for x in lses], 1)) if return_lse else out


def attention_decode(q, k_cache, v_cache, *, cache_lengths, scale=None, key_bias=None, window=None, return_lse=False):
    """Causal attention of each row to the first cache_lengths[b] rows of its cache."""
    pairs = [
        attention(
            q[b : b + 1],
            k_cache[b : b + 1, :n],
            v_cache[b : b + 1, :n],
            causal=True,
            scale=scale,
            window=window,
            key_bias=None if key_bias is None else key_bias[b : b + 1, :n],
            return_lse=True,
        )
        for b, n in enumerate(cache_lengths.tolist())
    ]
    if not pairs:
        lse = q.new_empty(0, q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        pairs = [(q.new_empty(q.shape), lse)]
    out, lse = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    return (out, lse) if return_lse else out


def decode_linear(x, weight, *, bias=None):
    """x weight^T + bias."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, equation 5; PaLM section 2)."""
    return F.silu(gate) * up


def swiglu_packed(x, *, gate_first=True):
    """swiglu of the two halves of the last dimension."""
    first, second = x.chunk(2, -1)
    return swiglu(first, second) if gate_first else swiglu(second, first)


def rotary(x, cos, sin, *, positions=None, interleaved=False):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the first 2 * cos.shape[-1] dims (Su 2021, equation 34)."""
    T, half = x.shape[1], cos.shape[-1]
    positions = torch.arange(T, device=x.device) if positions is None else positions
    cos, sin = cos[positions.long()], sin[positions.long()]  # [T, half] or [B, T, half]
    if x.dim() == 4:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    x1, x2 = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    y1 = (x1 * cos).to(x.dtype) - (x2 * sin).to(x.dtype)
    y2 = (x2 * cos).to(x.dtype) + (x1 * sin).to(x.dtype)
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((y, rest), -1)


def rms_norm(x, weight, *, eps=1e-6, offset=0.0, residual=None):
    """x * rsqrt(mean(x^2) + eps) * (weight + offset) (Zhang and Sennrich 2019)."""
    s = x if residual is None else x + residual
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = (y * (weight + offset)).to(x.dtype)
    return y if residual is None else (y, s)


def layer_norm(x, weight, *, bias=None, eps=1e-5, offset=0.0, residual=None):
    """(x - mean) * rsqrt(var + eps) * (weight + offset) + bias (Ba 2016)."""
    s = x if residual is None else x + residual
    centred = s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = (y * (weight + offset)).to(x.dtype)
    if bias is not None:
        y = (y + bias).to(x.dtype)
    return y if residual is None else (y, s)


def cross_entropy(
    logits,
    target,
    *,
    weight=None,
    token_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    reduction="mean",
    return_z_loss=False,
):
    """Mean over kept rows of t [ (1-eps) w_y (lse - z_y) + (eps/V) sum_c w_c (lse - z_c) + z_loss w_y lse^2 ]."""
    V = logits.shape[-1]
    flat = target.reshape(-1)
    kept = (flat != ignore_index).nonzero()[:, 0]  # an ignored row is never read
    y = flat[kept]
    z = logits.reshape(len(flat), V)[kept] * logit_scale
    lse = torch.logsumexp(z, -1)
    w = torch.ones_like(lse) if weight is None else weight[y]
    t = torch.ones_like(lse) if token_weight is None else token_weight.reshape(-1)[kept]
    loss = (1 - label_smoothing) * w * (lse - z.gather(1, y[:, None])[:, 0])
    if label_smoothing:
        gaps = lse[:, None] - z
        loss = loss + label_smoothing / V * (gaps if weight is None else gaps * weight).sum(-1)
    z_term = z_loss * w * lse.square() * t if z_loss else torch.zeros_like(loss)
    loss = loss * t + z_term
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, z_term = loss.to(dtype), z_term.to(dtype).detach()
    if reduction == "none":
        loss, z_term = (
            torch.zeros(flat.shape, dtype=dtype, device=loss.device).index_add(0, kept, x).view(target.shape)
            for x in (loss, z_term)
        )
    else:
        total = (t * w).to(dtype).sum() if reduction == "mean" else torch.ones((), dtype=dtype, device=loss.device)
        total = torch.where(total == 0, 1.0, total)  # nothing kept: 0, with a graph
        loss, z_term = loss.sum() / total, z_term.sum() / total
    return (loss, z_term) if return_z_loss else loss


def linear_cross_entropy(
    hidden,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    token_weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    reduction="mean",
    return_z_loss=False,
    max_kept=None,
):
    """cross_entropy(hidden linear_weight^T + linear_bias, target); ignored rows of hidden are never read."""
    C, flat = hidden.shape[-1], target.reshape(-1)
    kept = (flat != ignore_index).nonzero()[:, 0]
    if max_kept is not None and len(kept) > max_kept:
        raise ValueError(f"linear_cross_entropy: {len(kept)} rows are kept, max_kept is {max_kept}")
    logits = F.linear(hidden.reshape(len(flat), C)[kept], linear_weight, linear_bias)
    losses = cross_entropy(
        logits,
        flat[kept],
        weight=weight,
        token_weight=None if token_weight is None else token_weight.reshape(-1)[kept],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        reduction=reduction,
        return_z_loss=True,
    )
    if reduction == "none":
        losses = tuple(
            torch.zeros(flat.shape, dtype=x.dtype, device=x.device).index_add(0, kept, x).view(target.shape)
            for x in losses
        )
    return losses if return_z_loss else losses[0]


def soft_weak_embedding(ids, weight, strength, *, mask_embedding=None, source_ids=None, variance_preserving=False):
    """r(a) [(1-a) E[ids] + a c], c = E[source_ids] where source_ids >= 0 else mask_embedding; r = 1 or ((1-a)^2+a^2)^-1/2.

    At a = 0 the row and at a = 1 the source itself, bit for bit; the gradient of strength is the formula's there too.
    """
    a = strength[..., None]
    row = weight[ids.long()]
    source = torch.zeros_like(row) if mask_embedding is None else mask_embedding.expand_as(row)
    if source_ids is not None:
        source = torch.where(source_ids[..., None] >= 0, weight[source_ids.clamp(min=0).long()], source)
    inner = (a > 0) & (a < 1)
    exact = torch.where(a == 0, row, source)
    mixed_row, mixed_source = torch.where(inner, row, 0.0), torch.where(inner, source, 0.0)
    mixed = ((1 - a) * mixed_row).to(row.dtype) + (a * mixed_source).to(row.dtype)
    slope = torch.nan_to_num(source - row, 0.0, 0.0, 0.0)
    if variance_preserving:
        mixed = (((1 - a).square() + a.square()).rsqrt() * mixed).to(row.dtype)
        slope = slope + (1 - 2 * a) * torch.nan_to_num(exact, 0.0, 0.0, 0.0)
    edge = exact + ((a - a.detach()) * slope.detach()).to(row.dtype)  # adds 0, carries the gradient of a
    return torch.where(inner, mixed, edge)


def parallel_block(
    x,
    norm_weight,
    w_in,
    w_out,
    cos,
    sin,
    *,
    heads,
    kv_heads=1,
    head_dim,
    norm="rms_norm",
    eps=1e-6,
    norm_offset=1.0,
    causal=True,
    key_bias=None,
    window=None,
    prefix_lengths=None,
    positions=None,
    interleaved=False,
):
    """x + [attention | swiglu] w_out^T, [q | k | v | gate | up] = norm(x) w_in^T (PaLM section 2, parallel layers)."""
    H, K, D = heads, kv_heads, head_dim
    B, T, _ = x.shape
    width = (w_in.shape[0] - (H + 2 * K) * D) // 2
    normed = {"rms_norm": rms_norm, "layer_norm": layer_norm}[norm](x, norm_weight, eps=eps, offset=norm_offset)
    q, k, v, gate, up = F.linear(normed, w_in).split([H * D, K * D, K * D, width, width], -1)
    q = rotary(q.reshape(B, T, H, D), cos, sin, positions=positions, interleaved=interleaved)
    k = rotary(k.reshape(B, T, K, D), cos, sin, positions=positions, interleaved=interleaved)
    mixed, _ = attention(
        q,
        k,
        v.reshape(B, T, K, D),
        causal=causal,
        key_bias=key_bias,
        window=window,
        prefix_lengths=prefix_lengths,
        return_lse=True,
    )
    return x + F.linear(torch.cat((mixed.reshape(B, T, H * D), swiglu(gate, up)), -1), w_out)
