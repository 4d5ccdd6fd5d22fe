"""
The cache write of a decode step: one token into every row, by Triton.

It equals store_one in kv_cache.py, which is the rule in memory for one token. As token t arrives,
token t - W (W = window + 1) leaves the window, and

    slot = that of token t - W  if it was evicted,  else the row's next one

A KVCache on a GPU calls it once for each layer of a step. One program writes one row, since rows do
not depend on one another. All that they share is the stack of free pages, and an atomic subtraction
hands each program a page of its own.

Letters: N rows of a layer, M columns of the page table, P pages of the pool, D head size.
"""

import triton
import triton.language as tl

from kernels import check_launch


@triton.jit(do_not_specialize=["table_stride"])
def _store(
    k_ptr, v_ptr, evict_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, ring_ptr,
    keys_ptr, values_ptr, position_ptr, evicted_ptr, free_ptr, free_count_ptr,
    table_stride, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    W: tl.constexpr, SHIFT: tl.constexpr):
    """Program (row,)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(new_ptr + row) == 0:
        return
    evict = tl.load(evict_ptr + row).to(tl.int1)
    t = tl.load(seen_ptr + row)  # the new token's position
    length = tl.load(length_ptr + row).to(tl.int64)
    table_ptr += row * table_stride
    ring_ptr += row * W

    # the token that leaves the window: its slot, its page, and whether it was evicted
    leaves = t >= W
    oldest = tl.load(ring_ptr + t % W, mask=leaves, other=0).to(tl.int64)
    page = tl.load(table_ptr + oldest // PAGE, mask=leaves, other=0).to(tl.int64)
    was_evicted = tl.load(evicted_ptr + page * PAGE + oldest % PAGE, mask=leaves, other=0)
    reuses = was_evicted.to(tl.int1) & leaves
    if SHIFT and W == 1:  # the token that leaves is the one that is decided now
        reuses = evict & leaves
    elif SHIFT:
        newest = tl.load(ring_ptr + (t + W - 1) % W, mask=t > 0, other=0).to(tl.int64)
        its_page = tl.load(table_ptr + newest // PAGE, mask=t > 0, other=0).to(tl.int64)
        tl.store(evicted_ptr + its_page * PAGE + newest % PAGE, evict, mask=t > 0)

    slot = tl.where(reuses, oldest, length)
    if reuses == 0:
        if length % PAGE == 0:  # the last page is full
            top = tl.atomic_add(free_count_ptr, -1, sem="relaxed").to(tl.int64) - 1
            page = tl.load(free_ptr + top).to(tl.int64)
            tl.store(table_ptr + length // PAGE, page)
        else:
            page = tl.load(table_ptr + length // PAGE).to(tl.int64)
    tl.debug_barrier()  # all threads have read the row's state before one of them changes it

    d = tl.arange(0, WIDTH)
    k = tl.load(k_ptr + row * D + d, mask=d < D)
    v = tl.load(v_ptr + row * D + d, mask=d < D)
    place = page * PAGE + slot % PAGE
    tl.store(keys_ptr + place * D + d, k, mask=d < D)
    tl.store(values_ptr + place * D + d, v, mask=d < D)
    tl.store(position_ptr + place, t)
    tl.store(evicted_ptr + place, evict & (SHIFT == 0))  # shift 1: the next token decides
    tl.store(ring_ptr + t % W, slot)
    tl.store(length_ptr + row, tl.where(reuses, length, length + 1))


def store_one(k, v, evict, new, rows, pool, shift):
    """kv_cache.store_one by Triton. The free stack must hold a page for every row that needs one:
    KVCache.reserve sees to it, since a program could not say that there is none."""
    state = (rows.seen, rows.length, rows.table, rows.ring)
    slots = (pool.keys, pool.values, pool.position, pool.evicted)
    free = (pool.free, pool.free_count)
    tensors = (k.contiguous(), v.contiguous(), evict, new, *state, *slots, *free)
    N, D = k.shape
    check_launch(D, *tensors)
    _store[(N,)](  # one warp: 128 channels in 16 bits are 8 bytes a thread
        *tensors, rows.table.stride(0), D=D, WIDTH=triton.next_power_of_2(D),
        PAGE=pool.page_size, W=rows.ring.shape[1], SHIFT=shift, num_warps=1)
