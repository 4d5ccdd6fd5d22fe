"""
Decode attention: one query token per sequence against the pages that each row holds.

A few rows are many times as long as the rest, and lengths change while a captured graph does not. So
every row gets the same number of programs, and each takes its share of the row's own length: it
leaves its normalised result and its log-sum-exp, and the one that ends last merges the row's parts,
in their order. Nothing waits for the GPU. The arithmetic is small beside the reading, which sets the
sizes: a block of keys or values is 16 KiB, so that three programs, each with its next block on the
way, fit on an H200's multiprocessor.

Letters: N = B * Hkv rows, G query heads per KV head, D head size, P pages of the pool, M columns of
the table.
"""

import functools
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

    @triton.jit
    def attend_to(q, k, v, sees, scale, top, total, out):
        """Of queries q, one block of keys and values more: the highest score so far, the sum of
        weights relative to it, and that of weighted values. Scores are to base 2."""
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(sees, score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        fade = tl.exp2(top - highest)
        total = total * fade + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        return highest, total, out

    @triton.jit(do_not_specialize=["table_stride"])
    def _attend(
        q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, arrived_ptr, part_ptr, lse_ptr, y_ptr, scale,
        table_stride, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
        SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
        """y (N, G, D) of program (row, split) for a row of one part; else part (N, SPLITS, G, D) and
        lse (N, SPLITS, G), float32, and y by the last of the row's programs. arrived (N,) counts
        them, and is 0 before and after. Logarithms are to base 2: scale has the factor log2(e)."""
        row = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        length = tl.load(length_ptr + row).to(tl.int32)
        share = tl.maximum(tl.cdiv(length, SPLITS), LEAST)
        parts = tl.cdiv(length, share)
        first = split * share
        last = tl.minimum(length, first + share)
        if (first >= last) & (split > 0):
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
        table_ptr += row * table_stride
        page = tl.load(table_ptr + (first + t) // PAGE, mask=first + t < last, other=0)
        for start in range(first, last, BLOCK):
            held = start + t < last
            slot = page.to(tl.int64) * PAGE + (start + t) % PAGE
            later = start + BLOCK + t
            page = tl.load(table_ptr + later // PAGE, mask=later < last, other=0)
            where = slot[:, None] * D + d[None, :]
            mask = held[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + where, mask=mask, other=0.0)
            v = tl.load(v_ptr + where, mask=mask, other=0.0)
            top, total, out = attend_to(q, k, v, held[None, :], scale, top, total, out)
        out /= tl.maximum(total, 1e-30)[:, None]  # a row that holds nothing gives zeros
        at = g[:, None] * D + d[None, :]
        if parts <= 1:
            tl.store(y_ptr + row * G * D + at, out.to(y_ptr.dtype.element_ty), mask=heads)
        else:
            part = (row * SPLITS + split) * G
            tl.store(part_ptr + part * D + at, out, mask=heads)
            tl.store(lse_ptr + part + g, top + tl.log2(total), mask=g < G)
            tl.debug_barrier()  # all threads have stored before one of them says so
            if tl.atomic_add(arrived_ptr + row, 1) == parts - 1:
                tl.store(arrived_ptr + row, 0)
                for head in range(G):
                    y = _merge(part_ptr, lse_ptr, row * SPLITS * G + head, parts, G, D, WIDTH)
                    to = y_ptr + (row * G + head) * D + d
                    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=d < D)

    @triton.jit
    def _merge(part_ptr, lse_ptr, first, parts, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
        """(WIDTH,) float32: the mean of a row's parts of one query head, weighted by 2^lse. Other
        programs have written them: so they are read from L2 (".cg"), which all share."""
        d = tl.arange(0, WIDTH)
        top = -1e30
        total = 0.0
        out = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, parts, 16):
            split = start + tl.arange(0, 16)
            is_part = split < parts
            part = first + split * G
            lse = tl.load(lse_ptr + part, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            mask = is_part[:, None] & (d < D)[None, :]
            at = part_ptr + part[:, None] * D + d[None, :]
            x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            highest = tl.maximum(top, tl.max(lse, 0))
            weight = tl.exp2(lse - highest)
            fade = tl.exp2(top - highest)
            total = total * fade + tl.sum(weight, 0)
            out = out * fade + tl.sum(x * weight[:, None], 0)
            top = highest
        return out / total


LEAST = 16  # pairs of a program: fewer are not worth one


def splits_of(rows):
    """How many programs share a row. 256 in all occupy a GPU; 16 for each row keep one that is many
    times as long as the others from being waited for."""
    return min(max(triton.next_power_of_2(256 // rows), 16), 128)


@functools.cache
def counters(rows, device):
    """Of each row how many of its programs have ended, (rows,) int32: 0 between two launches, all
    of which use the same, one after another."""
    return torch.zeros(rows, dtype=torch.int32, device=device)


def decode_attention(q, k_pages, v_pages, table, length):
    """decode_attention_plain by Triton: D up to 256 (made for 64, 96, 128 and 256), G from 1 to 16,
    any page_size that is a power of two, float32, float16 or bfloat16. On one stream at a time."""
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
    splits = splits_of(N)
    part = torch.empty(N, splits, G, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(N, splits, G, dtype=torch.float32, device=q.device)
    y = torch.empty_like(q)
    _attend[N, splits](
        q, k_pages, v_pages, table, length, counters(N, q.device), part, lse, y,
        D**-0.5 * math.log2(math.e), table.stride(0), G=G, D=D, WIDTH=width, PAGE=page_size,
        SPLITS=splits, LEAST=LEAST, BLOCK=16384 // (width * q.element_size()),
        num_warps=8 if q.dtype == torch.float32 else 4,  # 4 spill in float32
        num_stages=3)
    return y.to(dtype)
