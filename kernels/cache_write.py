"""
Cache write: one decode step's bookkeeping of one layer, a new token for every row, in one launch.

    j = t - (window + 1) leaves the window as t arrives: if j was evicted, t is written over j's slot; otherwise t is
    appended, on a fresh page from the free stack where the row's last one is full

It is the cache's rule for many tokens at T = 1. Nothing is copied to the host: a row's program reads the row's state,
changes it, and takes pages with an atomic subtraction, in whatever order rows come.

Letters: B sequences, N = B * Hkv rows (row b * Hkv + h), D head size, P pages of the pool, M columns of the
table, W = window + 1 entries of the ring.
"""
import torch

from kernels import check_launch, tl, triton


def cache_write_plain(k, v, evict, active, seen, length, ring_slot, ring_evict, table, free, top, k_pages,
                      v_pages, shift):
    """Store one new token per row and update the row's state, in place. Integers may be int32 (enough) or int64.

    Read: k, v (N, D), the pools' dtype; evict (N,) bool, the decision computed at this token, which speaks of token
    seen - shift, shift 0 or 1; active (B,) bool, sequences that bring a token, the others staying as they are; seen
    (B,) integer, tokens fed before; free (P,) integer, a stack of free pages with its top at top - 1.
    Updated: length (N,) pairs held; ring_slot (N, W) integer and ring_evict (N, W) bool, slot and decision of token t
    at t mod W; table (N, M) integer, a row's pages in order, as many as its length needs; top (1,); k_pages and
    v_pages (P, page_size, D).
    The caller sees to it that pages are not shared, and that stack and table have room (KVCache.reserve).
    """
    W, page_size, heads = ring_slot.shape[1], k_pages.shape[1], len(k) // len(seen)
    row = active.repeat_interleave(heads).nonzero()[:, 0]
    t = seen.long()[row // heads]
    if shift:
        known = t > 0
        ring_evict[row[known], (t[known] - 1) % W] = evict[row[known]]
    reuse = ring_evict[row, t % W] & (t >= W)
    slot = torch.where(reuse, ring_slot[row, t % W], length[row]).long()
    new = ~reuse & (slot % page_size == 0)
    top -= new.sum().to(top.dtype)
    table[row[new], slot[new] // page_size] = free[top + new.cumsum(0)[new] - 1].to(table.dtype)
    page = table[row, slot // page_size].long()
    length[row] += (~reuse).to(length.dtype)
    k_pages[page, slot % page_size], v_pages[page, slot % page_size] = k[row], v[row]
    ring_slot[row, t % W] = slot.to(ring_slot.dtype)
    ring_evict[row, t % W] = evict[row] & (not shift)


if triton is not None:
    @triton.jit(do_not_specialize=["heads", "table_stride"])
    def _write(k_ptr, v_ptr, evict_ptr, active_ptr, seen_ptr, length_ptr, ring_slot_ptr, ring_evict_ptr, table_ptr,
               free_ptr, top_ptr, k_pages_ptr, v_pages_ptr, heads, table_stride,
               D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
        """Program (row,), of a single warp: its threads read the row's state before any of them changes it."""
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, WIDTH)
        # what needs no other load to be found is asked for at once
        active = tl.load(active_ptr + row // heads)
        t = tl.load(seen_ptr + row // heads).to(tl.int64)
        evict = tl.load(evict_ptr + row).to(tl.int1)
        length = tl.load(length_ptr + row).to(tl.int64)
        k = tl.load(k_ptr + row * D + d, mask=d < D)
        v = tl.load(v_ptr + row * D + d, mask=d < D)
        if active:
            entry = row * W + t % W
            leaves = tl.load(ring_evict_ptr + entry).to(tl.int1)
            old = tl.load(ring_slot_ptr + entry).to(tl.int64)
            if SHIFT and W == 1:  # the token that leaves is the one that has just been decided
                leaves = evict
            elif SHIFT:
                tl.store(ring_evict_ptr + row * W + (t + W - 1) % W, evict, mask=t > 0)
            reuse = leaves & (t >= W)
            slot = tl.where(reuse, old, length)
            place = table_ptr + row * table_stride + slot // PAGE
            if (length % PAGE == 0) & (reuse == 0):
                last = tl.atomic_add(top_ptr, -1, sem="relaxed").to(tl.int64) - 1
                page = tl.load(free_ptr + last).to(tl.int64)
                tl.store(place, page)
            else:
                page = tl.load(place).to(tl.int64)
            where = (page * PAGE + slot % PAGE) * D + d
            tl.store(k_pages_ptr + where, k, mask=d < D)
            tl.store(v_pages_ptr + where, v, mask=d < D)
            tl.store(length_ptr + row, tl.where(reuse, length, length + 1))
            tl.store(ring_slot_ptr + entry, slot)
            tl.store(ring_evict_ptr + entry, evict & (SHIFT == 0))


def cache_write(k, v, evict, active, seen, length, ring_slot, ring_evict, table, free, top, k_pages, v_pages,
                shift):
    """cache_write_plain by the kernel. CPU tensors only under TRITON_INTERPRET=1."""
    k, v = k.contiguous(), v.contiguous()
    check_launch("cache_write", k, v, evict, active, seen, length, ring_slot, ring_evict, free, top, k_pages,
                 v_pages)
    if not {k.dtype, v.dtype} == {k_pages.dtype} == {v_pages.dtype}:
        raise ValueError(f"cache_write needs k and v of the pages' dtype, {k_pages.dtype}, not {k.dtype}, {v.dtype}")
    if shift not in (0, 1) or len(k) % len(seen):
        raise ValueError(f"cache_write needs a shift of 0 or 1, not {shift}, and len(k) a multiple of len(seen)")
    N, D = k.shape
    _write[(N,)](k, v, evict, active, seen, length, ring_slot, ring_evict, table, free,
                 top, k_pages, v_pages, N // len(seen), table.stride(0), D=D,
                 WIDTH=triton.next_power_of_2(D), PAGE=k_pages.shape[1], W=ring_slot.shape[1], SHIFT=shift,
                 num_warps=1)
