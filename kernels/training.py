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

A walk has two parts. In one, every key lies in the past and outside the window, so no pair needs a
test. In the other, the BAND from the window's edge to the diagonal, each pair is tested:

    keys that a block of queries walks over        begin ......... edge ......... end
                                                        no test           BAND

The kernels read q, k, v and y as (N, heads, D), which is how the projections give them. N is B * T:
a batch is one long sequence with more documents. Scores and lse are to base 2 here, as the
hardware's exponential is, so they carry the factor log2(e).
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import block_sizes, check_launch

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(x, y, total=None):
    """total + x y. In float32 it is exact: tensor cores would round to 10 bits."""
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def load_rows(ptr, token, head, N, HEADS: tl.constexpr, D: tl.constexpr):
    """The vectors (tokens, D) of a block of tokens in (N, HEADS, D); zeros beyond token N - 1."""
    at = (token * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + at, token[:, None] < N, 0.0)


@triton.jit
def store_rows(ptr, token, head, x, N, HEADS: tl.constexpr, D: tl.constexpr):
    at = (token * HEADS + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), token[:, None] < N)


@triton.jit
def scores(x, y, bias, query, key, visible, window, scale, BAND: tl.constexpr):
    """Scores of queries x and keys y, or of keys x and queries y. The positions of x are a column,
    (n, 1), those of y a line, (1, n). visible: whether key and query are in one document."""
    bias *= LOG2E
    if BAND:
        bias = tl.where(query > key + window, bias, 0.0)
        visible = visible & (query >= key)
    score = dot(x, tl.trans(y)) * (scale * LOG2E) + bias
    return tl.where(visible, score, float("-inf"))


