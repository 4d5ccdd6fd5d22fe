"""
Cache write: the cache's rule. New tokens of every row are stored where evicted ones leave their slots, else appended.

    j = t - (window + 1) leaves the window as t arrives: if j was evicted, t is written over j's slot; otherwise t is
    appended, on a fresh page from the free stack where the row's last one is full

Many tokens at once are the same rule over a block: as many of its survivors as there are freed slots go there, the
rest is appended. The kernel is that for one token per row: a decode step's bookkeeping of one layer in one launch.

Letters: N rows, a KV head of a sequence each, T new tokens, D head size, P pages, M columns of the table, W entries.
"""
import torch
import torch.nn.functional as F

from kernels import check_launch, tl, triton


def about(evict, n, seen, ring_evict, shift):
    """What was decided at each new token (N, T) -> what is decided about it, (N, T) bool. With shift 1 the first
    decision is about the last token of the ring, and the last new token is not decided yet. n, seen (N, 1)."""
    if shift:
        last = (seen - 1) % ring_evict.shape[1]
        ring_evict.scatter_(1, last, torch.where((n > 0) & (seen > 0), evict[:, :1], ring_evict.gather(1, last)))
        evict = F.pad(evict[:, 1:], (0, 1))
    return evict & (torch.arange(evict.shape[1], device=evict.device) < n - shift)


def stored(evict, n, W):
    """Which new tokens (N, T) are stored: those that are kept, and those still in the window when the block ends."""
    t = torch.arange(evict.shape[1], device=evict.device)
    return ((t >= n - W) | ~evict) & (t < n)


def cache_write_plain(k, v, evict, lengths, seen, length, ring_slot, ring_evict, table, free, top, k_pages, v_pages,
                      shift):
    """Store the new tokens of every row and update the row's state, in place. Integers may be int32 or int64.

    Read: k, v (N, T, D), the pools' dtype; evict (N, T) bool, the decisions computed at these tokens, about those
    `shift`, 0 or 1, before them; lengths (N,) int64, how many of the T tokens are real; seen (N,) int64, tokens fed
    before; free (P,) integer, a stack of free pages with its top at top - 1.
    Updated: length (N,) pairs held; ring_slot (N, W) integer and ring_evict (N, W) bool, slot and decision of token t
    at t mod W; table (N, M) integer, a row's pages in order; top (1,); k_pages, v_pages (P, page_size, D).
    The caller sees to it that pages written to are not shared, and that stack and table have room."""
    (N, T, _), W, page_size = k.shape, ring_slot.shape[1], k_pages.shape[1]
    n, seen = lengths[:, None], seen[:, None]
    evict = about(evict, n, seen, ring_evict, shift)
    # the oldest of the ring leave the window, and the flagged ones leave their slots
    i = torch.arange(min(T, W), device=k.device)
    entry = (seen - W + i) % W
    freed = ring_evict.gather(1, entry) & (seen - W + i >= 0) & (i < n)
    reuse = ring_slot.gather(1, entry).gather(1, freed.int().argsort(dim=1, descending=True, stable=True))
    freed = freed.sum(1, keepdim=True)
    survive = stored(evict, n, W)
    rank = survive.cumsum(1) - 1
    slot = torch.where(rank < freed, reuse.gather(1, rank.clamp(0, len(i) - 1)), length[:, None] + rank - freed)
    have = -(-length // page_size)
    length += (survive.sum(1) - freed[:, 0]).to(length.dtype)
    need = -(-length // page_size) - have
    if need.any():
        row = torch.arange(N, device=k.device).repeat_interleave(need)
        taken = torch.arange(len(row), device=k.device)
        table[row, have[row] + taken - (need.cumsum(0) - need)[row]] = free[top - 1 - taken].to(table.dtype)
        top -= len(row)
    row, t = survive.nonzero(as_tuple=True)
    slot = slot[row, t]
    page, place = table[row, slot // page_size].long(), slot % page_size
    k_pages[page, place], v_pages[page, place] = k[row, t], v[row, t]
    if T > W:  # the ring is about the last of them
        recent = t >= lengths[row] - W
        row, t, slot = row[recent], t[recent], slot[recent]
    entry = (seen[row, 0] + t) % W
    ring_slot[row, entry], ring_evict[row, entry] = slot.to(ring_slot.dtype), evict[row, t]


if triton is not None:
    @triton.jit(do_not_specialize=["table_stride"])
    def _write(k_ptr, v_ptr, evict_ptr, lengths_ptr, seen_ptr, length_ptr, ring_slot_ptr, ring_evict_ptr, table_ptr,
               free_ptr, top_ptr, k_pages_ptr, v_pages_ptr, table_stride,
               D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
        """Program (row,), of a single warp: its threads read the row's state before any of them changes it."""
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, WIDTH)
        # what needs no other load to be found is asked for at once
        active = tl.load(lengths_ptr + row) > 0
        t = tl.load(seen_ptr + row)
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


def cache_write(k, v, evict, lengths, seen, length, ring_slot, ring_evict, table, free, top, k_pages, v_pages, shift):
    """cache_write_plain for T = 1 by the kernel. CPU tensors only under TRITON_INTERPRET=1."""
    k, v = k.contiguous(), v.contiguous()
    check_launch("cache_write", k, v, evict, lengths, seen, length, ring_slot, ring_evict, free, top, k_pages,
                 v_pages)
    if not {k.dtype, v.dtype} == {k_pages.dtype} == {v_pages.dtype}:
        raise ValueError(f"cache_write needs k and v of the pages' dtype, {k_pages.dtype}, not {k.dtype}, {v.dtype}")
    N, T, D = k.shape
    if shift not in (0, 1) or T != 1 or not len(lengths) == len(seen) == N:
        raise ValueError(f"cache_write needs a shift of 0 or 1, not {shift}, T = 1, not {T}, and lengths, seen (N,)")
    _write[(N,)](k, v, evict, lengths, seen, length, ring_slot, ring_evict, table, free,
                 top, k_pages, v_pages, table.stride(0), D=D,
                 WIDTH=triton.next_power_of_2(D), PAGE=k_pages.shape[1], W=ring_slot.shape[1], SHIFT=shift,
                 num_warps=1)
