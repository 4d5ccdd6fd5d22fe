"""
A block of new tokens: what is held and the block itself, attended to; then the block, stored.

Both are the visibility rule, over the positions and decisions that the slots carry. What the last
token of the block does not see any more is not needed after it: such slots are free for the block's
tokens, and such tokens of the block are never stored. Plain PyTorch only.

Letters: N rows, T tokens, G query heads to a row, D head size, S slots of the longest row.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms import visible
from kernels.cache_write import add_pages, store

# not cuDNN, which spends up to half a second on a plan for every new shape
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def held(slots, rows, some=slice(None)):
    """What some rows' slots (P, page_size, ...) hold, laid end to end, (n, S, ...); and which of
    them are in use, (n, S) bool. Others may hold anything."""
    length = rows.length[some, None]
    S = int(length.max())
    page_size = slots[0].shape[1]
    pages = rows.table[some, : -(-S // page_size)].long()
    in_use = torch.arange(S, device=length.device) < length
    return [x[pages].flatten(1, 2)[:, :S] for x in slots], in_use


def attend_block(q, k, v, evict, new, rows, pool, window, scores_at_a_time):
    """Attention of new tokens, none of which is stored yet, to all that the rule lets them see.

    q: (N, G, T, D); k, v: (N, T, D), the pool's dtype; evict: (N, T) bool, what was decided about
    these tokens; new: (N,) int64, how many of the T are real. Returns (N, G, T, D). Takes as many
    rows at a time as make that many scores: on a CPU a long row is computed alone.
    """
    out = torch.zeros_like(q)
    T = q.shape[2]
    columns = int(rows.length.max()) + T
    rows_at_a_time = scores_at_a_time // (T * columns) + 1
    for begin in range(0, len(q), rows_at_a_time):
        some = slice(begin, begin + rows_at_a_time)
        T = int(new[some].max())
        block = (q[some, :, :T], k[some, :T], v[some, :T], evict[some, :T])
        out[some, :, :T] = attend_rows(*block, rows, pool, window, some)
    return out


def attend_rows(q, k, v, evict, rows, pool, window, some):
    """attend_block for the rows of the slice `some`, to which q, k, v and evict belong."""
    slots = (pool.keys, pool.values, pool.position, pool.evicted)
    (keys, values, position, evicted), in_use = held(slots, rows, some)
    S = in_use.shape[1]
    T = k.shape[1]
    G = q.shape[1]
    token = torch.arange(T, dtype=torch.int32, device=k.device)
    query = rows.seen[some, None].int() + token  # (n, T): positions of queries and new keys
    position = torch.cat((position, query), dim=1)  # (n, S + T)
    evicted = torch.cat((evicted, evict), dim=1)
    mask = visible(query[:, :, None], position[:, None], evicted[:, None], window)
    mask[:, :, :S] &= in_use[:, None]  # (n, T, S + T)

    unused = ~in_use[:, :, None]
    keys.masked_fill_(unused, 0)  # a weight of 0 times NaN would be NaN
    values.masked_fill_(unused, 0)
    keys = torch.cat((keys, k), dim=1)[:, None]  # (n, 1, S + T, D)
    values = torch.cat((values, v), dim=1)[:, None]
    with sdpa_kernel(BACKENDS):
        return F.scaled_dot_product_attention(
            q,
            keys.expand(-1, G, -1, -1),
            values.expand(-1, G, -1, -1),
            attn_mask=mask[:, None],
        )


def write_block(k, v, evict, new, rows, pool, window):
    """Store what the block's last token still sees of its tokens, in slots that it does not see any
    more, then in new ones; in place, but for `seen`. Arguments as in attend_block. Raises
    CacheFull, before anything of this layer has changed."""
    N, T = evict.shape
    (position, evicted), in_use = held((pool.position, pool.evicted), rows)
    last = (rows.seen + new - 1)[:, None]
    token = rows.seen[:, None] + torch.arange(T, device=k.device)  # (N, T): positions
    free = in_use & ~visible(last, position, evicted, window)  # (N, S)
    survives = visible(last, token, evict, window)  # (N, T); none of the padding does

    # the r-th survivor of a row takes its r-th free slot, or is appended
    row, slot = free.nonzero(as_tuple=True)
    rank = free.cumsum(1)[row, slot] - 1
    slots = torch.zeros(N, T, dtype=torch.int64, device=k.device)
    slots[row, rank] = slot
    frees = free.sum(1, keepdim=True)
    rank = survives.cumsum(1) - 1
    slots = slots.gather(1, rank.clamp(min=0))
    slots = torch.where(rank < frees, slots, rows.length[:, None] + rank - frees)

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