@triton.jit(do_not_specialize=["N", "window"])
def _by_queries(
    q_ptr, k_ptr, v_ptr, bias_ptr, first_ptr, y_ptr, lse_ptr, dy_ptr, delta_ptr, dq_ptr,
    N, window, scale,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, BACKWARD: tl.constexpr):
    """Program (block of queries, query head): y and lse, or in backward dq and delta. The last
    blocks, which have the longest walks, begin first."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN
    head = tl.program_id(1)
    kv_head = head // (Hq // Hkv)
    query = start + tl.arange(0, OWN)
    line = head * N + query  # in (Hq, N)
    q = load_rows(q_ptr, query, head, N, Hq, D)
    first = tl.load(first_ptr + query, query < N, 0)
    total = tl.zeros((OWN, D), tl.float32)  # of p v, or of dscore k
    if BACKWARD:
        dy = load_rows(dy_ptr, query, head, N, Hq, D)
        y = load_rows(y_ptr, query, head, N, Hq, D)
        delta = tl.sum(y * dy.to(tl.float32), 1)
        tl.store(delta_ptr + line, delta, query < N)
        lse = tl.load(lse_ptr + line, query < N, 0.0)
    else:
        norm = tl.zeros((OWN,), tl.float32)
        top = norm - 1e30  # the highest score so far, which weights are relative to
    begin = tl.load(first_ptr + start)
    edge = begin + tl.maximum(start - window - begin, 0) // OTHER * OTHER
    end = tl.minimum(start + OWN, N)
    for BAND in tl.static_range(2):
        for block in range(edge if BAND else begin, end if BAND else edge, OTHER):
            key = block + tl.arange(0, OTHER)
            k = load_rows(k_ptr, key, kv_head, N, Hkv, D)
            v = load_rows(v_ptr, key, kv_head, N, Hkv, D)
            bias = tl.load(bias_ptr + kv_head * N + key, key < N, 0.0)
            visible = key[None, :] >= first[:, None]
            score = scores(
                q, k, bias[None, :], query[:, None], key[None, :], visible, window, scale, BAND
            )
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
        store_rows(dq_ptr, query, head, total * scale, N, Hq, D)
    else:
        store_rows(y_ptr, query, head, total / norm[:, None], N, Hq, D)
        tl.store(lse_ptr + line, top + tl.log2(norm), query < N)


@triton.jit(do_not_specialize=["N", "window"])
def _by_keys(
    q_ptr, k_ptr, v_ptr, bias_ptr, end_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    N, window, scale,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Program (block of keys, KV head): dk, dv and dbias. Here the BAND comes first in the walk."""
    start = tl.program_id(0) * OWN
    kv_head = tl.program_id(1)
    key = start + tl.arange(0, OWN)
    k = load_rows(k_ptr, key, kv_head, N, Hkv, D)
    v = load_rows(v_ptr, key, kv_head, N, Hkv, D)
    bias = tl.load(bias_ptr + kv_head * N + key, key < N, 0.0)
    end = tl.load(end_ptr + key, key < N, 0)
    dk = tl.zeros((OWN, D), tl.float32)
    dv = tl.zeros((OWN, D), tl.float32)
    dbias = tl.zeros((OWN,), tl.float32)
    last = tl.max(end, 0)
    edge = tl.minimum(start + tl.cdiv(OWN + window, OTHER) * OTHER, last)
    for head in range(kv_head * (Hq // Hkv), (kv_head + 1) * (Hq // Hkv)):
        for BAND in tl.static_range(2):
            for block in range(start if BAND else edge, edge if BAND else last, OTHER):
                query = block + tl.arange(0, OTHER)
                q = load_rows(q_ptr, query, head, N, Hq, D)
                dy = load_rows(dy_ptr, query, head, N, Hq, D)
                lse = tl.load(lse_ptr + head * N + query, query < N, 0.0)
                delta = tl.load(delta_ptr + head * N + query, query < N, 0.0)
                visible = query[None, :] < end[:, None]
                score = scores(
                    k, q, bias[:, None], query[None, :], key[:, None], visible, window, scale, BAND
                )
                p = tl.exp2(score - lse[None, :])
                dv = dot(p.to(dy.dtype), dy, dv)
                dp = dot(v, tl.trans(dy))
                dscore = p * (dp - delta[None, :])
                dk = dot(dscore.to(q.dtype), q, dk)
                if BAND:
                    dscore = tl.where(query[None, :] > key[:, None] + window, dscore, 0.0)
                dbias += tl.sum(dscore, 1)
    store_rows(dk_ptr, key, kv_head, dk * scale, N, Hkv, D)
    store_rows(dv_ptr, key, kv_head, dv, N, Hkv, D)
    tl.store(dbias_ptr + kv_head * N + key, dbias, key < N)


class BiasedAttention(torch.autograd.Function):
    """q: (N, Hq, D), D a power of two; k, v: (N, Hkv, D); bias: (Hkv, N) float32; first: (N,)
    int32; all contiguous. Returns (N, Hq, D)."""

    @staticmethod
    def forward(ctx, q, k, v, bias, first, window, scale):
        N, Hq, D = q.shape
        own, other, few = block_sizes(q, D)
        sizes = dict(Hq=Hq, Hkv=len(bias), D=D, OWN=own, num_warps=8, num_stages=2)
        ctx.by_queries = dict(sizes, OTHER=other)
        ctx.by_keys = dict(sizes, OTHER=few)
        ctx.blocks = triton.cdiv(N, own)
        ctx.settings = (N, window, scale)
        y = torch.empty_like(q)
        lse = bias.new_empty(Hq, N)
        saved = (q, k, v, bias, first, y, lse)
        unused = (y, lse, y)  # in place of dy, delta and dq
        _by_queries[ctx.blocks, Hq](
            *saved, *unused, *ctx.settings, **ctx.by_queries, BACKWARD=False)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, bias, first, y, lse = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dv, dbias, delta = (torch.empty_like(x) for x in (q, k, v, bias, lse))
        results = (dy, delta, dq)
        _by_queries[ctx.blocks, len(lse)](
            *ctx.saved_tensors, *results, *ctx.settings, **ctx.by_queries, BACKWARD=True)
        # of each token, where its document ends: behind the last token with the same `first`
        end = torch.searchsorted(first, first, right=True, out_int32=True)
        inputs = (q, k, v, bias, end, lse, dy, delta)
        _by_keys[ctx.blocks, len(bias)](*inputs, dk, dv, dbias, *ctx.settings, **ctx.by_keys)
        return dq, dk, dv, dbias, None, None, None


def relaxed_attention(q, k, v, bias, first, window):
    """dms.relaxed_attention by Triton: q (B, Hq, T, D); k, v (B, Hkv, T, D); bias (B, Hkv, T)
    float32; first (B, T) int32 -> (B, Hq, T, D). Best where q, k and v are views of
    (B, T, heads, D): others are copied."""
    B, Hq, T, D = q.shape
    dtype = q.dtype
    width = max(16, triton.next_power_of_2(D))
    if B * T * Hq * width >= 2**31:
        raise ValueError(f"{B} x {T} tokens are too many at a time: offsets are 32 bits wide")
    if q.is_cpu and dtype == torch.bfloat16:  # the interpreter multiplies it as if it were integers
        q, k, v = (x.float() for x in (q, k, v))
    if D < width:
        q, k, v = (F.pad(x, (0, width - D)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    bias = bias.transpose(0, 1).flatten(1).contiguous()
    starts = torch.arange(0, B * T, T, dtype=torch.int32, device=first.device)
    first = (first + starts[:, None]).flatten()
    check_launch(D, q, k, v, bias, first)
    y = BiasedAttention.apply(q, k, v, bias, first, min(window, T), D**-0.5)
    y = y.to(dtype).view(B, T, Hq, width)
    return y[..., :D].transpose(1, 2)
