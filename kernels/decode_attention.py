"""
Decode attention: one query token per sequence against the pages that each row holds.

A few rows are many times as long as the rest. So the work is cut along the length: program (row,
split) attends to `split` of the row's pairs and leaves their normalised result and its log-sum-exp;
another kernel merges them. How many splits there are follows from the shapes alone: nothing waits
for the GPU, and a captured graph stays right while lengths change. The arithmetic is small beside
the reading, which sets the sizes: a block of keys or values is 16 KiB, so that three programs, each
with its next block on the way, fit on an H200's multiprocessor.

Letters: N = B * Hkv rows, G query heads per KV head, D head size, P pages of the pool, M columns of
the table.
"""

import math

import torch

from kernels import check_launch, tl, triton


@torch.no_grad()
def decode_attention_plain(q, k_pages, v_pages, table, length):
    """Softmax attention, in float32 and at scale D^-0.5, of each row's queries to its pairs.

    q: (N, G, D); k_pages, v_pages: (P, page_size, D), q's dtype; table: (N, M) integer, a row's
    pages in order; length: (N,) integer, the pairs that a row holds; 0 gives zeros. What lies
    beyond, in the last page and in the table, may be anything. Returns (N, G, D), q's dtype.
    """
    page_size = k_pages.shape[1]
    y = torch.zeros_like(q)
    for row, n in enumerate(length.tolist()):
        if n > 0:
            pages = table[row, : -(-n // page_size)].long()
            k = k_pages[pages].flatten(0, 1)[:n].float()  # (n, D)
            v = v_pages[pages].flatten(0, 1)[:n].float()
            score = q[row].float() * q.shape[2] ** -0.5 @ k.T  # (G, n)
            y[row] = (score.softmax(dim=1) @ v).to(q.dtype)
    return y


if triton is not None:

    @triton.jit(do_not_specialize=["table_stride"])
    def _attend(
        q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, lse_ptr, scale, table_stride,
        G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
        SPLIT: tl.constexpr, BLOCK: tl.constexpr):
        """part (N, splits, G, D) and lse (N, splits, G), float32, of program (row, split).
        Logarithms are to base 2: scale has the factor log2(e)."""
        row = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        first = split * SPLIT
        last = tl.minimum(tl.load(length_ptr + row).to(tl.int32), first + SPLIT)
        if first >= last:
            return
        g = tl.arange(0, 16)
        d = tl.arange(0, WIDTH)
        t = tl.arange(0, BLOCK)
        heads = (g < G)[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + row * G * D + g[:, None] * D + d[None, :], mask=heads, other=0.0)
        top = tl.full((16,), -1e30, tl.float32)
        total = tl.zeros((16,), tl.float32)
        out = tl.zeros((16, WIDTH), tl.float32)
        # pages are looked up a turn ahead: the loads of keys and values do not wait for it
        column = 0 if PAGE >= BLOCK else t // PAGE
        last_page = (last - 1) // PAGE
        table_ptr += row * table_stride
        page = tl.load(table_ptr + tl.minimum(first // PAGE + column, last_page))
        for start in range(first, last, BLOCK):
            held = start + t < last
            slot = page.to(tl.int64) * PAGE + (start + t) % PAGE
            page = tl.load(table_ptr + tl.minimum((start + BLOCK) // PAGE + column, last_page))
            where = slot[:, None] * D + d[None, :]
            mask = held[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + where, mask=mask, other=0.0)
            v = tl.load(v_ptr + where, mask=mask, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (16, BLOCK)
            score = tl.where(held[None, :], score, float("-inf"))
            highest = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - highest[:, None])
            fade = tl.exp2(top - highest)
            total = total * fade + tl.sum(weight, 1)
            out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
            top = highest
        part = (row * tl.num_programs(1) + split) * G
        tl.store(
            part_ptr + part * D + g[:, None] * D + d[None, :], out / total[:, None], mask=heads
        )
        tl.store(lse_ptr + part + g, top + tl.log2(total), mask=g < G)

    @triton.jit(do_not_specialize=["splits"])
    def _merge(
        part_ptr, lse_ptr, length_ptr, y_ptr, splits, G: tl.constexpr, D: tl.constexpr,
        WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
        """y (N, G, D) of program (row, head): the mean of the row's parts, weighted by 2^lse."""
        row = tl.program_id(0).to(tl.int64)
        g = tl.program_id(1)
        d = tl.arange(0, WIDTH)
        count = (tl.load(length_ptr + row).to(tl.int32) + SPLIT - 1) // SPLIT
        top = -1e30
        total = 0.0
        out = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, count, BLOCK):
            split = start + tl.arange(0, BLOCK)
            held = split < count
            part = (row * splits + split) * G + g
            lse = tl.load(lse_ptr + part, mask=held, other=float("-inf"))
            mask = held[:, None] & (d < D)[None, :]
            x = tl.load(part_ptr + part[:, None] * D + d[None, :], mask=mask, other=0.0)
            highest = tl.maximum(top, tl.max(lse, 0))
            weight = tl.exp2(lse - highest)
            fade = tl.exp2(top - highest)
            total = total * fade + tl.sum(weight, 0)
            out = out * fade + tl.sum(x * weight[:, None], 0)
            top = highest
        y = out / tl.maximum(total, 1e-30)
        tl.store(y_ptr + (row * G + g) * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def tokens_per_split(rows, capacity):
    """How many pairs of a row one program takes. At 128 the results that programs write for the
    merge are 6 % of what they read, at 512 they are 2 %. But there must be programs enough for the
    GPU: a split is doubled only while there are more than 8,192 of them."""
    split = 128
    while split < 512 and rows * capacity > 8192 * split:
        split *= 2
    return split


def decode_attention(q, k_pages, v_pages, table, length):
    """decode_attention_plain by Triton: D up to 256 (made for 64, 96, 128 and 256), G from 1 to 16,
    any page_size that is a power of two, float32, float16 or bfloat16."""
    dtype = q.dtype
    assert dtype == k_pages.dtype == v_pages.dtype, "decode_attention: q and pages differ in dtype"
    if q.is_cpu and dtype == torch.bfloat16:  # the interpreter multiplies it as if it were integers
        q, k_pages, v_pages = (x.float() for x in (q, k_pages, v_pages))
    q = q.contiguous()
    check_launch("decode_attention", q, k_pages, v_pages, length)
    N, G, D = q.shape
    page_size = k_pages.shape[1]
    is_covered = D <= 256 and G <= 16 and page_size.bit_count() == 1 and dtype.itemsize <= 4
    assert is_covered, f"decode_attention: {D=}, {G=}, {page_size=}, {dtype} are not covered"

    width = max(triton.next_power_of_2(D), 16)
    capacity = table.shape[1] * page_size
    split = tokens_per_split(N, capacity)
    splits = -(-capacity // split)
    part = torch.empty(N, splits, G, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(N, splits, G, dtype=torch.float32, device=q.device)
    y = torch.empty_like(q)
    sizes = dict(G=G, D=D, WIDTH=width, SPLIT=split)
    scale = D**-0.5 * math.log2(math.e)
    warps = 8 if q.dtype == torch.float32 else 4  # 4 spill in float32
    _attend[N, splits](
        q, k_pages, v_pages, table, length, part, lse, scale, table.stride(0), **sizes,
        PAGE=page_size, BLOCK=16384 // (width * q.element_size()),
        num_warps=warps, num_stages=3)
    _merge[N, G](part, lse, length, y, splits, **sizes, BLOCK=16, num_warps=4)
    return y.to(dtype)
