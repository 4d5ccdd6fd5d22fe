"""
Training attention: the visibility rule with every decision relaxed to a bias on the key.

    score(i, j) = q[i] k[j] / sqrt(D)  +  0 within the window, bias[j] outside it, -inf for j > i

Plain PyTorch only.
"""
import functools

import torch
from torch.utils.checkpoint import checkpoint


def relaxed_attention_plain(q, k, v, bias, window, block=128):
    """q: (B, Hq, T, D); k, v: (B, Hkv, T, D); bias: (B, Hkv, T). Returns (B, Hq, T, D), with
    gradients of all four. Takes `block` queries at a time, each against the keys up to its end, so
    that memory grows with block * T; long sequences compute each block's scores again in backward.
    """
    B, Hkv, T = bias.shape
    q = q.view(B, Hkv, -1, T, q.shape[-1])  # (B, Hkv, G, T, D)
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)  # keys from there on lie in the future of all these queries
        past = [x[:, :, :end] for x in (k, v, bias)]
        attend = functools.partial(attend_rows, q[:, :, :, start:end], *past, start, window)
        outputs.append(checkpoint(attend, use_reentrant=False) if T > 1024 else attend())
    return torch.cat(outputs, dim=3).flatten(1, 2)


def attend_rows(q, k, v, bias, start, window):
    """The queries from position `start` on: q (B, Hkv, G, n, D) against k, v (B, Hkv, S, D) with
    bias (B, Hkv, S) -> (B, Hkv, G, n, D)."""
    query = torch.arange(start, start + q.shape[3], device=q.device)
    distance = query[:, None] - torch.arange(k.shape[2], device=q.device)  # (n, S)
    mask = torch.where(distance > window, bias[:, :, None], 0)  # (B, Hkv, n, S)
    mask = mask.masked_fill(distance < 0, float("-inf"))
    score = (q.flatten(2, 3) * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, Hkv, G * n, S)
    score = score.view(*q.shape[:4], -1) + mask[:, :, None]  # (B, Hkv, G, n, S)
    weight = torch.softmax(score.float(), dim=-1).to(v.dtype)
    return (weight.flatten(2, 3) @ v).view(q.shape)
