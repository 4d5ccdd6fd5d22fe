"""
The cache write of a decode step: one token into every row, by Triton.

It equals `store` in kv_cache.py, the rule in memory, for one token. As token t arrives,
token t - W (W = window + 1) leaves the window, and

    slot = that of token t - W  if it was evicted,  else the row's next one

A KVCache on a GPU calls it once for each layer of a step. One program writes one row, since rows do
not depend on one another. All that they share is the stack of free pages, and an atomic subtraction
hands each program a page of its own.

Letters: N rows of a layer, M columns of the page table, P pages of the pool, D head size.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(slot, table_ptr, PAGE: tl.constexpr):
    """Where a slot lies in the pool. table_ptr: the table of its row."""
    return tl.load(table_ptr + slot // PAGE) * PAGE + slot % PAGE


@triton.jit(do_not_specialize=["table_stride"])
def _store(
    k_ptr, v_ptr, evict_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, ring_ptr, keys_ptr,
    values_ptr, position_ptr, evicted_ptr, free_ptr, free_count_ptr, table_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
    """Program (row,). Its threads wait for one another at each barrier: what is read above it is
    read before anything below is written, and what is written above it is seen below."""
    row = tl.program_id(0)
    if tl.load(new_ptr + row) == 0:
        return
    evict = tl.load(evict_ptr + row)
    t = tl.load(seen_ptr + row)  # the new token's position
    length = tl.load(length_ptr + row)
    table_ptr += row * table_stride
    ring_ptr += row * W
    d = tl.arange(0, WIDTH)
    k = tl.load(k_ptr + row * D + d, d < D)
    v = tl.load(v_ptr + row * D + d, d < D)

    # the token that leaves the window; where there is none yet, slot 0 is looked up for nothing
    leaves = t >= W
    oldest = tl.load(ring_ptr + t % W, leaves, 0)
    its_place = place_of(oldest, table_ptr, PAGE)
    if SHIFT:  # what is decided now is about the newest token held
        newest = tl.load(ring_ptr + (t - 1) % W, t > 0, 0)
        tl.store(evicted_ptr + place_of(newest, table_ptr, PAGE), evict, t > 0)
        tl.debug_barrier()
        evict = False  # about the new one nothing is decided yet
    slot = length
    if tl.load(evicted_ptr + its_place, leaves, 0):
        slot = oldest
    elif length % PAGE == 0:  # the last page is full
        top = tl.atomic_add(free_count_ptr, -1, sem="relaxed") - 1
        tl.store(table_ptr + length // PAGE, tl.load(free_ptr + top))
    tl.debug_barrier()

    place = place_of(slot, table_ptr, PAGE).to(tl.int64)  # P * PAGE * D may pass 32 bits
    tl.store(keys_ptr + place * D + d, k, d < D)
    tl.store(values_ptr + place * D + d, v, d < D)
    tl.store(position_ptr + place, t)
    tl.store(evicted_ptr + place, evict)
    tl.store(ring_ptr + t % W, slot)
    tl.store(length_ptr + row, tl.maximum(length, slot + 1))


def store_one(k, v, evict, new, rows, pool, shift):
    """By Triton, see Kernels in kv_cache.py. The free stack must hold a page for every row that
    needs one: KVCache.reserve sees to it, since a program could not say that there is none."""
    # of the pool keys, values, position and evicted
    given = [x.contiguous() for x in (k, v, evict, new)]
    tensors = (*given, rows.seen, rows.length, rows.table, rows.ring, *pool.slots, pool.free, pool.free_count)
    N, D = k.shape
    _store[(N,)](  # one warp: 128 channels in 16 bits are 8 bytes a thread
        *tensors, rows.table.stride(0), D=D, WIDTH=triton.next_power_of_2(D),
        PAGE=pool.page_size, W=rows.ring.shape[1], SHIFT=shift, num_warps=1)
