"""
Attention of training, by Triton: the visibility rule with every decision relaxed to a bias on the
key. Sequences are packed with several documents, and none sees another.

    score[i, j] = q[i] k[j] / sqrt(D)  +  0 where i - j <= window, bias[j] outside it
                  -inf for j > i and for j < first[i], where the document of token i begins
    lse[i]      = log(sum over j of exp(score[i, j]))
    p[i, j]     = exp(score[i, j] - lse[i])
    y[i]        = sum over j of p[i, j] v[j]

and backward, from dy, the gradient of y:

    delta[i]      = dy[i] y[i]
    dv[j]         = sum over i of p[i, j] dy[i]
    dscore[i, j]  = p[i, j] (dy[i] v[j] - delta[i])
    dq[i]         = sum over j of dscore[i, j] k[j] / sqrt(D)
    dk[j]         = sum over i of dscore[i, j] q[i] / sqrt(D)
    dbias[j]      = sum of dscore[i, j] over the i outside the window, i - j > window

It equals relaxed_attention in dms.py, whose RelaxedAttention calls it on a GPU.

There are two kernels. Each keeps its sums in registers, so nothing is added up in memory, and two
runs give equal bits. A program of _by_queries takes a block of queries and walks over the keys that
they see, for y or, in backward, for dq. One of _by_keys takes a block of keys and walks over the
queries that see them, those of all query heads of its KV head.

The kernels read q, k, v and y as (N, heads, D), which is how the projections give them. N is B * T:
a batch is one long sequence with more documents. If N is not a multiple of the block size, one of
zeros fills the last block. So every block is whole, and nothing that is read or written needs a
mask. Scores and lse are to base 2 here, as the hardware's exponential is, so they carry the factor
log2(e).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import block_sizes

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(x, y, total=None):
    """total + x y. In float32 it is exact: tensor cores would round to 10 bits."""
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def vectors(token, head, HEADS: tl.constexpr, D: tl.constexpr):
    """Where the vectors of a block of tokens lie in (N, HEADS, D): offsets (tokens, D)."""
    return (token * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def scores(x, y, bias, query, key, together, window, scale):
    """Scores of queries x and keys y, or of keys x and queries y. The positions of x are a column,
    (n, 1), those of y a line, (1, n). together: whether key and query are in one document."""
    added = tl.where(query > key + window, bias * LOG2E, 0.0)
    score = dot(x, tl.trans(y)) * (scale * LOG2E) + added
    return tl.where(together & (query >= key), score, float("-inf"))


@triton.jit(do_not_specialize=["N", "window"])
def _by_queries(
    N, window, scale, q_ptr, k_ptr, v_ptr, bias_ptr, first_ptr, y_ptr, lse_ptr, dy_ptr, delta_ptr,
    dq_ptr, Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr, BACKWARD: tl.constexpr):
    """Program (block of queries, query head): y and lse, or in backward dq and delta. The last
    blocks, which have the longest walks, begin first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN
    head = tl.program_id(1)
    kv_head = head // (Hq // Hkv)
    query = start + tl.arange(0, OWN)
    line = head * N + query  # in (Hq, N)
    own = vectors(query, head, Hq, D)
    q = tl.load(q_ptr + own)
    first = tl.load(first_ptr + query)
    total = tl.zeros((OWN, D), tl.float32)  # of p v, or of dscore k
    if BACKWARD:
        dy = tl.load(dy_ptr + own)
        delta = tl.sum(tl.load(y_ptr + own) * dy.to(tl.float32), 1)
        tl.store(delta_ptr + line, delta)
        lse = tl.load(lse_ptr + line)
    else:
        norm = tl.zeros((OWN,), tl.float32)
        top = norm - 1e30  # the highest score so far, which weights are relative to
    # `first` never falls, so the first query's is the least. It is rounded down to a whole block.
    begin = tl.load(first_ptr + start) // OTHER * OTHER
    for block in range(begin, start + OWN, OTHER):
        key = block + tl.arange(0, OTHER)
        other = vectors(key, kv_head, Hkv, D)
        k = tl.load(k_ptr + other)
        v = tl.load(v_ptr + other)
        bias = tl.load(bias_ptr + kv_head * N + key)
        together = key[None, :] >= first[:, None]
        score = scores(q, k, bias[None, :], query[:, None], key[None, :], together, window, scale)
        if BACKWARD:
            dp = dot(dy, tl.trans(v))
            p = tl.exp2(score - lse[:, None])
            dscore = p * (dp - delta[:, None])
            total = dot(dscore.to(k.dtype), k, total)
        else:
            highest = tl.maximum(top, tl.max(score, 1))
            p = tl.exp2(score - highest[:, None])
            fade = tl.exp2(top - highest)
            norm = norm * fade + tl.sum(p, 1)
            total *= fade[:, None]
            total = dot(p.to(v.dtype), v, total)
            top = highest
    if BACKWARD:
        tl.store(dq_ptr + own, total * scale)
    else:
        tl.store(y_ptr + own, total / norm[:, None])
        tl.store(lse_ptr + line, top + tl.log2(norm))


