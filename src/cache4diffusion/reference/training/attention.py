"""Attention in plain matrix products, for training short sequences on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F


class _Attention(torch.autograd.Function):
    """Attention in plain matrix products.

    At 80 tokens the CPU's fused attention takes seven times longer, nearly all of it in its backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        shape, ctx.scale, ctx.key_shape = q.shape, scale, k.shape
        # Norms leave q and k in float32; v has the precision that autocast asked for.
        q, k, v = (x.reshape(-1, *x.shape[-2:]).to(v.dtype) for x in (q, k, v))
        with torch.autocast(v.device.type, enabled=False):
            logits = torch.bmm(q * scale, k.transpose(1, 2))
            if mask is not None:
                logits = (logits.view(*shape[:-1], -1) + mask.to(v.dtype)).view_as(logits)
            weights = torch.softmax(logits, -1)
            ctx.save_for_backward(q, k, v, weights)
            return torch.bmm(weights, v).view(shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, *grad.shape[-2:]).to(v.dtype)
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_logits = (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * weights * ctx.scale
        d_q, d_k = torch.bmm(d_logits, k), torch.bmm(d_logits.transpose(1, 2), q)
        d_v = torch.bmm(weights.transpose(1, 2), grad)
        return d_q.view(shape), d_k.view(ctx.key_shape), d_v.view(ctx.key_shape), None, None


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Within: attention of this process runs in plain matrix products, a faster way for short sequences."""
    fused = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        is_plain = query.shape[:-2] == key.shape[:-2] and query.shape[-1] == value.shape[-1]
        if dropout_p or enable_gqa or not is_plain or (is_causal and query.shape[-2] != key.shape[-2]):
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if is_causal:
            attn_mask = query.new_ones(query.shape[-2], query.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        return _Attention.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
