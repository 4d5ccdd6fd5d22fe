"""
Training attention: the visibility rule with every decision relaxed to a bias on the key. A row is
packed with several documents; none sees another.

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

First in plain PyTorch, then by Triton. A program of _by_queries takes a block of queries and walks
over the keys that they see, for y or, in backward, for dq; one of _by_keys takes a block of keys
and walks over the queries that see them, of all query heads of its KV head. So sums stay in
registers, in an order that is always the same. Every walk has two parts. In one, every key is
outside the window and in the past; the BAND is the other, from the window's edge to the diagonal,
where pairs are told apart.

The kernels have q, k, v and y as (N, heads, D), which is how the projections give them; N is B * T,
for a batch of rows is one row with more documents. Scores and lse are to base 2 there: they have
the factor log2(e).
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import capability, check_launch, tl, triton

KEEPS_SCORES = 1024  # longer sequences compute their scores again in backward


def relaxed_attention_plain(q, k, v, bias, first, window, block=128):
    """q: (B, Hq, T, D); k, v: (B, Hkv, T, D); bias: (B, Hkv, T) float32; first: (B, T) int32, the
    position at which each token's document begins. Returns (B, Hq, T, D) in q's dtype, with
    gradients of q, k, v and bias; in between all is float32. Takes `block` queries at a time, each
    against the keys up to its end; beyond KEEPS_SCORES tokens memory grows with block * T only.
    """
    T = q.shape[2]
    by_group = q.float().unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, T, D)
    context = (k.float(), v.float(), bias)
    attend = attend_rows
    if T > KEEPS_SCORES:
        attend = functools.partial(checkpoint, attend_rows, use_reentrant=False)
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)  # keys from there on lie in the future of all these queries
        past = [x[:, :, :end] for x in context]
        query = by_group[:, :, :, start:end]
        outputs.append(attend(query, *past, first[:, start:end], start, window))
    return torch.cat(outputs, dim=3).flatten(1, 2).to(q.dtype)


def attend_rows(q, k, v, bias, first, start, window):
    """The queries from position `start` on: q (B, Hkv, G, n, D), first (B, n), against k, v
    (B, Hkv, S, D) with bias (B, Hkv, S) -> (B, Hkv, G, n, D), all float32."""
    query = torch.arange(start, start + q.shape[3], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    mask = torch.where(query - key > window, bias[:, :, None], 0)  # (B, Hkv, n, S)
    hidden = (key > query) | (key < first[:, :, None])  # (B, n, S)
    mask = mask.masked_fill(hidden[:, None], float("-inf"))
    score = torch.einsum("bhgid,bhjd->bhgij", q * q.shape[-1] ** -0.5, k) + mask[:, :, None]
    return torch.einsum("bhgij,bhjd->bhgid", score.softmax(dim=-1), v)


if triton is not None:
    LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _tile(token, head, N, HEADS: tl.constexpr, D: tl.constexpr):
        """Offsets in (N, HEADS, D) of the vectors of some tokens, and their mask."""
        row = token * HEADS + head
        return row[:, None] * D + tl.arange(0, D)[None, :], token[:, None] < N

    @triton.jit
    def _scores(x, y, bias, query, key, visible, window, scale, BAND: tl.constexpr):
        """Base 2 scores of queries x and keys y, or of keys x and queries y: of one the positions
        are a column, of the other a row. visible: within the document."""
        bias *= LOG2E
        if BAND:
            bias = tl.where(query > key + window, bias, 0.0)
            visible = visible & (query >= key)
        score = tl.dot(x, tl.trans(y), input_precision="ieee") * (scale * LOG2E) + bias
        return tl.where(visible, score, float("-inf"))

    @triton.jit(do_not_specialize=["N", "window"])
    def _by_queries(
        q_ptr, k_ptr, v_ptr, bias_ptr, first_ptr, y_ptr, lse_ptr, dy_ptr, delta_ptr, dq_ptr,
        N, window, scale, Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, BACKWARD: tl.constexpr):
        """Program (block of queries, query head): y and lse, or in backward dq and delta. The last
        blocks, which have the longest walks, begin first."""
        start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
        head = tl.program_id(1)
        kv_head = head // (Hq // Hkv)
        query = start + tl.arange(0, QUERIES)
        row = head * N + query
        at, mask = _tile(query, head, N, Hq, D)
        q = tl.load(q_ptr + at, mask, 0.0)
        first = tl.load(first_ptr + query, query < N, 0)
        total = tl.zeros((QUERIES, D), tl.float32)  # of p v, or of dscore k
        if BACKWARD:
            dy = tl.load(dy_ptr + at, mask, 0.0)
            delta = tl.sum(tl.load(y_ptr + at, mask, 0.0) * dy.to(tl.float32), 1)
            tl.store(delta_ptr + row, delta, query < N)
            lse = tl.load(lse_ptr + row, query < N, 0.0)
        else:
            norm = tl.zeros((QUERIES,), tl.float32)
            top = norm - 1e30
        begin = tl.load(first_ptr + start)
        # up to `edge` all queries see a block of keys by the bias; from there on some may not
        edge = begin + tl.maximum(start - window - begin, 0) // KEYS * KEYS
        end = tl.minimum(start + QUERIES, N)
        for BAND in tl.static_range(2):
            for block in range(edge if BAND else begin, end if BAND else edge, KEYS):
                key = block + tl.arange(0, KEYS)
                at_key, mask_key = _tile(key, kv_head, N, Hkv, D)
                k = tl.load(k_ptr + at_key, mask_key, 0.0)
                v = tl.load(v_ptr + at_key, mask_key, 0.0)
                bias = tl.load(bias_ptr + kv_head * N + key, key < N, 0.0)
                score = _scores(
                    q, k, bias[None, :], query[:, None], key[None, :],
                    key[None, :] >= first[:, None], window, scale, BAND)
                if BACKWARD:
                    dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
                    dscore = tl.exp2(score - lse[:, None]) * (dp - delta[:, None])
                    total = tl.dot(dscore.to(k.dtype), k, total, input_precision="ieee")
                else:
                    highest = tl.maximum(top, tl.max(score, 1))
                    p = tl.exp2(score - highest[:, None])
                    fade = tl.exp2(top - highest)
                    norm = norm * fade + tl.sum(p, 1)
                    total *= fade[:, None]
                    total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
                    top = highest
        if BACKWARD:
            tl.store(dq_ptr + at, (total * scale).to(q.dtype), mask)
        else:
            tl.store(y_ptr + at, (total / norm[:, None]).to(q.dtype), mask)
            tl.store(lse_ptr + row, top + tl.log2(norm), query < N)

    @triton.jit(do_not_specialize=["N", "window"])
    def _by_keys(
        q_ptr, k_ptr, v_ptr, bias_ptr, end_ptr, lse_ptr, dy_ptr, delta_ptr, dk_ptr, dv_ptr,
        dbias_ptr, N, window, scale, Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr):
        """Program (block of keys, KV head): dk, dv and dbias."""
        start = tl.program_id(0) * KEYS
        kv_head = tl.program_id(1)
        key = start + tl.arange(0, KEYS)
        at, mask = _tile(key, kv_head, N, Hkv, D)
        k = tl.load(k_ptr + at, mask, 0.0)
        v = tl.load(v_ptr + at, mask, 0.0)
        bias = tl.load(bias_ptr + kv_head * N + key, key < N, 0.0)
        end = tl.load(end_ptr + key, key < N, 0)
        dk = tl.zeros((KEYS, D), tl.float32)
        dv = tl.zeros((KEYS, D), tl.float32)
        dbias = tl.zeros((KEYS,), tl.float32)
        last = tl.max(end, 0)
        edge = tl.minimum(start + tl.cdiv(KEYS + window, QUERIES) * QUERIES, last)
        for head in range(kv_head * (Hq // Hkv), (kv_head + 1) * (Hq // Hkv)):
            for BAND in tl.static_range(2):
                for block in range(start if BAND else edge, edge if BAND else last, QUERIES):
                    query = block + tl.arange(0, QUERIES)
                    row = head * N + query
                    at_query, mask_query = _tile(query, head, N, Hq, D)
                    q = tl.load(q_ptr + at_query, mask_query, 0.0)
                    dy = tl.load(dy_ptr + at_query, mask_query, 0.0)
                    lse = tl.load(lse_ptr + row, query < N, 0.0)
                    delta = tl.load(delta_ptr + row, query < N, 0.0)
                    score = _scores(
                        k, q, bias[:, None], query[None, :], key[:, None],
                        query[None, :] < end[:, None], window, scale, BAND)
                    p = tl.exp2(score - lse[None, :])
                    dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
                    dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
                    dscore = p * (dp - delta[None, :])
                    dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee")
                    if BAND:
                        dscore = tl.where(query[None, :] > key[:, None] + window, dscore, 0.0)
                    dbias += tl.sum(dscore, 1)
        tl.store(dk_ptr + at, (dk * scale).to(k.dtype), mask)
        tl.store(dv_ptr + at, dv.to(k.dtype), mask)
        tl.store(dbias_ptr + kv_head * N + key, dbias, key < N)


def block_sizes(q):
    """(own, other, few): the tokens whose sums a program holds, and how many it takes at a time on
    its walk, _by_queries and _by_keys: what compiles without spilling registers, at D up to 128 in
    16 bits and 64 in float32, for H100 (9), B200 (10), and A100, which multiplies from registers
    as others do."""
    if q.dtype == torch.float32 and not q.is_cpu:  # its products are made in registers
        return max(2048 // q.shape[2], 32), 32, 16
    own = min(128, 32768 // (q.shape[2] * q.element_size()))
    major = capability(q)
    if major == 10:
        own = min(own, 64)
        return own, own, own
    other = own // 2 if major == 9 else own // 4
    return own, max(other, 16), max(other // 2, 16)


class Kernels(torch.autograd.Function):
    """Forward and backward. q: (N, Hq, D), D a power of two; k, v: (N, Hkv, D); bias:
    (Hkv, N) float32; first: (N,) int32; all contiguous. Returns (N, Hq, D)."""

    @staticmethod
    def forward(ctx, q, k, v, bias, first, window, scale):
        N, Hq, D = q.shape
        own, other, few = block_sizes(q)
        sizes = dict(Hq=Hq, Hkv=len(bias), D=D, num_warps=8, num_stages=2)
        ctx.blocks = triton.cdiv(N, own)
        ctx.settings = (N, window, scale)
        ctx.by_queries = dict(sizes, QUERIES=own, KEYS=other)
        ctx.by_keys = dict(sizes, QUERIES=few, KEYS=own)
        y = torch.empty_like(q)
        lse = bias.new_empty(Hq, N)
        saved = (q, k, v, bias, first, y, lse)
        unused = (y, lse, y)  # dy, delta and dq
        _by_queries[ctx.blocks, Hq](
            *saved, *unused, *ctx.settings, **ctx.by_queries, BACKWARD=False)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, bias, first, y, lse = ctx.saved_tensors
        dy = dy.contiguous()
        dq, dk, dv, dbias, delta = (torch.empty_like(x) for x in (q, k, v, bias, lse))
        _by_queries[ctx.blocks, len(lse)](
            *ctx.saved_tensors, dy, delta, dq, *ctx.settings, **ctx.by_queries, BACKWARD=True)
        # of each token, where its document ends: after the last token with the same `first`
        end = torch.searchsorted(first, first, right=True, out_int32=True)
        _by_keys[ctx.blocks, len(bias)](
            q, k, v, bias, end, lse, dy, delta, dk, dv, dbias, *ctx.settings, **ctx.by_keys)
        return dq, dk, dv, dbias, None, None, None


def relaxed_attention(q, k, v, bias, first, window):
    """relaxed_attention_plain by Triton: D up to 256, and float32, float16 or bfloat16. Best where
    q, k and v are views of (B, T, heads, D): others are copied."""
    B, Hq, T, D = q.shape
    width = max(16, 1 << (D - 1).bit_length())
    is_small = D <= 256 and B * T * Hq * width < 2**31  # offsets are int32
    assert is_small, f"relaxed_attention: {tuple(q.shape)} is too large"
    dtype = q.dtype
    if q.is_cpu and dtype == torch.bfloat16:  # the interpreter multiplies it as if it were integers
        q, k, v = (x.float() for x in (q, k, v))
    if D < width:
        q, k, v = (F.pad(x, (0, width - D)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    bias = bias.transpose(0, 1).flatten(1).contiguous()
    rows = torch.arange(0, B * T, T, dtype=torch.int32, device=first.device)
    first = (first + rows[:, None]).flatten()
    check_launch("relaxed_attention", q, k, v, bias, first)
    y = Kernels.apply(q, k, v, bias, first, min(window, T), D**-0.5)
    return y.to(dtype).view(B, T, Hq, width)[..., :D].transpose(1, 2)