@triton.jit(do_not_specialize=["N", "window"])
def _by_keys(
    N, window, scale,
    q_ptr, k_ptr, v_ptr, bias_ptr, end_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Program (block of keys, KV head): dk, dv and dbias."""
    start = tl.program_id(0) * OWN
    kv_head = tl.program_id(1)
    key = start + tl.arange(0, OWN)
    line = kv_head * N + key  # in (Hkv, N)
    own = vectors(key, kv_head, Hkv, D)
    k = tl.load(k_ptr + own)
    v = tl.load(v_ptr + own)
    bias = tl.load(bias_ptr + line)[:, None]
    end = tl.load(end_ptr + key)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    dbias = tl.zeros((OWN,), tl.float32)
    for head in range(kv_head * (Hq // Hkv), (kv_head + 1) * (Hq // Hkv)):
        for block in range(start, tl.max(end, 0), OTHER):
            query = block + tl.arange(0, OTHER)
            other = vectors(query, head, Hq, D)
            q = tl.load(q_ptr + other)
            dy = tl.load(dy_ptr + other)
            lse = tl.load(lse_ptr + head * N + query)
            delta = tl.load(delta_ptr + head * N + query)
            together = query[None, :] < end[:, None]
            score = scores(k, q, bias, query[None, :], key[:, None], together, window, scale)
            p = tl.exp2(score - lse[None, :])
            dv = dot(p.to(dy.dtype), dy, dv)
            dp = dot(v, tl.trans(dy))
            dscore = p * (dp - delta[None, :])
            dk = dot(dscore.to(q.dtype), q, dk)
            is_outside = query[None, :] > key[:, None] + window
            dbias += tl.sum(tl.where(is_outside, dscore, 0.0), 1)
    tl.store(dk_ptr + own, dk * scale)
    tl.store(dv_ptr + own, dv)
    tl.store(dbias_ptr + line, dbias)


class BiasedAttention(torch.autograd.Function):
    """q: (N, Hq, D), D a power of two; k, v: (N, Hkv, D); bias: (Hkv, N) float32; first: (N,)
    int32; all contiguous. sizes: of blocks, see block_sizes; N is a multiple of the first one.
    Returns (N, Hq, D)."""

    @staticmethod
    def forward(ctx, q, k, v, bias, first, window, scale, sizes):
        N, Hq, D = q.shape
        Hkv = len(bias)
        own, other, few = sizes
        settings = (N, window, scale)
        options = dict(Hq=Hq, Hkv=Hkv, D=D, OWN=own, num_warps=8, num_stages=2)
        ctx.by_queries = partial(_by_queries[N // own, Hq], *settings, OTHER=other, **options)
        ctx.by_keys = partial(_by_keys[N // own, Hkv], *settings, OTHER=few, **options)
        y = torch.empty_like(q)
        lse = bias.new_empty(Hq, N)
        unused = (y, lse, y)  # in the places of dy, delta and dq, which only backward touches
        ctx.by_queries(q, k, v, bias, first, y, lse, *unused, BACKWARD=False)
        ctx.save_for_backward(q, k, v, bias, first, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, bias, first, y, lse = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dv, dbias, delta = (torch.empty_like(x) for x in (q, k, v, bias, lse))
        ctx.by_queries(*ctx.saved_tensors, dy, delta, dq, BACKWARD=True)
        # of each token, where its document ends: behind the last token with the same `first`
        end = torch.searchsorted(first, first, right=True, out_int32=True)
        ctx.by_keys(q, k, v, bias, end, lse, dy, delta, dk, dv, dbias)
        return dq, dk, dv, dbias, None, None, None, None


def relaxed_attention(q, k, v, bias, first, window):
    """dms.relaxed_attention by Triton: q (B, Hq, T, D); k, v (B, Hkv, T, D); bias (B, Hkv, T)
    float32; first (B, T) int32 -> (B, Hq, T, D). Best where q, k and v are views of
    (B, T, heads, D), and B * T is a multiple of 128: others are copied."""
    B, _, T, D = q.shape
    tokens = B * T
    width = max(16, triton.next_power_of_2(D))
    sizes = block_sizes(q, width)
    more = -tokens % sizes[0]  # zeros, which fill the last block

    def flat(x):  # (B, heads, T, D) -> (N, heads, width), N = tokens + more
        x = x.transpose(1, 2).flatten(0, 1)
        if more or D < width:
            x = F.pad(x, (0, width - D, 0, 0, 0, more))
        return x.contiguous()

    inputs = (flat(q), flat(k), flat(v))  # of less than 2**31 numbers each: offsets are 32 bits
    bias = F.pad(bias.transpose(0, 1).flatten(1), (0, more)).contiguous()
    starts = T * torch.arange(B, device=first.device)
    first = F.pad((first + starts[:, None]).int().flatten(), (0, more), value=tokens)
    # min: key + window must fit 32 bits
    y = BiasedAttention.apply(*inputs, bias, first, min(window, T), D**-0.5, sizes)
    return y[:tokens, :, :D].unflatten(0, (B, T)).transpose(1, 2)
