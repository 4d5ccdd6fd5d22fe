"""
Attention over pages, by Triton: one query a head (decode), or a block of new tokens (prefill).

    y = sum over j of softmax(q k[j] / sqrt(D)) v[j]        over the pairs j that the query sees

In decode a query sees everything that its row holds. In prefill the new tokens are not stored yet:
a query sees what is held and the new tokens up to its own, but what was evicted only up to position
j + window. So each key gets `until`, the last token that sees it, and one comparison decides.
It equals attend_block and attend_one in kv_cache.py.
A KVCache on a GPU calls it once a layer.

The grid is (rows, parts of a row, blocks of queries). In decode there is one block, so a row is cut
into parts to keep the GPU busy, and each part gets its share of the row's own length. The number of
parts follows from the number of rows alone: the launch is the same whatever the lengths are, so
that a CUDA graph of a step can be replayed. A part leaves its own result and its log-sum-exp, and
PyTorch merges them: the mean of the results, weighted by a softmax over the log-sum-exps. In
prefill there are blocks enough, and a row is one part.

Pages are read where they lie. The walk looks up the page of each slot one turn ahead, so that the
loads of keys and values need not wait for the table.

Letters: N rows of a layer, G query heads of a row, T new tokens, D head size, P pages of the pool.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import block_sizes

FOREVER = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def attend_to(q, k_ptr, v_ptr, key, is_key, sees, top, total, out, D: tl.constexpr):
    """Let queries attend to one more block of keys, those that lie at vectors `key` of k and v.

    The softmax is made on the way. For every query `top` is the highest score so far, `total` the
    sum of the weights relative to it, and `out` that of the weighted values. Scores are to base 2,
    as the hardware's exponential is.
    """
    d = tl.arange(0, q.shape[1])[None, :]
    at = key[:, None] * D + d
    mask = is_key[:, None] & (d < D)
    k = tl.load(k_ptr + at, mask, 0.0)
    v = tl.load(v_ptr + at, mask, 0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * (LOG2E * D**-0.5)
    score = tl.where(sees, score, float("-inf"))
    highest = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - highest[:, None])
    fade = tl.exp2(top - highest)
    total = total * fade + tl.sum(weight, 1)
    out = out * fade[:, None]
    out = tl.dot(weight.to(v.dtype), v, out, input_precision="ieee")
    return highest, total, out


@triton.jit(do_not_specialize=["T", "window", "table_stride"])
def _attend(
    q_ptr, k_ptr, v_ptr, evict_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, keys_ptr, values_ptr,
    position_ptr, evicted_ptr, y_ptr, lse_ptr, T, window, table_stride,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, NEW: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Program (row, part, block of queries): y (N, G, T, parts, D) and lse (N, G, T, parts).

    A query is a head and a token; the heads of a token are neighbours, since they see the same
    keys. The last blocks, which see most, begin first. NEW: there are new tokens (prefill).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    query = (tl.num_programs(2) - 1 - tl.program_id(2)) * QUERIES + tl.arange(0, QUERIES)
    token = query // G
    line = (row * G + query % G) * T + token  # in (N, G, T)
    d = tl.arange(0, WIDTH)[None, :]
    mask = (token < T)[:, None] & (d < D)
    q = tl.load(q_ptr + line[:, None] * D + d, mask, 0.0)
    total = tl.full((QUERIES,), 1e-30, tl.float32)  # a query that sees nothing gets zeros
    top = tl.full((QUERIES,), -1e30, tl.float32)
    out = tl.zeros((QUERIES, WIDTH), tl.float32)
    t = tl.arange(0, KEYS)

    length = tl.load(length_ptr + row)
    share = tl.maximum(tl.cdiv(length, tl.num_programs(1)), 16)  # fewer pairs are not worth a part
    first = part * share
    last = tl.minimum(length, first + share)
    if NEW:
        new = tl.load(new_ptr + row).to(tl.int32)
        seen = tl.load(seen_ptr + row).to(tl.int32)  # the position of token 0
        is_padding = tl.min(token, 0) >= new  # all of the block: it need not see anything
        last = tl.where(is_padding, first, last)
    table_ptr += row * table_stride
    page = tl.load(table_ptr + (first + t) // PAGE, first + t < last, 0)
    for start in range(first, last, KEYS):
        slot = start + t
        is_held = slot < last
        key = page.to(tl.int64) * PAGE + slot % PAGE  # in the pool
        page = tl.load(table_ptr + (slot + KEYS) // PAGE, slot + KEYS < last, 0)
        sees = is_held[None, :]
        if NEW:
            # counted from the first new token, as `token` is
            until = tl.load(position_ptr + key, is_held, 0) + window - seen
            until = tl.where(tl.load(evicted_ptr + key, is_held, 0), until, FOREVER)
            sees = sees & (token[:, None] <= until[None, :])
        top, total, out = attend_to(q, keys_ptr, values_ptr, key, is_held, sees, top, total, out, D)
    if NEW:
        base = row * T  # token 0 in (N, T)
        end = tl.where(is_padding, 0, tl.minimum(tl.max(token, 0) + 1, new))
        for start in range(0, end, KEYS):
            key = start + t
            real = key < end
            until = tl.where(tl.load(evict_ptr + base + key, real, 0), key + window, FOREVER)
            sees = (key[None, :] <= token[:, None]) & (token[:, None] <= until[None, :])
            top, total, out = attend_to(q, k_ptr, v_ptr, base + key, real, sees, top, total, out, D)
    line = line * tl.num_programs(1) + part
    tl.store(y_ptr + line[:, None] * D + d, out / total[:, None], mask)
    tl.store(lse_ptr + line, (top + tl.log2(total)) / LOG2E, token < T)


def parts_of(rows):
    """How many programs share a row in decode: 256 in all occupy a GPU, and at least 16 share each
    row, so that one many times as long as the rest does not keep the GPU waiting."""
    return min(max(triton.next_power_of_2(256 // rows), 16), 128)


def attend_block(q, k, v, evict, new, rows, pool, window, is_block=True):
    """kv_cache.attend_block by Triton. is_block: there are new tokens; if not, the queries see all
    that their rows hold, and k, v, evict and new are not read."""
    N, G, T, D = q.shape
    tensors = [x.contiguous() for x in (q, k, v, evict, new)]
    tensors += [rows.seen, rows.length, rows.table, *pool.slots]
    width = max(triton.next_power_of_2(D), 16)
    queries, _, keys = block_sizes(q, width)
    warps = 8
    parts = 1
    if not is_block:  # reading is what takes time: few queries, and 16 KiB of keys at a time
        queries = 16
        keys = 16384 // (width * q.element_size())
        warps = 2 * q.element_size()  # with fewer, float32 spills registers
        parts = parts_of(N)
    y = q.new_empty(N, G, T, parts, D, dtype=q.dtype if parts == 1 else torch.float32)
    lse = q.new_empty(N, G, T, parts, dtype=torch.float32)
    blocks = triton.cdiv(T * G, queries)
    _attend[N, parts, blocks](
        *tensors, y, lse, T, window, rows.table.stride(0),
        G=G, D=D, WIDTH=width,
        PAGE=pool.page_size, NEW=is_block,
        QUERIES=queries, KEYS=keys,
        num_warps=warps, num_stages=3)
    if parts > 1:
        weight = torch.softmax(lse, dim=3)
        y = weight[:, :, :, None] @ y  # (N, G, T, 1, D)
    return y.view(N, G, T, D).to(q.dtype)


def attend_one(q, rows, pool):
    """kv_cache.attend_one by Triton."""
    no_block = 4 * (q,)  # anything: it is not read
    y = attend_block(q[:, :, None], *no_block, rows, pool, 0, is_block=False)
    return y[:, :, 0]
