"""
Cache write: the cache's rule. New tokens take the slots that fall free, or are appended.

    j = t - (window + 1) leaves the window as token t arrives: if j was evicted, t is written over
    j's slot; otherwise t is appended, on a fresh page from the free stack where the last is full

For a block of tokens that is the visibility rule, over the positions and decisions that the slots
carry: what the block's last token does not see any more is not needed after it. The kernels, here
by Triton and in cpu.py by numba, are the case of one token a row, in a launch for a layer.

`rows` and `pool` are the Rows of one layer and the PagePool of pages.py. Letters: N rows, T new
tokens, S slots of the longest row, D head size, W = window + 1 entries of the ring.
"""
import torch

from dms import visible
from kernels import check_launch, tl, triton


def locate(rows, row, slot, page_size):
    """Where slots lie in the pool: (page, place in the page), int64, of slot[i] of row[i]."""
    page = rows.table[row, slot // page_size]
    return page.long(), (slot % page_size).long()


def decide_newest(evict, new, rows, pool):
    """With a shift of 1, the first new token decides about the one before it, the newest that is
    held: note evict (N,) at its slot, in rows that get tokens (new > 0) and hold any."""
    W = rows.ring.shape[1]
    row = ((new > 0) & (rows.seen > 0)).nonzero()[:, 0]
    slot = rows.ring[row, (rows.seen[row] - 1) % W]
    pool.evicted[locate(rows, row, slot, pool.keys.shape[1])] = evict[row]


def add_pages(rows, pool, length):
    """Give the rows the pages that they need to hold `length` (N,) pairs. Raises CacheFull."""
    page_size = pool.keys.shape[1]
    have = -(-rows.length // page_size)
    need = -(-length // page_size) - have
    row = torch.arange(len(need), device=need.device).repeat_interleave(need)  # one for each page
    pages = pool.take(len(row))
    first = (need.cumsum(0) - need)[row]  # exclusive sum: the index in `pages` of that row's first
    ordinal = torch.arange(len(row), device=need.device) - first
    rows.table[row, have[row] + ordinal] = pages


def store(k, v, position, evict, row, slot, rows, pool):
    """Write k, v (n, D) of the tokens at these positions into slots of rows, (n,) integers each."""
    page, place = locate(rows, row, slot, pool.keys.shape[1])
    pool.keys[page, place] = k
    pool.values[page, place] = v
    pool.position[page, place] = position.int()
    pool.evicted[page, place] = evict


def held(slots, rows, some=slice(None)):
    """Copies of what some rows' slots (P, page_size, ...) hold, laid end to end, (n, S, ...); and
    which of them are in use, (n, S) bool. Others may hold anything."""
    length = rows.length[some, None]
    S = int(length.max())
    page_size = slots[0].shape[1]
    pages = rows.table[some, : -(-S // page_size)].long()
    in_use = torch.arange(S, device=length.device) < length
    return [x[pages].flatten(1, 2)[:, :S] for x in slots], in_use


def write_block(k, v, evict, new, rows, pool, window):
    """Store a block of tokens, and forget what nobody will see any more.

    After the block only what its last token sees is of use. So every pair held that it does not
    see leaves its slot free; of the block itself what it does not see is never stored; the rest
    takes the free slots first and is then appended. All of the rows' state is updated but `seen`.

    k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about these tokens; new:
    (N,) int64, how many of the T are real. Pages that are written to must not be shared, and the
    page tables must have room. Raises CacheFull, before anything has changed.
    """
    N, T = evict.shape
    (position, evicted), in_use = held((pool.position, pool.evicted), rows)
    last = (rows.seen + new - 1)[:, None]
    token = rows.seen[:, None] + torch.arange(T, device=k.device)  # (N, T): positions
    is_free = in_use & ~visible(last, position, evicted, window)  # (N, S)
    survives = visible(last, token, evict, window)  # (N, T); padding lies after the last: False

    # No free slot may remain, or there would be a hole below `length`. None does: of the W tokens
    # in the window at most `new` leave it, so at most min(new, W) slots fall free; and the last
    # min(new, W) tokens of the block are in the new window, so at least that many survive.
    frees = is_free.sum(1, keepdim=True)
    row, slot = is_free.nonzero(as_tuple=True)
    free_rank = is_free.cumsum(1)[row, slot] - 1
    free_slots = torch.zeros(N, T, dtype=torch.int64, device=k.device)  # each row's, in order
    free_slots[row, free_rank] = slot
    rank = survives.cumsum(1) - 1  # (N, T): a survivor's place among those of its row
    appended = rows.length[:, None] + rank - frees
    slots = torch.where(rank < frees, free_slots.gather(1, rank.clamp(min=0)), appended)

    length = rows.length + (survives.sum(1) - frees[:, 0]).int()
    add_pages(rows, pool, length)
    row, t = survives.nonzero(as_tuple=True)
    slot = slots[row, t]
    store(k[row, t], v[row, t], token[row, t], evict[row, t], row, slot, rows, pool)
    rows.length.copy_(length)

    W = rows.ring.shape[1]
    recent = t >= new[row] - W  # the ring is about the window only
    row, t, slot = row[recent], t[recent], slot[recent]
    rows.ring[row, token[row, t] % W] = slot.int()


def cache_write_plain(k, v, evict, new, rows, pool, shift):
    """Store one token in every row that gets one: a block of one, in place.

    k, v: (N, D), the pool's dtype. evict: (N,) bool, decided at these tokens about those `shift`, 0
    or 1, before them. new: (N,) int64, 1 for a row that gets a token, 0 for one that rests.
    """
    if shift == 1:
        decide_newest(evict, new, rows, pool)
        evict = torch.zeros_like(evict)  # about the new tokens nothing is decided yet
    window = rows.ring.shape[1] - 1
    write_block(k[:, None], v[:, None], evict[:, None], new, rows, pool, window)


if triton is not None:

    @triton.jit
    def put(
        row, k, v, evict, seen_ptr, length_ptr, table_ptr, ring_ptr, keys_ptr, values_ptr,
        position_ptr, evicted_ptr, free_ptr, free_count_ptr, table_stride, D: tl.constexpr,
        WIDTH: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr):
        """Store one token, k and v (WIDTH,), in a row, by a program that has the row to itself."""
        t = tl.load(seen_ptr + row)
        length = tl.load(length_ptr + row).to(tl.int64)
        d = tl.arange(0, WIDTH)
        table_ptr += row * table_stride
        ring_ptr += row * W
        # the token that leaves the window: its slot, and whether it was evicted
        leaves = t >= W
        oldest = tl.load(ring_ptr + t % W, mask=leaves, other=0).to(tl.int64)
        page = tl.load(table_ptr + oldest // PAGE, mask=leaves, other=0).to(tl.int64)  # if reused
        free = tl.load(evicted_ptr + page * PAGE + oldest % PAGE, mask=leaves, other=0)
        reuse = free.to(tl.int1) & leaves
        if SHIFT and W == 1:  # the token that leaves is the one that is decided now
            reuse = evict & leaves
        elif SHIFT:
            newest = tl.load(ring_ptr + (t + W - 1) % W, mask=t > 0, other=0).to(tl.int64)
            its_page = tl.load(table_ptr + newest // PAGE, mask=t > 0, other=0).to(tl.int64)
            tl.store(evicted_ptr + its_page * PAGE + newest % PAGE, evict, mask=t > 0)
        slot = tl.where(reuse, oldest, length)
        if reuse == 0:
            if length % PAGE == 0:
                top = tl.atomic_add(free_count_ptr, -1, sem="relaxed").to(tl.int64) - 1
                page = tl.load(free_ptr + top).to(tl.int64)
                tl.store(table_ptr + length // PAGE, page)
            else:
                page = tl.load(table_ptr + length // PAGE).to(tl.int64)
        where = page * PAGE + slot % PAGE
        tl.debug_barrier()  # all threads have loaded the row's state before one of them changes it
        tl.store(keys_ptr + where * D + d, k, mask=d < D)
        tl.store(values_ptr + where * D + d, v, mask=d < D)
        tl.store(position_ptr + where, t)
        tl.store(evicted_ptr + where, evict & (SHIFT == 0))
        tl.store(ring_ptr + t % W, slot)
        tl.store(length_ptr + row, tl.where(reuse, length, length + 1))

    @triton.jit(do_not_specialize=["table_stride"])
    def _write(
        k_ptr, v_ptr, evict_ptr, new_ptr, seen_ptr, length_ptr, table_ptr, ring_ptr, keys_ptr,
        values_ptr, position_ptr, evicted_ptr, free_ptr, free_count_ptr, table_stride,
        D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, W: tl.constexpr,
        SHIFT: tl.constexpr):
        """Program (row,)."""
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, WIDTH)
        if tl.load(new_ptr + row) > 0:
            evict = tl.load(evict_ptr + row).to(tl.int1)
            k = tl.load(k_ptr + row * D + d, mask=d < D)
            v = tl.load(v_ptr + row * D + d, mask=d < D)
            put(
                row, k, v, evict, seen_ptr, length_ptr, table_ptr, ring_ptr, keys_ptr, values_ptr,
                position_ptr, evicted_ptr, free_ptr, free_count_ptr, table_stride, D, WIDTH, PAGE,
                W, SHIFT)


def state_of(rows, pool):
    """What the kernels take of rows, of one layer, and the pool."""
    state = (rows.seen, rows.length, rows.table, rows.ring)
    slots = (pool.keys, pool.values, pool.position, pool.evicted)
    return (*state, *slots, pool.free, pool.free_count)


def cache_write(k, v, evict, new, rows, pool, shift):
    """cache_write_plain by Triton. The free stack must have a page for every row that needs one."""
    k = k.contiguous()
    v = v.contiguous()
    tensors = (k, v, evict, new, *state_of(rows, pool))
    check_launch("cache_write", *tensors)
    assert k.dtype == v.dtype == pool.keys.dtype, "cache_write: k, v and the pool differ in dtype"
    assert shift in (0, 1), "cache_write: shift is 0 or 1"
    N, D = k.shape
    _write[(N,)](
        *tensors, rows.table.stride(0), D=D, WIDTH=triton.next_power_of_2(D),
        PAGE=pool.keys.shape[1], W=rows.ring.shape[1], SHIFT=shift, num_warps=1)
